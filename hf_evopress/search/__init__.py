"""Which unit gets which level, under one exact budget. Names, integers and losses; no torch.

In: a search space, a budget, predicted losses. Out: plans to measure (ask), then the best one
(tell). Open first: space.py, then ask_tell.py; evolve.py is the default strategy.
"""
