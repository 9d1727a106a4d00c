"""Data that lie in arrays: the embedded digits, IDX files and .npz files."""

import gzip
import math
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rempart.core.errors import DataError
from rempart.core.names import Numbers, is_number, normal, whole
from rempart.data import files
from rempart.data.samples import SPLITS, Data, choose, in_memory, split_of

ADVERSARIAL, TRUE = "x_adv", "y"
"""Arrays of adversarial images and their true classes in a file of `rempart attack`."""

MAX_CLASSES = 100_000
"""Classes of a file that numbers them."""

_ALONE = ((ADVERSARIAL, TRUE), ("images", "labels"), ("x", "y"), ("X", "y"))
_NAN = ("nan", "<na>", "")
_MISSING = (*_NAN, "na", "n/a", "none", "null")  # words for it only beside numbers: a class may be called none
_SMALL = 256 * 2**20  # bytes of arrays that may be compressed by any ratio: blank images are


def digits(split: str) -> Data:
    """The 8x8 digits of scikit-learn; every fourth sample of each class is for the test."""
    from sklearn.datasets import load_digits

    choose(split, ("train", "test"), "digits")
    images, labels = load_digits(return_X_y=True)
    rank = np.zeros(len(labels), dtype=int)
    for k in range(10):
        rank[labels == k] = np.arange((labels == k).sum())
    chosen = (rank % 4 == 0) == (split == "test")
    pixels = torch.from_numpy(images[chosen].astype(np.float32) / 16).view(-1, 1, 8, 8)
    return in_memory(split, pixels, torch.from_numpy(labels[chosen]).long(), Numbers.of(10))


