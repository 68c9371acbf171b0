"""GEAR: the key-value cache in a few bits, beside weights in a few bits.

Kang et al. 2024 (arXiv:2403.05527). In: keys and values of attention layers. Out: packed codes, a
low-rank term and outliers (methods/maths/gear.py), and a cache that forward and generate take. Open
first: cache.py (the cache of transformers); generation.py is cache_implementation="gear".
"""
