"""The registry every preprocessing defence joins, the contract it signs, and the model behind it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rempart.core.model import Classifier
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
        smooth = self.surrogate(x)
        return smooth + (self.transform(x.detach()) - smooth).detach()


def identity(x: Images) -> Images:
    """The surrogate of transforms that hardly change an image."""
    return x


def bpda(transform: Callable[[Images], Images], surrogate: Callable[[Images], Images] = identity) -> Bpda:
    """Give a transform that has no useful gradient that of a smooth one near it."""
    return Bpda(transform, surrogate)


def defended(model: Classifier, chain: Sequence[tuple[str, Mapping[str, Any]]]) -> Classifier:
    """The classifier behind preprocessing defences, the first of `chain` nearest to the image.

    The network is shared, not copied. An empty chain gives the model itself.

    Args:
        model: Takes images (c, h, w) in its box.
        chain: Names and options.

    Raises:
        SpecError: If a name or an option is wrong.
        ModelError: If the model takes no images of two spatial axes.
    """
    raise NotImplementedError
