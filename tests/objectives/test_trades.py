"""TRADES: its loss and its attack written out, the ends of an affine model, and where it is ordinary training."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import toys
from objectives.written_out import RNG, SHAPE, affine, ce, check, check_extremes, kl, network, same
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.objectives import plain, trades


def test_the_formula():
    check(trades(beta=3.0), lambda z, z_adv, y: ce(z, y).mean() + 3 * kl(z, z_adv).mean())


def craft(objective, model, x, y):
    return objective.craft(model, x, y, rng=RNG, progress=1.0)


@pytest.mark.parametrize(("eps", "step"), [(0.03, 0.007), (0.4, 0.5)])  # the longer one goes past the best point
def test_the_attack_in_linf_written_out(eps, step):
    model = toys.smooth().double()
    x = toys.images(SHAPE).double()
    x[0], x[1] = 0.0, 1.0  # at the box
    z = x + 1e-3 * RNG.at("trades").normal(x)
    with torch.no_grad():
        p = F.softmax(model(x), 1)
    for _ in range(6):
        z.requires_grad_()
        value = F.kl_div(F.log_softmax(model(z), 1), p, reduction="sum")
        z = z.detach() + step * torch.autograd.grad(value, z)[0].sign()
        z = torch.clamp(torch.maximum(torch.minimum(z, x + eps), x - eps), 0, 1)
    found = craft(trades(threat=f"linf:{eps}", steps=6, step=step), model, x, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(found, z, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "order"), [("linf", 1), ("l2", 2)])
def test_an_affine_model_is_driven_to_one_end(norm, order):
    """The divergence of two classes grows with |m' - m|, which eps * |w_0 - w_1| bounds, in the dual norm."""
    model, x, y, *_ = affine(0)
    weight = toys.affine(model)[0]
    found = craft(trades(threat=f"{norm}:0.05", steps=5), model, x, y)
    moved = (model(found) - model(x)).detach() @ torch.tensor([1.0, -1.0])
    reach = 0.05 * (weight[0] - weight[1]).norm(order)
    torch.testing.assert_close(moved.abs().double(), reach.expand(8), rtol=1e-3, atol=0)  # l2: the first move
    assert {-1, 1} == set(moved.sign().tolist()), "both ends are worst for some start"
    assert torch.equal(found, craft(trades(threat=f"{norm}:0.05", steps=5), model, x, 1 - y)), "labels do not matter"


def test_the_first_move_is_a_thousandth_of_the_box():
    """Seen through the first gradient: the images the model is asked for, beside the originals."""
    inner = toys.opaque(toys.linear()).net
    model, seen = Classifier(inner, shape=SHAPE, num_classes=3, low=-1.0, high=3.0), []
    inner.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    x = torch.zeros(2000, *SHAPE)
    rng = Draws(1, torch.arange(2000))
    trades(steps=1).craft(model, x, torch.zeros(2000, dtype=torch.long), rng=rng, progress=1.0)
    assert len(seen) == 2 and torch.equal(seen[0], x)
    np.testing.assert_allclose(seen[1].std().item(), 4e-3, rtol=0.02)
    np.testing.assert_allclose(seen[1].mean().item(), 0, atol=1e-4)


def test_beta_0_is_ordinary_training_bit_by_bit():
    assert same((trades(beta=0, steps=2), plain()))
    assert not same((trades(steps=2), plain()))


def test_without_a_budget_the_divergence_vanishes():
    torch.manual_seed(0)
    loss = trades(threat="linf:0")(network(0.0), toys.images(SHAPE), torch.arange(8) % 3, rng=RNG)
    assert loss.parts["divergence"].item() == 0


def test_confident_logits():
    check_extremes(trades())
