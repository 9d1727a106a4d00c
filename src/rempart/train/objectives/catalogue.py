"""The registry every training objective joins, and the contract it signs."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from rempart.core.registry import Registry
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels, Logits


class Loss(NamedTuple):
    """What one batch costs.

    Attributes:
        value: Mean loss over the batch, to be differentiated.
        parts: Detached batch means worth showing; `accuracy` is always among them.
    """

    value: Tensor
    parts: Mapping[str, Tensor]


class Objective(Protocol):
    """How a model is trained: the loss of a batch.

    `model` is in training mode and stays so. An objective that attacks freezes the model meanwhile and leaves no
    gradient in its parameters. Random numbers come from `rng` alone.
    """

    def __call__(self, model: nn.Module, x: Images, y: Labels, *, rng: Draws) -> Loss:
        """Return the loss of the batch."""
        ...


objectives: Registry[Callable[..., Objective], None] = Registry("objective", group="rempart.objectives")
"""Factories: their keyword-only parameters are the options of the objective."""


def hits(z: Logits, y: Labels) -> Tensor:
    """Share of the batch whose largest logit is the true class's."""
    return (z.detach().argmax(1) == y).float().mean()
