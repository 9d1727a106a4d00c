"""The page about guarding: what its rules make of intervals, and that it shows what the results say."""

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
    return docs_module("guarding")


def rate(k: int, n: int = 100) -> dict[str, float]:
    found = wilson(k, n)
    return {"k": k, "n": n, "share": found.value, "low": found.low, "high": found.high}


def defence(name: str, clean: int, oblivious: int, adaptive: int, **more: Any) -> dict[str, Any]:
    shares = {"clean": rate(clean), "oblivious": rate(oblivious), "adaptive": rate(adaptive)}
    return {"setting": "mri", "defence": name, "stamp": "valid", "fired": [], **shares, **more}


def detector(name: str, none: int, oblivious: int, knows: int, **more: Any) -> dict[str, Any]:
    area = {"n": 9, "area": 0.912, "low": 0.8, "high": 0.97}
    held = {"none": rate(none), "all of these": rate(oblivious), "knows the detector": rate(knows)}
    return {
        "setting": "mnist",
        "detector": name,
        "fitted_on": 50,
        "calibrated_on": 40,
        "false_alarms": {"0.05": rate(7)},
        "alone": {"clean": rate(98), "attacked": rate(20)},
        "held": held,
        "seen": {"fgsm": area},
        "unseen": {},
        **more,
    }


def results(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **bodies: Any) -> None:
    for name, body in bodies.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(body))
    monkeypatch.setitem(page.read.__globals__, "RESULTS", tmp_path)


def cells(markdown: str, first: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_defence_survives_only_where_the_attack_through_it_leaves_surely_more(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [
        defence("none", 95, 10, 10),
        defence("hardly", 95, 80, 18),  # the intervals of 10 and 18 of 100 overlap
        defence("truly", 95, 80, 40),
        defence("masked", 95, 80, 70, stamp="suspicious", fired=["transfer"]),
    ]
    body = {"settings": {"mri": {"threat": "linf:4/255"}}, "table": table}
    results(page, tmp_path, monkeypatch, preprocessing=body)
    told = page.rendered("<!-- preprocessing -->")
    assert cells(told, "none")[-1] == ""
    assert [cells(told, name)[-1] for name in ("hardly", "truly")] == ["**no**", "yes"]
    assert cells(told, "masked")[-1] == "perhaps; warned: transfer"
    assert cells(told, "hardly")[-2].replace("\N{NO-BREAK SPACE}", " ") == "+62.0 points"
    order = [line.split("|")[1].strip() for line in told.splitlines() if line.startswith("| ")][2:]
    assert order == ["masked", "truly", "hardly", "none"], "the best under the attack through it first"


def test_a_detector_adds_something_only_where_more_is_held_than_without(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = {"fgsm": {"n": 9, "area": 0.432, "low": 0.3, "high": 0.6}}
    table = [detector("useless", 90, 85, 22), detector("good", 90, 85, 60, unseen=unseen)]
    untried = detector("untried", 90, 85, 22)
    del untried["held"]["knows the detector"]
    table.append(untried)
    results(page, tmp_path, monkeypatch, detectors={"settings": {"mnist": {"threat": "linf:0.2"}}, "table": table})
    told = page.rendered("<!-- detectors -->").replace("\N{NO-BREAK SPACE}", " ")
    assert cells(told, "useless")[-1] == "**no**" and cells(told, "good")[-1] == "yes"
    assert cells(told, "untried")[-2:] == ["not measured", "not known"]
    assert cells(told, "good")[4].startswith("60.0 % [") and "20.0 % [" in told
    assert "| good | 0.912 [0.800, 0.970] |" in told and "| good, the attack unseen | 0.432 [0.300, 0.600] |" in told
    assert [name for name, _ in page.figures()] == ["detectors-mnist"]


def test_what_was_not_measured_is_said(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results(page, tmp_path, monkeypatch)
    told = page.rendered((DOCS / "guarding.md").read_text())
    assert told.count(page.HERE) == 4 and "<!--" not in told and not list(page.figures())
