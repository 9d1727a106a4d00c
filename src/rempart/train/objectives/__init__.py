"""What a training run minimises: one file per method."""

from rempart.train.objectives.adaptive import adaptive
from rempart.train.objectives.alp import alp
from rempart.train.objectives.awp import awp
from rempart.train.objectives.catalogue import Loss, Objective, objectives
from rempart.train.objectives.deep_defense import deep_defense
from rempart.train.objectives.fast import fast
from rempart.train.objectives.free import free
from rempart.train.objectives.gaussian import gaussian
from rempart.train.objectives.gfa import gfa
from rempart.train.objectives.ima import ima
from rempart.train.objectives.input_gradient import input_gradient
from rempart.train.objectives.mart import mart
from rempart.train.objectives.mixed import mixed
from rempart.train.objectives.parseval import parseval
from rempart.train.objectives.pgd_at import pgd_at
from rempart.train.objectives.plain import plain
from rempart.train.objectives.sns import sns
from rempart.train.objectives.trades import trades

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
