"""EXL3, exllamav3's format: the tensors of a trellis-coded layer, and what its folder says of them.

In: the state of a level. Out: tensors by EXL3's names, and the entries of its config files. Open
first: tensors.py (which levels, which bytes), then config.py.
"""
