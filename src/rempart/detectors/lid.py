"""Local intrinsic dimensionality: how fast neighbours come in as the distance grows."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from rempart.core.errors import DataError
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.types import Images, Scores
from rempart.detectors.activations import Layers, activations, chosen, collected, distances
from rempart.detectors.catalogue import Detector, Learning, State, detectors
from rempart.detectors.combine import Combine, combined, held_out, weighed


@detectors.register("lid", None)
def lid(
    *,
    k: Annotated[int, Ge(2)] = 20,
    references: Annotated[int, Ge(3)] = 100,
    layers: Layers = "all",
    combine: Combine = "sum",
) -> Detector:
    """The local intrinsic dimensionality of the activations, estimated from clean references, over several layers.

    Of a layer: -(mean over i <= k of log(r_i / r_k))^-1, with r_i the distances to the k nearest references in rising
    order; a distance of 0, of an image to itself, is left out once. At most 1e6, where all k are equally far. The score
    is the sum of z-scores of all layers, or their log-odds by logistic regression.

    Args:
        k: Neighbours.
        references: Clean images to look for them among, chosen by the seed.
        layers: The outputs of all blocks and what the last layer is fed with, or the latter alone.
        combine: `logistic` learns from attacks.

    Raises:
        DataError: When fitted, if there are not more than `k` references.

    Source:
        Ma et al. 2018, arXiv:1801.02613, and the authors' code: batches of 100, k of 10 to 90, 20 by default. Ours
        differs: one batch of references for all images instead of the clean images of each batch, so that a score does
        not depend on batch mates; feature maps by their mean over space (as in the code of Lee et al. 2018); z-scores
        where no attack is given; no cross-validation.
    """

    def measures(model: Classifier, x: Images, state: State) -> Tensor:
        found, _ = activations(model, x, chosen(model, layers))
        return torch.stack([dimension(f, state[f"references.{i}"], k) for i, f in enumerate(found)], 1)

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        held = held_out(rng)
        free = (~held).nonzero().flatten()
        draws = rng.select(free).at("references").uniform(torch.empty(len(free), 1, dtype=torch.float64))
        at = free[draws.flatten().argsort()[:references]]
        if len(at) <= k:
            hint = "fit it on more images: a larger --fit-limit, or none"
            raise DataError(f"more than {k} references, the neighbours of lid", got=len(at), hint=hint)
        found = collected(model, learning.x[at], chosen(model, layers))
        state = {f"references.{i}": f for i, f in enumerate(found)}
        weights = weighed(model, lambda x, _: measures(model, x, state), learning, held, combine, rng=rng)
        return {**state, **weights}

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        return combined(measures(model, x, state), state)

    return Detector(fit=fit, score=score, learns_attacks=combine == "logistic")


def dimension(f: Tensor, references: Tensor, k: int) -> Tensor:
    """The estimate for each row of features."""
    r = distances(f, references).topk(k + 1, largest=False, sorted=True).values
    r = torch.where(r[:, :1] == 0, r[:, 1:], r[:, :-1]).clamp_min(1e-12)
    return 1 / (r[:, -1:] / r).log().mean(1).clamp_min(1e-6)
