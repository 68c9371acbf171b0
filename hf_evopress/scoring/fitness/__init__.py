"""What the search minimises, one fitness per file, found by file name.

In: the logits of a plan, and what the dense model says of the same tokens. Out: one loss per
sequence. Open first: base.py (what a fitness is), then kl.py (the default).
"""
