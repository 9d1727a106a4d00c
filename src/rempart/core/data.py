"""How images come in: a spec opens one split as `Data`, which gives batches of pixels in [0, 1] keyed by sample."""

import gzip
import itertools
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from rempart.core import files
from rempart.core.errors import DataError
from rempart.core.model import Classifier
from rempart.core.registry import suggestion
from rempart.core.repro import digest_arrays
from rempart.core.types import Images, Labels

SPLITS = ("train", "val", "test")
FORMS = "digits, mnist:DIR, cifar10:PATH, a folder or .zip of class folders, a MedMNIST-style .npz file"

ADVERSARIAL, TRUE = "x_adv", "y"
"""Arrays of adversarial images and their true classes in a file of `rempart attack`."""

MAX_CLASSES = 100_000
"""Classes of a file that numbers them."""

_KINDS = ("digits", "mnist", "cifar10")
_MODIFIERS = ("grey", "rgb", "64", "64x48")
_SPEC = re.compile(
    r"(?P<place>.+?)(?P<modifiers>(@([1-9][0-9]{0,5}(x[1-9][0-9]{0,5})?|grey|rgb))*)"
    r"(:(?P<split>train|val|test))?(?P<part>\[[^\[\]]*\]?)?"
)
_PART = re.compile(r"\[(-?[0-9]{1,18})?:(-?[0-9]{1,18})?(?::(-?[0-9]{1,18})?)?\]")
_CHUNK = 256
_SMALL = 256 * 2**20  # bytes of arrays that may be compressed by any ratio: blank images are


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples of a split.

    Attributes:
        index: Sample numbers within the split, int64, shape (n): the key of every result.
        x: Pixels, float32 in [0, 1].
        y: True classes, int64.
    """

    index: Tensor
    x: Images
    y: Labels


@dataclass(frozen=True, eq=False)  # without slots, which leave no room for the cached digest
class Data:
    """One split of a data set, or a part of it; images are read when they are asked for.

    Attributes:
        source: The spec without directories, for example `brain-mri.zip@64:test[:500]`: what a report shows.
        split: train, val, test, or all for a folder without splits.
        index: Sample numbers within the split, int64, shape (n); numbers stay when a part is taken.
        labels: True classes, int64, shape (n).
        shape: Shape of one image: channels, then the spatial axes.
        class_names: One name per class.
        read: From sample numbers to pixels, float32 in [0, 1].
        stamps: From sample numbers to bytes that stand for the images in the digest; None: the pixels themselves.
        source_names: The class names in the order of the data set, where classes were numbered anew.
    """

    source: str
    split: str
    index: Tensor
    labels: Tensor
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    read: Callable[[Tensor], Images]
    stamps: Callable[[Tensor], Iterable[bytes]] | None = None
    source_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_classes(self) -> int:
        """Classes of the data set, also where a part holds fewer."""
        return len(self.class_names)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits over sample numbers, labels and images; equal for a folder, its zip and `load()`.

        Image files are represented by name, size and CRC-32, which `read` verifies in archives.
        """
        if self.stamps is None:
            images = (x.numpy() for batch in self.batches(_CHUNK) for x in batch.x)
        else:
            images = (np.frombuffer(stamp, dtype=np.uint8) for stamp in self.stamps(self.index))
        labels = self.named(self.source_names or self.class_names).labels.numpy()
        return digest_arrays([self.index.numpy(), labels, np.array(self.shape), *images])

    def batch(self, positions: Tensor) -> Batch:
        """The samples at these positions, counted in `index`."""
        index = self.index[positions]
        return Batch(index, self.read(index), self.labels[positions])

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time; the last batch may be smaller."""
        if size < 1:
            raise DataError("a batch size >= 1", got=size)
        return map(self.batch, torch.arange(len(self)).split(size))

    def take(self, positions: Tensor) -> "Data":
        """The part at these positions, in their order."""
        return replace(self, index=self.index[positions], labels=self.labels[positions])

    def head(self, limit: int | None) -> "Data":
        """The first `limit` samples, or all of them."""
        if limit is not None and limit < 1:
            raise DataError("a limit >= 1", got=limit)
        return self if limit is None or limit >= len(self) else self.take(torch.arange(limit))

    def scaled(self, low: float, high: float) -> "Data":
        """The same images in the box [low, high] of a model, instead of [0, 1]."""
        if (low, high) == (0, 1):
            return self
        read, stamp = self.read, f"{self.digest} in [{low}, {high}]".encode()
        return replace(self, read=lambda numbers: read(numbers) * (high - low) + low, stamps=lambda _: [stamp])

    def named(self, class_names: tuple[str, ...]) -> "Data":
        """The same images with classes numbered as in `class_names`, where those are their names in another order.

        The digest stays the same.
        """
        if class_names == self.class_names or sorted(class_names) != sorted(self.class_names):
            return self
        numbers = torch.tensor([class_names.index(name) for name in self.class_names])
        source_names = self.source_names or self.class_names
        return replace(self, labels=numbers[self.labels], class_names=class_names, source_names=source_names)

    def seen_by(self, model: Classifier) -> "Data":
        """The same images in the box of a model, their classes numbered as its outputs where the names are the same."""
        return self.named(model.class_names).scaled(model.low, model.high)

    def load(self) -> "Data":
        """The same data decoded into memory, as bytes where that loses nothing: for training."""
        if isinstance(self.read, _Memory):
            return self
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        for number, batch in enumerate(self.batches(_CHUNK)):
            coarse = (batch.x * 255).round().to(torch.uint8)
            if images.dtype == torch.uint8 and not torch.equal(files.unit(coarse), batch.x):
                images = files.unit(images)
            images[number * _CHUNK :][: len(coarse)] = coarse if images.dtype == torch.uint8 else batch.x
        rows = torch.zeros(int(self.index.max()) + 1, dtype=torch.int64)
        rows[self.index] = torch.arange(len(self))
        return replace(self, read=_Memory(images, rows))


def open_data(spec: str, *, split: str = "test") -> Data:
    """Open the images that a spec names.

    Specs: `digits` (embedded); `mnist:DIR` (IDX files); the path of a folder or zip of class folders
    (`train/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` for one split that answers to every name), `cifar10:PATH` being the
    same; the path of a MedMNIST-style `.npz`, or of one that `rempart attack` wrote, whose adversarial images with
    their true classes are one split that answers to every name. A folder or zip takes `@64` or `@64x48` (width x
    height; resizes, antialiased) and `@grey` or `@rgb` (default: as the first image of the data set). Then optionally
    `:train`, `:val` or `:test`, and a Python slice: `brain-mri.zip@64@grey:test[:500]`.

    Folders and zips are ordered by the SHA-1 of CLASS/NAME, so that the first N images are a fixed mix of classes;
    their classes are numbered in sorted order. Arrays keep the order of their file. 8-bit values are divided by 255,
    16-bit values by 65,535; transparency is dropped.

    Args:
        spec: What to open.
        split: The split where the spec names none.

    Raises:
        DataError: If there is no such data, or they cannot be used. Image files are decoded when they are read, so a
            corrupt one is found then.

    Example:
        >>> len(open_data("digits:train[:100]"))
        100
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None or split not in SPLITS:
        raise DataError(f"data out of {FORMS}, and a split out of {', '.join(SPLITS)}", got=f"{spec!r}, {split!r}")
    place, modifiers, part = match["place"], match["modifiers"], match["part"] or ""
    wanted = match["split"] or split
    kind, colon, rest = place.partition(":")
    alias = colon and kind in ("mnist", "cifar10")
    path = Path(os.path.expanduser(rest if alias else place))
    if place != "digits" and not os.path.exists(path):
        raise _unknown(str(path))
    if modifiers and (place == "digits" or (alias and kind == "mnist") or path.suffix == ".npz"):
        raise DataError("@ modifiers on folders and zips of images only", got=spec)
    if place == "digits":
        data = _digits(wanted)
    elif alias and kind == "mnist":
        data = _idx(path, wanted)
    elif path.suffix == ".npz":
        data = _npz(path, wanted)
    elif path.is_dir() or path.suffix == ".zip":
        data = _class_folders(path, wanted, modifiers)
    else:
        raise DataError(f"data out of {FORMS}", got=repr(place))
    name = kind if alias else Path(os.path.abspath(path)).name
    label = f":{data.split}" if data.split in SPLITS else "" if path.suffix == ".npz" else " (no split folders)"
    positions = range(len(data))[_slice(part or "[:]")]
    if not positions:
        raise DataError("at least one sample", got=f"{part or 'none'} of {len(data)} in {name}{label}")
    return replace(data.take(torch.tensor(list(positions))), source=f"{name}{modifiers}{label}{part}")


