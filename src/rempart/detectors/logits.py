"""Detectors that look at the logits alone: the baselines that any other has to beat."""

from collections.abc import Callable
from typing import Annotated

from annotated_types import Gt

from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.types import Images, Logits, Scores
from rempart.detectors.catalogue import Detector, Learning, State, detectors


@detectors.register("max-softmax", None)
def max_softmax() -> Detector:
    """The probability that is left for the classes which are not predicted.

    The score is the logarithm of its odds, logsumexp over k != c of z_k, minus z_c, with c the predicted class.

    Source:
        Hendrycks & Gimpel 2017, arXiv:1610.02136. Ours differs: the paper's score is the largest probability p; the
        log-odds of 1 - p put images in the same order, but neither they nor their gradient are rounded to 0 where the
        model is sure.
    """

    def score(z: Logits) -> Scores:
        top, at = z.max(1)
        return z.scatter(1, at[:, None], -float("inf")).logsumexp(1) - top

    return _of_logits(score)


@detectors.register("margin", None)
def margin() -> Detector:
    """How close the second class is: the second largest logit less the largest.

    Source:
        Textbook; no paper claims it. With two classes it is the score of `max-softmax`.
    """

    def score(z: Logits) -> Scores:
        top = z.topk(2, dim=1).values
        return top[:, 1] - top[:, 0]

    return _of_logits(score)


@detectors.register("energy", None)
def energy(*, temperature: Annotated[float, Gt(0)] = 1.0) -> Detector:
    """The free energy of the logits, -T logsumexp(z / T).

    It needs a network that returns logits. For one that returns probabilities of all classes they are normalised
    already, and the energy at T = 1 is 0 for every image.

    Args:
        temperature: T, by which the logits are divided.

    Source:
        Liu, Wang, Owens, Li 2020, arXiv:2010.03759, section 3.1, for images of another distribution; that it is used
        for attacks is our design.
    """
    return _of_logits(lambda z: -temperature * (z / temperature).logsumexp(1))


def _of_logits(of: Callable[[Logits], Scores]) -> Detector:
    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        return of(model(x).double())

    return Detector(fit=nothing, score=score)


def nothing(model: Classifier, learning: Learning, *, rng: Draws) -> State:
    """The `Fit` of a detector that has nothing to learn."""
    return {}
