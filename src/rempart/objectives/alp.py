"""Adversarial logit pairing."""

from typing import Annotated

from annotated_types import Ge, Interval
from torch import nn
from torch.nn import functional as F

from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Loss, Objective, budgeted, hits, objectives
from rempart.objectives.pgd_at import pgd_images


@objectives.register("alp", None)
def alp(
    *,
    threat: str = "linf:8/255",
    steps: Annotated[int, Ge(1)] = 10,
    step: Pixels | None = None,
    weight: Annotated[float, Ge(0)] = 0.5,
    clean: Annotated[float, Interval(ge=0, le=1)] = 0.0,
) -> Objective:
    """Minimise CE(x') + weight * |z(x) - z(x')|^2 / K, where x' are the worst images that PGD finds. Broken: see below.

    As a defence of ImageNet models this was broken: under a longer attack next to nothing was left of the accuracy it
    claimed (Engstrom et al. 2018, arXiv:1807.10272). Pairing makes the loss flat near the images, which misleads weak
    attacks; take it as a baseline and audit what it gives with many steps and restarts.

    Args:
        threat: What to harden against, for example `linf:8/255`.
        steps: Gradient evaluations of the attack per image and epoch.
        step: Step length in pixel units. Default 2.5 * eps / steps.
        weight: Of the squared difference of the logits, averaged over images and classes; 0 is adversarial training.
        clean: Share of the cross-entropy that the originals make up: 0 is x' alone, 0.5 half and half.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Kannan et al. 2018, arXiv:1803.06373. Differs in the attack, which sees the model in inference mode
        and keeps the best point instead of the last.
    """
    within = budgeted(threat)

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        z, z_adv = model(x), model(x_adv)
        pairing = F.mse_loss(z, z_adv)
        value = clean * F.cross_entropy(z, y) + (1 - clean) * F.cross_entropy(z_adv, y) + weight * pairing
        return Loss(value, {"accuracy": hits(z, y), "accuracy_adv": hits(z_adv, y), "pairing": pairing.detach()})

    return Objective(loss=loss, craft=pgd_images(within, steps, step), threat=within)
