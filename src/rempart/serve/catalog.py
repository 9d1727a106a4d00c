"""What can be asked for, with the schemas that forms are made from."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from rempart.attacks import SUITES, attacks
from rempart.core.registry import Entry
from rempart.detectors import detectors
from rempart.models.zoo import models
from rempart.preprocess import preprocessors
from rempart.report.schema import Strict
from rempart.serve.live import AttackForm, attack_choices
from rempart.train.config import load_recipe, recipe_names


class Named(Strict):
    """Something that goes by a name."""

    name: str
    summary: str


class Form(Named):
    """The same with options, as a JSON schema with defaults and bounds."""

    options: dict[str, Any]


class Catalog(Strict):
    """All that comes with Rempart and can be named in a request.

    Attributes:
        attacks: Those that can also be tried on one image.
        joint: Attacks that make one perturbation for all images, for audits alone.
    """

    attacks: tuple[AttackForm, ...]
    joint: tuple[Form, ...]
    suites: tuple[Named, ...]
    preprocessors: tuple[Form, ...]
    detectors: tuple[Form, ...]
    recipes: tuple[Named, ...]
    architectures: tuple[Form, ...]


@cache
def catalog() -> Catalog:
    """The catalog; it does not change while a process runs."""
    single = attack_choices()
    names = {form.name for form in single}
    return Catalog(
        attacks=single,
        joint=_forms(entry for entry in attacks if entry.name not in names),
        suites=tuple(Named(name=name, summary=_first(suite.__doc__)) for name, suite in SUITES.items()),
        preprocessors=_forms(preprocessors),
        detectors=_forms(detectors),
        recipes=tuple(Named(name=name, summary=load_recipe(name).summary) for name in recipe_names()),
        architectures=_forms(models),
    )


def _forms(entries: Iterable[Entry[Any, Any]]) -> tuple[Form, ...]:
    return tuple(
        Form(name=entry.name, summary=entry.summary, options=entry.params.model_json_schema()) for entry in entries
    )


def _first(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
