"""Gradient-feature alignment against gradients written out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from rempart.core.errors import ModelError
from rempart.core.repro import Draws
from rempart.objectives import gfa
from rempart.objectives.gfa import cosines

SHAPE = (1, 4, 4)
RNG = Draws(0, torch.arange(8))
PHI = {
    "abs": lambda a: 1 - a.abs(),
    "sq": lambda a: 1 - a * a,
    "neg": lambda a: 1 + a,
    "pos": lambda a: 1 - a,
}


def cos(a, b):
    return (a * b).sum(1) / ((a * a).sum(1) * (b * b).sum(1)).sqrt()


def smooth():
    """z = A tanh(B x + c) in float64, all images classified correctly."""
    model = toys.smooth(SHAPE).double().train()
    x = toys.images(SHAPE).double()
    return model, x, toys.labels(model, x)


def written_out(model, x, y, task):
    """Task loss and the cosines at the image (grey 0.5 counting as 0) and at the hidden layer, by the chain rule."""
    b, a = model.net[1], model.net[3]
    h = torch.tanh(x.flatten(1) @ b.weight.T + b.bias)
    z = h @ a.weight.T + a.bias
    goal = F.one_hot(y, z.shape[1]).double()
    if task == "mse":
        losses, residual = ((z - goal) ** 2).sum(1), 2 * (z - goal)
    else:
        losses, residual = -z.log_softmax(1).gather(1, y[:, None])[:, 0], z.softmax(1) - goal
    dh = residual @ a.weight
    dx = (dh * (1 - h * h)) @ b.weight
    return losses, [cos(2 * x.flatten(1) - 1, dx), cos(h, dh)]


@pytest.mark.parametrize("penalty", PHI)
@pytest.mark.parametrize("layers", ["first", "deep", "net.2"])
@pytest.mark.parametrize("task", ["mse", "ce"])
def test_value_and_gradient_are_those_of_the_chain_rule_written_out(task, layers, penalty):
    """The gradient of the formula needs one backward pass; that of the objective goes twice through the network."""
    model, x, y = smooth()
    losses, aligned = written_out(model, x, y, task)
    used = {"first": aligned[:1], "deep": aligned, "net.2": aligned[1:]}[layers]
    expected = losses.mean() + 0.7 * sum(PHI[penalty](a).mean() for a in used)
    expected_gradient = torch.autograd.grad(expected, list(model.parameters()))
    loss = gfa(layers=layers, task=task, penalty=penalty, weight=0.7)(model, x, y, rng=RNG)
    gradient = torch.autograd.grad(loss.value, list(model.parameters()))
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(gradient, expected_gradient, strict=True))
    assert float(loss.parts["task"]) == pytest.approx(float(losses.mean().detach()))


def test_the_gradient_is_that_of_finite_differences():
    model, x, y = smooth()
    objective, weight = gfa(layers="deep", weight=2.0), model.net[1].weight
    (gradient,) = torch.autograd.grad(objective(model, x, y, rng=RNG).value, weight)
    for i, j in ((0, 0), (3, 7), (15, 15)):
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                weight[i, j] += h
            values.append(float(objective(model, x, y, rng=RNG).value.detach()))
            with torch.no_grad():
                weight[i, j] -= h
        assert float(gradient[i, j]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-8)


def homogeneous(classes=2):
    """A ReLU network without biases, in float64: each margin is the product of its gradient with the image."""
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Linear(12, classes, bias=False)
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.rand((8, *SHAPE), generator=generator).double()
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("layers", ["first", "2"])
@pytest.mark.parametrize(("penalty", "expected"), [("neg", -1), ("abs", -1), ("pos", 1), ("sq", 2)])
def test_without_biases_and_with_two_classes_it_is_the_linearised_radius(penalty, expected, layers):
    """rho = |m| / (|grad m| |x|) is the cosine of image and margin; cross-entropy points against the margin."""
    net, x, y = homogeneous()
    hidden = net[:3](x).detach()
    point = (x if layers == "first" else hidden).requires_grad_(True)
    z = net(point) if layers == "first" else net[3](point)
    margin = (z.gather(1, y[:, None]) - z.gather(1, 1 - y[:, None]))[:, 0]
    (slope,) = torch.autograd.grad(margin.sum(), point)
    rho = margin.detach().abs() / slope.flatten(1).norm(dim=1) / point.detach().flatten(1).norm(dim=1)
    assert float(rho.min()) > 0.01 and float(rho.max()) < 0.99
    wanted = {-1: 1 - rho, 1: 1 + rho, 2: 1 - rho**2}[expected].mean()
    loss = gfa(task="ce", penalty=penalty, origin=0.0, layers=layers)(net, x.detach(), y, rng=RNG)
    assert float(loss.parts["penalty"]) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("origin", [0.0, 0.25, 1.0])
def test_the_image_is_counted_from_the_origin_in_the_box_of_the_model(origin):
    model, x, y = smooth()
    model.low, model.high = -1.0, 3.0
    leaf = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    expected = (1 + cos((x - (4 * origin - 1)).flatten(1), slope.flatten(1))).mean()
    loss = gfa(task="ce", penalty="neg", origin=origin)(model, x, y, rng=RNG)
    assert float(loss.parts["penalty"]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("task", ["mse", "ce"])
def test_at_the_start_of_the_warm_up_and_without_weight_it_is_the_task_alone(task):
    model, x, y = smooth()
    z = model(x)
    plain = F.cross_entropy(z, y) if task == "ce" else (z - F.one_hot(y, 3)).square().sum(1).mean()
    plain_gradient = torch.autograd.grad(plain, list(model.parameters()))
    for objective, progress in ((gfa(task=task, warmup=0.2), 0.0), (gfa(task=task, weight=0, warmup=0), 0.5)):
        loss = objective(model, x, y, rng=RNG, progress=progress)
        gradient = torch.autograd.grad(loss.value, list(model.parameters()))
        torch.testing.assert_close(loss.value.detach(), plain.detach())  # another order of the sum over images
        torch.testing.assert_close(gradient, plain_gradient)


def test_the_weight_rises_over_the_warm_up():
    model, x, y = smooth()
    values = [float(gfa(warmup=0.4)(model, x, y, rng=RNG, progress=t).value.detach()) for t in (0, 0.2, 0.4, 1)]
    values.append(float(gfa(warmup=0)(model, x, y, rng=RNG, progress=0).value.detach()))
    extra = values[-1] - values[0]
    assert extra > 0.1
    assert [value - values[0] for value in values] == pytest.approx([0, extra / 2, extra, extra, extra])


def test_images_that_are_wrong_count_for_the_task_only():
    model, x, y = smooth()
    wrong = torch.arange(8) % 3 == 0
    y = torch.where(wrong, (y + 1) % 3, y)
    _, (aligned, _) = written_out(model, x, y, "mse")
    loss = gfa()(model, x, y, rng=RNG)
    assert float(loss.parts["penalty"]) == pytest.approx(float((1 - aligned[~wrong].detach().abs()).mean()), rel=1e-9)
    assert float(loss.parts["accuracy"]) == 5 / 8
    none = gfa()(model, x, (toys.labels(model, x) + 1) % 3, rng=RNG)
    assert float(none.parts["penalty"]) == 0
    assert torch.equal(none.value.detach(), none.parts["task"])


def test_images_without_a_gradient_are_left_out_and_spoil_nothing():
    """Of the toy on a plateau only images brighter than 0.55 have a gradient; there the image is parallel to it."""
    model = toys.plateau().train()
    x = torch.stack([torch.full((1, 2, 2), grey) for grey in (0.4, 0.5, 0.52)])
    x = torch.cat([x, torch.tensor([[[[0.7, 0.5], [0.5, 0.52]]]])])
    y = torch.tensor([0, 0, 0, 0])
    loss = gfa(task="ce", penalty="abs", origin=0.0)(model, x, y, rng=RNG.select(torch.arange(4)))
    (slope,) = torch.autograd.grad(model(leaf := x.clone().requires_grad_(True))[:, 1].sum(), leaf)
    assert slope.flatten(1).any(1).tolist() == [False, False, False, True]
    expected = 1 - float(x[3].sum() / (2 * x[3].norm()))  # the gradient is (1, 1, 1, 1)
    assert float(loss.parts["penalty"]) == pytest.approx(expected, rel=1e-5)
    loss.value.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("scale", [1, 1000])
def test_confident_images_keep_their_direction(scale):
    """In float32 the gradient of cross-entropy is 0 from a margin of about 100 on, and wrong from 17 on."""
    model, x = toys.linear(SHAPE, 2), toys.images(SHAPE)
    y = toys.labels(model, x)
    weight, _ = toys.affine(model)
    rows = torch.arange(8)
    expected = (1 + cos(x.double().flatten(1) - 0.5, (weight[1 - y] - weight[y])[rows])).mean()
    loss = gfa(task="ce", penalty="neg")(toys.rescaled(model, scale).train(), x, y, rng=RNG)
    assert float(loss.parts["penalty"]) == pytest.approx(float(expected), rel=1e-4)


def test_cosines_of_tiny_and_of_zero_vectors():
    a = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    b = torch.tensor([[4.0, 3.0], [4e-30, 3e-30], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    cosine, defined = cosines(a, b)
    assert cosine.tolist() == pytest.approx([0.96, 0.96, 0, 0], rel=1e-6)
    assert defined.tolist() == [True, True, False, False]
    torch.where(defined, cosine, 0.0).sum().backward()
    assert bool(a.grad.isfinite().all()) and torch.allclose(a.grad[0], torch.tensor([0.0448, -0.0336]), atol=1e-6)


def test_unknown_layers_are_refused():
    model, x, y = smooth()
    with pytest.raises(ModelError, match=r"'net.9'"):
        gfa(layers="input,net.9")(model, x, y, rng=RNG)


def test_deep_looks_behind_the_pooling():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)
    )
    x, y = toys.images(SHAPE), torch.arange(8) % 3
    deep, named = (gfa(layers=layers, warmup=0)(net, x, y, rng=RNG).value for layers in ("deep", "input,2,5"))
    assert torch.equal(deep, named)


def test_named_layers_are_what_deep_stands_for():
    model, x, y = smooth()
    deep, named = (gfa(layers=layers)(model, x, y, rng=RNG).value for layers in ("deep", "input, net.2"))
    assert torch.equal(deep, named)
