"""Work in a process of its own, which cannot take the service down: limits of time, memory and disk; a way to stop it.

What such a process writes down before it ends counts; that it ended, however it did, says nothing else.
"""

import os
import shutil
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
_GRACE = 1.25  # seconds to write down what was finished, once asked to stop
_PAGE = os.sysconf("SC_PAGE_SIZE")
_ROOM = 64 * 2**20  # bytes of the disk left to the service, which has to write down how it went
FULL = "the disk of the service is full"
Stop = Literal["time", "memory", "disk", "asked"]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        status: Its exit status; negative: the signal that ended it.
        stopped: What made us end it, if we did.
        reason: The same in a sentence.
    """

    status: int
    stopped: Stop | None = None
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
    until = time.monotonic() + timeout
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],  # -P: no module comes from the folder it runs in
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"},
            cwd=place,
            start_new_session=True,
        )
    stop: tuple[Stop, str] | None = None
    try:
        _sacrifice(process.pid)
        while process.poll() is None:
            if asked():
                stop = "asked", "cancelled"
            elif time.monotonic() > until:
                stop = "time", f"ran longer than {timeout:g} seconds"
            elif (used := _memory(process.pid)) > memory:
                least, most = used / 2**20, memory / 2**20
                stop = "memory", f"ran out of memory: it used {least:,.0f} MiB and may use {most:,.0f}"
            elif shutil.disk_usage(place).free < _ROOM:
                stop = "disk", FULL
            if stop is not None:
                break
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK)
    finally:
        _end(process, at_once=stop is not None and stop[0] == "memory")
    return Ended(process.returncode, *(stop or (None, "")))


def leave_with_parent() -> None:
    """End this process and its children when the one that started it is gone: nobody would take what it finds."""

    def wait() -> None:
        while os.read(0, 1024):  # not by sys.stdin, whose lock a process that ends would wait for
            pass
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(70)

    threading.Thread(target=wait, daemon=True).start()


def _sacrifice(pid: int) -> None:
    """Where the whole machine runs out of memory, let the kernel end this process before it ends the service."""
    with suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


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
