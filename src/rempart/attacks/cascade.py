"""A cascade of ever longer ascents for ever fewer samples: the heart of the suite `fast`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import Score, climb_direction, lead, surely_reached
from rempart.core.errors import ThreatError
from rempart.core.events import Event, Notify, silent
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, Threat, per_image
from rempart.core.types import Images, Labels, Logits, Mask, Scores

Start = Literal["origin", "random", "best"]
_STEP = 2.0  # first step of an ascent, in budgets
_PULL = 0.75  # share of the new step in a move; the rest is the last move once more
_SPREAD = 0.05  # l1: share of the coordinates that the first step moves
_ROWS = 128  # images in one pass


@dataclass(frozen=True, slots=True)
class Stage:
    """One ascent from one start, of those samples that still stand.

    Attributes:
        steps: Gradient evaluations per row.
        start: The original image, a random point of the ball, or the point of lowest margin so far.
        targets: Rows per sample, each aiming at one class, the closest classes first. 0: one row, at no class.
        reach: Samples enter only if the margin they have left is at most this multiple of what they have lost so far.
    """

    steps: int
    start: Start
    targets: int = 0
    reach: float = math.inf


STAGES = (
    Stage(10, "origin"),
    Stage(30, "random"),
    Stage(10, "best", targets=9),
    Stage(30, "origin", targets=2, reach=0.2),
    Stage(80, "random", targets=2, reach=0.05),
    Stage(100, "best", targets=2, reach=0.03),
)


@attacks.register("cascade", Traits(norms=NORMS, random=True, targeted=False))
def cascade(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    effort: Annotated[float, Gt(0)] = 1.0,
    eot: Annotated[int, Ge(1)] = 1,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Break the easy samples in a few steps and spend the budget on those that may still fall.

    Six ascents on the margin with inertia and steps that fall along a cosine: 10 steps from the original, 30 from a
    random point, 10 for each of the 9 closest classes; then, where little of the margin is left, 30 steps and, where
    almost nothing is left, 80 and 100 steps for each of the 2 closest. A sample leaves as soon as it is broken.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: True classes.
        threat: Needs a budget.
        effort: Multiplies the steps of every stage.
        eot: Gradients averaged per step, for randomised models.
        targeted: Not supported.
        rng: Source of the random starts, keyed by sample.
        notify: Receives one event per step.

    Returns:
        Images like `x`, feasible for `threat`. Where nothing was found, the point of lowest margin.

    Raises:
        ThreatError: If `targeted`, or if `threat.eps` is None.

    Source:
        Ours. The move with inertia is that of APGD (Croce & Hein 2020, arXiv:2003.01690, section 3.1), whose step
        halves on failure where ours falls on a schedule; the union of untargeted and targeted runs, sample by sample,
        is the idea of AutoAttack (same paper, section 5).
    """
    if targeted:
        raise ThreatError("an untargeted run of cascade", got="targeted=True", hint="use pgd or cw, which can aim")
    rng = rng or Draws(0, torch.arange(len(x)))
    stages = [Stage(max(1, round(effort * s.steps)), s.start, s.targets, s.reach) for s in STAGES]
    return climb(model, x, y, threat, stages, rng=rng, eot=eot, notify=notify)


