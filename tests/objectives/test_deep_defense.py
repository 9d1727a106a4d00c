"""Deep Defense against a plain loop over all classes, closed forms and finite differences."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from rempart.core.errors import TrainError
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.data import Data
from rempart.objectives import deep_defense
from rempart.objectives.deep_defense import Plan, _one_function, perturbations, ratios

RNG = Draws(0, torch.arange(16))


@pytest.fixture
def scene():
    """A small net with max pooling in float64, and images of which it gets some right and some wrong."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 5)
        )
        x = torch.rand(16, 1, 8, 8, dtype=torch.float64)
        for layer in (net[0], net[4], net[6]):
            layer.weight.data *= 2
            layer.bias.data.normal_()
    model = Classifier(net, shape=(1, 8, 8), num_classes=5).double().train()
    y = model(x).argmax(1)
    y[::3] = (y[::3] + 1) % 5
    return model, x, y


def reference(model, x, y, *, weight, c, d, steps, overshoot, stabiliser, candidates=5, cap=math.inf):
    """The released algorithm: all gradients with graph for the whole batch, classes in a loop, masks for who is done.

    Returns the loss, the ratios and how many linearisations each image took.
    """
    x = x.clone().requires_grad_(True)
    logits = model(x)
    first = logits.argmax(1)
    right = first == y
    order = logits.detach().argsort(1, descending=True)[:, :candidates]
    point, total, done = x, torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
    taken = torch.zeros(len(x))
    for _ in range(steps):
        z = model(point)
        slopes = [torch.autograd.grad(z[:, k].sum(), point, create_graph=True)[0] for k in range(z.shape[1])]
        moves = []
        for i in range(len(x)):
            if right[i]:
                pairs = [(int(k), int(first[i])) for k in order[i] if k != first[i]]
            else:
                pairs = [(int(y[i]), int(z[i].argmax()))]
            best = None
            for to, start in pairs:
                f, w = z[i, to] - z[i, start], slopes[to][i] - slopes[start][i]
                size = (w + stabiliser).pow(2).sum().sqrt()
                distance = f.abs() / size
                if best is None or distance < best[0]:
                    best = (distance, distance * w / size)
            moves.append(best[1])
        move = torch.stack(moves) * ~done.view(-1, 1, 1, 1)
        taken += ~done
        total, point = total + move, point + move
        hit = model(x + (1 + overshoot) * total).argmax(1)
        done = done | torch.where(right, hit != first, hit == y)
        if bool(done.all()):
            break
    r = ((1 + overshoot) * total).flatten(1).norm(dim=1) / x.detach().flatten(1).norm(dim=1)
    terms = torch.where(right, (-c * r).exp(), (d * r).exp().clamp_max(cap))
    return F.cross_entropy(logits, y) + weight * terms.mean(), r.detach(), taken


OPTIONS = {"weight": 3.0, "c": 4.0, "d": 5.0, "steps": 4, "overshoot": 0.02, "stabiliser": 1e-4}


