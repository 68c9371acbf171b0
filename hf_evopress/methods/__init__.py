"""Compression methods: what one weight may become. One method per file, found by file name.

In: a weight (out, in) and the statistics of its layer. Out: packed tensors, their exact bits, and
the weight back. Methods see tensors only, never a model, a path or another method; what they
share is in maths/. Open first: base.py (what a method is), then rtn.py; compose.py adds up the
terms of a level, and is what the rest of the package calls.
"""
