"""Rempart attacks, audits, hardens, explains and guards image classifiers.

The names below load on first use: `import rempart` alone is quick and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rempart.attacks import Outcome, attack_batch, attack_data
    from rempart.core.model import Classifier, Normalize
    from rempart.core.threat import Threat
    from rempart.data import Data, open_data
    from rempart.guard import Guarded, load_guard
    from rempart.models import load, save
    from rempart.report.schema import Report
    from rempart.tasks import run

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Data",
    "Guarded",
    "Normalize",
    "Outcome",
    "Report",
    "Threat",
    "attack_batch",
    "attack_data",
    "load",
    "load_guard",
    "open_data",
    "run",
    "save",
]

_HOMES = {
    "attacks": ("Outcome", "attack_batch", "attack_data"),
    "core.data": ("Data", "open_data"),
    "core.model": ("Classifier", "Normalize"),
    "core.threat": ("Threat",),
    "guard": ("Guarded", "load_guard"),
    "models": ("load", "save"),
    "report.schema": ("Report",),
    "tasks": ("run",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"rempart.{home}"), name)
    raise AttributeError(f"module 'rempart' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
