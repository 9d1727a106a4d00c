"""What is wrong with a request and can be known before its job runs: names, options, budgets, data of another kind."""

from collections.abc import Sequence
from typing import Any, Protocol

from rempart.attacks import attacks
from rempart.attacks.plan import plan
from rempart.attacks.suites import suite
from rempart.core.errors import DataError
from rempart.data import Data
from rempart.detectors import detectors
from rempart.models.zoo import models
from rempart.preprocess import preprocessors
from rempart.report.schema import AnySpec, AuditSpec, ExplainSpec, TrainSpec
from rempart.train.config import load_recipe


class Takes(Protocol):
    """A model: what it takes and says, without its network."""

    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    low: float
    high: float


def check(spec: AnySpec, takes: Sequence[Takes], data: Data | None) -> None:
    """Refuse what would fail as soon as its job runs.

    Args:
        spec: What was asked for.
        takes: The models it names.
        data: The images it names.

    Raises:
        SpecError: If a name is of nothing, or an option or a budget is none.
        DataError: If the data do not fit a model.
    """
    for registry, choices in _choices(dict(spec)):
        for choice in choices:
            registry[choice.name].parse(choice.options)
    if isinstance(spec, TrainSpec):
        if spec.model is not None:
            models[spec.model].parse(spec.model_options)
        load_recipe(spec.recipe, {name: value for name, value in spec.options.items() if name != "neurons"})
    if data is not None:
        for model in takes:
            _fit(model, data)
            _budget(spec, model, data)


def _choices(told: dict[str, Any]) -> Sequence[tuple[Any, Sequence[Any]]]:
    single = [told["attack"]] if told.get("attack") is not None else []
    return (
        (attacks, [*told.get("attacks", ()), *single]),
        (preprocessors, told.get("defences", ())),
        (detectors, told.get("detectors", ())),
    )


def _fit(model: Takes, data: Data) -> None:
    data.matched(model.classes)
    if tuple(model.shape) != tuple(data.shape):
        hint = (
            f"folders and zips can be converted: @{model.shape[-1]}x{model.shape[-2]} resizes, @grey and @rgb convert"
        )
        raise DataError(
            f"images of shape {_sides(model.shape)}, as {model.name} takes them", got=_sides(data.shape), hint=hint
        )


def _budget(spec: AnySpec, model: Takes, data: Data) -> None:
    if isinstance(spec, TrainSpec) or spec.threat is None:
        return
    threat = data.threat(spec.threat, model.low, model.high)
    if isinstance(spec, AuditSpec):
        plan(spec, threat, len(model.classes), classes=model.classes)
    elif isinstance(spec, ExplainSpec) and spec.suite is not None:
        suite(spec.suite, threat, len(model.classes))


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
