"""The step written out, the closed form of an affine model, and GradAlign on models whose gradients are known."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.objectives import fast
from rempart.objectives.fast import misalignment

SHAPE = (1, 4, 4)
RNG = Draws(0, torch.arange(8))


def setup(make=toys.smooth):
    model, x = make(SHAPE, 2), toys.images(SHAPE)
    return model.train(), x, toys.labels(model, x)


@pytest.mark.parametrize("step", [None, 0.07])
def test_one_sign_step_from_a_random_start_projected(step):
    model, x, y = setup()
    eps = 0.1
    got = fast(threat=f"linf:{eps}", step=step).craft(model, x, y, rng=RNG, progress=0.0)
    start = (x + RNG.at("pgd", 0).uniform(x, -eps, eps)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    moved = start.detach() - x + (1.25 * eps if step is None else step) * gradient.sign()
    assert torch.allclose(got, (x + moved.clamp(-eps, eps)).clamp(0, 1), atol=1e-7)
    assert float((start.detach() - x).abs().max()) > 0.9 * eps and not got.requires_grad


def test_a_long_step_reaches_the_worst_image_of_an_affine_model():
    """A step of 2 eps crosses the ball from anywhere: the margin falls by exactly eps * |w_0 - w_1|_1."""
    model, x, y = setup(toys.linear)
    weight, _ = toys.affine(model)
    margin = model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None])
    worst = F.softplus(-(margin - 0.01 * (weight[0] - weight[1]).abs().sum())).mean()
    loss = fast(threat="linf:0.01", step=0.02)(model, x, y, rng=RNG)
    assert float(loss.value.detach()) == pytest.approx(float(worst.detach()), rel=1e-5)


def test_grad_align_is_nothing_for_an_affine_model_and_adds_the_weighted_term_otherwise():
    """Two affine logits have the same direction of the gradient everywhere: the cosine is 1."""
    values = {}
    for make in (toys.linear, toys.smooth):
        model, x, y = setup(make)
        bare, bent = (fast(threat="linf:0.1", grad_align=weight)(model, x, y, rng=RNG) for weight in (0.0, 2.0))
        part = bent.parts["misalignment"]
        assert torch.allclose(bent.value, bare.value + 2 * part) and "misalignment" not in bare.parts
        values[make] = float(part)
    assert abs(values[toys.linear]) < 1e-5 and values[toys.smooth] > 0.001


class Angle(nn.Module):
    """Logits (0, x_0 + w x_1^2 / 2), the gradient of whose cross-entropy points along (1, w x_1)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        x = x.flatten(1)
        score = x[:, :1] + self.w * x[:, 1:].square() / 2
        return torch.cat([0 * score, score], 1)


def test_cosine_and_its_derivative_through_the_second_gradient_alone():
    """At (0, a) and (0, b): 1 - (1 + w^2 a b) / (p q) with p = sqrt(1 + w^2 a^2) and q likewise; a's part is fixed."""
    model, w, a, b = Angle(), 2.0, 0.3, 0.9
    here, there = (torch.tensor([[[[0.0, v]]]]) for v in (a, b))
    value = misalignment(model, here, there, torch.tensor([1]))
    value.backward()
    p, q = math.sqrt(1 + (w * a) ** 2), math.sqrt(1 + (w * b) ** 2)
    assert float(value.detach()) == pytest.approx(1 - (1 + w * a * w * b) / (p * q), rel=1e-5)
    slope = -(w * a * b / q - (1 + w * a * w * b) * w * b * b / q**3) / p
    assert float(model.w.grad) == pytest.approx(slope, rel=1e-4)


def test_zero_gradients_are_left_out():
    model, x = toys.plateau().train(), torch.full((3, 1, 2, 2), 0.5)
    other = x + torch.tensor([0.0, 0.2, 0.2]).view(3, 1, 1, 1)  # still flat; on the slope; on the slope
    x = x + torch.tensor([0.0, 0.0, 0.3]).view(3, 1, 1, 1)
    y = torch.zeros(3, dtype=torch.long)
    value = misalignment(model, x, other, y)  # only the third has two gradients, and they agree
    value.backward()
    assert abs(float(value.detach())) < 1e-6
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert float(misalignment(model, x[:2], other[:2], y[:2]).detach()) == 0


def test_the_model_may_have_another_box():
    net = toys.linear(SHAPE, 2).net
    model, x = Classifier(net, shape=SHAPE, num_classes=2, low=-1.0, high=0.6).train(), toys.images(SHAPE)
    got = fast(threat="linf:0.3").craft(model, x, toys.labels(model, x), rng=RNG, progress=0.0)
    assert float(got.max()) == pytest.approx(0.6)
