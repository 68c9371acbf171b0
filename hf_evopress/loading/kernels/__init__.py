"""Products with packed weights on a CPU: rows are unpacked in the cache, never into memory.

In: activations and the packed tensors of a level, as they are stored. Out: activations. Open
first: layer.py, which steps a level takes, then native.py, which does them.
"""
