"""Train and harden classifiers."""

from rempart.objectives import Loss, Objective, objectives
from rempart.train.config import Recipe, load_recipe, recipe_names
from rempart.train.loop import train
from rempart.train.run import run_training
from rempart.train.setup import refuse_alone

__all__ = [
    "Loss",
    "Objective",
    "Recipe",
    "load_recipe",
    "objectives",
    "recipe_names",
    "refuse_alone",
    "run_training",
    "train",
]
