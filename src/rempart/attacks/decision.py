"""Attacks that see nothing of the model but the class it gives."""

import math
from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import nn
from torch.nn.functional import interpolate

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import reached
from rempart.core.events import Event, Notify, silent
from rempart.core.repro import Draws
from rempart.core.threat import Threat, per_image, vector_norm
from rempart.core.types import Images, Labels, Mask, Scores

Decide = Callable[[Images, Labels], Mask]
_STARTS = 5  # the walk begins at the one nearest to the original
_TRIES = 100  # noise images in search of one start
_GRIDS = (1, 2, 4, 8)  # side of their blocks, in pixels
_FORWARD = 1024  # images in one forward pass
_HALVINGS = 20  # of one step, until it ends on the right side
_PAST = 1e-3  # how much further the image returned lies than the boundary


@attacks.register(
    "hopskipjump", Traits(norms=("l2", "linf"), targeted=True, minimum=True, random=True, access="decisions")
)
@torch.no_grad()
def hopskipjump(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Annotated[int, Ge(1)] = 64,
    initial_probes: Annotated[int, Ge(1)] = 100,
    max_probes: Annotated[int, Ge(1)] = 10_000,
    gamma: Annotated[float, Gt(0)] = 1.0,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Walk along the boundary towards the original, with a normal estimated from the classes of random neighbours.

    From a noise image of another class to the boundary, by bisection on the way to the original. Then each step probes
    which side of it small random moves lead to, goes along their mean into the other class, and back to the boundary.

    Args:
        model: Frozen classifier; only the class of highest logit is used.
        x: Images in the box.
        y: True classes, or classes to reach if `targeted`.
        threat: Gives the norm (l2 or linf) and the box; a budget is ignored.
        steps: Steps along the boundary.
        initial_probes: Neighbours asked in the first step; in step t, counted from 1, sqrt(t) times as many.
        max_probes: The most neighbours asked in one step.
        gamma: Scale of the bisection's tolerance, gamma / D^1.5 of the distance (linf: gamma / D^2) for D pixels, and
            of the neighbours' distance, gamma / D of that to the original.
        targeted: Move towards `y` instead of away from it.
        rng: Source of starts and probes, keyed by sample.
        notify: Receives one event per try for a start and one per step.

    Returns:
        Images like `x` in the box: the nearest of the other class that was found, moved 0.1 % further where it stays in
        that class, because it lies on the boundary, where rounding decides; `x` where no start was found.

    Source:
        Chen, Jordan, Wainwright 2020, arXiv:1904.02144, algorithms 1 and 2. Differs in keeping the nearest point of all
        steps instead of the last, in the starts (the nearest of five; uniform noise, also in blocks and blended with
        the image, which finds targets that plain noise does not), in at most 20 halvings of a step, and in the last
        move past the boundary.
    """
    out, rng = x.clone(), rng or Draws(0, torch.arange(len(x)))
    if len(x) == 0:
        return out

    def decide(z: Images, goal: Labels) -> Mask:
        parts = zip(z.split(_FORWARD), goal.split(_FORWARD), strict=True)
        return torch.cat([reached(model(part), k, targeted=targeted) for part, k in parts])

    dims, halvings = x[0].numel(), _precision(x, threat, gamma)
    best, nearest = x, torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    for k in range(_STARTS):
        far, hit = _start(decide, x, y, threat, rng.at("start", k), notify)
        edge = _to_boundary(decide, x, far, y, threat, halvings)
        distance = torch.where(hit, threat.distance(x, edge).to(x.dtype), torch.inf)
        best, nearest = torch.where(per_image(distance < nearest, x), edge, best), torch.minimum(distance, nearest)
    rows = nearest.isfinite().nonzero()[:, 0]
    if len(rows) == 0:
        return out
    x, y, best, nearest, rng = x[rows], y[rows], best[rows], nearest[rows], rng.select(rows.cpu())
    point, distance = best, nearest
    for t in range(steps):
        notify(Event(stage="step", done=t, total=steps))
        radius = gamma * distance / dims if t else torch.full_like(distance, 0.1 * (threat.high - threat.low))
        probes = int(min(initial_probes * math.sqrt(t + 1), max_probes))
        normal = _normal(decide, point, y, threat, radius, probes, rng.at("probe", t))
        normal = normal.sign() if threat.norm == "linf" else normal
        point = _step(decide, point, y, threat, normal, distance / math.sqrt(t + 1))
        point = _to_boundary(decide, x, point, y, threat, halvings)
        distance = threat.distance(x, point).to(x.dtype)
        nearer = distance < nearest
        best, nearest = torch.where(per_image(nearer, x), point, best), torch.where(nearer, distance, nearest)
    past = (x + (1 + _PAST) * (best - x)).clamp(threat.low, threat.high)
    out[rows] = torch.where(per_image(decide(past, y), x), past, best)
    return out


def _start(decide: Decide, x: Images, y: Labels, threat: Threat, rng: Draws, notify: Notify) -> tuple[Images, Mask]:
    """Noise images on the other side, and for which samples one was found; the originals elsewhere."""
    far, todo = x.clone(), torch.arange(len(x), device=x.device)
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for t in range(_TRIES):
        if len(todo) == 0:
            break
        notify(Event(stage="start", done=t, total=_TRIES))
        draws, block = rng.select(todo.cpu()).at(t), _GRIDS[t % len(_GRIDS)]
        size = [math.ceil(length / block) for length in x.shape[2:]]
        noise = draws.uniform(x.new_empty((len(todo), x.shape[1], *size)), threat.low, threat.high)
        noise = interpolate(noise, scale_factor=float(block), mode="nearest")
        noise = noise[:, :, *(slice(0, length) for length in x.shape[2:])]
        share = draws.at("share").uniform(x.new_empty((len(todo), *(1,) * (x.ndim - 1))))
        trial = noise if t < len(_GRIDS) else x[todo] + share * (noise - x[todo])
        hit = decide(trial, y[todo])
        far[todo[hit]], found[todo[hit]] = trial[hit], True
        todo = todo[~hit]
    return far, found


def _precision(x: Images, threat: Threat, gamma: float) -> int:
    """Halvings of a bisection down to the tolerance, or to what the pixels can tell."""
    tolerance = gamma / x[0].numel() ** (2 if threat.norm == "linf" else 1.5)
    return max(1, min(math.ceil(-math.log2(tolerance)), round(-math.log2(torch.finfo(x.dtype).eps))))


def _to_boundary(decide: Decide, x: Images, far: Images, y: Labels, threat: Threat, halvings: int) -> Images:
    """Back towards the originals as far as the images stay on the other side.

    In l2 along the straight line; in linf by cutting the perturbation at a falling height.
    """
    full = threat.distance(x, far).to(x.dtype)

    def at(share: Scores) -> Images:
        if threat.norm == "linf":
            height = per_image(share * full, x)
            return torch.minimum(torch.maximum(far, x - height), x + height)
        return x + per_image(share, x) * (far - x)

    low, high, image = torch.zeros_like(full), torch.ones_like(full), far
    for _ in range(halvings):
        middle = (low + high) / 2
        trial = at(middle)
        hit = decide(trial, y)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
        image = torch.where(per_image(hit, x), trial, image)
    return image


def _normal(
    decide: Decide, point: Images, y: Labels, threat: Threat, radius: Scores, probes: int, rng: Draws
) -> Images:
    """Estimated normal of the boundary, of l2 length 1: the mean of the probes, weighted by their side minus its mean.

    Drawn and summed by pieces whose size depends on that of an image alone.
    """
    n, dims = len(point), point[0].numel()
    piece = max(1, min(_FORWARD, 2**15 // dims))
    group = max(1, _FORWARD // piece)
    moves, weighted, sides = (torch.zeros((n, k), dtype=point.dtype, device=point.device) for k in (dims, dims, 1))
    for first in range(0, probes, piece):
        count, draws = min(piece, probes - first), rng.at(first)
        for rows in torch.arange(n, device=point.device).split(group):
            some, reach = point[rows].flatten(1)[:, None], radius[rows][:, None, None]
            like, part = some.new_empty((len(rows), count, dims)), draws.select(rows.cpu())
            move = part.normal(like) if threat.norm == "l2" else part.uniform(like, -1.0, 1.0)
            move = move / move.norm(dim=2, keepdim=True).clamp_min(1e-12)
            trial = (some + reach * move).clamp(threat.low, threat.high)
            move = (trial - some) / reach
            hit = decide(trial.view(-1, *point.shape[1:]), y[rows].repeat_interleave(count))
            side = torch.where(hit, 1.0, -1.0).to(point.dtype).view(len(rows), count, 1)
            moves[rows] += move.sum(1)
            weighted[rows] += (side * move).sum(1)
            sides[rows] += side.sum(1)
    mean = sides / probes
    normal = torch.where(mean.abs() == 1, weighted, weighted - mean * moves)
    return (normal / vector_norm(normal, "l2")[:, None].clamp_min(1e-30)).view_as(point)


def _step(decide: Decide, point: Images, y: Labels, threat: Threat, normal: Images, length: Scores) -> Images:
    """The longest of the steps `length`, `length` / 2, ... that ends on the other side; none if all fail."""
    point, todo = point.clone(), torch.arange(len(point), device=point.device)
    origin = point.clone()
    for _ in range(_HALVINGS):
        move = per_image(length[todo], point) * normal[todo]
        trial = (origin[todo] + move).clamp(threat.low, threat.high)
        hit = decide(trial, y[todo])
        point[todo[hit]] = trial[hit]
        todo, length = todo[~hit], length / 2
        if len(todo) == 0:
            break
    return point
