"""Work in a process of its own, which cannot take the service down: limits of time and memory, and a way to stop it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_LOOK = 0.25  # seconds between two looks at a process
_GRACE = 1.5  # seconds to write down what was finished, once asked to stop
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        status: Its exit status; negative: the signal that ended it.
        stopped: What made us end it.
        reason: The same in a sentence.
    """

    status: int
    stopped: Literal["time", "memory", "asked"] | None = None
    reason: str = ""


def supervised(
    module: str,
    arguments: Sequence[str],
    *,
    log: Path,
    place: Path,
    timeout: float,
    memory: int,
    asked: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run `python -m module arguments` to its end, or end it.

    The process holds the other end of a pipe to us: it ends by itself when we are gone (see `leave_with_parent`).

    Args:
        module: What to run.
        arguments: Its arguments.
        log: Where its output goes.
        place: The folder it runs in.
        timeout: Seconds it may run.
        memory: Bytes of memory it may use, with its children.
        asked: Whether it shall be stopped; asked several times a second.
    """
    started = time.monotonic()
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=place,
            start_new_session=True,
        )
    stopped: Literal["time", "memory", "asked"] | None = None
    reason = ""
    try:
        while process.poll() is None:
            if asked():
                stopped, reason = "asked", "cancelled"
            elif time.monotonic() - started > timeout:
                stopped, reason = "time", f"ran longer than {timeout:g} seconds"
            elif (used := _memory(process.pid)) > memory:
                stopped = "memory"
                reason = f"ran out of memory: it used {used / 2**20:,.0f} MiB and may use {memory / 2**20:,.0f}"
            if stopped is not None:
                break
            time.sleep(_LOOK)
    finally:
        _end(process, at_once=stopped == "memory")
    return Ended(process.returncode, stopped, reason)


def leave_with_parent() -> None:
    """End this process when the one that started it is gone: nobody would take what it finds."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(70)

    threading.Thread(target=wait, daemon=True).start()


def _end(process: "subprocess.Popen[bytes]", *, at_once: bool) -> None:
    """Ask a process and its children to stop; then stop them."""
    if process.poll() is None and not at_once:
        _signal(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    _signal(process, signal.SIGKILL)  # children that it left, too
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _memory(leader: int) -> int:
    """Bytes of memory that the processes of a session use; 0 where the system does not tell."""
    used = 0
    try:
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                used += _resident(int(entry.name), leader)
    except OSError:
        return 0
    return used


def _resident(pid: int, session: int) -> int:
    try:
        if os.getsid(pid) != session:
            return 0
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0
