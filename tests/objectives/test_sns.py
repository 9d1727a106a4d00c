"""Stabilised neurons against numbers worked out on paper and against adversarial training written out."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from rempart.core.errors import DataError, ModelError, ThreatError
from rempart.core.features import blocks, change, features
from rempart.core.model import frozen
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.explain import Subject, explain
from rempart.models import build
from rempart.models.load import card
from rempart.objectives import pgd_at, sns
from rempart.objectives.pgd_at import pgd_images
from rempart.report.schema import DataCard, ExplainSpec, Report

N = 30
SHAPE = (1, 8, 8)
GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(N, *SHAPE, generator=GENERATOR)
Y = torch.arange(N) % 3
RNG = Draws(4, torch.arange(N), ("train", "1"))


def lenet(seed=0):
    return build("lenet", shape=SHAPE, num_classes=3, seed=seed).train()


def data(seen=None):
    def read(numbers):
        if seen is not None:
            seen.append(numbers.tolist())
        return X[numbers]

    return Data("x", "train", RNG.index, Y, SHAPE, ("0", "1", "2"), read)


def chosen(objective):
    """The neurons chosen in each layer."""
    masks = {key.removeprefix("neurons of "): mask for key, mask in objective.state.items() if key != "epoch"}
    return {layer: mask.nonzero().flatten().tolist() for layer, mask in masks.items()}


def begun(model, **options):
    """An objective whose neurons are chosen."""
    objective = sns(**{"threat": "linf:0.05", "steps": 2} | options)
    objective.before_epoch(model, data(), rng=RNG, epoch=1)
    return objective


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        # changes, first image: maps 1.5, 1; dense 0, 2. Second image: maps 0.25, 0.25; dense 0, 1
        (([True, False], [False, True]), (0.875 + 1.5) / 2),
        (([False, True], [True, False]), (0.625 + 0) / 2),
        (([True, True], [True, True]), (0.75 + 0.75) / 2),
        (([True, True], [False, True]), (0.75 + 1.5) / 2),
    ],
)
def test_the_loss_is_that_worked_out_by_hand(masks, expected):
    x = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    x_adv = torch.tensor([[2.0, 0.0], [0.5, 1.0]]).view(2, 1, 1, 2)
    objective = sns(weight=3.0)
    for layer, mask in zip(("1", "4"), masks, strict=True):
        objective.state[f"neurons of {layer}"] = torch.tensor(mask)
    loss = objective.loss(toys.two_layers(), x, x_adv, torch.tensor([0, 1]), rng=RNG, progress=1.0)
    assert float(loss.parts["distance"]) == pytest.approx(expected, abs=1e-6)
    assert float(loss.value.detach()) == pytest.approx(0.6931472 + 3 * expected, abs=1e-6)


def test_the_gradient_may_leave_the_original_image_out():
    model, x_adv = lenet(), (X + 0.05).clamp(0, 1)
    layers = blocks(model)
    for detach in (False, True):
        objective = begun(model, detach=detach, choose="all", warmup=0)
        loss = objective.loss(model, X, x_adv, Y, rng=RNG, progress=0.0)
        gradient = torch.autograd.grad(loss.value, list(model.parameters()))
        with features(model, layers) as after:
            z_adv = model(x_adv)
        after = dict(after)
        with features(model, layers) as before:
            z = model(X)
        goals = {layer: value.detach() if detach else value for layer, value in before.items()}
        distance = sum(change(goals[layer], after[layer]).mean() for layer in layers) / 3
        expected = (F.cross_entropy(z, Y) + F.cross_entropy(z_adv, Y)) / 2 + distance
        wanted = torch.autograd.grad(expected, list(model.parameters()))
        assert torch.allclose(loss.value, expected)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradient, wanted, strict=True))


@pytest.mark.parametrize("start", [{"weight": 0}, {"warmup": 0.5}])
def test_without_weight_it_is_mixed_adversarial_training(start):
    """Half of the cross-entropy each, both halves in one pass through batch norm; progress is 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()
    objective = begun(model, **start)
    loss = objective(model, X, Y, rng=RNG, progress=0.0)
    assert int(model[1].num_batches_tracked) == 1  # one pass in training mode: not the attack, not the measurement
    gradient = torch.autograd.grad(loss.value, list(model.parameters()))
    model[1].reset_running_stats()
    x_adv = pgd_images(Threat(norm="linf", eps=0.05), 2, None)(model, X, Y, rng=RNG, progress=0.0)
    z = model(torch.cat([X, x_adv]))
    expected = (F.cross_entropy(z[:N], Y) + F.cross_entropy(z[N:], Y)) / 2
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(loss.value, expected)  # another order of the sum over images
    torch.testing.assert_close(gradient, wanted)


