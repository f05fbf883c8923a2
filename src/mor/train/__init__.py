"""Training: recipes, budgets, a loop of our own, run folders that survive.

Start reading in :mod:`mor.train.loop`, then :mod:`mor.train.run`.
"""

from mor.train.callbacks import RouterCallback
from mor.train.plan.budget import Plan, plan_budget
from mor.train.recipe.file import dump_recipe, load_recipe
from mor.train.recipe.recipe import Recipe, parse_recipe
from mor.train.recipe.sections import RecipeError
from mor.train.run import Interrupted, train

__all__ = [
    "Interrupted",
    "Plan",
    "Recipe",
    "RecipeError",
    "RouterCallback",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "plan_budget",
    "train",
]
