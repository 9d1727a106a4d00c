"""Reports side by side: audits as they are, training runs once each of their models is audited alike."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from rempart.core.disk import replace as write_whole
from rempart.core.errors import Cancelled, SpecError
from rempart.core.events import Event, Notify, silent
from rempart.core.identity import identity
from rempart.core.repro import environment
from rempart.core.threat import Threat
from rempart.data import open_data
from rempart.models.formats import PYTHON
from rempart.models.load import load
from rempart.report import compare as comparing
from rempart.report import text
from rempart.report.html import methods_page
from rempart.report.methods import Trained, compare_methods, hardened_against
from rempart.report.schema import AttackChoice, AuditSpec, Report, TrainSpec
from rempart.report.store import JSON, read
from rempart.tasks import run

_SUITE, _MINIMUM = "fast", "deepfool"
_VERSIONS = ("rempart", "torch")


def compare(
    paths: Sequence[Path],
    *,
    threat: str | None = None,
    limit: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path | None = None,
    notify: Notify = silent,
) -> str:
    """Compare audits, or training runs, and write the page.

    Of a training run, the model is audited first (see `audited`), unless that was done before.

    Args:
        paths: Reports or the folders of runs, two or more of one kind; beside audits, also judged detectors, whose
            tables follow. A training that began with Python code is named with it, as
            `python:package.module:factory@FOLDER`: what a folder says is never run.
        threat: For training runs, what to audit against. Default: the threat all their recipes measure themselves by.
        limit: For training runs, audit on the first so many test images.
        device: For training runs, where to audit.
        out: The page.
        notify: Receives progress.

    Returns:
        The comparison as text for a terminal.

    Raises:
        SpecError: If audits and training runs are mixed, or an argument does not belong to the kind.
        DataError: If the reports are not about the same samples.
    """
    named_code = [str(path).partition("@") if str(path).startswith(PYTHON) else ("", "", path) for path in paths]
    paths = [Path(place) for _, _, place in named_code]
    code = {path: name for path, (name, _, _) in zip(paths, named_code, strict=True) if name}
    reports = [read(path) for path in paths]
    trained = [path for path, report in zip(paths, reports, strict=True) if report.kind == "train"]
    if trained and len(trained) < len(reports):
        other = next(path for path in paths if path not in trained)
        raise SpecError(
            "training runs alone, or audits alone",
            got=f"{trained[0]}, a training run, beside {other}",
            hint="leave out the one kind; training runs are audited by this command itself",
        )
    if trained:
        found = dict(zip(paths, reports, strict=True))
        methods = compare_methods(audited(found, code=code, threat=threat, limit=limit, device=device, notify=notify))
        table, page = text.methods_table(methods), methods_page(methods)
    else:
        if threat is not None or limit is not None:
            raise SpecError("--threat and --limit with training runs", got="audits", hint="an audit has its own")
        detected = [report for report in reports if report.kind == "detect"]
        named = comparing.named([report for report in reports if report.kind != "detect"])
        result = comparing.compare(named)
        table = "\n".join([text.compare_table(result), *map(text.table, detected)])
        page = comparing.compare_html(result, named, detected)
    if out is not None:
        write_whole(out, page.encode())
    return table


def audited(
    reports: Mapping[Path, Report],
    *,
    code: Mapping[Path, str] | None = None,
    threat: str | None,
    limit: int | None,
    device: Literal["cpu", "cuda"] = "cpu",
    notify: Notify = silent,
) -> dict[str, Trained]:
    """Audit the model of each training run on its test images: with suite fast in the threat, with deepfool in l2.

    The audits lie in `audits/` in the folder of the run. One that is complete is used again if request, network
    (weights, code and answers), images and versions agree; one that was stopped is taken up where it was.

    Args:
        reports: Those of the runs, by their places.
        code: For runs that began with Python code, that code: it is run.
        threat: What to audit against. Default: the threat all recipes measure themselves by.
        limit: Audit on the first so many test images.
        device: Where to audit.
        notify: Receives progress.

    Raises:
        SpecError: If no threat is given and the recipes do not agree on one, or code is needed that was not given.
        Cancelled: If the work was stopped.
    """
    if len(reports) < 2:
        raise SpecError("two or more reports to compare", got=len(reports))
    about = next(iter(reports.values())).data
    asked = Threat.parse(threat, unit=about.unit, span=about.span) if threat else _agreed(reports)
    folders = {path: path if path.is_dir() else path.parent for path in reports}
    models = {path: _model(report, folders[path], (code or {}).get(path)) for path, report in reports.items()}
    runs: list[Trained] = []
    for path, report in reports.items():
        folder, model, l2 = folders[path], models[path], Threat(norm="l2")
        told = _prefixed(folder.name, notify)
        audit = _audit(folder, model, report, asked, _SUITE, (), limit, device, told)
        minimum = _audit(folder, model, report, l2, None, (AttackChoice(name=_MINIMUM),), limit, device, told)
        runs.append(Trained(report, audit, minimum, _sizes(minimum)))
    names = comparing.named([run.audit for run in runs])
    return dict(zip(names, runs, strict=True))


def _agreed(reports: Mapping[Path, Report]) -> Threat:
    """The one threat of all recipes that have one."""
    found = {path: known for path, report in reports.items() if (known := hardened_against(report)) is not None}
    if len(set(found.values())) != 1:
        told = ", ".join(f"{known} of {path}" for path, known in found.items()) or "none in any recipe"
        raise SpecError("--threat, or recipes that agree on one", got=told, hint="add for example --threat linf:0.1")
    return next(iter(found.values()))


def _audit(
    folder: Path,
    model: str,
    training: Report,
    threat: Threat,
    suite: str | None,
    attacks: tuple[AttackChoice, ...],
    limit: int | None,
    device: Literal["cpu", "cuda"],
    notify: Notify,
) -> Report:
    assert isinstance(training.spec, TrainSpec)
    out = folder / "audits" / f"{str(threat).replace(':', '-')}-{limit or 'all'}"
    spec = AuditSpec(
        model=model,
        data=training.spec.data,
        threat=threat.norm if threat.eps is None else f"{threat.norm}:{threat.eps!r}",
        suite=suite,
        attacks=attacks,
        limit=limit,
        sweep=False,
        device=device,
        out=str(out),
    )
    report = _kept(out, spec)
    if report is None:
        report = run(spec, notify)
    if report is None or not report.complete:
        raise Cancelled
    return report


def _model(report: Report, folder: Path, code: str | None) -> str:
    """The model that a training left, as `load` takes it: one that began as Python code needs the code as well."""
    start = getattr(report.spec, "start", None) or ""
    if code is None and start.startswith(PYTHON):
        began = start.partition("@")[0]
        raise SpecError(
            "a run whose network needs no code but Rempart's",
            got=f"{folder}, which says that {began} builds it",
            hint=f"where you trust that code, give {began}@{folder}",
        )
    return f"{code}@{folder}" if code else str(folder)


def _kept(out: Path, spec: AuditSpec) -> Report | None:
    """The report of the same audit of the same network on the same images by the same versions, if there is one.

    In doubt there is none: reports that do not record code and answers, and networks that cannot be replayed.
    """
    if not (out / JSON).exists():
        return None
    report = read(out)
    model = load(spec.model)
    data = open_data(spec.data).head(spec.limit).seen_by(model)
    place = {"model": spec.model, "out": spec.out}  # the folder may have been moved
    record = environment()
    same = (
        report.complete
        and report.spec.model_copy(update=place) == spec
        and report.model.identity.certain(identity(model))
        and report.data.digest == data.digest
        and all(report.environment[name] == record[name] for name in _VERSIONS)
    )
    if not same:
        return None
    return report.model_copy(update={"spec": spec, "model": report.model.model_copy(update={"source": spec.model})})


def _sizes(minimum: Report) -> np.ndarray:
    """Per image, the l2 norm of the smallest perturbation found over that of the image."""
    assert isinstance(minimum.spec, AuditSpec) and minimum.spec.out is not None
    with np.load(Path(minimum.spec.out) / "samples.npz", allow_pickle=False) as table:
        sizes = np.where(table[f"{_MINIMUM}/success"], table[f"{_MINIMUM}/relative"], np.inf)
        return np.where(table[f"{_MINIMUM}/correct"], sizes, 0.0)


def _prefixed(name: str, notify: Notify) -> Notify:
    def told(event: Event) -> None:
        notify(replace(event, stage=f"{name}: {event.stage}"))

    return told
