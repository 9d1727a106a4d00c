"""The page about sensitive neurons: what its rules make of intervals, and that it shows what the results say."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def page(docs_module: Callable[[str], ModuleType]) -> ModuleType:
    return docs_module("explaining")


def spread(mean: float, half: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 3}


def network(own: float, shared: float) -> dict[str, Any]:
    ratios = {"relative ratio": own, "shared_relative ratio": shared, "absolute ratio": 0.5, "shared_absolute ratio": 1}
    return {"attacked": spread(0.8), "overlap with plain": spread(0.5), "overlap by chance": spread(0.25)} | {
        "agreement": None,
        **{key: spread(value) for key, value in ratios.items()},
    }


def effect(method: str, test: str, gap: float, layer: str = "all layers", share: float = 0.1) -> dict[str, Any]:
    told = {"before": spread(0.3), "sensitive": spread(0.95), "random": spread(0.4), "least": spread(0.3)}
    return {"method": method, "share": share, "layer": layer, "test": test, **told, "gap": spread(gap)}


def results(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    setting = {
        "threat": "linf:0.1",
        "done": 3,
        "pairs": 120,
        "tested": 60,
        "methods": {"plain": {"attacked": spread(0.02)}, "pgd-at": network(0.8, 0.95), "sns": network(0.85, 0.7)},
        "effects": [
            *(effect("pgd-at", test, gap) for test, gap in (("restored", 0.3), ("planted", -0.3))),
            *(effect("pgd-at", test, gap, "conv") for test, gap in (("restored", -0.2), ("planted", 0.05))),
            effect("pgd-at", "zero, attacked anew", -0.2),
        ],
        "correlation": [
            {"networks": "all", "n": 9, "layer": "all layers", "spearman": -0.5},
            {"networks": "without plain", "n": 6, "layer": "all layers", "spearman": None},
        ],
        "between seeds": {"plain": None, "pgd-at": {"jaccard": 0.2, "chance": 0.1}, "sns": None},
    }
    body = {"settings": {"mnist": setting | changes}}
    (tmp_path / "sensitivity.json").write_text(json.dumps(body))
    monkeypatch.setitem(page.read.__globals__, "RESULTS", tmp_path)


def cells(markdown: str, first: str) -> list[str]:
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip().replace("\N{NO-BREAK SPACE}", " ") for cell in line.strip("|").split("|")]


def test_lower_is_what_lies_below_one_with_its_whole_interval(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(page, tmp_path, monkeypatch)
    told = page.lower()
    assert "lower than that of the plain network for 2 of 2 methods on own images and 1 of 2 methods on shared" in told
    assert "Surely higher" not in told
    assert cells(told, "pgd-at")[3:5] == ["0.80 [0.70, 0.90]", "0.95 [0.85, 1.05]"]
    assert (cells(told, "pgd-at")[1], cells(told, "sns")[1]) == ("own images only", "yes")
    results(page, tmp_path, monkeypatch, methods={"plain": {"attacked": spread(0)}, "sns": network(1.2, 1)})
    told = page.lower()
    assert "0 of 1 methods on own" in told and "Surely higher on own images: sns." in told
    assert cells(told, "sns")[1] == "**not shown**" and cells(told, "plain")[2] == "0.0 % [0.0, 10.0]"


def test_a_claim_is_counted_on_its_own_side_of_zero(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"pgd-at": network(0.8, 0.9)}
    results(page, tmp_path, monkeypatch, methods=methods)
    told = page.carry()
    assert (
        "Restored: the gap lies surely on the side of the claim for 1 of 1 networks with all layers at once, surely "
        "on the other for 0; layer by layer for 0 and 1 of 1." in told
    )
    assert "Planted: the gap lies surely on the side of the claim for 1 of 1" in told
    assert "layer by layer for 0 and 0 of 1" in told
    assert "surely more than without random ones for 0, and surely less for 1, of 1 networks" in told
    assert cells(told, "pgd-at")[1:3] == ["30.0 → 40.0 %", "**+30.0 [+20.0, +40.0]**"]


def test_figures_show_the_tests_of_all_layers(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(page, tmp_path, monkeypatch)
    ((name, drawn),) = page.figures()
    assert name == "sensitivity-mnist" and drawn.count("pgd-at") == 1 and "sensitive neurons restored" in drawn
    assert page.cut(spread(0.95)) == pytest.approx((0.95, 0.85, 1.0))


def test_overlaps_and_correlations_are_those_of_the_results(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results(page, tmp_path, monkeypatch, methods={"pgd-at": network(1, 1)})
    assert cells(page.which(), "pgd-at") == ["pgd-at", "0.50", "0.25", "0.20", ""]
    assert cells(page.correlation(), "all layers") == ["all layers", "-0.50", ""]


def test_without_results_the_page_says_so(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(page.read.__globals__, "RESULTS", tmp_path)
    shown = page.rendered((DOCS / "explaining.md").read_text("utf-8"))
    assert "<!--" not in shown and shown.count(page.HERE) == 4 and list(page.figures()) == []
