"""Results by patient and by volume: the images of one hang together, and one that is broken may decide a diagnosis."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rempart.core.stats import bootstrap_mean, wilson
from rempart.data import Data
from rempart.report.schema import GroupAccuracy, Groups


def by_group(parts: Sequence[Data], clean: np.ndarray, worst: np.ndarray) -> tuple[Groups, ...]:
    """What the data know of groups: patients, volumes, both or nothing.

    Args:
        parts: The samples, in order.
        clean: Which of them are right without an attack.
        worst: Which are right under all attacks.
    """
    patients = [patient for part in parts for patient in part.patients or ()]
    volumes = [volume for part in parts for volume in part.volumes or ()]
    known: list[tuple[Literal["patient", "volume"], list[str]]] = [("patient", patients), ("volume", volumes)]
    return tuple(
        Groups(
            kind=kind,
            n=len(set(names)),
            most=max(Counter(names).values()),
            clean=accuracy(clean, names),
            worst=accuracy(worst, names),
        )
        for kind, names in known
        if names and len(names) == len(clean)
    )


def accuracy(right: np.ndarray, groups: Sequence[str]) -> GroupAccuracy:
    """The three figures for images that are right or not: a group is right where each of its images is."""
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    shares = np.bincount(number, weights=right) / np.bincount(number)
    return GroupAccuracy(
        whole=wilson(int((shares == 1).sum()), len(shares)),
        mean=bootstrap_mean(shares, np.arange(len(shares))),
        pooled=bootstrap_mean(right, number),
    )


def numbers(names: Sequence[str]) -> np.ndarray:
    """Groups as numbers, in the order in which they appear: what a table of samples may show."""
    first = {name: k for k, name in enumerate(dict.fromkeys(names))}
    return np.array([first[name] for name in names], dtype=np.int64)


def group_columns(data: Data) -> dict[str, np.ndarray]:
    """Patients and volumes as numbers: the table does not say who they are."""
    known = {"patient": data.patients, "volume": data.volumes}
    return {name: numbers(groups) for name, groups in known.items() if groups is not None}
