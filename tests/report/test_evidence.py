"""The appendix of evidence: the sections a reviewer asks for, with the figures of the report and no others."""

import base64
import importlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from rempart.core.errors import SpecError
from rempart.report import evidence, store
from rempart.report.evidence import evidence_page, write_evidence
from report.conftest import CASES, build_classes, report_of
from report.test_html import Page, assert_sound

AUDITS = [name for name in CASES if report_of(name).kind == "audit"]
ORDER = ["Threat model", "Data", "Model", "Attacks and budgets", "Results", "Checks and their findings"]
ORDER += ["Limits, and what was not run", "Environment and seed", "Running it again"]


@pytest.mark.parametrize("case", AUDITS)
def test_every_appendix_is_sound_and_in_order(case: str) -> None:
    source = evidence_page(report_of(case))
    assert_sound(source)
    told = [re.sub(r"<[^>]+>", "", heading) for heading in re.findall(r"<h2>(.*?)</h2>", source)]
    assert told == [f"{k}. {title}" for k, title in enumerate(ORDER, 1)]


@pytest.mark.parametrize("case", ["full", "classes"])
def test_no_claim_goes_beyond_the_figures(case: str) -> None:
    words = Page(evidence_page(report_of(case))).text.lower()
    for word in ("robust", "certif", "compliance", "compliant", "safe", "secure", "guarantee", "approved"):
        sentences = [s for s in re.split(r"[.:]", words) if re.search(rf"\b{word}", s)]
        assert all("no certificate" in s for s in sentences), sentences


def test_every_option_budget_and_interval_is_there() -> None:
    report = report_of("classes")
    text = Page(evidence_page(report)).text
    assert report.clean is not None and report.worst_case is not None
    for attack in report.attacks:
        assert f"{attack.queries:,}" in text and f"{attack.gradients:,}" in text
        for option in attack.options:
            assert f"{option}=" in text
    rates = [report.clean, report.worst_case, *(a.accuracy for a in report.attacks)]
    rates += [rate for found in report.classes for rate in (found.clean, found.worst)]
    for rate in rates:
        assert f"{rate.value:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" in text
    for check in (*report.preflight, *report.checks):
        assert check.message in text
    assert report.model.digest in text and report.data.digest in text
    assert "Patients not known" in text
    assert "glioma: 125" in text, "images of each class"
    assert json.loads(report.spec.model_dump_json())["pairs"] == "all" and "each other class in turn" in text


def test_what_was_not_measured_is_said() -> None:
    text = Page(evidence_page(report_of("full"))).text
    assert "run without --pairs" in text and "run without --costs" in text


def test_masks_belong_to_the_threat_model() -> None:
    report = report_of("full")
    masked = report.model_copy(update={"data": report.data.model_copy(update={"masked": True})})
    told = "to each image, inside its mask alone, up to"
    assert told in Page(evidence_page(masked)).text and told not in Page(evidence_page(report)).text


def test_only_audits_have_an_appendix() -> None:
    for case in ("training", "attack", "detection"):
        with pytest.raises(SpecError, match="the report of an audit"):
            evidence_page(report_of(case))


def test_it_is_written_from_the_folder_of_a_run(tmp_path: Path) -> None:
    store.write(build_classes(), tmp_path / "run")
    before = (tmp_path / "run" / "report.json").read_bytes()
    out = write_evidence(tmp_path / "run", tmp_path / "new" / "appendix.html")
    assert out.read_text() == evidence_page(build_classes())
    assert (tmp_path / "run" / "report.json").read_bytes() == before
    with pytest.raises(SpecError, match=r"an \.html or a \.pdf file"):
        write_evidence(tmp_path / "run", tmp_path / "appendix.docx")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("no module"), r"pip install 'rempart\[pdf\]'"),
        (OSError("cannot load library 'libpango-1.0-0'"), "apt install libpango-1.0-0 libpangoft2-1.0-0"),
    ],
)
def test_what_pdf_needs_is_named(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise error

    monkeypatch.setattr(evidence, "importlib", type("Importlib", (), {"import_module": staticmethod(missing)}))
    with pytest.raises(SpecError, match=message):
        evidence.pdf("<p>text</p>")


def test_a_pdf_holds_the_pages_and_fetches_nothing(tmp_path: Path) -> None:
    try:
        importlib.import_module("weasyprint")
    except (ImportError, OSError) as error:
        pytest.skip(f"the extra pdf, and Pango: {error}")
    planted = tmp_path / "secret.png"
    planted.write_bytes(base64.b64decode(report_of("classes").examples[0].original_png))
    fetched: dict[str, str] = {}
    urls = importlib.import_module("weasyprint.urls")
    fetch = urls.URLFetcher.fetch

    def noted(self: Any, url: str, *rest: Any, **more: Any) -> Any:
        fetched[url.partition(":")[0]] = "refused"
        found = fetch(self, url, *rest, **more)
        fetched[url.partition(":")[0]] = "fetched"
        return found

    page = evidence_page(report_of("classes, hostile")).replace("<main>", f'<main><img src="{planted.as_uri()}">')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urls.URLFetcher, "fetch", noted)
        content = evidence.pdf(page)
    assert fetched == {"file": "refused", "data": "fetched"}
    streams = re.findall(rb"stream\r?\n(.*?)\nendstream", content, flags=re.DOTALL)
    objects = content + b"".join(inflated(stream) for stream in streams)
    assert content.startswith(b"%PDF-") and len(re.findall(rb"/Type ?/Page\b", objects)) >= 3


def inflated(stream: bytes) -> bytes:
    try:
        return zlib.decompress(stream)
    except zlib.error:
        return b""
