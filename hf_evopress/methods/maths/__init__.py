"""Tensor maths that methods share: packing, grids, error feedback, second moments.

In: tensors. Out: tensors. Open first: linalg.py (`Stats`, what a layer's calibration is), then
codes.py (integer codes as they are stored).
"""
