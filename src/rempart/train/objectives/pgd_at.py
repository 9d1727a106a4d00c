"""Adversarial training."""

from dataclasses import replace
from typing import Annotated

from annotated_types import Ge
from torch import nn
from torch.nn import functional as F

from rempart.attacks.gradient import pgd
from rempart.core.model import frozen
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels, Pixels
from rempart.train.objectives.catalogue import Loss, Objective, hits, objectives


@objectives.register("pgd-at", None)
def pgd_at(*, threat: str = "linf:8/255", steps: Annotated[int, Ge(1)] = 10, step: Pixels | None = None) -> Objective:
    """Minimise the cross-entropy on the worst images that PGD finds within the threat.

    The attack sees the model in inference mode, without dropout and with the running statistics of batch norm; the
    loss is then taken in training mode.

    Args:
        threat: What to harden against, for example `linf:8/255`.
        steps: Gradient evaluations of the attack per image and epoch.
        step: Step length in pixel units. Default 2.5 * eps / steps.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Madry et al. 2018, arXiv:1706.06083, equation 2.1. Differs in attacking in inference mode and in keeping the
        best point of the attack instead of the last.
    """
    within = Threat.parse(threat)
    assert within.budget >= 0  # raises where there is none, before anything is trained

    def objective(model: nn.Module, x: Images, y: Labels, *, rng: Draws) -> Loss:
        box = replace(within, low=getattr(model, "low", 0.0), high=getattr(model, "high", 1.0))
        with frozen(model):
            x_adv = pgd(model, x, y, box, steps=steps, step=step, rng=rng)
        z = model(x_adv)
        return Loss(F.cross_entropy(z, y), {"accuracy": hits(z, y)})

    return objective
