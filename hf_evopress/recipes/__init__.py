"""The YAML file that decides everything about a run.

In: a recipe, a bundled one's name or options of the command line. Out: a checked, frozen `Recipe`.
Open first: recipe.py.
"""
