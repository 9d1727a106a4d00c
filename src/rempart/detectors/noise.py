"""Whether a prediction survives random noise."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt

from rempart.core.model import Classifier
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.types import Images, Scores
from rempart.detectors.catalogue import Detector, State, detectors
from rempart.detectors.logits import nothing


@detectors.register("noise", None)
def noise(*, sigma: Annotated[Pixels, Gt(0)] = 0.05, passes: Annotated[int, Ge(1)] = 16) -> Detector:
    """How much the probabilities change under Gaussian noise.

    Score: mean over the passes of |softmax f(x) - softmax f(x + sigma n)|_1, between 0 and 2. The noise of an image is
    fixed by seed and sample number, and is not cut to the box.

    Args:
        sigma: Standard deviation of the noise in pixel units.
        passes: Noisy copies of each image.

    Source:
        Hu, Yu, Guo, Chao, Weinberger 2019, arXiv:1910.07629: the first of its two criteria. Ours differs: a mean over
        several passes; the paper tunes sigma to each model, our default is a choice.
    """

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        p = model(x).double().softmax(1)
        moved = [_moved(model, x + sigma * rng.at(i).normal(x), p) for i in range(passes)]
        return torch.stack(moved).mean(0)

    return Detector(fit=nothing, score=score, random=True)


def _moved(model: Classifier, x: Images, p: torch.Tensor) -> Scores:
    return (model(x).double().softmax(1) - p).abs().sum(1)
