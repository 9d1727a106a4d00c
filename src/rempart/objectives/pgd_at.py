"""Adversarial training."""

from typing import Annotated

from annotated_types import Ge
from torch import nn

from rempart.attacks.gradient import pgd
from rempart.core.model import frozen
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Craft, Objective, boxed, budgeted, objectives
from rempart.objectives.plain import cross_entropy


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
    within = budgeted(threat)
    return Objective(loss=cross_entropy, craft=pgd_images(within, steps, step), threat=within)


def pgd_images(within: Threat, steps: int, step: float | None) -> Craft:
    """The `Craft` that gives the worst images PGD finds on cross-entropy within a threat."""

    def craft(model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float) -> Images:
        with frozen(model):
            return pgd(model, x, y, boxed(within, model), steps=steps, step=step, rng=rng)

    return craft
