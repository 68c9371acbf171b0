"""Kernels on a GPU, in Triton: what the kernels on a CPU do, from the same descriptions.

Open first: layer.py, then kinds.py: which triton_*.py multiplies which packed matrix.
"""