def climb(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    stages: Sequence[Stage],
    *,
    rng: Draws,
    eot: int = 1,
    notify: Notify = silent,
) -> Images:
    """The points of lowest margin over all `stages`; see `cascade`.

    The rows of one sample run side by side and leave together, so that a sample's path does not depend on how the
    samples are cut into passes.
    """
    best = x.clone()
    if threat.budget == 0 or len(x) == 0:
        return best
    with torch.no_grad():
        z = model(x)
    clean = margin = lead(z, y)
    gaps = z - z.gather(1, y[:, None])  # highest z_k - z_y seen for each class k: how close it has come
    standing = torch.ones_like(y, dtype=torch.bool)
    for number, stage in enumerate(stages):
        todo = (standing & _within_reach(stage, clean, margin)).nonzero()[:, 0]
        rows = min(stage.targets, z.shape[1] - 1) or 1
        for part in todo.split(max(1, _ROWS // rows)) if len(todo) else ():
            draws = rng.at(number).select(part.cpu())
            origin = {"origin": x, "best": best}.get(stage.start)
            start = threat.start(x[part], draws) if origin is None else origin[part]
            near = gaps[part].scatter(1, y[part][:, None], -torch.inf)
            aims = near.topk(rows, 1).indices if stage.targets else None
            found = _ascend(model, x[part], y[part], threat, start, aims, stage.steps, eot, notify)
            gaps[part] = torch.maximum(gaps[part], found.gaps)
            standing[part] = ~found.broken
            better = found.broken | (found.margin < margin[part])
            at = part[better]
            best[at], margin = found.image[better], margin.index_copy(0, at, found.margin[better])
    return best


def _within_reach(stage: Stage, clean: Scores, margin: Scores) -> Mask:
    """Which samples lost so much of their margin that this stage may take the rest."""
    everything = torch.ones_like(margin, dtype=torch.bool)
    return everything if math.isinf(stage.reach) else margin <= stage.reach * (clean - margin)


@dataclass(slots=True)
class _Found:
    """What came of one ascent, per sample."""

    image: Images
    margin: Scores
    gaps: Logits
    broken: Mask


def _ascend(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    start: Images,
    aims: Tensor | None,
    steps: int,
    eot: int,
    notify: Notify,
) -> _Found:
    """Climb from `start` (n, ...) with one row for each class in `aims` (n, m), or one row that aims at none."""
    n, m = len(x), 1 if aims is None else aims.shape[1]
    found = _Found(start.clone(), x.new_full((n,), torch.inf), x.new_empty(0), torch.zeros_like(y, dtype=torch.bool))
    active = torch.arange(n, device=x.device)
    x, y, point = (t.repeat_interleave(m, 0) for t in (x, y, start))
    aim = None if aims is None else aims.flatten()
    last = best = point
    margin = gaps = torch.empty(0)
    for t in range(steps + 1):
        gradient = point
        if t < steps:
            notify(Event(stage="ascent", done=t, total=steps))
            gradient, z, _ = climb_direction(model, point, y, _goal(aim), passes=eot)
        else:
            with torch.no_grad():
                z = model(point)
        now, gap = lead(z, y), z - z.gather(1, y[:, None])
        if t == 0:
            margin, gaps, found.gaps = now, gap, gap.new_empty((n, gap.shape[1]))
        else:
            better = now < margin
            best = torch.where(per_image(better, x), point, best)
            margin, gaps = torch.minimum(margin, now), torch.maximum(gaps, gap)
        broken = surely_reached(z, y, targeted=False).view(-1, m).any(1)
        leave = broken if t < steps else torch.ones_like(broken)
        if bool(leave.any()):
            lowest, row = margin.view(-1, m).min(1)
            row = (row + m * torch.arange(len(row), device=row.device))[leave]
            gone = active[leave]
            found.image[gone], found.margin[gone], found.broken[gone] = best[row], lowest[leave], broken[leave]
            found.gaps[gone] = gaps.view(len(leave), m, -1).amax(1)[leave]
            active = active[~leave]
            if len(active) == 0:
                break
            stay = (~leave).repeat_interleave(m)
            x, y, point, last, best, gradient = x[stay], y[stay], point[stay], last[stay], best[stay], gradient[stay]
            margin, gaps, aim = margin[stay], gaps[stay], None if aim is None else aim[stay]
        length = _STEP * threat.budget * _fall(t / steps)
        share = _share(t / steps, x[0].numel()) if threat.norm == "l1" else 0.0
        step = threat.project(x, point + threat.ascend(point, gradient, length, share=share)) - point
        move = step if t == 0 else _PULL * step + (1 - _PULL) * (point - last)
        last, point = point, threat.project(x, point + move)
    return found


def _goal(aim: Tensor | None) -> Score:
    """The score to climb: the logit of the class aimed at, or of the best other class, minus the true one."""
    if aim is None:
        return lambda z, y: -lead(z, y)
    return lambda z, y: (z.gather(1, aim[:, None]) - z.gather(1, y[:, None]))[:, 0]


def _fall(done: float) -> float:
    """From 1 to 0 along a cosine."""
    return (1 + math.cos(math.pi * done)) / 2


def _share(done: float, dims: int) -> float:
    """Share of the coordinates that a step moves in l1: from 5 % down to a single one, geometrically."""
    return max(1.0, _SPREAD * dims) ** (1 - done) / dims
