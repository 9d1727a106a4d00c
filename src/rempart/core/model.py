"""The classifier as an attack sees it, and the two guards around it: `frozen` and `metered`."""

import copy
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rempart.core.errors import ModelError
from rempart.core.types import Images, Logits

Output = Literal["logits", "probabilities"]


class Normalize(nn.Module):
    """(x - mean) / std per channel, as a layer inside the model, so that nobody outside ever sees mean and std."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ModelError("as many positive std as mean values", got=f"mean={list(mean)}, std={list(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, x: Images) -> Images:
        """Normalise pixels in the box."""
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - self.mean.view(shape)) / self.std.view(shape)


class Classifier(nn.Module):
    """Images in the box in, logits out, whatever the network inside returns.

    One logit s (or one probability) becomes the two logits (0, s), whose softmax is the sigmoid of s.
    Probabilities become their logarithms.

    Attributes:
        net: The network, normalisation and preprocessing included.
        shape: Shape of one image: channels, then one to three spatial axes.
        num_classes: K >= 2.
        class_names: One name per class.
        low: Smallest pixel value.
        high: Largest pixel value.
        output: What `net` returns.
        temperature: Logits are divided by it; the predictions do not change.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        shape: Sequence[int],
        num_classes: int,
        class_names: Sequence[str] | None = None,
        low: float = 0.0,
        high: float = 1.0,
        output: Output = "logits",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ModelError("num_classes >= 2 (one logit counts as two classes)", got=num_classes)
        names = tuple(class_names or (str(k) for k in range(num_classes)))
        if len(names) != num_classes:
            raise ModelError(f"{num_classes} class names", got=len(names))
        if not temperature > 0:
            raise ModelError("a temperature > 0", got=temperature)
        self.net = net
        self.shape = tuple(shape)
        self.num_classes, self.class_names = num_classes, names
        self.low, self.high, self.output, self.temperature = low, high, output, temperature

    def forward(self, x: Images) -> Logits:
        """Logits of images in the box.

        Raises:
            ModelError: If the network returns no tensor, or the wrong number of outputs.
        """
        z = self.net(x)
        if not isinstance(z, Tensor):
            raise ModelError(
                "the network to return one tensor", got=type(z).__name__, hint="wrap it in a module that does"
            )
        if z.ndim > 0 and len(z) != len(x) != 1:
            raise ModelError("outputs of one row per image", got=f"shape {tuple(z.shape)} for {len(x)} images")
        z = z.flatten(1) if z.ndim > 1 else z.reshape(len(x), -1)
        if self.output == "probabilities":
            tiny = torch.finfo(z.dtype).tiny
            odds = z.clamp_min(tiny).log()
            z = odds - (1 - z).clamp_min(tiny).log() if z.shape[1] == 1 else odds
        if z.shape[1] == 1:
            z = torch.cat([torch.zeros_like(z), z], 1)
        if z.shape[1] != self.num_classes:
            raise ModelError(f"{self.num_classes} outputs per image", got=z.shape[1])
        return z / self.temperature


@contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Inference mode of every submodule and parameters without gradient, put back afterwards, also after an error.

    Modes are set one by one, because some modules refuse `eval()`; buffers that a forward pass changes all the same
    are put back too.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer)  # a forward pass may have put another tensor in its place
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


@dataclass(slots=True)
class Meter:
    """Images sent forward and backward through a model."""

    queries: int = 0
    gradients: int = 0


@contextmanager
def metered(model: nn.Module) -> Generator[Meter]:
    """Count the images that pass forward and backward through `model`."""
    meter = Meter()

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count = len(inputs[0])
        meter.queries += count
        if output.requires_grad:
            output.register_hook(lambda _: backward(count))

    def backward(count: int) -> None:
        meter.gradients += count

    handle = model.register_forward_hook(forward)
    try:
        yield meter
    finally:
        handle.remove()


def accelerated(model: Classifier) -> Classifier:
    """A copy of a frozen classifier that computes the same function faster.

    Batch norms are folded into the convolution before them, and image weights are stored
    channels-last (about 1.7 times faster input gradients on a CPU). The copy is checked on a few random images;
    where it cannot be made, or differs, the model itself is returned.
    """
    try:
        fast = copy.deepcopy(model)
        with frozen(fast):
            fast.net = _fold(fast.net)
    except Exception:  # noqa: BLE001  networks that cannot be copied or traced are attacked as they are
        return model
    fast.eval().requires_grad_(False)
    if len(model.shape) == 3:
        fast.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return fast if _agree(model, fast) else model


def _agree(model: Classifier, fast: Classifier) -> bool:
    weight = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand((4, *model.shape), generator=generator) * (model.high - model.low) + model.low
    probe = probe.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad(), frozen(model):
        expected, got, part = model(probe), fast(probe), fast(probe[:3])
    slack = 1e-4 * float((expected - expected.mean()).abs().max())
    return bool(torch.allclose(expected, got, 0, slack) and torch.allclose(expected[:3], part, 0, slack))


def _fold(net: nn.Module) -> nn.Module:
    """Merge every batch norm into the layer that feeds it and nothing else."""
    traced = fx.symbolic_trace(net)
    modules = dict(traced.named_modules())
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) or not norm.track_running_stats:
            continue
        source = node.args[0]
        layer = modules.get(str(source.target)) if source.op == "call_module" else None
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and len(source.users) == calls[source.target] == 1:
            traced.set_submodule(str(source.target), fuse_conv_bn_eval(layer, norm))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
