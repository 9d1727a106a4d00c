"""What a training run minimises: one file per method."""

from rempart.train.objectives.catalogue import Loss, Objective, objectives
from rempart.train.objectives.pgd_at import pgd_at
from rempart.train.objectives.plain import plain

__all__ = ["Loss", "Objective", "objectives", "pgd_at", "plain"]
