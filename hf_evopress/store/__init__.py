"""The level store: every candidate of every unit, packed in the form in which it will ship.

In: a dense model, a menu of levels, statistics. Out: packed tensors by unit and level, and what
each is predicted to cost. Open first: level_store.py, then unit_file.py (one
unit as a file) and index.py (when two stores are of one make).
"""
