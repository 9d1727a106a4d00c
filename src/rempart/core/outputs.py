"""What a network returns, as its last operations show: logits, probabilities, or numbers that could be either."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rempart.core.types import Images

Ending = Literal["softmax", "sigmoid", "bounded", "linear", "unknown"]
"""The last operations of a network: softmax, sigmoid, arithmetic of those, layers with weights, or any others."""

_SQUASHING = {"softmax": "softmax", "_softmax": "softmax", "sigmoid": "sigmoid", "expit": "sigmoid"}
_HANDED_ON = re.compile(
    "clone|contiguous|to|float|double|half|type|reshape|view|view_as|reshape_as|flatten|squeeze|unsqueeze|__getitem__|"
    "flip|index_select|select|narrow|permute|transpose|movedim"
)
_MOVING = re.compile(
    "View|UnsafeView|Reshape|ReshapeAlias|Clone|ToCopy|Copy|Slice|Select|Squeeze|Unsqueeze|Transpose|Permute|T|Expand|"
    "Alias|AsStrided|Index|IndexSelect|Flip|Split|SplitWithSizes|Unbind|Narrow|Gather|Repeat|Roll|Movedim"
)
_ARITHMETIC = re.compile(
    f"{_MOVING.pattern}|Add|Sub|Rsub|Mul|Div|Neg|Mean|Sum|Stack|Cat|Where|Lerp|Addcmul|Max|Amax|AvgPool2D|"
    "AdaptiveAvgPool2D|MaxPool2DWithIndices"
)
_LIMITING = re.compile("Clamp|ClampMin|ClampMax|Hardtanh|Maximum|Minimum")
_WEIGHTED = re.compile(
    "Addmm|Mm|Bmm|Baddbmm|Addbmm|Mv|Addmv|Dot|Linear|MkldnnLinear|Convolution|ConvolutionOverrideable|"
    "MkldnnConvolution|CudnnConvolution|NativeBatchNorm|CudnnBatchNorm|NativeLayerNorm|NativeGroupNorm"
)
_SHARES = re.compile("Softmax|Sigmoid|Hardsigmoid")
_OPERATION = re.compile(r"(\w+?)Backward\d+")


class Tracked:
    """The softmax or sigmoid called last: its results, as later operations handed them on, and their logits."""

    def __init__(self) -> None:
        self.kind = ""
        self.pairs: dict[int, tuple[Tensor, int, Tensor]] = {}

    def logits(self, outputs: Tensor, images: int) -> Tensor | None:
        """What was squashed to these outputs; None unless a softmax over classes or a sigmoid came last."""
        z = self.behind(outputs)
        if z is None or z.shape != outputs.shape or z.requires_grad != outputs.requires_grad:
            return None
        return z if self.kind == "sigmoid" or z.numel() > images else None  # one share of a softmax has no logit alone

    def behind(self, result: object) -> Tensor | None:
        """What a result was made of, unless it was changed in place since."""
        found, version, z = self.pairs.get(id(result), (None, 0, None))
        return z if found is result and isinstance(result, Tensor) and _version(result) == version else None

    def keep(self, result: Tensor, z: Tensor) -> None:
        """Remember what a result was made of."""
        if z is not result:  # else it was made in place
            self.pairs[id(result)] = (result, _version(result), z)


@contextmanager
def tracked(images: int) -> Generator[Tracked]:
    """Follow the last softmax or sigmoid of a network in a pass over so many images, wherever it is called from."""
    found = Tracked()
    with _Watch(found, images):
        yield found


class _Watch(TorchFunctionMode):
    def __init__(self, found: Tracked, images: int) -> None:
        super().__init__()
        self.found, self.images = found, images

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in _SQUASHING and isinstance(result, Tensor):
            self.found.pairs.clear()  # only the last counts, and maps of attention are large
            self.found.kind = _SQUASHING[name]
            z = args[0] if args else kwargs.get("input", kwargs.get("self"))
            if self.found.kind == "sigmoid" or _over_classes(z, args, kwargs, self.images):
                self.found.keep(result, z)
        elif _HANDED_ON.fullmatch(name) and args and result is not args[0]:
            z = self.found.behind(args[0])
            if z is not None:
                self.found.keep(result, func(z, *args[1:], **kwargs))
        return result


def _over_classes(z: Tensor, args: tuple[Any, ...], kwargs: Any, images: int) -> bool:
    """Whether a softmax goes over all outputs of an image, and not over a part of them or over the batch."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dim, int):
        dim = 1 if z.ndim == 2 else 0  # what torch does where none is named
    return z.ndim > 0 and z.shape[dim] * images == z.numel() and (dim % z.ndim > 0 or images == 1)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def ending(net: nn.Module, x: Images) -> Ending:
    """Read the last operations of a frozen network off the graph that torch keeps for gradients."""
    with torch.enable_grad():
        outputs: Any = net(x.detach().requires_grad_(True).clone())  # it may write into them
    root = outputs.grad_fn if isinstance(outputs, Tensor) else None
    if root is None:
        return "unknown"
    last = _source(root)
    if last in ("Softmax", "Sigmoid"):
        return "softmax" if last == "Softmax" else "sigmoid"
    ends, limited = _ends(root)
    kinds: set[Ending] = {_kind(node) for node in ends}
    if len(kinds) > 1 or (limited and "linear" in kinds):  # a hard sigmoid is made of limits
        return "unknown"
    return kinds.pop()


def _kind(node: Any) -> Ending:
    if _is_bounded(node):
        return "bounded"
    before = _before(node)
    if not (_WEIGHTED.fullmatch(_name(node)) and before):
        return "unknown"
    if _source(before[0]) == "Tanh":  # a hidden layer: as shares, its values would have been moved to [0, 1]
        return "linear"
    # weights on shares may take their mean, and the graph does not show whether they do
    ends, limited = _ends(before[0])
    return "unknown" if limited or any(_is_bounded(end) for end in ends) else "linear"


def _ends(root: Any) -> tuple[list[Any], bool]:
    """Where arithmetic, read backwards, comes to something else; and whether values were cut off on the way."""
    ends, limited, waiting, seen = list[Any](), False, [root], set[Any]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        name, before = _name(node), _before(node)
        product = _WEIGHTED.fullmatch(name) and len(before) > 1  # of two results, and not of one and weights
        cut = _LIMITING.fullmatch(name) is not None and not _is_bounded(node)
        limited |= cut
        if cut or product or _ARITHMETIC.fullmatch(name):
            waiting += before
        else:
            ends.append(node)
    return ends, limited


def _name(node: Any) -> str:
    match = _OPERATION.fullmatch(node.name())
    return match[1] if match else ""


def _before(node: Any) -> list[Any]:
    return [part for part, _ in node.next_functions if part is not None]


def _source(node: Any) -> str:
    """The last operation that did more than hand values on."""
    while _MOVING.fullmatch(_name(node)):
        before = _before(node)
        if len(before) != 1:
            break
        node = before[0]
    return _name(node)


def _is_bounded(node: Any) -> bool:
    name, before = _name(node), _before(node)
    if name == "Exp":
        return bool(before) and _source(before[0]) in ("LogSoftmax", "LogSigmoid")
    if name in ("Clamp", "Hardtanh"):
        ends = [getattr(node, f"_saved_{end}", getattr(node, f"_saved_{end}_val", None)) for end in ("min", "max")]
        return all(isinstance(end, (int, float)) and 0 <= end <= 1 for end in ends)
    return name == "Tanh" or _SHARES.fullmatch(name) is not None
