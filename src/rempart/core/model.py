"""The classifier as an attack sees it, and the two guards around it: `frozen` and `metered`."""

import copy
import math
import re
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from traceback import walk_tb
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv2d, pad, pixel_shuffle
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rempart.core.errors import ModelError, RempartError
from rempart.core.foreign import contained, place
from rempart.core.names import Numbers, find
from rempart.core.outputs import tracked
from rempart.core.repro import without_numbers
from rempart.core.types import Images, Logits

Output = Literal["logits", "probabilities", "sigmoids"]
_SIZES = (1, 2, 3, 4, 5, 8, 10, 12, 16, 20, 24, 32, 50, 64, 100, 128)  # of batches that a network may be made for
_LAYOUT = re.compile("contiguous|stride")  # words of torch's errors on how a tensor lies in memory
_NO_MEMORY = re.compile("out of memory|can't allocate memory|ALLOC_FAILED")  # torch has no class for each of them
_PASSES = 8  # after which a network that changes itself shows it


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
    Probabilities, and sigmoids of each class on its own, become the logits they were made of where a softmax or sigmoid
    is the last thing that happens to them; otherwise their logarithms, or log-odds, which saturate.

    Attributes:
        net: The network, normalisation and preprocessing included.
        shape: Shape of one image: channels, then one to three spatial axes.
        num_classes: K >= 2.
        class_names: One name per class.
        low: Smallest pixel value.
        high: Largest pixel value.
        output: What `net` returns; None where nobody said, which counts as logits until `audit.preflight` decides.
        notes: What was done to the network where it was loaded, in sentences for reports.
    """

    output: Output | None

    def __init__(
        self,
        net: nn.Module,
        *,
        shape: Sequence[int],
        num_classes: int,
        class_names: Sequence[str] | None = None,
        low: float = 0.0,
        high: float = 1.0,
        output: Output | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not 2 <= len(shape) <= 4:
            hint = "give channels and sides, for example (1, 28, 28); let the network flatten them itself"
            raise ModelError("a shape of channels and one to three spatial axes", got=tuple(shape), hint=hint)
        if num_classes < 2:
            raise ModelError("num_classes >= 2 (one logit counts as two classes)", got=num_classes)
        names = class_names if isinstance(class_names, tuple) and class_names else tuple(class_names or ())
        names = names or Numbers.of(num_classes)
        if len(names) != num_classes:
            raise ModelError(f"{num_classes} class names", got=len(names))
        self.net = net
        self.shape = tuple(shape)
        self.num_classes, self.class_names = num_classes, names
        self.low, self.high, self.output = low, high, output
        self.notes = tuple(notes)
        self.lends = torch.preserve_format  # how the images lie that the network gets

    def forward(self, x: Images) -> Logits:
        """Logits of images in the box, in the dtype of the images.

        Raises:
            ModelError: If the network fails, or does not return one tensor with a row of outputs for each image.
        """
        if self.output in (None, "logits"):
            z = self.raw(x)
        else:
            with tracked(len(x)) as found:
                shares = self.raw(x)
            z = found.logits(shares, len(x))
            if z is None:
                tiny = torch.finfo(shares.dtype).tiny
                odds = shares.clamp_min(tiny).log()
                alone = self.output == "sigmoids" or shares.shape[1] == 1
                z = odds - (1 - shares).clamp_min(tiny).log() if alone else odds
        if z.shape[1] == 1:
            z = torch.cat([torch.zeros_like(z), z], 1)
        if z.shape[1] != self.num_classes:
            raise ModelError(f"{self.num_classes} outputs per image", got=z.shape[1], hint="set num_classes to that")
        return z.to(x.dtype) if x.is_floating_point() else z

    def raw(self, x: Images) -> Tensor:
        """What the network itself returns, one row per image, at least as precise as the images.

        The network gets a copy of the images and its outputs are copied, because it may write into both: into the
        images in this pass, into its outputs in the next one.

        Raises:
            ModelError: If the network fails, or does not return one tensor with a row of outputs for each image.
        """
        try:
            with contained("the network to give its outputs"):
                z: object = self.net(x.clone(memory_format=self.lends))
        except Exception as error:
            if _said_already(error):
                raise
            if self.lends == torch.preserve_format and not x.is_contiguous() and _LAYOUT.search(str(error)):
                self.lends = torch.contiguous_format  # `view` fails on maps that lie channels-last
                with suppress(Exception):
                    return self.raw(x)
                self.lends = torch.preserve_format
            raise self._failed(x, error) from error
        if not isinstance(z, Tensor):
            raise ModelError(
                "the network to return one tensor", got=type(z).__name__, hint="wrap it in a module that does"
            )
        if z.is_complex() or z.is_quantized or z.is_nested or z.layout != torch.strided:
            hint = "let its forward pass end with .real, .dequantize() or .to_dense()"
            raise ModelError("outputs that are a plain tensor of real numbers", got=f"{z.dtype}, {z.layout}", hint=hint)
        came = tuple(z.shape)
        if len(x) == 1 and came in ((), (self.num_classes,)):
            z = z[None]  # a batch of one, squeezed
        if z.ndim == 0 or len(z) != len(x):
            hint = "let its forward pass keep the first axis, and average the answers where it gives several per image"
            raise ModelError("outputs of one row per image", got=f"shape {came} for {len(x)} images", hint=hint)
        z = z.flatten(1) if z.ndim > 1 else z[:, None]
        return z.to(torch.promote_types(z.dtype, x.dtype), copy=True)

    def _failed(self, x: Images, error: Exception) -> ModelError:
        """Say in which layer the network failed, on what, and which batches it takes, if any."""
        names = {module: name for name, module in self.named_modules()}
        selves = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
        passed = [module for module in selves if isinstance(module, nn.Module)]
        named = [f"{names[module]} ({type(module).__name__})" for module in passed if names.get(module)]
        where = f"layer {named[-1]}" if named else "the network"
        if passed[-1] not in names:
            where = f"a {type(passed[-1]).__name__} inside {where}"
        reason = str(error).strip().partition("\n")[0]
        taken = [] if self.training else self._sizes_taken(x)  # in training mode, a pass leaves its mark
        if taken and len(x) not in taken:
            some = ", ".join(map(str, taken[:3])) + (", ..." if len(taken) > 3 else "")
            hint = (
                f"it runs on batches of {some}: make its forward pass answer for each image alone, however many there "
                "are (no fixed number in reshape, no state between passes, batch norms with running statistics)"
            )
        else:
            hint = "run it on such a batch yourself, and check which channels, size and dtype it was made for"
        return ModelError(
            f"a network that runs on a batch of shape {tuple(x.shape)}",
            got=f"{type(error).__name__} in {where}" + (f": {reason}" if reason else ""),
            hint=hint,
        )

    def _sizes_taken(self, x: Images) -> list[int]:
        """Numbers of images that the network runs on, the size of these images among those tried."""

        def runs(size: int) -> bool:
            try:
                with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
                    return len(self.net(x[:1].repeat(size, *(1,) * (x.ndim - 1)))) == size
            except Exception:  # noqa: BLE001  this is about which batches do not fail
                return False

        return [size for size in sorted({*_SIZES, len(x)}) if runs(size)] if len(x) else []


def _said_already(error: Exception) -> bool:
    """Whether an error needs no other words: it is one of ours, or memory ran out, which is no fault of a network."""
    ours = isinstance(error, (RempartError, MemoryError, torch.OutOfMemoryError))
    return ours or _NO_MEMORY.search(str(error)) is not None


def backward_failed(error: Exception) -> ModelError | None:
    """What to say of an error that a backward pass raised; None of any other, and of a lack of memory."""
    through = any(frame.f_globals.get("__name__") == "torch.autograd" for frame, _ in walk_tb(error.__traceback__))
    if not through or _said_already(error):
        return None
    return ModelError(
        "a network that gives gradients for batches of every size",
        got=f"{type(error).__name__} in {place(error)}: {str(error).strip().partition(chr(10))[0]}",
        hint="attacks drop images as they fall: make its backward pass, too, work for each image alone",
    )


def check_classifier(model: object) -> None:
    """Refuse what is no classifier, such as a network without a shape, classes and a box.

    Raises:
        ModelError: If it is none.
    """
    if not isinstance(model, Classifier):
        hint = "wrap a network: rempart.Classifier(net, shape=(3, 32, 32), num_classes=10)"
        raise ModelError("a Classifier", got=type(model).__name__, hint=hint)


def class_number(text: str, class_names: Sequence[str]) -> int | None:
    """The class that a name or a number means, the name first; None where there is no such class."""
    number = find(text, class_names)
    return int(text) if number is None and text in map(str, range(len(class_names))) else number


class Untraced(nn.Module):
    """A part of a network that `accelerated` takes over as it stands: code that draws numbers or leaves torch."""


class BlackBox(Untraced):
    """A network that runs elsewhere and answers without gradients.

    Attributes:
        reason: Why it does, for the report.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


