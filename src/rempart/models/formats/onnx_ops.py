"""Operators of ONNX as functions of torch: inputs by position, attributes by name as in the specification.

Source:
    ONNX operator specification, https://onnx.ai/onnx/operators, opsets 7 to 24. Where an operator changed between
    versions, both its old attributes and its new inputs are taken; `opset` is asked for where the meaning changed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ELEMENTS = 2**28
"""Elements of one tensor that an operator may make: 1 GiB in float32."""

Ints = Sequence[int] | Tensor | None
Operator = Callable[..., Tensor | tuple[Tensor, ...]]


class UnsupportedError(Exception):
    """The graph holds something that has no counterpart here."""


def ints(values: Ints) -> list[int]:
    """Integers out of an attribute or a tensor; none out of None."""
    return [] if values is None else [int(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def padding(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    pads: Ints,
    auto_pad: str,
) -> list[tuple[int, int]]:
    """What is added before and after each spatial axis."""
    if auto_pad in ("NOTSET", ""):
        flat = ints(pads) or [0] * 2 * len(kernel)
        return list(zip(flat[: len(kernel)], flat[len(kernel) :], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * len(kernel)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    missing = [
        max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        for size, stride, span in zip(sizes, strides, spans, strict=True)
    ]
    less, more = [m // 2 for m in missing], [m - m // 2 for m in missing]
    return list(zip(less, more, strict=True) if auto_pad == "SAME_UPPER" else zip(more, less, strict=True))


def _padded(x: Tensor, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    flat = [side for pair in reversed(pairs) for side in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _symmetric(pairs: Sequence[tuple[int, int]]) -> bool:
    return all(before == after for before, after in pairs)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints = None,
    group: int = 1,
    kernel_shape: Ints = None,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    ones, kernel = [1] * (weight.ndim - 2), list(weight.shape[2:])
    stride, dilation = ints(strides) or ones, ints(dilations) or ones
    pairs = padding(x.shape[2:], kernel, stride, dilation, pads, auto_pad)
    if not _symmetric(pairs):
        x, pairs = _padded(x, pairs), [(0, 0)] * len(pairs)
    sides = [before for before, _ in pairs]
    return torch.convolution(x, weight, bias, stride, sides, dilation, False, [0] * len(ones), group)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints = None,
    group: int = 1,
    kernel_shape: Ints = None,
    output_padding: Ints = None,
    output_shape: Ints = None,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    if auto_pad not in ("NOTSET", "VALID", "") or output_shape is not None:
        raise UnsupportedError("ConvTranspose with auto_pad or output_shape")
    ones, zeros = [1] * (weight.ndim - 2), [0] * (weight.ndim - 2)
    stride, dilation, extra = ints(strides) or ones, ints(dilations) or ones, ints(output_padding) or zeros
    pairs = padding(x.shape[2:], list(weight.shape[2:]), stride, dilation, pads, auto_pad)
    sides = [before for before, _ in pairs] if _symmetric(pairs) else zeros
    y = torch.convolution(x, weight, bias, stride, sides, dilation, True, extra, group)
    return y if _symmetric(pairs) else _padded(y, [(-before, -after) for before, after in pairs])


def _pool_form(x: Tensor, kernel_shape: Ints, strides: Ints, dilations: Ints) -> tuple[list[int], ...]:
    ones = [1] * (x.ndim - 2)
    return ints(kernel_shape), ints(strides) or ones, ints(dilations) or ones


def _max_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints = None,
    pads: Ints = None,
    storage_order: int = 0,
    strides: Ints = None,
) -> Tensor:
    kernel, stride, dilation = _pool_form(x, kernel_shape, strides, dilations)
    pairs = padding(x.shape[2:], kernel, stride, dilation, pads, auto_pad)
    own = _symmetric(pairs) and all(2 * before <= k for (before, _), k in zip(pairs, kernel, strict=True))
    sides: Any = [before for before, _ in pairs] if own else 0
    x = x if own else _padded(x, pairs, -math.inf)
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(x, kernel, stride, sides, dilation, ceil_mode=bool(ceil_mode))


def _average_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints = None,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    kernel, stride, dilation = _pool_form(x, kernel_shape, strides, dilations)
    if any(d != 1 for d in dilation):
        raise UnsupportedError("AveragePool with dilations")
    pairs = padding(x.shape[2:], kernel, stride, dilation, pads, auto_pad)
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    if _symmetric(pairs) and all(2 * before <= k for (before, _), k in zip(pairs, kernel, strict=True)):
        return pool(x, kernel, stride, [before for before, _ in pairs], bool(ceil_mode), bool(count_include_pad))
    if ceil_mode:
        raise UnsupportedError("AveragePool with ceil_mode and uneven pads")
    mean = pool(_padded(x, pairs), kernel, stride)
    return mean if count_include_pad else mean / pool(_padded(torch.ones_like(x[:1, :1]), pairs), kernel, stride)


def _global(function: Callable[..., Tensor]) -> Operator:
    return lambda x: function(x, tuple(range(2, x.ndim)), True)


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    def reduced(
        x: Tensor, over: Tensor | None = None, *, axes: Ints = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        where = ints(over if over is not None else axes)
        if not where and noop_with_empty_axes:
            return x
        return function(x, tuple(where or range(x.ndim)), bool(keepdims))

    return reduced


def _prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
) -> Tensor:
    if training_mode or not spatial:
        raise UnsupportedError("BatchNormalization in training mode or without sharing over space")
    return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    y = F.layer_norm(x, x.shape[axis:], None, None, epsilon) * scale
    return y if bias is None else y + bias


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (x.ndim - 2))


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def _group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, opset: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    if opset < 21:  # one value per group, later one per channel
        scale, bias = (t.repeat_interleave(x.shape[1] // num_groups) for t in (scale, bias))
    return F.group_norm(x, num_groups, None, None, epsilon) * _along_channels(scale, x) + _along_channels(bias, x)


def _lrn(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, bias)


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    y = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return y if c is None else y + beta * c


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    def applied(x: Tensor, *, opset: int, axis: int | None = None) -> Tensor:
        if opset >= 13:
            return function(x, -1 if axis is None else axis)
        first = 1 if axis is None else axis % x.ndim
        return function(x.reshape(math.prod(x.shape[:first]), -1), 1).view_as(x)

    return applied


def _clip(
    x: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    *,
    min: float | None = None,
    max: float | None = None,
) -> Tensor:
    x = x if (lowest := min if low is None else low) is None else torch.clamp(x, min=lowest)
    return x if (highest := max if high is None else high) is None else torch.clamp(x, max=highest)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _selu(
    x: Tensor, *, alpha: float = 1.6732632423543772848170429916717, gamma: float = 1.0507009873554804934193349852946
) -> Tensor:
    return gamma * F.elu(x, alpha)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _every(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda *tensors: reduce(function, tensors)


def _mean(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors) / len(tensors)


# ---- shapes


def _within_limits(shape: Sequence[int]) -> Sequence[int]:
    if math.prod(shape) > MAX_ELEMENTS:
        raise UnsupportedError(f"a tensor of shape {tuple(shape)}, more than {MAX_ELEMENTS:,} elements")
    return shape


def _reshape(x: Tensor, to: Tensor | None = None, *, shape: Ints = None, allowzero: int = 0) -> Tensor:
    wanted = ints(to if to is not None else shape)
    return x.reshape([x.shape[i] if not (side or allowzero) else side for i, side in enumerate(wanted)])


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[: axis if axis >= 0 else axis + x.ndim]), -1)


def _transpose(x: Tensor, *, perm: Ints = None) -> Tensor:
    return x.permute(ints(perm) or list(reversed(range(x.ndim))))


def _squeeze(x: Tensor, over: Tensor | None = None, *, axes: Ints = None) -> Tensor:
    where = ints(over if over is not None else axes)
    return x.squeeze(tuple(where)) if where else x.squeeze()


def _unsqueeze(x: Tensor, over: Tensor | None = None, *, axes: Ints = None) -> Tensor:
    where = ints(over if over is not None else axes)
    rank = x.ndim + len(where)
    for axis in sorted(axis % rank for axis in where):
        x = x.unsqueeze(axis)
    return x


def _concat(*tensors: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(tensors, axis)


def _slice(
    x: Tensor,
    first: Tensor | None = None,
    last: Tensor | None = None,
    over: Tensor | None = None,
    by: Tensor | None = None,
    *,
    starts: Ints = None,
    ends: Ints = None,
    axes: Ints = None,
) -> Tensor:
    begin, end = ints(first if first is not None else starts), ints(last if last is not None else ends)
    where = ints(over if over is not None else axes) or list(range(len(begin)))
    for a, b, axis, step in zip(begin, end, where, ints(by) or [1] * len(begin), strict=True):
        chosen = range(x.shape[axis])[a:b:step]
        if step == 1:
            x = x.narrow(axis, chosen.start, len(chosen))
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


def _split(
    x: Tensor, sizes: Tensor | None = None, *, split: Ints = None, axis: int = 0, num_outputs: int = 0, outputs: int
) -> tuple[Tensor, ...]:
    parts = ints(sizes if sizes is not None else split)
    return x.split(parts or math.ceil(x.shape[axis] / (num_outputs or outputs)), axis)


def _gather(x: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    index = index.to(x.device)
    index = torch.where(index < 0, index + x.shape[axis], index)
    if index.ndim == 0:
        return x.select(axis, int(index))
    axis = axis % x.ndim
    return x.index_select(axis, index.flatten()).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _filled(shape: Tensor, *, value: Tensor | None = None) -> Tensor:
    value = torch.zeros(1) if value is None else value
    return value.new_full(_within_limits(ints(shape)), value.item())


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(_within_limits(torch.broadcast_shapes(x.shape, ints(shape))))


def _tile(x: Tensor, repeats: Tensor) -> Tensor:
    _within_limits([side * times for side, times in zip(x.shape, ints(repeats), strict=True)])
    return x.repeat(ints(repeats))


def _range(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    _within_limits([int(max(0, math.ceil((limit.item() - start.item()) / delta.item())))])
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _pad(
    x: Tensor,
    amounts: Tensor | None = None,
    constant: Tensor | None = None,
    over: Tensor | None = None,
    *,
    pads: Ints = None,
    value: float = 0.0,
    mode: str = "constant",
) -> Tensor:
    sides, axes = ints(amounts if amounts is not None else pads), ints(over) or list(range(x.ndim))
    pairs = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        pairs[axis] = sides[i], sides[i + len(axes)]
    _within_limits([side + before + after for side, (before, after) in zip(x.shape, pairs, strict=True)])
    if mode == "constant":
        return _padded(x, pairs, value if constant is None else constant.item())
    if any(pair != (0, 0) for pair in pairs[:2]):
        raise UnsupportedError(f"Pad with mode {mode} over batch or channels")
    flat = [side for pair in reversed(pairs[2:]) for side in pair]
    return F.pad(x, flat, mode={"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])


def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    blocks = x.view(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return blocks.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


def _space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    blocks = x.view(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


def _argmax(function: Callable[..., Tensor]) -> Operator:
    def applied(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        if select_last_index:
            raise UnsupportedError("ArgMax of the last of equals")
        return function(x, axis, bool(keepdims))

    return applied


# ---- resizing: along each axis a matrix from old to new positions


def _positions(new: int, old: int, scale: float, mode: str) -> Tensor:
    """Where new pixels lie among the old ones, float64."""
    d = torch.arange(new, dtype=torch.float64)
    match mode:
        case "half_pixel":
            return (d + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (d + 0.5) / scale - 0.5 if new > 1 else 0 * d
        case "half_pixel_symmetric":
            return old / 2 * (1 - new / (scale * old)) + (d + 0.5) / scale - 0.5
        case "align_corners":
            return d * ((old - 1) / (new - 1)) if new > 1 else 0 * d
        case "asymmetric":
            return d / scale
        case _:
            raise UnsupportedError(f"Resize with coordinate_transformation_mode {mode}")


_ROUNDED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda p: (p - 0.5).ceil(),
    "round_prefer_ceil": lambda p: (p + 0.5).floor(),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _taps(position: Tensor, mode: str, nearest_mode: str, a: float) -> list[tuple[Tensor, Tensor]]:
    """Old pixels that each new one is made of, with their weights."""
    one, base = torch.ones_like(position), position.floor()
    t = position - base
    match mode:
        case "nearest":
            return [(_ROUNDED[nearest_mode](position), one)]
        case "linear":
            return [(base, 1 - t), (base + 1, t)]
        case "cubic":

            def near(s: Tensor) -> Tensor:
                return ((a + 2) * s - (a + 3)) * s * s + 1

            def far(s: Tensor) -> Tensor:
                return ((a * s - 5 * a) * s + 8 * a) * s - 4 * a

            return [(base - 1, far(1 + t)), (base, near(t)), (base + 1, near(1 - t)), (base + 2, far(2 - t))]
        case _:
            raise UnsupportedError(f"Resize with mode {mode}")


def _resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    opset: int,
    antialias: int = 0,
    axes: Ints = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    if antialias or exclude_outside or keep_aspect_ratio_policy != "stretch":
        raise UnsupportedError("Resize with antialias, exclude_outside or keep_aspect_ratio_policy")
    if opset < 11:
        scales, coordinate_transformation_mode, nearest_mode = roi, "asymmetric", "floor"
    where = ints(axes) or list(range(x.ndim))
    if sizes is not None and sizes.numel():
        wanted = ints(sizes)
        ratios = [new / x.shape[axis] for new, axis in zip(wanted, where, strict=True)]
    elif scales is not None:
        ratios = scales.double().tolist()
        wanted = [math.floor(x.shape[axis] * ratio) for axis, ratio in zip(where, ratios, strict=True)]
    else:
        raise UnsupportedError("Resize without scales and sizes")
    for axis, new, scale in zip(where, wanted, ratios, strict=True):
        old = x.shape[axis]
        if (new, scale) == (old, 1.0):
            continue
        _within_limits([x.numel() // old, new])
        _within_limits([old, new])
        matrix, rows = torch.zeros((new, old), dtype=torch.float64), torch.arange(new)
        position = _positions(new, old, scale, coordinate_transformation_mode)
        for index, weight in _taps(position, mode, nearest_mode, cubic_coeff_a):
            matrix.index_put_((rows, index.long().clamp(0, old - 1)), weight, accumulate=True)
        x = (x.movedim(axis, -1) @ matrix.to(x).T).movedim(-1, axis)
    return x


def _upsample(
    x: Tensor, factors: Tensor | None = None, *, scales: Sequence[float] = (), mode: str = "nearest"
) -> Tensor:
    factors = torch.tensor(scales) if factors is None else factors
    return _resize(x, factors, mode="linear" if mode == "bilinear" else mode, opset=10)


# ---- the tables

_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
}


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    if to not in _TYPES:
        raise UnsupportedError(f"Cast to type {to}")
    return x.to(_TYPES[to])


def _identity(x: Tensor, *_: Tensor | None, **__: Any) -> Tensor:
    return x


OPERATORS: Mapping[str, Operator] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMax": _argmax(torch.argmax),
    "ArgMin": _argmax(torch.argmin),
    "Atan": torch.atan,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": lambda x, other, *, saturate=1, round_mode="up": x.to(other.dtype),
    "Ceil": torch.ceil,
    "Celu": lambda x, *, alpha=1.0: F.celu(x, alpha),
    "Clip": _clip,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": torch.cos,
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Dropout": _identity,
    "Einsum": lambda *tensors, equation: torch.einsum(equation, *tensors),
    "Elu": lambda x, *, alpha=1.0: F.elu(x, alpha),
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": torch.floor,
    "Gather": _gather,
    "GatherElements": lambda x, index, *, axis=0: x.gather(axis, torch.where(index < 0, index + x.shape[axis], index)),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "GroupNormalization": _group_norm,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": F.hardswish,
    "Identity": _identity,
    "InstanceNormalization": _instance_norm,
    "LRN": _lrn,
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda x, *, alpha=0.01: F.leaky_relu(x, alpha),
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "LogSoftmax": _softmax(torch.log_softmax),
    "LpNormalization": lambda x, *, axis=-1, p=2: x / torch.linalg.vector_norm(x, p, axis, keepdim=True),
    "MatMul": torch.matmul,
    "Max": _every(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": _mean,
    "Min": _every(torch.minimum),
    "Mish": F.mish,
    "Mod": _mod,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x >= 0, x, x * slope),
    "Pad": _pad,
    "Pow": torch.pow,
    "Range": _range,
    "Reciprocal": torch.reciprocal,
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep)),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceProd": _reduction(_prod),
    "ReduceSum": _reduction(torch.sum),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": torch.round,
    "Selu": _selu,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Size": lambda x: torch.tensor(x.numel()),
    "Slice": _slice,
    "Softmax": _softmax(torch.softmax),
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Sum": _every(torch.add),
    "Swish": lambda x, *, alpha=1.0: x * torch.sigmoid(alpha * x),
    "Tanh": torch.tanh,
    "ThresholdedRelu": lambda x, *, alpha=1.0: torch.where(x > alpha, x, torch.zeros_like(x)),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _upsample,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
"""Every operator there is, by its name in the specification."""


# ---- layers: what the rest of Rempart knows as modules (faster copies, features, sensitive neurons)

_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    **{"Relu": nn.ReLU, "LeakyRelu": nn.LeakyReLU, "Elu": nn.ELU, "Gelu": nn.GELU, "HardSwish": nn.Hardswish},
    **{"Mish": nn.Mish, "Sigmoid": nn.Sigmoid, "Softplus": nn.Softplus, "Tanh": nn.Tanh},
}
_ARGUMENTS = {"alpha": {"LeakyRelu": "negative_slope", "Elu": "alpha"}, "approximate": {"Gelu": "approximate"}}


def layer(kind: str, x: Tensor, constants: Sequence[Tensor | None], attributes: Mapping[str, Any]) -> nn.Module | None:
    """The module of torch that is this operator with these constants after its one input; None where none is."""
    if kind in _ACTIVATIONS and not constants:
        return _ACTIVATIONS[kind](**{_ARGUMENTS[key][kind]: value for key, value in attributes.items()})
    if kind == "GlobalAveragePool" and 3 <= x.ndim <= 5:
        return (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[x.ndim - 3](1)
    if any(constant is None for constant in constants):
        return None
    if kind == "BatchNormalization" and 3 <= x.ndim <= 5 and attributes.get("training_mode", 0) == 0:
        made = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[x.ndim - 3](
            x.shape[1], eps=attributes.get("epsilon", 1e-5), dtype=x.dtype
        )
        return _filled_with(made, ("weight", "bias", "running_mean", "running_var"), constants)
    if kind == "Gemm" and x.ndim == 2 and all(attributes.get(k, v) == v for k, v in _PLAIN.items()):
        weight, *rest = constants
        return None if weight is None else _dense(weight if attributes.get("transB") else weight.T, rest)
    if kind in ("Conv", "MaxPool"):
        return _windowed(kind, x, constants, attributes)
    return None


_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def _dense(weight: Tensor, rest: Sequence[Tensor | None]) -> nn.Module | None:
    if any(bias is None or bias.shape != weight.shape[:1] for bias in rest):
        return None
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(rest), dtype=weight.dtype)
    return _filled_with(made, ("weight", "bias"), (weight, *rest))


def _windowed(
    kind: str, x: Tensor, constants: Sequence[Tensor | None], attributes: Mapping[str, Any]
) -> nn.Module | None:
    rank = x.ndim - 2
    weight = constants[0] if constants else None
    kernel = list(weight.shape[2:]) if weight is not None else ints(attributes["kernel_shape"])
    strides, dilations = (ints(attributes.get(key)) or [1] * rank for key in ("strides", "dilations"))
    pairs = padding(x.shape[2:], kernel, strides, dilations, attributes.get("pads"), attributes.get("auto_pad", ""))
    sides = tuple(before for before, _ in pairs)
    fixed = attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID", "") or set(strides) == {1}
    if not (1 <= rank <= 3 and fixed and _symmetric(pairs)):
        return None
    if weight is None:
        if any(2 * side > k for side, k in zip(sides, kernel, strict=True)):
            return None
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[rank - 1]
        ceil = bool(attributes.get("ceil_mode", 0))
        return pool(tuple(kernel), tuple(strides), sides, tuple(dilations), ceil_mode=ceil)  # pyright: ignore
    group = attributes.get("group", 1)
    made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](
        x.shape[1], weight.shape[0], tuple(kernel), tuple(strides), sides, tuple(dilations), group,  # pyright: ignore
        bias=len(constants) > 1, dtype=weight.dtype,
    )  # fmt: skip
    return _filled_with(made, ("weight", "bias"), constants)


def _filled_with(module: nn.Module, names: Sequence[str], values: Sequence[Tensor | None]) -> nn.Module:
    with torch.no_grad():
        for name, value in zip(names, values, strict=False):
            getattr(module, name).copy_(value)
    return module.eval()
