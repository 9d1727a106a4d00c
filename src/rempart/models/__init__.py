"""Build, save and load classifiers."""

from rempart.models.load import card, load
from rempart.models.save import save
from rempart.models.zoo import build, models

__all__ = ["build", "card", "load", "models", "save"]
