"""Reports on disk: report.json, and the page made from it."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from rempart.core.disk import replace
from rempart.core.errors import DataError, SpecError
from rempart.report.html import page
from rempart.report.schema import SCHEMA_VERSION, AnySpec, Explained, Report, Spec, fault

JSON = "report.json"
HTML = "report.html"


def write(report: Report, directory: str | Path) -> Path:
    """Write report.json, then report.html, and return the path of the first."""
    directory = Path(directory)
    replace(directory / JSON, f"{report.model_dump_json(indent=1)}\n".encode())
    replace(directory / HTML, page(report).encode())
    return directory / JSON


def claim(directory: Path, kind: str) -> None:
    """Make the directory of a run before the work begins, and set the report of an earlier run of that kind aside.

    A run that fails then leaves no report that a gate could take for its own: the old one becomes report.json.old.

    Raises:
        SpecError: If there is a report of another kind, or files cannot be written there.
    """
    with suppress(DataError):  # none, or none that can be read
        _, raw = _load(directory / JSON)
        other = raw.get("kind", kind) if isinstance(raw, dict) else kind
        if other != kind:
            came = f"{directory}, which holds the report of another command ({other})"
            raise SpecError("a run folder of its own", got=came, hint="choose another --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / JSON).exists():
            (directory / JSON).replace(directory / f"{JSON}.old")
        (directory / HTML).unlink(missing_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        came = f"{directory} ({error.strerror})"
        raise SpecError("a folder that files can be written to", got=came, hint="choose another --out") from None


def read(path: str | Path) -> Report:
    """Read a report from its file or from the directory of its run.

    Raises:
        DataError: If there is no such file, it is not JSON, or it is not a report of this schema version.
    """
    file, raw = _load(path)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"a report of schema version {SCHEMA_VERSION}",
            got=f"{file} with {json.dumps(version)}",
            hint="read it with the version of rempart that wrote it, or run its spec again",
        )
    try:
        return Report.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise DataError("a valid report", got=f"{file}, where {fault(error)}", hint="run its spec again") from None


def read_explained(path: str | Path) -> tuple[Explained, ...]:
    """What the report of an explain run tells of each model, the first one first.

    Raises:
        DataError: As `read`, and if it is a report of another kind.
    """
    report = read(path)
    if not report.explained:
        raise DataError("the run folder of `rempart explain`", got=f"{path}, a report of kind {report.kind}")
    return report.explained


def read_spec(path: str | Path) -> AnySpec:
    """Read a spec from its own file, or from the report it led to.

    Raises:
        DataError: If there is no such file or it is not JSON.
        SpecError: If a key is missing, unknown or has a wrong value.
    """
    file, raw = _load(path)
    if isinstance(raw, dict) and "spec" in raw:
        raw = raw["spec"]
    try:
        return TypeAdapter[AnySpec](Spec).validate_python(raw)
    except ValidationError as error:
        raise SpecError("a valid spec", got=f"{file}, where {fault(error)}") from None


def _load(path: str | Path) -> tuple[Path, Any]:
    path = Path(path)
    file = path / JSON if path.is_dir() else path
    try:
        return file, from_json(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"a {JSON} or the directory of a run", got=f"{file} ({error.strerror})", hint="check the path"
        ) from None
    except ValueError as error:
        raise DataError("a file in JSON", got=f"{file} ({error})", hint=f"give the {JSON} of a run") from None
