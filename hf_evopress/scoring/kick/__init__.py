"""LLM-KICK: what a compressed model still knows and does, where its perplexity says little.

Jaiswal et al. 2024 (arXiv:2310.01382). In: a model, the dense one or none, questions and documents.
Out: shares of right answers, flips, agreement at the answers, ROUGE-L against the dense model's
summaries. Open first: probes.py, which runs the others; questions.py says what files may hold.
"""
