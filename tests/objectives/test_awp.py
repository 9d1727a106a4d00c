"""Weight perturbation: written out on an affine model, and without a trace in the model, also after an error."""

import copy

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

import toys
from objectives.written_out import RNG, SHAPE, network
from rempart.core.errors import ModelError
from rempart.objectives import Objective, awp, pgd_at, plain, trades
from rempart.objectives.catalogue import Loss


def batch(dtype=torch.float32):
    return toys.images(SHAPE).to(dtype), torch.arange(8) % 3


def gradients(objective, model, x, y, progress=1.0):
    model = copy.deepcopy(model)
    loss = objective(model, x, y, rng=RNG, progress=progress)
    loss.value.backward()
    return [loss.value.detach(), *(p.grad.clone() for p in model.parameters())]


def test_an_affine_model_written_out():
    """CE of W x + b: its slope in W is the mean of (p - e_y) x^T. Only W moves, not b; the slope at W + V counts."""
    model = toys.linear(SHAPE, 3).double().train()
    x, y = batch(torch.float64)
    flat, (weight, bias) = x.flatten(1).numpy(), (t.numpy() for t in toys.affine(model))

    def at(weight):
        z = flat @ weight.T + bias
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        rest = p - np.eye(3)[y]
        return -np.log(p[np.arange(8), y]).mean(), rest.T @ flat / 8, rest.mean(0)

    slope = at(weight)[1]
    moved = weight + 0.05 * np.linalg.norm(weight) / np.linalg.norm(slope) * slope
    for found, expected in zip(gradients(awp(plain(), 0.05), model, x, y), at(moved), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-14)


def test_every_tensor_by_itself_and_frozen_ones_not():
    """Two layers by hand, through a model that Fabric wraps: names differ there, the tensors do not."""
    model = toys.smooth().double().train()
    x, y = batch(torch.float64)
    first, second = (module for module in model.modules() if isinstance(module, nn.Linear))
    for frozen in (False, True):
        second.weight.requires_grad_(not frozen)
        wanted = [first.weight] if frozen else [first.weight, second.weight]
        slopes = torch.autograd.grad(F.cross_entropy(model(x), y), wanted)
        own = model.state_dict()
        moved = toys.smooth().double()
        moved.load_state_dict(own)
        layers = [module for module in moved.modules() if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for layer, w, slope in zip(layers, wanted, slopes, strict=False):
                layer.weight += 0.01 * w.norm() * slope / slope.norm()
        expected = F.cross_entropy(moved(x), y)
        for wrapped in (model, Fabric(devices=1, accelerator="cpu").setup(model)):
            loss = awp(plain(), 0.01)(wrapped, x, y, rng=RNG)
            torch.testing.assert_close(loss.value, expected)
            assert all(parameter.is_leaf for parameter in model.parameters())


def test_gamma_0_and_the_warm_up_are_the_objective_itself():
    torch.manual_seed(0)
    model, (x, y) = network(0.0), batch()
    plain_one = gradients(trades(steps=2), model, x, y)
    same = [
        gradients(awp(trades(steps=2), 0.0), model, x, y),
        gradients(awp(trades(steps=2), 0.1, warmup=0.5), model, x, y, progress=0.49),
    ]
    assert all(torch.equal(a, b) for found in same for a, b in zip(found, plain_one, strict=True))
    after = gradients(awp(trades(steps=2), 0.1, warmup=0.5), model, x, y, progress=0.5)
    assert not torch.equal(after[0], plain_one[0])


def test_what_the_objective_brings_along_is_kept():
    inner = pgd_at()
    outer = awp(inner, 0.1)
    assert outer.state is inner.state and outer.threat is inner.threat and outer.craft is inner.craft


@pytest.mark.parametrize("make", [plain, pgd_at, trades])
def test_the_loss_rises(make):
    """By gamma * sum of |w| |g| to first order: for small steps no less than 90 % of it."""
    model, (x, y) = toys.smooth().double().train(), batch(torch.float64)
    x_adv = make().craft(model, x, y, rng=RNG, progress=1.0)
    before = make().loss(model, x, x_adv, y, rng=RNG, progress=1.0).value
    weights = [w for w in model.parameters() if w.ndim > 1]
    slopes = torch.autograd.grad(before, weights)
    rise = sum((w.norm() * g.norm()).item() for w, g in zip(weights, slopes, strict=True))
    value = awp(make(), 1e-4).loss(model, x, x_adv, y, rng=RNG, progress=1.0).value
    np.testing.assert_allclose((value - before).item(), 1e-4 * rise, rtol=0.1)


def test_a_loss_of_gradients():
    """|grad_x CE|^2 of an affine model with two classes is (p_other |w_y - w_other|)^2, at the perturbed weights."""

    def steepness(model, x, x_adv, y, *, rng, progress):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x, create_graph=True)
        return Loss(g.flatten(1).square().sum(1).mean(), {})

    model = toys.linear(SHAPE, 2).double().train()
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    x, y = toys.images(SHAPE).double(), torch.arange(8) % 2

    def at(weight):
        z = x.flatten(1) @ weight.T + layer.bias
        other = F.softmax(z, 1).gather(1, 1 - y[:, None])[:, 0]
        return (other.square() * (weight[0] - weight[1]).square().sum()).mean()

    w = layer.weight
    (slope,) = torch.autograd.grad(at(w), w)
    moved = (w + 0.1 * w.norm() * slope / slope.norm()).detach().requires_grad_()
    expected = at(moved)
    expected.backward()
    found = gradients(awp(Objective(loss=steepness), 0.1), model, x, y)
    torch.testing.assert_close(found[0], expected.detach())
    torch.testing.assert_close(found[1], moved.grad)


