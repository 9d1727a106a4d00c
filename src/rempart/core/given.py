"""Images, labels, sample numbers and masks as Python callers give them, turned into the tensors the package works on.

Each function takes tensors, arrays and lists, accepts what can mean one thing only, and refuses the rest with a
`DataError` that says what came. Nothing that came is changed.
"""

import operator
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from rempart.core.errors import DataError
from rempart.core.model import Classifier
from rempart.core.threat import rounding
from rempart.core.types import Images, Labels


def tensor(value: object, what: str) -> Tensor:
    """A dense tensor of real numbers without a graph. Arrays and lists are copied, tensors are shared.

    Raises:
        DataError: If the value holds anything but numbers, or is not dense.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        try:
            value = torch.stack([item.detach() for item in value])
        except RuntimeError:
            shapes = sorted({str(tuple(item.shape)) for item in value})
            raise DataError(f"{what} of one shape", got=" and ".join(shapes[:3])) from None
    if isinstance(value, Tensor):
        if value.is_complex():
            raise DataError(f"{what} as real numbers: integers such as uint8, or floating-point", got=_described(value))
        strange = value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta
        if strange:
            raise DataError(f"{what} as a dense tensor", got=_described(value))
        plain = value.detach().as_subclass(Tensor)
        return plain.clone() if plain.is_inference() else plain  # autograd refuses to save an inference tensor
    try:
        array = np.array(np.asarray(value), order="C")
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{what} as a tensor or an array of numbers", got=type(value).__name__) from None
    if array.dtype.kind not in "biuf" or isinstance(value, np.ma.MaskedArray):
        came = f"an array of {array.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise DataError(f"{what} as a tensor or an array of numbers", got=came)
    known = np.float64 if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    return torch.from_numpy(array.astype(known, copy=False))


def pixels(value: object) -> Images:
    """Floating-point pixels, half precision widened to float32; bytes stay bytes.

    Raises:
        DataError: If they are numbers of another type.
    """
    x = tensor(value, "images")
    if x.is_floating_point() and x.itemsize < 4:
        return x.float()
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise DataError("floating-point pixels", got=_described(x), hint="convert them to float32 in the model's box")
    return x


def images(model: Classifier, value: object) -> Images:
    """A batch of floating-point images in the box of a model.

    Bytes are taken where the box is [0, 255], and so leaves no doubt about their scale.

    Raises:
        DataError: If they have another shape or type, are not finite, or leave the box.
    """
    x, (low, high) = tensor(value, "images"), (model.low, model.high)
    if tuple(x.shape[1:]) != model.shape or x.ndim == 0:
        came = tuple(x.shape[x.ndim == len(model.shape) + 1 :])
        raise DataError(f"images of shape {model.shape}", got=came, hint=_reshape(x, model.shape))
    if not x.is_floating_point() and (x.dtype == torch.bool or (low, high) != (0, 255)):
        levels = "divide 8-bit images by 255" if (low, high) == (0, 1) else "convert them to float32"
        raise DataError("floating-point pixels", got=str(x.dtype), hint=f"{levels}, in the box [{low:g}, {high:g}]")
    x = pixels(x) if x.is_floating_point() else x.float()
    if not bool(torch.isfinite(x).all()):
        raise DataError("finite pixels", got="NaN or infinity", hint="repair or leave out these images")
    least, most = map(float, x.aminmax()) if x.numel() else (low, high)
    slack = rounding(low, high)
    if least < low - slack or most > high + slack:
        bytes_ = (low, high) == (0, 1) and least >= 0 and 2 < most <= 255
        raise DataError(
            f"pixels in the model's box [{low:g}, {high:g}]",
            got=f"[{least:g}, {most:g}]",
            hint="divide 8-bit images by 255"
            if bytes_
            else "do not normalise the images: mean and std belong inside the model",
        )
    return x


def labels(value: object, count: int, num_classes: int, what: str = "labels") -> Labels:
    """Class numbers, int64, shape (n).

    Taken as well: a column (n, 1), one-hot rows (n, num_classes), whole numbers in floating point, and booleans where
    there are two classes.

    Raises:
        DataError: If they are anything else, are not `count`, or name no class.
    """
    y = tensor(value, what)
    came = _described(y)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim == 2 and y.shape[1] == num_classes:
        y = _whole(y.to(torch.uint8) if y.dtype == torch.bool else y, what, came)
        if bool(((y != 0) & (y != 1)).any() or (y.sum(1) != 1).any()):
            raise DataError(f"{what} as class numbers, or as rows with a single 1", got=came)
        y = y.argmax(1)
    if y.ndim != 1 or len(y) != count:
        lengths = f"{len(y)} {what} for {count} images" if y.ndim == 1 else f"{came} for {count} images"
        raise DataError(f"one label per image, {what} of shape ({count},)", got=lengths)
    if y.dtype == torch.bool:
        if num_classes != 2:
            raise DataError(f"{what} as numbers of {num_classes} classes", got=came)
        return y.long()
    if y.is_floating_point() and num_classes - 1 > 2 / torch.finfo(y.dtype).eps:
        raise DataError(f"{what} in a type that holds every number up to {num_classes - 1}", got=came)
    y = _whole(y, what, came)
    if len(y) and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        from_one = int(y.min()) == 1 and int(y.max()) == num_classes
        raise DataError(
            f"{what} in 0..{num_classes - 1}, the model's classes",
            got=f"{int(y.min())}..{int(y.max())}",
            hint="subtract 1: classes count from 0" if from_one else "check that model and data belong together",
        )
    return y


def numbers(value: object, count: int) -> Tensor:
    """Sample numbers on the CPU, int64, shape (n); 0 to n - 1 for None.

    Raises:
        DataError: If they are not one whole number per image.
    """
    if value is None:
        return torch.arange(count)
    index = tensor(value, "sample numbers")
    if tuple(index.shape) != (count,) or index.dtype == torch.bool:
        expected = f"index as one whole number per image, shape ({count},)"
        raise DataError(expected, got=_described(index), hint="leave it out to count from 0")
    return _whole(index, "sample numbers", _described(index)).cpu()


def mask(value: object, x: Images) -> Tensor | None:
    """Where pixels may change: boolean, on the CPU, one row per image, broadcast over channels.

    Raises:
        DataError: If it does not fit the images, or holds more than yes and no.
    """
    if value is None:
        return None
    given = tensor(value, "mask")
    channel = (len(x), 1, *x.shape[2:])
    if given.ndim != x.ndim or any(m not in (1, n) for m, n in zip(given.shape, x.shape, strict=True)):
        hint = "add the axis of channels: mask[:, None]" if tuple(given.shape) == (len(x), *x.shape[2:]) else ""
        raise DataError(f"a mask of shape {channel} or {tuple(x.shape)}", got=_described(given), hint=hint)
    if bool(((given != 0) & (given != 1)).any()):
        hint = "write mask > 0 if every other pixel may change"
        raise DataError("a mask of 0 and 1, or of booleans", got=_described(given), hint=hint)
    return given.bool().cpu().expand(len(x), *given.shape[1:])


def whole(value: SupportsIndex, what: str) -> int:
    """A whole number, as Python, numpy and torch have them.

    Raises:
        DataError: If it is none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise DataError(f"{what} that is a whole number", got=repr(value)) from None


