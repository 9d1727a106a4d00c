"""Attacks that look for the smallest perturbation on a ball whose radius follows what was found: ddn and fmn."""

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import Score, climb_direction, lead, score, surely_reached
from rempart.attacks.optimise import Smallest
from rempart.core.events import Event, Notify, silent
from rempart.core.repro import Draws
from rempart.core.threat import Norm, Threat, dual, per_image, unit, vector_norm
from rempart.core.types import Images, Labels, Logits, Mask, Scores

Climb = Literal["both", "ce", "margin"]
_LAST_GAMMA = 1e-3
_LAST_STEP = 0.01
"""Share of the first step that the last one has."""
_FIRST_STEP: dict[Norm, float] = {"linf": 1.0, "l2": 2.0, "l1": 1.0}


@attacks.register("ddn", Traits(norms=("l2",), targeted=True, minimum=True))
def ddn(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Annotated[int, Ge(1)] = 100,
    gamma: Annotated[float, Gt(0), Lt(1)] = 0.05,
    radius: Annotated[float, Gt(0)] | None = None,
    loss: Climb = "both",
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Walk on a sphere that shrinks while the image is misclassified and grows while it is not (DDN).

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: Classes to leave, or to reach if `targeted`.
        threat: Gives the box; a budget is ignored.
        steps: Gradient evaluations per sample; one further forward pass judges the last point.
        gamma: Share by which a step changes the radius at first; falls to 0.001 along a cosine.
        radius: First radius, in pixel units; default the distance to the linearised boundary (1 in the paper).
        loss: What to climb: the log-odds (`ce`), the margin, or in the first half of the steps the one and then the
            other.
        targeted: Move towards `y` instead of away from it.
        rng: Not used: the attack draws nothing.
        notify: Receives one event per step.

    Returns:
        Images like `x` in the box: the smallest success seen, or where there was none the point of best margin.

    Source:
        Rony et al. 2019, arXiv:1811.09600, algorithm 1. Differs in the first radius; in gamma, which the paper keeps;
        in the margin, which replaces cross-entropy in the second half; in steps that are multiples of the radius (1
        down to 0.01, where the paper has pixel units); in gradients without the pixels that the box holds back; and
        in no rounding to 8 bit, which is the auditor's choice.
    """
    goals = _goals(loss, targeted)
    best, rows, point, length = Smallest.at(x), torch.arange(len(x), device=x.device), x, _widest(x, threat)
    widest = length
    for t in range(steps):
        notify(Event(stage="step", done=t, total=steps))
        slope, z, _ = climb_direction(model, point, y, goals[2 * t >= steps])
        size, hit = _record(best, rows, point, x, z, y, threat, targeted)
        slope = _free(slope, point, threat)
        if t == 0:
            length = _gap(z, y, slope, "l2") if radius is None else torch.full_like(size, radius)
        share = _falling(t, steps, gamma, _LAST_GAMMA)
        length = torch.minimum(torch.where(hit, 1 - share, 1 + share) * length, widest)
        step = threat.ascend(x, slope, (_falling(t, steps, 1.0, _LAST_STEP) * length)[:, None])
        change = point - x + step
        change = change * per_image(length / vector_norm(change.flatten(1), "l2").clamp_min(1e-30), x)
        point = (x + change).clamp(threat.low, threat.high)
    with torch.no_grad():
        _record(best, rows, point, x, model(point), y, threat, targeted)
    return best.image


@attacks.register("fmn", Traits(norms=("linf", "l2", "l1"), targeted=True, minimum=True))
def fmn(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Annotated[int, Ge(1)] = 100,
    gamma: Annotated[float, Gt(0), Lt(1)] = 0.05,
    step: Annotated[float, Gt(0)] | None = None,
    loss: Climb = "both",
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Climb inside a ball whose radius is drawn to the nearest success found (fast minimum norm).

    Until the first success the radius is the distance to the linearised boundary; from then on it shrinks while the
    image is misclassified and grows while it is not.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: Classes to leave, or to reach if `targeted`.
        threat: Gives the norm and the box; a budget is ignored.
        steps: Gradient evaluations per sample; one further forward pass judges the last point.
        gamma: Share by which a step changes the radius at first; falls to 0.001 along a cosine.
        step: Length of the first step in radii, by the sign of the gradient in linf and Euclidean in l2 and l1; falls
            to a hundredth along a cosine. Default 1, in l2 2.
        loss: What to climb: the log-odds (`ce`), the margin as in the paper, or in the first half of the steps the one
            and then the other.
        targeted: Move towards `y` instead of away from it.
        rng: Not used: the attack draws nothing.
        notify: Receives one event per step.

    Returns:
        Images like `x` in the box: the smallest success seen, or where there was none the point of best margin.

    Source:
        Pintor et al. 2021, arXiv:2102.12827, algorithm 1, from the original. Differs in the log-odds of the first
        half; in steps measured in radii (1 in pixel units in the paper, Euclidean in every norm); in a radius that
        also grows by gamma before the first success, without which the box can hold the search back for ever, and
        stays below the smallest success after each; and in gradients without the pixels that the box holds back.
    """
    goals = _goals(loss, targeted)
    best, rows, point, widest = Smallest.at(x), torch.arange(len(x), device=x.device), x, _widest(x, threat)
    length = torch.zeros_like(widest)
    first = _FIRST_STEP[threat.norm] if step is None else step
    along = threat if threat.norm == "linf" else replace(threat, norm="l2")
    for t in range(steps):
        notify(Event(stage="step", done=t, total=steps))
        slope, z, _ = climb_direction(model, point, y, goals[2 * t >= steps])
        size, hit = _record(best, rows, point, x, z, y, threat, targeted)
        slope = _free(slope, point, threat)
        share = _falling(t, steps, gamma, _LAST_GAMMA)
        grown = (1 + share) * length
        grown = torch.where(best.size.isinf(), torch.maximum(grown, size + _gap(z, y, slope, threat.norm)), grown)
        length = torch.minimum(torch.where(hit, (1 - share) * torch.minimum(length, best.size), grown), widest)
        stride = along.ascend(x, slope, (first * _falling(t, steps, 1.0, _LAST_STEP) * length)[:, None])
        point = (x + into_ball(point - x + stride, length, threat.norm)).clamp(threat.low, threat.high)
    with torch.no_grad():
        _record(best, rows, point, x, model(point), y, threat, targeted)
    return best.image


def _goals(loss: Climb, targeted: bool) -> tuple[Score, Score]:
    """What to climb in each half of the steps.

    The log-odds, which see all classes, lead to nearer boundaries; on the way along one, only the margin is exact.
    """
    early, late = score("ce", targeted=targeted, num_classes=2), score("margin", targeted=targeted, num_classes=2)
    return {"ce": (early, early), "margin": (late, late), "both": (early, late)}[loss]


def _record(
    best: Smallest, rows: Tensor, point: Images, x: Images, z: Logits, y: Labels, threat: Threat, targeted: bool
) -> tuple[Scores, Mask]:
    """Keep what is better than before; how far each point is from its original, and whether it is a success."""
    hit, size = surely_reached(z, y, targeted=targeted), vector_norm((point - x).flatten(1), threat.norm)
    best.update(rows, point, size, lead(z, y) if targeted else -lead(z, y), hit)
    return size, hit


def _free(slope: Images, point: Images, threat: Threat) -> Images:
    """The gradient without the pixels that already lie on the side of the box it points to."""
    held = torch.where(slope > 0, point >= threat.high, point <= threat.low)
    return slope.masked_fill(held, 0.0)


def _gap(z: Logits, y: Labels, slope: Images, norm: Norm) -> Scores:
    """Distance to the boundary, were the model linear; infinite where no gradient flows."""
    flat = slope.flatten(1)
    scale = unit(flat)
    gap = lead(z, y).abs() / scale[:, 0] / vector_norm(flat / scale, dual(norm))
    return gap.nan_to_num(torch.inf, torch.inf)  # NaN: neither a gap nor a gradient


def _widest(x: Images, threat: Threat) -> Scores:
    """Distance of each image to the farthest corner of the box."""
    return vector_norm(torch.maximum(x - threat.low, threat.high - x).flatten(1), threat.norm)


def _falling(t: int, steps: int, first: float, last: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * t / steps)) / 2


def into_ball(change: Images, length: Scores, norm: Norm) -> Images:
    """The perturbation of at most this length nearest to `change`, sample by sample."""
    if norm == "linf":
        edge = per_image(length, change)
        return torch.minimum(torch.maximum(change, -edge), edge)
    if norm == "l2":
        size = vector_norm(change.flatten(1), "l2")
        return change * per_image((length / size.clamp_min(1e-30)).clamp_max(1.0), change)
    size = change.abs()
    excess = size - per_image(_threshold(size.flatten(1), length), change)
    return change.sign() * excess.clamp_min(0)


def _threshold(size: Tensor, length: Scores) -> Scores:
    """The t >= 0 for which the sum of max(size - t, 0) is `length`, 0 where the sum of `size` is smaller already.

    Newton's method on a convex function, from the left: it stops as soon as no pixel falls below t any more.
    """
    t = ((size.sum(1) - length) / size.shape[1]).clamp_min(0)
    while True:
        above = size > t[:, None]
        raised = ((size * above).sum(1) - length) / above.sum(1).clamp_min(1)
        if not bool((raised > t).any()):
            return t
        t = torch.maximum(t, raised)
