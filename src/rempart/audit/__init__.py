"""The audit: how easily a classifier falls, with what was checked and what was not tried."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rempart.attacks import Verdict, attacks
from rempart.attacks.plan import EOT, PAIRS, Planned, averaged, mean_gradient, plan
from rempart.attacks.preflight import above_chance, is_random, preflight
from rempart.attacks.result import measure, odd
from rempart.attacks.run import allowed, join
from rempart.audit import pieces
from rempart.audit.checks import Diagnosis, diagnose, stamp
from rempart.audit.classes import by_class, reached, row, turned
from rempart.audit.curves import from_distances, sweep
from rempart.audit.examples import examples
from rempart.audit.pieces import Pieces, attack_chunk, chunks, kept_in, stored
from rempart.audit.risk import read_costs, risk
from rempart.core.errors import Cancelled, SpecError
from rempart.core.events import Notify, named, silent
from rempart.core.foreign import contained
from rempart.core.model import Classifier, blind
from rempart.core.ranks import ALONE, Ranks
from rempart.core.repro import environment, seeded
from rempart.core.stats import Rate, wilson
from rempart.core.threat import Threat
from rempart.core.types import Mask
from rempart.data import Data
from rempart.report.groups import by_group, numbers
from rempart.report.schema import (
    AttackResult,
    AuditSpec,
    Curve,
    DataCard,
    ModelCard,
    Report,
    Samples,
    pack,
)

CHECKS = "checks"
"""The label of what probes and remedies broke."""
_MASKED = (
    "The adversary changed pixels inside the masks of the images only. The checks after the attacks were left out: "
    "they know no masks."
)
_THOROUGH = ("standard", "plus")
"""Suites whose checks include those that cost as much as an attack."""


__all__ = ["EOT", "Audit", "Planned", "audit", "averaged", "by_group", "is_random", "mean_gradient", "measure"]
__all__ += ["numbers", "plan", "preflight"]


@dataclass(frozen=True, slots=True)
class Audit:
    """An audit: the report, each attack's verdicts, and the error that ended it, if one did."""

    report: Report
    verdicts: Mapping[str, Verdict]
    error: Exception | None = None


