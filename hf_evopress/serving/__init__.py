"""The format inside programs that serve models and are not transformers: vLLM.

In: a packed checkpoint. Out: layers of the program that compute from packed tensors, its own model
code unchanged. Open first: vllm_plugin.py, then shards.py.
"""
