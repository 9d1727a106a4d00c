"""Jobs as they are, disturbed: they end as if nothing had happened, or say what did."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rempart.report.schema import AttackChoice, AuditSpec, TrainSpec
from rempart.report.store import read
from rempart.serve.settings import Settings
from rempart.tasks import run
from serve.deployment import ENDED, Deployment, alive, until


@pytest.fixture
def deployment(tmp_path):
    made = Deployment(Settings(folder=tmp_path / "data"), real=True)
    yield made
    made.close()


def without_times(value):
    """A report without what differs between two runs of the same request."""
    if isinstance(value, dict):
        aside = ("created", "seconds", "out", "images_per_second", "environment")
        return {key: without_times(inner) for key, inner in value.items() if key not in aside}
    return [without_times(inner) for inner in value] if isinstance(value, list | tuple) else value


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def pieces(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each finished piece: a piece that is done again is another file."""
    found = {}
    for path in folder.glob("run/pieces/*/*.npz"):
        try:
            about = path.stat()
        except FileNotFoundError:
            continue
        found[path.name] = about.st_ino, about.st_mtime_ns
    return found


@pytest.mark.slow
def test_an_audit_whose_worker_is_killed_ends_with_the_same_report(deployment):
    """kill -9 of the worker in the middle; no finished chunk is done twice, figures and samples are the same."""
    run(TrainSpec(data="digits", model="mlp", options={"epochs": 3}, out=str(deployment.settings.folder / "models/m")))
    attacks = (AttackChoice(name="pgd", options={"steps": 300, "restarts": 2}),)
    about = {"data": "digits:test[:48]", "threat": "linf:0.001", "attacks": attacks, "chunk": 4, "sweep": False}
    spec = AuditSpec(model="models/m", **about)
    first = deployment.worker(jobs=2)
    disturbed = deployment.submit(spec)
    folder = deployment.folder(disturbed)
    until(lambda: len(pieces(folder)) >= 5)
    first.kill()
    until(lambda: not deployment.processes(disturbed), 5)
    before = pieces(folder)
    assert 5 <= len(before) < 12
    whole = deployment.submit(spec)
    deployment.worker(jobs=2)
    seen = dict(before)
    while deployment.state(disturbed) not in ENDED:
        now = pieces(folder)
        assert {name: now.get(name, file) for name, file in seen.items()} == seen
        seen |= now
    assert deployment.wait(disturbed).state == deployment.wait(whole).state == "done"
    assert len(seen) > len(before)
    assert len(deployment.noted(disturbed, "begun")) == 2 and len(deployment.noted(whole, "begun")) == 1
    runs = [deployment.folder(id) / "run" for id in (disturbed, whole)]
    reports = [without_times(read(run).model_dump(mode="json")) for run in runs]
    assert reports[0] == reports[1] and reports[0]["complete"]
    samples = [arrays(run / "samples.npz") for run in runs]
    assert samples[0].keys() == samples[1].keys()
    for name, column in samples[0].items():
        np.testing.assert_array_equal(column, samples[1][name])


def test_a_training_whose_process_is_killed_goes_on_where_it_was(deployment):
    """kill -9 of the process, not of the worker: the same epochs and the same weights as undisturbed."""
    options = {"epochs": 8, "schedule": "constant", "threat": "linf:0.1", "steps": 7}
    spec = TrainSpec(data="digits", model="mlp", recipe="pgd-at", options=options, out="run", seed=3)
    deployment.worker(jobs=2)
    disturbed, whole = deployment.submit(spec), deployment.submit(spec)
    run = deployment.folder(disturbed) / "run"
    until(lambda: (run / "log.csv").exists() and len((run / "log.csv").read_text().splitlines()) >= 3)
    (process,) = deployment.processes(disturbed)
    os.kill(process, signal.SIGKILL)
    assert deployment.wait(disturbed).state == deployment.wait(whole).state == "done"
    assert len(deployment.noted(disturbed, "died")) == 1
    runs = [deployment.folder(id) / "run" for id in (disturbed, whole)]
    ends = [read(run) for run in runs]
    assert [epoch.loss for epoch in ends[0].epochs] == [epoch.loss for epoch in ends[1].epochs]
    assert len(ends[0].epochs) == 8
    assert ends[0].model.digest == ends[1].model.digest


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 80 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "rempart", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_fails_the_job_and_leaves_the_service_up(small_disk):
    """A job is ended before nothing is left for the table; where nothing is, a request is refused, and none is lost."""
    deployment = Deployment(Settings(folder=small_disk / "data"))
    try:
        worker = deployment.worker()
        running = deployment.submit("steps 9 0.5")
        until(lambda: deployment.played(running))
        filler = small_disk / "filler"
        filler.write_bytes(b"x" * (20 * 2**20))
        job = deployment.wait(running)
        assert (job.state, job.reason) == ("failed", "the disk of the service is full")
        with filler.open("ab") as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 2**16)
                file.flush()
        with pytest.raises(OSError, match=r"No space|disk of the service is full"):
            deployment.submit("steps 1 0", key="mine")
        assert deployment.state(running) == "failed"
        filler.unlink()
        next = deployment.submit("steps 1 0", key="mine")
        assert deployment.wait(next).state == "done"
        assert alive(worker.process.pid)
    finally:
        deployment.close()
