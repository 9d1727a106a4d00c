"""Distance to the training images of the predicted class, and how it compares with theirs to each other."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.types import Images, Scores
from rempart.detectors.activations import activations, by_class, chosen, distances, references
from rempart.detectors.catalogue import Detector, Learning, State, detectors

_CHUNK = 1000  # references compared with all others at a time


@detectors.register("knn", None)
def knn(*, k: Annotated[int, Ge(1)] = 10) -> Detector:
    """The distance to the k-th nearest training image of the predicted class.

    On what the last layer is fed with, scaled to length 1, so that the score is between 0 and 2.

    Args:
        k: Which neighbour.

    Raises:
        DataError: When fitted, if a class has fewer than `k` images.

    Source:
        Sun, Ming, Zhu, Li 2022, arXiv:2204.06507, for images of another distribution: features of length 1, the k-th
        neighbour. Ours differs: neighbours of the predicted class alone, and a small k for few images.
    """

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        state = references(model, learning, k)
        return {**state, "references": F.normalize(state["references"])}

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        (f,), predicted = activations(model, x, chosen(model, "last"))
        f = F.normalize(f)

        def of_class(c: int, rows: Tensor) -> Scores:
            return distances(f[rows], state["references"][state["labels"] == c]).kthvalue(k, dim=1).values

        return by_class(predicted, of_class)

    return Detector(fit=fit, score=score)


@detectors.register("lof", None)
def lof(*, k: Annotated[int, Ge(1)] = 20) -> Detector:
    """The local outlier factor among the training images of the predicted class.

    On what the last layer is fed with. The density of an image is the inverse of the mean over its k neighbours j of
    max(distance to j, distance of j to its own k-th neighbour); the score is the mean density of the neighbours over
    its own: about 1 inside a cluster of any density, larger outside.

    Args:
        k: Neighbours.

    Raises:
        DataError: When fitted, if a class has `k` images or fewer.

    Source:
        Breunig, Kriegel, Ng, Sander 2000, "LOF: identifying density-based local outliers", SIGMOD; scores are those of
        scikit-learn's LocalOutlierFactor with novelty=True. That it is taken per predicted class on activations is our
        design.
    """

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        state = references(model, learning, k + 1)
        f, labels = state["references"], state["labels"]
        reach, density = f.new_zeros(len(f)), f.new_zeros(len(f))
        for c in range(model.num_classes):
            own = labels == c
            reach[own], density[own] = _among_themselves(f[own], k)
        return {**state, "reach": reach, "density": density}

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        (f,), predicted = activations(model, x, chosen(model, "last"))

        def of_class(c: int, rows: Tensor) -> Scores:
            own = state["labels"] == c
            near, at = distances(f[rows], state["references"][own]).topk(k, largest=False)
            return state["density"][own][at].mean(1) / _density(near, state["reach"][own][at])

        return by_class(predicted, of_class)

    return Detector(fit=fit, score=score)


def _density(near: Tensor, reach: Tensor) -> Tensor:
    return 1 / (torch.maximum(near, reach).mean(1) + 1e-10)


def _among_themselves(f: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distance of each row to its k-th neighbour, and its density."""
    found = [_others(f, part, k) for part in torch.arange(len(f), device=f.device).split(_CHUNK)]
    near, at = (torch.cat(both) for both in zip(*found, strict=True))
    reach = near[:, -1]
    return reach, _density(near, reach[at])


def _others(f: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    apart = distances(f[rows], f)
    apart[torch.arange(len(rows), device=f.device), rows] = torch.inf
    near = apart.topk(k, largest=False, sorted=True)
    return near.values, near.indices
