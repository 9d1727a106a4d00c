"""Ordinary training."""

from torch import nn
from torch.nn import functional as F

from rempart.core.repro import Draws
from rempart.core.types import Images, Labels
from rempart.train.objectives.catalogue import Loss, Objective, hits, objectives


@objectives.register("plain", None)
def plain() -> Objective:
    """Minimise the cross-entropy on the images as they are."""

    def objective(model: nn.Module, x: Images, y: Labels, *, rng: Draws) -> Loss:
        z = model(x)
        return Loss(F.cross_entropy(z, y), {"accuracy": hits(z, y)})

    return objective
