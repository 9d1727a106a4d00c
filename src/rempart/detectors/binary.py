"""A learned detector: a small network that tells attacked images from clean ones."""

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from rempart.core.features import features, penultimate
from rempart.core.model import Classifier
from rempart.core.model import placed as on_model
from rempart.core.repro import Draws
from rempart.core.types import Images, Scores
from rempart.detectors.catalogue import Detector, Learning, State, detectors
from rempart.detectors.networks import (
    convolutions,
    convolve,
    cross_entropy,
    dense,
    descend,
    evened,
    perceptron,
    placed,
    standard,
    standardised,
)

_WIDTHS = (16, 32, 64)


@detectors.register("binary", None)
def binary(
    *,
    on: Literal["activations", "input"] = "activations",
    layer: str | None = None,
    hidden: Annotated[int, Ge(1)] = 64,
    epochs: Annotated[int, Ge(1)] = 30,
) -> Detector:
    """Tell attacked images from clean ones by a network trained on both.

    On activations: two dense layers on what a layer of the classifier puts out (maps averaged over space). On the
    input: three convolutions of stride 2 on the pixels, averaged over space, and two dense layers. Noisy images count
    as clean; both sides weigh the same, and so does each attack. The score is the log-odds of being attacked.

    Args:
        on: What the network sees.
        layer: Name of a module of the classifier; default what its last layer is fed with. Not for `on=input`.
        hidden: Width of the hidden dense layer.
        epochs: Passes over the images.

    Raises:
        ModelError: From `fit`, if the classifier has no such layer.

    Source:
        On the input: Gong, Wang, Ku 2017, arXiv:1704.04960. On activations: Metzen et al. 2017, arXiv:1702.04267,
        section 3, who attach a convolutional network to a layer of a residual network and train it against attacks on
        itself too; here it is dense, sees means over space, and no attacker knows it in training. The sizes are ours.
    """

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        clean = learning.x if learning.noisy is None else torch.cat([learning.x, learning.noisy])
        sets = [clean, *(images for _, images in learning.attacked.values() if len(images))]
        kind = torch.arange(len(sets)).repeat_interleave(torch.tensor([len(images) for images in sets]))
        attacks = len(sets) - 1
        weight = evened(kind, [0.5, *[0.5 / attacks] * attacks])
        with torch.no_grad():
            seen = torch.cat([_seen(model, part).float().cpu() for images in sets for part in images.split(64)])
        generator = torch.Generator().manual_seed(rng.seed % 2**63)
        scale, first, inputs = State(), State(), seen.shape[1]
        if on == "input":
            widths = (inputs, *_WIDTHS)
            first = convolutions(widths=widths, axes=seen.ndim - 2, prefix="conv", generator=generator)
            inputs = _WIDTHS[-1]
        else:
            scale = standard(seen, "layer")
        first |= dense(sizes=(inputs, hidden, 2), prefix="net", generator=generator)

        def loss(weights: State, rows: Tensor) -> Tensor:
            z = _logits({**scale, **weights}, seen[rows])
            return cross_entropy(z, kind[rows].clamp_max(1), weight[rows])

        return {**scale, **descend(first, loss, len(seen), epochs=epochs, generator=generator, decay=1e-4)}

    def _seen(model: Classifier, x: Images) -> Tensor:
        x = on_model(model, x)
        if on == "input":
            return (x - model.low) / (model.high - model.low) - 0.5
        where = layer or penultimate(model)
        with features(model, [where]) as found:
            model(x)
        return found[where].flatten(2).mean(2) if found[where].ndim > 2 else found[where]

    def _logits(state: State, seen: Tensor) -> Tensor:
        if on == "input":
            for number in range(len(_WIDTHS)):
                seen = convolve(state, seen, "conv", number, stride=2).relu()
            return perceptron(state, seen.flatten(2).mean(2), "net")
        return perceptron(state, standardised(state, seen, "layer"), "net")

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        seen = _seen(model, x)
        z = _logits(placed(state, seen), seen)
        return z[:, 1] - z[:, 0]

    return Detector(fit=fit, score=score, learns_attacks=True)
