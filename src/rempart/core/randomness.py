"""Whether a model answers the same twice."""

from dataclasses import dataclass

import torch
from torch import nn

from rempart.core.repro import random_state
from rempart.core.types import Images, Logits

_PASSES = 32
"""Enough for a fair coin, thrown anew in each pass, to fall on one side throughout with a chance of 2**-31 < 1e-9."""
_MOST = 256
"""Where random numbers are drawn: what happens in one pass of twenty is missed with a chance of 2e-6."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """How repeated passes over the same images compare.

    Attributes:
        gap: Largest difference of two logits.
        random: Whether it is more than rounding.
        draws: Whether a pass draws from the global random numbers of torch, numpy or Python.
        passes: How many passes there were; they end with the first difference.
    """

    gap: float
    random: bool
    draws: bool
    passes: int


@torch.no_grad()
def repeated(model: nn.Module, x: Images, *, few: int) -> Repeats:
    """Pass over images in the device and dtype of a frozen model twice, and over the first `few` many times.

    A model that draws from one of the global generators shows by their states that it does, however rarely its draws
    change anything; it is asked more often.
    """
    before = random_state(x.device)
    first = model(x)
    draws = random_state(x.device) != before
    gap, passes, second = 0.0, 2, model(x)
    while True:
        gap = max(gap, float((first - second).abs().max()))
        if not alike(first, second) or passes >= (_MOST if draws else _PASSES):
            return Repeats(gap, not alike(first, second), draws, passes)
        if passes == 2:
            first = model(x[:few])  # alone: in another batch they are rounded otherwise
        passes, second = passes + 1, model(x[:few])


def alike(first: Logits, second: Logits) -> bool:
    """Whether two passes agree but for rounding."""
    return not bool(((first - second).abs() > 1e-4 * first.abs().amax().clamp_min(1)).any())
