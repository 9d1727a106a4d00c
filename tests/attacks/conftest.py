"""A small convolutional network trained on the embedded digits: what attacks meet outside closed forms."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rempart.core.model import Classifier, Normalize
from rempart.data import open_data


@dataclass(frozen=True)
class Digits:
    """A trained model in float64, 48 images it gets right, and the same seen at low contrast.

    The pixels of `pale` lie in [0.25, 0.75], so that a perturbation below 0.25 per pixel never meets the box;
    `pale_model` turns them back first and gives the same logits.
    """

    model: Classifier
    x: Tensor
    y: Tensor
    pale_model: Classifier
    pale: Tensor


@pytest.fixture(scope="session")
def digits() -> Digits:
    data = open_data("digits:train").load().batch(torch.arange(1000))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
        )
        optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(8):
            for part in torch.randperm(len(data.x)).split(50):
                optimiser.zero_grad()
                cross_entropy(net(data.x[part]), data.y[part]).backward()
                optimiser.step()
    net = net.double().eval().requires_grad_(False)
    test = open_data("digits:test").batch(torch.arange(60))
    x = test.x.double()
    right = (net(x).argmax(1) == test.y).nonzero()[:48, 0]
    assert len(right) == 48, "the model did not learn"
    x, y = x[right], test.y[right]
    model = Classifier(net, shape=(1, 8, 8), num_classes=10)
    pale = Classifier(nn.Sequential(Normalize([0.25], [0.5]), net), shape=(1, 8, 8), num_classes=10)
    return Digits(model.eval(), x, y, pale.double().eval(), x / 2 + 0.25)
