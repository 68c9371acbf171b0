"""GGUF files: what llama.cpp calls the parts of a model, its tokenizer, the bytes of the file.

In: a config, a tokenizer, tensors. Out: one .gguf file. Open first: file.py, then architecture.py
(names, figures and the order of rows) and tokenizer.py (byte-level BPE).
"""
