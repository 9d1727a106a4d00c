"""Trained models side by side: what each method reached within a threat, and what it cost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from rempart.core.errors import DataError
from rempart.core.stats import Difference, Mean, Rate, student
from rempart.core.threat import Threat
from rempart.report import compare as comparing
from rempart.report.schema import AttackResult, Report, Strict, Training, TrainSpec


@dataclass(frozen=True, slots=True)
class Trained:
    """A training run and what was measured on the model it left.

    Attributes:
        training: Its report.
        audit: The audit of its model within the threat.
        minimum: The audit of its model by a minimum-norm attack in l2.
        sizes: Per image of that audit, the l2 norm of the perturbation over that of the image: 0 where the model was
            wrong at first, infinite where the attack found nothing.
    """

    training: Report
    audit: Report
    minimum: Report
    sizes: np.ndarray


class Row(Strict):
    """One trained model.

    Attributes:
        name: What the caller calls it.
        method: Recipe, with the options given on top.
        model: Architecture, or what was fine-tuned.
        seed: Of the training.
        clean: Share of the test images rightly classified.
        worst: Share still right after every attack of the audit.
        rho2: Mean relative size of the smallest perturbation found, over the images where one was found or needless.
        found: Images for which one was found, out of `attacked`.
        cost: What the training report says about it; None in reports of earlier versions.
        checked: What the checks of the audit came to.
        to_first: Paired differences to the first run, by measure: `clean`, `worst case`.
        rho2_to_first: The same for `rho2`, over images where both have a size.
    """

    name: str
    method: str
    model: str
    seed: int
    clean: Rate
    worst: Rate
    rho2: Mean | None
    found: int
    attacked: int
    cost: Training | None
    checked: str
    to_first: dict[str, Difference]
    rho2_to_first: Mean | None


class Group(Strict):
    """Runs of one method that differ by the seed alone: means over runs, with Student's intervals."""

    method: str
    model: str
    runs: int
    clean: Mean
    worst: Mean
    rho2: Mean | None
    gradients: Mean | None
    seconds: Mean | None


class Methods(Strict):
    """Training runs side by side.

    Attributes:
        data: The test images.
        threat: What the models were audited against, as text.
        suite: The attacks.
        n: Number of test images, the same for all.
        confidence: Coverage of every interval, each taken alone.
        rows: One per run, in the order given.
        groups: One per method that was trained with several seeds.
        notes: What a reader must know before the figures.
    """

    data: str
    threat: str
    suite: str
    n: int
    confidence: float
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    notes: tuple[str, ...]


def compare_methods(runs: Mapping[str, Trained], *, confidence: float = 0.95) -> Methods:
    """Put trained models that were audited alike side by side, with paired differences to the first.

    Args:
        runs: Two or more, by the names they shall have in tables.
        confidence: Coverage of the intervals.

    Raises:
        SpecError: If there are fewer than two.
        DataError: If they were trained on different data, or audited on different samples.
    """
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        if run.training.data.digest != first.training.data.digest:
            raise DataError(
                "runs trained on the same data",
                got=f"{run.training.data.source} for {name}, {first.training.data.source} for {first_name}",
                hint="compare runs of one data set at a time",
            )
    compared = comparing.compare({name: run.audit for name, run in runs.items()}, confidence=confidence)
    rows: list[Row] = []
    for (name, run), entry in zip(runs.items(), compared.entries, strict=True):
        measures = (comparing.CLEAN, comparing.WORST)
        gaps = {measure: compared.contrast(name, measure) for measure in measures}
        spec, deepfool = _spec(run), _minimum(run)
        rows.append(
            Row(
                name=name,
                method=_method(spec),
                model=_model(spec),
                seed=spec.seed,
                clean=entry.accuracy[comparing.CLEAN],
                worst=entry.accuracy[comparing.WORST],
                rho2=_mean(run.sizes, confidence),
                found=0 if deepfool.norms is None else deepfool.norms.found,
                attacked=0 if deepfool.norms is None else deepfool.norms.n,
                cost=run.training.training,
                checked=run.audit.stamp or "not checked",
                to_first={measure: gap for measure, gap in gaps.items() if gap is not None},
                rho2_to_first=None if run is first else _mean_difference(run.sizes, first.sizes, confidence),
            )
        )
    threat = first.audit.spec
    return Methods(
        data=first.audit.data.source,
        threat="" if isinstance(threat, TrainSpec) else str(threat.threat),
        suite=str(getattr(threat, "suite", None)),
        n=compared.n,
        confidence=confidence,
        rows=tuple(rows),
        groups=tuple(_groups(rows, confidence)),
        notes=(*compared.notes, *_notes(runs)),
    )