def test_the_weight_rises_over_the_warm_up():
    model = lenet()
    objective = begun(model, warmup=0.4, weight=2.0)
    losses = [objective(model, X, Y, rng=RNG, progress=t) for t in (0.0, 0.1, 0.4, 1.0)]
    extra = [float((loss.value - losses[0].value).detach()) for loss in losses]
    whole = 2 * float(losses[0].parts["distance"])
    assert whole > 0 and extra == pytest.approx([0, whole / 4, whole, whole], abs=1e-6)


def test_adversarial_images_alone_are_adversarial_training():
    model = lenet()
    loss = begun(model, mixed=False, weight=0)(model, X, Y, rng=RNG)
    expected = pgd_at(threat="linf:0.05", steps=2)(model, X, Y, rng=RNG)
    assert torch.allclose(loss.value, expected.value) and loss.parts["accuracy_adv"] == expected.parts["accuracy"]


def sigmas(model):
    """Sensitivities of the layers on all images, written out, with the draws of the probe."""
    rng = Draws(4, torch.arange(N), ("sns",))
    x_adv = pgd_images(Threat(norm="linf", eps=0.05), 2, None)(model, X, Y, rng=rng, progress=1.0)
    with frozen(model), features(model, blocks(model)) as seen:
        model(X)
        before = dict(seen)
        model(x_adv)
    return {
        layer: (before[layer] - seen[layer]).abs().flatten(2).mean((0, 2))
        if seen[layer].ndim > 2
        else (before[layer] - seen[layer]).abs().mean(0)
        for layer in seen
    }


def test_the_ablations_choose_what_they_say():
    model = lenet()
    order = {layer: sigma.argsort(descending=True).tolist() for layer, sigma in sigmas(model).items()}
    counts = {"net.1.1": 2, "net.1.3": 5, "net.1.6": 50}  # a tenth of 20, 50 and 500
    most, least, random, every = (chosen(begun(model, choose=how)) for how in ("sensitive", "least", "random", "all"))
    assert most == {layer: sorted(order[layer][: counts[layer]]) for layer in counts}
    for layer in ("net.1.1", "net.1.3"):  # of the dense one many are dead: any of those with 0
        assert least[layer] == sorted(order[layer][-counts[layer] :])
    assert {layer: len(neurons) for layer, neurons in least.items()} == counts
    assert {layer: len(neurons) for layer, neurons in random.items()} == counts and random not in (most, least)
    assert {layer: len(neurons) for layer, neurons in every.items()} == {"net.1.1": 20, "net.1.3": 50, "net.1.6": 500}
    other = sns(threat="linf:0.05", choose="random")
    other.before_epoch(lenet(1), data(), rng=Draws(4, RNG.index, ("train", "7")), epoch=7)
    assert chosen(other) == random  # by the seed alone
    other.before_epoch(lenet(1), data(), rng=Draws(5, RNG.index), epoch=8)
    assert chosen(other) != random


@pytest.mark.parametrize(("share", "counts"), [(0.001, [1, 1, 1]), (0.5, [10, 25, 250]), (1.0, [20, 50, 500])])
def test_a_share_of_each_layer_is_chosen_and_at_least_one(share, counts):
    assert [len(neurons) for neurons in chosen(begun(lenet(), share=share)).values()] == counts


def test_permuting_the_channels_of_a_layer_permutes_the_choice():
    model = lenet()
    before = chosen(begun(model))["net.1.1"]
    order = torch.randperm(20, generator=GENERATOR)
    first, second = model.net[1][0], model.net[1][2]
    with torch.no_grad():
        for parameter in (first.weight, first.bias):
            parameter.copy_(parameter[order].clone())
        second.weight.copy_(second.weight[:, order].clone())
    assert sorted(order[chosen(begun(model))["net.1.1"]].tolist()) == before


@pytest.mark.parametrize(("refresh", "at"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [1, 4]), (None, [1])])
def test_neurons_are_chosen_anew_when_it_is_time(refresh, at):
    seen, objective, fresh = [], sns(threat="linf:0.05", steps=1, refresh=refresh, probe=12), []
    for epoch in range(1, 6):
        before = len(seen)
        objective.before_epoch(model := lenet(epoch), data(seen), rng=Draws(4, RNG.index, (str(epoch),)), epoch=epoch)
        if len(seen) > before:
            fresh.append(epoch)
            other = sns(threat="linf:0.05", steps=1, probe=12)
            other.before_epoch(model, data(), rng=RNG, epoch=epoch)
            assert chosen(other) == chosen(objective)
    assert fresh == at
    assert all(len(numbers) == 12 and numbers == seen[0] for numbers in seen)  # the same images each time
    assert seen[0] != sorted(seen[0])


