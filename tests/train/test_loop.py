"""The loop against full-batch gradient descent written out, and its promises: same seed, same run."""

import contextlib
import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import nn

from rempart.attacks import attack_batch
from rempart.core.errors import Cancelled, DataError, SpecError, TrainError
from rempart.core.model import Classifier
from rempart.core.ranks import Ranks
from rempart.core.repro import digest_state
from rempart.core.threat import Threat
from rempart.data import open_data
from rempart.models import build
from rempart.objectives import Loss, Objective
from rempart.objectives.plain import cross_entropy
from rempart.report.schema import Epoch
from rempart.train import load_recipe, train
from rempart.train.config import Recipe
from rempart.train.loop import best, collapsed, schedule
from rempart.train.setup import setup


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


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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

    def spy(model, x, x_adv, y, *, rng, progress):
        seen.append(rng.index.tolist())
        assert all(torch.equal(image, stored[n]) for n, image in zip(seen[-1], x, strict=True))
        z = model(x)
        return Loss(nn.functional.cross_entropy(z, y), {"accuracy": torch.tensor(0.0)})

    monkeypatch.setattr(Recipe, "build_objective", lambda self: Objective(loss=spy))
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
        ("step", {0: 1, 0.74: 1, 0.75: 0.1, 0.9: 0.01, 1: 0.01}),
    ],
)
def test_schedules(name, points):
    recipe = load_recipe("plain", {"schedule": name})
    assert [schedule(recipe, t) for t in points] == pytest.approx(list(points.values()), abs=1e-12)


def test_events_carry_figures_and_progress(digits):
    events = []
    epochs = run(digits, lenet(), "pgd-at", epochs=2, threat="linf:0.01", steps=1, notify=events.append)
    assert {event.stage for event in events} == {"train"} and {event.total for event in events} == {320}
    done = [event.done for event in events]
    assert done == sorted(done) and done[-1] == 320
    clean, attacked = epochs[-1].accuracy, epochs[-1].robust_accuracy
    assert events[-1].values == {"loss": epochs[-1].loss, "clean accuracy": clean, "accuracy under attack": attacked}
    assert "validation" in events[-1].note
    assert events[0].values.keys() == {"loss", "accuracy"}
    second = next(event for event in events if "epoch 2, training" in event.note)
    assert second.values["clean accuracy"] == epochs[0].accuracy


def test_a_loss_that_is_not_finite_stops_the_training(digits):
    kept = []
    with pytest.raises(TrainError, match="smaller learning_rate"):
        train(
            *digits,
            lenet(),
            load_recipe("plain", {"optimiser": "sgd", "learning_rate": 1e30}),
            keep=lambda epochs, state: kept.append(epochs),
        )
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


# ---- what stays the same


@pytest.mark.parametrize(
    ("recipe", "model", "options"),
    [
        ("plain", "lenet", {"optimiser": "sgd", "ema": 0.9}),
        ("pgd-at", "nin", {"threat": "linf:0.02", "steps": 2}),  # dropout
        ("pgd-at", "mri-cnn", {"precision": "bf16", "schedule": "step", "threat": "linf:0.02"}),  # batch norm
        ("free", "lenet", {"replays": 2, "batch_size": 50}),  # perturbations are kept
        ("ima", "lenet", {"threat": "l2:0.5", "delta": 0.1, "steps": 3}),  # margins are kept
        ("adaptive", "lenet", {"threat": "linf:0.05", "steps": 2}),  # the budget is kept
    ],
)
def test_a_resumed_training_repeats_the_losses_and_ends_with_the_same_weights(digits, recipe, model, options):
    wide = [data.take(torch.arange(len(data))) for data in digits]
    shape = (1, 8, 8)
    if model == "mri-cnn":  # needs larger images
        wide = [replace(data, shape=(1, 16, 16), read=enlarged(data.read), stamps=None) for data in wide]
        shape = (1, 16, 16)

    def fresh():
        return build(model, shape=shape, num_classes=10, seed=3)

    options = {"epochs": 4, "learning_rate": 1e-3, **options}
    kept = []
    chosen = load_recipe(recipe, options)
    with contextlib.suppress(TrainError):  # it need not learn
        train(*wide, whole := fresh(), chosen, seed=5, keep=lambda epochs, state: kept.append((epochs, state)))
    epochs, state = kept[1]
    again = []
    with contextlib.suppress(TrainError):
        train(
            *wide,
            resumed := fresh(),
            chosen,
            seed=5,
            resume=(epochs, state),
            keep=lambda epochs, state: again.append((epochs, state)),
        )
    strip = [epoch.model_copy(update={"seconds": 0}) for epoch in kept[-1][0]]
    assert [epoch.model_copy(update={"seconds": 0}) for epoch in again[-1][0]] == strip
    assert same(again[0][1], state)  # what was finished is kept once more
    assert len(again) == 3 and same(weights(whole), weights(resumed)) and same(kept[-1][1], again[-1][1])


