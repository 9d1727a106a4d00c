"""Detectors whose scores are told, for tests of what is made of scores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rempart.core.model import Classifier
from rempart.detectors.catalogue import Detector
from rempart.detectors.fitted import Card, Fitted, Threshold


def planted(
    model: Classifier, score: Callable[..., Tensor], threshold: float | None, *, seed: int = 0, **traits: Any
) -> Fitted:
    """A fitted detector with this score `score(x, rng)` and this threshold."""
    detector = Detector(
        fit=lambda model, learning, *, rng: {}, score=lambda model, x, state, *, rng: score(x, rng), **traits
    )
    limit = None if threshold is None else Threshold(value=threshold, fpr=0.05, n=100)
    card = Card(detector="planted", options={}, seed=seed, model="", shape=model.shape, fitted_on=1, state="")
    return Fitted(card.model_copy(update={"threshold": limit}), {}, detector, model)


def first_pixel(shape: tuple[int, ...] = (1, 1, 2)) -> Classifier:
    """Class 1 where the first pixel is above 0.5, class 0 elsewhere; the others count for nothing."""
    layer = nn.utils.skip_init(nn.Linear, 2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0]]))
        layer.bias.copy_(torch.tensor([0.0, -5.0]))
    return Classifier(nn.Sequential(nn.Flatten(), layer), shape=shape, num_classes=2).eval()
