"""The table of jobs in PostgreSQL: the same service, and a database that goes away and comes back."""

import threading
import time

import pytest

from rempart.core.errors import SpecError
from rempart.serve.jobs import Jobs
from rempart.serve.settings import Settings, prepared
from serve.deployment import Deployment, until
from serve.postgres import Postgres, binaries

BINARIES = binaries()
pytestmark = pytest.mark.skipif(BINARIES is None, reason="needs the programs of PostgreSQL")


@pytest.fixture(scope="module")
def server():
    assert BINARIES is not None
    started = Postgres.start(BINARIES)
    yield started
    started.close()


@pytest.fixture
def deployment(tmp_path, server):
    url = server.url.replace("/rempart?", f"/{tmp_path.name}?")  # a database of its own, which is made
    made = Deployment(Settings(folder=tmp_path / "data", database=url))
    yield made
    made.close()


def test_jobs_run_are_listed_by_kind_and_shared_by_two_workers(deployment):
    ids = [deployment.submit("steps 2 0.1") for _ in range(6)]
    deployment.worker()
    deployment.worker()
    assert [deployment.wait(id).state for id in ids] == ["done"] * 6
    assert all(deployment.played(id) == ["0", "1"] and len(deployment.noted(id, "begun")) == 1 for id in ids)
    assert [job.id for job in deployment.jobs.list(kind="attack", limit=2, offset=1)] == ids[-2:-4:-1]
    assert deployment.jobs.list(kind="train") == []
    assert not (deployment.settings.folder / "jobs.sqlite").exists()


def test_the_jobs_of_a_dead_worker_are_taken_up(deployment):
    first = deployment.worker()
    id = deployment.submit("steps 5 0.4")
    until(lambda: len(deployment.played(id)) >= 2)
    first.kill()
    deployment.worker()
    assert deployment.wait(id).state == "done"
    assert sorted(deployment.played(id)) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_database_restarted_under_load_loses_nothing_and_does_nothing_twice(deployment, server, mode):
    """Jobs run and are submitted all the while: each submit is answered, each job done once, none is begun again."""
    worker = deployment.worker(jobs=2)
    long = deployment.submit("steps 8 0.4")
    ids: list[str] = []
    failed: list[Exception] = []
    over = threading.Event()

    def submit(number):
        while not over.is_set():
            try:
                ids.append(deployment.submit("steps 1 0", key=f"{number}-{len(ids)}"))
            except Exception as error:  # noqa: BLE001  it is the failure of the test
                failed.append(error)
            time.sleep(0.5)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: len(ids) > 3 and deployment.played(long))
    server.control("restart", "-m", mode)
    had = len(ids)
    until(lambda: len(ids) > had + 2)
    over.set()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len({*ids}) == len(ids) > 5
    for id in (long, *ids):
        assert deployment.wait(id, seconds=120).state == "done"
        assert len(deployment.noted(id, "begun")) == 1
    assert sorted(map(int, deployment.played(long))) == list(range(8))
    assert len(deployment.jobs.list(limit=200)) == len(ids) + 1
    assert worker.process.poll() is None
    assert worker.log.read_text() == "ready\n"


def test_a_job_that_ends_while_the_database_is_away_is_done_once_it_is_back(deployment, server):
    deployment.worker()
    id = deployment.submit("steps 3 0.3")
    until(lambda: deployment.played(id))
    server.control("stop", "-m", "fast")
    try:
        until(lambda: deployment.played(id) == ["0", "1", "2"])
        until(lambda: not deployment.processes(id))
        time.sleep(2)  # the table is told, and does not hear
    finally:
        server.control("start")
    assert deployment.wait(id).state == "done"
    assert len(deployment.noted(id, "begun")) == 1


def test_workers_of_another_machine_tell_by_the_age_of_their_sign(deployment):
    """A job of a machine that burnt down is taken up; one of a machine that shows itself is left alone."""
    id = deployment.submit("steps 1 0")
    alive = deployment.settings.folder / "workers" / "elsewhere.0123"
    alive.touch()
    table = deployment.jobs.table._sys_db
    with table.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE dbos.workflow_status SET status = 'PENDING', executor_id = 'elsewhere.0123'")
    deployment.worker()
    time.sleep(3)
    assert deployment.state(id) == "running" and not deployment.noted(id, "begun")
    alive.unlink()
    assert deployment.wait(id).state == "done"


def test_a_database_that_cannot_be_reached_is_told_without_its_password(tmp_path, server):
    url = f"postgresql://somebody:hunter2@/rempart?host={server.folder}"
    with pytest.raises(SpecError, match=r"(?s)a database that can be reached.*--database") as caught:
        Jobs.of(prepared(Settings(folder=tmp_path, database=url)))
    assert "hunter2" not in str(caught.value)
