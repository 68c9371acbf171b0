"""Levels and plans as text, and where plans live. The product; no torch.

In: level strings, JSON, a folder or a Hub repository. Out: `Level`, `Plan`, a pushed plan with
its card. Open first: level.py, then plan.py.
"""
