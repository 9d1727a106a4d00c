"""The audit: how easily a classifier falls, with what was checked and what was not tried."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from rempart.attacks import SUITES, Outcome, Verdict, attack_data, attacks
from rempart.attacks.losses import score
from rempart.attacks.run import native
from rempart.audit.curves import from_distances, sweep
from rempart.audit.examples import examples
from rempart.audit.preflight import preflight
from rempart.core.data import Data
from rempart.core.errors import Cancelled, SpecError
from rempart.core.events import Event, Notify, named, silent
from rempart.core.model import Classifier, frozen
from rempart.core.registry import suggestion
from rempart.core.repro import environment
from rempart.core.stats import Rate, median_interval, wilson
from rempart.core.threat import Threat
from rempart.report.schema import (
    AttackResult,
    AuditSpec,
    Curve,
    DataCard,
    ModelCard,
    NormStats,
    Report,
    Samples,
    pack,
)

__all__ = ["Audit", "Planned", "audit", "measure", "plan", "preflight"]


@dataclass(frozen=True, slots=True)
class Planned:
    """One attack of an audit: its label in the report, its name and its validated options."""

    label: str
    name: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Audit:
    """An audit: the report, each attack's outcome with its images, and the error that ended it, if one did."""

    report: Report
    outcomes: Mapping[str, Outcome]
    error: Exception | None = None


def audit(model: Classifier, data: Data, spec: AuditSpec, *, card: ModelCard, notify: Notify = silent) -> Audit:
    """Run every planned attack on every sample and report the worst case of each.

    An interruption (Ctrl-C, or `Cancelled` from `notify`) or an error once attacks run ends the audit with what was
    finished, marked incomplete; the error stands in the result, for the caller to raise.

    Args:
        model: The classifier; it is left as it was.
        data: The samples, already cut to `spec.limit`.
        spec: Threat, attacks, seed; recorded in the report.
        card: Describes the model.
        notify: Receives progress.

    Raises:
        SpecError: If threat, suite, an attack or an option is wrong; before anything runs.
        DataError: If the data do not fit the model.
        ModelError: If the model's outputs cannot be attacked.
    """
    started = time.perf_counter()
    threat = Threat.parse(spec.threat, low=model.low, high=model.high)
    planned = plan(spec, threat, model.num_classes)
    model, checks = preflight(model, data)
    described = DataCard.of(data)
    outcomes: dict[str, Outcome] = {}
    curves: list[Curve] = []
    correct: np.ndarray | None = None
    error: Exception | None = None
    complete = False
    try:
        correct = _clean(model, data, spec.batch_size, notify)
        for attack in planned:
            outcome = attack_data(
                model,
                data,
                threat,
                attack.name,
                attack.options,
                batch_size=spec.batch_size,
                seed=spec.seed,
                eight_bit=spec.eight_bit,
                notify=named(attack.label, notify),
            )
            outcomes[attack.label] = outcome
            if attacks[attack.name].traits.minimum and outcome.norm == threat.norm:
                curves.append(from_distances(attack.label, outcome, threat))
        if spec.sweep and threat.eps:
            told = named("eps sweep", notify)
            curves.append(sweep(model, data, threat, batch_size=spec.batch_size, seed=spec.seed, notify=told))
        complete = True
    except (KeyboardInterrupt, Cancelled):
        pass  # the report says what is missing
    except Exception as failure:  # noqa: BLE001  the caller raises it again, once what was finished is safe
        error = failure
    samples = None
    if correct is not None:
        rows = {label: pack(outcome.right) for label, outcome in outcomes.items()}
        index, labels = data.index.tolist(), data.labels.tolist()
        samples = Samples(index=tuple(index), labels=tuple(labels), clean=pack(correct), right=rows)
    report = Report(
        kind="audit",
        complete=complete,
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        environment=environment(),
        model=card,
        data=described,
        notes=_notes(correct, data.num_classes, error),
        preflight=checks,
        clean=None if correct is None else wilson(int(correct.sum()), len(correct)),
        attacks=tuple(measure(a, outcomes[a.label]) for a in planned if a.label in outcomes),
        worst_case=_worst(samples),
        not_run=() if complete else _unfinished(planned, outcomes, spec, threat),
        curves=tuple(curves),
        examples=examples(model, data, outcomes, threat) if error is None else (),
        samples=samples,
    )
    return Audit(report, outcomes, error)


