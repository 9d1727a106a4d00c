"""Training on a device that is not the CPU gives what it gives on the CPU, and seldom waits for the device."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from elsewhere import Elsewhere
from rempart.core.model import Classifier
from rempart.data import open_data
from rempart.objectives import objectives
from rempart.objectives.catalogue import as_they_are
from rempart.train import load_recipe, loop
from rempart.train.checkpoint import restore, snapshot
from rempart.train.loop import fit, validate
from rempart.train.setup import setup

SMALL = {"steps": 2, "probe": 16, "replays": 2, "layers": "deep"}
MORE = {"fast": {"grad_align": 0.2}, "adaptive": {"draw": "sample"}, "deep-defense": {"origin": "mean"}}
CASES = [
    *((entry.name, MORE.get(entry.name, {})) for entry in objectives),
    ("pgd-at", {"threat": "l2:1"}),
    ("pgd-at", {"threat": "l1:5"}),
    ("pgd-at", {"awp": 0.01}),
    ("plain", {"optimiser": "adam", "accumulate": 2, "ema": 0.9, "clip": 1.0}),
    ("input-gradient", {"form": "difference", "norm": "linf"}),
]


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten())
    return Classifier(nn.Sequential(*layers, nn.Linear(36, 10)), shape=(1, 8, 8), num_classes=10)


def begun(name, options, device):
    """A run whose tensors lie on the device; what Fabric would do there is written out."""
    own = objectives[name].params.model_fields
    small = {key: value for key, value in SMALL.items() if key in own}
    common = {"objective": name, "epochs": 2, "batch_size": 12, "flip": True, "shift": 1}
    here = setup(network(), load_recipe("plain", common | small | options), seed=0, samples=24, device="cpu")
    there = here.classifier.to(device)
    learnt = {key: parameter for key, parameter in there.named_parameters() if parameter.requires_grad}
    kind = torch.optim.SGD if here.recipe.optimiser == "sgd" else torch.optim.AdamW
    fabric = SimpleNamespace(
        device=torch.device(device),
        autocast=nullcontext,
        backward=lambda loss: loss.backward(),
        clip_gradients=lambda model, *_, max_norm, **__: nn.utils.clip_grad_norm_(model.parameters(), max_norm),
        strategy=SimpleNamespace(precision=None),
    )
    averaged = {key: parameter.detach().clone() for key, parameter in learnt.items()} if here.averaged else {}
    optimiser = kind(learnt.values(), 0.05)
    return replace(here, fabric=fabric, classifier=there, optimiser=optimiser, averaged=averaged)


def two_epochs(name, options, device):
    """Two epochs, the second after a resume."""
    data, test = open_data("digits:train[:24]"), open_data("digits:test[:10]")
    run = begun(name, options, device)
    first = fit(run, data, 1)
    state = snapshot(run)
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    run = begun(name, options, device)
    restore(run, state)
    second = validate(run, test, fit(run, data, 2, first))
    return [epoch.model_dump(exclude={"seconds"}) for epoch in (first, second)], snapshot(run)


@pytest.mark.filterwarnings("ignore:.*which is a no-op")  # not here: these tensors have values
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_every_objective_trains_on_another_device_as_on_the_cpu(name, options):
    epochs, state = two_epochs(name, options, "cpu")
    with Elsewhere():
        epochs_there, state_there = two_epochs(name, options, "meta")
    assert epochs_there == epochs
    assert state_there.keys() == state.keys()
    assert all(torch.equal(state_there[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["plain", "pgd-at", "fast", "trades", "mart", "gaussian", "gfa", "sns"])
def test_a_step_waits_for_the_device_only_where_an_attack_gives_the_network_back(name, monkeypatch):
    """Once, to see whether the attack changed any buffer."""
    monkeypatch.setattr(loop, "_PAUSE", math.inf)
    data = open_data("digits:train[:24]").load()
    waits = []
    for steps in (1, 3):
        with Elsewhere() as device:
            run = begun(name, {"batch_size": 24 // steps}, "meta")
            device.waits.clear()
            fit(run, data, 1)
        waits.append(device.waits)
    attacked = objectives[name].function().craft is not as_they_are and name != "gaussian"
    assert waits[1] - waits[0] == ({"aten.equal.default": 2} if attacked else {}), "of the two more steps"
