"""Training on Transformers' Trainer: recipes, budgets, schedule, router bookkeeping."""

from mor.train.callbacks import RouterCallback
from mor.train.plan.budget import Plan, plan_budget
from mor.train.recipe.file import dump_recipe, load_recipe
from mor.train.recipe.recipe import Recipe, parse_recipe
from mor.train.recipe.sections import RecipeError
from mor.train.run import Interrupted, train
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
