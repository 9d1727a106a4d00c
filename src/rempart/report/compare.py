"""Models side by side on the same samples, and the gate of a pipeline."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from rempart.core.errors import SpecError
from rempart.core.stats import Difference, Rate, paired_bootstrap, wilson
from rempart.report.schema import AuditSpec, Report, Strict, TrainSpec, same_samples, unpack

CLEAN = "clean"
WORST = "worst case"


class Entry(Strict):
    """One report in a comparison.

    Attributes:
        name: What the caller calls it.
        title: Model and data.
        complete: False where the audit was interrupted.
        accuracy: `clean`, each attack's label and `worst case`, as far as they were measured.
    """

    name: str
    title: str
    complete: bool
    accuracy: dict[str, Rate]


class Contrast(Strict):
    """Accuracy of a report minus that of the first, sample by sample; positive where it is better than the first."""

    name: str
    measure: str
    difference: Difference


class Comparison(Strict):
    """Reports side by side.

    Attributes:
        n: Number of samples, the same in all.
        confidence: Coverage of every interval, each taken alone.
        entries: One per report, in the order given.
        measures: What at least one report measured, in order: `clean`, attack labels, `worst case`.
        contrasts: Differences to the first report.
        notes: What a reader must know before the figures.
    """

    n: int
    confidence: float
    entries: tuple[Entry, ...]
    measures: tuple[str, ...]
    contrasts: tuple[Contrast, ...]
    notes: tuple[str, ...] = ()

    def contrast(self, name: str, measure: str) -> Difference | None:
        """The difference of one report to the first, where there is one."""
        found = (c.difference for c in self.contrasts if (c.name, c.measure) == (name, measure))
        return next(found, None)


def compare(reports: Mapping[str, Report], *, confidence: float = 0.95) -> Comparison:
    """Put reports on the same samples side by side, with paired differences to the first.

    An attack is compared where both ran it under the same label with the same options. The intervals of the
    differences are paired bootstrap intervals and not corrected for the number of comparisons.

    Args:
        reports: Two or more, by the names they shall have in tables.
        confidence: Coverage of the intervals.

    Raises:
        SpecError: If there are fewer than two reports.
        DataError: If a report has no results per sample, or they are not on the same samples.
    """
    if len(reports) < 2:
        raise SpecError("two or more reports to compare", got=len(reports))
    samples = same_samples(reports)
    first = next(iter(reports.values()))
    entries = tuple(_entry(name, report, confidence) for name, report in reports.items())
    seen = dict.fromkeys(measure for entry in entries for measure in entry.accuracy)
    labels = [measure for measure in seen if measure not in (CLEAN, WORST)]
    contrasts = tuple(
        Contrast(name=name, measure=measure, difference=paired_bootstrap(ours, theirs, confidence=confidence))
        for name, report in list(reports.items())[1:]
        for measure, ours, theirs in _pairs(report, first)
    )
    return Comparison(
        n=len(samples.index),
        confidence=confidence,
        entries=entries,
        measures=tuple(measure for measure in (CLEAN, *labels, WORST) if measure in seen),
        contrasts=contrasts,
        notes=tuple(_notes(reports)),
    )


def compare_html(comparison: Comparison, reports: Mapping[str, Report], detected: Sequence[Report] = ()) -> str:
    """A comparison as one self-contained HTML page, with the curves the reports share.

    Args:
        comparison: Of the audits.
        reports: The audits, by name.
        detected: Judged detectors, whose tables follow: they are about test images of their own.
    """
    from rempart.report.html import compare_page  # loads matplotlib, which the gate of a pipeline does not need

    return compare_page(comparison, reports, detected)


def named(reports: Sequence[Report]) -> dict[str, Report]:
    """Give reports short names that differ.

    The last part of the model's source, with its defences where that helps; else the whole source, or a number.
    """

    def short(report: Report) -> str:
        return PurePath(report.model.source).name or report.model.name

    for name in (short, lambda r: f"{short(r)}{r.behind}", lambda r: r.model.source):
        names = [name(report) for report in reports]
        if len(set(names)) == len(names):
            return dict(zip(names, reports, strict=True))
    return {f"{i} {report.model.source}": report for i, report in enumerate(reports, 1)}


def gate(report: Report, min_robust: float) -> tuple[bool, str]:
    """Decide whether a pipeline may go on, and say why in a sentence.

    It may only where a complete audit with at least one attack leaves the lower end of the worst-case interval at
    `min_robust` or above, and no check failed or warned. Anything unfinished does not pass.

    Args:
        report: The report of an audit.
        min_robust: Share of all samples, in [0, 1].

    Raises:
        SpecError: If `min_robust` is no share.
    """
    if not 0 <= min_robust <= 1:
        hint = f"did you mean {min_robust / 100:g}?" if 1 < min_robust <= 100 else ""
        raise SpecError("a smallest accuracy in [0, 1]", got=min_robust, hint=hint)
    if report.kind != "audit":
        return False, f"this is a report of kind {report.kind}; only an audit can pass."
    if not report.complete:
        missing = f"; not run: {', '.join(report.not_run)}" if report.not_run else ""
        return False, f"the audit was interrupted, and an incomplete audit never passes{missing}."
    if fired := report.fired:
        return False, f"the figures may be too high: see the checks ({', '.join(fired)})."
    worst = report.worst_case
    if not report.attacks or worst is None:
        return False, "no attack was run."
    interval = f"{100 * worst.confidence:g}% interval [{worst.low:.2%}, {worst.high:.2%}] of the worst case"
    if worst.low < min_robust:
        return False, f"the {interval} begins below {min_robust:.2%}."
    return True, f"against the attacks run here, the {interval} begins at {min_robust:.2%} or above."


def _entry(name: str, report: Report, confidence: float) -> Entry:
    rates = {
        CLEAN: report.clean,
        **{attack.label: attack.accuracy for attack in report.attacks},
        WORST: report.worst_case,
    }
    accuracy = {
        measure: rate if rate.confidence == confidence else wilson(rate.k, rate.n, confidence)
        for measure, rate in rates.items()
        if rate is not None
    }
    return Entry(name=name, title=report.title, complete=report.complete, accuracy=accuracy)


def _pairs(report: Report, first: Report) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The measures that both reports have, with the results per sample of each."""
    ours, theirs = report.samples, first.samples
    assert ours is not None and theirs is not None  # same_samples saw to it
    yield CLEAN, unpack(ours.clean), unpack(theirs.clean)
    known = _options(first)
    for label, options in _options(report).items():
        if known.get(label) == options and label in ours.right and label in theirs.right:
            yield label, unpack(ours.right[label]), unpack(theirs.right[label])
    if report.worst_case is not None and first.worst_case is not None:
        yield WORST, ours.worst_case(), theirs.worst_case()


