"""Fit detectors on one part of the data, set their thresholds on another, and judge them on a third."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rempart.attacks import attacks
from rempart.attacks.plan import EOT, averaged, mean_gradient
from rempart.attacks.preflight import preflight
from rempart.attacks.run import native
from rempart.core import disk
from rempart.core.events import Notify, named, silent
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.data import Data, open_data, refuse_shared_patients
from rempart.detect.evaluate import Scored, false_alarms, scored, separations, under_evasion, with_rejection
from rempart.detect.protocol import Crafting, gather, split
from rempart.detectors.catalogue import Learning, detectors
from rempart.detectors.fitted import Fitted, calibrate, enough, fit, load
from rempart.models import load as load_model
from rempart.preprocess import defended
from rempart.report.schema import AS_IT_IS, DefenceChoice, Detection, DetectorChoice, DetectSpec, Reading, Separation

TO_CALIBRATE = 0.3
"""Share of the test images that thresholds are set on; the others judge. A model is surer of what it was trained on."""
IN_ONE = (0.5, 0.2, 0.3)
"""Shares of a data set with one split: to fit on, to set thresholds on, and to judge on."""
MOST = 1000
"""Images that thresholds are set on."""
SURROGATE = "mahalanobis"
"""Whose gradient stands in for that of a detector that has none."""


@dataclass(frozen=True, slots=True)
class Sets:
    """The images detectors are fitted, calibrated and judged on.

    Attributes:
        learning: To fit on.
        calibration: To set thresholds on.
        test: To judge on.
        n: Number of test images, those that the model gets wrong included.
        random: Whether two passes of the model over one image differ.
    """

    learning: Learning
    calibration: Learning
    test: Learning
    n: int
    random: bool = False


def crafts(spec: DetectSpec, threat: Threat, *, random: bool = False) -> dict[str, Crafting]:
    """The attacks of a request by name; one that is asked for twice is numbered.

    Where the model is `random`, attacks that can take mean gradients do, as in audits.

    Raises:
        SpecError: If an attack or an option is unknown.
        ThreatError: If an attack cannot work in this threat.
    """
    found: dict[str, Crafting] = {}
    for choice in spec.attacks:
        entry = attacks[choice.name]
        mean = mean_gradient(choice.name, choice.options) if random else {}
        options = entry.parse({**choice.options, **mean})
        own = native(entry, threat, options)
        found[_free(choice.name, found)] = Crafting(attack=choice.name, threat=own, options=options)
    return found


def means(spec: DetectSpec, *, random: bool) -> tuple[str, ...]:
    """The note on attacks that took mean gradients, where the model is random."""
    return averaged(choice.name for choice in spec.attacks if random and mean_gradient(choice.name, choice.options))


def parts(train: Data, test: Data, spec: DetectSpec) -> tuple[Data, Data, Data]:
    """What is fitted on, what thresholds are set on, and what judges: no image is in two of them.

    Raises:
        DataError: If there are too few images, or a patient lies in the train and the test split.
    """
    if train.split == test.split:
        learn, calibration, judge = split(test, IN_ONE, seed=spec.seed)
    else:
        refuse_shared_patients(train, test)
        calibration, judge = split(test, (TO_CALIBRATE, 1 - TO_CALIBRATE), seed=spec.seed)
        learn = train
    return learn.head(spec.fit_limit), calibration.head(MOST), judge.head(spec.limit)


def sets(
    model: Classifier,
    learn: Data,
    calibration: Data,
    judge: Data,
    spec: DetectSpec,
    threat: Threat,
    *,
    random: bool = False,
    notify: Notify = silent,
) -> Sets:
    """Attack what is needed.

    Raises:
        DataError: If there are too few images, those of the calibration first: they need no attack.
    """
    made = crafts(spec, threat, random=random)
    learnt = made if any(map(_learns, spec.detectors)) else {}
    further = {
        f"{name} at {budget:g}": replace(craft, threat=replace(craft.threat, eps=budget))
        for budget in spec.budgets
        for name, craft in made.items()
        if craft.threat.eps is not None
    }
    given: Any = {"seed": spec.seed, "batch_size": spec.batch_size}
    calm = gather(model, calibration, {}, notify=named("to calibrate", notify), **given)
    enough(len(calm.x), spec.fpr)
    return Sets(
        learning=gather(model, learn, learnt, noise=threat, notify=named("to learn from", notify), **given),
        calibration=calm,
        random=random,
        test=gather(model, judge, {**made, **further}, noise=threat, notify=named("to judge", notify), **given),
        n=len(judge),
    )


def _learns(choice: DetectorChoice) -> bool:
    """Whether a detector, with these options, learns from attacks."""
    entry = detectors[choice.name]
    return entry.function(**entry.parse(choice.options)).learns_attacks


def labelled(spec: DetectSpec) -> dict[str, DetectorChoice]:
    """The detectors of a request by name; one that is asked for twice is numbered."""
    found: dict[str, DetectorChoice] = {}
    for choice in spec.detectors:
        found[_free(choice.name, found)] = choice
    return found


def judged(
    label: str,
    choice: DetectorChoice,
    model: Classifier,
    on: Sets,
    spec: DetectSpec,
    threat: Threat,
    *,
    notify: Notify = silent,
) -> tuple[Fitted, Detection, Scored]:
    """Fit, calibrate and judge one detector.

    Raises:
        SpecError: If there is no such detector, or an option is wrong.
        DataError: If there are too few images.
    """
    notify, started = named(label, notify), time.perf_counter()
    fitted = fit(choice.name, choice.options, model, on.learning, seed=spec.seed)
    found = scored(fitted, on.calibration, on.test, batch_size=spec.batch_size)
    fitted = calibrate(fitted, found.calibration, spec.fpr)
    held = with_rejection(fitted, found, on.test, on.n, threat)
    evaded = None
    if spec.adaptive:
        surrogate = None if fitted.detector.differentiable else fit(SURROGATE, {}, model, on.learning, seed=spec.seed)
        adaptive, evaded = under_evasion(
            *(fitted, found, on.test, on.n, threat),
            surrogate=surrogate,
            steps=spec.steps,
            passes=EOT if on.random else 1,
            batch_size=spec.batch_size,
            notify=notify,
        )
        held = (*held[:2], adaptive, *held[2:])
    assert fitted.card.threshold is not None
    detection = Detection(
        label=label,
        detector=choice.name,
        options=fitted.card.options,
        learnt=fitted.card.attacks,
        fitted_on=fitted.card.fitted_on,
        calibrated_on=fitted.card.threshold.n,
        threshold=fitted.card.threshold.value,
        fpr=spec.fpr,
        false_alarms=false_alarms(found, spec.fpr),
        separations=separations(found, fitted.card.attacks),
        left_out=tuple(_left_out(choice, fitted, model, on, spec)),
        held=held,
        evaded=evaded,
        kinds=fitted.kinds,
        confusion=_confusion(fitted, on.test, spec.batch_size) if fitted.detector.name is not None else {},
        seconds=time.perf_counter() - started,
    )
    return fitted, detection, found


def _left_out(
    choice: DetectorChoice, fitted: Fitted, model: Classifier, on: Sets, spec: DetectSpec
) -> Iterator[Separation]:
    """For each attack, how a detector tells it that learnt from the others alone."""
    for name in fitted.card.attacks:
        others = {key: made for key, made in on.learning.attacked.items() if key != name}
        if not any(len(at) for at, _ in others.values()) or name not in on.test.attacked:
            continue
        again = fit(choice.name, choice.options, model, replace(on.learning, attacked=others), seed=spec.seed)
        alone = replace(on.test, attacked={name: on.test.attacked[name]})
        yield from separations(scored(again, on.calibration, alone, batch_size=spec.batch_size), tuple(others))


def _confusion(fitted: Fitted, test: Learning, batch_size: int) -> dict[str, tuple[int, ...]]:
    """How often each kind is named, for clean images and for those of each attack."""
    rows = {"clean": (torch.arange(len(test.x)), test.x), **test.attacked}
    table: dict[str, tuple[int, ...]] = {}
    for name, (at, x) in rows.items():
        counts = torch.zeros(len(fitted.kinds), dtype=torch.int64)
        for part, index in zip(x.split(batch_size), test.index[at].split(batch_size), strict=True):
            if len(part):
                counts += torch.bincount(fitted.named(part, index).argmax(1), minlength=len(counts))
        table[name] = tuple(counts.tolist())
    return table


def _free(name: str, taken: Mapping[str, Any]) -> str:
    return name if name not in taken else f"{name} {sum(key.split()[0] == name for key in taken) + 1}"


def score_data(
    folder: Path,
    model: str,
    source: str,
    out: Path,
    *,
    reading: Reading = AS_IT_IS,
    defences: Sequence[DefenceChoice] = (),
    limit: int | None = None,
    batch_size: int = 64,
) -> tuple[int, int]:
    """Write a CSV of scores and verdicts; return how many images were scored, and how many flagged.

    The model is read as `preflight` reads it, as where the detector was fitted: outputs that are no logits are mended.
    """
    disk.refuse_folder(out)
    chain = [(defence.name, defence.options) for defence in defences]
    classifier = defended(load_model(model, reading), chain)
    fitted = load(folder, classifier)
    data = open_data(source).seen_by(classifier)
    fitted = replace(fitted, model=preflight(classifier, data)[0])
    data = data.head(limit)
    lines = ["index,score,threshold,flagged"]
    flagged = 0
    with torch.no_grad():
        for batch in data.batches(batch_size):
            scores = fitted.score(batch.x, batch.index)
            flags = fitted.flags(scores)
            flagged += int(flags.sum())
            rows = zip(batch.index.tolist(), scores.tolist(), flags.tolist(), strict=True)
            assert fitted.card.threshold is not None  # `flags` raises without one
            limit_told = repr(fitted.card.threshold.value)
            lines += [f"{index},{value!r},{limit_told},{int(flag)}" for index, value, flag in rows]
    disk.replace(out, ("\n".join(lines) + "\n").encode())
    return len(data), flagged
