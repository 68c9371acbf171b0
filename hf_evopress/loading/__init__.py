"""The format inside transformers: from `from_pretrained` to the first token.

In: a packed checkpoint, or a dense model and a plan. Out: a model whose compressed layers own
packed tensors and no dense weight. Open first: quantizer.py, then layers.py.
"""