def blind(model: nn.Module) -> str | None:
    """Why a model gives no gradients; None where it holds no black box."""
    return next((module.reason for module in model.modules() if isinstance(module, BlackBox)), None)


@contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Inference mode of every submodule and parameters without gradient, put back afterwards, also after an error.

    Modes are set one by one, because some modules refuse `eval()`; buffers that a forward pass changes all the same
    are put back too.

    Raises:
        ModelError: As `check_layers` does.
    """
    modes = [(module, module.training) for module in check_layers(model)]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [
        (m, name, b if _plain(b) else b.clone()) for m in model.modules() for name, b in m.named_buffers(recurse=False)
    ]  # of sparse and quantised ones, whose numbers cannot be joined, a copy is put back
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, _, buffer in buffers:
        if _plain(buffer):
            by_device.setdefault(buffer.device, []).append(buffer)
    before = [_joined(there) for there in by_device.values()]
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
            for module, name, buffer in buffers:
                setattr(module, name, buffer)  # a forward pass may have put another tensor in its place
            for there, joined in zip(by_device.values(), before, strict=True):
                if torch.equal(_joined(there), joined):  # one question for all: each would make a GPU wait
                    continue
                for buffer, kept in zip(there, joined.split([b.nbytes for b in there]), strict=True):
                    if not torch.equal(_bytes(buffer), kept):
                        buffer.copy_(kept.clone().view(buffer.dtype).view(buffer.shape))


def _plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([_bytes(tensor) for tensor in tensors])


def _bytes(tensor: Tensor) -> Tensor:
    """What a tensor holds, in a form that can be compared and joined whatever the dtype: NaN is like itself."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def check_layers(model: nn.Module) -> list[nn.Module]:
    """Refuse weights without numbers, and layers with weights that `eval()` did not reach.

    Returns:
        All modules, also those without weights that lie in plain lists, tuples and dicts.

    Raises:
        ModelError: If weights are lazy or on the meta device, or layers in training mode are kept in a plain list,
            tuple or dict, where torch finds neither them nor their weights.
    """
    known = set[Tensor]()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        known.add(tensor)
        if missing := without_numbers(tensor):
            kind = "lazy, and never ran" if missing == "lazy" else "on the meta device"
            hint = "load the trained weights into the network first"
            raise ModelError("weights that hold numbers", got=f"{name}, which is {kind}", hint=hint)
    hidden = _hidden(model)
    for name, module in hidden.items():
        own = {*module.parameters(recurse=False), *module.buffers(recurse=False)}
        if module.training and own - known:
            raise ModelError(
                "layers in inference mode",
                got=f"{name} ({type(module).__name__}) in training mode, out of reach of eval() and state_dict()",
                hint="keep layers in an nn.ModuleList or nn.ModuleDict, not in a list, tuple or dict",
            )
    return [*model.modules(), *hidden.values()]


