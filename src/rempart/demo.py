"""The whole story on the embedded digits: train, attack, harden, audit both, compare."""

from collections.abc import Callable
from pathlib import Path

from rempart.core.disk import replace
from rempart.core.errors import Cancelled
from rempart.core.events import Notify, silent
from rempart.report import compare as comparing
from rempart.report import text
from rempart.report.schema import AuditSpec, Report, TrainSpec
from rempart.tasks import run

_DATA, _MODEL, _THREAT = "digits", "lenet", "linf:0.1"


def demo(out: Path, notify: Notify = silent, *, say: Callable[[str], None]) -> Path:
    """Train a plain and an adversarially trained network, audit both, and return the page that compares them."""
    named: dict[str, Report] = {}
    for name, recipe in (("plain", "plain:digits"), ("pgd-at", "pgd-at")):
        say(f"\n{name}: train on {_DATA} with recipe {recipe}, then audit at {_THREAT}")
        folder = out / name
        _whole(run(TrainSpec(data=_DATA, model=_MODEL, recipe=recipe, overwrite=True, out=str(folder)), notify))
        audit = str(out / f"audit-{name}")
        spec = AuditSpec(model=str(folder), data=_DATA, threat=_THREAT, suite="classic", batch_size=256, out=audit)
        named[name] = _whole(run(spec, notify))
        say(text.table(named[name]))
    result = comparing.compare(named)
    say(f"\n{text.compare_table(result)}\n")
    page = out / "compare.html"
    replace(page, comparing.compare_html(result, named).encode())
    return page


def _whole(report: Report | None) -> Report:
    if report is None or not report.complete:
        raise Cancelled
    return report
