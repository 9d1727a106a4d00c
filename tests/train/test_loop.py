"""The loop against full-batch gradient descent written out, and its promises: same seed, same run."""

import contextlib
import math
from itertools import chain

import pytest
import torch
from torch import nn

from rempart.core.data import open_data
from rempart.core.errors import Cancelled, DataError, TrainError
from rempart.core.model import Classifier
from rempart.core.repro import digest_state
from rempart.models import build
from rempart.train import load_recipe, train
from rempart.train.config import Recipe
from rempart.train.loop import schedule
from rempart.train.objectives import Loss


@pytest.fixture(scope="module")
def digits():
    return open_data("digits:train[:160]"), open_data("digits:test[:100]")


def lenet(seed=0):
    return build("lenet", shape=(1, 8, 8), num_classes=10, mean=[0.3], std=[0.37], seed=seed)


def softmax_regression():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return Classifier(net, shape=(1, 8, 8), num_classes=10)


def run(digits, model, recipe="plain", seed=0, notify=lambda event: None, **options):
    return train(*digits, model, load_recipe(recipe, options), seed=seed, notify=notify)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_full_batches_are_gradient_descent_written_out(digits, optimiser):
    """Softmax regression from zero weights, gradient by hand: X'(p - onehot(y)) / n."""
    model, lr, decay, steps = softmax_regression(), 0.05, 0.5, 6
    options = {"epochs": steps, "batch_size": 999, "learning_rate": lr, "weight_decay": decay, "schedule": "cosine"}
    epochs = run(digits, model, optimiser=optimiser, **options)
    data = digits[0].load().batch(torch.arange(160))
    x = torch.cat([data.x.flatten(1), torch.ones(160, 1)], 1).double()
    goal = nn.functional.one_hot(data.y, 10).double()
    w = first = second = torch.zeros(65, 10, dtype=torch.float64)
    losses = []
    for t in range(1, steps + 1):
        p = (x @ w).softmax(1)
        losses.append(float(-(p * goal).sum(1).log().mean()))
        g, rate = x.T @ (p - goal) / 160, lr * (0.5 + 0.5 * math.cos(math.pi * (t - 1) / steps))
        if optimiser == "sgd":  # Nesterov's momentum; the decay is part of the gradient
            g = g + decay * w
            first = 0.9 * first + g
            w = w - rate * (g + 0.9 * first)
        else:  # AdamW; the decay is apart
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            w = w * (1 - rate * decay)
            w = w - rate * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    assert [epoch.loss for epoch in epochs] == pytest.approx(losses, rel=1e-5 if optimiser == "sgd" else 1e-3)
    if optimiser == "sgd":  # Adam divides by the size of the gradient: where it vanishes, rounding decides
        assert torch.allclose(model.net[1].weight.T.double(), w[:64], atol=1e-5)
    assert [epoch.learning_rate for epoch in epochs][-1] == pytest.approx(rate)


def test_accuracy_is_that_of_the_model_handed_back(digits):
    model = lenet()
    epochs = run(digits, model, epochs=3)
    test = digits[1].load().batch(torch.arange(100))
    with torch.no_grad():
        assert epochs[-1].accuracy == float((model(test.x).argmax(1) == test.y).double().mean()) > 0.5
    assert not model.training and all(p.is_contiguous() for p in model.parameters())
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]


def test_same_seed_same_run_whatever_the_global_state_and_the_mode(digits):
    runs = []
    for seed, state, mode in ((4, 1, True), (4, 2, False), (5, 1, True)):
        model = build("nin", shape=(1, 8, 8), num_classes=10, seed=9).train(mode)  # with dropout
        losses = []
        torch.manual_seed(state)
        before = torch.get_rng_state()
        with contextlib.suppress(TrainError):  # one epoch need not beat guessing
            run(digits, model, seed=seed, notify=lambda event, log=losses: log.append(event.values["loss"]), epochs=1)
        assert torch.equal(before, torch.get_rng_state())
        runs.append((losses[-1], digest_state(model.state_dict())))
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0]


