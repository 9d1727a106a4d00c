"""`rempart serve`: the web process and the worker beside it, and what becomes of one without the other."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from rempart.core.errors import SpecError
from rempart.serve.auth import Tokens
from rempart.serve.lock import hold, holder
from rempart.serve.run import bound, command, environment, guarded
from rempart.serve.settings import LOCK, Settings, prepared
from serve.deployment import ENDED, Deployment, alive, until
from serve.deployment import environment as of_tests


@dataclass
class Web:
    """`rempart serve` in a process of its own."""

    process: subprocess.Popen
    log: Path

    @staticmethod
    def start(folder: Path, number: int) -> "Web":
        log = folder.parent / f"web{number}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "serve.web_of_tests", str(folder)],
                env=of_tests(),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        web = Web(process, log)
        until(lambda: "http" in web.told or process.poll() is not None, what="the start of the web process")
        assert process.poll() is None, web.told
        return web

    @property
    def told(self) -> str:
        return self.log.read_text()

    def get(self, path: str) -> dict:
        address = re.search(r"http://\S+", self.told)[0]
        with urllib.request.urlopen(address + path, timeout=10) as answer:
            return json.load(answer)

    def workers(self) -> list[int]:
        """Workers it started."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for path in tasks for pid in path.read_text().split()]


@pytest.fixture
def deployment(tmp_path):
    made = Deployment(Settings(folder=tmp_path / "data"))
    yield made
    made.close()


def test_web_process_and_worker_live_apart_and_are_ended_together(deployment):
    """kill -9 of the worker: a new one. kill -9 of the web process: jobs go on; the next one takes the worker over."""
    folder = deployment.settings.folder
    webs = [Web.start(folder, 0)]
    workers: list[int] = []
    try:
        first = until(lambda: holder(folder / LOCK))
        workers.append(first)
        assert [first] == webs[0].workers()
        job = deployment.submit("steps 40 0.4")
        until(lambda: deployment.played(job))
        subprocess.run(["kill", "-9", str(first)], check=True)
        second = until(lambda: (found := holder(folder / LOCK)) != first and found)
        workers.append(second)
        assert "the worker ended with status -9; it is started again in 1 seconds" in webs[0].told
        had = len(deployment.played(job))
        until(lambda: len(deployment.played(job)) > had)

        webs[0].process.kill()
        webs[0].process.wait()
        had = len(deployment.played(job))
        until(lambda: len(deployment.played(job)) > had + 2)
        assert holder(folder / LOCK) == second and alive(second)

        webs.append(Web.start(folder, 1))
        assert webs[1].get("/api/v1/ready")["jobs"] == {"queued": 0, "running": 1}
        (waiting,) = until(webs[1].workers)
        workers.append(waiting)
        others = [deployment.submit("steps 1 0.1") for _ in range(2)]
        while deployment.state(job) not in ENDED:
            assert sum(bool(deployment.processes(id)) for id in (job, *others)) <= 1
            time.sleep(0.1)
        for id in (job, *others):
            assert deployment.wait(id).state == "done"
        assert sorted(map(int, deployment.played(job))) == list(range(40))
        assert len(deployment.noted(job, "begun")) == 2  # once for the worker that was killed
        assert holder(folder / LOCK) == second and alive(waiting)

        last = deployment.submit("steps 9 0.5")
        until(lambda: deployment.played(last))
        started = time.monotonic()
        webs[1].process.send_signal(signal.SIGTERM)
        assert webs[1].process.wait(20) == 0
        assert time.monotonic() - started < 8
        assert not any(map(alive, workers)) and not deployment.processes(last)
        assert deployment.state(last) == "running"  # and the next worker takes it up
        assert "Traceback" not in webs[0].told + webs[1].told
    finally:
        for web in webs:
            web.process.kill()
            web.process.wait()
        for pid in filter(alive, workers):
            subprocess.run(["kill", "-9", str(pid)], check=False)


def test_a_worker_that_waits_leaves_with_the_web_process_that_started_it(tmp_path):
    """Or one more would be left over by each web process that is killed."""
    folder = prepared(Settings(folder=tmp_path / "data")).folder
    with hold(folder / LOCK):
        told = json.dumps({"folder": str(folder)})
        code = f"""
import os, signal, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-m", "serve.worker_of_tests", {told!r}, "serve.play", "beside-serve"])
print(process.pid, flush=True)
time.sleep(60)
"""
        parent = subprocess.Popen([sys.executable, "-c", code], env=of_tests(), stdout=subprocess.PIPE)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(3)
        assert alive(pid)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        until(lambda: not alive(pid), 5)


def test_a_lock_is_held_by_one_and_names_it(tmp_path):
    path = tmp_path / "lock"
    assert holder(path) is None
    held = hold(path)
    assert holder(path) == os.getpid()
    asked = iter([False, False, True])
    assert hold(path, given_up=lambda: next(asked)) is None
    held.close()
    assert holder(path) is None
    with hold(path) as again:
        assert again is not None and holder(path) == os.getpid()
        path.write_text("elsewhere 1")  # a process of another machine is not ours to end
        assert holder(path) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "rempart.example"])
def test_others_than_this_machine_reach_nothing_without_a_token(tmp_path, host):
    settings = prepared(Settings(folder=tmp_path))
    assert not guarded(settings, "127.0.0.1").tokens
    with pytest.raises(SpecError, match=re.escape(f"rempart token add NAME --role admin --folder {tmp_path}")):
        guarded(settings, host)
    Tokens.of(tmp_path).add("someone", "read")
    assert guarded(settings, host).tokens
    assert guarded(settings, "localhost").tokens  # for example behind a proxy


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SpecError, match=f"an address to listen on, got 127.0.0.1:{port} .*--port"):
            bound("127.0.0.1", port)


def test_the_worker_is_told_everything_and_the_password_by_its_environment(tmp_path):
    settings = Settings(folder=tmp_path, database="postgresql://u:secret@h/d", jobs=3, timeout=7.5, memory=2**28)
    assert "secret" not in " ".join(command(settings))
    assert environment(settings)["REMPART_DATABASE"] == settings.database
    told = json.loads(command(settings)[-1])
    told |= {"folder": Path(told["folder"]), "database": environment(settings)["REMPART_DATABASE"]}
    assert Settings(**told) == settings
