"""TRADES: accuracy on the images, and predictions that stay the same around them."""

from typing import Annotated

from annotated_types import Ge
from torch import nn
from torch.nn import functional as F

from rempart.attacks.gradient import Plan, ascent
from rempart.attacks.losses import Score
from rempart.core.events import silent
from rempart.core.model import frozen
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels, Logits, Scores
from rempart.objectives.catalogue import Craft, Loss, Objective, boxed, budgeted, hits, objectives

_START = 1e-3  # standard deviation of the first move, as a share of the box: at x itself the gradient of the KL is 0


@objectives.register("trades", None)
def trades(
    *,
    threat: str = "linf:8/255",
    steps: Annotated[int, Ge(1)] = 10,
    step: Pixels | None = None,
    beta: Annotated[float, Ge(0)] = 6.0,
) -> Objective:
    """Minimise CE(x) + beta * KL(p(x) || p(x')), where x' is the image whose prediction differs most from that of x.

    x' is found without the label: projected ascent on the same divergence, from x + 0.001 N(0, 1), in inference mode;
    the last point counts. The gradient of the loss flows into both arguments of the divergence.

    Args:
        threat: What to harden against, for example `linf:8/255`.
        steps: Gradient evaluations of the attack per image and epoch.
        step: Step length in pixel units. Default 2.5 * eps / steps.
        beta: Weight of the divergence; 0 is ordinary training.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Zhang et al. 2019, arXiv:1901.08573, and the authors' code. Differs in passing x through the model
        once instead of twice; in the logarithms of probabilities, taken from the logits, so that confident
        predictions have a finite gradient; and in the exact projection on ball and box for l1 and l2.
    """
    within = budgeted(threat)

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        z, z_adv = model(x), model(x_adv)
        kl = divergence(z, z_adv).mean()
        parts = {"accuracy": hits(z, y), "accuracy_adv": hits(z_adv, y), "divergence": kl.detach()}
        return Loss(F.cross_entropy(z, y) + beta * kl, parts)

    return Objective(loss=loss, craft=_farthest(within, steps, step), threat=within)


def divergence(z: Logits, z_adv: Logits) -> Scores:
    """KL(p(x) || p(x')) of each sample, from logits."""
    log_p = F.log_softmax(z, 1)
    return (log_p.exp() * (log_p - F.log_softmax(z_adv, 1))).sum(1)


def _farthest(within: Threat, steps: int, step: float | None) -> Craft:
    plan = Plan(steps, 2.5 * within.budget / steps if step is None else step, keep="last")

    def craft(model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float) -> Images:
        with frozen(model):
            threat = boxed(within, model)
            start = x + _START * (threat.high - threat.low) * rng.at("trades").normal(x)
            goal = _divergence_from(model(x).detach())
            return ascent(model, x, y, threat, goal, plan=plan, targeted=False, start=start, notify=silent)

    return craft


def _divergence_from(z: Logits) -> Score:
    return lambda z_adv, y: divergence(z, z_adv)
