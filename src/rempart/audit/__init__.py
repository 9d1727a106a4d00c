"""The audit: how easily a classifier falls, with what was checked and what was not tried."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from rempart.attacks import SUITES, Outcome, attack_data, attacks
from rempart.attacks.run import native
from rempart.audit.curves import from_distances, sweep
from rempart.audit.examples import examples
from rempart.audit.preflight import preflight
from rempart.core.data import Data
from rempart.core.errors import Cancelled, SpecError
from rempart.core.events import Event, Notify, silent
from rempart.core.model import Classifier, frozen
from rempart.core.registry import suggestion
from rempart.core.repro import environment
from rempart.core.stats import Rate, median_interval, wilson
from rempart.core.threat import Threat
from rempart.report.schema import (
    AttackResult,
    AuditSpec,
    Check,
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
    """A finished or interrupted audit: the report, and each attack's outcome with its images."""

    report: Report
    outcomes: Mapping[str, Outcome]


def audit(model: Classifier, data: Data, spec: AuditSpec, *, card: ModelCard, notify: Notify = silent) -> Audit:
    """Run every planned attack on every sample and report the worst case of each.

    An interruption (Ctrl-C, or `Cancelled` from `notify`) ends the audit with what was finished, marked incomplete.

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
    planned = plan(spec, threat)
    model, checks = preflight(model, data)
    outcomes: dict[str, Outcome] = {}
    curves: list[Curve] = []
    correct: np.ndarray | None = None
    complete = False
    try:
        correct = _clean(model, data, spec.batch_size, notify)
        for attack in planned:
            outcomes[attack.label] = attack_data(
                model,
                data,
                threat,
                attack.name,
                attack.options,
                batch_size=spec.batch_size,
                seed=spec.seed,
                eight_bit=spec.eight_bit,
                notify=notify,
            )
        curves += [
            from_distances(attack.label, outcomes[attack.label], threat)
            for attack in planned
            if attacks[attack.name].traits.minimum and outcomes[attack.label].norm == threat.norm
        ]
        if spec.sweep and threat.eps:
            curves.append(sweep(model, data, threat, batch_size=spec.batch_size, seed=spec.seed, notify=notify))
        complete = True
    except (KeyboardInterrupt, Cancelled):
        pass  # the report says what is missing
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
        data=DataCard.of(data),
        notes=_notes(correct, checks, data.num_classes),
        preflight=checks,
        clean=None if correct is None else wilson(int(correct.sum()), len(correct)),
        attacks=tuple(measure(a, outcomes[a.label], data) for a in planned if a.label in outcomes),
        worst_case=_worst(samples),
        not_run=_unfinished(planned, outcomes, spec, complete),
        curves=tuple(curves),
        examples=examples(model, data, outcomes, threat),
        samples=samples,
    )
    return Audit(report, outcomes)


def plan(spec: AuditSpec, threat: Threat) -> tuple[Planned, ...]:
    """The attacks an audit will run, validated: the suite's first, then the named ones; repeated labels are numbered.

    Raises:
        SpecError: If a suite, an attack or an option is unknown, or nothing is left to run.
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
        if (
            suite
            and (name, options) in SUITES[suite]
            and not entry.traits.minimum
            and threat.norm not in entry.traits.norms
        ):
            continue
        native(entry, threat)
        label = name if "loss" not in options else f"{name}-{options['loss']}"
        taken = sum(other.label.split(" ")[0] == label for other in planned)
        planned.append(Planned(f"{label} {taken + 1}" if taken else label, name, entry.parse(options)))
    return tuple(planned)


def measure(attack: Planned, outcome: Outcome, data: Data) -> AttackResult:
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
        norms=_norms(outcome, data) if attacks[attack.name].traits.minimum else None,
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


def _norms(outcome: Outcome, data: Data) -> NormStats:
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
        rho2=_rho2(outcome, data, found),
    )


def _rho2(outcome: Outcome, data: Data, found: torch.Tensor) -> float | None:
    """Mean over the finds of |perturbation|_2 / |image|_2."""
    total, count, at = 0.0, 0, 0
    for batch in data.batches(256):
        here = found[at : at + len(batch.y)]
        x, z = batch.x[here].double().flatten(1), outcome.x_adv[at : at + len(batch.y)][here].double().flatten(1)
        total += float(((z - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)).sum())
        count, at = count + int(here.sum()), at + len(batch.y)
    return total / count if count else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _worst(samples: Samples | None) -> Rate | None:
    if samples is None or not samples.right:
        return None
    right = samples.worst_case()
    return wilson(int(right.sum()), len(right))


def _notes(correct: np.ndarray | None, checks: tuple[Check, ...], num_classes: int) -> tuple[str, ...]:
    notes = [check.message for check in checks if check.status in ("repaired", "warned")]
    if correct is not None and correct.mean() <= 1 / num_classes:
        notes.append(
            f"The clean accuracy ({correct.mean():.1%}) is no better than chance: are the labels in the model's order, "
            "and the images scaled as in training?"
        )
    return tuple(notes)


def _unfinished(
    planned: tuple[Planned, ...], outcomes: Mapping[str, Outcome], spec: AuditSpec, complete: bool
) -> tuple[str, ...]:
    left = [attack.label for attack in planned if attack.label not in outcomes]
    return () if complete else (*left, *(["eps sweep"] if spec.sweep else []))
