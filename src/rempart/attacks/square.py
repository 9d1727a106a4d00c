"""Square: random search over windows of the image, on scores alone."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import lead, surely_reached
from rempart.core.events import Event, Notify, silent
from rempart.core.repro import Draws
from rempart.core.threat import Norm, Threat, per_image, vector_norm
from rempart.core.types import Images, Labels, Logits, Mask, Scores

_BLOCK = 100  # windows drawn in one go
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@attacks.register("square", Traits(norms=("linf", "l2", "l1"), targeted=True, random=True, access="scores"))
def square(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    queries: Annotated[int, Ge(1)] = 5000,
    p_init: Annotated[float, Gt(0), Le(1)] = 0.8,
    restarts: Annotated[int, Ge(1)] = 1,
    rescale: bool = False,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Change random windows of the image and keep what lowers the margin; a sample leaves once it is broken.

    linf: each channel of a window goes to one end of its range, x - eps or x + eps. l2 and l1: the budget of two
    windows moves into one of them, in the shape of a bump and a hollow side by side. Windows are squares; for volumes
    cubes, for signals intervals.

    Args:
        model: Frozen classifier; only its logits are used.
        x: Images in the box.
        y: True classes, or classes to reach if `targeted`.
        threat: Needs a budget.
        queries: Forward passes per sample and restart, that of the start included.
        p_init: Share of the pixels in the first windows.
        restarts: Independent searches; later ones run only on samples not yet broken.
        rescale: Stretch the schedule of the window size, made for 10,000 queries, to the number of `queries`.
        targeted: Move towards `y` instead of away from it.
        rng: Source of starts, windows and signs, keyed by sample.
        notify: Receives one event per ten queries.

    Returns:
        Images like `x`, feasible for `threat`. Where nothing was found, the image of lowest margin among those tried.

    Raises:
        ThreatError: If `threat.eps` is None.

    Source:
        Andriushchenko et al. 2020, arXiv:1912.00049, algorithms 1 to 3; l1 after the code of fra31/auto-attack. Differs
        in windows and signs drawn for each sample, in windows that reach the last row and column, in the margin as loss
        for targets too (best other logit minus the target's), in l1 with the bump in one channel at a time instead of a
        soft threshold over several, and in windows on one and three spatial axes.
    """
    out = x.clone()
    if threat.budget == 0 or len(x) == 0:
        return out
    rng = rng or Draws(0, torch.arange(len(x)))
    todo = torch.arange(len(x), device=x.device)
    lowest = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    size = x.shape[2:]
    sides = [side_length(t, size, threat.norm, queries, p_init, rescale) for t in range(queries - 1)]
    for restart in range(restarts):
        draws = rng.select(todo.cpu()).at("square", restart)
        point, loss, broken = _search(
            model, x[todo], y[todo], threat, sides, targeted=targeted, rng=draws, notify=notify
        )
        better = broken | (loss < lowest[todo])
        out[todo[better]], lowest[todo[better]] = point[better], loss[better]
        todo = todo[~broken]
        if len(todo) == 0:
            break
    return out


def side_length(t: int, size: Sequence[int], norm: Norm, queries: int, p_init: float, rescale: bool) -> int:
    """Side of the window of iteration `t`, counted from 0: it holds the share p of the pixels, which halves in time.

    At most the shortest side of the image; in l2 and l1 odd and at least 3, where the image is as large as that.
    """
    if rescale:
        t = int(t / queries * 10_000)
    p = p_init / 2 ** bisect_left(_HALVED_AFTER, t)
    side = max(1, round((p * math.prod(size)) ** (1 / len(size))))
    if norm != "linf":
        side = max(side, 3) // 2 * 2 + 1
    return min(side, *size)


def start(threat: Threat, x: Images, rng: Draws) -> Images:
    """Where the search begins: stripes across the last axis at +-eps in linf, a tiling with bumps in l2 and l1."""
    if threat.norm == "linf":
        step = rng.sign(x.movedim(-1, 2)[..., *(0,) * (x.ndim - 3)])
        step = threat.budget * step.view(*x.shape[:2], *(1,) * (x.ndim - 3), -1)
    else:
        step = _tiling(x, threat.norm, rng)
        step = step * per_image(threat.budget / vector_norm(step.flatten(1), threat.norm), x)
    return (x + step).clamp(threat.low, threat.high)


