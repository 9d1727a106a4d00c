"""What becomes of each class: its accuracy, the classes it is turned into, and the attacks that aim at these."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch

from rempart.attacks import Verdict
from rempart.attacks.run import NO_CLASS
from rempart.audit.pieces import Planned
from rempart.core.errors import SpecError
from rempart.core.model import class_number
from rempart.core.registry import suggestion
from rempart.core.stats import wilson
from rempart.core.threat import Threat
from rempart.report.schema import AttackResult, ClassAccuracy, Pair

PAIRS = "pairs"
"""The label of all targeted attacks of an audit together."""
ALL_PAIRS = "all"
RESTARTS = 3
"""Random starts of the attack that aims: where a class is hard to reach, one path often misses it."""


def read_pairs(text: str, classes: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Read `all` or TRUE:TARGET,TRUE:TARGET, classes by name or number, as numbers in their order.

    Raises:
        SpecError: If a class is unknown or a pair is none.
    """
    if text.strip() == ALL_PAIRS:
        return tuple(permutations(range(len(classes)), 2))
    return tuple(sorted({_pair(part.strip(), classes) for part in text.split(",")}))


def _pair(text: str, classes: Sequence[str]) -> tuple[int, int]:
    true, colon, target = text.partition(":")
    if not colon:
        raise SpecError("--pairs as all, or as TRUE:TARGET,TRUE:TARGET", got=repr(text))
    first, second = _class(true, classes), _class(target, classes)
    if first == second:
        raise SpecError("--pairs of two different classes", got=repr(text))
    return first, second


def _class(name: str, classes: Sequence[str]) -> int:
    number = class_number(name, classes)
    if number is None:
        known = f"--pairs of the classes {', '.join(classes)}, or of their numbers"
        hint = suggestion(name, [*map(str, range(len(classes))), *classes]).strip(" ()")
        raise SpecError(known, got=repr(name), hint=hint)
    return number


def aiming_attack(num_classes: int, *, gradients: bool = True) -> tuple[str, dict[str, Any]]:
    """The attack that aims, with its options: on dlr, which found most, where there are classes enough for it."""
    if not gradients:
        return "square", {}
    return "apgd", {"loss": "dlr" if num_classes >= 4 else "margin", "restarts": RESTARTS}


def aimed(pairs: Iterable[tuple[int, int]], name: str, options: Mapping[str, Any]) -> tuple[Planned, ...]:
    """One targeted attack for each class that is aimed at, on the classes that are to become it."""
    sources: dict[int, list[int]] = {}
    for true, target in pairs:
        sources.setdefault(target, []).append(true)
    return tuple(
        Planned(f"{PAIRS} {target}", name, dict(options), target=target, sources=tuple(classes))
        for target, classes in sorted(sources.items())
    )


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


def odd(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What the attacks met that is no number: gradients, and answers, with the smallest distance of one."""
    none = torch.cat([verdict.index[verdict.undefined] for verdict in verdicts]).unique()
    distances = torch.cat([verdict.distance[verdict.undefined] for verdict in verdicts])
    return {
        "singular": sum(verdict.singular for verdict in verdicts),
        "undefined": len(none),
        "undefined_distance": float(distances.min()) if len(distances) else None,
    }