@pytest.mark.parametrize("change", [{}, {"steps": 1}, {"candidates": 3}, {"candidates": 2}, {"cap": 1.2}])
def test_loss_and_gradients_are_those_of_a_loop_over_everything(scene, change):
    model, x, y = scene
    options = {**OPTIONS, **change}
    expected, r, taken = reference(model, x, y, **options)
    slopes = torch.autograd.grad(expected, list(model.parameters()))
    loss = deep_defense(**options)(model, x, y, rng=RNG)
    own = torch.autograd.grad(loss.value, list(model.parameters()))
    right = model(x).argmax(1) == y
    assert 0 < int(right.sum()) < 16 and float(r.min()) > 0
    if options["steps"] == 4:
        assert len(taken[right].unique()) > 1 and int(taken.max()) > 2, "images should leave at different times"
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.parts["r"], r[right].mean(), rtol=1e-12, atol=0)
    assert float(loss.parts["accuracy"]) == float(right.float().mean())
    for got, wanted in zip(own, slopes, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_two_affine_logits_give_the_distance_to_the_boundary_and_its_gradient():
    """r = 1.02 |f| / (|w| |x|), reached in one step; with f = z_1 - z_0, dr / db_1 = 1.02 sign(f) / (|w| |x|)."""
    model = toys.linear((1, 4, 4), 2).double().train()
    x, layer = toys.images((1, 4, 4)).double(), model.net[1]
    y = toys.labels(model, x)
    w = (layer.weight[1] - layer.weight[0]).detach()
    f = (x.flatten(1) @ w + layer.bias[1] - layer.bias[0]).detach()
    scale = 1.02 / (w.norm() * x.flatten(1).norm(dim=1))
    r = f.abs() * scale
    objective = deep_defense(weight=2.0, c=30.0, stabiliser=1e-15)
    loss = objective(model, x, y, rng=RNG)
    entropy = F.cross_entropy(model(x), y)
    torch.testing.assert_close(loss.value, entropy + 2 * torch.exp(-30 * r).mean(), rtol=1e-12, atol=0)
    got = torch.autograd.grad(loss.value - entropy, layer.bias)[0][1]
    torch.testing.assert_close(got, (2 * -30 * torch.exp(-30 * r) * f.sign() * scale).mean(), rtol=1e-9, atol=0)

    wrong = objective(model, x, 1 - y, rng=RNG).value - F.cross_entropy(model(x), 1 - y)
    torch.testing.assert_close(wrong, 2 * torch.exp(5 * r).mean(), rtol=1e-12, atol=0)
    capped = deep_defense(weight=2.0, cap=1.0, stabiliser=1e-15)(model, x, 1 - y, rng=RNG).value
    torch.testing.assert_close(capped - F.cross_entropy(model(x), 1 - y), torch.full_like(capped, 2.0))


def test_the_gradient_is_that_of_finite_differences(scene):
    model, x, y = scene
    objective = deep_defense(**OPTIONS)
    model.zero_grad()
    objective(model, x, y, rng=RNG).value.backward()
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    slope = sum(float((p.grad * way).sum()) for p, way in zip(model.parameters(), ways, strict=True))
    values = []
    for h in (1e-6, -1e-6):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, way in zip(moved.parameters(), ways, strict=True):
                p += h * way
        values.append(float(objective(moved, x, y, rng=RNG).value.detach()))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_an_image_costs_the_same_in_any_batch(scene):
    model, x, y = scene
    objective = deep_defense(**OPTIONS)
    whole = float(objective(model, x, y, rng=RNG).value.detach())
    parts = [float(objective(model, x[i : i + 1], y[i : i + 1], rng=RNG).value.detach()) for i in range(16)]
    assert whole == pytest.approx(sum(parts) / 16, rel=1e-12)


def test_without_graph_the_perturbations_are_the_same(scene):
    model, x, y = scene
    plan = Plan(steps=4, stabiliser=1e-4, candidates=5)
    with_graph, without = (x.clone().requires_grad_(True) for _ in range(2))
    a = perturbations(lambda x, _: model(x), with_graph, y, model(with_graph), plan, create_graph=True)
    with frozen(model):
        b = perturbations(lambda x, _: model(x), without, y, model(without), plan, create_graph=False)
    assert a.requires_grad and torch.allclose(a.detach(), b.detach()) and float(b.detach().norm()) > 0
    _, r, _ = reference(model, x, y, **OPTIONS)
    torch.testing.assert_close(ratios(b, x, x.new_zeros(())).detach(), r)


def test_nothing_is_drawn_and_the_model_stays_as_it_was(scene, untouched_rng):
    model, x, y = scene
    deep_defense(**OPTIONS)(model, x, y, rng=RNG).value.backward()
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not x.requires_grad and x.grad is None


def test_the_ratio_from_the_mean_does_not_depend_on_an_offset_of_the_pixels(scene):
    """x + 3 behind a layer that takes 3 away: the same net, the same perturbations, and the mean moves along."""
    model, x, y = scene

    class Offset(nn.Module):
        def forward(self, x):
            return x - 3

    moved = Classifier(nn.Sequential(Offset(), model.net), shape=(1, 8, 8), num_classes=5).train()
    values = []
    for net, pixels in ((model, x), (moved, x + 3)):
        data = Data("own", "train", torch.arange(16), y, (1, 8, 8), tuple("abcde"), pixels.__getitem__)
        objective = deep_defense(**OPTIONS, origin="mean")
        with pytest.raises(TrainError, match="before_epoch"):
            objective(net, pixels, y, rng=RNG)
        objective.before_epoch(net, data, rng=RNG, epoch=1)
        torch.testing.assert_close(objective.state["mean"], pixels.mean(0).float())
        values.append(float(objective(net, pixels, y, rng=RNG).value.detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] != pytest.approx(float(deep_defense(**OPTIONS)(model, x, y, rng=RNG).value.detach()), rel=1e-2)


def test_a_black_image_adds_a_constant(scene):
    model, x, y = scene
    loss = deep_defense(**OPTIONS)(model, 0 * x, y, rng=RNG)
    loss.value.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(loss.value, F.cross_entropy(model(0 * x), y) + OPTIONS["weight"])


def layered():
    """Batch norm with moved statistics, and a layer of dropout that is used twice, on different shapes."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.4)
            self.planes, self.first, self.last = nn.Dropout2d(0.3), nn.Linear(144, 12), nn.Linear(12, 5)

        def forward(self, x):
            x = self.planes(self.drop(self.norm(self.conv(x)).relu()))
            return self.last(self.drop(self.first(x.flatten(1)).relu()))

    net = Net()
    net.norm.running_mean.uniform_(-0.2, 0.2)
    net.norm.running_var.uniform_(0.5, 1.5)
    return Classifier(net, shape=(1, 8, 8), num_classes=5).double().train()


def test_every_pass_of_an_image_has_the_same_dropout(scene):
    _, x, _ = scene
    with torch.random.fork_rng():
        model = layered()
        with _one_function(model) as forward, torch.no_grad():
            whole = forward(x, torch.arange(16))
            torch.testing.assert_close(forward(x, torch.arange(16)), whole, rtol=0, atol=0)
            some = torch.tensor([7, 2, 11])
            torch.testing.assert_close(forward(x[some], some), whole[some], rtol=1e-12, atol=1e-12)
            assert not torch.allclose(forward(x[some], some + 1), whole[some])
        with _one_function(model) as forward, torch.no_grad():
            assert not torch.allclose(forward(x, torch.arange(16)), whole), "the next batch has other masks"
        same = x[:1].expand(4000, -1, -1, -1)
        with frozen(model), torch.no_grad():
            model.net.last.weight.zero_()
            model.net.last.weight[:, 0], model.net.first.weight[:], model.net.first.bias[:] = 1.0, 0.0, 1.0
            clean = model(x[:1])[0, 0] - model.net.last.bias[0]
        with _one_function(model) as forward, torch.no_grad():
            noisy = forward(same, torch.arange(4000))[:, 0] - model.net.last.bias[0]
        kept = noisy > 0
        assert float(kept.double().mean()) == pytest.approx(0.6, abs=0.03)
        torch.testing.assert_close(noisy[kept], (clean / 0.6).expand(int(kept.sum())))


def test_with_dropout_and_batch_norm_the_loss_is_that_of_the_loop_with_the_masks_kept(scene):
    _, x, y = scene
    with torch.random.fork_rng():
        model = layered()
        torch.manual_seed(5)
        loss = deep_defense(**OPTIONS)(model, x, y, rng=RNG)
        loss.value.backward()
        model.net.norm.eval()

        def masked(pixels):  # the same state of the generator gives the same masks for a batch of the same shape
            torch.manual_seed(5)
            return model(pixels)

        expected, _, taken = reference(masked, x, y, **OPTIONS)
    slopes = torch.autograd.grad(expected, [model.net.conv.weight, model.net.last.weight])
    assert int(taken.min()) < int(taken.max()), "some images should leave early"
    torch.testing.assert_close(loss.value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(model.net.conv.weight.grad, slopes[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(model.net.last.weight.grad, slopes[1], rtol=1e-8, atol=1e-12)
    assert model.net.norm.weight.grad is None and model.net.norm.bias.grad is None
    assert int(model.net.norm.num_batches_tracked) == 0 and model.net.norm.weight.requires_grad
    assert model.net.drop.training and model.net.planes.training


def test_an_image_near_the_origin_that_is_right_spoils_no_gradient():
    """Its ratio is so large that exp(d r), which is not its term, overflows; its own term is 0."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model = Classifier(net, shape=(1, 8, 8), num_classes=3).train()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(3, 64))
        net[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    x = torch.zeros(2, 1, 8, 8)
    x[0, 0, 0, 0], x[1, 0, 0, 1] = 1e-4, 0.5
    loss = deep_defense()(model, x, torch.tensor([0, 0]), rng=RNG.select(torch.arange(2)))
    loss.value.backward()
    assert bool(loss.value.isfinite()) and bool(net[1].weight.grad.isfinite().all())
