"""The tensor types of ggml, the library under llama.cpp: bytes of blocks, and what they stand for.

In: rows of weights, or the bytes of their blocks. Out: bytes, or weights. Open first: types.py
(block sizes), then scalar.py (types of one code per weight); lattice.py decodes those of one code
per 4 or 8 weights, encoder.py calls ggml, feedback.py rounds anew with error feedback.
"""
