"""A worker: takes jobs from the table, runs each in a process of its own, and takes up those of workers that died.

The table and the queue are those of DBOS. A job is a workflow whose one step is the process; what the process finished
lies in the folder of the job, so that a second attempt goes on there. Workers of one deployment share the data
directory, in which each has a file that shows it is alive.
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dbos import DBOS, DBOSConfig

from rempart.core.disk import replace
from rempart.report.schema import TrainSpec
from rempart.report.store import read_spec
from rempart.serve.child import LOG, OUTCOME, RUN, SPEC
from rempart.serve.jobs import JSON, KINDS, QUEUE, VERSION, Jobs
from rempart.serve.process import supervised
from rempart.serve.settings import Settings

ATTEMPTS = "attempts.jsonl"
_BEAT = 2.0  # seconds
_DEAD = 30.0  # seconds without a sign, of workers on other machines
_LEAVE = 10.0  # seconds for the processes of a worker that leaves
_LOW = 2**20  # bytes left on a disk that counts as full


def work(settings: Settings, *, ready: Callable[[], None] = lambda: None) -> None:
    """Take jobs until SIGTERM or SIGINT, then end the process. Jobs that run then are taken up by the next worker.

    Args:
        settings: The deployment.
        ready: Called once jobs are taken.

    Raises:
        SpecError: If the database cannot be reached.
    """
    leaving = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leaving.set())
    jobs = Jobs.of(settings)
    sign = Sign.put(settings.folder / "workers")
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
        DBOS.workflow(name=kind, max_recovery_attempts=1000)(_workflow(tries))  # attempts are counted in _attempts

    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=settings.jobs, polling_interval_sec=0.5, on_conflict="always_update")
    ready()
    while not leaving.wait(_BEAT):
        if not sign.beat():
            os._exit(70)  # others took this worker for dead and do its jobs; its processes leave with it
        for name in sign.dead():
            DBOS._recover_pending_workflows([name])
            sign.bury(name)
    tries.wait(_LEAVE)
    os._exit(0)  # threads that stand still stand for jobs that are not done


def _workflow(tries: "Tries") -> Callable[[str], dict[str, str]]:
    def job(id: str) -> dict[str, str]:
        return DBOS.run_step({"name": "attempts"}, tries.attempts, id)

    return job


class Tries:
    """What a worker does with jobs."""

    def __init__(self, settings: Settings, jobs: Jobs, leaving: threading.Event) -> None:
        self.settings, self.jobs, self.leaving = settings, jobs, leaving
        self._running: set[str] = set()
        self._lock = threading.Condition()

    def attempts(self, id: str) -> dict[str, str]:
        """Try a job until it ends, so many times at most, the attempts of other workers counted."""
        with self._lock:
            self._running.add(id)
        try:
            return self._attempts(self.settings.folder / "jobs" / id, id)
        finally:
            self._gone(id)

    def wait(self, seconds: float) -> None:
        """Wait until no process runs, so long at most."""
        with self._lock:
            self._lock.wait_for(lambda: not self._running, seconds)

    def _attempts(self, folder: Path, id: str) -> dict[str, str]:
        if not (folder / SPEC).exists():
            return {"state": "failed", "reason": "its files are gone"}
        while True:
            past = _noted(folder)
            begun = sum(entry["what"] == "begun" for entry in past)
            if begun - sum(entry["what"] == "left" for entry in past) >= self.settings.attempts:
                told = [entry["reason"] for entry in past if entry["what"] == "died"] or ["its worker died each time"]
                return {"state": "dead", "reason": f"given up after {self.settings.attempts} attempts: {told[-1]}"}
            if begun:
                _go_on(folder)
            _note(folder, what="begun")
            (folder / OUTCOME).unlink(missing_ok=True)
            ended = supervised(
                "rempart.serve.child",
                [f"jobs/{id}"],
                log=folder / LOG,
                place=self.settings.folder,
                timeout=self.settings.timeout,
                memory=self.settings.memory,
                asked=lambda: self.leaving.is_set() or self.jobs.cancelled(id),
            )
            if ended.stopped == "asked" and self.leaving.is_set():
                _note(folder, what="left")
                self._gone(id)
                threading.Event().wait()  # in the table it goes on running; the next worker takes it up
            if ended.stopped is not None:
                return {"state": "cancelled" if ended.stopped == "asked" else "failed", "reason": ended.reason}
            if (folder / OUTCOME).exists():
                return json.loads((folder / OUTCOME).read_bytes())
            if shutil.disk_usage(folder).free < _LOW:
                return {"state": "failed", "reason": "the disk of the service is full"}
            _note(folder, what="died", reason=_death(ended.status))

    def _gone(self, id: str) -> None:
        with self._lock:
            self._running.discard(id)
            self._lock.notify_all()


def _noted(folder: Path) -> list[dict[str, Any]]:
    path = folder / ATTEMPTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _note(folder: Path, **entry: str) -> None:
    with (folder / ATTEMPTS).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _go_on(folder: Path) -> None:
    """Let a training go on where it was; audits do so by themselves, and what else there is begins anew."""
    spec = read_spec(folder / SPEC)
    if isinstance(spec, TrainSpec) and not spec.resume and any((folder / RUN).glob("*")):
        replace(folder / SPEC, spec.model_copy(update={"resume": True}).model_dump_json(indent=1).encode())


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
        path = folder / f"{socket.gethostname()[:60]}.{secrets.token_hex(6)}"
        file = path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
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

    def dead(self) -> list[str]:
        """Names of workers that died."""
        now = self.path.stat().st_mtime  # by the clock of the file system, like all others
        return [path.name for path in self.path.parent.iterdir() if path != self.path and _dead(path, now)]

    def bury(self, name: str) -> None:
        """Take down the sign of a worker whose jobs were taken over."""
        (self.path.parent / name).unlink(missing_ok=True)


def _dead(path: Path, now: float) -> bool:
    try:
        if path.name.rpartition(".")[0] != socket.gethostname()[:60]:
            return now - path.stat().st_mtime > _DEAD
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
