"""Training recipes: an objective, an optimiser and a schedule, read from TOML and overridden by options."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import Field, create_model

from rempart.core.errors import SpecError
from rempart.core.registry import Entry, suggestion
from rempart.report.schema import Options, Strict
from rempart.train.objectives import Objective, objectives


class Settings(Strict):
    """What every recipe settles, whatever its objective.

    Attributes:
        summary: One line for people.
        objective: A name from `objectives`.
        epochs: Passes over the training data.
        batch_size: Images per step; the batches of an epoch differ by one image at most.
        optimiser: sgd, with Nesterov momentum 0.9; or adam, with decoupled weight decay.
        learning_rate: The largest of the schedule.
        schedule: Constant; cosine, from the largest to 0; or onecycle, a linear rise over the first fifth, then cosine.
        weight_decay: Pull of the weights to 0.
        flip: Mirror every second image left to right, at random.
        shift: Move every image by up to so many pixels in each direction, at random; black comes in.
    """

    summary: str = ""
    objective: str = "plain"
    epochs: Annotated[int, Ge(1)] = 10
    batch_size: Annotated[int, Ge(1)] = 64
    optimiser: Literal["sgd", "adam"] = "adam"
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    schedule: Literal["constant", "cosine", "onecycle"] = "onecycle"
    weight_decay: Annotated[float, Ge(0)] = 1e-2
    flip: bool = False
    shift: Annotated[int, Ge(0)] = 0


class Recipe(Settings):
    """A complete recipe.

    Attributes:
        options: All options of the objective, defaults included.
    """

    options: Options = Field(default_factory=dict)

    def build_objective(self) -> Objective:
        """The objective with its options."""
        return objectives[self.objective].function(**self.options)


def load_recipe(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """Read a packaged recipe by name, or a TOML file by path, and override it.

    Keys are those of `Settings` and, on the same level, the options of the objective. A table, such as `[medical]`,
    holds what differs for a family of data, and is asked for as `NAME:medical`.

    Raises:
        SpecError: If there is no such recipe, or a key or a value is wrong; all faults in one message.
    """
    wanted = {**_read(name), **(options or {})}
    entry = objectives[str(wanted.get("objective", "plain"))]
    schema = create_model("Wanted", __base__=(Settings, entry.params))
    values = Entry(f"recipe {name}", entry.function, None, schema).parse(wanted)
    own = {key: values.pop(key) for key in entry.params.model_fields}
    recipe = Recipe(**values, options=own)
    recipe.build_objective()
    return recipe


def recipe_names() -> tuple[str, ...]:
    """Names of the packaged recipes, each followed by those of its families: `trades`, `trades:cifar10`, ..."""
    return tuple(
        name for stem in _stems() for name in (stem, *(f"{stem}:{family}" for family in _tables(_parse(stem))))
    )


_FOLDER = files("rempart") / "recipes"


def _read(name: str) -> dict[str, Any]:
    """The keys of a recipe, those of its family included."""
    stem, colon, family = name.rpartition(":")
    if not colon or family.endswith(".toml"):
        stem, family = name, ""
    keys = _parse(stem)
    tables = _tables(keys)
    if family and family not in tables:
        have = ", ".join(tables) or "none"
        raise SpecError(
            f"a family of {stem} out of {have}", got=repr(family), hint=suggestion(family, tables).strip(" ()")
        )
    return {key: value for key, value in keys.items() if key not in tables} | tables.get(family, {})


def _tables(keys: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {key: value for key, value in keys.items() if isinstance(value, dict)}


def _stems() -> list[str]:
    return sorted(path.name.removesuffix(".toml") for path in _FOLDER.iterdir() if path.name.endswith(".toml"))


def _parse(name: str) -> dict[str, Any]:
    if name in _stems():
        text = (_FOLDER / f"{name}.toml").read_text("utf-8")
    elif name.endswith(".toml"):
        try:
            text = Path(name).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError("a readable recipe file", got=f"{name} ({error})") from None
    else:
        hint = suggestion(name, _stems()).strip(" ()") or "or give the path of a .toml file"
        raise SpecError(f"a recipe out of {', '.join(_stems())}", got=repr(name), hint=hint)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError("a recipe in TOML", got=f"{name} ({error})") from None