def hardened_against(report: Report) -> Threat | None:
    """The threat a recipe measured itself by: its validation threat, or what its objective hardens against."""
    if report.training is None:
        return None
    recipe = report.training.recipe
    text = recipe.get("validation_threat") or recipe.get("options", {}).get("threat")
    return None if text is None else Threat.parse(str(text))


def _spec(run: Trained) -> TrainSpec:
    assert isinstance(run.training.spec, TrainSpec)
    return run.training.spec


def _method(spec: TrainSpec) -> str:
    return _called(PurePath(spec.recipe).name.removesuffix(".toml"), spec.options)


def _model(spec: TrainSpec) -> str:
    if spec.model is None:
        return f"from {spec.start}"
    return _called(spec.model, spec.model_options)


def _called(name: str, options: Mapping[str, Any]) -> str:
    told = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{name} ({told})" if told else name


def _minimum(run: Trained) -> AttackResult:
    return run.minimum.attacks[0]


def _mean(sizes: np.ndarray, confidence: float) -> Mean | None:
    """Over the images that have a size: infinite ones are left out."""
    finite = sizes[np.isfinite(sizes)]
    return student(finite, confidence) if len(finite) else None


def _mean_difference(ours: np.ndarray, theirs: np.ndarray, confidence: float) -> Mean | None:
    both = np.isfinite(ours) & np.isfinite(theirs)
    return _mean(ours[both] - theirs[both], confidence)


def _groups(rows: Sequence[Row], confidence: float) -> Iterator[Group]:
    for method, model in dict.fromkeys((row.method, row.model) for row in rows):
        own = [row for row in rows if (row.method, row.model) == (method, model)]
        if len({row.seed for row in own}) < 2:
            continue

        def mean(value: Callable[[Row], float | None], own: Sequence[Row] = own) -> Mean | None:
            values = [number for row in own if (number := value(row)) is not None]
            return student(values, confidence) if len(values) == len(own) else None

        clean, worst = mean(lambda row: row.clean.value), mean(lambda row: row.worst.value)
        assert clean is not None and worst is not None
        yield Group(
            method=method,
            model=model,
            runs=len(own),
            clean=_share(clean),
            worst=_share(worst),
            rho2=mean(lambda row: row.rho2 and row.rho2.value),
            gradients=mean(lambda row: row.cost and row.cost.gradients),
            seconds=mean(lambda row: row.cost and row.cost.seconds),
        )


def _share(mean: Mean) -> Mean:
    """A mean of shares: its interval ends at 0 and 1."""
    return mean.model_copy(update={"low": max(mean.low, 0.0), "high": min(mean.high, 1.0)})


def _notes(runs: Mapping[str, Trained]) -> Iterator[str]:
    for name, run in runs.items():
        if not run.training.complete:
            yield f"The training of {name} did not finish: it might have gone further."
        if run.minimum.stamp in ("suspicious", "invalid"):
            yield f"The sizes behind ρ₂ of {name} are {run.minimum.stamp} ({', '.join(run.minimum.fired)})."
        norms = _minimum(run).norms
        if norms is not None and norms.found < norms.n:
            yield (
                f"ρ₂ of {name} leaves out {norms.n - norms.found} of {norms.n} images on which the attack found "
                "nothing: it may be too low."
            )
        threat, audited = hardened_against(run.training), run.audit.spec
        if threat is not None and not isinstance(audited, TrainSpec) and audited.threat is not None:
            asked = Threat.parse(audited.threat)
            if (asked.norm, asked.eps) != (threat.norm, threat.eps):
                yield f"{name} was hardened against {threat} and audited at {asked}."
    unknown = [name for name, run in runs.items() if run.training.training is None]
    if unknown:
        yield f"Trained by an earlier version, which did not count the cost: {', '.join(unknown)}."
    if told := _differing({name: f"{run.training.model.parameters:,}" for name, run in runs.items()}):
        yield f"The runs differ in the number of parameters, too ({told}): a difference may come from that."
    begun = {name: _spec(run).start for name, run in runs.items()}
    if any(begun.values()):
        told = ", ".join(f"{name} with {start}" for name, start in begun.items() if start)
        yield f"Some runs began with a trained model ({told}): what that one cost is not counted."
    costs = {name: run.training.training for name, run in runs.items()}
    if told := _differing({name: f"{cost.train_images:,}" for name, cost in costs.items() if cost is not None}):
        yield f"The runs learnt from different numbers of images ({told})."
    if told := _differing({name: _machine(run.training) for name, run in runs.items()}):
        yield f"The seconds were taken on different machines ({told}): compare the gradients instead."


def _differing(values: Mapping[str, str]) -> str:
    """The values by name, if they are not all the same."""
    return ", ".join(f"{name}: {value}" for name, value in values.items()) if len(set(values.values())) > 1 else ""


def _machine(report: Report) -> str:
    return " / ".join(report.environment.get(key, "unknown") for key in ("processor", "cores", "accelerator"))