def plan(spec: AuditSpec, threat: Threat, num_classes: int) -> tuple[Planned, ...]:
    """The attacks an audit will run, validated: the suite's first, then the named ones; repeated labels are numbered.

    Raises:
        SpecError: If a suite, an attack or an option is unknown, or a loss is undefined for so few classes.
        ThreatError: If an attack cannot work in this threat.
    """
    if spec.suite is not None and spec.suite not in SUITES:
        raise SpecError(
            f"a suite out of {', '.join(SUITES)}",
            got=repr(spec.suite),
            hint=suggestion(spec.suite, SUITES).strip(" ()"),
        )
    suite = spec.suite if spec.suite is not None or spec.attacks else "quick"
    wanted = [*(SUITES[suite] if suite else ()), *((choice.name, choice.options) for choice in spec.attacks)]
    planned: list[Planned] = []
    for name, options in wanted:
        entry = attacks[name]
        chosen = entry.parse(options)
        native(entry, threat)
        if "loss" in chosen:
            score(chosen["loss"], targeted=False, num_classes=num_classes)
        label = name if "loss" not in options else f"{name}-{options['loss']}"
        taken = sum(other.label.split(" ")[0] == label for other in planned)
        planned.append(Planned(f"{label} {taken + 1}" if taken else label, name, chosen))
    return tuple(planned)


def measure(attack: Planned, outcome: Verdict) -> AttackResult:
    """The figures of one attack, with their intervals."""
    right, attacked = outcome.right, outcome.attacked
    rounded = outcome.right_after_rounding
    broken = int((attacked & outcome.success).sum())
    return AttackResult(
        label=attack.label,
        name=attack.name,
        options=attack.options,
        norm=outcome.norm,
        accuracy=wilson(int(right.sum()), len(right)),
        success=wilson(broken, int(attacked.sum())) if bool(attacked.any()) else None,
        eight_bit=None if rounded is None else wilson(int(rounded.sum()), len(rounded)),
        norms=_norms(outcome) if attacks[attack.name].traits.minimum else None,
        queries=outcome.queries,
        gradients=outcome.gradients,
        seconds=outcome.seconds,
    )


def _clean(model: Classifier, data: Data, batch_size: int, notify: Notify) -> np.ndarray:
    """Whether each sample is right without an attack."""
    where = next(model.parameters(), torch.zeros(()))
    right: list[torch.Tensor] = []
    done = 0
    with frozen(model), torch.no_grad():
        for batch in data.batches(batch_size):
            right.append(model(batch.x.to(where.device, where.dtype)).argmax(1).cpu() == batch.y)
            done += len(batch.y)
            accuracy = float(torch.cat(right).double().mean())
            notify(Event(stage="clean", done=done, total=len(data), values={"accuracy": accuracy}))
    return torch.cat(right).numpy()


def _norms(outcome: Verdict) -> NormStats:
    """Sizes of the perturbations over the samples attacked; those without a find count as infinite in the median."""
    attacked = outcome.attacked
    found = attacked & outcome.found
    size = torch.where(outcome.found, outcome.own_distance, torch.inf)[attacked].numpy()
    finds = outcome.own_distance[found].numpy()
    low, high = median_interval(size) if len(size) else (np.inf, np.inf)
    return NormStats(
        norm=outcome.norm,
        found=int(found.sum()),
        n=int(attacked.sum()),
        median=_finite(np.median(size)) if len(size) else None,
        median_low=_finite(low),
        median_high=_finite(high),
        mean=float(finds.mean()) if len(finds) else None,
        quartiles=(float(np.quantile(finds, 0.25)), float(np.quantile(finds, 0.75))) if len(finds) else None,
        rho2=float(outcome.relative[found].mean()) if bool(found.any()) else None,
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _worst(samples: Samples | None) -> Rate | None:
    if samples is None or not samples.right:
        return None
    right = samples.worst_case()
    return wilson(int(right.sum()), len(right))


def _notes(correct: np.ndarray | None, num_classes: int, error: Exception | None) -> tuple[str, ...]:
    notes = [] if error is None else [f"The audit failed: {type(error).__name__}: {error}"]
    if correct is not None and correct.mean() <= 1 / num_classes:
        notes.append(
            f"The clean accuracy ({correct.mean():.1%}) is no better than chance: are the labels in the model's order, "
            "and the images scaled as in training?"
        )
    return tuple(notes)


def _unfinished(
    planned: tuple[Planned, ...], outcomes: Mapping[str, Outcome], spec: AuditSpec, threat: Threat
) -> tuple[str, ...]:
    left = [attack.label for attack in planned if attack.label not in outcomes]
    return (*left, *(["eps sweep"] if spec.sweep and threat.eps else []))