def _options(report: Report) -> dict[str, tuple[str, dict[str, Any]]]:
    return {attack.label: (attack.name, attack.options) for attack in report.attacks}


def _notes(reports: Mapping[str, Report]) -> Iterator[str]:
    partial = [name for name, report in reports.items() if not report.complete]
    if partial:
        yield f"Interrupted, so that attacks may be missing: {', '.join(partial)}."
    for name, report in reports.items():
        if report.stamp in ("suspicious", "invalid"):
            yield f"The figures of {name} are {report.stamp} ({', '.join(report.fired)}): read its checks first."
    threats = {name: report.spec.threat for name, report in reports.items() if not isinstance(report.spec, TrainSpec)}
    if len(set(threats.values())) > 1:
        told = ", ".join(f"{name} {threat}" for name, threat in threats.items())
        yield f"The reports are about different threats ({told}): their figures under attack do not compare."
    if len({str(sorted(_options(report).items(), key=str)) for report in reports.values()}) > 1:
        yield (
            "Not every report ran the same attacks with the same options: the worst case of the one that ran fewer or "
            "weaker attacks looks better than it is."
        )
    rounded = {report.spec.eight_bit for report in reports.values() if isinstance(report.spec, AuditSpec)}
    if len(rounded) > 1:
        yield "Only some of the audits judged images rounded to 8 bit."