@contained("model, attacks and target rules to run", SpecError)
@torch.inference_mode(mode=False)
def audit(
    model: Classifier,
    data: Data,
    spec: AuditSpec,
    *,
    card: ModelCard,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
    notify: Notify = silent,
) -> Audit | None:
    """Run every planned attack on every sample and report the worst case of each.

    The samples are worked off in chunks of `spec.chunk`. An interruption (Ctrl-C, or `Cancelled` from `notify`) or an
    error once attacks run ends the audit with the chunks that were finished (in the first chunk: with the attacks that
    were), marked incomplete; the error stands in the result, for the caller to raise.

    Args:
        model: The classifier; it is left as it was.
        data: The samples, already cut to `spec.limit`.
        spec: Threat, attacks, seed; recorded in the report.
        card: Describes the model.
        folder: Where finished pieces are kept, for the caller to remove once the report is safe. An audit that was
            stopped, by whatever, is taken up from there by the same call.
        ranks: The processes that share the chunks.
        notify: Receives progress.

    Returns:
        The audit, in the first process; None in the others.

    Raises:
        SpecError: If threat, suite, an attack or an option is wrong; before anything runs.
        DataError: If the data do not fit the model.
        ModelError: If the model's outputs cannot be attacked.
    """
    started = time.perf_counter()
    threat = data.threat(spec.threat, model.low, model.high)
    sighted = blind(model) is None
    known: dict[str, Any] = {"classes": model.class_names, "gradients": sighted}
    planned, notes = plan(spec, threat, model.num_classes, **known)
    for attack in planned:
        allowed(attacks[attack.name], model)
    if spec.window is not None and not spec.window[0] < spec.window[1]:
        raise SpecError("--window as LOW:HIGH with LOW < HIGH", got=f"{spec.window[0]:g}:{spec.window[1]:g}")
    costs = None if spec.costs is None else read_costs(spec.costs, model.class_names)
    device = next(model.parameters(), torch.zeros(())).device
    with seeded(spec.seed, device):
        model, checks = preflight(model, data)
    random = is_random(checks)
    if random:
        planned, notes = plan(spec, threat, model.num_classes, random=True, **known)
    swept = bool(spec.sweep and threat.eps and sighted)
    described, record = DataCard.of(data), environment()
    if folder is not None:
        folder = kept_in(folder, model, data, planned, threat, spec, record)
    parts = chunks(data, spec.chunk)
    done = stored(folder)
    curves: list[Curve] = []
    diagnosis = Diagnosis((), {})
    error: Exception | None = None
    complete = False
    try:
        for number in range(ranks.number, len(parts), ranks.world):
            attack_chunk(model, parts[number], number, planned, threat, spec, done, folder, notify, random=random)
        mine = [pieces.pack(*place, piece) for place, piece in done.items()] if ranks.world > 1 else []
        everything = ranks.gather(mine)
        if everything is None:
            return None
        for content in everything:
            done |= pieces.unpack(content)
        with seeded(spec.seed, device):
            if swept:
                told = named("eps sweep", notify)
                eot = EOT if random else 1
                curves.append(
                    sweep(model, data, threat, eot=eot, batch_size=spec.batch_size, seed=spec.seed, notify=told)
                )
            joined = {a.label: _joined(done, range(len(parts)), a.label) for a in planned}
            if data.mask is None:
                diagnosis = diagnose(
                    model,
                    data,
                    threat,
                    {label: verdict for label, verdict in joined.items() if verdict is not None},
                    thorough=spec.suite in _THOROUGH,
                    random=random,
                    batch_size=spec.batch_size,
                    seed=spec.seed,
                    notify=notify,
                )
        complete = True
    except (KeyboardInterrupt, Cancelled):
        if ranks.number:
            raise  # the report of the first process says what is missing
    except Exception as failure:  # the caller raises it again, once what was finished is safe
        if ranks.number:
            raise
        error = failure
    if not complete:
        done |= stored(folder)  # what the other processes have finished
    finished, labels = _finished(done, parts, planned)
    verdicts = {label: _joined(done, finished, label) for label in labels}
    ran = [attack for attack in planned if attack.label in labels]
    aiming = [attack for attack in ran if attack.target is not None]
    whole = [(number, parts[number]) for number in finished]
    right = _together(_rows(ran, done, whole, lambda verdict: verdict.right), aiming)
    rounded = _rows(ran, done, whole, lambda verdict: verdict.right_after_rounding) if spec.eight_bit else {}
    rounded = _together(rounded, aiming)
    ran = [attack for attack in ran if attack.target is None]
    first = verdicts[ran[0].label] if ran else None
    correct = first.correct.numpy() if first is not None else np.empty(0, dtype=bool)
    samples = Samples(
        index=tuple(number for _, part in whole for number in part.index.tolist()),
        labels=tuple(label for _, part in whole for label in part.labels.tolist()),
        clean=pack(correct),
        right={label: pack(row) for label, row in right.items()},
    )
    checked, more = _checked(diagnosis, threat, samples)
    samples = samples.model_copy(update={"right": {**samples.right, **{label: pack(r) for label, r in more.items()}}})
    index, true = np.array(samples.index, dtype=np.int64), np.array(samples.labels, dtype=np.int64)
    aims = [verdict for a in aiming if (verdict := verdicts[a.label]) is not None]
    every = [verdict for verdict in (*verdicts.values(), *diagnosis.outcomes.values()) if verdict is not None]
    found = reached(index, every, model.num_classes)
    people = [patient for _, part in whole for patient in part.patients or ()]
    patients = people if len(people) == len(index) else None
    asked = sorted((source, a.target) for a in aiming for source in a.sources if a.target is not None)
    curves = [
        *(from_distances(a.label, verdict, threat) for a in ran if (verdict := _whole_curve(a, verdicts, threat))),
        *curves,
    ]
    without = true if first is None else np.where(correct, true, first.predicted.numpy())
    accuracy = () if first is None else (above_chance(true, without, model.class_names),)
    after = (*accuracy, *diagnosis.checks)
    looked = any(check.status != "skipped" for check in diagnosis.checks) or stamp(accuracy) != "valid"
    report = Report(
        kind="audit",
        complete=complete,
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        environment=record | ({"processes": str(ranks.world)} if ranks.world > 1 else {}),
        model=card,
        data=described,
        notes=(*notes, *((_MASKED,) if data.mask else ()), *_notes(error)),
        preflight=checks,
        clean=wilson(int(correct.sum()), len(correct)) if len(correct) else None,
        attacks=(
            *(measure(a, threat, verdicts[a.label], right[a.label], rounded=rounded.get(a.label)) for a in ran),
            *([row(aiming, aims, threat, index, correct, right[PAIRS], rounded.get(PAIRS))] if aiming else []),
            *checked,
        ),
        checks=after,
        stamp=stamp((*checks, *after)) if complete and looked else None,
        worst_case=_worst(samples),
        classes=by_class(true, correct, samples.worst_case()) if ran else (),
        pairs=tuple(turned(asked, true, correct, found)),
        risk=None if costs is None or first is None else risk(costs, true, without, found, patients, seed=spec.seed),
        not_run=() if complete else _unfinished(planned, labels, finished, parts, swept=bool(curves) or not swept),
        curves=tuple(curves),
        examples=examples(
            model, data, [(a.label, done[n, a.label]) for a in ran for n in finished], threat, spec.window
        )
        if error is None
        else (),
        samples=samples if ran else None,
        groups=by_group([part for _, part in whole], correct, samples.worst_case()) if ran else (),
    )
    return Audit(report, {label: verdict for label, verdict in verdicts.items() if verdict is not None}, error)


