"""Better codes at the same bytes.

In: a plan, its level store, calibration text. Out: states that replace the store's, kept only
where held-out loss is lower. Open first: blockwise.py (block by block), then distillation.py
(the whole model, taught by the dense one).
"""
