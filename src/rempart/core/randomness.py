"""Whether a model answers the same twice."""

import functools
import random
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rempart.core.foreign import names, own
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
        draws: Whether a pass draws from the global random numbers of torch, numpy or Python, or the user's own code
            that the network runs has others at hand.
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
    change anything; one that draws from elsewhere, by its code. Both are asked more often.
    """
    before = random_state(x.device)
    first = model(x)
    draws = random_state(x.device) != before or any(map(_gives_random_numbers, _held(model)))
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


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_GLOBAL = (torch.default_generator, np.random.rand.__self__, random.random.__self__)
_ELSEWHERE = {"urandom", "SystemRandom", "default_rng", "secrets", "token_bytes", "uuid4"}


def _gives_random_numbers(value: object) -> bool:
    """Whether a value is a generator, but for the global ones, or a function that names a source of random numbers."""
    if isinstance(value, types.FunctionType):
        return not _ELSEWHERE.isdisjoint(names(value.__code__))
    return isinstance(value, _GENERATORS) and not any(value is known for known in _GLOBAL)


def _held(model: nn.Module) -> Iterator[object]:
    """What the user's own code in a network can use: values that its modules, functions and objects hold or name."""
    waiting, seen = list[object](model.modules()), dict[int, object]()  # values are kept, so that no id is taken twice
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, types.FunctionType) and not own(Path(value.__code__.co_filename)):
            continue
        yield value
        if isinstance(value, types.FunctionType):
            waiting += [value.__globals__.get(name) for name in names(value.__code__)]
            waiting += [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            waiting += [value.__self__, getattr(value, "__func__", None)]
        elif isinstance(value, functools.partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif not isinstance(value, (type, types.ModuleType)):
            waiting += [*getattr(value, "__dict__", {}).values()]
            waiting += [
                part
                for kind in type(value).__mro__
                for part in vars(kind).values()
                if isinstance(part, types.FunctionType)
            ]
