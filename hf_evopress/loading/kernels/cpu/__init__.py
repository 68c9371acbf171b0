"""Kernels on a CPU, which numba compiles: packed rows times activations, and rotations.

Open first: compiled.py, which calls them; then native.py, which puts rows.py and blocks.py
together.
"""
