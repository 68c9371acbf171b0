"""Products with packed weights: rows are unpacked in caches and registers, never into memory.

In: activations and the packed tensors of a level, as they are stored. Out: activations. Open
first: layer.py, which steps a level takes; then cpu/ and gpu/, which do them.
"""
