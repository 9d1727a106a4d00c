"""What mistakes cost: a table of the costs of taking one class for another, and the mean cost under attack."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rempart.core.errors import SpecError
from rempart.core.names import find
from rempart.core.stats import bootstrap_mean
from rempart.report.schema import Risk

LARGEST = 2**24
"""Bytes of a table of costs."""
_HINT = "the first line names the predicted classes, each other line a true class and its costs"


def read_costs(path: str | Path, classes: Sequence[str]) -> np.ndarray:
    """Read a CSV table: a row for each true class, a column for each predicted one, by name, in any order.

    Returns:
        Shape (K, K), rows and columns in the order of `classes`.

    Raises:
        SpecError: If the file cannot be read, its classes are not those of the model, or a cost is not a number >= 0.
    """
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST:
            raise SpecError(f"a table of costs of at most {LARGEST:,} bytes", got=f"{path.name}, which is larger")
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file) if any(map(str.strip, line))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SpecError("a CSV table of costs", got=f"{path}: {error}", hint=_HINT) from None
    if not lines:
        raise SpecError("a CSV table of costs", got=f"{path.name}, which is empty", hint=_HINT)
    header, *rows = lines
    columns = _numbers(header[1:], classes, "columns", path)
    places = _numbers([line[0] for line in rows], classes, "rows", path)
    costs = np.empty((len(classes), len(classes)))
    for place, (true, *cells) in zip(places, rows, strict=True):
        if len(cells) != len(classes):
            raise SpecError(f"{len(classes)} costs in the row {true!r} of {path.name}", got=len(cells))
        for column, predicted, cell in zip(columns, header[1:], cells, strict=True):
            costs[place, column] = _cost(cell, f"{true!r} taken for {predicted!r}")
    return costs


def _numbers(found: Sequence[str], classes: Sequence[str], what: str, path: Path) -> list[int]:
    """The classes of the rows or columns: each one once."""
    numbers = [find(name, classes) for name in found]
    known = [number for number in numbers if number is not None]
    if len(known) < len(found) or sorted(known) != list(range(len(classes))):
        wrong = [f"{name!r} missing" for k, name in enumerate(classes) if k not in numbers]
        wrong += [f"{name!r} unknown" for name, number in zip(found, numbers, strict=True) if number is None]
        wrong = wrong or [f"{name!r} more than once" for k, name in enumerate(classes) if numbers.count(k) > 1]
        expected = f"the model's classes, {', '.join(classes)}, as the {what} of {path.name}"
        raise SpecError(expected, got=", ".join(wrong[:8]), hint=_HINT)
    return known


def _cost(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise SpecError(f"a cost >= 0 for {what}", got=repr(text))
    return value


def risk(
    costs: np.ndarray,
    labels: np.ndarray,
    predicted: np.ndarray,
    found: np.ndarray,
    patients: Sequence[str] | None = None,
    *,
    seed: int = 0,
) -> Risk:
    """Mean cost of an image without an attack, and with the dearest class that some attack reached.

    An adversary may also leave an image as it is, so that no image costs less under attack.

    Args:
        costs: Shape (K, K), true class by predicted class.
        labels: True classes, shape (n).
        predicted: Classes given to the originals, shape (n).
        found: Classes that attacks reached, shape (n, K); see `classes.reached`.
        patients: Who each image is of: the intervals then draw patients with all their images.
        seed: Seed of the bootstrap.

    Source:
        Ours. Mean cost under a table of costs is textbook (Elkan 2001, The Foundations of Cost-Sensitive Learning).
    """
    at = np.arange(len(labels))
    rows = costs[labels]
    clean = rows[at, predicted]
    worst = np.maximum(clean, np.where(found, rows, 0.0).max(1))
    bounds = (float(costs.min()), float(costs.max()))
    return Risk(
        costs=tuple(tuple(row) for row in costs.tolist()),
        clean=bootstrap_mean(clean, patients, bounds=bounds, seed=seed),
        worst=bootstrap_mean(worst, patients, bounds=bounds, seed=seed),
        ceiling=float(rows.max(1).mean()),
        drawn="image" if patients is None else "patient",
    )
