"""What a training run minimises: one file per method."""

from rempart.train.objectives.alp import alp
from rempart.train.objectives.awp import awp
from rempart.train.objectives.catalogue import Loss, Objective, objectives
from rempart.train.objectives.mart import mart
from rempart.train.objectives.mixed import mixed
from rempart.train.objectives.pgd_at import pgd_at
from rempart.train.objectives.plain import plain
from rempart.train.objectives.trades import trades

__all__ = ["Loss", "Objective", "alp", "awp", "mart", "mixed", "objectives", "pgd_at", "plain", "trades"]