def test_a_resume_before_the_same_epoch_keeps_what_was_chosen():
    first = begun(lenet())
    second = sns(threat="linf:0.05", steps=2)
    second.state.update({name: value.clone() for name, value in first.state.items()})
    second.before_epoch(lenet(1), data(), rng=RNG, epoch=1)
    assert chosen(second) == chosen(first)
    second.before_epoch(lenet(1), data(), rng=RNG, epoch=2)
    assert chosen(second) != chosen(first)


def test_what_a_global_pooling_hands_to_the_last_layer_counts_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    assert list(chosen(begun(net))) == ["1", "2"]


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ModelError, match="hidden layers"):
        begun(toys.linear(SHAPE))
    with pytest.raises(ThreatError):
        sns(threat="linf")


# ---- neurons from an explain run


def explained(folder, model, **other):
    """An explain run on a third of the images; `other` takes the place of what its first model has."""
    data_ = data().take(torch.arange(10))
    about = card(model, "python:a:b")
    spec = ExplainSpec(models=("a",), data="x", threat="linf:0.05", test=0, draws=2, out=str(folder))
    y = model.eval()(X[:10]).argmax(1)
    threat = Threat(norm="linf", eps=0.05)
    told = explain({"a": Subject(model, about)}, replace(data_, labels=y), threat, spec).explained
    given = {"kind": "explain", "complete": True, "spec": spec, "created": "now", "seconds": 1.0, "environment": {}}
    first = told[0].model_copy(update=other)
    written = Report.model_validate(given | {"model": about, "data": DataCard.of(data_), "explained": (first,)})
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(written.model_dump_json(), "utf-8")
    return first


def test_neurons_of_an_explain_run_hold_for_the_whole_training(tmp_path):
    first, seen = explained(tmp_path / "run", lenet()), []
    objective = sns(threat="linf:0.05", neurons=str(tmp_path / "run"))
    for epoch in (1, 2, 5):
        objective.before_epoch(lenet(epoch), data(seen), rng=RNG, epoch=epoch)
        assert chosen(objective) == {layer.name: sorted(layer.sensitive) for layer in first.layers}
        assert objective.loss(lenet(epoch), X, X, Y, rng=RNG, progress=1.0).parts["distance"] == 0
    assert seen == [[0]]  # one image, to see what the layers put out
    least = sns(threat="linf:0.05", neurons=str(tmp_path / "run"), choose="least", share=0.25)
    least.before_epoch(lenet(3), data(), rng=RNG, epoch=1)
    order = torch.tensor(first.layers[1].absolute).argsort(stable=True)[:12].tolist()
    assert chosen(least)["net.1.3"] == sorted(order)


def test_a_resume_needs_the_explain_run_no_more(tmp_path):
    explained(tmp_path / "run", lenet())
    objective = sns(threat="linf:0.05", neurons=str(tmp_path / "run"))
    objective.before_epoch(lenet(), data(), rng=RNG, epoch=1)
    shutil.rmtree(tmp_path / "run")
    resumed = sns(threat="linf:0.05", neurons=str(tmp_path / "run"))
    resumed.state.update({name: value.clone() for name, value in objective.state.items()})
    resumed.before_epoch(lenet(1), data(), rng=RNG, epoch=4)
    assert chosen(resumed) == chosen(objective)


def test_an_explain_run_that_does_not_fit_is_refused(tmp_path):
    told = explained(tmp_path, lenet())
    objective = sns(threat="linf:0.05", neurons=str(tmp_path))
    with pytest.raises(ModelError, match=r"the layers of .* in this network"):
        objective.before_epoch(toys.linear(SHAPE), data(), rng=RNG, epoch=1)
    narrow = told.layers[0].model_copy(update={"absolute": (1.0, 2.0)})
    explained(tmp_path, lenet(), layers=(narrow,))
    with pytest.raises(ModelError, match=r"2 neurons in net\.1\.1.*got 20"):
        objective.before_epoch(lenet(), data(), rng=RNG, epoch=1)
    with pytest.raises(DataError, match="No such file"):
        sns(threat="linf:0.05", neurons=str(tmp_path / "nothing")).before_epoch(lenet(), data(), rng=RNG, epoch=1)
    assert not objective.state
