"""What others see: repositories on the Hub, cards, reports, plots.

In: a finished folder. Out: a pushed repository, a card, an HTML page, a picture. Open first:
hub.py, then cards.py.
"""
