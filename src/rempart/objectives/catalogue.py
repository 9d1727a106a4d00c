"""The registry every training objective joins, and the contract it signs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from rempart.core.registry import Registry
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels, Logits
from rempart.data import Data


class Loss(NamedTuple):
    """What one batch costs.

    Attributes:
        value: Mean loss over the batch, to be differentiated.
        parts: Detached batch means worth showing; `accuracy` is always among them.
    """

    value: Tensor
    parts: Mapping[str, Tensor]


class Craft(Protocol):
    """Make the images a model is trained on. It freezes the model meanwhile and leaves no gradient in it."""

    def __call__(self, model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float) -> Images:
        """Return images like `x`; `progress` in [0, 1] says how far the training is."""
        ...


class LossOf(Protocol):
    """Say what a batch costs, in the model's training mode, with a gradient to its parameters."""

    def __call__(self, model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        """Return the loss of the original images `x` and the crafted ones `x_adv`."""
        ...


class BeforeEpoch(Protocol):
    """Look at the training data before an epoch, for example to choose the neurons a loss is about."""

    def __call__(self, model: nn.Module, data: Data, *, rng: Draws, epoch: int) -> None:
        """`data` lie in memory; `rng` are the draws of all their samples; `epoch` counts from 1."""
        ...


class AfterStep(Protocol):
    """Follow up on a step of the optimiser: change weights or the strength of the attack."""

    def __call__(self, model: nn.Module, parts: Mapping[str, Tensor]) -> None:
        """`parts` are those of the batch, averaged over all processes."""
        ...


def as_they_are(model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float) -> Images:
    """The `Craft` that leaves images alone."""
    return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """How a model is trained. Only `loss` is needed.

    Random numbers come from `rng` alone, apart from those of layers such as dropout.

    Attributes:
        loss: The cost of a batch.
        craft: Makes the images beside the originals.
        threat: What the method hardens against, in pixels of [0, 1]; measures progress on validation images.
        before_epoch: Called before each epoch, also before the first one after a resume.
        after_step: Called after each step of the optimiser.
        repeats: Steps taken in a row on the same batch.
        state: Tensors that change while training and that a checkpoint keeps; entries are set anew or in place.
        alone: Whether the state belongs to one process, so that several cannot share the training.
    """

    loss: LossOf
    craft: Craft = as_they_are
    threat: Threat | None = None
    before_epoch: BeforeEpoch | None = None
    after_step: AfterStep | None = None
    repeats: int = 1
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    alone: bool = False

    def __call__(self, model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float = 1.0) -> Loss:
        """Craft, then return the loss of the batch. `model` is in training mode and stays so."""
        x_adv = self.craft(model, x, y, rng=rng, progress=progress)
        return self.loss(model, x, x_adv, y, rng=rng, progress=progress)


objectives: Registry[Callable[..., Objective], None] = Registry("objective", group="rempart.objectives")
"""Factories: their keyword-only parameters are the options of the objective. Each call gives a fresh state."""


def boxed(threat: Threat, model: nn.Module) -> Threat:
    """The threat in the box of a model."""
    return replace(threat, low=getattr(model, "low", 0.0), high=getattr(model, "high", 1.0))


def budgeted(text: str) -> Threat:
    """Read a threat that needs a budget.

    Raises:
        ThreatError: If it has none.
    """
    threat = Threat.parse(text)
    assert threat.budget >= 0  # raises where there is none
    return threat


def hits(z: Logits, y: Labels) -> Tensor:
    """Share of the batch whose largest logit is the true class's."""
    return (z.detach().argmax(1) == y).float().mean()


def ramp(progress: float, warmup: float) -> float:
    """Rise linearly from 0 to 1 over the first `warmup` of the training; 1 from the start without one."""
    return min(1.0, progress / warmup) if warmup > 0 else 1.0
