"""One score out of several per image: those of layers, or of measures of different kinds."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rempart.core.errors import DataError
from rempart.core.model import Classifier, placed
from rempart.core.repro import Draws
from rempart.core.types import Images, Mask
from rempart.detectors.catalogue import Learning, State

Combine = Literal["sum", "logistic"]
"""Sum of z-scores, which needs clean images only, or logistic regression of attacked against clean and noisy ones."""
Measures = Callable[[Images, Draws], Tensor]
"""Images and their draws to scores, shape (n, number of measures), larger = more suspicious."""
_CHUNK = 256


def held_out(rng: Draws) -> Mask:
    """A fourth of the samples, chosen by the seed: the weights of measures are not learnt where these were fitted."""
    order = rng.at("held out").uniform(torch.empty(len(rng.index), 1, dtype=torch.float64)).flatten().argsort()
    return torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[: len(order) // 4], True)


def weighed(
    model: Classifier, measures: Measures, learning: Learning, held: Mask, how: Combine, *, rng: Draws
) -> State:
    """The weights by which `combined` adds measures up, learnt on the samples held out.

    Raises:
        DataError: If fewer than two samples are held out, or none of them was attacked where attacks are needed.
    """
    at = held.nonzero().flatten()
    if len(at) < 2:
        raise DataError("8 or more images to fit the detector", got=len(held), hint="fit it on more images")

    def table(x: Images, draws: Draws) -> Tensor:
        positions = torch.arange(len(x)).split(_CHUNK)
        with torch.no_grad():
            return torch.cat([measures(placed(model, x[part]), draws.select(part)) for part in positions])

    clean = table(learning.x[at], rng.select(at))
    mean, spread = clean.mean(0), clean.std(0)
    scale = torch.where(spread > 1e-9 * mean.abs(), 1 / spread, 0)  # a measure that never varies says nothing
    if how == "sum":
        return {"weight": scale, "bias": -(scale * mean).sum()}
    negative = [clean]
    if learning.noisy is not None:
        negative.append(table(learning.noisy[at], rng.select(at).at("noisy")))
    positive = [
        table(images[held[rows]], rng.select(rows[held[rows]]).at(name))
        for name, (rows, images) in learning.attacked.items()
        if bool(held[rows].any())
    ]
    if not positive:
        raise DataError("attacked images among the fourth that is held out", got="none", hint="fit it on more images")
    return _regression((torch.cat(negative) - mean) * scale, (torch.cat(positive) - mean) * scale, mean, scale)


def combined(table: Tensor, state: State) -> Tensor:
    """The score of each row."""
    return table @ state["weight"] + state["bias"]


def _regression(negative: Tensor, positive: Tensor, mean: Tensor, scale: Tensor) -> State:
    from sklearn.linear_model import LogisticRegression

    rows = torch.cat([negative, positive]).cpu().numpy()
    truth = [0] * len(negative) + [1] * len(positive)
    learnt = LogisticRegression(max_iter=1000).fit(rows, truth)
    weight = torch.from_numpy(learnt.coef_[0]).to(scale) * scale
    return {"weight": weight, "bias": torch.tensor(float(learnt.intercept_[0])).to(scale) - (weight * mean).sum()}
