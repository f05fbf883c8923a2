"""Training on Transformers' Trainer: recipes, budgets, schedule, router bookkeeping."""

from mor.train.budget import Plan, plan_budget
from mor.train.callbacks import RouterCallback
from mor.train.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from mor.train.run import train
from mor.train.trainer import MoRTrainer

__all__ = [
    "MoRTrainer",
    "Plan",
    "Recipe",
    "RecipeError",
    "RouterCallback",
    "load_recipe",
    "parse_recipe",
    "plan_budget",
    "train",
]
