"""`python -m rempart.serve.child FOLDER`: the process of one job. Its folder holds all that goes in and comes out.

spec.json       the request, as `rempart run` takes it
events.jsonl    progress, a line each; a client that lost the connection goes on at the byte it had reached
outcome.json    how it ended, if it came to an end of its own
run/            what the request writes
log.txt         for the operator: what was printed, tracebacks too; clients never see it
"""

import errno
import fcntl
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from rempart.core.disk import replace
from rempart.core.errors import Cancelled, RempartError
from rempart.core.events import Event
from rempart.core.foreign import stop
from rempart.serve.process import FULL, leave_with_parent

_MEMORY = "ran out of memory"
SPEC, EVENTS, OUTCOME, RUN, LOG = "spec.json", "events.jsonl", "outcome.json", "run", "log.txt"
_EVERY = 0.2  # seconds between two events of the same stage


class Outcome(BaseModel, frozen=True, extra="forbid"):
    """How a job ended.

    Attributes:
        state: done; failed; cancelled; dead: its process died at each attempt.
        reason: Why it is not done.
    """

    state: Literal["done", "failed", "cancelled", "dead"]
    reason: str = ""


def recorder(path: Path) -> Callable[[Event], None]:
    """What a job is told to notify: appends events to a file, the first and the last of a stage and some in between."""
    last: tuple[str, float] = ("", 0.0)
    if path.exists() and not path.read_bytes().endswith(b"\n"):  # half a line of a process that was killed
        with path.open("ab") as file:
            file.write(b"\n")

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
    """Do the request of a folder and write down how it ended, unless another process did; no two are at it at once."""
    leave_with_parent()
    signal.signal(signal.SIGINT, stop)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a process of a worker that died leaves within a moment
        if ended(folder) is None and (outcome := _done(folder)) is not None:
            replace(folder / OUTCOME, outcome.model_dump_json().encode())
    return 0


def ended(folder: Path) -> Outcome | None:
    """How the request of a folder ended; None if it did not yet."""
    try:
        return Outcome.model_validate_json((folder / OUTCOME).read_bytes())
    except FileNotFoundError:
        return None


def fault(error: OSError) -> str:
    """What went wrong with a file, for clients: no path of ours is in it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FULL
    return f"a file could not be read or written: {error.strerror}"


def _done(folder: Path) -> Outcome | None:
    """Do the request; None if it was stopped, which whoever stopped it writes down."""
    from rempart.report.store import read_spec
    from rempart.tasks import run  # loads torch, which a worker does without

    try:
        report = run(read_spec(folder / SPEC), recorder(folder / EVENTS))
    except (KeyboardInterrupt, Cancelled):
        return None
    except RempartError as error:
        full = os.strerror(errno.ENOSPC) in str(error)
        return Outcome(state="failed", reason=FULL if full else _without(folder, str(error)))
    except MemoryError:
        return Outcome(state="failed", reason=_MEMORY)
    except OSError as error:
        traceback.print_exc()
        return Outcome(state="failed", reason=fault(error))
    except Exception as error:  # noqa: BLE001  the edge of the process
        traceback.print_exc()
        if "allocate memory" in str(error):  # how torch says it
            return Outcome(state="failed", reason=_MEMORY)
        return Outcome(state="failed", reason=f"failed unexpectedly ({type(error).__name__}); its log says more")
    return Outcome(state="done") if report is None or report.complete else None


def _without(folder: Path, message: str) -> str:
    """A message without the places of the service's own files."""
    for place in (folder, folder.resolve(), folder.resolve().parents[1]):
        message = message.replace(f"{place}{os.sep}", "")
    return message


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
