"""Costs read from tables, and mean costs worked out by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audit.test_classes import NAMES, brightest, dataset, distances, run, scans
from rempart.audit.risk import read_costs, risk
from rempart.core.errors import SpecError
from rempart.core.stats import bootstrap_mean

CLASSES = ("benign", "malignant", "normal")
COSTS = np.array([[0.0, 2.0, 1.0], [10.0, 0.0, 20.0], [1.0, 3.0, 0.0]])
TABLE = "true,normal,benign,malignant\nmalignant,20,10,0\nbenign, 1 ,0,2\nnormal,0,1,3\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "costs.csv"
    path.write_text(TABLE)
    return path


def test_a_table_is_read_by_name_whatever_its_order(table: Path) -> None:
    assert np.array_equal(read_costs(table, CLASSES), COSTS)
    table.write_bytes(b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode() + b"\r\n,,,\r\n")
    assert np.array_equal(read_costs(table, CLASSES), COSTS), "as spreadsheets write it"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("true,normal", "true,norml", "'normal' missing, 'norml' unknown; the first line names"),
        ("\nbenign,", "\nmalignant,", "rows of costs.csv, got 'benign' missing"),
        (",malignant\n", ",malignant,benign\n", "columns of costs.csv, got 'benign' more than once"),
        ("20,10,0", "20,10", "3 costs in the row 'malignant' of costs.csv, got 2"),
        ("20,10,0", "20,-10,0", "a cost >= 0 for 'malignant' taken for 'benign', got '-10'"),
        ("20,10,0", "20,inf,0", "got 'inf'"),
        ("20,10,0", "20,nan,0", "got 'nan'"),
        ("20,10,0", "20,high,0", "got 'high'"),
        (TABLE, "", "which is empty"),
    ],
)
def test_a_wrong_table_is_refused_in_words(table: Path, old: str, new: str, message: str) -> None:
    table.write_text(TABLE.replace(old, new))
    with pytest.raises(SpecError, match=message.replace("(", r"\(")):
        read_costs(table, CLASSES)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_costs(tmp_path / "none.csv", CLASSES)
    (tmp_path / "image.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SpecError, match="a CSV table of costs"):
        read_costs(tmp_path / "image.csv", CLASSES)


def test_the_risk_of_five_images_by_hand() -> None:
    """Costs without attack 0, 0, 10, 0, 0; under attack 1 (reached normal), 20 (both), 10 (wrong at first, so not
    attacked), 0 (nothing reached), 3; dearest of each row 2, 20, 20, 20, 3."""
    labels, predicted = np.array([0, 1, 1, 1, 2]), np.array([0, 1, 0, 1, 2])
    found = np.array([[0, 0, 1], [1, 0, 1], [0, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=bool)
    result = risk(COSTS, labels, predicted, found)
    assert result.clean.value == pytest.approx(10 / 5) and result.worst.value == pytest.approx(34 / 5)
    assert result.ceiling == pytest.approx(65 / 5)
    assert result.costs == tuple(map(tuple, COSTS.tolist())) and result.drawn == "image"
    assert result.worst.low <= result.worst.value <= result.worst.high <= 20
    by_patient = risk(COSTS, labels, predicted, found, ["a", "a", "b", "b", "c"])
    assert by_patient.drawn == "patient" and by_patient.worst.n == 3
    assert by_patient.worst.value == result.worst.value


def test_a_costly_diagonal_is_paid_too() -> None:
    """An image that is right costs 1, and an adversary who finds nothing cheaper than that leaves it alone."""
    costs = np.array([[1.0, 0.5], [4.0, 1.0]])
    result = risk(costs, np.array([0, 1]), np.array([0, 1]), np.array([[False, True], [True, False]]))
    assert (result.clean.value, result.worst.value) == (1.0, 2.5)


def test_intervals_draw_whole_patients() -> None:
    """Ten patients with ten equal images each: the interval is that of ten draws, not of a hundred."""
    per_patient = np.arange(10.0)
    values, groups = np.repeat(per_patient, 10), np.repeat(np.arange(10), 10).astype(str)
    grouped = bootstrap_mean(values, groups, bounds=(0, 9))
    alone = bootstrap_mean(per_patient, bounds=(0, 9))
    naive = bootstrap_mean(values, bounds=(0, 9))
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high), abs=0.1)
    assert (grouped.high - grouped.low) > 2.5 * (naive.high - naive.low)
    half = 1.96 * per_patient.std() / np.sqrt(10)
    assert (grouped.low, grouped.high) == pytest.approx((4.5 - half, 4.5 + half), abs=0.15)


def test_groups_of_different_sizes_weigh_by_their_images() -> None:
    values, groups = [0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"]
    found = bootstrap_mean(values, groups)
    assert found.value == 0.75 and found.n == 2 and (found.low, found.high) == (0, 1)


def test_equal_values_still_have_an_interval() -> None:
    """None of 20 differs: Wilson's upper end for 0 of 20 is 16.1 %, of which each might cost up to the bound."""
    found = bootstrap_mean(np.full(20, 2.0), bounds=(0.0, 10.0))
    assert found.low == pytest.approx(2 - 0.1611 * 2, abs=1e-3)
    assert found.high == pytest.approx(2 + 0.1611 * 8, abs=1e-3)


@pytest.mark.parametrize("values", [[], [np.nan], [2.0]])
def test_values_outside_their_bounds_are_refused(values: list[float]) -> None:
    with pytest.raises(SpecError, match="one or more values"):
        bootstrap_mean(values)
    with pytest.raises(SpecError, match="one group for each value"):
        bootstrap_mean([0.5], ["a", "b"])


def test_an_audit_tells_what_it_reached(tmp_path: Path) -> None:
    """The brightest pixel once more: which classes can be reached is known, and so is what they cost."""
    costs = np.arange(16.0).reshape(4, 4) % 7
    np.fill_diagonal(costs, 0)
    path = tmp_path / "costs.csv"
    lines = [",".join(["", *NAMES])] + [
        ",".join([name, *map(str, row)]) for name, row in zip(NAMES, costs, strict=True)
    ]
    path.write_text("\n".join(lines))
    x, y = scans()
    predicted = x.flatten(1).argmax(1)
    can = (distances(x) <= 0.1) & (predicted == y)[:, None]
    rows = torch.from_numpy(costs)[y]
    clean = rows[torch.arange(len(y)), predicted]
    worst = torch.maximum(clean, torch.where(can, rows, 0.0).amax(1))
    found = run("all", costs=str(path)).report.risk
    assert found is not None
    assert found.clean.value == pytest.approx(float(clean.mean()))
    assert found.worst.value == pytest.approx(float(worst.mean())) and found.worst.value > found.clean.value
    assert found.ceiling == pytest.approx(float(rows.amax(1).mean()))
    less = run(None, costs=str(path)).report.risk
    assert less is not None and found.clean.value <= less.worst.value <= found.worst.value
    known = replace(dataset(x, y), patients=tuple(f"p{k // 6}" for k in range(len(x))))
    grouped = run("all", costs=str(path), data=known).report.risk
    assert grouped is not None and (grouped.drawn, grouped.worst.n) == ("patient", 10)
    assert grouped.worst.value == found.worst.value
    with pytest.raises(SpecError, match="the model's classes"):
        run(None, costs=str(path), model=_other())


def _other() -> object:
    model = brightest()
    model.class_names = ("a", "b", "c", "d")
    return model
