"""A worker: takes jobs from the table, runs each in a process of its own, and takes up those of workers that died.

The table and the queue are those of DBOS. A job is a workflow that tries its process until it ends; what the process
finished lies in the folder of the job, so that a second attempt goes on there. Workers of one deployment share the data
directory, in which each has a file that shows it is alive.
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dbos import DBOS, DBOSConfig

from rempart.core.disk import replace
from rempart.serve.child import LOG, OUTCOME, RUN, SPEC, Outcome, ended, fault
from rempart.serve.jobs import JSON, KINDS, QUEUE, VERSION, Jobs
from rempart.serve.lock import hold
from rempart.serve.process import supervised
from rempart.serve.settings import DATABASE, LOCK, Settings

ATTEMPTS = "attempts.jsonl"
CHILD = "rempart.serve.child"
_BEAT = 1.0  # seconds
_DEAD = 30.0  # seconds without a sign, of workers on other machines
_LEAVE = 10.0  # seconds for the processes of a worker that leaves
_UNTOLD = 5.0  # seconds in which the table hears of the outcome of a job


def work(settings: Settings, *, beside_serve: bool = False, ready: Callable[[], None] = lambda: None) -> None:
    """Take jobs until SIGTERM or SIGINT, then end the process. Jobs that run then are taken up by the next worker.

    Args:
        settings: The deployment, prepared.
        beside_serve: Whether it is the one worker of `rempart serve`: it waits until another one leaves.
        ready: Called once jobs are taken.

    Raises:
        SpecError: If the database cannot be reached.
    """
    leaving = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leaving.set())
    parent = os.getppid()
    if beside_serve:
        lock = hold(settings.folder / LOCK, given_up=lambda: _forsaken(leaving, parent))
        if lock is None:
            return
    jobs = Jobs.of(settings)
    sign = Sign.put(settings.folder / "workers")
    threading.Thread(target=_beat, args=(sign,), daemon=True).start()
    config: DBOSConfig = {
        "name": "rempart",
        "system_database_url": settings.url,
        "executor_id": sign.name,
        "application_version": VERSION,
        "serializer": JSON,
        "log_level": "CRITICAL",
    }
    DBOS(config=config)
    tries = Tries(settings, jobs, leaving)
    for kind in KINDS:
        DBOS.workflow(name=kind, max_recovery_attempts=1_000_000)(_workflow(tries))  # attempts are counted in `Tries`
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=settings.jobs, polling_interval_sec=0.5, on_conflict="always_update")
    ready()
    while not leaving.wait(_BEAT):
        _take_over(jobs, sign, tries)
    tries.wait(_LEAVE)
    os._exit(0)  # threads that stand still stand for jobs that are not done


def _forsaken(leaving: threading.Event, parent: int) -> bool:
    """Whether a worker that waits is needed no more: told to leave, or without who started it."""
    return leaving.is_set() or os.getppid() != parent


def _workflow(tries: "Tries") -> Callable[[str], dict[str, str]]:
    def job(id: str) -> dict[str, str]:
        return tries.attempts(id).model_dump()

    return job


def _beat(sign: "Sign") -> None:
    while sign.beat():
        time.sleep(_BEAT)
    os._exit(70)  # others took this worker for dead and do its jobs; its processes leave with it


def _take_over(jobs: Jobs, sign: "Sign", tries: "Tries") -> None:
    """Queue again what runs at workers that are dead, and what ended here without the table having heard of it."""
    try:
        running = jobs.running()  # before the signs: a worker puts up its sign before it takes a job
        living = sign.living()
        for name, ids in running.items():
            for id in tries.untold(ids) if name == sign.name else () if name in living else ids:
                jobs.requeue(id, name)
    except Exception:  # noqa: BLE001  the table cannot be reached: the next time
        return


class Tries:
    """What a worker does with jobs."""

    def __init__(self, settings: Settings, jobs: Jobs, leaving: threading.Event) -> None:
        self.settings, self.jobs, self.leaving = settings, jobs, leaving
        self._running: set[str] = set()
        self._ended: dict[str, float] = {}
        self._lock = threading.Condition()

    def attempts(self, id: str) -> Outcome:
        """Try a job until it ends, so many times at most, the attempts of other workers counted."""
        folder = self.settings.folder / "jobs" / id
        with self._lock:
            self._running.add(id)
        try:
            outcome = self._attempts(folder, id)
        except OSError as error:
            outcome = Outcome(state="failed", reason=fault(error))
        except Exception as error:  # noqa: BLE001  the edge of the worker
            traceback.print_exc()
            outcome = Outcome(state="failed", reason=f"failed unexpectedly in the worker ({type(error).__name__})")
        if outcome is not None and folder.exists():
            with suppress(OSError):
                replace(folder / OUTCOME, outcome.model_dump_json().encode())
        with self._lock:
            self._running.discard(id)
            self._ended[id] = time.monotonic()
            self._lock.notify_all()
        if outcome is None:
            threading.Event().wait()  # in the table it goes on running; the next worker takes it up
            raise AssertionError
        return outcome

    def wait(self, seconds: float) -> None:
        """Wait until no process runs, so long at most."""
        with self._lock:
            self._lock.wait_for(lambda: not self._running, seconds)

    def untold(self, running: frozenset[str]) -> list[str]:
        """Of jobs that run here by the table, those that ended a while ago: it was away when it should have heard."""
        since = time.monotonic() - _UNTOLD
        with self._lock:
            self._ended = {id: at for id, at in self._ended.items() if id in running and id not in self._running}
            return [id for id, at in self._ended.items() if at < since]

    def _attempts(self, folder: Path, id: str) -> Outcome | None:
        """The outcome; None if this worker leaves before there is one."""
        while not self.leaving.is_set():
            if not (folder / SPEC).exists():
                return Outcome(state="failed", reason="its files are gone")
            if (outcome := ended(folder)) is not None:
                return outcome
            past = _noted(folder)
            begun = sum(entry["what"] == "begun" for entry in past)
            if begun - sum(entry["what"] == "left" for entry in past) >= self.settings.attempts:
                told = [entry["reason"] for entry in past if entry["what"] == "died"] or ["its worker died each time"]
                return Outcome(state="dead", reason=f"given up after {self.settings.attempts} attempts: {told[-1]}")
            if begun:
                _go_on(folder)
            _note(folder, what="begun")
            end = supervised(
                CHILD,
                [f"jobs/{id}"],
                log=folder / LOG,
                place=self.settings.folder,
                timeout=self.settings.timeout,
                memory=self.settings.memory,
                asked=lambda: self.leaving.is_set() or self.jobs.cancelled(id),
            )
            if end.stopped is None:
                if ended(folder) is None:
                    _note(folder, what="died", reason=_death(end.status))
            elif end.stopped != "asked":
                return ended(folder) or Outcome(state="failed", reason=end.reason)
            elif not self.jobs.cancelled(id):
                _note(folder, what="left")
            else:
                if self.jobs.gone(id):
                    shutil.rmtree(folder, ignore_errors=True)  # deleted before its process had ended
                return Outcome(state="cancelled", reason=end.reason)
        return None


def _noted(folder: Path) -> list[dict[str, Any]]:
    """What was noted of attempts; half a line, of a full disk, does not count."""
    found: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        for line in (folder / ATTEMPTS).read_text().splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def _note(folder: Path, **entry: str) -> None:
    with (folder / ATTEMPTS).open("a") as file:
        file.write("\n" + json.dumps({"at": round(time.time(), 3), **entry}))


def _go_on(folder: Path) -> None:
    """Let a training go on where it was; audits do so by themselves, and what else there is begins anew."""
    spec = json.loads((folder / SPEC).read_bytes())
    if spec["kind"] == "train" and any((folder / RUN).glob("*")):
        replace(folder / SPEC, json.dumps({**spec, "resume": True}, indent=1).encode())


def _death(status: int) -> str:
    if status == -signal.SIGKILL:
        return "its process was killed, most likely for want of memory"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


@dataclass(frozen=True, slots=True)
class Sign:
    """The file by which the other workers see that this one is alive.

    On one machine the lock on it tells, which a worker loses at once when it dies; between machines its age does.
    """

    path: Path
    file: BinaryIO

    @staticmethod
    def put(folder: Path) -> "Sign":
        """Put up a sign."""
        path = folder / f"{_host()}.{secrets.token_hex(6)}"
        hidden = path.with_name(f".{path.name}")
        file = hidden.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        hidden.rename(path)  # nobody sees it without its lock
        return Sign(path, file)

    @property
    def name(self) -> str:
        """The name of this worker."""
        return self.path.name

    def beat(self) -> bool:
        """Say that this worker is alive; False if others took it for dead."""
        try:
            os.utime(self.path)
        except FileNotFoundError:
            return False
        return True

    def living(self) -> set[str]:
        """Names of the workers that are alive; the signs of others are taken down."""
        now = self.path.stat().st_mtime  # by the clock of the file system, like all others
        found = {self.name}
        for path in self.path.parent.glob("[!.]*"):
            if path != self.path and _dead(path, now):
                path.unlink(missing_ok=True)
            else:
                found.add(path.name)
        return found


def _host() -> str:
    return socket.gethostname()[:60]


def _dead(path: Path, now: float) -> bool:
    try:
        if path.name.rpartition(".")[0] != _host():
            return now - path.stat().st_mtime > _DEAD
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False


if __name__ == "__main__":  # the worker of `rempart serve`
    told: dict[str, Any] = json.loads(sys.argv[1])
    told |= {"folder": Path(told["folder"]), "database": os.environ.get(DATABASE)}
    work(Settings(**told), beside_serve=True)
