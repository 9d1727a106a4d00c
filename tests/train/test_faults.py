"""What can go wrong in a training, and what is left then: nothing lost, a clear message, the same end when resumed."""

import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rempart.core.errors import Cancelled, DataError, ModelError, SpecError, TrainError
from rempart.core.repro import digest_state
from rempart.data import open_data
from rempart.models import build, load, save
from rempart.report import store
from rempart.report.schema import TrainSpec
from rempart.train import run_training
from rempart.train.checkpoint import read


def spec(out, **changes):
    options = {"epochs": 4, "schedule": "constant"} | changes.pop("options", {})
    return TrainSpec(
        **({"data": "digits[:300]", "model": "mlp", "out": str(out), "options": options, "seed": 7} | changes)
    )


def losses(report):
    return [epoch.loss for epoch in report.epochs]


def command(out, *more):
    base = ["train", "--data", "digits", "--model", "lenet", "--recipe", "pgd-at", "--seed", "3", "--out", str(out)]
    return [sys.executable, "-m", "rempart", *base, "-o", "epochs=6", "-o", "threat=linf:0.1", *more]


def stopped_after(epochs):
    """A `Notify` that stops in the middle of the next epoch."""

    def notify(event):
        if event.done > (epochs + 0.5) * 270:
            raise Cancelled

    return notify


