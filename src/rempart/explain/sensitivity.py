"""How much the neurons of a model change under attack, and which of them change most."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from rempart.core.errors import ModelError, SpecError
from rempart.core.features import Moved, blocks, hidden
from rempart.core.repro import Draws

Choose = Literal["sensitive", "least", "random"]


def layers_of(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """The layers to look at: the output of every block after its activation, or the modules that patterns name.

    Args:
        model: A network or a wrapper, as for `core.features.watched`.
        patterns: Names of modules, or shell patterns such as `net.1.*`; the logits are no layer.

    Raises:
        ModelError: If the network has no hidden layer.
        SpecError: If a pattern names nothing.
    """
    own = blocks(model)
    if not patterns:
        if not own:
            raise ModelError("a network with hidden layers", got="none", hint="name --layers")
        return own
    return matching(hidden(model), patterns, own)


def matching(names: Sequence[str], patterns: Sequence[str], examples: Sequence[str] = ()) -> list[str]:
    """Those of the names that one of the patterns names, in their order.

    Raises:
        SpecError: If a pattern names nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            hint = f"for example {', '.join(examples or names)}"
            raise SpecError("the name of a layer before the logits, or a pattern", got=pattern, hint=hint)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def top(sigma: Tensor, share: float, choose: Choose = "sensitive", rng: Draws | None = None) -> Tensor:
    """The mask of a share of a layer's neurons, one at least, chosen among those that move.

    Neurons that never move are often dead: as a control they would make any others look important. Where fewer move
    than the share asks for, it is all of them; where none does, the mask is empty.

    Args:
        sigma: Sensitivities, shape (neurons).
        share: Of all neurons, in (0, 1].
        choose: The most sensitive, the least, or as many at random.
        rng: Draws with one index, for `random`.
    """
    moving = sigma > 0
    count = min(max(1, round(share * len(sigma))), int(moving.sum()))
    if choose == "random":
        assert rng is not None
        sigma = rng.uniform(torch.empty(1, len(sigma), dtype=torch.float64))[0]
    away = torch.inf if choose == "least" else -torch.inf
    order = sigma.masked_fill(~moving, away).argsort(descending=choose != "least", stable=True)
    return torch.zeros(len(sigma), dtype=torch.bool).index_fill(0, order[:count], True)


def jaccard(first: Tensor, second: Tensor) -> float:
    """Shared members over all members of two sets, given as masks, of which one at least has members."""
    return float((first & second).sum() / (first | second).sum())


def by_chance(neurons: int, first: int, second: int) -> float:
    """About what `jaccard` gives for sets of so many of `neurons` drawn at random: with s = ab / n, s / (a + b - s)."""
    shared = first * second / neurons
    return shared / (first + second - shared)


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's correlation; None where one of them does not vary, or there are fewer than three values."""
    if len(first) < 3:
        return None
    a, b = (torch.from_numpy(rankdata(value.numpy())) for value in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = a.norm() * b.norm()
    return float(a @ b / size) if size > 0 else None


def joined(parts: Iterable[Mapping[str, Moved]]) -> dict[str, Moved]:
    """The sums of several batches together."""
    whole: dict[str, Moved] = {}
    for part in parts:
        for layer, found in part.items():
            whole[layer] = whole[layer] + found if layer in whole else found
    return whole
