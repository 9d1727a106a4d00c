"""What the adversary may do: a norm, a budget and the pixel box, with the geometry that follows."""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rempart.core.errors import ThreatError
from rempart.core.numbers import read_number
from rempart.core.registry import suggestion
from rempart.core.repro import Draws
from rempart.core.types import Images, Mask, Scores

Norm = Literal["linf", "l2", "l1"]
NORMS: tuple[Norm, ...] = get_args(Norm)
_IN_UNITS = re.compile(r"([0-9./e+-]*[0-9])\s*([a-z]+)")
TOLERANCE = 1e-6
"""Slack of `holds`, relative to the budget and, per pixel, to the box: the rounding of float32 images."""


def rounding(low: float, high: float) -> float:
    """Slack of a pixel in the box [low, high]: float32 rounds in proportion to the largest value."""
    return TOLERANCE * max(abs(low), abs(high))


def wider(length: float, limit: float) -> bool:
    """Whether a length is above its limit by more than rounding: 0.2 is not wider than 0.7 - 0.5."""
    return length > limit * (1 + TOLERANCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Threat:
    """All images within `eps` of the original, in `norm`, that stay inside the box.

    Attributes:
        norm: The distance.
        eps: Budget in pixel units of the box; None for attacks that look for the smallest perturbation.
        low: Smallest pixel value.
        high: Largest pixel value.

    Raises:
        ThreatError: If the budget is negative, not finite, or for linf wider than the box.
    """

    norm: Norm
    eps: float | None = None
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ThreatError(
                f"a norm out of {', '.join(NORMS)}",
                got=repr(self.norm),
                hint=suggestion(str(self.norm), NORMS).strip(" ()"),
            )
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ThreatError("a box with finite low < high", got=f"[{self.low}, {self.high}]")
        if self.eps is None:
            return
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ThreatError(f"{self.norm} eps >= 0 in pixel units", got=self.eps)
        span = self.high - self.low
        if self.norm == "linf" and wider(self.eps, span):
            raise ThreatError(
                f"linf eps in [0, {span:g}] in pixel units",
                got=self.eps,
                hint=f"did you mean {self.eps:g}/255?" if self.eps <= 255 else "eps is given in units of the box",
            )

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        low: float = 0.0,
        high: float = 1.0,
        unit: str = "1",
        span: tuple[float, float] = (0.0, 1.0),
    ) -> "Threat":
        """Read `linf:8/255`, `l2:0.5`, `l1:12`, or a norm alone for a threat without budget.

        A budget may be in the unit of the data, `linf:10HU`, or, whatever that is called, `linf:10raw`: it becomes the
        same share of the box that it is of the span.

        Args:
            text: The threat.
            low: Smallest pixel value.
            high: Largest pixel value.
            unit: Of the intensities that pixels stand for; 1 where they stand for nothing else.
            span: The intensities that the ends of the box stand for.
        """
        norm, colon, amount = (part.strip() for part in text.lower().partition(":"))
        if not colon and norm[:1] in tuple(".0123456789"):
            raise ThreatError("a norm before the budget", got=repr(text), hint=f"write linf:{text.strip()}")
        width, plain = high - low, unit == "1"
        eps = read_number(amount) if colon else None
        if isinstance(eps, str) and (found := _IN_UNITS.fullmatch(eps)):
            amount, eps = found[1], read_number(found[1])
            levels = f"{amount}/255" if norm == "linf" and amount.isdigit() and width < eps <= 255 else amount
            if plain or found[2] not in (unit.lower(), "raw"):
                told = "have no unit of their own" if plain else f"are in {unit}"
                hint = f"write {norm}:{levels if plain else amount + unit}"
                raise ThreatError("a budget in the units of the data", got=f"{text!r}, and the data {told}", hint=hint)
            eps = eps if isinstance(eps, str) else eps / (span[1] - span[0]) * width
        elif isinstance(eps, float) and norm == "linf" and not plain and wider(eps, width) and eps < math.inf:
            hint = f"did you mean linf:{amount}{unit}{f', or linf:{amount}/255' * (eps <= 255)}?"
            raise ThreatError(f"linf eps in [0, {width:g}] in pixel units, or in {unit}", got=repr(text), hint=hint)
        if isinstance(eps, str):
            raise ThreatError("a threat such as linf:8/255, l2:0.5 or l1:12", got=repr(text))
        if not plain and norm == "linf" and eps is not None and wider(eps, width):
            came = f"{text!r}, and the pixels stand for {span[0]:g} to {span[1]:g} {unit}"
            raise ThreatError(f"linf eps in [0, {span[1] - span[0]:g}] {unit}", got=came)
        return cls(norm=norm, eps=eps, low=low, high=high)  # pyright: ignore[reportArgumentType]  (checked above)

    def __str__(self) -> str:
        return self.norm if self.eps is None else f"{self.norm}:{self.eps:.6g}"

    @property
    def budget(self) -> float:
        """`eps` where it must be there.

        Raises:
            ThreatError: If the threat has none.
        """
        if self.eps is None:
            raise ThreatError("a threat with a budget", got=str(self), hint=f"write for example {self.norm}:8/255")
        return self.eps

    def distance(self, x: Images, z: Images) -> Scores:
        """Distance of each image of `z` from its original in `x`, in float64."""
        return vector_norm((z.double() - x.double()).flatten(1), self.norm)

    def holds(self, x: Images, z: Images) -> Mask:
        """Which images of `z` the adversary may use: inside the box and, with a budget, inside the ball."""
        flat = z.flatten(1)
        inside = ((flat >= self.low - self._rounding) & (flat <= self.high + self._rounding)).all(1)
        if self.eps is None:
            return inside
        return inside & (self.distance(x, z) <= self.eps + self.slack(flat.shape[1]))

    def slack(self, dims: int) -> float:
        """How far rounding may carry an image of so many numbers beyond the budget."""
        return (self._rounding + TOLERANCE * self.budget) * (1 if self.norm == "linf" else math.sqrt(dims))

    def project(self, x: Images, z: Images) -> Images:
        """The point of ball and box nearest to `z`, exactly, in the Euclidean sense.

        linf clamps. l1 and l2 solve the one-dimensional dual of the projection on the intersection (methods: l1 as in
        Croce & Hein 2021, arXiv:2103.01208); to project on the ball and clamp afterwards wastes budget.
        """
        if self.norm == "linf":
            z = torch.minimum(torch.maximum(z, x - self.budget), x + self.budget)
            return z.clamp(self.low, self.high)
        delta = (z - x).flatten(1)
        room = torch.where(delta > 0, self.high - x.flatten(1), x.flatten(1) - self.low).clamp_min(0)
        shrink = _shrink_l2 if self.norm == "l2" else _shrink_l1
        length = shrink(delta.abs(), room, self.budget)
        moved = (x.flatten(1) + delta.sign() * length).to(x.dtype).view_as(x)
        # Pixels that rounding carried too far step back; over a large flat image the excess would break the l1 budget.
        too_far = ((moved.double() - x).flatten(1).abs() > length).view_as(x)
        return torch.where(too_far, moved.nextafter(x), moved).clamp(self.low, self.high)

    def ascend(self, x: Images, gradient: Images, length: float | Tensor, *, share: float = 0.0) -> Images:
        """The step of `length` that raises a linear function with this gradient most: steepest ascent.

        linf: the sign. l2: the normalised gradient. l1: the coordinates of largest gradient, each filled up to the
        box before the next (the exact solution of the linear programme on ball and box); `share` spreads the step
        evenly over that share of the coordinates instead. A zero gradient gives a zero step.
        """
        flat = gradient.flatten(1)
        if self.norm == "linf":
            step = flat.sign() * length
        elif self.norm == "l2":
            peak = flat.abs().amax(1, keepdim=True)  # first, because the squares of a tiny gradient vanish in float32
            flat = flat / torch.where(peak > 0, peak, 1)
            step = flat / flat.norm(dim=1, keepdim=True).clamp_min(1) * length
        else:
            step = self._fill(x.flatten(1), flat, length, share)
        return step.view_as(gradient)

    def start(self, x: Images, rng: Draws) -> Images:
        """A random point, uniform in the ball (linf, l2, l1), cut to the box."""
        if self.norm == "linf":
            return (x + rng.uniform(x, -self.budget, self.budget)).clamp(self.low, self.high)
        dims = x.flatten(1).shape[1]
        radius = self.budget * rng.at("radius").uniform(x.flatten(1)[:, :1]) ** (1 / dims)
        if self.norm == "l2":
            noise = rng.normal(x).flatten(1)
            noise = noise / noise.norm(dim=1, keepdim=True).clamp_min(1e-12)
        else:  # exponentials with random signs, normalised, are uniform on the l1 sphere
            noise = -rng.uniform(x).flatten(1).clamp_min(1e-12).log()
            noise = noise / noise.sum(1, keepdim=True) * rng.at("sign").sign(x).flatten(1)
        return self.project(x, x + (noise * radius).view_as(x))

    def quantise(self, x: Images, z: Images, levels: int = 256) -> Images:
        """`z` as a file with that many levels would store it, moved towards `x` where rounding would move away.

        No pixel ends further from `x` than it was (up to float32 rounding), or than half a level.
        """
        scale = (levels - 1) / (self.high - self.low)
        exact = (z.double() - self.low) * scale
        nearest = exact.round()
        origin = (x.double() - self.low) * scale
        towards = torch.where(exact > origin, exact.floor(), exact.ceil())
        grew = (nearest - origin).abs() > (exact - origin).abs() + self._rounding / 2 * scale
        crossed = (towards - origin) * (exact - origin) <= 0
        kept = torch.where(grew, torch.where(crossed, origin.round(), towards), nearest)
        return (kept / scale + self.low).clamp(self.low, self.high).to(z.dtype)

    @property
    def _rounding(self) -> float:
        return rounding(self.low, self.high)

    def _fill(self, x: Tensor, gradient: Tensor, length: float | Tensor, share: float) -> Tensor:
        room = torch.where(gradient > 0, self.high - x, x - self.low)
        room = room.clamp_max(length / max(1, round(share * x.shape[1]))) if share else room
        order = torch.where(room > 0, gradient.abs(), 0.0).argsort(dim=1, descending=True, stable=True)
        room = room.gather(1, order) * (gradient.gather(1, order) != 0)
        before = room.cumsum(1) - room
        part = torch.minimum(room, (length - before).clamp_min(0))
        return torch.zeros_like(part).scatter(1, order, part) * gradient.sign()