def idx(folder: Path, split: str) -> Data:
    """IDX files of images and labels, as MNIST has them."""
    found = {
        (name, kind): path
        for name, prefix in (("train", "train"), ("test", "t10k"))
        for kind, axes in (("images", 3), ("labels", 1))
        for ending in ("-ubyte.gz", "-ubyte")
        for dot in ("-", ".")
        if (path := folder / f"{prefix}-{kind}{dot}idx{axes}{ending}").is_file()
    }
    have = [name for name in SPLITS if {(name, "images"), (name, "labels")} <= found.keys()]
    choose(split, have, f"{folder.name}, as IDX files of images and labels,")
    labels, class_names = numbered({name: _read_idx(found[name, "labels"], 1) for name in have}, split)
    images = torch.from_numpy(_read_idx(found[split, "images"], 3))
    return in_memory(split, images.unsqueeze(1), labels, class_names)


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """The bytes of an IDX file as an array (format: http://yann.lecun.com/exdb/mnist)."""
    magic = bytes([0, 0, 8, axes])
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * axes)
            if len(header) < 4 + 4 * axes or header[:4] != magic:
                raise DataError(
                    f"an IDX header of magic number {magic.hex()}", got=f"{header[:4].hex()} in {path.name}"
                )
            shape = struct.unpack(f">{axes}I", header[4:])
            size = math.prod(shape)
            files.within(size, files.MAX_TOTAL_BYTES, "MAX_TOTAL_BYTES", path.name)
            content = bytearray(file.read(size + 1))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("an IDX file that is whole", got=f"{path.name}: {error}") from None
    if len(content) != size:
        came = "more" if len(content) > size else f"{len(content):,}"
        raise DataError(f"{size:,} bytes after the header", got=f"{came} in {path.name}", hint="fetch the file again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def npz(path: Path, split: str) -> Data:
    """The arrays {train,val,test}_{images,labels}, as MedMNIST has them (Yang et al. 2023), or those of an attack."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
            raise ValueError("compressed otherwise than numpy does")  # zipfile would inflate it in one go, of any size
        size, packed = (sum(getattr(info, s) for info in infos) for s in ("file_size", "compress_size"))
        with np.load(path, allow_pickle=False) as file:
            arrays_of = _arrays_of(file.files)
            have, images = [name for name in SPLITS if name in arrays_of], ""
            if not have and (alone := next((pair for pair in _ALONE if set(pair) <= set(file.files)), None)):
                have, split, arrays_of = ["all"], "all", {"all": alone}
            keys = [arrays_of[name][1] for name in have]
            if split in have:
                images = arrays_of[split][0]
                keys.append(images)
            fits = size <= files.MAX_TOTAL_BYTES and (size <= _SMALL or size <= files.MAX_RATIO * packed)
            arrays = {key: np.asarray(file[key]) for key in keys if fits}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, NotImplementedError) as error:
        raise DataError("an .npz file of plain arrays", got=f"{path.name}: {error}") from None
    files.within(size, files.MAX_TOTAL_BYTES, "MAX_TOTAL_BYTES", path.name)
    if size > _SMALL:
        files.within(size / max(packed, 1), files.MAX_RATIO, "MAX_RATIO", path.name, "times its compressed size")
    choose(split, have, f"{path.name}, as arrays SPLIT_images and SPLIT_labels or x_SPLIT and y_SPLIT,")
    labels, class_names = numbered({name: arrays[arrays_of[name][1]] for name in have}, split)
    as_taken = images == ADVERSARIAL
    pixels = _channels_first(arrays[images]) if as_taken else _pixel_array(arrays[images], images)
    return in_memory(split, pixels, labels, class_names)


def _arrays_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The arrays of images and labels of each split, as MedMNIST and as Keras call them."""
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        for pattern, twin in ((r"(.+)_images", r"\1_labels"), (r"x_(.+)", r"y_\1"), (r"X_(.+)", r"y_\1")):
            match = re.fullmatch(pattern, name)
            if match and (split := split_of(match[1])) and (labels := match.expand(twin)) in names:
                if split in found:
                    raise DataError(f"one pair of arrays for {split}", got=f"{found[split][0]} and {name}")
                found[split] = name, labels
    return found


def numbered(labels: Mapping[str, np.ndarray], split: str) -> tuple[Tensor, tuple[str, ...]]:
    """The labels of a split and the class names; the training labels, where there are any, define the classes.

    Whole numbers are the classes 0 to K - 1, words the names of classes in sorted order.
    """
    wanted = {name: _one_each(labels[name], f"{name} labels") for name in {split, "train"} & labels.keys()}
    if any(column.dtype.kind in "USO" for column in wanted.values()):
        words = {name: [str(label) for label in column.tolist()] for name, column in wanted.items()}
        numbers, class_names = read_labels([label for column in words.values() for label in column], "the labels")
        if not isinstance(class_names, Numbers):
            return torch.tensor([numbers[label] for label in words[split]]), class_names
        wanted = {name: np.array([numbers[label] for label in column]) for name, column in words.items()}
    numbers_of = {name: whole_numbers(column, f"{name} labels") for name, column in wanted.items()}
    num_classes = int(numbers_of.get("train", numbers_of[split]).max(initial=-1)) + 1
    highest = int(numbers_of[split].max(initial=-1))
    if not (2 if "train" in numbers_of else 1) <= num_classes <= MAX_CLASSES:
        raise DataError(f"labels of 2 to {MAX_CLASSES:,} classes, numbered from 0", got=f"{num_classes} classes")
    if highest >= num_classes:
        raise DataError(f"{split} labels in 0 to {num_classes - 1}, as in train", got=highest)
    return torch.from_numpy(numbers_of[split]), Numbers.of(num_classes)


def read_labels(labels: Sequence[str], where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """The number of each label, and the class names.

    Where all labels are whole numbers, however they are written (7, 07, 7.0), or true and false, they number the
    classes; otherwise they are the names of classes, in sorted order.

    Raises:
        DataError: If a label is missing, or a number that is not one of a class.
    """
    counts = Counter(labels)
    if counts and {label.casefold() for label in counts} <= {"true", "false"}:
        return {label: int(label.casefold() == "true") for label in counts}, Numbers.of(2)
    words = [label for label in counts if not is_number(label)]
    missing = [label for label in words if label.casefold() in (_MISSING if len(words) < len(counts) else _NAN)]
    if missing:
        came = f"{sum(counts[label] for label in missing):,} of {len(labels):,} without one ({missing[0]!r})"
        raise DataError(f"a label for every image in {where}", got=came, hint="leave these images out")
    if words:
        names = tuple(sorted({normal(label) for label in counts}))
        files.within(len(names), MAX_CLASSES, "MAX_CLASSES", where, "classes")
        return {label: names.index(normal(label)) for label in counts}, names
    values = {label: whole(label) for label in counts}
    odd = [label for label, value in values.items() if value is None or not 0 <= value < MAX_CLASSES]
    if odd:
        came = f"{sum(counts[label] for label in odd):,} others, such as {odd[0]}"
        expected = f"words, or whole numbers from 0 to {MAX_CLASSES - 1:,}, as labels in {where}"
        raise DataError(expected, got=came, hint="number the classes 0 to K - 1, or write their names")
    numbers = {label: value for label, value in values.items() if value is not None}
    return numbers, Numbers.of(max(numbers.values(), default=-1) + 1)


def _one_each(labels: np.ndarray, name: str) -> np.ndarray:
    """Labels of shape (n): columns of one are flattened, rows with a single 1 become its place."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.dtype.kind in "iufb" and len(labels):
        if not (((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()):
            came = f"shape {labels.shape}, not one-hot"
            raise DataError(f"{name} to be one number per image", got=came, hint="choose one class for each image")
        return labels.argmax(1)
    if labels.ndim != 1 or labels.dtype.kind not in "iufbUSO":
        raise DataError(f"{name} to be one number per image", got=f"shape {labels.shape}, dtype {labels.dtype}")
    return np.char.decode(labels, "utf-8", "replace") if labels.dtype.kind == "S" else labels


def whole_numbers(labels: np.ndarray, name: str, *, lowest: int = 0) -> np.ndarray:
    """Labels as int64, whatever numbers they are stored as."""
    if labels.dtype.kind == "b":
        labels = labels.astype(np.int64)
    odd = ~np.isfinite(labels) | (labels != np.floor(labels)) | (labels < lowest) | (labels > 2**31)
    if odd.any():
        came = f"{labels[odd][0]}" + (f" and {odd.sum() - 1:,} more" if odd.sum() > 1 else "")
        raise DataError(f"{name} to be whole numbers >= 0", got=came, hint="number the classes 0 to K - 1")
    return labels.astype(np.int64)


def _pixel_array(images: np.ndarray, name: str) -> Tensor:
    """Images or volumes channels first. A last axis of 1, 3 or 4 is the channels, of which the fourth is dropped."""
    channels_last = images.ndim > 3 and images.shape[-1] in (1, 3, 4)
    if images.ndim == 4 and (images.shape[-1] == 2 or (not channels_last and images.shape[1] in (1, 3))):
        raise DataError(f"{name} with channels last (1, 3 or 4), or volumes of more than 3 slices", got=images.shape)
    if images.ndim - channels_last not in (3, 4) or 0 in images.shape[1:]:
        raise DataError(f"{name} of shape N x H x W, or N x D x H x W, with channels last", got=images.shape)
    images = images[..., :3] if channels_last else images
    return _unit(np.moveaxis(images, -1, 1) if channels_last else images[:, None], name)


def _channels_first(images: np.ndarray) -> Tensor:
    """Images as a model took them."""
    if images.ndim < 2 or 0 in images.shape[1:]:
        raise DataError(f"{ADVERSARIAL} of shape N x C x H x W", got=images.shape)
    return _unit(images, ADVERSARIAL)


def _unit(images: np.ndarray, name: str) -> Tensor:
    """Pixels as uint8 or as float32 in [0, 1]."""
    if images.dtype.kind == "f":
        low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
        if not (low >= 0 and high <= 1):  # also true for NaN
            came = f"NaN in {name}" if math.isnan(low + high) else f"[{low:g}, {high:g}] in {name}"
            raise DataError("pixels in [0, 1]", got=came, hint="scale them, or store uint8")
        images = images.astype(np.float32)
    elif images.dtype.kind == "u" and images.dtype.itemsize == 2:
        images = images.astype(np.float32) / np.float32(65535)
    elif images.dtype != np.uint8:
        raise DataError(f"{name} as uint8, uint16 or float in [0, 1]", got=images.dtype)
    return torch.from_numpy(np.ascontiguousarray(images))
