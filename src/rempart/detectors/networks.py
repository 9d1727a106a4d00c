"""Small networks that are nothing but named tensors: first weights, forward passes and training from one seed."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from rempart.core.types import Images, Labels
from rempart.detectors.catalogue import State

_CONV = (F.conv1d, F.conv2d, F.conv3d)


def dense(*, sizes: Sequence[int], prefix: str, generator: torch.Generator) -> State:
    """First weights of dense layers: normal of variance 2 / inputs (He et al. 2015, arXiv:1502.01852), no bias."""
    state: State = {}
    for number, (before, after) in enumerate(pairwise(sizes)):
        state[f"{prefix}.{number}.weight"] = _he((after, before), before, generator)
        state[f"{prefix}.{number}.bias"] = torch.zeros(after)
    return state


def convolutions(*, widths: Sequence[int], axes: int, prefix: str, generator: torch.Generator) -> State:
    """First weights of convolutions of three taps along each of `axes` spatial axes."""
    state: State = {}
    for number, (before, after) in enumerate(pairwise(widths)):
        state[f"{prefix}.{number}.weight"] = _he((after, before, *(3,) * axes), before * 3**axes, generator)
        state[f"{prefix}.{number}.bias"] = torch.zeros(after)
    return state


def perceptron(state: State, x: Tensor, prefix: str) -> Tensor:
    """Dense layers with a ReLU between any two; (n, d) to (n, outputs)."""
    layers = _count(state, prefix)
    for number in range(layers):
        x = F.linear(x, state[f"{prefix}.{number}.weight"], state[f"{prefix}.{number}.bias"])
        x = x.relu() if number < layers - 1 else x
    return x


def convolve(state: State, x: Images, prefix: str, number: int, stride: int = 1) -> Images:
    """One convolution, padded by zeros so that stride 1 keeps the size."""
    conv = _CONV[x.ndim - 3]
    return conv(x, state[f"{prefix}.{number}.weight"], state[f"{prefix}.{number}.bias"], stride, 1)


def standard(features: Tensor, prefix: str) -> State:
    """Mean and standard deviation of each feature; one that hardly varies is not blown up."""
    spread = features.std(0, correction=0)
    return {f"{prefix}.mean": features.mean(0), f"{prefix}.std": spread.clamp_min(0.01 * float(spread.max()) + 1e-6)}


def standardised(state: State, features: Tensor, prefix: str) -> Tensor:
    """Features less their mean, over their standard deviation."""
    return (features - state[f"{prefix}.mean"]) / state[f"{prefix}.std"]


def descend(
    state: State,
    loss: Callable[[State, Tensor], Tensor],
    count: int,
    *,
    epochs: int,
    generator: torch.Generator,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    decay: float = 0.0,
) -> State:
    """Train all tensors by Adam; the step length falls to zero along a cosine.

    Args:
        state: First weights.
        loss: From weights and the positions of a batch to its mean loss.
        count: Number of samples.
        epochs: Passes over them, each in a new order.
        generator: Of the orders.
        batch_size: Samples in a step.
        learning_rate: First step length.
        decay: Weight of the squared weights in the loss, halved.

    Returns:
        The trained tensors, without graph.
    """
    weights = {key: tensor.clone().requires_grad_(True) for key, tensor in state.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=learning_rate, weight_decay=decay)
    total, done = epochs * math.ceil(count / batch_size), 0
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(count, generator=generator).split(batch_size):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * done / total))
                optimiser.zero_grad()
                loss(weights, rows).backward()
                optimiser.step()
                done += 1
    return {key: tensor.detach() for key, tensor in weights.items()}


def cross_entropy(logits: Tensor, labels: Labels, weight: Tensor) -> Tensor:
    """Mean cross-entropy with one weight for each sample."""
    return (F.cross_entropy(logits, labels, reduction="none") * weight.to(logits)).mean()


def evened(kind: Tensor, shares: Sequence[float]) -> Tensor:
    """Weights of mean 1 for samples of these kinds, so that together each kind weighs its share; shares sum to 1."""
    counts = kind.bincount(minlength=len(shares))
    return (torch.tensor(shares) * len(kind) / counts)[kind]


def placed(state: Mapping[str, Tensor], like: Tensor) -> State:
    """The tensors on the device and in the dtype of `like`."""
    return {key: tensor.to(like) for key, tensor in state.items()}


def _count(state: State, prefix: str) -> int:
    return sum(key.startswith(f"{prefix}.") and key.endswith(".weight") for key in state)


def _he(shape: Sequence[int], inputs: int, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(shape), generator=generator) * math.sqrt(2 / inputs)
