"""A deployment of the service for tests: its table and real workers, ended with the test.

The workers of `Deployment` run jobs that only play (see `play`): what is tested is how jobs are run, and a process that
does not load torch starts at once. `Deployment(..., real=True)` runs jobs as they are.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rempart.report.schema import AnySpec, AttackChoice, AttackSpec
from rempart.serve.jobs import Job, Jobs
from rempart.serve.settings import Settings, prepared

ROOT = Path(__file__).resolve().parents[2]
ENDED = ("done", "failed", "cancelled", "dead")


def environment() -> dict[str, str]:
    """Of processes that a test starts: this source, one thread."""
    places = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    return {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def until(true: Callable[[], Any], seconds: float = 60.0, what: str = "it") -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"{what} did not happen within {seconds:g} seconds"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Worker:
    process: subprocess.Popen
    log: Path

    def kill(self) -> None:
        """As `kill -9`."""
        self.process.kill()
        self.process.wait()

    def leave(self, seconds: float = 15.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@dataclass
class Deployment:
    settings: Settings
    real: bool = False
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = prepared(self.settings)
        self.jobs = Jobs.of(self.settings)

    def worker(self, **changes: Any) -> Worker:
        """Start one that takes jobs when this returns."""
        told = {name: getattr(self.settings, name) for name in ("database", "jobs", "timeout", "memory", "attempts")}
        told |= {"folder": str(self.settings.folder), **changes}
        log = self.settings.folder.parent / f"worker{len(self.workers)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "serve.worker_of_tests", json.dumps(told), "" if self.real else "serve.play"],
                env=environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.workers.append(Worker(process, log))
        until(lambda: "ready" in log.read_text() or process.poll() is not None, what="the start of a worker")
        assert process.poll() is None, log.read_text()
        return self.workers[-1]

    def submit(self, script: str | AnySpec, key: str | None = None) -> str:
        """Queue a job: what it plays, or a spec."""
        if isinstance(script, str):
            attack = AttackChoice(name="fgsm", options={})
            spec: AnySpec = AttackSpec(model=script, data="digits", threat="linf:0.1", attack=attack, out="x.npz")
        else:
            spec = script
        return self.jobs.submit({"kind": spec.kind, "what": str(script)}, spec, user="someone", key=key)[0].id

    def folder(self, id: str) -> Path:
        return self.settings.folder / "jobs" / id

    def state(self, id: str) -> str:
        return self.jobs.find(id).state

    def wait(self, id: str, *states: str, seconds: float = 60.0) -> Job:
        wanted = states or ENDED
        until(lambda: self.state(id) in wanted, seconds, f"{id} {wanted}, it is {self.state(id)}:")
        return self.jobs.find(id)

    def noted(self, id: str, what: str) -> list[dict[str, Any]]:
        """Attempts of a job that begun, were left or died."""
        path = self.folder(id) / "attempts.jsonl"
        lines = path.read_text().split("\n") if path.exists() else []
        return [entry for line in lines if line and (entry := json.loads(line))["what"] == what]

    def played(self, id: str) -> list[str]:
        """What a job wrote down while it played, a line each."""
        path = self.folder(id) / "played.txt"
        return path.read_text().split() if path.exists() else []

    def processes(self, id: str) -> list[int]:
        """Processes that are at a job."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and f"jobs/{id}".encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        self.jobs.table.destroy()
