"""How jobs are run: real workers and real processes, which only play their work."""

import json
import os
import threading
import time

import pytest

from rempart.serve import worker
from rempart.serve.child import OUTCOME, SPEC
from rempart.serve.process import Ended
from rempart.serve.settings import Settings
from rempart.serve.worker import Sign
from serve.deployment import Deployment, alive, until


@pytest.fixture
def deployment(tmp_path):
    made = Deployment(Settings(folder=tmp_path / "data"))
    yield made
    made.close()


def test_a_killed_worker_loses_no_job_and_does_nothing_twice(deployment):
    """The next worker takes up what ran; what was finished stays, and the process of the dead worker is gone."""
    first = deployment.worker()
    running, queued = deployment.submit("steps 8 0.4"), deployment.submit("steps 1 0")
    until(lambda: len(deployment.played(running)) >= 3)
    child = deployment.processes(running)
    first.kill()
    until(lambda: not any(map(alive, child)), 5, "the end of the process of a dead worker")
    before = deployment.played(running)
    assert deployment.state(running) == "running"
    deployment.worker()
    assert deployment.wait(running).state == deployment.wait(queued).state == "done"
    after = deployment.played(running)
    assert after[: len(before)] == before
    assert sorted(after) == [str(step) for step in range(8)]  # each once
    assert len(deployment.noted(running, "begun")) == 2
    assert len(deployment.noted(queued, "begun")) == 1


def test_what_ended_when_nobody_could_say_so_is_not_done_again(deployment):
    """The process had written its outcome; the worker died before the table had it."""
    id = deployment.submit("die 1")
    (deployment.folder(id) / "outcome.json").write_text(json.dumps({"state": "done", "reason": ""}))
    deployment.worker()
    assert deployment.wait(id).state == "done"
    assert not deployment.noted(id, "begun")


def test_a_process_that_dies_is_tried_again_and_given_up_after_three(deployment):
    deployment.worker(jobs=3)
    once, always, other = (deployment.submit(script) for script in ("die 1", "die 9", "exit 3"))
    assert deployment.wait(once).state == "done"
    assert len(deployment.played(once)) == 2
    dead = deployment.wait(always)
    assert dead.state == "dead"
    assert dead.reason == ("given up after 3 attempts: its process was killed, most likely for want of memory")
    assert len(deployment.played(always)) == 3
    assert deployment.wait(other).reason == "given up after 3 attempts: its process ended with status 3"


def test_a_worker_that_kills_itself_with_its_job_is_given_up_too(deployment):
    """Each attempt counts when it begins: a job that takes its worker along is no endless loop."""
    id = deployment.submit("steps 1 30")
    for _ in range(3):
        worker = deployment.worker()
        begun = len(deployment.noted(id, "begun"))
        until(lambda begun=begun: len(deployment.noted(id, "begun")) > begun)
        worker.kill()
    deployment.worker()
    dead = deployment.wait(id)
    assert (dead.state, dead.reason) == ("dead", "given up after 3 attempts: its worker died each time")


def test_two_workers_share_the_jobs_and_run_each_once(deployment):
    ids = [deployment.submit("steps 2 0.1") for _ in range(8)]
    deployment.worker()
    deployment.worker()
    for id in ids:
        assert deployment.wait(id).state == "done"
        assert deployment.played(id) == ["0", "1"]
        assert len(deployment.noted(id, "begun")) == 1


def test_no_worker_runs_more_jobs_at_once_than_asked(deployment):
    ids = [deployment.submit("steps 3 0.2") for _ in range(5)]
    deployment.worker(jobs=2)
    most = 0
    while any(deployment.state(id) != "done" for id in ids):
        most = max(most, sum(bool(deployment.processes(id)) for id in ids))
        time.sleep(0.05)
    assert most == 2


def test_a_worker_that_leaves_hands_its_jobs_to_the_next(deployment):
    first = deployment.worker()
    id = deployment.submit("steps 6 0.4")
    until(lambda: len(deployment.played(id)) >= 2)
    started = time.monotonic()
    assert first.leave() == 0
    assert time.monotonic() - started < 5
    assert not deployment.processes(id)
    assert deployment.state(id) == "running"
    deployment.worker()
    assert deployment.wait(id).state == "done"
    assert sorted(deployment.played(id)) == [str(step) for step in range(6)]
    assert len(deployment.noted(id, "left")) == 1  # which is no attempt that failed


def test_a_job_outlives_any_number_of_workers_that_leave(deployment):
    id = deployment.submit("steps 8 0.25")
    for _ in range(4):
        worker = deployment.worker()
        had = len(deployment.played(id))
        until(lambda had=had: len(deployment.played(id)) > had)
        worker.leave()
    deployment.worker()
    assert deployment.wait(id).state == "done"
    assert sorted(map(int, deployment.played(id))) == list(range(8))


@pytest.mark.parametrize("script", ["steps 9 0.5", "deaf"])
def test_a_cancelled_job_is_gone_within_two_seconds(deployment, script):
    """Also where the process hears no request to stop, and its worker says nothing and goes on with the next job."""
    worker = deployment.worker()
    id = deployment.submit(script)
    until(lambda: deployment.played(id))
    child = deployment.processes(id)
    started = time.monotonic()
    assert deployment.jobs.cancel(id).state == "cancelled"
    until(lambda: not any(map(alive, child)), 10)
    assert time.monotonic() - started < 2
    assert deployment.wait(deployment.submit("steps 1 0")).state == "done"
    assert deployment.state(id) == "cancelled"
    assert worker.log.read_text() == "ready\n"  # no traceback


