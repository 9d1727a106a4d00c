"""Objectives against closed forms on affine models."""

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

import toys
from rempart.core.repro import Draws
from rempart.data import Data
from rempart.objectives import objectives, pgd_at, plain

SHAPE = (1, 4, 4)
RNG = Draws(0, torch.arange(8))


def affine():
    model = toys.linear(SHAPE, 2)
    x = toys.images(SHAPE)
    y = toys.labels(model, x)
    y[0] = 1 - y[0]
    return model.train(), x, y


def test_plain_is_cross_entropy():
    model, x, y = affine()
    loss = plain()(model, x, y, rng=RNG)
    margin = model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None])
    assert torch.allclose(loss.value, F.softplus(-margin).mean())
    assert float(loss.parts["accuracy"]) == 7 / 8


def test_pgd_at_is_cross_entropy_at_the_margin_less_eps_times_the_dual_norm():
    """For two affine logits the worst image within linf eps has the margin m - eps * |w_y - w_other|_1."""
    model, x, y = affine()
    eps = 0.01
    weight, _ = toys.affine(model)
    margin = model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None])
    worst = F.softplus(-(margin - eps * (weight[0] - weight[1]).abs().sum())).mean()
    loss = pgd_at(threat=f"linf:{eps}", steps=10)(model, x, y, rng=RNG)
    assert float(loss.value.detach()) == pytest.approx(float(worst.detach()), rel=1e-4)
    assert float(loss.value.detach()) > float(plain()(model, x, y, rng=RNG).value.detach()) * 1.001


def network(dropout=0.5):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(16, 3)
    )
    return net.train()


def test_pgd_at_without_a_budget_is_plain():
    torch.manual_seed(0)
    model, x, y = network(), toys.images(SHAPE), torch.arange(8) % 3
    values = []
    for objective in (plain(), pgd_at(threat="linf:0")):
        torch.manual_seed(1)
        model.zero_grad()
        model[1].reset_running_stats()
        loss = objective(model, x, y, rng=RNG)
        loss.value.backward()
        values.append(
            [loss.value.detach(), *(p.grad.clone() for p in model.parameters()), model[1].running_var.clone()]
        )
    torch.testing.assert_close(*values)


def test_the_attack_leaves_no_trace_in_the_model(untouched_rng):
    state = torch.get_rng_state()
    model, x, y = network(0.0), toys.images(SHAPE), torch.arange(8) % 3
    torch.set_rng_state(state)
    loss = pgd_at(threat="linf:0.1", steps=3)(model, x, y, rng=RNG)
    assert int(model[1].num_batches_tracked) == 1  # one pass in training mode: the loss
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert loss.value.requires_grad


def begun(entry, model, x, y):
    """The objective with its defaults, ready for the first epoch."""
    objective = entry.function()
    if objective.before_epoch:
        data = Data("x", "train", RNG.index, y, SHAPE, ("0", "1", "2"), lambda numbers: x[numbers])
        objective.before_epoch(model, data, rng=RNG, epoch=1)
    return objective


@pytest.mark.parametrize("entry", objectives, ids=lambda entry: entry.name)
def test_every_objective_gives_a_scalar_with_gradients_and_an_accuracy(entry):
    torch.manual_seed(0)
    model, x, y = network(), toys.images(SHAPE), torch.arange(8) % 3
    objective = begun(entry, model, x, y)
    loss = objective(model, x, y, rng=RNG)
    loss.value.backward()
    assert loss.value.shape == () and not loss.parts["accuracy"].requires_grad
    assert 0 <= float(loss.parts["accuracy"]) <= 1
    for layer in model:
        for p in layer.parameters():
            left_alone = p.grad is None and isinstance(layer, nn.BatchNorm2d)  # as fine-tuning methods may
            assert left_alone or bool(p.grad.isfinite().all())


@pytest.mark.parametrize("entry", objectives, ids=lambda entry: entry.name)
def test_a_wrapper_and_half_precision_change_nothing_but_rounding(entry):
    torch.manual_seed(0)
    bare, x, y = network(0.0), toys.images(SHAPE), torch.arange(8) % 3
    values = []
    for model in (bare, Fabric(accelerator="cpu", devices=1).setup_module(bare)):
        bare[1].reset_running_stats()
        values.append(begun(entry, model, x, y)(model, x, y, rng=RNG).value.detach())
    assert torch.equal(values[0], values[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bare[1].reset_running_stats()
        value = begun(entry, bare, x, y)(bare, x, y, rng=RNG).value.detach()
    assert value.dtype == torch.float32 and float(value) == pytest.approx(float(values[0]), rel=0.06)
