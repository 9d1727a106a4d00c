"""What becomes of each class: its accuracy, the classes it is turned into, and the line of the attacks that aim."""

from collections.abc import Iterable, Sequence

import numpy as np

from rempart.attacks import Verdict
from rempart.attacks.plan import PAIRS, Planned
from rempart.attacks.result import odd
from rempart.attacks.run import NO_CLASS
from rempart.core.stats import wilson
from rempart.core.threat import Threat
from rempart.report.schema import AttackResult, ClassAccuracy, Pair


def by_class(labels: np.ndarray, clean: np.ndarray, worst: np.ndarray) -> tuple[ClassAccuracy, ...]:
    """Accuracy of each true class, without an attack and under all of them."""
    return tuple(
        ClassAccuracy(
            label=k,
            clean=wilson(int(clean[labels == k].sum()), n),
            worst=wilson(int(worst[labels == k].sum()), n),
        )
        for k, n in enumerate(np.bincount(labels).tolist())
        if n
    )


def reached(index: np.ndarray, verdicts: Iterable[Verdict], num_classes: int) -> np.ndarray:
    """For each sample number and class, whether some attack turned the sample into the class within the threat.

    Samples that were wrong at first were given to no attack, and reach the class they were given. Where an attack left
    the model without an answer, no class was reached.
    """
    found = np.zeros((len(index), num_classes), dtype=bool)
    order = np.argsort(index)
    for verdict in verdicts:
        hit = verdict.broken & (verdict.predicted != NO_CLASS)
        at = order[np.searchsorted(index[order], verdict.index[hit].numpy())]
        found[at, verdict.predicted[hit].numpy()] = True
    return found


def turned(
    pairs: Iterable[tuple[int, int]], labels: np.ndarray, clean: np.ndarray, found: np.ndarray
) -> Iterable[Pair]:
    """The cells of the matrix; a class of which no image is right at first has none."""
    for true, target in pairs:
        images = clean & (labels == true)
        if images.any():
            yield Pair(label=true, target=target, turned=wilson(int(found[images, target].sum()), int(images.sum())))


def row(
    attacks: Sequence[Planned],
    verdicts: Sequence[Verdict],
    threat: Threat,
    index: np.ndarray,
    clean: np.ndarray,
    right: np.ndarray,
    rounded: np.ndarray | None,
) -> AttackResult:
    """All targeted attacks as one line of the table of attacks, image by image."""
    given = clean & np.isin(index, [number for verdict in verdicts for number in verdict.index.tolist()])
    n = int(given.sum())
    return AttackResult(
        label=PAIRS,
        name=attacks[0].name,
        options=attacks[0].options,
        norm=threat.norm,
        accuracy=wilson(int(right.sum()), len(right)),
        success=wilson(int((given & ~right).sum()), n) if n else None,
        eight_bit=None if rounded is None else wilson(int(rounded.sum()), len(rounded)),
        tried=n,
        queries=sum(verdict.queries for verdict in verdicts),
        gradients=sum(verdict.gradients for verdict in verdicts),
        seconds=sum(verdict.seconds for verdict in verdicts),
        **odd(verdicts),
    )
