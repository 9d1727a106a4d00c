"""What the layers of a network put out: name those worth a look, capture them with their graph, compare them."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torch.utils.hooks import RemovableHandle

from rempart.core.errors import ModelError
from rempart.core.model import frozen
from rempart.core.registry import suggestion
from rempart.core.types import Images

Neurons = dict[str, Tensor]
"""By layer, one value for each of its neurons: a feature map of a convolution, an output of a dense layer."""

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus),
)
_POOLINGS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


@contextmanager
def features(model: nn.Module, layers: Iterable[str]) -> Generator[dict[str, Tensor]]:
    """Capture activations while the model runs, with the graph that leads to them and on from them.

    What follows a layer works on a copy of its output, so that operations in place do not reach what is captured. A
    layer that runs several times is captured the last time; one that does not run is missing.

    Args:
        model: A network, or a wrapper that holds it under `module`, such as that of Lightning Fabric.
        layers: Names of modules, as `blocks` and `penultimate` give them: the output of the module, or with `:input`
            behind the name its first input.

    Yields:
        The activations of the latest pass by layer, shape (n, neurons, *map).

    Raises:
        ModelError: If the model has no such layer, or one that gives no tensor.

    Example:
        >>> with features(model, blocks(model)) as seen:
        ...     z = model(x)
        >>> slopes = torch.autograd.grad(z[:, 0].sum(), list(seen.values()))
    """
    modules = dict(_inner(model).named_modules())
    seen: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    try:
        for layer in layers:
            name, colon, side = layer.partition(":")
            if name not in modules or (colon and side != "input"):
                raise ModelError("the name of a layer", got=repr(layer), hint=suggestion(name, modules).strip(" ()"))
            module = modules[name]
            if colon:
                handles.append(module.register_forward_pre_hook(_take_input(layer, seen)))
            else:
                handles.append(module.register_forward_hook(_take_output(layer, seen)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def blocks(model: nn.Module, *, pooled: bool = False) -> list[str]:
    """Name the outputs of the blocks of a network, in the order in which its layers were registered.

    A block is a weighted layer with what follows it; the one that gives the logits is none. Its output is that of its
    activation, or of its pooling where it has none, as in `lenet`. A weighted layer with neither, such as the last
    one before a residual sum, ends no block. Activations that are called as functions cannot be seen: in a network
    without modules of that kind a block ends with its last module that has parameters.

    Args:
        model: A network or a wrapper, as for `features`.
        pooled: Where pooling follows the activation, take its output.
    """
    hidden, _ = _split(model)
    functional = not any(isinstance(module, _ACTIVATIONS) for _, module in hidden)
    starts = [i for i, (_, module) in enumerate(hidden) if _is_weighted(module)]
    found: list[str] = []
    for start, end in pairwise([*starts, len(hidden)]):
        part = hidden[start:end]
        active = [name for name, module in part if isinstance(module, _ACTIVATIONS)]
        if functional:
            found += [name for name, module in part if any(True for _ in module.parameters())][-1:]
        elif active and not pooled:
            found += active[-1:]
        else:
            found += [name for name, module in part if isinstance(module, (*_ACTIVATIONS, *_POOLINGS))][-1:]
    return found


def penultimate(model: nn.Module) -> str:
    """Name what the layer that gives the logits is fed with: the weighted layer that was registered last.

    Raises:
        ModelError: If the model has no weighted layer.
    """
    _, head = _split(model)
    return f"{head}:input"


def change(before: Tensor, after: Tensor) -> Tensor:
    """How much each neuron differs between two passes: the mean of |difference| over its map, shape (n, neurons)."""
    moved = l1_loss(before, after, reduction="none")
    return moved.flatten(2).mean(2) if moved.ndim > 2 else moved


def sensitivity(model: nn.Module, pairs: Iterable[tuple[Images, Images]], layers: Sequence[str]) -> Neurons:
    """Measure how much each neuron changes between images and their adversarial counterparts, on average.

    sigma(l, m) = (1/N) sum_i |F_l^m(x_i) - F_l^m(x'_i)|_1 / dim F_l^m, in inference mode. It grows with the scale of a
    layer, so that layers cannot be compared by it, nor models whose activations shrank.

    Args:
        model: A network or a wrapper, as for `features`; left as it was.
        pairs: Batches of images and of what an attack made of them; nothing of them is kept.
        layers: Names, as for `features`.

    Returns:
        Float64 values on the CPU.

    Source:
        Zhang et al. 2021, arXiv:1909.06978. The full text was not available to us: this is the measure in the
        published tools of the same laboratory, for any number of batches.
    """
    sums: Neurons = {}
    total = 0
    with frozen(model), torch.no_grad():
        for x, x_adv in pairs:
            total += len(x)
            with features(model, layers) as seen:
                model(torch.cat([x, x_adv]))
            for layer in layers:
                moved = change(*seen[layer].chunk(2)).double().sum(0).cpu()
                sums[layer] = sums[layer] + moved if layer in sums else moved
    return {layer: moved / total for layer, moved in sums.items()}


def _inner(model: nn.Module) -> nn.Module:
    """The network in a wrapper that adds no parameters; the names of its modules are those of the network alone."""
    inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module) and len(list(inner.parameters())) == len(list(model.parameters())):
        return _inner(inner)
    return model


def _split(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], str]:
    """The modules without children before the layer that gives the logits, and the name of that layer."""
    leaves = [(name, module) for name, module in _inner(model).named_modules() if not list(module.children())]
    weighted = [i for i, (_, module) in enumerate(leaves) if _is_weighted(module)]
    if not weighted:
        raise ModelError("a network of layers with weights", got=type(_inner(model)).__name__)
    return leaves[: weighted[-1]], leaves[weighted[-1]][0]


def _is_weighted(module: nn.Module) -> bool:
    """Whether a module mixes its inputs; batch norm and PReLU have vectors of parameters only."""
    return not isinstance(module, nn.LayerNorm) and any(p.ndim > 1 for p in module.parameters())


def _take_output(layer: str, seen: dict[str, Tensor]) -> Callable[[nn.Module, Any, Any], Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
        seen[layer] = _tensor(output, layer)
        return output.clone()

    return hook


def _take_input(layer: str, seen: dict[str, Tensor]) -> Callable[[nn.Module, Any], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: Any) -> tuple[Any, ...]:
        seen[layer] = _tensor(inputs[0], layer)
        return (inputs[0].clone(), *inputs[1:])

    return hook


def _tensor(value: Any, layer: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ModelError(f"a layer {layer!r} that gives one tensor", got=type(value).__name__)
    return value
