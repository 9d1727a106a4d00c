"""The closed form of two affine logits, weights against numerical differences, and one form against the other."""

import pytest
import torch
from torch.nn import functional as F

import toys
from rempart.core.repro import Draws
from rempart.objectives import input_gradient, plain

SHAPE, RNG = (1, 4, 4), Draws(0, torch.arange(8))
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}
norms = pytest.mark.parametrize("norm", DUAL)


def affine():
    model, x = toys.linear(SHAPE, 2).double(), toys.images(SHAPE).double()
    y = toys.labels(model, x)
    y[0] = 1 - y[0]
    return model.train(), x, y


@norms
def test_two_affine_logits(norm):
    """CE = softplus(-m), and its gradient is sigmoid(-m) times w_y - w_other, in the dual norm."""
    model, x, y = affine()
    weight, _ = toys.affine(model)
    margin = (model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None]))[:, 0]
    slope = torch.sigmoid(-margin) * torch.linalg.vector_norm(weight[0] - weight[1], DUAL[norm])
    loss = input_gradient(weight=0.3, norm=norm)(model, x, y, rng=RNG)
    assert torch.allclose(loss.value, F.softplus(-margin).mean() + 0.3 * slope.square().mean(), rtol=1e-6)
    assert torch.allclose(loss.parts["slope"], slope.mean(), rtol=1e-6) and float(loss.parts["accuracy"]) == 7 / 8


@norms
def test_the_difference_on_two_affine_logits(norm):
    """Along the steepest ascent the margin falls by h times the dual norm of w_y - w_other, exactly."""
    model, x, y = affine()
    weight, _ = toys.affine(model)
    margin = (model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None]))[:, 0]
    size, h = torch.linalg.vector_norm(weight[0] - weight[1], DUAL[norm]), 0.05
    slope = (F.softplus(-(margin - h * size)) - F.softplus(-margin)) / h
    loss = input_gradient(weight=0.3, norm=norm, form="difference", h=h)(model, x, y, rng=RNG)
    assert torch.allclose(loss.value, F.softplus(-margin).mean() + 0.3 * slope.square().mean(), rtol=1e-6)


@norms
def test_the_difference_becomes_the_exact_form(norm):
    """Value and gradients on a curved model; the distance between the forms falls with h, tenfold for tenfold."""
    model, x = toys.smooth(SHAPE, 3).double().train(), toys.images(SHAPE).double()
    y = torch.arange(8) % 3

    def measure(**options):
        model.zero_grad()
        loss = input_gradient(weight=1.0, norm=norm, **options)(model, x, y, rng=RNG)
        loss.value.backward()
        return torch.cat([loss.value.detach()[None], *(p.grad.flatten().clone() for p in model.parameters())])

    exact = measure()
    far, near = (float((measure(form="difference", h=h) - exact).abs().max()) for h in (1e-4, 1e-5))
    assert 8 < far / near < 12 and near < 1e-3 * float(exact.abs().max())


def test_the_exact_form_is_differentiated_through_the_gradient():
    """Against central differences of the loss in one weight."""
    model, x = toys.smooth(SHAPE, 3).double().train(), toys.images(SHAPE).double()
    y, objective = torch.arange(8) % 3, input_gradient(weight=1.0)
    objective(model, x, y, rng=RNG).value.backward()
    weight, values = model.net[1].weight, []
    slope = float(weight.grad[3, 5])
    for change in (1e-5, -2e-5):
        with torch.no_grad():
            weight[3, 5] += change
        values.append(float(objective(model, x, y, rng=RNG).value.detach()))
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("form", ["exact", "difference"])
def test_without_weight_it_is_plain_and_zero_gradients_do_no_harm(form):
    model, x, y = affine()
    without, ordinary = (one(model, x, y, rng=RNG).value for one in (input_gradient(weight=0.0, form=form), plain()))
    assert torch.allclose(without, ordinary, rtol=1e-12)
    flat = toys.constant(SHAPE, 3).train()
    loss = input_gradient(form=form)(flat, x.float(), y, rng=RNG)
    loss.value.backward()
    assert float(loss.parts["slope"]) == 0
    assert all(bool(p.grad.isfinite().all()) for p in flat.parameters())
