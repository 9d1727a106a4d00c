"""`python -m rempart.serve.look KIND PATH READING OUT` looks at an upload in a process of its own."""

import errno
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from rempart.core.disk import replace
from rempart.core.errors import DataError, ModelError, RempartError
from rempart.data import SPLITS, Data, open_data
from rempart.inspection import inspect_model
from rempart.report.schema import Reading
from rempart.serve.process import leave_with_parent, supervised
from rempart.serve.settings import Settings
from rempart.serve.store import Kind, Look

_SECONDS = 300.0


def looker(settings: Settings) -> Look:
    """What a store asks about an upload, within the limits of a deployment; two are looked at at once."""
    turns = threading.BoundedSemaphore(2)

    def look(kind: Kind, path: Path, reading: Reading) -> dict[str, Any]:
        out, log = path.parent / "look.json", path.parent / "look.log"
        arguments = [kind, str(path), reading.model_dump_json(), str(out)]
        limits: Any = {"timeout": _SECONDS, "memory": settings.memory}
        with turns:
            ended = supervised("rempart.serve.look", arguments, log=log, place=settings.folder, **limits)
        if ended.stopped == "disk":
            raise OSError(errno.ENOSPC, ended.reason)
        error = DataError if kind == "data" else ModelError
        if ended.stopped is not None or not out.exists():
            came = ended.reason or f"a file that ended the process which read it (status {ended.status})"
            raise error(
                f"a {kind} that can be read within {_SECONDS:g} seconds and {settings.memory:,} bytes", got=came
            )
        found: dict[str, Any] = json.loads(out.read_bytes())
        out.unlink()
        log.unlink()
        if "expected" in found:
            raise error(found["expected"], got=found["got"], hint=found["hint"])
        return found

    return look


def looked(kind: str, path: str, reading: Reading) -> dict[str, Any]:
    """What an upload is, as a card holds it.

    Raises:
        RempartError: If it is unusable or unsafe.
    """
    if kind == "model":
        return json.loads(inspect_model(path, reading).model_dump_json(exclude={"model": {"source"}}))
    splits: dict[str, Data] = {}
    for name in SPLITS:
        try:
            data = open_data(path, split=name)
        except DataError:
            continue
        splits[data.split] = data  # what has one split answers to every name
    if not splits:
        open_data(path)  # says what is wrong
    first = next(iter(splits.values()))
    first.batch(first.index[:1])  # whether its images can be read at all
    return {
        "shape": list(first.shape),
        "classes": list(first.class_names),
        "unit": first.unit,
        "splits": {
            name: {"images": len(data), "classes": dict(Counter(data.class_names[i] for i in data.labels.tolist()))}
            for name, data in splits.items()
        },
    }


def main(kind: str, path: str, reading: str, out: str) -> None:
    """Write what was found, or why it was refused."""
    leave_with_parent()
    try:
        found = looked(kind, path, Reading.model_validate_json(reading))
    except RempartError as error:
        inside = str(Path(path).parent)
        parts = {"expected": error.expected, "got": str(error.got), "hint": error.hint}
        found = {name: text.replace(inside + "/", "") for name, text in parts.items()}
    replace(Path(out), json.dumps(found).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
