"""Attacks that trade the size of the perturbation against the margin: carlini-wagner and ead."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import finite, rounding, score
from rempart.core.events import Event, Notify, silent
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels, Mask, Scores

_LARGEST_CONST = 1e10
_STEEPEST = 1e18
"""Adam keeps the squares of slopes, which are to be finite in float32."""


@attacks.register("cw", Traits(norms=("l2",), targeted=True, minimum=True))
def cw(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Annotated[int, Ge(1)] = 1000,
    search_steps: Annotated[int, Ge(1)] = 9,
    learning_rate: Annotated[float, Gt(0)] = 0.01,
    initial_const: Annotated[float, Gt(0)] = 1e-3,
    confidence: Annotated[float, Ge(0)] = 0.0,
    abort_early: bool = True,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Find a small l2 perturbation by minimising |d|^2 + const * max(confidence - margin, 0) (Carlini-Wagner l2).

    The image is written as a tanh, so it never leaves the box; Adam does the descent; const is searched for each
    sample on its own.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: Classes to leave, or to reach if `targeted`.
        threat: Gives the box; a budget is ignored.
        steps: Descent steps for each const (10,000 in the paper; 1,000 loses little).
        search_steps: Values of const tried.
        learning_rate: Of Adam, in tanh space.
        initial_const: First const; times 10 after a failure until one works, bisected from then on.
        confidence: Margin in logits the result must have.
        abort_early: Leave a descent that over a fifth of its steps brought neither a loss nor a success 0.01 % smaller.
        targeted: Move towards `y` instead of away from it.
        rng: Not used: the attack draws nothing.
        notify: Receives one event per tenth of a descent.

    Returns:
        Images like `x`: the smallest success over everything tried, or where there was none the point of best margin.

    Source:
        Carlini & Wagner 2017, arXiv:1608.04644, section VI.A, with the authors' defaults but for `steps`.
    """
    margin = score("margin", targeted=targeted, num_classes=2)
    middle, half = (threat.high + threat.low) / 2, (threat.high - threat.low) / 2
    best = Smallest.at(x)
    for const, rung in _search(x, search_steps, initial_const, best):
        active = torch.arange(len(x), device=x.device)
        w = torch.atanh(((x - middle) / half * 0.999999).clamp(-0.999999, 0.999999))
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        weight, origin, label, before, lowest, smallest = const, x, y, *_endless(const)
        for t in range(steps + 1):  # the last round only judges what the last step reached
            if t % max(1, steps // 10) == 0:
                notify(Event(stage="descent", done=rung * steps + t, total=search_steps * steps))
            w = w.detach().requires_grad_(True)
            with torch.enable_grad():
                image = w.tanh() * half + middle
                z = model(image)
                size, lead = (image - origin).flatten(1).square().sum(1), margin(z, label)
                value = size + weight * (confidence - lead).clamp_min(0)
                (gradient,) = torch.autograd.grad(value.sum(), w)
            with torch.no_grad():
                gradient = finite(gradient, w).clamp(-_STEEPEST, _STEEPEST)
                wins = (lead > rounding(z)) & (lead >= confidence)
                best.update(active, image, size, lead, wins)
                first.lerp_(gradient, 0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                scale = (second / (1 - 0.999 ** (t + 1))).sqrt_().add_(1e-8)
                w = w.detach() - learning_rate / (1 - 0.9 ** (t + 1)) * first / scale
                lowest = torch.minimum(lowest, value)
                if abort_early and t % max(1, steps // 5) == 0:
                    stay = (lowest < 0.9999 * before) | (best.size[active] < 0.9999 * smallest)
                    before, smallest = lowest, best.size[active]
                    if not bool(stay.all()):
                        active, w, first, second = _rows(stay, active, w, first, second)
                        weight, origin, label = _rows(stay, weight, origin, label)
                        before, lowest, smallest = _rows(stay, before, lowest, smallest)
                    if len(active) == 0:
                        break
    return best.image


@attacks.register("ead", Traits(norms=("l1",), targeted=True, minimum=True))
def ead(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    rule: Literal["en", "l1"] = "en",
    beta: Annotated[float, Ge(0)] = 1e-3,
    steps: Annotated[int, Ge(1)] = 1000,
    search_steps: Annotated[int, Ge(1)] = 9,
    learning_rate: Annotated[float, Gt(0)] = 0.01,
    initial_const: Annotated[float, Gt(0)] = 1e-3,
    confidence: Annotated[float, Ge(0)] = 0.0,
    abort_early: bool = True,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Find a sparse perturbation by minimising const * hinge + |d|_2^2 + beta * |d|_1 (elastic net).

    Proximal gradient descent with momentum (FISTA); const is searched for each sample on its own.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: Classes to leave, or to reach if `targeted`.
        threat: Gives the box; a budget is ignored.
        rule: Which success to keep: the smallest |d|_2^2 + beta * |d|_1 (`en`) or the smallest |d|_1 (`l1`).
        beta: Weight of the l1 norm, and the threshold of the shrinking step.
        steps: Descent steps for each const.
        search_steps: Values of const tried.
        learning_rate: First step length; it falls as the square root of the steps left.
        initial_const: First const; times 10 after a failure until one works, bisected from then on.
        confidence: Margin in logits the result must have.
        abort_early: Leave a descent that over a fifth of its steps brought neither a loss nor a success 0.01 % smaller.
        targeted: Move towards `y` instead of away from it.
        rng: Not used: the attack draws nothing.
        notify: Receives one event per tenth of a descent.

    Returns:
        Images like `x`: the smallest success by `rule`, or where there was none the point of best margin.

    Source:
        Chen et al. 2018, arXiv:1709.04114, algorithm 1; thresholds by beta and not by learning_rate * beta, as the
        authors' code does. Each const starts again at `x`.
    """
    margin = score("margin", targeted=targeted, num_classes=2)
    best = Smallest.at(x)
    for const, rung in _search(x, search_steps, initial_const, best):
        active = torch.arange(len(x), device=x.device)
        point, ahead = x, x
        weight, origin, label, before, lowest, smallest = const, x, y, *_endless(const)
        for t in range(steps):
            if t % max(1, steps // 10) == 0:
                notify(Event(stage="descent", done=rung * steps + t, total=search_steps * steps))
            ahead = ahead.detach().requires_grad_(True)
            with torch.enable_grad():
                hinge = (confidence - margin(model(ahead), label)).clamp_min(0)
                smooth = weight * hinge + (ahead - origin).flatten(1).square().sum(1)
                (gradient,) = torch.autograd.grad(smooth.sum(), ahead)
            with torch.no_grad():
                gradient = finite(gradient, ahead, threat.low, threat.high)
                stepped = ahead - learning_rate * (1 - t / steps) ** 0.5 * gradient
                last, point = point, _shrink(stepped, origin, beta, threat)
                ahead = point + t / (t + 3) * (point - last)
                z = model(point)
                change, lead = (point - origin).flatten(1), margin(z, label)
                size = change.abs().sum(1)
                elastic = change.square().sum(1) + beta * size
                wins = (lead > rounding(z)) & (lead >= confidence)
                best.update(active, point, elastic if rule == "en" else size, lead, wins)
                lowest = torch.minimum(lowest, elastic + weight * (confidence - lead).clamp_min(0))
                if abort_early and t % max(1, steps // 5) == 0:
                    stay = (lowest < 0.9999 * before) | (best.size[active] < 0.9999 * smallest)
                    before, smallest = lowest, best.size[active]
                    if not bool(stay.all()):
                        active, point, ahead = _rows(stay, active, point, ahead)
                        weight, origin, label = _rows(stay, weight, origin, label)
                        before, lowest, smallest = _rows(stay, before, lowest, smallest)
                    if len(active) == 0:
                        break
    return best.image


@dataclass(slots=True)
class Smallest:
    """The smallest success of each sample so far; until there is one, the point of best margin."""

    image: Images
    size: Scores
    margin: Scores
    won: Mask
    """Samples that won in the present descent."""

    @classmethod
    def at(cls, x: Images) -> "Smallest":
        """Nothing found yet."""
        worst = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        return cls(x.clone(), worst, -worst, torch.zeros_like(worst, dtype=torch.bool))

    def update(self, at: Tensor, image: Images, size: Scores, margin: Scores, wins: Mask) -> None:
        """Keep those of the images, of the samples `at`, that are better than before."""
        better = torch.where(wins, size < self.size[at], self.size[at].isinf() & (margin > self.margin[at]))
        self.won[at] |= wins
        if not bool(better.any()):
            return
        where = at[better]
        self.image[where] = image.detach()[better]
        self.size[where] = torch.where(wins, size, torch.inf).detach()[better]
        self.margin[where] = margin.detach()[better]


def _search(x: Images, rungs: int, first: float, best: Smallest) -> Iterator[tuple[Scores, int]]:
    """Constants to try, one per sample: times 10 until one works, then bisection towards the smallest that does."""
    const = torch.full((len(x),), first, dtype=x.dtype, device=x.device)
    lower, upper = torch.zeros_like(const), torch.full_like(const, _LARGEST_CONST)
    for rung in range(rungs):
        best.won.zero_()
        yield const, rung
        upper = torch.where(best.won, torch.minimum(upper, const), upper)
        lower = torch.where(best.won, lower, torch.maximum(lower, const))
        const = torch.where(upper < _LARGEST_CONST, (lower + upper) / 2, const * 10)


def _endless(like: Scores) -> tuple[Scores, Scores, Scores]:
    endless = torch.full_like(like, torch.inf)
    return endless, endless, endless


def _rows(stay: Mask, *columns: Tensor) -> tuple[Tensor, ...]:
    return tuple(column[stay] for column in columns)


def _shrink(stepped: Images, origin: Images, beta: float, threat: Threat) -> Images:
    """Pull each pixel towards the original by beta, at most onto it, and cut to the box."""
    change = stepped - origin
    return (origin + change.sign() * (change.abs() - beta).clamp_min(0)).clamp(threat.low, threat.high)