def enlarged(read):
    return lambda numbers: nn.functional.interpolate(read(numbers), scale_factor=2.0)


def test_parts_of_a_batch_add_up_to_it(digits):
    whole, parted = lenet(), lenet()
    options = {"epochs": 2, "optimiser": "sgd", "learning_rate": 0.02, "threat": "linf:0.02", "steps": 2}
    one = run(digits, whole, "pgd-at", **options)
    other = run(digits, parted, "pgd-at", accumulate=3, **options)
    assert [epoch.loss for epoch in other] == pytest.approx([epoch.loss for epoch in one], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


def test_the_running_mean_is_that_of_the_weights_written_out(digits):
    plain, averaged, seen = lenet(), lenet(), []
    options = {"epochs": 3, "batch_size": 160, "schedule": "constant"}
    train(*digits, plain, load_recipe("plain", options), keep=lambda epochs, state: seen.append(state))
    train(*digits, averaged, load_recipe("plain", {**options, "ema": 0.999}))
    mean = weights(lenet())
    for step, state in enumerate(seen):  # one step an epoch
        decay = min(0.999, (1 + step) / (10 + step))
        mean = {name: decay * value + (1 - decay) * state[f"model/{name}"] for name, value in mean.items()}
    got = weights(averaged)
    assert all(torch.allclose(mean[name], got[name], atol=1e-6) for name in got)
    assert not same(weights(plain), got)


def test_a_long_gradient_is_shortened(digits):
    model = softmax_regression()  # from zero weights
    options = {"epochs": 1, "batch_size": 160, "optimiser": "sgd", "weight_decay": 0, "schedule": "constant"}
    with contextlib.suppress(TrainError):
        run(digits, model, learning_rate=1.0, clip=1e-3, **options)
    step = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert float(step.norm()) == pytest.approx(1.9e-3, rel=1e-4)  # Nesterov: (1 + 0.9) times the gradient


def test_costs_are_counted(digits):
    epochs = run(digits, lenet(), "pgd-at", epochs=2, threat="linf:0.02", steps=3)
    n = len(digits[0])
    assert {(epoch.queries, epoch.gradients) for epoch in epochs} == {((3 + 1 + 1) * n, (3 + 1) * n)}
    assert {(epoch.queries, epoch.gradients) for epoch in run(digits, lenet(), epochs=2)} == {(n, n)}


# ---- what is measured, and when it ends


def test_accuracy_under_attack_is_that_of_an_attack_from_outside(digits):
    """Epochs are measured from the same starts; an independent call of the attack gives the same figure."""
    model = lenet()
    epochs = run(digits, model, "pgd-at", epochs=3, threat="linf:0.1", steps=2, seed=9)
    test = digits[1].load().batch(torch.arange(100))
    outcome = attack_batch(model, test.x, test.y, Threat.parse("linf:0.1"), "pgd", {"steps": 10}, seed=9)
    assert epochs[-1].robust_accuracy == pytest.approx(1 - float(outcome.broken.double().mean()), abs=0.03)
    assert epochs[-1].robust_accuracy < epochs[-1].accuracy
    assert epochs[-1].balanced_accuracy == pytest.approx(
        float(torch.stack([outcome.correct[test.y == k].double().mean() for k in range(10)]).mean())
    )


def test_what_is_measured_can_be_chosen_and_left_out(digits):
    assert run(digits, lenet(), epochs=2)[-1].robust_accuracy is None
    assert run(digits, lenet(), epochs=2, validation_threat="linf:0.05")[-1].robust_accuracy is not None
    alone = train(digits[0], None, lenet(), load_recipe("plain", {"epochs": 2}))
    assert alone[-1].robust_accuracy is None and alone[-1].balanced_accuracy is None and alone[-1].accuracy > 0.3


def test_the_best_epoch():
    def epoch(number, accuracy, robust=None):
        figures = {"loss": 1, "seconds": 1, "learning_rate": 1}
        return Epoch(epoch=number, accuracy=accuracy, robust_accuracy=robust, **figures)

    assert best([epoch(1, 0.9, 0.2), epoch(2, 0.8, 0.5), epoch(3, 0.99, 0.4)]).epoch == 2
    assert best([epoch(1, 0.9), epoch(2, 0.95), epoch(3, 0.95), epoch(4, 0.9)]).epoch == 3
    recipe = load_recipe("pgd-at", {"collapse": 0.2})
    falling = [epoch(1, 0.9, 0.6), epoch(2, 0.9, 0.41), epoch(3, 0.95, 0.39)]
    assert [collapsed(recipe, falling[:n]) for n in range(4)] == [False, False, False, True]
    assert not collapsed(load_recipe("pgd-at"), falling)


def test_a_collapse_under_attack_ends_the_training(digits, monkeypatch):
    figures = iter([0.5, 0.6, 0.3, 0.9])

    def measured(run, data, epoch):
        return epoch.model_copy(update={"robust_accuracy": next(figures), "accuracy": 0.9, "balanced_accuracy": 0.9})

    monkeypatch.setattr("rempart.train.loop.validate", measured)
    epochs = run(digits, lenet(), epochs=6, collapse=0.2)
    assert [epoch.robust_accuracy for epoch in epochs] == [0.5, 0.6, 0.3]


@pytest.mark.parametrize(
    ("recalls", "message"),
    [
        ([0.9, 0.1], r"guessing among 10 classes, got 0\.100 after epoch 2, where it was 0\.900 before"),
        ([0.9, 0.0], "learnt to answer wrong"),
        ([0.0], "learnt to answer wrong"),
        ([0.1, 0.15, 0.1], None),  # not yet learnt, not yet the end
    ],
)
def test_a_fall_to_guessing_and_a_model_turned_round_stop_the_training(digits, monkeypatch, recalls, message):
    figures, kept = iter([*recalls, 0.9, 0.9, 0.9, 0.9]), []
    monkeypatch.setattr(
        "rempart.train.loop.validate",
        lambda run, data, epoch: epoch.model_copy(update={"balanced_accuracy": next(figures)}),
    )
    expected = contextlib.nullcontext() if message is None else pytest.raises(TrainError, match=message)
    with expected:
        train(*digits, lenet(), load_recipe("plain", {"epochs": 5}), keep=lambda epochs, state: kept.append(epochs))
    assert len(kept) == (5 if message is None else len(recalls))


def test_few_images_of_a_class_are_no_sign_of_a_model_turned_round(digits, monkeypatch):
    """Two images of a rare class say nothing: a mean recall of 0.33 is 66 % of the others and none of these two."""
    figures = iter([0.33, 0.9])
    monkeypatch.setattr(
        "rempart.train.loop.validate",
        lambda run, data, epoch: epoch.model_copy(update={"balanced_accuracy": next(figures)}),
    )
    learn, validation = digits
    rare = replace(validation, labels=torch.tensor([0] * 98 + [1] * 2), stamps=None)
    assert len(train(learn, rare, lenet(), load_recipe("plain", {"epochs": 2}))) == 2


def test_validation_images_of_one_class_cannot_tell_guessing(digits):
    learn, validation = digits
    ones = validation.take((validation.labels == 1).nonzero().flatten())
    assert len(train(learn, ones, lenet(), load_recipe("plain", {"epochs": 2}))) == 2


def test_a_training_that_ended_in_guessing_does_not_succeed_when_resumed(digits):
    kept, recipe = [], load_recipe("plain", {"epochs": 1, "learning_rate": 1e-20})
    with pytest.raises(TrainError, match="guessing"):
        train(*digits, lenet(), recipe, keep=lambda epochs, state: kept.append((epochs, state)))
    with pytest.raises(TrainError, match="guessing"):
        train(*digits, lenet(), recipe, resume=kept[-1])


def test_an_objective_of_one_process_refuses_several(digits, monkeypatch):
    monkeypatch.setattr(Recipe, "build_objective", lambda self: Objective(loss=cross_entropy, alone=True))
    with pytest.raises(SpecError, match="one process"):
        setup(lenet(), load_recipe("plain"), seed=0, samples=100, ranks=Ranks(0, 2, 0, list))
    monkeypatch.setattr(Recipe, "build_objective", lambda self: Objective(loss=cross_entropy))
    with pytest.raises(SpecError, match="at least one image of each batch"):
        setup(lenet(), load_recipe("plain", {"batch_size": 2}), seed=0, samples=100, ranks=Ranks(0, 3, 0, list))
    monkeypatch.setattr(Recipe, "build_objective", lambda self: Objective(loss=cross_entropy, repeats=2))
    with pytest.raises(SpecError, match="accumulate=1"):
        setup(lenet(), load_recipe("plain", {"accumulate": 2}), seed=0, samples=100)