def _hidden(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that `modules()` misses because they lie in lists, tuples and dicts, by where they are."""
    known, found = set(model.modules()), dict[str, nn.Module]()

    def look(name: str, value: object) -> None:
        if isinstance(value, nn.Module):
            for inner, module in value.named_modules(prefix=name):
                if module not in known:
                    known.add(module)
                    found[inner] = module
                    search(inner, module)
        elif isinstance(value, dict):
            for key, item in value.items():
                look(f"{name}[{key!r}]", item)
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                look(f"{name}[{number}]", item)

    def search(name: str, module: nn.Module) -> None:
        for key, value in vars(module).items():
            if key not in TORCHS_OWN and isinstance(value, _HOLDERS):  # `frozen` asks in every step of a training
                look(f"{name}.{key}" if name else key, value)

    for name, module in model.named_modules():
        if not isinstance(module, Untraced):  # those of ours know what they hide
            search(name, module)
    return found


TORCHS_OWN = frozenset(vars(nn.Module()))
"""Attributes in which torch keeps parameters, buffers, submodules and hooks."""
_HOLDERS = (nn.Module, dict, list, tuple)


def check_no_hidden_write(model: Classifier, x: Images) -> None:
    """Refuse a network that writes into its images where autograd does not see it, as `x.data.clamp_()` does.

    Its answers are right, because it is lent copies; its gradients are those of another function, without the write.

    Raises:
        ModelError: If it does.
    """
    with torch.enable_grad():
        lent = x.detach().requires_grad_().clone()
        made_by = lent.grad_fn  # a write that autograd sees puts another in its place
        with suppress(Exception):  # what is wrong with the pass itself is told where it is asked for gradients
            model.net(lent)
    if lent.grad_fn is made_by and not torch.equal(lent, x):
        raise ModelError(
            "a network whose gradients follow all that it does",
            got="one that writes into its input where autograd does not see it (through .data, .detach(), a numpy "
            "array, or under no_grad)",
            hint="return a new tensor in that place: x = x.clamp(...) instead of x.data.clamp_(...)",
        )


def check_steady(model: Classifier, x: Images) -> None:
    """Refuse a network that changes its weights or buffers in each pass, and its answers with them.

    Such a network has no function that could be attacked: what an image is taken for depends on those before it.
    Counters that change no answer are fine. What a network keeps elsewhere is not looked at.

    Raises:
        ModelError: If it does.
    """

    def state() -> dict[str, Tensor]:
        return {name: t for name, t in chain(model.named_parameters(), model.named_buffers()) if _plain(t)}

    def passed() -> Logits:
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(0)
            return model(x)

    def differ(z: Logits) -> bool:
        return bool(((z - first).abs() > 1e-6 * first.abs().amax().clamp_min(1)).any())

    @torch.no_grad()
    def put_back() -> None:  # weights; of buffers, `frozen` takes care
        for name, parameter in model.named_parameters():
            if name in changed:
                parameter.copy_(before[name])

    before = {name: tensor.detach().clone() for name, tensor in state().items()}
    with frozen(model):
        first = passed()
        last = [passed() for _ in range(_PASSES)][-1]
        now = state()
        changed = [name for name, old in before.items() if not torch.equal(_bytes(now.get(name, old)), _bytes(old))]
    if not changed:
        return
    put_back()
    with frozen(model):
        again = passed()
    put_back()
    if differ(last) and not differ(again):  # and not by chance
        raise ModelError(
            "a network whose answers do not depend on earlier passes",
            got=f"{', '.join(changed[:3])} changed in each pass, in inference mode, and the logits with it",
            hint="let its forward pass change weights and buffers in training mode only: if self.training",
        )


def placed(model: nn.Module, x: Images) -> Images:
    """Images on the device of a model, in the dtype of most of its weights; without any, as they are."""
    where, sizes = next(model.parameters(), x), Counter[torch.dtype]()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # a single scale may be of another type than the layers
            sizes[parameter.dtype] += parameter.numel()
    return x.to(device=where.device, dtype=sizes.most_common(1)[0][0] if sizes else x.dtype)


def plainly_finite(*tensors: Tensor) -> bool:
    """Whether a quick look shows finite numbers only; it shows nothing on a GPU, which would have to wait for it."""
    return all(tensor.device.type == "cpu" and math.isfinite(float(tensor.detach().sum())) for tensor in tensors)


@dataclass(slots=True)
class Meter:
    """Images sent forward and backward through a model.

    Attributes:
        queries: Sent forward.
        gradients: Sent backward.
        singular: Of these, the images whose gradient held a NaN or an infinity; a tensor that stays on the device, so
            that counting makes no GPU wait.
    """

    queries: int = 0
    gradients: int = 0
    singular: Tensor | int = 0

    def since(self, before: "Meter") -> "Meter":
        """What was counted after this copy was made."""
        return Meter(self.queries - before.queries, self.gradients - before.gradients, self.singular - before.singular)


@contextmanager
def metered(model: nn.Module) -> Generator[Meter]:
    """Count the images that pass forward and backward through `model`."""
    meter = Meter()

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(look)

    def look(slope: Tensor) -> None:
        if not plainly_finite(slope):
            meter.singular = meter.singular + (~slope.sum(tuple(range(1, slope.ndim))).isfinite()).sum()

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count = len(inputs[0])
        meter.queries += count
        if output.requires_grad:
            output.register_hook(lambda _: backward(count))

    def backward(count: int) -> None:
        meter.gradients += count

    handles = model.register_forward_pre_hook(before), model.register_forward_hook(forward)
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


def accelerated(model: Classifier, images: Images | None = None) -> Classifier:
    """A copy of a frozen classifier that computes the same function and gradients faster.

    Batch norms are folded into the convolution before them, ReLU comes after max pooling, image weights are stored
    channels-last, and convolutions over grey or colour images take their gradient by blocks of pixels; what that brings
    is measured by benchmarks/attack_loop.py. Logits and gradients of the copy are checked on noise and on
    `images`, because a model may treat noise otherwise than images. Where the copy cannot be made or differs,
    or where the model has a backward pass of its own, which no copy would keep, the model itself is returned.
    """
    layout = layout_of(model, images)  # before it is copied: what is found stays in the model
    try:
        fast = copy.deepcopy(model)
        with frozen(fast):
            fast.net = _rewritten(fast.net)
        fast.eval().requires_grad_(False)
        if layout == torch.channels_last:
            fast.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        return fast if _agree(model, fast, images) else model
    except Exception:  # noqa: BLE001  networks that cannot be copied or traced are attacked as they are
        return model


def layout_of(model: Classifier, images: Images | None = None) -> torch.memory_format:
    """How images lie in memory for a model: channels-last, which is faster, unless it fails on them, as `view` may.

    Raises:
        ModelError: If the model fails on `images` however they lie; without any, a blank one is tried, which it may
            not be made for.
    """
    if len(model.shape) != 3:
        return torch.contiguous_format
    some = torch.full((1, *model.shape), model.low) if images is None else images
    with frozen(model), torch.no_grad(), suppress(Exception) if images is None else nullcontext():
        model.raw(placed(model, some).contiguous(memory_format=torch.channels_last))
    return torch.channels_last if model.lends == torch.preserve_format else torch.contiguous_format


def _agree(model: Classifier, fast: Classifier, images: Images | None) -> bool:
    """Whether both give the same logits, for batches of two sizes, and the same gradients.

    Tracing drops what is no operation on tensors: the backward pass of an own `autograd.Function`, `torch.no_grad`.
    Rounding may move a few units across a kink, hence the wide tolerance on gradients.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.rand((1, *model.shape), generator=generator) * (model.high - model.low) + model.low
    probe = placed(model, probe)
    if images is not None:
        some = images.to(probe)
        noise = torch.rand(some.shape, generator=generator).to(probe) * (model.high - model.low) + model.low
        # moved a little inside the box: in flat regions max pooling may send a gradient to any pixel
        probe = torch.cat([probe, some + 2e-3 * (noise - some)])
    mix = torch.randn((len(probe), model.num_classes), generator=generator).to(probe)
    with frozen(model):
        expected, slope, own_backward = _pull_back(model, probe, mix)
        if own_backward:
            return False
        got, fast_slope, _ = _pull_back(fast, probe, mix)
        with torch.no_grad():
            part = fast(probe[:1])
    slack = 1e-4 * float((expected - expected.mean()).abs().max())
    close = torch.allclose(expected, got, 0, slack) and torch.allclose(expected[:1], part, 0, slack)
    gap, size = ((t.flatten(1).norm(dim=1)) for t in (slope - fast_slope, slope))
    return bool(close and (gap <= 2e-2 * size).all())


def _own_backward(z: Logits) -> bool:
    """Whether a backward pass written in Python lies between the images and these logits."""
    waiting, seen = [z.grad_fn], set[object]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False


def _pull_back(model: Classifier, x: Images, mix: Tensor) -> tuple[Logits, Images, bool]:
    """Logits, the gradient of their sum weighted by `mix` (zero where none flows), and `_own_backward`."""
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        z = model(x)
        own_backward = _own_backward(z)
        (slope,) = torch.autograd.grad((z * mix).sum(), x, allow_unused=True) if z.requires_grad else (None,)
    return z.detach(), torch.zeros_like(x) if slope is None else slope, own_backward


def _rewritten(net: nn.Module) -> nn.Module:
    traced = fx.GraphModule(net, _Tracer().trace(net))
    _fold_norms(traced)
    _pool_first(traced)
    _exchange_image_layers(traced)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Untraced) or super().is_leaf_module(m, module_qualified_name)


