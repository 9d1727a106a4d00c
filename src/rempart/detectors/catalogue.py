"""The registry every detector joins, and the contract it signs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from rempart.core.model import Classifier
from rempart.core.registry import Registry
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels, Scores

State = dict[str, Tensor]
"""All that a detector learnt, by name; stored as safetensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """What a detector is fitted on. Rows belong to source images; those of `attacked` are a part of them.

    Attributes:
        x: Clean images, float32 in the box of the model, shape (n, c, *s).
        y: Their true classes.
        index: Their sample numbers: what random numbers are keyed by.
        noisy: The same images under random noise of the size of the attacks, for detectors that learn from attacks;
            they count as clean.
        attacked: By attack, the positions in `x` of what it broke, and the images it made of them.
    """

    x: Images
    y: Labels
    index: Tensor
    noisy: Images | None = None
    attacked: Mapping[str, tuple[Tensor, Images]] = field(default_factory=dict[str, tuple[Tensor, Images]])


class Fit(Protocol):
    """Learn from images. The model is frozen by the caller."""

    def __call__(self, model: Classifier, learning: Learning, *, rng: Draws) -> State:
        """Return what `score` needs. `rng` are the draws of all samples of `learning`."""
        ...


class Score(Protocol):
    """Say how suspicious images are. The model is frozen by the caller."""

    def __call__(self, model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        """Return one finite number per image, larger = more suspicious, that does not depend on batch mates.

        Where the detector is differentiable the graph from `x` to the scores is kept.
        """
        ...


class Name(Protocol):
    """Say which attack it may have been."""

    def __call__(self, model: Classifier, x: Images, state: State, *, rng: Draws) -> Tensor:
        """Return probabilities, shape (n, 1 + attacks): of clean, and of each attack it learnt from in their order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector:
    """How an attack is noticed.

    Attributes:
        fit: Learns the state.
        score: The score; the threshold on it is set by `calibrate`, never by the detector.
        learns_attacks: Whether it needs `Learning.attacked`: what it says of attacks it has not seen is another matter.
        differentiable: Whether an attacker gets a useful gradient from `score`.
        random: Whether `score` uses `rng`.
        name: For detectors that name the attack: how likely each is.
    """

    fit: Fit
    score: Score
    learns_attacks: bool = False
    differentiable: bool = True
    random: bool = False
    name: Name | None = None


detectors: Registry[Callable[..., Detector], None] = Registry("detector", group="rempart.detectors")
"""Factories: their keyword-only parameters are the options of the detector."""
