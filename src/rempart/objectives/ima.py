"""Adversarial training with a margin of its own for each image."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from rempart.attacks.losses import climb_direction, reached, score
from rempart.attacks.minimum import bisect
from rempart.attacks.radius import into_ball
from rempart.core.model import frozen
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.threat import Threat, per_image, vector_norm
from rempart.core.types import Images, Labels, Mask, Scores
from rempart.objectives.catalogue import Loss, Objective, boxed, budgeted, hits, objectives

_HALVINGS = 10
_LEAST_START = 1e-3  # radius of the random start while the margin is small, in pixel units


@objectives.register("ima", None)
def ima(
    *,
    threat: str = "l2:3",
    delta: Annotated[Pixels, Gt(0)] | None = None,
    beta: Annotated[float, Ge(0), Le(1)] = 0.5,
    steps: Annotated[int, Ge(1)] = 20,
) -> Objective:
    """Grow a margin around each image until it meets the decision boundary, and train on the points met there.

    An image that is classified right is attacked by PGD within its margin. Where nothing is found the margin grows by
    delta; where the boundary is crossed, bisection leads back to it, the point X_n there joins the loss, and the margin
    becomes the mean of itself and the distance to X_n. The loss is (1 - beta) * CE(x) + beta * CE(X_n), both as means
    over the whole batch, so an image without X_n, wrong ones among them, gives its first term alone. One process only.

    Args:
        threat: Its budget is the largest margin, for example `l2:3`.
        delta: First margin, and what it grows by, in pixel units. Default eps / 100: with fewer epochs than about a
            hundred no margin reaches the budget, so give more.
        beta: Weight of the points on the boundary.
        steps: Gradient evaluations of the attack per image; each step is 4 / steps of the margin.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Ma & Liang 2020, arXiv:2005.09147, with the settings of its published scripts for CIFAR-10 (l2, the log-odds as
        the loss of the attack). Differs in attacking in inference mode; in bisecting from the wrong point of highest
        score where the scripts take the last iterate, wrong or not; in X_n just beyond the boundary, where the scripts
        take the middle of the last interval or the side before it; and in changing a margin at the visit of its image
        instead of at the end of the epoch. l1 is ours.
    """
    within = budgeted(threat)
    growth = within.budget / 100 if delta is None else delta
    state: dict[str, Tensor] = {}

    def craft(model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float) -> Images:
        margins = state["margins"] = _grown(state.get("margins"), int(rng.index.max()) + 1, min(growth, within.budget))
        margin, ball = margins[rng.index].to(x), boxed(within, model)
        start = nearby(x, ball, torch.minimum((margin - growth).clamp_min(_LEAST_START), margin), rng.at("ima"))
        with frozen(model):
            with torch.no_grad():
                right = ~reached(model(x), y, targeted=False)
            x_adv = x.clone()
            x_adv[right] = explore(model, x[right], y[right], ball, margin[right], start[right], steps)
        met = (margin + vector_norm((x_adv - x).flatten(1), within.norm)) / 2
        margin = torch.where(_moved(x, x_adv), met, margin + growth * right)
        margins[rng.index] = margin.clamp_max(within.budget).to(margins)
        return x_adv

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        z = model(x)
        value = (1 - beta) * F.cross_entropy(z, y)
        met = _moved(x, x_adv)
        if bool(met.any()):  # all pass, so that batch norm sees a whole batch
            value = value + beta * (F.cross_entropy(model(x_adv), y, reduction="none") * met).mean()
        return Loss(value, {"accuracy": hits(z, y), "margin": state["margins"][rng.index].mean().to(z)})

    return Objective(loss=loss, craft=craft, threat=within, state=state, alone=True)


def explore(
    model: nn.Module, x: Images, y: Labels, threat: Threat, margin: Scores, start: Images, steps: int
) -> Images:
    """Climb from `start` inside each image's margin; a point just beyond the boundary, or the image if none is met.

    The way back from the wrong point of highest score is bisected.
    """
    goal = score("ce", targeted=False, num_classes=2)
    out, highest, point = x.clone(), torch.full_like(margin, -torch.inf), start
    for _ in range(steps + 1):
        slope, z, value = climb_direction(model, point, y, goal)
        better = reached(z, y, targeted=False) & (value > highest)
        out, highest = torch.where(per_image(better, x), point, out), torch.where(better, value, highest)
        change = point + threat.ascend(point, slope, 4 / steps * margin[:, None]) - x
        point = (x + into_ball(change, margin, threat.norm)).clamp(threat.low, threat.high)
    found = highest > -torch.inf
    out[found] = bisect(model, x[found], out[found], y[found], _HALVINGS)
    return out


def nearby(x: Images, threat: Threat, radius: Scores, rng: Draws) -> Images:
    """A random point of box and ball, each ball with a radius of its own: uniform in the cube, then pulled in."""
    noise = rng.uniform(x, -1.0, 1.0) * per_image(radius, x)
    return (x + into_ball(noise, radius, threat.norm)).clamp(threat.low, threat.high)


def _moved(x: Images, x_adv: Images) -> Mask:
    return (x_adv != x).flatten(1).any(1)


def _grown(margins: Tensor | None, n: int, first: float) -> Tensor:
    """The margins of samples 0 to n - 1 at least."""
    margins = torch.empty(0) if margins is None else margins
    return torch.cat([margins, margins.new_full((n - len(margins),), first)]) if n > len(margins) else margins
