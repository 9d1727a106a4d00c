"""Ordinary training."""

from torch import nn
from torch.nn import functional as F

from rempart.core.repro import Draws
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Loss, Objective, hits, objectives


@objectives.register("plain", None)
def plain() -> Objective:
    """Minimise the cross-entropy on the images as they are."""
    return Objective(loss=cross_entropy)


def cross_entropy(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
    """The `LossOf` that is the cross-entropy of the crafted images, whatever crafted them."""
    z = model(x_adv)
    return Loss(F.cross_entropy(z, y), {"accuracy": hits(z, y)})