def vector_norm(flat: Tensor, norm: Norm) -> Scores:
    """The norm of each row."""
    if norm == "l2":
        return torch.linalg.vector_norm(flat, 2, dim=1)
    return flat.abs().amax(1) if norm == "linf" else flat.abs().sum(1)  # several times faster than vector_norm


def unit(flat: Tensor) -> Tensor:
    """A power of two as large as the largest entry of each row, shape (..., 1); 1 for zeros.

    Divided by it, a row has a norm, where the squares of its entries would overflow or vanish in float32. Nothing is
    rounded by that.
    """
    largest = flat.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1.0)


def per_image(values: Tensor, like: Images) -> Tensor:
    """One value for each image, shaped to be broadcast over its pixels."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def dual(norm: Norm) -> Norm:
    """The norm in which a gradient is measured when its image moves in `norm`."""
    return {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]  # pyright: ignore[reportReturnType]


def _shrink_l2(length: Tensor, room: Tensor, eps: float) -> Tensor:
    """Scale rows of `length` by t in [0, 1], capped at `room`, so that their l2 norm is at most `eps`.

    The norm grows with t; each round solves for t with the capped coordinates of the last one, which only ever
    underestimates t, so the set of capped coordinates grows until it is right.
    """
    length, room = length.double(), room.double()
    square, bound = length.square(), room.square()
    inside = torch.minimum(square, bound).sum(1, keepdim=True) <= eps * eps
    scale = torch.zeros_like(square[:, :1])
    for _ in range(length.shape[1]):
        capped = scale * length > room
        left = (eps * eps - torch.where(capped, bound, 0.0).sum(1, keepdim=True)).clamp_min(0)
        rest = torch.where(capped, 0.0, square).sum(1, keepdim=True)
        grown = torch.where(rest > 0, (left / rest.clamp_min(1e-300)).sqrt(), scale).maximum(scale)
        if bool((grown <= scale * (1 + 1e-12)).all()):
            break
        scale = grown
    return torch.minimum(length * torch.where(inside, 1.0, scale.clamp_max(1.0)), room)


def _shrink_l1(length: Tensor, room: Tensor, eps: float) -> Tensor:
    """Solve sum_i min(max(length_i - t, 0), room_i) = eps for t >= 0 by sorting its breakpoints; return the terms."""
    length, room = length.double(), room.double()
    room = torch.minimum(room, length)
    points, order = torch.cat([length, length - room], 1).sort(dim=1, descending=True)
    dims = length.shape[1]
    # Slope of the sum just below each breakpoint, as t falls, and the sum at each breakpoint.
    slope = torch.where(order < dims, 1.0, -1.0).double().cumsum(1)
    gap = points[:, :-1] - points[:, 1:]
    value = torch.cat([torch.zeros_like(points[:, :1]), (slope[:, :-1] * gap).cumsum(1)], 1)
    last = (value <= eps).sum(1, keepdim=True) - 1
    slack = eps - value.gather(1, last)
    t = points.gather(1, last) - slack / slope.gather(1, last).clamp_min(1)
    t = torch.where(room.sum(1, keepdim=True) <= eps, 0.0, t.clamp_min(0))
    return torch.minimum((length - t).clamp_min(0), room)
