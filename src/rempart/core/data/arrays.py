"""Data that lie in arrays: the embedded digits, IDX files and .npz files."""

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rempart.core import files
from rempart.core.data.samples import SPLITS, Data, choose, in_memory
from rempart.core.errors import DataError

ADVERSARIAL, TRUE = "x_adv", "y"
"""Arrays of adversarial images and their true classes in a file of `rempart attack`."""

MAX_CLASSES = 100_000
"""Classes of a file that numbers them."""

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
    return in_memory(split, pixels, torch.from_numpy(labels[chosen]).long(), tuple(map(str, range(10))))


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
            have = [name for name in SPLITS if f"{name}_images" in file and f"{name}_labels" in file]
            keys = [f"{name}_labels" for name in have] + [f"{split}_images"] * (split in have)
            if not have and ADVERSARIAL in file and TRUE in file:
                have, split, keys = ["all"], "all", [ADVERSARIAL, TRUE]
            fits = size <= files.MAX_TOTAL_BYTES and (size <= _SMALL or size <= files.MAX_RATIO * packed)
            arrays = {key: np.asarray(file[key]) for key in keys if fits}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, NotImplementedError) as error:
        raise DataError("an .npz file of plain arrays", got=f"{path.name}: {error}") from None
    files.within(size, files.MAX_TOTAL_BYTES, "MAX_TOTAL_BYTES", path.name)
    if size > _SMALL:
        files.within(size / max(packed, 1), files.MAX_RATIO, "MAX_RATIO", path.name, "times its compressed size")
    choose(split, have, f"{path.name}, as arrays SPLIT_images and SPLIT_labels,")
    if split == "all":
        labels, class_names = numbered({split: arrays[TRUE]}, split)
        return in_memory(split, _channels_first(arrays[ADVERSARIAL]), labels, class_names)
    labels, class_names = numbered({name: arrays[f"{name}_labels"] for name in have}, split)
    return in_memory(split, _pixel_array(arrays[f"{split}_images"], f"{split}_images"), labels, class_names)


def numbered(labels: Mapping[str, np.ndarray], split: str) -> tuple[Tensor, tuple[str, ...]]:
    """The labels of a split and the class names 0 to K - 1; the training labels, where there are any, define K."""
    whole = {name: _whole(labels[name], f"{name} labels") for name in {split, "train"} & labels.keys()}
    num_classes = int(whole.get("train", whole[split]).max(initial=-1)) + 1
    highest = int(whole[split].max(initial=-1))
    if not 2 <= num_classes <= MAX_CLASSES:
        raise DataError(f"labels of 2 to {MAX_CLASSES:,} classes, numbered from 0", got=f"{num_classes} classes")
    if highest >= num_classes:
        raise DataError(f"{split} labels in 0 to {num_classes - 1}, as in train", got=highest)
    return torch.from_numpy(whole[split]), tuple(map(str, range(num_classes)))


def _whole(labels: np.ndarray, name: str) -> np.ndarray:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        raise DataError(f"{name} to be one number per image", got=f"shape {labels.shape}, dtype {labels.dtype}")
    odd = ~np.isfinite(labels) | (labels != np.floor(labels)) | (labels < 0) | (labels > 2**31)
    if odd.any():
        raise DataError(f"{name} to be whole numbers >= 0", got=labels[odd][0], hint="number the classes 0 to K - 1")
    return labels.astype(np.int64)


def _pixel_array(images: np.ndarray, name: str) -> Tensor:
    """Images or volumes channels first. A last axis of 1 or 3 is the channels."""
    channels_last = images.ndim > 3 and images.shape[-1] in (1, 3)
    if images.ndim == 4 and not channels_last and images.shape[1] in (1, 3):
        raise DataError(f"{name} with channels last, or volumes of more than 3 slices", got=images.shape)
    if images.ndim - channels_last not in (3, 4) or 0 in images.shape[1:]:
        raise DataError(f"{name} of shape N x H x W, or N x D x H x W, with channels last", got=images.shape)
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
