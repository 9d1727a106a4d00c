"""The registry every preprocessing defence joins, the contract it signs, and the model behind it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Untraced
from rempart.core.registry import Registry
from rempart.core.types import Images


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What an attacker must know.

    Attributes:
        differentiable: Whether its own gradient says where the model goes. Otherwise the module carries a surrogate
            (see `bpda`), so that an attack through the model is the strongest one known without further ado.
        random: Whether two passes differ. An audit then takes the mean gradient over several passes.
    """

    differentiable: bool
    random: bool


preprocessors: Registry[Callable[..., nn.Module], Traits] = Registry(
    "preprocessing defence", group="rempart.preprocessors"
)
"""Factories of modules: images in [0, 1], shape (n, c, h, w), to images of the same shape in [0, 1].

Keyword-only parameters are the options. A module has no trained weights, does the same in both modes, draws random
numbers from torch's global generator (as dropout does) and treats each image on its own.
"""


class Bpda(nn.Module):
    """The transform forwards, its surrogate backwards.

    Source:
        Athalye, Carlini, Wagner 2018, arXiv:1802.00420, section 4.1 (backward pass differentiable approximation).
    """

    def __init__(self, transform: Callable[[Images], Images], surrogate: Callable[[Images], Images]) -> None:
        super().__init__()
        self.transform, self.surrogate = transform, surrogate

    def forward(self, x: Images) -> Images:
        """Exactly the transform of `x`, with the gradient of the surrogate."""
        exact = self.transform(x.detach())
        if not (x.requires_grad and torch.is_grad_enabled()):
            return exact
        smooth = self.surrogate(x)
        return exact + (smooth - smooth.detach())  # plus zero: in the other order rounding would change the image


def identity(x: Images) -> Images:
    """The surrogate of transforms that hardly change an image."""
    return x


def bpda(transform: Callable[[Images], Images], surrogate: Callable[[Images], Images] = identity) -> Bpda:
    """Give a transform that has no useful gradient that of a smooth one near it."""
    return Bpda(transform, surrogate)


class Preprocessing(Untraced):
    """Defences in a row, for images in any box.

    Attributes:
        steps: Their modules.
        text: Names and options as bytes. They belong to the state, so that its digest tells defences apart.
    """

    text: Tensor

    def __init__(self, chain: Sequence[tuple[str, Mapping[str, Any]]], low: float, high: float) -> None:
        super().__init__()
        parsed = [(preprocessors[name], preprocessors[name].parse(options)) for name, options in chain]
        self.steps = nn.Sequential(*(entry.function(**options) for entry, options in parsed))
        self.low, self.span = low, high - low
        text = json.dumps([[entry.name, options] for entry, options in parsed])
        self.register_buffer("text", torch.tensor(list(text.encode()), dtype=torch.uint8))

    def forward(self, x: Images) -> Images:
        """Images in the box to images in the box."""
        return self.steps((x - self.low) / self.span) * self.span + self.low


def defended(model: Classifier, chain: Sequence[tuple[str, Mapping[str, Any]]]) -> Classifier:
    """The classifier behind preprocessing defences, the first of `chain` nearest to the image.

    The network is shared, not copied. An empty chain gives the model itself.

    Args:
        model: Takes images (c, h, w) in its box.
        chain: Names and options.

    Raises:
        SpecError: If a name or an option is wrong.
        ModelError: If the model takes no images of two spatial axes.

    Example:
        >>> from rempart import load  # doctest: +SKIP
        >>> model = defended(load("runs/plain"), [("jpeg", {"quality": 50})])  # doctest: +SKIP
    """
    if not chain:
        return model
    if len(model.shape) != 3:
        raise ModelError("images of shape (c, h, w) for a preprocessing defence", got=model.shape)
    before = Preprocessing(chain, model.low, model.high)
    behind = Classifier(
        nn.Sequential(before, model.net),
        shape=model.shape,
        num_classes=model.num_classes,
        class_names=model.class_names,
        low=model.low,
        high=model.high,
        output=model.output,
        notes=model.notes,
    )
    for module in (behind, behind.net, *before.modules()):
        module.training = model.training  # one by one: `train()` would change the network's own modes
    return behind


def described(chain: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """The defences with all their options, as they are written on the command line."""
    told: list[str] = []
    for name, options in chain:
        given = ",".join(f"{key}={value}" for key, value in preprocessors[name].parse(options).items())
        told.append(f"{name}:{given}" if given else name)
    return tuple(told)