def _fold_norms(traced: fx.GraphModule) -> None:
    """Merge every batch norm into the layer that feeds it and nothing else."""
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


def _pool_first(traced: fx.GraphModule) -> None:
    """Exchange ReLU and the max pooling after it: the same function and gradient, on a quarter of the numbers."""
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        relu = node.args[0] if node.args else None
        if (
            isinstance(relu, fx.Node)
            and (node.op, relu.op, len(relu.users)) == ("call_module", "call_module", 1)
            and isinstance(modules[str(node.target)], nn.MaxPool2d)
            and isinstance(modules[str(relu.target)], nn.ReLU)
            and len(relu.all_input_nodes[0].users) == 1  # nobody else sees what a ReLU in place would change
        ):
            node.target, relu.target = relu.target, node.target


def _exchange_image_layers(traced: fx.GraphModule) -> None:
    for name, layer in list(traced.named_modules()):
        if isinstance(layer, nn.Conv2d) and _ImageConv.fits(layer):
            traced.set_submodule(name, _ImageConv(layer))


class _ImageConv(nn.Module):
    """A convolution over grey or colour images, with a gradient of its own.

    The CPU kernel of the usual gradient works on sixteen channels, however few there are, and can take half the time
    of a small network. Here a block of pixels takes the place of the channels: a convolution of the slopes gives the
    gradient block by block, and a pixel shuffle unfolds it (the other way round in Shi et al. 2016, arXiv:1609.05158).
    """

    pixels: Tensor

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.block = layer, _block(layer)
        weight, left = _phases(layer.weight.detach(), 3, self.block, layer.stride[1], int(layer.padding[1]))
        weight, top = _phases(weight, 2, self.block, layer.stride[0], int(layer.padding[0]))
        self.padding = (top, left)
        self.register_buffer("pixels", weight.permute(1, 2, 4, 0, 3, 5).flatten(0, 2).contiguous())

    @staticmethod
    def fits(layer: nn.Conv2d) -> bool:
        """Whether the layer is one that this can take the place of, and gains from it."""
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        small = layer.in_channels <= 3 and layer.weight.device.type == "cpu"
        return plain and small and layer.dilation == (1, 1) and all(_block(layer) % s == 0 for s in layer.stride)

    def forward(self, x: Images) -> Images:
        return _ImageConvolution.apply(x, self)  # pyright: ignore[reportReturnType]

    def gradient(self, slopes: Tensor, size: Sequence[int]) -> Tensor:
        """From slopes of the outputs to those of the images, of this height and width."""
        steps = [self.block // s for s in self.layer.stride]
        missing = [
            max(0, (math.ceil(n / self.block) - 1) * step + taps - 2 * padding - m)
            for n, step, taps, padding, m in zip(
                size, steps, self.pixels.shape[2:], self.padding, slopes.shape[-2:], strict=True
            )
        ]
        if any(missing):
            slopes = pad(slopes, (0, missing[1], 0, missing[0]))
        blocks = conv2d(slopes, self.pixels, None, steps, self.padding)
        return pixel_shuffle(blocks, self.block)[..., : size[0], : size[1]]


class _ImageConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Images, convolution: _ImageConv) -> Images:
        ctx.convolution, ctx.size = convolution, x.shape[-2:]
        return convolution.layer(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.convolution.gradient(gradients[0], ctx.size), None


def _block(layer: nn.Conv2d) -> int:
    """Side of a block: its pixels over all channels come near sixteen."""
    return 4 if layer.in_channels == 1 else 2


def _phases(weight: Tensor, axis: int, block: int, stride: int, padding: int) -> tuple[Tensor, int]:
    """The weights that reach each pixel of a block along one axis, which becomes (block, taps), and the padding.

    Pixel block * q + a is reached from output (block / stride) * q + u - before with weight a + padding +
    stride * (before - u), where there is one.
    """
    size = weight.shape[axis]
    before = max(0, math.ceil((size - 1 - padding) / stride))
    taps = (block - 1 + padding) // stride + before + 1
    index = torch.arange(block)[:, None] + padding + stride * (before - torch.arange(taps))
    index = torch.where((index >= 0) & (index < size), index, size)
    nothing = torch.zeros_like(weight.narrow(axis, 0, 1))
    chosen = torch.cat([weight, nothing], axis).index_select(axis, index.flatten())
    return chosen.unflatten(axis, (block, taps)), before
