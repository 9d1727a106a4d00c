"""From a request to files and a report."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rempart.core.errors import Cancelled, DataError, SpecError, TrainError
from rempart.core.repro import digest_state
from rempart.data import open_data
from rempart.models import build, load
from rempart.report.schema import Report, TrainSpec
from rempart.train import load_recipe, run_training, train
from rempart.train.loop import best
from rempart.train.run import channel_moments, set_aside

DATA = Path(os.environ.get("REMPART_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))


def spec(tmp_path, **changes):
    options = {"epochs": 3, "schedule": "constant"} | changes.pop("options", {})
    base = {"data": "digits[:300]", "model": "mlp", "out": str(tmp_path / "out"), "options": options, "seed": 7}
    return TrainSpec(**(base | changes))


def test_the_report_says_what_the_saved_model_does(tmp_path, untouched_rng):
    report = run_training(spec(tmp_path))
    kept, last = (load(str(tmp_path / "out" / part)) for part in ("", "last"))
    model, test = kept, open_data("digits:test[:300]")
    batch = test.batch(torch.arange(300))
    with torch.no_grad():
        right = int((model(batch.x).argmax(1) == batch.y).sum())
    assert (report.clean.k, report.clean.n) == (right, 300) and right > 200
    assert (report.data.digest, report.data.split, report.data.n) == (test.digest, "test", 300)
    assert (report.kind, report.complete, len(report.epochs), report.model.name) == ("train", True, 3, "out")
    assert Report.model_validate_json(report.model_dump_json()) == report
    cost = report.training
    assert cost.best_epoch == best(report.epochs).epoch
    assert (digest_state(kept.state_dict()) == digest_state(last.state_dict())) == (cost.best_epoch == 3)
    assert (cost.train_images, cost.validation_images, cost.queries, cost.gradients) == (270, 30, 810, 810)
    learn, validation = set_aside(open_data("digits:train[:300]").load(), 1000)
    training = json.loads((tmp_path / "out/config.json").read_text())["training"]
    assert (training["seed"], training["recipe"]["epochs"], len(training["epochs"])) == (7, 3, cost.best_epoch)
    assert training["digest"] == learn.digest
    images = validation.batch(torch.arange(30))
    with torch.no_grad():
        accuracy = float((model(images.x).argmax(1) == images.y).double().mean())
    assert accuracy == report.epochs[cost.best_epoch - 1].accuracy
    rows = list(csv.DictReader((tmp_path / "out/log.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in rows] == [epoch.loss for epoch in report.epochs]
    assert not (tmp_path / "out/checkpoint.safetensors").exists()


def test_images_set_aside_are_a_tenth_at_most_and_learnt_from_by_nobody():
    data = open_data("digits:train[:300]").load()
    learn, validation = set_aside(data, 1000)
    assert sorted([*learn.index.tolist(), *validation.index.tolist()]) == data.index.tolist()
    assert (len(learn), len(validation), len(set_aside(data, 12)[1])) == (270, 30, 12)
    assert set_aside(data, 0) == (data, None) and set_aside(data.head(9), 5)[1] is None
    assert validation.index.tolist() != list(range(270, 300)) and len(validation.labels.unique()) > 7


def test_the_same_spec_gives_the_same_model(tmp_path):
    first, again, other = (run_training(spec(tmp_path, seed=seed, overwrite=True)) for seed in (7, 7, 8))
    assert first.model.digest == again.model.digest != other.model.digest
    assert [epoch.loss for epoch in first.epochs] == [epoch.loss for epoch in again.epochs]


def test_weights_and_order_come_from_the_seed_of_the_spec(tmp_path):
    made = run_training(spec(tmp_path))
    learn, validation = set_aside(open_data("digits[:300]", split="train").load(), 1000)
    mean, std = channel_moments(learn)
    model = build("mlp", shape=(1, 8, 8), num_classes=10, mean=mean, std=std, seed=7)
    epochs = train(learn, validation, model, load_recipe("plain", made.spec.options), seed=7)
    assert digest_state(load(str(tmp_path / "out/last")).state_dict()) == digest_state(model.state_dict())
    assert [epoch.loss for epoch in made.epochs] == [epoch.loss for epoch in epochs]


@pytest.mark.parametrize("stop", [Cancelled(), KeyboardInterrupt()], ids=["cancelled", "ctrl-c"])
def test_an_interrupted_training_keeps_the_finished_epochs(tmp_path, stop):
    def interrupt(event):
        if event.done > 2 * 270:
            raise stop

    cut = run_training(spec(tmp_path, options={"epochs": 5}, out=str(tmp_path / "cut")), interrupt)
    short = run_training(spec(tmp_path, options={"epochs": 2}, out=str(tmp_path / "short")))
    assert (cut.complete, len(cut.epochs), cut.not_run) == (False, 2, ("the last 3 of 5 epochs",))
    assert cut.model.digest == short.model.digest
    assert cut.clean == short.clean


def test_before_the_first_epoch_nothing_is_written(tmp_path):
    def interrupt(event):
        raise Cancelled

    with pytest.raises(Cancelled):
        run_training(spec(tmp_path), interrupt)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "changes", [{"recipe": "plian"}, {"model": "lennet"}, {"options": {"epocs": 1}}, {"data": "digit"}]
)
def test_wrong_requests_fail_before_anything_runs(tmp_path, changes):
    with pytest.raises(SpecError, match="did you mean"):
        run_training(spec(tmp_path, **changes), lambda event: pytest.fail("it ran"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", ["digits:train", "digits:test"])
def test_testing_on_the_training_images_is_refused(tmp_path, data):
    with pytest.raises(DataError, match="a train and a test split"):
        run_training(spec(tmp_path, data=data))


def test_a_failed_training_leaves_the_finished_epochs(tmp_path):
    with pytest.raises(TrainError, match="guessing"):
        run_training(spec(tmp_path, options={"learning_rate": 1e-20, "epochs": 1}))
    assert load(str(tmp_path / "out")).num_classes == 10


def test_moments_are_those_of_numpy(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train/a/1", "train/a/2", "train/b/1", "test/a/1", "test/b/1"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        pixels[..., 1] = 51
        Image.fromarray(pixels).save(path)
    data = open_data(str(tmp_path), split="train")
    x = data.batch(torch.arange(3)).x.double().numpy()
    mean, std = channel_moments(data)
    assert mean == pytest.approx(x.mean((0, 2, 3)))
    assert std[0] == pytest.approx(x[:, 0].std()) and std[2] == pytest.approx(x[:, 2].std())
    assert std[1] == 1.0  # a constant channel


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("data", "model", "recipe", "least"),
    [
        ("digits", "lenet", "plain:digits", 0.96),
        (f"mnist:{DATA / 'mnist'}", "lenet", "plain", 0.99),
        (str(DATA / "brain-mri.zip"), "mri-cnn", "plain:medical", 0.925),
    ],
)
def test_recipes_reach_their_accuracy(tmp_path, data, model, recipe, least):
    if data != "digits" and not Path(data.removeprefix("mnist:")).exists():
        pytest.skip("needs the real data sets: set REMPART_DATA to their directory")
    report = run_training(TrainSpec(data=data, model=model, recipe=recipe, out=str(tmp_path / "out")))
    assert report.clean.value >= least


def test_a_model_that_may_have_learnt_nothing_is_told(tmp_path):
    poor = run_training(spec(tmp_path / "a", data="digits[:9]", options={"epochs": 1, "learning_rate": 1e-6}))
    assert any("not surely better than guessing among 10 classes (10.0%)" in note for note in poor.notes)
    assert not any("guessing" in note for note in run_training(spec(tmp_path / "b")).notes)
