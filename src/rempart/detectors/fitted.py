"""A detector that has learnt: fit it, set its threshold on clean images, keep it, take it up again."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from rempart.core import disk, given
from rempart.core.errors import DataError, ModelError
from rempart.core.identity import Identity, identity
from rempart.core.model import Classifier, frozen, placed
from rempart.core.repro import Draws, digest_state
from rempart.core.types import Images, Mask, Scores
from rempart.detectors.catalogue import Detector, Learning, State, detectors
from rempart.report.schema import Strict, fault

CARD = "detector.json"
STATE = "detector.safetensors"


class Threshold(Strict):
    """From which score on an image is flagged.

    Attributes:
        value: Flagged is what scores above it.
        fpr: Share it was set for, of clean images that the model classifies rightly.
        n: Clean images it was set on.
    """

    value: float
    fpr: float
    n: int


class Card(Strict):
    """What a fitted detector is, beside its tensors.

    Attributes:
        detector: Its name in the registry.
        options: All its options.
        seed: Of the fit and of its scores.
        model: Digest of the weights of the classifier it was fitted on.
        shape: Shape of one image.
        fitted_on: Number of clean images.
        attacks: Attacks it learnt from.
        state: Digest of what it learnt.
        threshold: None until it is calibrated.
        code: Digest of the source code of the classifier; empty where an earlier version fitted it.
        answers: Of the classifier, to fixed images; empty where they cannot be replayed, or were not recorded.
    """

    detector: str
    options: dict[str, Any]
    seed: int
    model: str
    shape: tuple[int, ...]
    fitted_on: int
    attacks: tuple[str, ...] = ()
    state: str
    threshold: Threshold | None = None
    code: str = ""
    answers: tuple[float, ...] = ()

    def of(self, known: Identity) -> "Card":
        """The card of a detector fitted on this very classifier."""
        return self.model_copy(update={"model": known.weights, "code": known.code, "answers": known.answers})


@dataclass(frozen=True, slots=True)
class Fitted:
    """A detector with what it learnt, and the classifier it belongs to."""

    card: Card
    state: State
    detector: Detector
    model: Classifier

    def score(self, x: Images, index: Tensor) -> Scores:
        """How suspicious images are; larger = more. The graph is kept where gradients are on.

        Args:
            x: Images, shape (n, *shape).
            index: Their sample numbers, for detectors that draw random numbers.

        Raises:
            DataError: If the images have another shape.
        """
        x = _images(self.model, x)
        if tuple(x.shape[1:]) != self.card.shape:
            expected = f"images of shape {self.card.shape}, which the detector was fitted on"
            raise DataError(expected, got=tuple(x.shape[1:]))
        with frozen(self.model):
            rng = Draws(self.card.seed, given.numbers(index, len(x)), ("detect",))
            return self.detector.score(self.model, placed(self.model, x), self.state, rng=rng)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it tells apart, `clean` first; nothing where it does not name attacks."""
        return () if self.detector.name is None else ("clean", *self.card.attacks)

    def named(self, x: Images, index: Tensor) -> Tensor:
        """Probabilities of `kinds`, shape (n, len(kinds)), for detectors that name attacks."""
        assert self.detector.name is not None
        with frozen(self.model), torch.no_grad():
            return self.detector.name(self.model, x, self.state, rng=Draws(self.card.seed, index, ("detect",)))

    def flags(self, scores: Scores) -> Mask:
        """Which scores are above the threshold, or are no numbers.

        Raises:
            DataError: If it has none.
        """
        if self.card.threshold is None:
            raise DataError("a calibrated detector", got="one without threshold", hint="calibrate it on clean images")
        return ~(scores <= self.card.threshold.value)


def fit(name: str, options: Mapping[str, Any], model: Classifier, learning: Learning, *, seed: int = 0) -> Fitted:
    """Fit a detector on a classifier.

    Raises:
        SpecError: If there is no such detector, or an option is wrong.
        DataError: If it needs attacks and there are none, images are too few, or do not fit the model.
        ModelError: If what it learnt is not finite.
    """
    entry = detectors[name]
    values = entry.parse(options)
    detector = entry.function(**values)
    if detector.learns_attacks and not any(len(at) for at, _ in learning.attacked.values()):
        raise DataError(f"images that an attack broke, which {name} learns from", got="none", hint="name --attack")
    x = _images(model, learning.x)
    if tuple(x.shape[1:]) != model.shape:
        raise DataError(f"images of shape {model.shape}", got=tuple(x.shape[1:]))
    y, index = given.labels(learning.y, len(x), model.num_classes), given.numbers(learning.index, len(x))
    learning = replace(learning, x=x, y=y, index=index)
    with frozen(model):
        state = detector.fit(model, learning, rng=Draws(seed, learning.index, ("detect", "fit")))
    state = _kept(state, model)
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"finite values of {key} in {name}", got="NaN or infinity", hint="fit it on more images")
    card = Card(
        detector=name,
        options=values,
        seed=seed,
        model="",
        shape=model.shape,
        fitted_on=len(learning.x),
        attacks=tuple(name for name, (at, _) in learning.attacked.items() if detector.learns_attacks and len(at)),
        state=digest_state(state),
    )
    return Fitted(card.of(identity(model)), state, detector, model)


