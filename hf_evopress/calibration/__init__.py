"""Text in, statistics out: what levels are made from and predicted by.

In: files or Hub data sets, a dense model. Out: token windows, second moments of every unit's
inputs and output gradients. Open first: data.py, then input_moments.py.
"""
