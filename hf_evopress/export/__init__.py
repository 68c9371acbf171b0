"""What a plan is written out as, one format per file, found by file name.

In: a dense model, levels and their packed states. Out: a checkpoint folder. Never sees the search.
Open first: base.py, then evopress.py (our own format).
"""
