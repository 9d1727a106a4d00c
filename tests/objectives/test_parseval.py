"""Singular values follow a recursion of numbers; orthonormal rows or columns stay."""

import pytest
import torch
from torch import nn

from rempart.objectives import parseval
from rempart.objectives.parseval import tightened

BETA = 0.1


def layers():
    """Each layer with the matrices that its kernel stands for, scaled by the root of the taps."""
    torch.manual_seed(0)
    return {
        "wide": (nn.Linear(7, 4), 1, 1),
        "tall": (nn.Linear(3, 8), 1, 1),
        "conv": (nn.Conv2d(3, 5, 3), 9, 1),
        "uneven": (nn.Conv2d(2, 12, (2, 3)), 6, 1),
        "signal": (nn.Conv1d(2, 6, 5), 5, 1),
        "volume": (nn.Conv3d(1, 4, 2), 8, 1),
        "grouped": (nn.Conv2d(4, 6, 3, groups=2), 9, 2),
        "depthwise": (nn.Conv2d(4, 4, 3, groups=4), 9, 4),
    }


def matrices(weight, taps, groups):
    return [part.flatten(1).detach() * taps**0.5 for part in weight.chunk(groups)]


@pytest.mark.parametrize("name", layers())
def test_singular_values_follow_the_recursion(name):
    """The step keeps the singular vectors and moves s to (1 + beta) s - beta s^3."""
    layer, taps, groups = layers()[name]
    for _ in range(3):
        before = matrices(layer.weight, taps, groups)
        with torch.no_grad():
            layer.weight.copy_(tightened(layer, BETA))
        for old, new in zip(before, matrices(layer.weight, taps, groups), strict=True):
            u, s, v = torch.linalg.svd(old, full_matrices=False)
            assert torch.allclose(new, (u * ((1 + BETA) * s - BETA * s**3)) @ v, atol=1e-5)


@pytest.mark.parametrize("name", layers())
def test_orthonormal_rows_or_columns_stay(name):
    layer, taps, groups = layers()[name]
    with torch.no_grad():
        for part in layer.weight.chunk(groups):
            part.copy_(nn.init.orthogonal_(torch.empty(part.flatten(1).shape)).view_as(part) / taps**0.5)
    assert torch.allclose(tightened(layer, BETA), layer.weight, atol=1e-6)


def test_a_kernel_that_is_done_lengthens_nothing():
    """Operator norm of a circular convolution, from the Fourier transform of its kernel; 1 is the bound, not k = 3."""
    layer = nn.Conv2d(3, 5, 3)
    with torch.no_grad():
        for _ in range(300):
            layer.weight.copy_(tightened(layer, BETA))
    transform = torch.fft.fft2(layer.weight.detach(), s=(8, 8)).permute(2, 3, 0, 1)
    largest = float(torch.linalg.svdvals(transform).max())
    assert 0.4 < largest <= 1 + 1e-5


def test_every_linear_and_convolutional_weight_moves_and_nothing_else():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)
    )
    net[4].weight.requires_grad_(False)
    net.to(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = {"0.weight": tightened(net[0], 0.01), "5.weight": tightened(net[5], 0.01)}
    parseval(beta=0.01).after_step(net, {})
    after = net.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected.keys()
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    assert net[0].weight.requires_grad and net[0].weight.grad is None
    parseval(beta=0).after_step(net, {})
    assert all(torch.allclose(after[name], net.state_dict()[name]) for name in after)
