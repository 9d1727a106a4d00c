"""Training recipes: an objective, an optimiser and a schedule, read from TOML and overridden by options."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, create_model

from rempart.core.errors import SpecError
from rempart.core.registry import Entry, suggestion
from rempart.core.threat import Threat
from rempart.objectives import Objective, awp, objectives
from rempart.objectives.catalogue import budgeted
from rempart.report.schema import Options, Strict

Share = Annotated[float, Ge(0), Le(1)]


class Settings(Strict):
    """What every recipe settles, whatever its objective.

    Attributes:
        summary: One line for people.
        objective: A name from `objectives`.
        epochs: Passes over the training data.
        batch_size: Images per step; the batches of an epoch differ by one image at most.
        accumulate: Parts that each batch is worked off in, to save memory; batch norm, and objectives that look at
            a batch as a whole, see the parts.
        optimiser: sgd, with Nesterov momentum 0.9; or adam, with decoupled weight decay.
        learning_rate: The largest of the schedule.
        schedule: Constant; cosine, from the largest to 0; onecycle, a linear rise over the first fifth, then cosine;
            or step, multiplied by `factor` at each of the `milestones`.
        milestones: Shares of the training after which the schedule step goes down.
        factor: What it is multiplied by there.
        weight_decay: Pull of the weights to 0.
        clip: Largest l2 norm of the gradient of a step; longer ones are shortened to it.
        ema: Decay of a running mean of the weights, which is then measured and kept in their place; 0 for none.
        precision: 32 bit, or mixed precision; logits, losses and the images of attacks stay in 32 bit. Gradients of
            attacks are not scaled, so that tiny ones vanish in 16: prefer bf16.
        flip: Mirror every second image left to right, at random.
        shift: Move every image by up to so many pixels in each direction, at random; black comes in.
        awp: Adversarial weight perturbation around the objective, relative to the size of the weights; 0 for none.
        awp_warmup: Share of the training before it begins.
        validation_images: Training images set aside to choose the best epoch by; at most a tenth of them.
        validation_threat: What a short PGD may do to them. Default: what the objective hardens against.
        collapse: Stop when the accuracy under that attack falls so far below its best.
    """

    summary: str = ""
    objective: str = "plain"
    epochs: Annotated[int, Ge(1)] = 10
    batch_size: Annotated[int, Ge(1)] = 64
    accumulate: Annotated[int, Ge(1)] = 1
    optimiser: Literal["sgd", "adam"] = "adam"
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    schedule: Literal["constant", "cosine", "onecycle", "step"] = "onecycle"
    milestones: tuple[Share, ...] = (0.75, 0.9)
    factor: Annotated[float, Gt(0)] = 0.1
    weight_decay: Annotated[float, Ge(0)] = 1e-2
    clip: Annotated[float, Gt(0)] | None = None
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    precision: Literal["32", "bf16", "16"] = "32"
    flip: bool = False
    shift: Annotated[int, Ge(0)] = 0
    awp: Annotated[float, Ge(0)] = 0.0
    awp_warmup: Share = 0.0
    validation_images: Annotated[int, Ge(0)] = 1000
    validation_threat: str | None = None
    collapse: Share | None = None


class Recipe(Settings):
    """A complete recipe.

    Attributes:
        options: All options of the objective, defaults included.
    """

    options: Options = Field(default_factory=dict)

    def build_objective(self) -> Objective:
        """The objective with its options, in a fresh state, around perturbed weights where the recipe asks for it."""
        return awp(objectives[self.objective].function(**self.options), self.awp, self.awp_warmup)

    def measured(self, objective: Objective) -> Threat | None:
        """What the validation images are attacked with; None where there is nothing to withstand."""
        threat = objective.threat if self.validation_threat is None else budgeted(self.validation_threat)
        return threat if threat is not None and threat.budget > 0 else None


def load_recipe(name: str, options: Mapping[str, Any] | None = None) -> Recipe:
    """Read a packaged recipe by name, or a TOML file by path, and override it.

    Keys are those of `Settings` and, on the same level, the options of the objective. A table, such as `[medical]`,
    holds what differs for a family of data, and is asked for as `NAME:medical`. The `step` of a recipe belongs to its
    `threat` and `steps`: with another of these, and no step of its own, the objective's default counts.

    Raises:
        SpecError: If there is no such recipe, or a key or a value is wrong; all faults in one message.
    """
    written, given = _read(name), options or {}
    if any(str(given.get(key, written.get(key))) != str(written.get(key)) for key in ("threat", "steps")):
        written.pop("step", None)
    wanted = {**written, **given}
    if "objective" not in wanted:
        raise SpecError(f"an objective in the recipe {name}", got="none", hint='for example objective = "pgd-at"')
    entry = objectives[str(wanted["objective"])]
    for key in wanted:
        owners = [other.name for other in objectives if key in other.params.model_fields]
        if owners and key not in entry.params.model_fields and key not in Settings.model_fields:
            hint = "choose one of their recipes; see `rempart list recipes`"
            raise SpecError(f"options of {entry.name}", got=f"{key}, an option of {', '.join(owners)}", hint=hint)
    schema = create_model("Wanted", __base__=(Settings, entry.params))
    values = Entry(f"recipe {name}", entry.function, None, schema).parse(wanted)
    own = {key: values.pop(key) for key in entry.params.model_fields}
    recipe = Recipe(**values, options=own)
    recipe.measured(recipe.build_objective())
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
    if "options" in tables:
        hint = "write them on the same level as the other keys; a table is a family of data"
        raise SpecError("no table [options] in a recipe", got=name, hint=hint)
    if family and family not in tables:
        have = ", ".join(tables) or "none"
        hint = suggestion(family, tables).strip(" ()") or f"{stem} alone is for something small"
        raise SpecError(f"a family of {stem} out of {have}", got=repr(family), hint=hint)
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