class Shared(nn.Module):
    """One matrix in two layers and under two names of one module: it counts as one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.weight = self.again = self.first.weight

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).tanh()).tanh() @ self.weight @ self.again


def test_shared_weights_move_together():
    torch.manual_seed(0)
    model, x, y = Shared().double(), torch.randn(6, 1, 4).double(), torch.arange(6) % 4
    w = model.weight
    (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), w)
    found = awp(plain(), 0.1)(model, x, y, rng=RNG).value
    with torch.no_grad():
        w += 0.1 * w.norm() * slope / slope.norm()
    torch.testing.assert_close(found, F.cross_entropy(model(x), y))


def test_one_pass_through_batch_norm_and_one_mask_of_dropout():
    """Statistics, random numbers drawn and the mask are those of one plain pass, at the perturbed weights."""
    torch.manual_seed(0)
    model, (x, y) = network(), batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    slopes = torch.autograd.grad(F.cross_entropy(model(x), y), [w for w in model.parameters() if w.ndim > 1])
    drawn = torch.get_rng_state()
    model.load_state_dict(before)
    torch.manual_seed(5)
    found = awp(plain(), 0.1)(model, x, y, rng=RNG)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    model.load_state_dict(before)
    with torch.no_grad():
        for w, slope in zip([w for w in model.parameters() if w.ndim > 1], slopes, strict=True):
            w += 0.1 * w.norm() * slope / slope.norm()
    torch.manual_seed(5)
    expected = F.cross_entropy(model(x), y)
    torch.testing.assert_close(found.value, expected)
    for name, value in model.named_buffers():
        torch.testing.assert_close(statistics[name], value)
    assert int(statistics["1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_leaves_the_model_as_it_was(call):
    model = toys.raising(toys.linear(), call).train()
    (x, y), before = batch(), list(model.parameters())
    values, drawn = [p.clone() for p in before], torch.get_rng_state()
    with pytest.raises(ModelError, match="planted"):
        awp(plain(), 0.1)(model, x, y, rng=RNG)
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(model.parameters(), before, values, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.net.calls == call


def test_a_weight_that_the_loss_does_not_see_stays():
    model, (x, y) = toys.linear(SHAPE).train(), batch()
    expected = awp(plain(), 0.1)(model, x, y, rng=RNG).value
    model.spare = nn.Linear(2, 2)
    torch.testing.assert_close(awp(plain(), 0.1)(model, x, y, rng=RNG).value, expected)


def test_without_a_tensor_to_move_it_is_the_objective_itself():
    torch.manual_seed(0)
    model, (x, y) = network(0.0), batch()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    assert torch.equal(awp(plain(), 0.1)(model, x, y, rng=RNG).value, plain()(model, x, y, rng=RNG).value)