def _images(model: Classifier, x: Images) -> Images:
    """Floating-point tensors as they are, with their graph; arrays and bytes held to what a model takes."""
    plain = isinstance(x, Tensor) and x.is_floating_point()  # pyright: ignore[reportUnnecessaryIsInstance]
    return x if plain else given.images(model, x)


def calibrate(fitted: Fitted, scores: Scores, fpr: float = 0.05) -> Fitted:
    """Set the threshold so that a fresh clean image is flagged with a chance of at most `fpr`.

    Where the scores are of images that the model classifies rightly, so is that image: others are flagged more often.

    It is the k-th smallest of n scores with k = ceil((n + 1)(1 - fpr)): the split conformal quantile, valid for images
    from the same source whatever the scores look like (Vovk et al. 2005; Lei et al. 2018, arXiv:1604.04173).

    Args:
        fitted: The detector.
        scores: Its scores of clean images that it was not fitted on.
        fpr: In (0, 1).

    Raises:
        DataError: If there are too few scores for so small a rate, or one is not finite.
    """
    enough(len(scores), fpr)
    if not bool(scores.isfinite().all()):
        raise DataError("finite scores", got="NaN or infinity")
    value = threshold(scores, fpr)
    assert value is not None
    card = fitted.card.model_copy(update={"threshold": Threshold(value=value, fpr=fpr, n=len(scores))})
    return replace(fitted, card=card)


def enough(n: int, fpr: float) -> None:
    """Check that n clean images can carry a threshold for a false-positive rate.

    Raises:
        DataError: If they are too few, or the rate is not in (0, 1).
    """
    if not 0 < fpr < 1:
        raise DataError("a false-positive rate in (0, 1)", got=fpr, hint="write 0.05 for 5 %")
    if _rank(n, fpr) > n:
        needed = math.ceil(1 / fpr - 1e-9) - 1
        expected = f"{needed} or more clean images to calibrate at {fpr:g}"
        hint = (
            "they are the rightly classified ones of a part of the test split, at most 1000, which --limit and "
            "--fit-limit do not change: give more test images or a larger --fpr"
        )
        raise DataError(expected, got=n, hint=hint)


def threshold(scores: Scores, fpr: float) -> float | None:
    """The conformal quantile of clean scores; None where there are too few for so small a rate."""
    k = _rank(len(scores), fpr)
    return None if k > len(scores) else float(scores.double().sort().values[k - 1])


def _rank(n: int, fpr: float) -> int:
    return math.ceil((n + 1) * (1 - fpr) - 1e-9)


def save(fitted: Fitted, folder: Path) -> None:
    """Write the card and the tensors, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    disk.replace(folder / STATE, to_bytes(fitted.state))
    disk.replace(folder / CARD, fitted.card.model_dump_json(indent=1).encode())


def load(folder: Path, model: Classifier) -> Fitted:
    """Read what `save` wrote; nothing in it is executed.

    Raises:
        ModelError: If it is not there or damaged, or was fitted on another model.
    """
    try:
        card = Card.model_validate_json((folder / CARD).read_bytes())
        state = from_bytes((folder / STATE).read_bytes())
    except OSError as error:
        raise ModelError(f"a folder with {CARD} and {STATE}", got=disk.unread(error)) from None
    except (ValidationError, SafetensorError) as error:
        came = f"{folder}, damaged ({fault(error) if isinstance(error, ValidationError) else error})"
        raise ModelError("a detector that `rempart detect evaluate` wrote", got=came, hint="run that again") from None
    if digest_state(state) != card.state:
        hint = "run `rempart detect evaluate` again"
        raise ModelError(f"the {STATE} that belongs to {CARD}", got=f"another one in {folder}", hint=hint)
    if differs := Identity(card.model, card.code, card.answers).difference(identity(model)):
        expected = f"the classifier {card.model}, which the detector in {folder} was fitted on"
        hint = "give the model and each --defence of the fit, in the same order, or fit a detector on this one"
        raise ModelError(expected, got=f"one with {differs}", hint=hint)
    entry = detectors[card.detector]
    return Fitted(card, _kept(state, model), entry.function(**entry.parse(card.options)), model)


def _kept(state: State, model: Classifier) -> State:
    """Tensors of their own without graph, where the model is."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {key: tensor.detach().to(device).clone().contiguous() for key, tensor in state.items()}
