"""transformers' Trainer on a compressed model: adapters over it, or its own scales and norms.

In: a compressed model, text, perhaps the dense model as teacher. Out: an adapter or a tuned
checkpoint. Open first: tune.py.
"""