def test_a_queued_job_is_cancelled_at_once_and_never_begun(deployment):
    id, next = deployment.submit("steps 1 0"), deployment.submit("steps 1 0")
    assert deployment.jobs.cancel(id).state == "cancelled"
    deployment.worker()
    assert deployment.wait(next).state == "done"
    assert deployment.state(id) == "cancelled"
    assert not deployment.noted(id, "begun")


def test_a_job_deleted_while_its_process_ends_leaves_nothing(deployment):
    deployment.worker()
    id = deployment.submit("deaf")
    until(lambda: deployment.played(id))
    deployment.jobs.cancel(id)
    deployment.jobs.remove(id)
    assert deployment.wait(deployment.submit("steps 1 0")).state == "done"
    assert not deployment.folder(id).exists()
    assert not list((deployment.settings.folder / "incoming").iterdir())


def test_limits_of_time_and_memory_end_one_job_and_no_other(deployment):
    deployment.worker(jobs=3, timeout=2.0, memory=200 * 2**20)
    slow, greedy, small = (deployment.submit(script) for script in ("steps 9 1", "eat", "steps 2 0.1"))
    assert deployment.wait(small).state == "done"
    job = deployment.wait(slow)
    assert (job.state, job.reason) == ("failed", "ran longer than 2 seconds")
    job = deployment.wait(greedy)
    assert job.state == "failed"
    assert job.reason.startswith("ran out of memory: it used ") and job.reason.endswith("MiB and may use 200")
    assert deployment.wait(deployment.submit("steps 1 0")).state == "done"
    assert json.loads((deployment.folder(slow) / "outcome.json").read_text())["state"] == "failed"  # whoever asks again


def test_reasons_are_told_without_places_of_the_service(deployment):
    deployment.worker()
    full, refused = deployment.submit("full"), deployment.submit("refuse")
    assert deployment.wait(full).reason == "the disk of the service is full"
    assert deployment.wait(refused).reason == "expected something else, got run/x"


def test_a_queued_job_without_files_fails_and_takes_nothing_along(deployment):
    id, next = deployment.submit("steps 1 0"), deployment.submit("steps 1 0")
    for path in deployment.folder(id).iterdir():
        path.unlink()
    deployment.folder(id).rmdir()
    deployment.worker()
    assert deployment.wait(next).state == "done"
    job = deployment.wait(id)
    assert (job.state, job.reason, job.request) == ("failed", "its files are gone", {})
    assert not deployment.folder(id).exists()
    deployment.jobs.remove(id)


def test_half_a_line_at_the_end_of_the_events_spoils_no_other(deployment):
    id = deployment.submit("steps 2 0")
    whole = b'{"at": 1.0, "stage": "before", "done": 1, "total": 2, "note": "", "values": {}}\n'
    path = deployment.folder(id) / "events.jsonl"
    path.write_bytes(whole + b'{"at": 1.0, "sta')
    assert [(at, event["stage"]) for at, event in deployment.jobs.events(id)] == [(len(whole), "before")]
    deployment.worker()
    assert deployment.wait(id).progress["stage"] == "step 1"
    found = list(deployment.jobs.events(id, len(whole)))
    assert [event["stage"] for _, event in found] == ["step 0", "step 1"]
    assert found[-1][0] == path.stat().st_size


def test_a_worker_whose_sign_was_taken_down_leaves(deployment):
    """Others took it for dead and do its jobs: it ends, and its processes with it."""
    first = deployment.worker()
    id = deployment.submit("steps 4 0.5")
    until(lambda: deployment.played(id))
    (sign,) = (deployment.settings.folder / "workers").iterdir()
    sign.unlink()
    assert first.process.wait(10) == 70
    until(lambda: not deployment.processes(id), 5)
    deployment.worker()
    assert deployment.wait(id).state == "done"
    assert sorted(deployment.played(id)) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("stopped", ["time", "memory", "disk"])
def test_a_limit_that_comes_after_the_end_changes_nothing(tmp_path, monkeypatch, stopped):
    """Between what a process writes down last and its leaving there is time, too."""
    folder = tmp_path / "jobs" / "a"
    folder.mkdir(parents=True)
    (folder / SPEC).write_text('{"kind": "audit"}')

    def supervised(*_, **__):
        (folder / OUTCOME).write_text('{"state": "done"}')
        return Ended(-9, stopped, "too much")

    monkeypatch.setattr(worker, "supervised", supervised)
    tries = worker.Tries(Settings(folder=tmp_path), None, threading.Event())
    assert tries.attempts("a").state == "done"


def test_signs_of_this_machine_tell_by_their_lock_and_of_others_by_their_age(tmp_path):
    mine, other = Sign.put(tmp_path), Sign.put(tmp_path)
    far, gone = tmp_path / "elsewhere.0123", tmp_path / "elsewhere.4567"
    far.touch()
    gone.touch()
    now = mine.path.stat().st_mtime
    os.utime(far, (now - 20, now - 20))
    os.utime(gone, (now - 40, now - 40))
    assert mine.living() == {mine.name, other.name, far.name}
    os.utime(other.path, (now - 1000, now - 1000))  # asleep, and alive
    assert other.name in mine.living()
    other.file.close()
    assert mine.living() == {mine.name, far.name}
    assert not gone.exists() and not other.path.exists()
    assert mine.beat() and not other.beat()
    mine.file.close()
