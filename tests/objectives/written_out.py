"""Losses written out in NumPy, and what the tests of several objectives share."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import toys
from rempart.core.repro import Draws
from rempart.objectives import Objective

Array = NDArray[np.float64]
SHAPE = (1, 4, 4)
RNG = Draws(0, torch.arange(8))


def log_p(z: Array) -> Array:
    """Logarithms of the softmax."""
    return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))


def ce(z: Array, y: Array) -> Array:
    return -log_p(z)[np.arange(len(y)), y]


def kl(z: Array, z_adv: Array) -> Array:
    """KL(p || p') of each row."""
    p, q = np.exp(log_p(z)), np.exp(log_p(z_adv))
    return (p * np.log(p / q)).sum(1)


def check(objective: Objective, formula: Callable[[Array, Array, Array], float]) -> None:
    """Value and gradient of a loss of two sets of logits, for an affine layer in float64.

    The gradient of the formula is taken by central differences in each weight, so it flows through both sets.
    """
    torch.manual_seed(0)
    layer = nn.Linear(5, 3).double()
    x, x_adv, y = torch.randn(6, 1, 5).double(), torch.randn(6, 1, 5).double(), torch.arange(6) % 3
    loss = objective.loss(nn.Sequential(nn.Flatten(), layer), x, x_adv, y, rng=RNG, progress=1.0)
    loss.value.backward()

    def at(weight: Array, bias: Array) -> float:
        z, z_adv = (t.numpy()[:, 0] @ weight.T + bias for t in (x, x_adv))
        return formula(z, z_adv, y.numpy())

    where = [p.detach().numpy().copy() for p in (layer.weight, layer.bias)]
    np.testing.assert_allclose(loss.value.item(), at(*where), rtol=1e-12)
    for values, parameter in zip(where, (layer.weight, layer.bias), strict=True):
        slope = np.empty_like(values)
        for i in np.ndindex(values.shape):
            middle, ends = values[i], []
            for h in (1e-5, -1e-5):
                values[i] = middle + h
                ends.append(at(*where))
            values[i] = middle
            slope[i] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(parameter.grad.numpy(), slope, rtol=1e-6, atol=1e-8)


def affine(eps: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor, Array, Array]:
    """A two-class affine model, images, labels (the first is wrong), and logits in NumPy: of x, and of the worst x'.

    The worst image within linf eps is x - eps sign(w_y - w_other): the box is out of reach.
    """
    model = toys.linear(SHAPE, 2).train()
    x = toys.images(SHAPE)
    y = toys.labels(model, x)
    y[0] = 1 - y[0]
    weight, bias = (t.numpy() for t in toys.affine(model))
    flat, label = x.double().flatten(1).numpy(), y.numpy()
    worst = flat - eps * np.sign(weight[label] - weight[1 - label])
    return model, x, y, flat @ weight.T + bias, worst @ weight.T + bias


def network(dropout: float = 0.5) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(16, 3)
    )
    return net.train()


def costs(*objectives: Objective) -> list[list[torch.Tensor]]:
    """For each objective the loss of one batch and its gradients, of the same network and the same dropout."""
    torch.manual_seed(0)
    model, x, y = network(), toys.images(SHAPE), torch.arange(8) % 3
    found = []
    for objective in objectives:
        torch.manual_seed(1)
        model.zero_grad()
        loss = objective(model, x, y, rng=RNG)
        loss.value.backward()
        found.append([loss.value.detach(), *(p.grad.clone() for p in model.parameters())])
    return found


def same(objectives: tuple[Objective, Objective]) -> bool:
    """Whether two objectives give the same loss and gradients, to rounding: they need not sum in one order."""
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*costs(*objectives), strict=True))


def check_extremes(objective: Objective) -> None:
    """Sure and right, sure and wrong, with logits of a thousand: loss and gradients stay finite."""
    for sign in (1, -1):
        layer = nn.Linear(3, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(3))
            layer.bias.zero_()
        z, y = 1e3 * torch.eye(3)[:, None], torch.arange(3)
        for x, x_adv in ((z, z), (z, -z), (z, z.roll(1, 0)), (-z, z)):
            model = nn.Sequential(nn.Flatten(), layer)
            model.zero_grad()
            loss = objective.loss(model, sign * x, sign * x_adv, y, rng=RNG, progress=1.0)
            loss.value.backward()
            assert bool(loss.value.isfinite()) and all(bool(p.grad.isfinite().all()) for p in model.parameters())