def bumps(side: int, axes: int, norm: Norm) -> Tensor:
    """A bump and a hollow side by side along each axis, shape (axes, side, ..., side), float64, each of norm 1.

    Each of the two is a pile of nested boxes around its middle, box r of weight 1 / (r + 1)^2 (l1: to the fourth), and
    has half of the norm.
    """
    power = 2 if norm == "l2" else 4
    halves: list[Tensor] = []
    for depth in (side // 2, side - side // 2):
        size = (depth, *(side,) * (axes - 1))
        rings = max(size) // 2 + 1
        weight = (1 / torch.arange(1, rings + 1).double() ** power).flip(0).cumsum(0).flip(0)
        away = [(torch.arange(n) - n // 2).abs().view(-1, *(1,) * (axes - 1 - a)) for a, n in enumerate(size)]
        ring = away[0]
        for other in away[1:]:
            ring = torch.maximum(ring, other)
        half = weight[ring]
        halves.append(half / vector_norm(half.view(1, -1), norm).clamp_min(1e-300))
    shape = torch.cat([halves[0], -halves[1]])
    shape = shape / vector_norm(shape.view(1, -1), norm)
    return torch.stack([shape.movedim(0, axis) for axis in range(axes)])


def _tiling(x: Images, norm: Norm, rng: Draws) -> Images:
    """Bumps on a grid of tiles, five along the shortest side, along an axis and with signs drawn for each."""
    n, channels, *size = x.shape
    axes, side = len(size), max(1, min(size) // 5)
    counts = [length // side for length in size]
    tiles = math.prod(counts)
    shapes = bumps(side, axes, norm).to(x).flatten(1)
    axis = (rng.at("axis").uniform(x.new_empty((n, tiles), dtype=torch.float64)) * axes).long().clamp_max(axes - 1)
    sign = rng.at("sign").sign(x.new_empty((n, channels, tiles)))
    grid = (sign[..., None] * shapes[axis][:, None]).view(n, channels, *counts, *(side,) * axes)
    order = [0, 1, *(2 + a + b * axes for a in range(axes) for b in (0, 1))]
    grid = grid.permute(order).reshape(n, channels, *(count * side for count in counts))
    step = torch.zeros_like(x)
    inner = [slice((length - count * side) // 2, None) for length, count in zip(size, counts, strict=True)]
    inner = [slice(s.start, s.start + count * side) for s, count in zip(inner, counts, strict=True)]
    step[:, :, *inner] = grid
    return step


@torch.no_grad()
def _search(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    sides: Sequence[int],
    *,
    targeted: bool,
    rng: Draws,
    notify: Notify,
) -> tuple[Images, Scores, Mask]:
    """One search from a new start: the best images, their losses (negative: broken), and which are surely broken.

    A candidate is written into the best image, window by window, and taken back where it is no better, so that an
    iteration touches no pixels but those of its windows.
    """
    out, losses, broken = x.clone(), x.new_empty(len(x)), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    change, total = _flip if threat.norm == "linf" else _move, len(sides) + 1
    notify(Event(stage="query", done=0, total=total))
    now = _Standing.at(x, y, start(threat, x, rng.at("start")), rng.at("window"))
    z = model(now.point)
    windows = {side: _Window.of(side, now.x, threat.norm) for side in set(sides)}
    now.loss = _loss(z, y, targeted)
    sure = surely_reached(z, y, targeted=targeted)
    for t, side in enumerate(sides):
        if bool(sure.any()):
            left = now.active[sure]
            out[left], losses[left], broken[left] = now.point[sure], now.loss[sure], True
            now = now.select(~sure)
            if len(now.y) == 0:
                return out, losses, broken
        if t % 10 == 0:
            notify(Event(stage="query", done=t + 1, total=total))
        if t % _BLOCK == 0:
            now.draw(t // _BLOCK, sides[t : t + _BLOCK], threat)
        place, old, spent = change(now, t % _BLOCK, windows[side], threat)
        z = model(now.point)
        loss = _loss(z, now.y, targeted)
        better = loss < now.loss
        pixels, rows = _flat(now.point), (len(now.y), -1)
        kept = torch.where(better[:, None], pixels.index_select(0, place).view(rows), old.view(rows))
        pixels.scatter_(0, place, kept.view(-1))
        now.loss, now.spent = torch.minimum(loss, now.loss), torch.where(better, spent, now.spent)
        sure = loss < 0
        if bool(sure.any()):
            sure = better & surely_reached(z, now.y, targeted=targeted)
    out[now.active], losses[now.active], broken[now.active] = now.point, now.loss, sure
    return out, losses, broken


@dataclass(slots=True)
class _Standing:
    """The samples not yet broken, with what the next iterations need of them.

    Attributes:
        active: Their rows in the batch.
        x: Originals, dense in memory.
        y: Labels or targets.
        point: Best images, dense in memory in the same order.
        loss: Margins of the best images.
        spent: Budget the best images use: the sum of squares of the perturbation, or of absolute values.
        rng: Their draws.
        corners: First place of each window of this block of iterations in memory, shape (iterations, n, windows).
        axes: Axis along which bumps lie, shape (iterations, n).
        signs: Sign for each channel, times eps in linf; shape (iterations, n, c, 1).
    """

    active: Tensor
    x: Images
    y: Labels
    point: Images
    loss: Scores
    spent: Scores
    rng: Draws
    corners: Tensor
    axes: Tensor
    signs: Tensor

    @classmethod
    def at(cls, x: Images, y: Labels, point: Images, rng: Draws) -> "_Standing":
        n, channels = x.shape[:2]
        active, zeros = torch.arange(n, device=x.device), x.new_zeros(n)
        corners, signs = active.new_empty((0, n, 1)), x.new_empty((0, n, channels, 1))
        return cls(active, _dense(x), y, _dense(point), zeros, zeros, rng, corners, corners[..., 0], signs)

    def select(self, stay: Mask) -> "_Standing":
        rows = stay.nonzero()[:, 0]
        moved = (rows - torch.arange(len(rows), device=rows.device)) * self.x[0].numel()
        return _Standing(
            self.active[rows],
            _dense(self.x[rows]),
            self.y[rows],
            _dense(self.point[rows]),
            self.loss[rows],
            self.spent[rows],
            self.rng.select(rows.cpu()),
            self.corners[:, rows] - moved[:, None],
            self.axes[:, rows],
            self.signs[:, rows],
        )

    def draw(self, block: int, sides: Sequence[int], threat: Threat) -> None:
        """Windows and signs of the next iterations, and the exact budget in use."""
        n, channels, *size = self.x.shape
        axes, windows = len(size), 1 if threat.norm == "linf" else 2
        places = axes * windows
        like = self.x.new_empty((n, len(sides), places + 1 + channels), dtype=torch.float64)
        unit = self.rng.at(block).uniform(like).transpose(0, 1)
        ends = torch.tensor([[length - side for length in size] for side in sides], device=like.device)[:, None, None]
        corner = (unit[..., :places].unflatten(-1, (windows, axes)) * (ends + 1)).long().minimum(ends)
        corner = (corner * torch.tensor(self.x.stride()[2:], device=like.device)).sum(-1)
        first = torch.arange(n, device=like.device) * self.x[0].numel()
        self.corners = corner + first[:, None]
        self.axes = (unit[..., places] * axes).long().clamp_max(axes - 1)
        length = threat.budget if threat.norm == "linf" else 1.0
        self.signs = torch.where(unit[..., places + 1 :, None] < 0.5, -length, length).to(self.x.dtype)
        if threat.norm == "l1":  # the bump of a single channel, told by the digits that the signs do not use
            digits = (2 * unit[..., places + 1 :, None]) % 1
            self.signs = self.signs * (digits == digits.amax(2, keepdim=True))
        self.spent = _power(self.point - self.x, threat.norm).flatten(1).sum(1)


@dataclass(frozen=True, slots=True)
class _Window:
    """Places of a window's pixels from its corner on, shape (c, pixels); its bumps in l2 and l1, (axes, pixels)."""

    places: Tensor
    bumps: Tensor

    @classmethod
    def of(cls, side: int, x: Images, norm: Norm) -> "_Window":
        axes = x.ndim - 2
        places = torch.zeros((), dtype=torch.int64, device=x.device)
        for count, step in zip((x.shape[1], *(side,) * axes), x.stride()[1:], strict=True):
            places = places[..., None] + torch.arange(count, device=x.device) * step
        shapes = x.new_empty((axes, 0)) if norm == "linf" else bumps(side, axes, norm).to(x)
        return cls(places.flatten(1), shapes.flatten(1))


def _flip(now: _Standing, t: int, window: _Window, threat: Threat) -> tuple[Tensor, Tensor, Scores]:
    """Send each channel of a window to one end of its range. Returns the places, what was there, and the budget."""
    pixels, place = _flat(now.point), (now.corners[t][:, :, None] + window.places).view(-1)
    old, original = pixels.index_select(0, place), _flat(now.x).index_select(0, place)
    new = (original.view(len(now.y), len(window.places), -1) + now.signs[t]).clamp_(threat.low, threat.high)
    pixels.scatter_(0, place, new.view(-1))
    return place, old, now.spent


def _move(now: _Standing, t: int, window: _Window, threat: Threat) -> tuple[Tensor, Tensor, Scores]:
    """Put the budget of two windows, and what is left of it, into the first; the second returns to the original.

    l2: each channel keeps its budget. l1: the bump comes in one channel, and the budget may go from one to another.

    Returns the places of both windows, what was there, and the budget in use afterwards.
    """
    n, (channels, width) = len(now.y), window.places.shape
    pixels = _flat(now.point)
    places = now.corners[t][:, None, :, None] + window.places[:, None]
    first, place = places[:, :, 0].reshape(-1), places.view(-1)
    old, original = pixels.index_select(0, place), _flat(now.x).index_select(0, place).view(n, channels, 2, width)
    step = old.view(n, channels, 2, width) - original
    origin = original[:, :, 0]
    pixels.scatter_(0, places[:, :, 1].reshape(-1), original[:, :, 1].reshape(-1))
    only = pixels.index_select(0, first).view(n, channels, width) - origin  # what the second window does not share

    def total(part: Tensor) -> Tensor:
        return _power(part, threat.norm).sum(2 if threat.norm == "l2" else (1, 2), keepdim=True)

    freed = total(only) + total(step[:, :, 1])
    budget, shares = (threat.budget**2, channels) if threat.norm == "l2" else (threat.budget, 1)
    free = freed + (budget - now.spent).clamp_min(0)[:, None, None] / shares
    size = total(step[:, :, 0])
    size = size.sqrt() if threat.norm == "l2" else size
    new = window.bumps[now.axes[t]][:, None] * now.signs[t] + step[:, :, 0] / size.clamp_min(1e-12)
    scale = free / total(new).clamp_min(1e-12)
    scale = scale.sqrt() if threat.norm == "l2" else scale
    new = (origin + new * scale).clamp_(threat.low, threat.high)
    pixels.scatter_(0, first, new.view(-1))
    return place, old, now.spent + (total(new - origin) - freed).sum((1, 2))


def _power(step: Tensor, norm: Norm) -> Tensor:
    return step.square() if norm == "l2" else step.abs()


def _loss(z: Logits, y: Labels, targeted: bool) -> Scores:
    return -lead(z, y) if targeted else lead(z, y)


def _dense(x: Images) -> Images:
    """Without gaps in memory; colours of one pixel side by side, as convolutions take them fastest."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def _flat(x: Images) -> Tensor:
    """All numbers of dense images in the order of memory."""
    return x.as_strided((x.numel(),), (1,))
