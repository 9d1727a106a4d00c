"""The page about training methods: what its rule makes of intervals, and that it shows what the results say."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rempart.objectives import objectives

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def page(docs_module: Callable[[str], ModuleType]) -> ModuleType:
    return docs_module("defences")


def row(
    method: str, worst: float, plain: tuple[float, float], trained: tuple[float, float], **more: Any
) -> dict[str, Any]:
    gaps = {
        name: {"value": sum(ends) / 2, "low": ends[0], "high": ends[1], "seeds": 3}
        for name, ends in (("to plain", plain), ("to pgd-at", trained))
    }
    rate = {"mean": worst, "low": worst - 0.1, "high": worst + 0.1, "seeds": 3}
    whole = {
        "setting": "mnist",
        "threat": "linf:0.1",
        "method": method,
        "clean": {"mean": 0.9, "low": 0.3, "high": 1.04},
    }
    return {
        **whole,
        "worst": rate,
        "gradients": 1000,
        "seconds": 2.0,
        "stamps": {"valid": 3},
        "seeds": [],
        **gaps,
        **more,
    }


@pytest.mark.parametrize(
    ("plain", "trained", "told"),
    [
        ((-0.01, 0.30), (-0.5, -0.4), "no difference to plain"),
        ((-0.20, -0.01), (-0.5, -0.4), "below plain"),
        ((0.01, 0.30), (-0.5, -0.01), "above plain, below pgd-at"),
        ((0.01, 0.30), (-0.01, 0.01), "above plain, no difference to pgd-at"),
        ((0.01, 0.30), (0.01, 0.02), "above plain, **above pgd-at**"),
    ],
)
def test_an_interval_decides(
    page: ModuleType, plain: tuple[float, float], trained: tuple[float, float], told: str
) -> None:
    assert page.verdict(row("trades", 0.5, plain, trained)) == told


def test_a_network_that_is_not_stamped_valid_gets_no_praise(page: ModuleType) -> None:
    stamped = {"stamps": {"valid": 2, "suspicious": 1}, "seeds": [{"fired": ["square-beats-gradient"]}]}
    told = page.verdict(row("gfa FIRST", 0.9, (0.5, 0.6), (0.1, 0.2), **stamped))
    assert told == "**not to be trusted**: square-beats-gradient"
    nothing = {**row("gfa FIRST", 0.9, (0.0, 0.0), (-0.2, -0.1), **stamped), "worst": {"mean": 0.0}}
    assert page.verdict(nothing) == "no difference to plain"


def test_neurons_are_set_against_random_ones(page: ModuleType) -> None:
    random = {"to sns, random neurons": {"value": 0.0, "low": -0.01, "high": 0.01, "seeds": 3}}
    assert page.verdict(row("sns", 0.5, (0.1, 0.2), (-0.1, 0.1), **random)).endswith(
        "; no difference to random neurons"
    )


def test_what_is_missing_is_said(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    told = page.rendered((DOCS / "defences.md").read_text("utf-8"))
    assert "<!--" not in told and told.count(page.HERE) == 5
    assert page.verdict(None) == "did not finish"
    assert page.verdict({**row("alp", 0.5, (0, 0), (0, 0)), "to pgd-at": None}) == "not compared"


def test_rows_stand_by_worst_case_with_their_intervals(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    rows = [row("alp", 0.2, (0.1, 0.3), (-0.2, 0.0)), row("trades", 0.4, (0.3, 0.5), (-0.1, 0.1))]
    (tmp_path / "defences.json").write_text(json.dumps({"table": rows, "settings": {"mnist": {"test": 250}}}), "utf-8")
    told = page.tables().replace("\N{NO-BREAK SPACE}", " ")
    assert "3 networks of each method, 250 test images." in told
    first, second = told.splitlines()[-2:]
    assert first.startswith(
        "| [trades](reference/recipes.md#objective-trades) | 90.0 % [30.0, 100.0] | 40.0 % [30.0, 50.0] |"
    )
    assert "| +40.0 [+30.0, +50.0] | +0.0 [-10.0, +10.0] | 1,000 | 2 | valid |" in first
    assert "[alp]" in second
    picture = page.figure(page.by_threat(page.read("defences"))["defences-mnist-linf-0.1"])
    assert picture.index("trades") < picture.index("alp") and picture == page.figure(
        sorted(rows, key=lambda r: -r["worst"]["mean"])
    )


def test_methods_are_objectives(page: ModuleType) -> None:
    names = {entry.name for entry in objectives}
    assert {page.OURS.get(method, method) for method in page.CLAIMS} <= names


def test_the_page_shows_all_results_there_are(page: ModuleType) -> None:
    told = page.rendered((DOCS / "defences.md").read_text("utf-8")).replace("\N{NO-BREAK SPACE}", " ")
    for line in page.read("defences").get("table", []):
        assert page.percent(line["worst"]).replace("\N{NO-BREAK SPACE}", " ") in told