def one_image(path: str, *, shape: tuple[int, ...], label: int, class_names: tuple[str, ...]) -> Data:
    """A data set of one image file, which a model of images of this shape takes.

    Raises:
        DataError: If the file cannot be read, or is of another size.
    """
    images = files.read_image(Path(path), shape)
    one = _in_memory("all", images, torch.tensor([label]), class_names)
    return replace(one, source=Path(path).name)


def _unknown(place: str) -> DataError:
    """Say what is wrong with a place that does not exist; what follows a known one is a misspelt ending."""
    for mark, known, what in ((":", SPLITS, "a split"), ("@", _MODIFIERS, "a modifier")):
        before, found, tail = place.rpartition(mark)
        if found and (before in _KINDS or os.path.exists(before)):
            forms = ", ".join(mark + k for k in known)
            return DataError(f"{what} such as {forms}", got=found + tail, hint=suggestion(tail, known).strip(" ()"))
    if place in _KINDS:
        return DataError(f"{place} with its place, {place}:PATH", got=repr(place))
    if "/" in place or "." in place:
        return DataError("a path that exists", got=repr(place), hint=f"data are {FORMS}")
    return DataError(f"data out of {FORMS}", got=repr(place), hint=suggestion(place, _KINDS).strip(" ()"))


def _slice(text: str) -> slice:
    match = _PART.fullmatch(text)
    bounds = [int(group) if group else None for group in match.groups()] if match else []
    if match is None or bounds[2] == 0:
        raise DataError("a slice such as [:1000], [100:200] or [::10]", got=text)
    return slice(*bounds)


