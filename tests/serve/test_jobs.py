"""Jobs as the web process sees them: no worker is needed."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.exc import OperationalError

from rempart.core.errors import SpecError
from rempart.report.schema import AttackChoice, AttackSpec, AuditSpec, TrainSpec
from rempart.serve import jobs as module
from rempart.serve.errors import Conflict, Missing, Unavailable
from rempart.serve.jobs import Jobs
from rempart.serve.settings import Settings, prepared

ATTACK = AttackSpec(model="m", data="digits", threat="linf:0.1", attack=AttackChoice(name="fgsm", options={}), out="x")
AUDIT = AuditSpec(model="m", data="digits", threat="linf:0.1", suite="fast")
TRAIN = TrainSpec(data="digits", model="mlp", out="x")


@pytest.fixture
def jobs(tmp_path):
    made = Jobs.of(prepared(Settings(folder=tmp_path / "data")))
    yield made
    made.table.destroy()


def submit(jobs, spec=ATTACK, request=None, user="someone", key=None):
    return jobs.submit({"kind": spec.kind} if request is None else request, spec, user=user, key=key)


def test_a_job_keeps_what_was_asked_by_whom_and_writes_to_its_own_folder(jobs):
    for spec, out in ((AUDIT, "run"), (TRAIN, "run"), (ATTACK, "run/adversarial.npz")):
        job, new = submit(jobs, spec, {"asked": [1, 2]}, "alice")
        assert new and (job.kind, job.state, job.request, job.user) == (spec.kind, "queued", {"asked": [1, 2]}, "alice")
        assert job.progress is None and job.ended is None
        written = json.loads((jobs.folder(job.id) / "spec.json").read_text())
        assert written == spec.model_copy(update={"out": f"jobs/{job.id}/{out}"}).model_dump(mode="json")
        assert jobs.find(job.id) == job


def test_the_second_request_with_a_key_gets_the_job_of_the_first(jobs):
    job, new = submit(jobs, request={"n": 1}, key="mine")
    again, twice = submit(jobs, request={"n": 1}, key="mine")
    assert (new, twice) == (True, False) and again == job
    with pytest.raises(Conflict, match="the request that this Idempotency-Key came with before, got another one"):
        submit(jobs, request={"n": 2}, key="mine")
    assert submit(jobs, request={"n": 2}, user="another", key="mine")[0].id != job.id  # keys are their user's
    assert submit(jobs, request={"n": 1})[0].id != job.id
    assert len(jobs.list()) == 3


def test_of_many_at_once_with_one_key_one_makes_the_job(jobs):
    """Half of them ask for something else: they agree on one request, and the files are those of that one."""
    ready = threading.Barrier(16)

    def ask(n):
        ready.wait()
        try:
            return submit(jobs, request={"n": n % 2}, key="mine")
        except Conflict:
            return None

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(16)))
    (job,) = jobs.list()
    assert [answer is not None for answer in found] == [n % 2 == job.request["n"] for n in range(16)]
    assert {answer[0].id for answer in found if answer} == {job.id}
    assert sum(answer[1] for answer in found if answer) == 1
    assert [path.name for path in (jobs.settings.folder / "jobs").iterdir()] == [job.id]


def test_a_request_that_was_cut_off_before_the_table_had_it_can_be_sent_again(jobs, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    with monkeypatch.context() as away:
        away.setattr(type(jobs.table), "enqueue", lambda *_: raising())
        with pytest.raises(Unavailable, match="a table of jobs that answers"):
            submit(jobs, key="mine")
    assert jobs.list() == []
    job, _ = submit(jobs, key="mine")
    assert jobs.list() == [job]


def raising(told="the database system is starting up"):
    raise OperationalError("", {}, Exception(told))


def test_a_database_that_comes_back_is_waited_for(jobs, monkeypatch):
    real, left = type(jobs.table).list_workflows, [3]

    def listed(*args, **options):
        if left[0]:
            left[0] -= 1
            raising()
        return real(*args, **options)

    monkeypatch.setattr(type(jobs.table), "list_workflows", listed)
    assert jobs.list() == [] and left == [0]


@pytest.mark.parametrize("told", ["database or disk is full", "could not extend file: No space left on device"])
def test_a_full_disk_is_told_at_once(jobs, monkeypatch, told):
    monkeypatch.setattr(type(jobs.table), "enqueue", lambda *_: raising(told))
    started = time.monotonic()
    with pytest.raises(OSError, match=r"No space left|the disk of the service is full"):
        submit(jobs)
    assert time.monotonic() - started < 2


def test_jobs_are_listed_by_kind_the_newest_first(jobs):
    made = [submit(jobs, spec)[0] for spec in (AUDIT, TRAIN, AUDIT, ATTACK, AUDIT)]
    assert [job.id for job in jobs.list()] == [job.id for job in reversed(made)]
    assert [job.created for job in made] == sorted({job.created for job in made})  # to the millisecond
    assert [job.id for job in jobs.list(kind="audit")] == [made[4].id, made[2].id, made[0].id]
    assert len(jobs.list(kind="audit", limit=2)) == 2 and len(jobs.list(offset=3)) == 2
    jobs.cancel(made[0].id)
    assert jobs.counts() == {"queued": 4, "running": 0}


def test_an_id_of_nothing_is_missing_whatever_it_is(jobs):
    for id in ("0" * 32, "", "..", "../..", "%2e%2e", "x" * 1000, "0" * 31 + "/"):
        for ask in (jobs.find, jobs.folder, jobs.cancel, jobs.remove):
            with pytest.raises(Missing, match="the id of a job that is here"):
                ask(id)


def test_a_job_is_deleted_once_it_ended_and_its_key_is_free_again(jobs):
    job, _ = submit(jobs, key="mine")
    with pytest.raises(SpecError, match="a job that ended, got one that is queued; cancel it first"):
        jobs.remove(job.id)
    assert jobs.cancel(job.id).state == "cancelled"
    assert jobs.cancel(job.id).state == "cancelled"
    (jobs.folder(job.id) / "outcome.json").write_text("left over")
    jobs.remove(job.id)
    assert jobs.list() == [] and jobs.gone(job.id) and jobs.cancelled(job.id)
    assert not list((jobs.settings.folder / "jobs").iterdir())
    again, new = submit(jobs, key="mine")
    assert new and again.state == "queued"
    assert not (jobs.folder(again.id) / "outcome.json").exists()


def test_events_go_on_at_any_byte_a_client_had_reached(jobs):
    job, _ = submit(jobs)
    lines = [json.dumps({"stage": f"ä {n}", "done": n}, ensure_ascii=False) + "\n" for n in range(5)]
    path = jobs.folder(job.id) / "events.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    whole = list(jobs.events(job.id))
    assert [event["done"] for _, event in whole] == [0, 1, 2, 3, 4]
    assert whole[-1][0] == path.stat().st_size
    for n, (at, _) in enumerate(whole):
        assert list(jobs.events(job.id, at)) == whole[n + 1 :]
    assert jobs.find(job.id).progress == {"stage": "ä 4", "done": 4}
    assert list(jobs.events(job.id, 10**9)) == []
    assert [event["done"] for _, event in jobs.events(job.id, whole[0][0] - 3)] == [1, 2, 3, 4]  # amid a line
    with path.open("ab") as file:
        file.write(b'broken\n[1]\n{"stage": "half')
    assert list(jobs.events(job.id, whole[-1][0])) == []
    assert jobs.find(job.id).progress == {"stage": "ä 4", "done": 4}
