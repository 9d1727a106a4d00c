"""What the layers of a network put out: name those worth a look, capture them with their graph, compare them."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torch.utils.hooks import RemovableHandle

from rempart.core.errors import DataError, ModelError
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


_PAIRS = 64  # in a pass: what the layers of a small network put out for more does not stay in the cache

See = Callable[[str, Tensor], Tensor | None]
"""Told the name and the activations of a layer at each pass; what it returns takes their place."""


@contextmanager
def watched(model: nn.Module, layers: Iterable[str], see: See) -> Generator[None]:
    """Call `see` with the activations of layers while the model runs, and go on with what it returns, if anything.

    Args:
        model: A network, or a wrapper that holds it under `module`, such as that of Lightning Fabric.
        layers: Names of modules, as `blocks` and `penultimate` give them: the output of the module, or with `:input`
            behind the name its first input. A layer that runs several times in a pass is told each time.
        see: Gets activations of shape (n, neurons, *map). What follows may change them in place.

    Raises:
        ModelError: If the model has no such layer, or one that gives no tensor.
    """
    modules = dict(_inner(model).named_modules())
    handles: list[RemovableHandle] = []
    try:
        for layer in layers:
            name, colon, side = layer.partition(":")
            if name not in modules or (colon and side != "input"):
                raise ModelError("the name of a layer", got=repr(layer), hint=suggestion(name, modules).strip(" ()"))
            hook = _Hook(layer, see)
            if colon:
                handles.append(modules[name].register_forward_pre_hook(hook.before))
            else:
                handles.append(modules[name].register_forward_hook(hook.after))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def features(model: nn.Module, layers: Iterable[str]) -> Generator[dict[str, Tensor]]:
    """Capture activations while the model runs, with the graph that leads to them and on from them.

    What follows a layer works on a copy of its output, so that operations in place do not reach what is captured. A
    layer that runs several times is captured the last time; one that does not run is missing.

    Args:
        model: As for `watched`.
        layers: As for `watched`.

    Yields:
        The activations of the latest pass by layer, shape (n, neurons, *map).

    Raises:
        ModelError: If the model has no such layer, or one that gives no tensor.

    Example:
        >>> with features(model, blocks(model)) as seen:
        ...     z = model(x)
        >>> slopes = torch.autograd.grad(z[:, 0].sum(), list(seen.values()))
    """
    seen: dict[str, Tensor] = {}

    def keep(layer: str, value: Tensor) -> Tensor:
        seen[layer] = value
        return value.clone()

    with watched(model, layers, keep):
        yield seen


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


@dataclass(frozen=True, slots=True)
class Moved:
    """How much the neurons of a layer change from images to their counterparts: sums over pairs, in float64.

    Attributes:
        change: Sum of |F(x) - F(x')|_1 / dim F.
        clean: Sum of |F(x)|_1 / dim F.
        pairs: Number of pairs.
    """

    change: Tensor
    clean: Tensor
    pairs: int

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(self.change + other.change, self.clean + other.clean, self.pairs + other.pairs)

    @property
    def absolute(self) -> Tensor:
        """Sigma of each neuron: the mean change, in units of the activations."""
        return self.change / self.pairs

    @property
    def relative(self) -> Tensor:
        """The change over the activations of the original images; a scale of the layer does not matter.

        0 where nothing moves, 1 where only the counterparts wake a neuron.
        """
        alive = torch.where(self.clean > 0, self.change / self.clean.clamp_min(1e-300), torch.ones_like(self.change))
        return torch.where(self.change > 0, alive, 0.0)

    @property
    def overall(self) -> float:
        """`relative` of the layer as a whole: all changes together over all activations together.

        A mean over neurons would be that of the few whose own activations are near 0.
        """
        change, clean = float(self.change.sum()), float(self.clean.sum())
        return change / clean if clean > 0 else float(change > 0)


def moved(model: nn.Module, pairs: Iterable[tuple[Images, Images]], layers: Sequence[str]) -> dict[str, Moved]:
    """Measure how much each neuron changes between images and their counterparts.

    Sums are taken while the layers run: no activations are kept, so that memory does not grow with the pairs. The model
    runs in inference mode and is left as it was.

    Args:
        model: As for `watched`.
        pairs: Batches of images and of what an attack made of them; large ones are parted, which is faster.
        layers: As for `watched`; of one that runs several times in a pass, the last time counts.

    Returns:
        By layer, float64 values on the CPU.

    Raises:
        ModelError: As `watched`, if a layer does not run, or if it does not give one row per image.
        DataError: If there are no pairs.
    """
    found: dict[str, Moved] = {}
    latest: dict[str, Moved] = {}
    rows = 0

    def see(layer: str, value: Tensor) -> None:
        if len(value) != rows:
            came, hint = f"{len(value)} of {layer} for {rows}", "explain the network without what multiplies its images"
            raise ModelError("one row of activations per image", got=came, hint=hint)
        before, after = value.flatten(2).chunk(2) if value.ndim > 2 else value[..., None].chunk(2)
        latest[layer] = Moved(_size(before - after), _size(before), len(before))

    for x, x_adv in pairs:  # an attack may run in here: it is not watched
        with frozen(model), torch.no_grad(), watched(model, layers, see):
            for both in zip(x.split(_PAIRS), x_adv.split(_PAIRS), strict=True):
                latest.clear()
                rows = 2 * len(both[0])
                model(torch.cat(both))
                found |= {layer: found[layer] + part if layer in found else part for layer, part in latest.items()}
    if silent := [layer for layer in layers if layer not in found]:
        if not found:
            raise DataError("one pair of images or more", got="none")
        raise ModelError("layers that the model runs", got=", ".join(silent))
    return {layer: found[layer] for layer in layers}


def _size(value: Tensor) -> Tensor:
    """Sum over images of the mean |value| of each neuron."""
    return (torch.linalg.vector_norm(value, 1, dim=2) / value.shape[2]).sum(0, dtype=torch.float64).cpu()


def sensitivity(model: nn.Module, pairs: Iterable[tuple[Images, Images]], layers: Sequence[str]) -> Neurons:
    """Measure how much each neuron changes between images and their adversarial counterparts, on average.

    sigma(l, m) = (1/N) sum_i |F_l^m(x_i) - F_l^m(x'_i)|_1 / dim F_l^m, in inference mode. It grows with the scale of a
    layer, so that layers cannot be compared by it, nor models whose activations shrank: see `Moved.relative`.

    Args:
        model: As for `watched`; left as it was.
        pairs: Batches of images and of what an attack made of them; nothing of them is kept.
        layers: As for `watched`.

    Returns:
        Float64 values on the CPU.

    Source:
        Zhang et al. 2021, arXiv:1909.06978. The full text was not available to us: this is the measure in the
        published tools of the same laboratory, for any number of batches.
    """
    return {layer: sums.absolute for layer, sums in moved(model, pairs, layers).items()}


def hidden(model: nn.Module) -> list[str]:
    """Name the modules whose output comes before the logits, in the order of their registration.

    Args:
        model: A network or a wrapper, as for `watched`.

    Raises:
        ModelError: If the model has no weighted layer.
    """
    _, head = _split(model)
    names = [name for name, _ in _inner(model).named_modules()]
    return [name for name in names[: names.index(head)] if name and not head.startswith(f"{name}.")]


def block_of(model: nn.Module, layer: str) -> list[str]:
    """Name the modules from the weighted layer of a block to one of its outputs, as they were registered.

    Raises:
        ModelError: If there is no such block.
    """
    leaves, _ = _split(model)
    names = [name for name, _ in leaves]
    if layer in names:
        until = leaves[: names.index(layer) + 1]
        starts = [i for i, (_, module) in enumerate(until) if _is_weighted(module)]
        if starts:
            return names[starts[-1] : len(until)]
    hint = suggestion(layer, names).strip(" ()")
    raise ModelError("a module behind a layer with weights", got=repr(layer), hint=hint)


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


@dataclass(frozen=True, slots=True)
class _Hook:
    """Tells of a layer: `after` it, or what it gets `before`."""

    layer: str
    see: See

    def after(self, module: nn.Module, inputs: Any, output: Any) -> Tensor | None:
        return self.see(self.layer, _tensor(output, self.layer))

    def before(self, module: nn.Module, inputs: Any) -> tuple[Any, ...] | None:
        other = self.see(self.layer, _tensor(inputs[0], self.layer))
        return None if other is None else (other, *inputs[1:])


def _tensor(value: Any, layer: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ModelError(f"a layer {layer!r} that gives one tensor", got=type(value).__name__)
    return value
