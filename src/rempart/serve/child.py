"""`python -m rempart.serve.child FOLDER`: the process of one job. Its folder holds all that goes in and comes out.

spec.json       the request, as `rempart run` takes it
events.jsonl    progress, a line each; a client that lost the connection goes on at the byte it had reached
outcome.json    how it ended
run/            what the request writes
log.txt         for the operator: what was printed, tracebacks too; clients never see it
"""

import errno
import fcntl
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rempart.core.disk import replace
from rempart.core.errors import Cancelled, RempartError
from rempart.core.events import Event
from rempart.report.store import read_spec
from rempart.serve.process import leave_with_parent

SPEC, EVENTS, OUTCOME, RUN, LOG = "spec.json", "events.jsonl", "outcome.json", "run", "log.txt"
_EVERY = 0.2  # seconds between two events of the same stage


def recorder(path: Path) -> Callable[[Event], None]:
    """What a job is told to notify: appends events to a file, the first and the last of a stage and some in between."""
    last: tuple[str, float] = ("", 0.0)

    def told(event: Event) -> None:
        nonlocal last
        now = time.time()
        if event.stage == last[0] and now - last[1] < _EVERY and event.done != event.total:
            return
        last = (event.stage, now)
        fields = {"stage": event.stage, "done": event.done, "total": event.total, "note": event.note}
        line = json.dumps({"at": round(now, 2), **fields, "values": _finite(event.values)})
        with path.open("a") as file:
            file.write(line + "\n")

    return told


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value == value and abs(value) != float("inf")}


def main(folder: Path) -> int:
    """Do the request of a folder, once no other process is at it, and write down how it ended."""
    leave_with_parent()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process of a worker that died leaves within a moment
        outcome = _done(folder)
        replace(folder / OUTCOME, json.dumps(outcome).encode())
    return 0


def _done(folder: Path) -> dict[str, Any]:
    from rempart.tasks import run

    try:
        report = run(read_spec(folder / SPEC), recorder(folder / EVENTS))
    except (KeyboardInterrupt, Cancelled):
        return {"state": "cancelled", "reason": "stopped before the end"}
    except RempartError as error:
        return {"state": "failed", "reason": _without(folder, str(error))}
    except MemoryError:
        return {"state": "failed", "reason": "ran out of memory"}
    except OSError as error:
        traceback.print_exc()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return {"state": "failed", "reason": "the disk of the service is full"}
        return {"state": "failed", "reason": f"a file could not be read or written: {error.strerror}"}
    except Exception as error:  # noqa: BLE001  the edge of the process
        traceback.print_exc()
        if "allocate memory" in str(error):  # how torch says it
            return {"state": "failed", "reason": "ran out of memory"}
        return {
            "state": "failed",
            "reason": f"failed unexpectedly ({type(error).__name__}); its log says more",
        }
    if report is None or report.complete:
        return {"state": "done", "reason": ""}
    return {"state": "cancelled", "reason": "stopped before the end"}


def _without(folder: Path, message: str) -> str:
    """A message without the places of the service's own files."""
    return message.replace(f"{folder}{os.sep}", "").replace(f"{folder.parent.parent}{os.sep}", "")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
