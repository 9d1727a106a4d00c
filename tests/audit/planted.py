"""Small networks trained on the embedded digits, and ways to hide their gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rempart.attacks import Verdict, attack_data, pgd
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.data import Data, open_data

EPS = 0.1
THREAT = Threat(norm="linf", eps=EPS)


class Stairs(nn.Module):
    """x - w sin(2 pi 16 x) / (2 pi 16): for w = 1 flat at the 17 grey levels of the digits, else close to x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        turn = 2 * torch.pi * 16
        return x - self.weight * (turn * x).sin() / turn


@dataclass(frozen=True)
class Trained:
    """Networks on 8x8 digits, and 100 test images."""

    plain: Classifier
    hardened: Classifier
    flat: Classifier
    data: Data


Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def train(step: Step, *first: nn.Module, epochs: int, seed: int = 0) -> Classifier:
    data = open_data("digits:train").load().batch(torch.arange(1000))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            *first,
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        )
        optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(epochs):
            for part in torch.randperm(len(data.x)).split(50):
                optimiser.zero_grad()
                step(net, data.x[part], data.y[part]).backward()
                optimiser.step()
    return Classifier(net.eval(), shape=(1, 8, 8), num_classes=10)


def plain_step(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(net(x), y)


def hard_step(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with frozen(net):
        worst = pgd(net, x, y, THREAT, steps=5, rng=Draws(0, torch.arange(len(x))))
    return cross_entropy(net(worst), y)


def flat_step(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    loss = cross_entropy(net(x), y)
    (slope,) = torch.autograd.grad(loss * len(x), x, create_graph=True)
    return loss + 10 * slope.square().flatten(1).sum(1).mean()


def networks() -> Trained:
    return Trained(
        plain=train(plain_step, epochs=8),
        hardened=train(hard_step, epochs=6),
        flat=train(flat_step, Stairs(), epochs=8),
        data=open_data("digits:test").load().head(100),
    )


SUITE = {
    "fgsm": ("fgsm", {}),
    "pgd": ("pgd", {"steps": 40}),
    "pgd-margin": ("pgd", {"steps": 40, "loss": "margin"}),
}


def audited(model: Classifier, data: Data, threat: Threat = THREAT) -> dict[str, Verdict]:
    """What a short audit found, labelled as in a report."""
    return {label: attack_data(model, data, threat, name, options).verdict for label, (name, options) in SUITE.items()}


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def before(model: Classifier, function: Callable[[Tensor], Tensor]) -> Classifier:
    """The model behind a function of the images."""
    return Classifier(nn.Sequential(Function(function), model.net), shape=model.shape, num_classes=model.num_classes)


def behind(model: Classifier, function: Callable[[Tensor], Tensor], **more: Any) -> Classifier:
    """The model with a function of its logits, and `more` said of it."""
    net = nn.Sequential(model.net, Function(function))
    return Classifier(net, shape=model.shape, num_classes=model.num_classes, **more)


class Reversed(torch.autograd.Function):
    """The identity, with gradients of the wrong sign."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Rounded(torch.autograd.Function):
    """A quantiser of 9 levels, with gradients of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]