def _finished(done: Pieces, parts: Sequence[Data], planned: Sequence[Planned]) -> tuple[list[int], list[str]]:
    """Chunks and attacks to report on: every chunk that went through all attacks, else the one that got furthest."""
    through = {n: [a.label for a in planned if (n, a.label) in done] for n in range(len(parts))}
    whole = [n for n, labels in through.items() if len(labels) == len(planned)]
    if whole:
        return whole, [a.label for a in planned]
    furthest = max(through, key=lambda n: len(through[n]))
    return ([furthest], through[furthest]) if through[furthest] else ([], [])


def _joined(done: Pieces, finished: Sequence[int], label: str) -> Verdict | None:
    verdicts = [v for number in finished if (v := done[number, label].verdict) is not None]
    return join(verdicts) if verdicts else None


def _rows(
    ran: Sequence[Planned], done: Pieces, parts: Iterable[tuple[int, Data]], right: Callable[[Verdict], Mask | None]
) -> dict[str, np.ndarray]:
    """For each attack, which samples are right after it, where `right` says so of those it was given.

    In a cascade a sample is right after an attack if it was right after all before it, too. Rounded to 8 bit those
    rows are upper bounds: an image broken by one attack is not given to the next, which might have broken it in a way
    that survives.
    """
    rows: dict[str, list[np.ndarray]] = {attack.label: [] for attack in ran}
    for number, part in parts:
        standing = np.ones(len(part), dtype=bool)
        for attack in ran:
            verdict = done[number, attack.label].verdict
            row = standing.copy() if attack.survivors else np.ones(len(part), dtype=bool)
            if verdict is not None and (left := right(verdict)) is not None:
                row[np.isin(part.index, verdict.index)] &= left.numpy()
            rows[attack.label].append(row)
            standing &= row
    return {label: np.concatenate(row) for label, row in rows.items() if row}


def _together(rows: dict[str, np.ndarray], aiming: Sequence[Planned]) -> dict[str, np.ndarray]:
    """The rows of all targeted attacks as one: right where none of them broke the sample."""
    rows = dict(rows)
    if parts := [rows.pop(attack.label) for attack in aiming if attack.label in rows]:
        rows[PAIRS] = np.logical_and.reduce(parts)
    return rows


def _checked(
    diagnosis: Diagnosis, threat: Threat, samples: Samples
) -> tuple[tuple[AttackResult, ...], dict[str, np.ndarray]]:
    """What probes and remedies of all checks broke, as one line of the table and one row of the samples."""
    tried = [verdict for verdict in diagnosis.outcomes.values() if len(verdict.index)]
    if not tried:
        return (), {}
    index, before = np.array(samples.index), samples.worst_case()
    broken = before & np.isin(index, torch.cat([verdict.index[verdict.broken] for verdict in tried]).numpy())
    given = int((before & np.isin(index, torch.cat([verdict.index for verdict in tried]).numpy())).sum())
    right = before & ~broken
    result = AttackResult(
        label=CHECKS,
        name=CHECKS,
        options={},
        norm=threat.norm,
        accuracy=wilson(int(right.sum()), len(right)),
        success=wilson(int(broken.sum()), given) if given else None,
        survivors=True,
        tried=given,
        queries=sum(verdict.queries for verdict in tried),
        gradients=sum(verdict.gradients for verdict in tried),
        seconds=sum(verdict.seconds for verdict in tried),
        **odd(tried),
    )
    return (result,), {CHECKS: right}


def _whole_curve(attack: Planned, verdicts: Mapping[str, Verdict | None], threat: Threat) -> Verdict | None:
    """The verdict of a minimum-norm attack in the norm of the threat that ran on every sample."""
    verdict = verdicts[attack.label]
    fits = attacks[attack.name].traits.minimum and not attack.survivors
    return verdict if verdict is not None and fits and verdict.norm == threat.norm else None


def _worst(samples: Samples) -> Rate | None:
    if not samples.right:
        return None
    right = samples.worst_case()
    return wilson(int(right.sum()), len(right))


def _notes(error: Exception | None) -> tuple[str, ...]:
    return () if error is None else (f"The audit failed: {type(error).__name__}: {error}",)


def _unfinished(
    planned: Sequence[Planned], labels: Sequence[str], finished: Sequence[int], parts: Sequence[Data], *, swept: bool
) -> tuple[str, ...]:
    left = [PAIRS if a.target is not None else a.label for a in planned if a.label not in labels]
    left = list(dict.fromkeys(left))
    missing = len(parts) - len(finished)
    if missing and finished:
        samples = sum(len(part) for number, part in enumerate(parts) if number not in finished)
        left.append(f"{samples} of {sum(map(len, parts))} samples")
    return (*left, *([] if swept else ["eps sweep"]), CHECKS)
