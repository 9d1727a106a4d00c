"""Two affine logits, whose distances to the boundary are known: where the points lie, and how the margins move."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.objectives import ima
from rempart.objectives.ima import explore

SHAPE = (1, 4, 4)
RNG = Draws(0, torch.arange(8))
norms = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


def affine(norm):
    """A model, images, labels of which the first is wrong, and the distances to the boundary."""
    model, x = toys.linear(SHAPE, 2), toys.images(SHAPE)
    y = toys.labels(model, x)
    far = toys.radius(model, x, y, norm)
    y[0] = 1 - y[0]
    return model.train(), x, y, far


def crafted(objective, model, x, y, rng=RNG):
    return objective.craft(model, x, y, rng=rng, progress=0.0)


@norms
def test_points_lie_on_the_boundary_at_the_known_distance(norm):
    """The last point of the climb is the farthest of the ball, straight across the boundary, and the way back to the
    boundary is known to 1/1024 of the budget.
    """
    model, x, y, far = affine(norm)
    budget = float(far.max() * 1.2)
    objective = ima(threat=f"{norm}:{budget}", delta=budget)
    x_adv = crafted(objective, model, x, y)
    distance, threat = Threat(norm=norm).distance(x, x_adv), Threat(norm=norm, eps=budget)
    assert torch.equal(x_adv[0], x[0])
    assert bool((model(x_adv[1:]).argmax(1) != y[1:]).all()) and bool(threat.holds(x, x_adv).all())
    assert bool((distance[1:] >= far[1:] * (1 - 1e-4)).all())
    assert bool((distance[1:] <= far[1:] * (1 + 1e-4) + budget / 1024).all())


class Ridge(nn.Module):
    """Logits (0, 0.1 - 8 (first pixel - 0.7)^2): class 1 around 0.7, where a climb with long steps swings around it."""

    def forward(self, x):
        value = 0.1 - 8 * (x.flatten(1)[:, :1] - 0.7).square()
        return torch.cat([0 * value, value], 1)


@pytest.mark.parametrize("steps", [8, 20])
def test_the_climb_and_the_point_that_is_bisected(steps):
    """Steps of 4 / steps of the margin from the start; then back from the worst point seen, not from the last."""
    model, x, seen = Ridge(), torch.full((8, *SHAPE), 0.5), []
    y, margin = torch.zeros(8, dtype=torch.long), torch.linspace(0.05, 0.45, 8)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    out = explore(model, x, y, Threat(norm="l2", eps=3.0), margin, x, steps)
    points = torch.stack(seen[: steps + 1])[:, :, 0, 0, 0] - 0.5
    assert torch.allclose(points[1], 4 / steps * margin, rtol=1e-4)
    score = 0.1 - 8 * (points - 0.2).square()
    found = score.amax(0) > 0
    assert bool((score[-1] < score.amax(0) - 1e-4)[found].any()) and 0 < int(found.sum()) < 8
    worst = points[score.argmax(0), torch.arange(8)]
    first = 0.2 - (0.1 / 8) ** 0.5  # where the boundary is
    shares = torch.ceil(1024 * first / worst - 1e-3) / 1024  # bisection ends on a grid of the way to the worst point
    assert torch.allclose((out - x)[found, 0, 0, 0], (shares * worst)[found], atol=1e-6)
    assert torch.equal(out[~found], x[~found])


def sequence(far, right, budget, delta, visits):
    """Margins written out: they grow while the boundary is out of reach, and are averaged with the distance else."""
    margins, history = torch.full_like(far, delta), []
    for _ in range(visits):
        met = right & (margins > far)
        margins = torch.where(met, (margins + far) / 2, torch.where(right, margins + delta, margins)).clamp(0, budget)
        history.append(margins)
    return history


@norms
def test_margins_are_those_written_out(norm):
    model, x, y, far = affine(norm)
    far, right = far.clone(), torch.arange(8) > 0
    budget, delta = float(far[1:].median()), float(far[1:].median()) / 3.3
    objective = ima(threat=f"{norm}:{budget}", delta=delta)
    history = sequence(far, right, budget, delta, 8)
    for visit, expected in enumerate(history):
        crafted(objective, model, x, y, RNG.at(str(visit)))
        assert torch.allclose(objective.state["margins"].double(), expected, rtol=0.02, atol=2e-4), visit
    assert float(history[-1][0]) == delta  # wrong from the start
    assert float(history[-1].max()) == budget  # out of reach: as far as it goes
    assert bool(((history[-1][1:] - far[1:]).abs() < 0.1 * far[1:]).any())  # drawn to the boundary


def test_margins_belong_to_samples_and_change_once_per_visit():
    model, x, y, _ = affine("l2")
    whole, parts = ima(threat="l2:3", delta=0.01), ima(threat="l2:3", delta=0.01)
    index = torch.tensor([9, 2, 30, 4, 11, 0, 7, 5])
    rng = Draws(0, index)
    all_at_once = crafted(whole, model, x, y, rng)
    for rows in (torch.tensor([3, 0, 6]), torch.tensor([1, 2]), torch.tensor([7, 5, 4])):
        found = crafted(parts, model, x[rows], y[rows], rng.select(rows))
        torch.testing.assert_close(found, all_at_once[rows])  # a product of three rows is rounded otherwise
    torch.testing.assert_close(whole.state["margins"], parts.state["margins"])
    untouched = [n for n in range(31) if n not in index.tolist()]
    assert bool((whole.state["margins"][untouched] == torch.tensor(0.01)).all())
    resumed = ima(threat="l2:3", delta=0.01)
    resumed.state["margins"] = whole.state["margins"].clone()
    assert torch.equal(*(crafted(one, model, x, y, rng.at("2")) for one in (whole, resumed)))


def test_the_loss_is_the_weighted_sum_over_the_batch():
    model, x, y, far = affine("l2")
    budget = float(far[1:].sort().values[3:5].mean())  # some are met, some are out of reach, one is wrong
    objective = ima(threat=f"l2:{budget}", delta=budget, beta=0.25)
    x_adv = crafted(objective, model, x, y)
    loss = objective.loss(model, x, x_adv, y, rng=RNG, progress=0.0)
    met = (torch.arange(8) > 0) & (far < budget)
    assert 0 < int(met.sum()) < 7
    clean, beyond = (F.cross_entropy(model(images), y, reduction="none") for images in (x, x_adv))
    assert torch.allclose(loss.value, (0.75 * clean.sum() + 0.25 * beyond[met].sum()) / 8)
    assert float(loss.parts["accuracy"]) == 7 / 8
    assert torch.allclose(loss.parts["margin"], objective.state["margins"].mean())
    nothing = objective.loss(model, x, x.clone(), y, rng=RNG, progress=0.0)
    assert torch.allclose(nothing.value, 0.75 * clean.mean())


def test_the_search_leaves_no_trace_in_the_model(untouched_rng):
    state = torch.get_rng_state()
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)).train()
    torch.set_rng_state(state)
    x_adv = crafted(ima(threat="l2:3", delta=3.0), net, toys.images(SHAPE), torch.arange(8) % 3)
    assert int(net[1].num_batches_tracked) == 0 and net.training and net[2].training
    assert all(p.requires_grad and p.grad is None for p in net.parameters()) and not x_adv.requires_grad


@pytest.mark.parametrize("radius", [0.05, 0.5])
def test_the_default_growth_is_a_hundredth_of_the_budget(radius):
    model, x, y, _ = affine("l2")
    objective = ima(threat=f"l2:{radius}")
    crafted(objective, model, x, y)
    assert float(objective.state["margins"][0]) == pytest.approx(radius / 100)  # wrong, so never changed
