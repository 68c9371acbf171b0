"""The whole line, step by step, resumable; every step leaves a file.

In: a recipe. Out: a compressed model with plan, card and measured figures. Open first:
pipeline.py (the line as one function), then job.py (what a job has and does).
"""