def test_a_killed_training_goes_on_to_the_same_end(tmp_path):
    """kill -9 in the middle of an epoch; the same command with --resume ends as if nothing had happened."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(whole), env=env, check=True, capture_output=True)
    process = subprocess.Popen(command(cut), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = cut / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)  # into the second epoch or later
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(read(checkpoint)[0])
    assert 1 <= finished < 6 and load(str(cut)).num_classes == 10
    refused = subprocess.run(command(cut), env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    subprocess.run(command(cut, "--resume"), env=env, check=True, capture_output=True)
    one, other = store.read(whole), store.read(cut)
    assert losses(one) == losses(other) and one.model.digest == other.model.digest and one.clean == other.clean
    for folder in ("", "last"):
        digests = {digest_state(load(str(path / folder)).state_dict()) for path in (whole, cut)}
        assert len(digests) == 1
    again = subprocess.run(command(cut, "--resume"), env=env, capture_output=True, text=True, check=True)
    assert "epoch" in again.stdout and not checkpoint.exists()  # finished: told, not repeated


def test_stopping_and_resuming_in_python(tmp_path):
    whole = run_training(spec(tmp_path / "whole"))
    cut = run_training(spec(tmp_path / "cut"), stopped_after(2))
    assert not cut.complete and len(cut.epochs) == 2
    done = run_training(spec(tmp_path / "cut", resume=True))
    assert done.complete and losses(done) == losses(whole) and done.model.digest == whole.model.digest
    before = (tmp_path / "cut/weights.safetensors").stat().st_mtime_ns
    assert run_training(spec(tmp_path / "cut", resume=True)) == done  # nothing is left to do
    assert (tmp_path / "cut/weights.safetensors").stat().st_mtime_ns == before


def test_another_request_does_not_go_on_from_a_checkpoint(tmp_path):
    run_training(spec(tmp_path), stopped_after(1))
    with pytest.raises(SpecError, match=r"seed=8 instead of 7"):
        run_training(spec(tmp_path, seed=8, resume=True))
    with pytest.raises(SpecError, match="--resume to go on with it, or --overwrite"):
        run_training(spec(tmp_path))
    assert run_training(spec(tmp_path, overwrite=True)).complete
    with pytest.raises(SpecError, match=r"seed=8 instead of 7; that training is complete"):
        run_training(spec(tmp_path, seed=8, resume=True))
    with pytest.raises(SpecError, match="holds a trained model"):
        run_training(spec(tmp_path, seed=8))


def test_a_recipe_file_or_images_that_changed_are_not_gone_on_with(tmp_path):
    recipe, data, out = tmp_path / "own.toml", tmp_path / "data.npz", tmp_path / "out"
    digits = [open_data("digits", split=split).head(300).load() for split in ("train", "test")]

    def store_images(move):
        arrays = {}
        for name, part in zip(("train", "test"), digits, strict=True):
            arrays[f"{name}_images"] = (part.batch(torch.arange(300)).x[:, 0] * 255).byte().numpy() ^ move
            arrays[f"{name}_labels"] = part.labels.numpy()[:, None]
        np.savez(data, **arrays)

    def asked(**more):
        return spec(out, recipe=str(recipe), data=str(data), **more)

    store_images(0)
    recipe.write_text("objective = 'plain'\nlearning_rate = 0.002")
    run_training(asked(), stopped_after(1))
    recipe.write_text("objective = 'plain'\nlearning_rate = 0.003")
    with pytest.raises(SpecError, match=r"learning_rate=0\.003 instead of 0\.002"):
        run_training(asked(resume=True))
    recipe.write_text("objective = 'plain'\nlearning_rate = 0.002")
    store_images(1)
    with pytest.raises(SpecError, match="images="):
        run_training(asked(resume=True))
    store_images(0)
    assert run_training(asked(resume=True)).complete
    recipe.write_text("objective = 'plain'\nlearning_rate = 0.003")
    with pytest.raises(SpecError, match="other images or other source code; that training is complete"):
        run_training(asked(resume=True))


def test_a_damaged_checkpoint_is_named(tmp_path):
    run_training(spec(tmp_path), stopped_after(1))
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="damaged"):
        run_training(spec(tmp_path, resume=True))
    assert path.exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """The limit on file sizes stands in for the disk: files that fit are written, the next larger one is not."""
    run_training(spec(tmp_path), stopped_after(1))
    size = (tmp_path / "checkpoint.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        with pytest.raises(TrainError, match=r"to write epoch 2 to .*--resume"):
            run_training(spec(tmp_path, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    whole = run_training(spec(tmp_path / "whole"))
    assert losses(run_training(spec(tmp_path, resume=True))) == losses(whole)


def test_a_model_that_was_not_written_beside_its_checkpoint_is_written_by_resume(tmp_path, monkeypatch):
    """The end comes between the checkpoint of the best epoch and its model, by a full disk or kill -9."""
    whole = run_training(spec(tmp_path / "whole", options={"epochs": 2}))
    assert whole.training.best_epoch == 2
    saved = []

    def full(*given, **more):
        saved.append(given)
        if len(saved) > 2:  # best and last of the first epoch fit
            raise OSError(28, "No space left on device")
        save(*given, **more)

    monkeypatch.setattr("rempart.train.run.save", full)
    with pytest.raises(TrainError, match="to write epoch 2"):
        run_training(spec(tmp_path / "cut", options={"epochs": 2}))
    monkeypatch.undo()
    done = run_training(spec(tmp_path / "cut", options={"epochs": 2}, resume=True))
    assert (done.training.best_epoch, done.model.digest) == (2, whole.model.digest)
    assert digest_state(load(str(tmp_path / "cut/last")).state_dict()) == whole.model.digest


def test_a_log_that_fails_loses_no_epoch(tmp_path, monkeypatch):
    def broken(epoch):
        raise RuntimeError("no server")

    monkeypatch.setattr("rempart.train.run.open_logs", lambda *given: [broken])
    with pytest.raises(RuntimeError, match="no server"):
        run_training(spec(tmp_path))
    assert [epoch.epoch for epoch in store.read(tmp_path).epochs] == [1]


def test_a_loss_that_is_not_finite_keeps_the_epochs_before_it(tmp_path, monkeypatch):
    clean = nn.functional.cross_entropy
    calls = []

    def poisoned(z, y):
        calls.append(len(y))
        return clean(z, y) * (float("nan") if len(calls) > 5 else 1.0)

    monkeypatch.setattr(nn.functional, "cross_entropy", poisoned)
    with pytest.raises(TrainError, match="a finite loss, got nan in epoch 2"):
        run_training(spec(tmp_path))
    report = store.read(tmp_path)
    assert not report.complete and len(report.epochs) == 1 and "failed in epoch 2" in report.notes[0]
    assert report.model.digest == digest_state(load(str(tmp_path)).state_dict())
    assert report.clean is not None and report.not_run == ("the last 3 of 4 epochs",)


def test_one_class_is_nothing_to_learn(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, labels in (("train", [0] * 40 + [1] * 40), ("test", [0] * 40 + [1] * 40)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (len(labels), 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array(labels)[:, None]
    np.savez(tmp_path / "one.npz", **arrays)
    with pytest.raises(DataError, match="training images of two classes or more, got 40 of class 0 alone"):
        run_training(spec(tmp_path / "out", data=f"{tmp_path / 'one.npz'}[:40]"))
    assert not (tmp_path / "out").exists()


# ---- where a training begins


def test_fine_tuning_begins_with_the_weights_given(tmp_path):
    first = run_training(spec(tmp_path / "first"))
    still = spec(tmp_path / "still", model=None, start=str(tmp_path / "first"), options={"learning_rate": 1e-20})
    tuned = run_training(still)
    assert tuned.model.digest == first.model.digest and tuned.clean == first.clean
    further = run_training(spec(tmp_path / "more", model=None, start=str(tmp_path / "first")))
    assert further.epochs[0].loss < first.epochs[0].loss
    for wrong in ({"start": str(tmp_path / "first")}, {"model": None}):
        with pytest.raises(SpecError, match="--model to train from scratch, or --from"):
            run_training(spec(tmp_path / "x", **wrong))
    with pytest.raises(DataError, match="images of shape"):
        narrow = {"model": None, "start": str(tmp_path / "first")}
        images = np.zeros((40, 9, 9), dtype=np.uint8)
        labels = np.arange(40)[:, None] % 10
        np.savez(
            tmp_path / "wide.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
        )
        run_training(spec(tmp_path / "x", **{**narrow, "data": str(tmp_path / "wide.npz")}))


FACTORY = """
import torch
def tiny():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    net.shape, net.num_classes = (1, 8, 8), 10
    return net