def test_adversarial_training_repeats_too_and_without_budget_is_plain(digits):
    def losses(recipe, **options):
        model = lenet()
        epochs = run(digits, model, recipe, epochs=2, **options)
        return [epoch.loss for epoch in epochs], digest_state(model.state_dict())

    common = load_recipe("pgd-at").model_dump(
        include={"batch_size", "optimiser", "learning_rate", "schedule", "weight_decay"}
    )
    hardened = losses("pgd-at", threat="linf:0.05", steps=2)
    assert hardened == losses("pgd-at", threat="linf:0.05", steps=2)
    assert hardened[0][1] > losses("pgd-at", threat="linf:0")[0][1]
    assert losses("pgd-at", threat="linf:0") == losses("plain", **common)


def test_each_epoch_shows_every_sample_once_in_a_new_order(digits, monkeypatch):
    part = digits[0].take(torch.arange(0, 160, 3))  # sample numbers with gaps
    stored = dict(zip(part.index.tolist(), part.load().batch(torch.arange(len(part))).x, strict=True))
    seen = []

    def spy(model, x, y, *, rng):
        seen.append(rng.index.tolist())
        assert all(torch.equal(image, stored[n]) for n, image in zip(seen[-1], x, strict=True))
        z = model(x)
        return Loss(nn.functional.cross_entropy(z, y), {"accuracy": torch.tensor(0.0)})

    monkeypatch.setattr(Recipe, "build_objective", lambda self: spy)
    run((part, digits[1]), lenet(), epochs=2, batch_size=16)
    sizes = [len(batch) for batch in seen]
    assert sizes == [14, 14, 13, 13] * 2  # 54 samples in 4 batches, none of them tiny
    first, second = list(chain(*seen[:4])), list(chain(*seen[4:]))
    assert sorted(first) == sorted(second) == part.index.tolist()
    assert first != second and first != sorted(first)


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("constant", {0: 1, 0.5: 1, 1: 1}),
        ("cosine", {0: 1, 0.5: 0.5, 1: 0, 1 / 3: 0.75}),
        ("onecycle", {0: 0.04, 0.1: 0.52, 0.2: 1, 0.6: 0.5, 1: 0}),
    ],
)
def test_schedules(name, points):
    recipe = load_recipe("plain", {"schedule": name})
    assert [schedule(recipe, t) for t in points] == pytest.approx(list(points.values()), abs=1e-12)


def test_events_carry_figures_and_progress(digits):
    events = []
    epochs = run(digits, lenet(), epochs=2, notify=events.append)
    assert all(
        event.stage == "train" and event.total == 320 and event.values.keys() == {"loss", "accuracy"}
        for event in events
    )
    done = [event.done for event in events]
    assert done == sorted(done) and done[-1] == 320
    assert events[-1].values["accuracy"] == epochs[-1].accuracy and "test" in events[-1].note


def test_a_loss_that_is_not_finite_stops_the_training(digits):
    kept = []
    with pytest.raises(TrainError, match="smaller learning_rate"):
        train(*digits, lenet(), load_recipe("plain", {"optimiser": "sgd", "learning_rate": 1e30}), keep=kept.append)
    assert len(kept) == 0


def test_a_model_that_only_guesses_is_refused(digits):
    with pytest.raises(TrainError, match="guessing among 10 classes"):
        run(digits, lenet(), epochs=1, learning_rate=1e-20)  # too small to change a float32


def test_cancelling_hands_the_model_back(digits):
    def stop(event):
        raise Cancelled

    model = lenet().train()
    with pytest.raises(Cancelled):
        run(digits, model, notify=stop)
    assert not model.training and all(p.is_contiguous() and p.requires_grad for p in model.parameters())


def test_frozen_parameters_stay(digits):
    model = lenet()
    before = model.net[1][0].weight.requires_grad_(False).clone()
    run(digits, model, epochs=3)
    assert torch.equal(before, model.net[1][0].weight)


def test_data_of_another_shape_are_refused(digits):
    with pytest.raises(DataError, match=r"shape \(1, 16, 16\)"):
        run(digits, build("lenet", shape=(1, 16, 16), num_classes=10))
