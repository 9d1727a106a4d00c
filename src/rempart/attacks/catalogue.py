"""The registry every attack joins, and the contract it signs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rempart.core.registry import Registry
from rempart.core.threat import Norm
from rempart.core.types import Images

Attack = Callable[..., Images]
"""`attack(model, x, y, threat, *, targeted=False, rng=None, notify=silent, ...own options) -> images like x`.

`model` is frozen by the caller (`attacks.run`). Returns per sample the best image found; where nothing was found, a
feasible image, never zeros. With `targeted`, `y` holds the classes to reach. Never raises for "not found". Attacks
only search: whether an image counts is decided in `attacks.run`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What an attack can do.

    Attributes:
        norms: Norms it works in; the first is its own.
        targeted: Whether it can reach a given class.
        minimum: Whether it looks for the smallest perturbation instead of the worst image within a budget.
        random: Whether it draws random numbers.
        access: What it asks of the model: gradients, scores (logits) or decisions (the class alone).
        joint: Whether its images depend on each other (one perturbation for all), not sample by sample.
    """

    norms: tuple[Norm, ...]
    targeted: bool
    minimum: bool = False
    random: bool = False
    access: Literal["gradients", "scores", "decisions"] = "gradients"
    joint: bool = False


attacks: Registry[Attack, Traits] = Registry(
    "attack", reserved=frozenset({"targeted", "rng", "notify"}), group="rempart.attacks"
)
