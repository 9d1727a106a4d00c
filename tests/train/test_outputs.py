"""Training of networks that end in softmax or sigmoid: the loss is taken of logits, and what is saved says so."""

from pathlib import Path

import pytest
import torch

from rempart.attacks.preflight import preflight
from rempart.core.errors import ModelError
from rempart.data import open_data
from rempart.data.samples import in_memory
from rempart.models import load
from rempart.report.schema import TrainSpec
from rempart.train import load_recipe, run_training, train

CODE = """
import torch
from torch import nn
from rempart import Classifier


class Last(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


def made(k, *last):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, k), *last)
    return Classifier(net, shape=(1, 8, 8), num_classes=10 if k > 1 else 2)


def logits(): return made(10)
def softmax(): return made(10, nn.Softmax(1))
def called(): return made(10, Last(lambda z: z.softmax(-1)))
def one(): return made(1)
def sigmoid(): return made(1, nn.Sigmoid())
def by_hand(): return made(1, Last(lambda z: 1 / (1 + (-z).exp())))
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ends.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def trained(name: str, recipe: str):
    spec = TrainSpec(
        data="digits", start=f"python:ends:{name}", recipe=recipe, options={"epochs": 2}, out=f"{recipe}-{name}"
    )
    report = run_training(spec)
    assert report is not None
    return report, load(f"python:ends:{name}@{spec.out}")


@pytest.mark.parametrize("recipe", ["plain", "trades"])
@pytest.mark.parametrize("name", ["softmax", "called"])
def test_a_network_that_ends_in_softmax_learns_as_the_one_without(code: None, name: str, recipe: str) -> None:
    plain, without = trained("logits", recipe)
    report, model = trained(name, recipe)
    assert [epoch.loss for epoch in report.epochs] == pytest.approx([epoch.loss for epoch in plain.epochs], rel=1e-5)
    assert any("probabilities" in note and "loss" in note for note in report.notes)
    assert not any("probabilities" in note for note in plain.notes)
    data = open_data("digits:test")
    x = data.batch(torch.arange(50)).x
    audited, _ = preflight(model, data)
    for read in (model, audited):
        torch.testing.assert_close(read(x), without(x), atol=1e-4, rtol=1e-4)


def test_one_sigmoid_is_trained_and_saved_as_the_probability_it_is(code: None) -> None:
    data = open_data("digits:train").load()
    two = (data.labels < 2).nonzero()[:, 0]
    learn = in_memory("train", data.batch(two).x, data.labels[two], ("0", "1"))
    models = {name: load(f"python:ends:{name}") for name in ("one", "sigmoid")}
    losses = {}
    for name, model in models.items():
        losses[name] = [e.loss for e in train(learn, None, model, load_recipe("plain", {"epochs": 2}))]
    assert losses["sigmoid"] == pytest.approx(losses["one"], rel=1e-5)
    assert (models["one"].output, models["sigmoid"].output) == ("logits", "probabilities")
    x = learn.batch(torch.arange(60)).x
    torch.testing.assert_close(models["sigmoid"](x), models["one"](x), atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="--outputs"):
        train(learn, None, load("python:ends:by_hand"), load_recipe("plain", {"epochs": 1}))
