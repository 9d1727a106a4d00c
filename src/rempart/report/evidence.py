"""The appendix of evidence: one audit in the order in which a reviewer asks, from its report and nothing else."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rempart.core.disk import replace
from rempart.core.errors import SpecError
from rempart.data import PLAIN
from rempart.report.html import contents, rendered
from rempart.report.schema import AttackResult, AuditSpec, Report
from rempart.report.store import read
from rempart.report.text import amount, count, threat_of

Facts = Iterator[tuple[str, str]]
_CHECKED = "checks"
_AIMED = "pairs"


def write_evidence(run: str | Path, out: str | Path) -> Path:
    """Write the appendix of an audit as an HTML page, or as a PDF, by the ending of the file.

    Args:
        run: The report of the audit, or its folder.
        out: A file that ends in .html or .pdf. PDF needs the extra `pdf`.

    Raises:
        SpecError: If the report is not that of an audit, the ending is another, or what PDF needs is not installed.
        DataError: If there is no report.
    """
    out = Path(out)
    if out.suffix not in (".html", ".pdf"):
        raise SpecError("--out to name an .html or a .pdf file", got=repr(str(out)))
    page = evidence_page(read(run))
    replace(out, page.encode() if out.suffix == ".html" else pdf(page))
    return out


def evidence_page(report: Report) -> str:
    """The appendix as one self-contained HTML document.

    Raises:
        SpecError: If the report is not that of an audit.
    """
    if not isinstance(report.spec, AuditSpec):
        raise SpecError("the report of an audit", got=f"one of kind {report.kind}", hint="run `rempart audit` first")
    sections = {"threat": _threat, "data": _data, "model": _model, "environment": _environment}
    told = {name: list(section(report)) for name, section in sections.items()}
    return rendered("evidence.html", **contents(report), **told, told_of=_told_of)


def pdf(page: str) -> bytes:
    """A page of ours as PDF; nothing is fetched but the images inside it.

    Raises:
        SpecError: If WeasyPrint, or the library Pango it draws text with, is not installed.
    """
    try:
        weasyprint: Any = importlib.import_module("weasyprint")
        urls: Any = importlib.import_module("weasyprint.urls")
    except ImportError:
        raise SpecError("weasyprint for PDF", got="none", hint="pip install 'rempart[pdf]', or write .html") from None
    except OSError as error:
        hint = "on Debian: apt install libpango-1.0-0 libpangoft2-1.0-0; or write .html"
        raise SpecError("the library Pango for PDF", got=f"{error}".partition("\n")[0], hint=hint) from None
    fetcher = urls.URLFetcher(allowed_protocols=("data",))
    return weasyprint.HTML(string=page, url_fetcher=fetcher).write_pdf()


def _threat(report: Report) -> Facts:
    threat, spec = threat_of(report), report.spec
    assert threat is not None and isinstance(spec, AuditSpec)
    size = "of any size" if threat.eps is None else f"up to {amount(threat, report.data)}"
    inside = ", inside its mask alone" if report.data.masked else ""
    yield (
        "The adversary may",
        f"add a perturbation to each image{inside}, {size} in the norm {threat.norm}, pixel by pixel",
    )
    yield "Pixels stay in", f"[{threat.low:g}, {threat.high:g}], the box of the model"
    aims = "each other class in turn" if spec.pairs == "all" else f"the second class of each pair in {spec.pairs}"
    yield "The adversary wants", "any wrong class" + (f"; and, aiming at it, {aims}" if spec.pairs else "")
    blind = [attack.gradients == 0 for attack in report.attacks if attack.label != _CHECKED]
    known = "the model and its weights, and follows its gradients"
    if blind and all(blind):
        known = "the answers of the model, and no gradients"
    yield "The adversary knows", known + (", and the defences in front of it" if report.model.defences else "")
    rounded = any(attack.eight_bit is not None for attack in report.attacks)
    yield "Images are judged", "with exact pixels" + (", and rounded to 8 bit" if rounded else "")
    yield "Not part of it", "other norms and budgets, patches, rotations, blur, noise, contrast, poisoned training data"


def _data(report: Report) -> Facts:
    data = report.data
    yield "Source", data.source
    yield "Split", "none: one set of images" if data.split == "all" else data.split
    yield "Images", f"{data.n:,} of {' x '.join(map(str, data.shape))} (channels, then axes)"
    yield "Classes", " · ".join(data.classes)
    if report.samples is not None:
        sizes = [report.samples.labels.count(k) for k in range(len(report.model.classes))]
        told = zip(report.model.classes, sizes, strict=True)
        yield "Images audited", f"{sum(sizes):,}; by class " + " · ".join(f"{name}: {n:,}" for name, n in told)
    yield "Digest", f"{data.digest} (SHA-256 over numbers, labels and images, cut)"
    if report.data.unit != PLAIN:
        low, high = report.data.span
        yield "Intensities", f"[{low:g}, {high:g}] {report.data.unit}, which become the ends of the box"
    told = [f"{found.n:,} {found.kind}s, up to {count(found.most, 'image')} each" for found in report.groups]
    unknown = "not known: intervals take images as independent, and slices of one patient are not"
    yield "Patients", "; ".join(told) or unknown
    yield "Training data", "not known here: that no image or patient of this set was trained on is for the user to show"


def _model(report: Report) -> Facts:
    model = report.model
    yield "Name", model.name
    yield "Loaded from", model.source
    yield "Digest", f"{model.digest} (of weights and defences)"
    yield "Code", f"{model.code} (digest of the network's own source files)" if model.code else "not recorded"
    yield "Parameters", f"{model.parameters:,}"
    yield "Input", f"{' x '.join(map(str, model.shape))} in [{model.low:g}, {model.high:g}]"
    yield "Preprocessing", ", then ".join(model.defences) or "none but what the model does itself"
    yield "Output", f"one score for each of {len(model.classes)} classes, of which the largest decides"
    mended = [check.message for check in report.preflight if check.status == "repaired"]
    yield "Mended for the audit", " ".join(mended) or "nothing"


def _environment(report: Report) -> Facts:
    assert isinstance(report.spec, AuditSpec)
    yield "Seed", str(report.spec.seed)
    yield "Written", report.created
    yield "Took", f"{report.seconds:.4g} seconds"
    yield from report.environment.items()


def _told_of(attack: AttackResult, *, first: bool) -> str:
    """What a line of the table is, where its name does not say it."""
    if attack.label == _AIMED:
        return f"{attack.name}, aimed at each target class in turn;"
    if attack.label == _CHECKED:
        return "What the checks after the attacks tried."
    return "On the images that all before it left standing;" if attack.survivors and not first else ""