"""


def test_a_network_of_the_users_own_is_trained_and_loaded_with_its_code_alone(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    options = {"learning_rate": 0.05}
    report = run_training(spec(tmp_path / "out", model=None, start="python:own_networks:tiny", options=options))
    with pytest.raises(ModelError, match="give python:own_networks:tiny@"):
        load(str(tmp_path / "out"))
    model = load(f"python:own_networks:tiny@{tmp_path / 'out'}")
    assert (
        digest_state(model.state_dict())
        == report.model.digest
        != digest_state(load("python:own_networks:tiny").state_dict())
    )
    assert report.clean.value > 0.6
    with pytest.raises(ModelError, match="weights of python:own_networks:other"):
        (tmp_path / "own_networks.py").write_text(FACTORY + "other = tiny\n")
        sys.modules.pop("own_networks")
        load(f"python:own_networks:other@{tmp_path / 'out'}")
    sys.modules.pop("own_networks")


def test_a_training_is_not_resumed_with_other_code(tmp_path, monkeypatch):
    """The checkpoint of a stopped training belongs to the code it ran; comments are no code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def wanted(code, **more):
        (tmp_path / "resumed_networks.py").write_text(code)
        sys.modules.pop("resumed_networks", None)
        importlib.invalidate_caches()
        return spec(tmp_path / "out", model=None, start="python:resumed_networks:tiny", **more)

    other = FACTORY.replace("torch.nn.Flatten()", "torch.nn.Flatten(), torch.nn.Identity()")
    run_training(wanted(FACTORY), stopped_after(1))
    for _ in range(2):  # of a checkpoint, then of the finished training
        with pytest.raises(SpecError, match="other source code"):
            run_training(wanted(other, resume=True))
        assert run_training(wanted(FACTORY + "# a comment\n", resume=True)).complete
    sys.modules.pop("resumed_networks")


BOXED = """
import torch
from rempart import Classifier
def linear():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    return Classifier(net, shape=(1, 8, 8), num_classes=10, low=-1.0, high=3.0)
"""


def test_a_model_with_a_box_of_its_own_learns_from_the_images_it_is_audited_on(tmp_path, monkeypatch):
    (tmp_path / "boxed_networks.py").write_text(BOXED)
    monkeypatch.chdir(tmp_path)
    options = {"learning_rate": 0.02}
    report = run_training(spec(tmp_path / "out", model=None, start="python:boxed_networks:linear", options=options))
    model = load(f"python:boxed_networks:linear@{tmp_path / 'out'}")
    test = open_data("digits:test[:300]").scaled(-1.0, 3.0)
    batch = test.batch(torch.arange(len(test)))
    assert (float(batch.x.min()), float(batch.x.max())) == (-1, 3)
    assert report.clean.k == int((model(batch.x).argmax(1) == batch.y).sum()) > 150
    assert report.data.digest == test.digest
    sys.modules.pop("boxed_networks")


