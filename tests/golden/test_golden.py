"""What people and programs see, against files written before the code was rearranged.

Pages are kept without their drawings, which differ in the last digits between machines: of each stands the number of
its parts and its words. `REMPART_GOLDEN=write` writes the files anew: look at the difference before you commit it.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from typer.testing import CliRunner

import rempart
from alike import differences
from rempart import cli
from rempart.report.compare import compare, compare_html
from rempart.report.evidence import evidence_page
from rempart.report.html import methods_page, page
from rempart.report.methods import compare_methods
from rempart.report.schema import Report
from rempart.report.store import read, read_spec
from rempart.report.text import compare_table, methods_table, table
from rempart.serve.app import create_app
from rempart.serve.settings import Settings
from report.conftest import CASES, build, build_detection, build_trained, page_of, report_of

HERE = Path(__file__).parent
OLD = tuple(sorted((HERE / "reports").glob("*.json")))
_DRAWING = re.compile(r"<svg.*?</svg>", re.DOTALL)
_WORDS = re.compile(r"<text[^>]*>([^<]*)</text>|<!-- ([^>]*) -->")
_STYLE = re.compile(r"<style>.*?</style>", re.DOTALL)
_PICTURE = re.compile(r"(data:image/png;base64,)[A-Za-z0-9+/=]+")


def held(name: str, found: str) -> None:
    """Compare with a golden file, or write it where the environment says so."""
    path = HERE / name
    found = found if found.endswith("\n") else f"{found}\n"
    if os.environ.get("REMPART_GOLDEN") == "write":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found)
    wanted = path.read_text()
    if found != wanted:
        lines = difflib.unified_diff(wanted.splitlines(), found.splitlines(), "golden", "found", lineterm="", n=1)
        pytest.fail(f"{name} differs:\n" + "\n".join(line[:300] for line in list(lines)[:60]))


def without_drawings(html: str) -> str:
    def words(match: re.Match[str]) -> str:
        found = [a or b for a, b in _WORDS.findall(match[0])]
        return f"<svg with {match[0].count('<path')} paths: {' | '.join(found)}>"

    return _PICTURE.sub(r"\1...", _STYLE.sub("<style>...</style>", _DRAWING.sub(words, html)))


def named(case: str) -> str:
    return re.sub(r"[^a-z]+", "_", case)


@pytest.mark.parametrize("case", list(CASES))
def test_the_text_of_a_report(case: str) -> None:
    held(f"text/{named(case)}.txt", table(report_of(case)))


@pytest.mark.parametrize("case", [case for case in CASES if case != "pairs of thirty"])  # 870 rows
def test_the_page_of_a_report(case: str) -> None:
    held(f"pages/{named(case)}.html", without_drawings(page_of(case)))


@pytest.mark.parametrize("case", ["full", "suspicious", "invalid", "classes", "hostile", "no attacks", "one image"])
def test_the_appendix_of_an_audit(case: str) -> None:
    held(f"evidence/{named(case)}.html", without_drawings(evidence_page(report_of(case))))


def test_audits_side_by_side() -> None:
    audits = {"first": build(seed=1), "second": build(seed=2, strength=0.3), "third": build(seed=3, strength=0.8)}
    comparison = compare(audits)
    held("compare/audits.txt", compare_table(comparison))
    held("compare/audits.html", without_drawings(compare_html(comparison, audits)))
    held("compare/detectors.html", without_drawings(compare_html(comparison, audits, [build_detection()])))


def test_training_runs_side_by_side() -> None:
    methods = compare_methods(
        {
            "plain": build_trained("plain", 0.9, gradients=40_000),
            "trades": build_trained("trades", 0.4, seed=1, gradients=500_000),
            "trades again": build_trained("trades", 0.5, seed=2, gradients=520_000),
        }
    )
    held("compare/methods.txt", methods_table(methods))
    held("compare/methods.html", without_drawings(methods_page(methods)))


# ---- commands and the API


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from commands(inner, (*path, name))


@pytest.mark.parametrize(
    "path", list(commands(typer.main.get_command(cli.app))), ids=lambda path: " ".join(path) or "-"
)
def test_the_help_of_a_command(path: tuple[str, ...]) -> None:
    told = CliRunner(env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}).invoke(cli.app, [*path, "--help"])
    assert told.exit_code == 0
    held(f"help/{'-'.join(path) or 'rempart'}.txt", "\n".join(line.rstrip() for line in told.output.splitlines()))


def test_the_page_of_the_api(tmp_path: Path) -> None:
    app = create_app(Settings(folder=tmp_path / "data"))
    try:
        found = app.test_client().get("/api/v1/openapi.json").get_json()
    finally:
        app.extensions["rempart"].jobs.table.destroy()
    held("openapi.json", json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False))


# ---- reports of each task, written by an earlier version


def old(path: Path) -> str:
    return path.stem


def shared(kept: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """An old report without the fields of other tasks, which it held empty and a new one leaves out."""
    assert all(kept[key] in (None, [], {}) for key in kept.keys() - found.keys()), "only what was empty is left out"
    return {key: value for key, value in kept.items() if key in found}


@pytest.mark.parametrize("path", OLD, ids=old)
def test_an_old_report_opens(path: Path) -> None:
    report = read(path)
    again = json.loads(report.model_dump_json())
    assert again == shared(json.loads(path.read_text()), again)


@pytest.mark.parametrize("path", OLD, ids=old)
def test_an_old_report_is_shown(path: Path) -> None:
    held(f"old/{path.stem}.txt", table(read(path)))
    held(f"old/{path.stem}.html", without_drawings(page(read(path))))


def test_an_old_report_is_compared() -> None:
    audit = read(HERE / "reports" / "audit.json")
    held("old/compared.txt", compare_table(compare({"one": audit, "other": audit})))


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """The report of a task, done again from the request in its old report; the training comes first."""
    folder = tmp_path_factory.mktemp("replayed")

    @cache
    def again(task: str) -> Report:
        if task != "train":
            again("train")
        before = os.getcwd()
        os.chdir(folder)
        try:
            report = rempart.run(read_spec(HERE / "reports" / f"{task}.json"))
        finally:
            os.chdir(before)
        assert report is not None and report.complete
        return report

    return again


@pytest.mark.parametrize("path", OLD, ids=old)
def test_an_old_report_is_replayed(path: Path, replayed: Callable[[str], Report]) -> None:
    """Every figure comes again, but for rounding, which a training of one epoch lets grow."""
    found, kept = (told(json.loads(text)) for text in (replayed(path.stem).model_dump_json(), path.read_text()))
    assert list(differences(shared(kept, found), found, rel=1e-2)) == []


_VARYING = ("created", "environment", "seconds", "digest", "code", "identity", "identities", "original_png")


def told(tree: Any) -> Any:
    """What must come again: no times, no digests of weights, no pixels of pictures."""
    if isinstance(tree, dict):
        return {k: told(v) for k, v in tree.items() if k not in _VARYING and not k.endswith("_png")}
    return [told(item) for item in tree] if isinstance(tree, list) else tree
