import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rempart.core.errors import DataError, SpecError
from rempart.report import store
from rempart.report.schema import Report


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares drawing the page, which is tested elsewhere."""
    monkeypatch.setattr(store, "page", lambda report: "page")


@pytest.mark.usefixtures("blank")
def test_every_report_comes_back_equal_from_file_and_directory(any_report: Report, tmp_path: Path):
    path = store.write(any_report, tmp_path / "run")
    assert path == tmp_path / "run" / "report.json"
    assert store.read(path) == any_report
    assert store.read(path.parent) == any_report
    assert (path.parent / "report.html").read_text() == "page"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]  # nothing temporary is left


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.json"
    store.replace(path, b"old")

    def half(self: Path, content: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(content[:1])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space"):
        store.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_json_is_kept_when_the_page_cannot_be_made(
    make_report: Callable[..., Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(report: Report) -> str:
        raise RuntimeError("template")

    monkeypatch.setattr(store, "page", broken)
    with pytest.raises(RuntimeError):
        store.write(make_report(n=1), tmp_path)
    assert store.read(tmp_path) == make_report(n=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"expected a report.json .*No such file"),
        ("{half", "expected a file in JSON"),
        ("[1, 2]", "schema version 1, got .* with null"),
        ('{"schema_version": 2}', "schema version 1, got .* with 2; read it with"),
        ('{"schema_version": 1, "kind": "party"}', "expected a valid report, got .*, where kind: Input should be"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(content: str | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(DataError, match=message):
        store.read(tmp_path)


@pytest.mark.usefixtures("blank")
def test_a_spec_is_read_from_its_file_and_from_its_report(any_report: Report, tmp_path: Path):
    assert store.read_spec(store.write(any_report, tmp_path)) == any_report.spec
    alone = tmp_path / "spec.json"
    alone.write_text(any_report.spec.model_dump_json())
    assert store.read_spec(alone) == any_report.spec


def test_an_unknown_key_of_a_spec_is_named(make_report: Callable[..., Report], tmp_path: Path):
    raw = make_report(n=1).spec.model_dump(mode="json") | {"epss": 1}
    (tmp_path / "spec.json").write_text(json.dumps(raw))
    with pytest.raises(SpecError, match=r"where audit\.epss: Extra inputs"):
        store.read_spec(tmp_path / "spec.json")