def test_classes_in_another_order_are_learnt_by_their_names(tmp_path):
    """Cats are dark and dogs are light; the network knows dogs as its class 0, the folders as their class 1."""
    images = np.random.default_rng(0).integers(0, 100, (60, 8, 8), dtype=np.uint8)
    for split in ("train", "test"):
        for number, image in enumerate(images):
            path = tmp_path / "data" / split / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image + np.uint8(150 * (number % 2))).save(path)
    model = build("mlp", shape=(1, 8, 8), num_classes=2, class_names=("dog", "cat"))
    save(model, tmp_path / "start", name="mlp")
    given = {"model": None, "start": str(tmp_path / "start"), "data": str(tmp_path / "data")}
    report = run_training(
        spec(tmp_path / "x", **given, options={"epochs": 15, "batch_size": 10, "flip": False, "shift": 0})
    )
    learnt = load(str(tmp_path / "x"))
    assert learnt.class_names == ("dog", "cat") and report.clean.value == 1
    assert learnt(torch.full((1, 1, 8, 8), 0.8)).argmax() == 0 and learnt(torch.full((1, 1, 8, 8), 0.2)).argmax() == 1


def test_an_exported_program_cannot_be_trained(tmp_path):
    path = tmp_path / "net.pt2"
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 1, 8, 8),)), path)
    with pytest.raises(ModelError, match="to train it further"):
        run_training(spec(tmp_path / "out", model=None, start=str(path)))


# ---- several processes


@pytest.mark.parametrize("recipe", ["plain", "pgd-at"])
def test_two_processes_learn_the_same_as_one(tmp_path, recipe):
    """A network without batch norm or dropout: the sums differ by rounding alone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    base = ["--data", "digits[:300]", "--model", "mlp", "--recipe", recipe, "-o", "epochs=2", "-o", "optimiser=sgd"]
    base += ["-o", "learning_rate=0.05", "-o", "batch_size=30"]
    reports = {}
    for devices in (1, 2):
        out = tmp_path / str(devices)
        line = [sys.executable, "-m", "rempart", "train", *base, "--out", str(out), "--devices", str(devices)]
        subprocess.run(line, env=env, check=True, capture_output=True, timeout=120)
        reports[devices] = store.read(out)
    one, two = reports[1], reports[2]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert (one.training.queries, one.training.gradients) == (two.training.queries, two.training.gradients)
    pairs = zip(load(str(tmp_path / "1")).parameters(), load(str(tmp_path / "2")).parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


# ---- logs


@pytest.mark.filterwarnings("ignore")  # theirs
def test_tensorboard_and_mlflow_hold_what_the_report_says(tmp_path):
    pytest.importorskip("tensorboard")
    mlflow = pytest.importorskip("mlflow")
    report = run_training(spec(tmp_path, log=("tensorboard", "mlflow"), options={"epochs": 3}), stopped_after(1))
    report = run_training(spec(tmp_path, log=("tensorboard", "mlflow"), options={"epochs": 3}, resume=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    written = [scalar.value for scalar in events.Scalars("loss")]
    assert written == pytest.approx(losses(report))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run((Path(tmp_path) / "mlflow-run").read_text())
    history = sorted(client.get_metric_history(run.info.run_id, "loss"), key=lambda metric: metric.step)
    assert [metric.value for metric in history] == pytest.approx(losses(report))
    assert run.data.params["seed"] == "7"


def test_a_training_begun_anew_does_not_go_on_in_the_old_run_of_mlflow(tmp_path):
    run_training(spec(tmp_path, options={"epochs": 2}), stopped_after(1))
    (tmp_path / "mlflow-run").write_text("old")
    assert run_training(spec(tmp_path, options={"epochs": 2}, resume=True)).complete
    assert (tmp_path / "mlflow-run").exists()
    run_training(spec(tmp_path, options={"epochs": 2}, overwrite=True))
    assert not (tmp_path / "mlflow-run").exists()


def test_a_log_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SpecError, match=r"the package mlflow, got none; pip install 'rempart\[mlflow\]'"):
        run_training(spec(tmp_path, log=("mlflow",)))
