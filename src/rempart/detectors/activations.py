"""What detectors read off the layers of a network, and references to compare it with."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rempart.core.errors import DataError, ModelError
from rempart.core.features import blocks, features, penultimate
from rempart.core.model import Classifier, placed
from rempart.core.types import Images, Labels, Scores
from rempart.detectors.catalogue import Learning

Layers = Literal["all", "last"]
"""The outputs of all blocks and what the last layer is fed with, or the latter alone."""
_CHUNK = 256  # images per pass


def chosen(model: Classifier, layers: Layers) -> list[str]:
    """Names of the layers; what the last one is fed with stands for the output of the last block."""
    return [*(blocks(model)[:-1] if layers == "all" else []), penultimate(model)]


def activations(model: Classifier, x: Images, names: Sequence[str]) -> tuple[list[Tensor], Labels]:
    """Float64 features (n, d) of each layer, feature maps by their mean over space, and the predicted classes.

    Raises:
        ModelError: If a layer takes no part in the pass.
    """
    with features(model, names) as seen:
        z = model(x)
    if missing := [name for name in names if name not in seen]:
        raise ModelError("layers that take part in a pass", got=f"{missing[0]}, which does not")
    maps = [seen[name].double() for name in names]
    return [f.flatten(2).mean(2) if f.ndim > 2 else f for f in maps], z.argmax(1)


def collected(model: Classifier, x: Images, names: Sequence[str]) -> list[Tensor]:
    """The features of many images, chunk by chunk without graph."""
    with torch.no_grad():
        parts = [activations(model, placed(model, part), names)[0] for part in x.split(_CHUNK)]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def enough(model: Classifier, y: Labels, least: int) -> None:
    """Refuse labels of which a class of the model has fewer than `least`.

    Raises:
        DataError: Naming the class.
    """
    counts = torch.bincount(y, minlength=model.num_classes)
    if int(counts.min()) < least:
        few = int(counts.argmin())
        raise DataError(
            f"{least} or more images of each class to fit the detector",
            got=f"{int(counts[few])} of class {model.class_names[few]!r}",
            hint="fit it on more images: a larger --fit-limit, or none",
        )


def references(model: Classifier, learning: Learning, least: int) -> dict[str, Tensor]:
    """What the last layer is fed with, for all images and with their true classes: the state of a detector.

    Raises:
        DataError: If a class has fewer than `least` images.
    """
    enough(model, learning.y, least)
    (found,) = collected(model, learning.x, chosen(model, "last"))
    return {"references": found, "labels": learning.y.to(found.device)}


def by_class(predicted: Labels, of_class: Callable[[int, Tensor], Scores]) -> Scores:
    """Scores whose formula depends on the predicted class: `of_class(c, rows)` gives those of the rows it names."""
    scores = torch.zeros(len(predicted), dtype=torch.float64, device=predicted.device)
    for c in predicted.unique().tolist():
        rows = (predicted == c).nonzero().flatten()
        scores = scores.index_put((rows,), of_class(c, rows))
    return scores


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (n, m) without the shortcut that loses digits of small ones; gradient 0 where they are 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
