"""ONNX graphs for ONNX Runtime: packed layers as its operators, inputs, key-value cache.

In: levels and their packed tensors. Out: modules that trace to nodes of the graph. Open first:
layers.py, then codes.py (MatMulNBits and GatherBlockQuantized).
"""
