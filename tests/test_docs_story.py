"""The page of the MRI story: its tables show what the results say, and which of them tell two networks apart."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rempart.core.stats import wilson

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def page(docs_module: Callable[[str], ModuleType]) -> ModuleType:
    return docs_module("story")


def rate(k: int) -> dict[str, float]:
    found = wilson(k, 200)
    return {"k": k, "n": 200, "share": found.value, "low": found.low, "high": found.high}


def network(model: str, clean: int, worst: int, fired: tuple[str, ...] = ()) -> dict[str, Any]:
    attacks = {"fgsm": rate(worst + 3), "cw": rate(clean)}
    stamp = "suspicious" if fired else "valid"
    row = {"model": model, "clean": rate(clean), "worst": rate(worst), "attacks": attacks}
    return row | {"stamp": stamp, "fired": list(fired)}


BODY = {
    "threat": "linf:4/255",
    "data": "scans.zip@64@grey",
    "settings": {"defences": ["bit-depth:bits=4", "median:size=2"]},
    "table": [network("plain", 188, 20), network("hardened", 180, 120), network("defended", 184, 24)],
    "detectors": {
        "fitted_on": 250,
        "calibrated_on": 371,
        "alone": {"clean": rate(186), "attacked": rate(18)},
        "table": [
            {"detector": "max-softmax", "false_alarms": rate(9), "held": {"none": rate(178), "all of these": rate(90)}}
        ],
    },
}


def cells(markdown: str, first: str) -> list[str]:
    told = markdown.replace("\N{NO-BREAK SPACE}", " ")
    return [
        cell.strip() for cell in next(s for s in told.splitlines() if s.startswith(f"| {first} |"))[1:-1].split("|")
    ]


def test_tables_show_shares_with_intervals_and_who_holds_surely_more(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mri_story.json").write_text(json.dumps(BODY))
    monkeypatch.setitem(page.read.__globals__, "RESULTS", tmp_path)
    told = page.rendered("<!-- networks -->")
    assert cells(told, "as Keras left it")[1:] == ["94.0 % [89.8, 96.5]", "10.0 % [6.6, 14.9]", "valid", ""]
    assert cells(told, "trained further on attacked images")[-2:] == ["valid", "yes"]
    assert cells(told, "behind bit-depth and median")[-2:] == ["valid", "**no**"]
    assert "linf:4/255, 200 test images of `scans.zip@64@grey`" in told
    assert cells(page.rendered("<!-- attacks -->"), "as Keras left it")[1:] == [
        "11.5 % [7.8, 16.7]",
        "94.0 % [89.8, 96.5]",
    ]
    masked = {**BODY, "table": [*BODY["table"][:2], network("defended", 184, 90, ("transfer",))]}
    last = cells(page.networks(masked), "behind bit-depth and median")[-2:]
    assert last == ["suspicious: transfer", "not known: its checks say that the figures are too high"]
    told = page.rendered("<!-- detectors -->")
    assert cells(told, "max-softmax")[-2:] == ["45.0 % [38.3, 51.9]", "not measured"]
    assert cells(told, "no detector")[1:] == ["", "93.0 % [88.6, 95.8]", "9.0 % [5.8, 13.8]", ""]


def test_what_was_not_measured_is_said(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(page.read.__globals__, "RESULTS", tmp_path)
    told = page.rendered((DOCS / "how-to" / "mri.md").read_text("utf-8"))
    assert told.count(page.HERE) == 3 and "<!--" not in told
