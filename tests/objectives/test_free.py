"""The paper's loop written out, step by step; and what the perturbations do between batches."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.objectives import free

SHAPE, EPS, REPLAYS = (1, 4, 4), 0.3, 3


def batches():
    """Four batches of different sizes, the largest not the first; with pixels at the edges of the box."""
    x = torch.rand(18, *SHAPE, generator=torch.Generator().manual_seed(1)).mul(1.6).sub(0.3).clamp(0, 1)
    y = torch.arange(18) % 3
    return list(zip(x.split([4, 5, 5, 4]), y.split([4, 5, 5, 4]), strict=True))


def network():
    """Batch norm shows in which mode the model is, and how often it was run."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).train()


def steps(objective, model, scale=1.0):
    """What a training loop does."""
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x, y in batches():
        for _ in range(objective.repeats):
            optimiser.zero_grad()
            (objective(model, x, y, rng=Draws(0, torch.arange(len(x)))).value * scale).backward()
            for parameter in model.parameters():
                parameter.grad /= scale
            optimiser.step()
    return [p.detach().clone() for p in model.parameters()]


def written_out(model):
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    delta = torch.zeros(5, *SHAPE)
    for x, y in batches():
        n = len(x)
        for _ in range(REPLAYS):
            delta[:n] = (x + delta[:n]).clamp(0, 1) - x
            noise = delta[:n].clone().requires_grad_(True)
            optimiser.zero_grad()
            F.cross_entropy(model(x + noise), y).backward()
            delta[:n] = (delta[:n] + EPS * noise.grad.sign()).clamp(-EPS, EPS)
            delta[:n] = (x + delta[:n]).clamp(0, 1) - x
            optimiser.step()
    return [p.detach().clone() for p in model.parameters()], delta


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_weights_and_perturbations_of_the_loop_written_out(scale):
    model, objective = network(), free(threat=f"linf:{EPS}", replays=REPLAYS)
    again = copy.deepcopy(model)
    weights = steps(objective, model, scale)
    expected, delta = written_out(again)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, expected, strict=True))
    assert torch.allclose(objective.state["delta"], delta, atol=1e-5)
    assert float(delta.abs().max()) == pytest.approx(EPS)
    assert int(model[1].num_batches_tracked) == 4 * REPLAYS  # one forward pass per step, in training mode
    assert (objective.repeats, objective.alone) == (REPLAYS, True)


def test_the_state_of_a_checkpoint_goes_on_where_it_was():
    model, x, y = toys.smooth(SHAPE, 2).train(), toys.images(SHAPE), torch.arange(8) % 2
    first, second = free(threat="linf:0.05"), free(threat="linf:0.05")
    assert not first.state and not second.state
    first(model, x, y, rng=Draws(0, torch.arange(8))).value.backward()
    second.state["delta"] = first.state["delta"].clone()
    shown = [one.craft(model, x, y, rng=Draws(0, torch.arange(8)), progress=1.0) for one in (first, second)]
    assert torch.equal(*shown) and float((shown[0] - x).detach().abs().max()) == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms_take_the_steepest_step_of_eps(norm):
    """One step from zero on two affine logits: the point of the ball where the margin is least."""
    model, x = toys.linear(SHAPE, 2).train(), toys.images(SHAPE)
    y, threat = toys.labels(model, x), Threat(norm=norm, eps=0.1)
    objective = free(threat=str(threat))
    objective(model, x, y, rng=Draws(0, torch.arange(8))).value.backward()
    moved = x + objective.state["delta"]
    weight, _ = toys.affine(model)
    size = torch.linalg.vector_norm(weight[0] - weight[1], {"l2": 2, "l1": torch.inf}[norm])
    margin = [z.gather(1, y[:, None]) - z.gather(1, 1 - y[:, None]) for z in (model(x), model(moved))]
    assert torch.allclose(margin[0] - margin[1], (0.1 * size).float().expand(8, 1), rtol=1e-4)
    assert bool(threat.holds(x, moved).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_overflowed_spoils_no_perturbation(norm):
    model, x, y = toys.smooth(SHAPE, 2).train(), toys.images(SHAPE), torch.arange(8) % 2
    objective = free(threat=f"{norm}:0.05")
    (objective(model, x, y, rng=Draws(0, torch.arange(8))).value * torch.nan).backward()
    assert bool(objective.state["delta"].isfinite().all())
