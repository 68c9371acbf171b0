"""What a model is made of, for any architecture of transformers.

In: a model. Out: its units (linear weights), sub-blocks that can be dropped, experts as layers,
its blocks run one at a time, its size. Open first: units.py, then stream.py.
"""
