"""Training on Transformers' Trainer: recipes, budgets, schedule, router bookkeeping."""

from mor.train.budget import Plan, plan_budget
from mor.train.callbacks import RouterCallback
from mor.train.recipe import Recipe, parse_recipe
from mor.train.recipe_file import dump_recipe, load_recipe
from mor.train.run import Interrupted, train
from mor.train.sections import RecipeError
from mor.train.trainer import MoRTrainer

__all__ = [
    "Interrupted",
    "MoRTrainer",
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
