"""Adversarial training on images and their attacked twins, in the older form of a weighted sum."""

from typing import Annotated

from annotated_types import Ge
from torch import nn
from torch.nn import functional as F

from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Loss, Objective, budgeted, hits, objectives
from rempart.objectives.pgd_at import pgd_images


@objectives.register("mixed", None)
def mixed(
    *,
    threat: str = "linf:8/255",
    steps: Annotated[int, Ge(1)] = 10,
    step: Pixels | None = None,
    weight: Annotated[float, Ge(0)] = 1.0,
) -> Objective:
    """Minimise (CE(x) + weight * CE(x')) / (1 + weight), where x' are the worst images that PGD finds.

    What papers before 2018, and comparisons with them, call adversarial training is this and not `pgd-at`. The attack
    sees the model in inference mode; x and x' pass through it one after the other, so that in training mode each has
    the batch statistics of its own kind.

    Args:
        threat: What to harden against, for example `linf:8/255`.
        steps: Gradient evaluations of the attack per image and epoch.
        step: Step length in pixel units. Default 2.5 * eps / steps.
        weight: Of the attacked images against the originals: 1 is half and half, 0.3 Kurakin's choice.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Goodfellow et al. 2015, arXiv:1412.6572, section 6; Kurakin et al. 2017, arXiv:1611.01236, section 3. Differs
        in the attack: both papers take one step from the image itself; steps=1 here is one step from a random start.
        Kurakin attacks only a part of each batch, ours attacks all of it.
    """
    within = budgeted(threat)

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        z, z_adv = model(x), model(x_adv)
        value = (F.cross_entropy(z, y) + weight * F.cross_entropy(z_adv, y)) / (1 + weight)
        return Loss(value, {"accuracy": hits(z, y), "accuracy_adv": hits(z_adv, y)})

    return Objective(loss=loss, craft=pgd_images(within, steps, step), threat=within)
