"""What a training run minimises: one file per method."""

from rempart.objectives.adaptive import adaptive
from rempart.objectives.alp import alp
from rempart.objectives.awp import awp
from rempart.objectives.catalogue import Loss, Objective, objectives
from rempart.objectives.deep_defense import deep_defense
from rempart.objectives.fast import fast
from rempart.objectives.free import free
from rempart.objectives.gaussian import gaussian
from rempart.objectives.gfa import gfa
from rempart.objectives.ima import ima
from rempart.objectives.input_gradient import input_gradient
from rempart.objectives.mart import mart
from rempart.objectives.mixed import mixed
from rempart.objectives.parseval import parseval
from rempart.objectives.pgd_at import pgd_at
from rempart.objectives.plain import plain
from rempart.objectives.sns import sns
from rempart.objectives.trades import trades

__all__ = [
    "Loss",
    "Objective",
    "adaptive",
    "alp",
    "awp",
    "deep_defense",
    "fast",
    "free",
    "gaussian",
    "gfa",
    "ima",
    "input_gradient",
    "mart",
    "mixed",
    "objectives",
    "parseval",
    "pgd_at",
    "plain",
    "sns",
    "trades",
]
