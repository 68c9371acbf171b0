"""What a plan or a model is worth.

In: plans and a level store, or whole models; tokens. Out: losses per sequence, perplexity, KL
divergence, agreement. Open first: evaluator.py (plans), then evaluate.py (models). A new fitness
is one file in fitness/.
"""
