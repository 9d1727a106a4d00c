"""MART: adversarial training that presses harder on images the model gets wrong."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import nn
from torch.nn import functional as F

from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels, Logits, Scores
from rempart.objectives.catalogue import Loss, Objective, budgeted, hits, objectives
from rempart.objectives.pgd_at import pgd_images
from rempart.objectives.trades import divergence


@objectives.register("mart", None)
def mart(
    *,
    threat: str = "linf:8/255",
    steps: Annotated[int, Ge(1)] = 10,
    step: Pixels | None = None,
    beta: Annotated[float, Ge(0)] = 5.0,
) -> Objective:
    """Minimise BCE(x') + beta * KL(p(x) || p(x')) * (1 - p_y(x)), where x' are the worst images that PGD finds.

    BCE(x') = CE(x') - log(1.0001 - p_k(x') + 1e-12), with k the most likely wrong class: it also pushes the runner-up
    down. The factor is 1.0000001 - p_y(x), so that images the model is sure of count little in the divergence.

    Args:
        threat: What to harden against, for example `linf:8/255`.
        steps: Gradient evaluations of the attack per image and epoch.
        step: Step length in pixel units. Default 2.5 * eps / steps.
        beta: Weight of the divergence: 5 in the authors' code for a ResNet-18, 6 in some of its releases.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Wang et al. 2020, "Improving adversarial robustness requires revisiting misclassified examples", ICLR, and the
        authors' code, constants included. Differs in the attack, which starts anywhere in the ball and keeps the best
        point instead of starting near x and keeping the last; and in the divergence, which takes logarithms of
        probabilities from the logits.
    """
    within = budgeted(threat)

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        z, z_adv = model(x), model(x_adv)
        own = F.softmax(z, 1).gather(1, y[:, None])[:, 0]
        weighted = (divergence(z, z_adv) * (1.0000001 - own)).mean()
        parts = {"accuracy": hits(z, y), "accuracy_adv": hits(z_adv, y), "divergence": weighted.detach()}
        return Loss(_boosted(z_adv, y).mean() + beta * weighted, parts)

    return Objective(loss=loss, craft=pgd_images(within, steps, step), threat=within)


def _boosted(z: Logits, y: Labels) -> Scores:
    """Cross-entropy, and the logarithm of what the most likely wrong class leaves to the others."""
    runner_up = z.detach().scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    wrong = F.softmax(z, 1).gather(1, runner_up)[:, 0]
    return F.cross_entropy(z, y, reduction="none") - (1.0001 - wrong + 1e-12).log()