def channels_first(came: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What to do to an array whose axes are not those of images of this shape; nothing where they might be."""
    channels, *space = shape
    if space and channels == 1 and came[-len(space) :] == tuple(space) and len(came) <= len(shape):
        return f"add the axis of channels: {'images[None]' if len(came) == len(space) else 'images[:, None]'}"
    if space and came[-len(shape) :] == (*space, channels):
        return f"put the axis of channels first: np.moveaxis(images, -1, {-len(shape)})"
    if len(came) not in (len(shape), len(shape) + 1):
        return f"{len(shape)} axes an image, channels first"
    return ""


def _reshape(x: Tensor, shape: tuple[int, ...]) -> str:
    came = tuple(x.shape)
    if came == shape:
        return "add the axis of images: images[None]"
    resized = f"folders and zips can be resized: DATA@{shape[-1]}x{shape[-2]}, DATA@grey or DATA@rgb" * (len(shape) > 1)
    return channels_first(came, shape) or resized


def _whole(values: Tensor, what: str, came: str) -> Tensor:
    """The same numbers as int64."""
    if values.is_floating_point():
        exact = values.double()
        odd = ~(exact.isfinite() & (exact == exact.round()) & (exact.abs() < 2**53))
        if bool(odd.any()):
            raise DataError(f"{what} as whole numbers", got=f"{float(exact[odd][0]):g} in {came}")
        return exact.long()
    if values.dtype == torch.uint64 and bool((values.view(torch.int64) < 0).any()):
        raise DataError(f"{what} below 2**63", got=came)
    return values.to(torch.int64)


def _described(values: Tensor) -> str:
    kind = str(values.dtype).removeprefix("torch.")
    odd = f", {values.layout}, {values.device.type}" if values.layout != torch.strided or values.is_meta else ""
    return f"{kind} of shape {tuple(values.shape)}{odd}"