def _choose(split: str, have: Sequence[str], where: str) -> None:
    if split not in have:
        raise DataError(f"a split that {where} has", got=split, hint=f"it has {', '.join(have) or 'none'}")


# ---- arrays: digits, IDX, npz


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """Reads from one tensor, uint8 or float32 in [0, 1], shape (n, c, *s); `rows` gives the row of a sample number."""

    images: Tensor
    rows: Tensor

    def __call__(self, numbers: Tensor) -> Images:
        return files.unit(self.images[self.rows[numbers]])


def _in_memory(split: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Data:
    if len(images) != len(labels):
        raise DataError("as many labels as images", got=f"{len(labels)} labels for {len(images)} images in {split}")
    index = torch.arange(len(images))
    return Data("", split, index, labels, tuple(images.shape[1:]), class_names, _Memory(images, index))


def _digits(split: str) -> Data:
    """The 8x8 digits of scikit-learn; every fourth sample of each class is for the test."""
    from sklearn.datasets import load_digits

    _choose(split, ("train", "test"), "digits")
    images, labels = load_digits(return_X_y=True)
    rank = np.zeros(len(labels), dtype=int)
    for k in range(10):
        rank[labels == k] = np.arange((labels == k).sum())
    chosen = (rank % 4 == 0) == (split == "test")
    pixels = torch.from_numpy(images[chosen].astype(np.float32) / 16).view(-1, 1, 8, 8)
    return _in_memory(split, pixels, torch.from_numpy(labels[chosen]).long(), tuple(map(str, range(10))))


def _idx(folder: Path, split: str) -> Data:
    found = {
        (name, kind): path
        for name, prefix in (("train", "train"), ("test", "t10k"))
        for kind, axes in (("images", 3), ("labels", 1))
        for ending in ("-ubyte.gz", "-ubyte")
        for dot in ("-", ".")
        if (path := folder / f"{prefix}-{kind}{dot}idx{axes}{ending}").is_file()
    }
    have = [name for name in SPLITS if {(name, "images"), (name, "labels")} <= found.keys()]
    _choose(split, have, f"{folder.name}, as IDX files of images and labels,")
    labels, class_names = _numbered({name: _read_idx(found[name, "labels"], 1) for name in have}, split)
    images = torch.from_numpy(_read_idx(found[split, "images"], 3))
    return _in_memory(split, images.unsqueeze(1), labels, class_names)


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


def _npz(path: Path, split: str) -> Data:
    """The arrays {train,val,test}_{images,labels}, as MedMNIST has them (Yang et al. 2023), or those of an attack."""
    try:
        with zipfile.ZipFile(path) as archive:
            size, packed = (sum(getattr(i, s) for i in archive.infolist()) for s in ("file_size", "compress_size"))
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
    _choose(split, have, f"{path.name}, as arrays SPLIT_images and SPLIT_labels,")
    if split == "all":
        labels, class_names = _numbered({split: arrays[TRUE]}, split)
        return _in_memory(split, _channels_first(arrays[ADVERSARIAL]), labels, class_names)
    labels, class_names = _numbered({name: arrays[f"{name}_labels"] for name in have}, split)
    return _in_memory(split, _pixel_array(arrays[f"{split}_images"], f"{split}_images"), labels, class_names)


def _numbered(labels: Mapping[str, np.ndarray], split: str) -> tuple[Tensor, tuple[str, ...]]:
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


# ---- class folders of image files


def _class_folders(path: Path, split: str, modifiers: str) -> Data:
    store = files.Folder(path) if path.is_dir() else files.open_zip(path)
    tree = _tree(store.names())
    split = "all" if "all" in tree else split
    if not tree:
        raise DataError(
            "class folders of images", got=f"none in {path.name}", hint=f"images are {' '.join(files.SUFFIXES)}"
        )
    _choose(split, [name for name in (*SPLITS, "all") if name in tree], f"{path.name}, as folders,")
    class_names = tuple(sorted(tree[split]))
    for name, classes in tree.items():
        if odd := sorted(classes.keys() ^ set(class_names)):
            came = "; ".join(f"{c} only in {name if c in classes else split}" for c in odd)
            raise DataError(f"the same classes in {name} and {split}", got=came)
    if empty := [name for name in class_names if not tree[split][name]]:
        raise DataError("images in every class folder", got=f"none in {', '.join(empty)} of {split} in {path.name}")
    if len(class_names) < 2:
        raise DataError("two or more class folders", got=f"{', '.join(class_names)} in {path.name}")

    labels = {name: k for k, class_name in enumerate(class_names) for name in tree[split][class_name]}
    names = tuple(sorted(labels, key=files.order))
    reference = next(tree[name] for name in (*SPLITS, "all") if any(tree.get(name, {}).values()))
    first = min(itertools.chain(*reference.values()), key=files.order)  # the same one for every split
    shape = files.image_shape(store, names[0], first, modifiers)
    read = files.Files(store, names, shape, resize=any(m[:1].isdigit() for m in modifiers.split("@")))
    return Data(
        source="",
        split=split,
        index=torch.arange(len(names)),
        labels=torch.tensor([labels[name] for name in names]),
        shape=shape,
        class_names=class_names,
        read=read,
        stamps=read.stamps,
    )


def _tree(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """The image names by split and class; one split `all` where no folder is named like a split."""
    paths = [(name, PurePosixPath(name).parts) for name in names]
    paths = [(n, p) for n, p in paths if p and not any(q.startswith(".") or q == "__MACOSX" for q in p)]
    split_folders = any(parts[0] in SPLITS and (len(parts) > 1 or name.endswith("/")) for name, parts in paths)
    tree: dict[str, dict[str, list[str]]] = {}
    for name, parts in paths:
        split, inner = (parts[0], parts[1:]) if split_folders else ("all", parts)
        if split_folders and split not in SPLITS:
            continue
        if name.endswith("/"):
            if len(inner) == 1:
                tree.setdefault(split, {}).setdefault(inner[0], [])
        elif files.is_image(name):
            if len(inner) != 2:
                raise DataError(
                    "images as train/CLASS/NAME or CLASS/NAME", got=name, hint=f"splits are {', '.join(SPLITS)}"
                )
            tree.setdefault(split, {}).setdefault(inner[0], []).append(name)
    return tree
