"""The classifier of attack types: which attack, if any, an image went through."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from rempart.core.model import Classifier
from rempart.core.model import placed as on_model
from rempart.core.repro import Draws
from rempart.core.types import Images, Scores
from rempart.detectors.catalogue import Detector, Learning, State, detectors
from rempart.detectors.networks import cross_entropy, dense, descend, evened, perceptron, placed, standard, standardised
from rempart.detectors.traces import histograms, responses, stored


@detectors.register("attack-type", None)
def attack_type(
    *,
    eight_bit: bool = True,
    hidden: Annotated[int, Ge(1)] = 64,
    epochs: Annotated[int, Ge(1)] = 200,
) -> Detector:
    """Tell which attack an image went through, from its traces and from what the classifier says of it.

    A small network reads histograms of the differences between neighbouring pixels and the logits of the image and of
    a smoothed copy. Noisy images count as clean. The score is the log-odds of not being clean, log((1 - p) / p), which
    orders images as 1 - p does and does not saturate. It knows the attacks and the sizes that it learnt from: what it
    says of another is a guess.

    Args:
        eight_bit: Round images to 256 levels first. Without, it learns that attacked images in memory lie between
            levels, which no file keeps and any rounding hides.
        hidden: Width of the two hidden layers.
        epochs: Passes over the images.

    Raises:
        DataError: From `fit`, if no attack broke an image; an attack that broke none is left out.

    Source:
        The six classes are those of the Alzheimer MRI system of N. E. Khemiri (Sfax), whose convolutional network sees
        raw pixels alone and is judged on images whose originals it was trained on. Histograms of differences are after
        Pevny, Bas, Fridrich 2010 (steganalysis by subtractive pixel adjacency), without their co-occurrences; the
        smoothed copy is after feature squeezing (Xu et al. 2018, arXiv:1704.01155). The combination is our design.
    """

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        sets = [torch.cat([learning.x, *([] if learning.noisy is None else [learning.noisy])])]
        sets += [images for _, images in learning.attacked.values() if len(images)]
        with torch.no_grad():
            parts = [features(model, part).float().cpu() for images in sets for part in images.split(32)]
        labels = torch.arange(len(sets)).repeat_interleave(torch.tensor([len(images) for images in sets]))
        weight = evened(labels, [1 / len(sets)] * len(sets))
        generator = torch.Generator().manual_seed(rng.seed % 2**63)
        scale = standard(torch.cat(parts), "traces")
        inputs = standardised(scale, torch.cat(parts), "traces")
        first = dense(sizes=(inputs.shape[1], hidden, hidden, len(sets)), prefix="net", generator=generator)

        def loss(weights: State, rows: Tensor) -> Tensor:
            return cross_entropy(perceptron(weights, inputs[rows], "net"), labels[rows], weight[rows])

        return {**scale, **descend(first, loss, len(inputs), epochs=epochs, generator=generator, decay=1e-4)}

    def features(model: Classifier, x: Images) -> Tensor:
        x = on_model(model, x)
        x = stored(x, model.low, model.high) if eight_bit else x
        return torch.cat([histograms(x, model.low, model.high), responses(model, x)], 1)

    def logits(model: Classifier, x: Images, state: State) -> Tensor:
        seen = features(model, x)
        state = placed(state, seen)
        return perceptron(state, standardised(state, seen, "traces"), "net")

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        z = logits(model, x, state)
        return z[:, 1:].logsumexp(1) - z[:, 0]

    def likely(model: Classifier, x: Images, state: State, *, rng: Draws) -> Tensor:
        return logits(model, x, state).softmax(1)

    return Detector(fit=fit, score=score, learns_attacks=True, name=likely)
