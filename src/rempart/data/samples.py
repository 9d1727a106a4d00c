"""One split of a data set as `Data`, which gives batches of pixels in [0, 1] keyed by sample."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rempart.core import given
from rempart.core.errors import DataError, ThreatError
from rempart.core.model import Classifier
from rempart.core.names import Match, match
from rempart.core.repro import digest_arrays
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels
from rempart.data import files

SPLITS = ("train", "val", "test")
_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
PLAIN, RAW = "1", "raw"
"""Units of pixels in [0, 1] that stand for nothing else, and of intensities without a name."""
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples of a split.

    Attributes:
        index: Sample numbers within the split, int64, shape (n): the key of every result.
        x: Pixels, float32 in [0, 1].
        y: True classes, int64.
        mask: Where an adversary may change them, shaped to be broadcast over channels; None: everywhere.
    """

    index: Tensor
    x: Images
    y: Labels
    mask: Tensor | None = None


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
        unit: Of the intensities that pixels stand for: `HU`, `raw` where they have no name, 1 where they are pixels.
        span: The intensities that the ends of the box stand for.
        patients: Who each sample is of, where that is known.
        volumes: Which volume each sample is a slice of, where several are.
        mask: From sample numbers to where an adversary may change the images; None: everywhere.
        source_names: The class names in the order of the data set, where classes were numbered anew.
        source_labels: The labels by that order.
        notes: What to know of the files, in sentences for reports: those that were left out.
    """

    source: str
    split: str
    index: Tensor
    labels: Tensor
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    read: Callable[[Tensor], Images]
    stamps: Callable[[Tensor], Iterable[bytes]] | None = None
    unit: str = PLAIN
    span: tuple[float, float] = (0.0, 1.0)
    patients: tuple[str, ...] | None = None
    volumes: tuple[str, ...] | None = None
    mask: Callable[[Tensor], Tensor] | None = None
    source_names: tuple[str, ...] | None = None
    source_labels: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", given.numbers(self.index, len(self.index)))
        labels = given.labels(self.labels, len(self.index), self.num_classes)
        object.__setattr__(self, "labels", labels.cpu())

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
        parts = [] if self.mask is None else [self.mask(part).numpy() for part in self.index.split(_CHUNK)]
        labels = self.labels if self.source_labels is None else self.source_labels
        return digest_arrays([self.index.numpy(), labels.numpy(), np.array(self.shape), *images, *parts])

    def batch(self, positions: Tensor) -> Batch:
        """The samples at these positions, counted in `index`."""
        index = self.index[positions]
        mask = None if self.mask is None else self.mask(index)
        return Batch(index, given.pixels(self.read(index)), self.labels[positions], mask)

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time; the last batch may be smaller."""
        if size < 1:
            raise DataError("a batch size >= 1", got=size)
        return map(self.batch, torch.arange(len(self)).split(size))

    def take(self, positions: Tensor) -> "Data":
        """The part at these positions, in their order."""
        chosen = positions.tolist()
        patients, volumes = (None if g is None else tuple(g[k] for k in chosen) for g in (self.patients, self.volumes))
        index, labels = self.index[positions], self.labels[positions]
        source_labels = None if self.source_labels is None else self.source_labels[positions]
        return replace(
            self, index=index, labels=labels, source_labels=source_labels, patients=patients, volumes=volumes
        )

    def head(self, limit: int | None) -> "Data":
        """The first `limit` samples, or all of them."""
        if limit is not None and limit < 1:
            raise DataError("a limit >= 1", got=limit)
        return self if limit is None or limit >= len(self) else self.take(torch.arange(limit))

    def spread(self, limit: int) -> "Data":
        """Up to `limit` samples that lie evenly over all of them, in order."""
        return self if limit >= len(self) else self.take(spread(len(self))[:limit].sort().values)

    def scaled(self, low: float, high: float) -> "Data":
        """The same images in the box [low, high] of a model, instead of [0, 1]."""
        if (low, high) == (0, 1):
            return self
        read, stamp = self.read, f"{self.digest} in [{low}, {high}]".encode()
        return replace(self, read=lambda numbers: read(numbers) * (high - low) + low, stamps=lambda _: [stamp])

    def matched(self, class_names: tuple[str, ...]) -> Match:
        """Which of these classes each class of the data set is, and how that is known.

        Raises:
            DataError: If it cannot be known.
        """
        labels = self.labels if self.source_labels is None else self.source_labels
        return match(self.source_names or self.class_names, class_names, labels.unique().tolist())

    def named(self, class_names: tuple[str, ...]) -> "Data":
        """The same images with classes numbered as in `class_names`, of which the data may hold some only.

        Classes are matched by name: in any order, Unicode form, case, with spaces, hyphens or underscores. Where one
        side has numbers instead of names, they are matched by number. The digest stays the same.

        Raises:
            DataError: If it cannot be known which class is which.
        """
        found = self.matched(class_names)
        if self.source_names is None and found.numbers == tuple(range(len(class_names))) and found.how != "encoding":
            return self  # also where only the spelling differs: a report shows the names of the data
        own = self.labels if self.source_labels is None else self.source_labels
        return replace(
            self,
            labels=torch.tensor(found.numbers)[own],
            class_names=class_names,
            source_names=self.source_names or self.class_names,
            source_labels=own,
        )

    def seen_by(self, model: Classifier) -> "Data":
        """The same images in the box of a model, their classes numbered as its outputs.

        Raises:
            DataError: If it cannot be known which class is which.
        """
        return self.named(model.class_names).scaled(model.low, model.high)

    def threat(self, text: str, low: float, high: float) -> Threat:
        """A threat in the box [low, high] of a model, whose budget may be in the unit of these data: `linf:10HU`.

        Raises:
            ThreatError: If it is none, or its budget is 0, which leaves nothing to attack.
        """
        threat = Threat.parse(text, low=low, high=high, unit=self.unit, span=self.span)
        if threat.eps == 0:
            hint = f"write {threat.norm}:8/255, or {threat.norm} alone for the smallest perturbations"
            raise ThreatError("a budget above 0", got=repr(text), hint=hint)
        return threat

    def load(self) -> "Data":
        """The same data decoded into memory, as bytes where that loses nothing: for training."""
        if isinstance(self.read, Memory):
            return self
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        for number, batch in enumerate(self.batches(_CHUNK)):
            coarse = (batch.x * 255).round().to(torch.uint8)
            if images.dtype == torch.uint8 and not torch.equal(files.unit(coarse), batch.x):
                images = files.unit(images)
            images[number * _CHUNK :][: len(coarse)] = coarse if images.dtype == torch.uint8 else batch.x
        rows = torch.zeros(int(self.index.max()) + 1, dtype=torch.int64)
        rows[self.index] = torch.arange(len(self))
        return replace(self, read=Memory(images, rows))


def spread(count: int) -> Tensor:
    """All positions of `count` samples in an order of which every beginning lies evenly over them.

    They follow multiples of the golden ratio, so that neither sorted nor periodic data hide a class from the first few.
    """
    turn = (torch.arange(count, dtype=torch.float64) * 0.6180339887498949) % 1
    return turn.argsort().argsort()


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Reads from one tensor, uint8 or float32 in [0, 1], shape (n, c, *s); `rows` gives the row of a sample number."""

    images: Tensor
    rows: Tensor

    def __call__(self, numbers: Tensor) -> Images:
        """The images of these sample numbers, float32 in [0, 1]."""
        return files.unit(self.images[self.rows[numbers]])


def in_memory(split: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> Data:
    """A split that lies in one tensor: bytes, or floating-point pixels in [0, 1]."""
    images = given.pixels(images)
    if len(images) != len(labels):
        raise DataError("as many labels as images", got=f"{len(labels)} labels for {len(images)} images in {split}")
    index = torch.arange(len(images))
    return Data("", split, index, labels, tuple(images.shape[1:]), class_names, Memory(images, index))


def split_of(word: str) -> str | None:
    """The split that a folder, a file or a table calls so: `Training`, `valid`, `dev`; None where it is none."""
    return _SPLIT_OF.get(word.strip().casefold())


def choose(split: str, have: Sequence[str], where: str) -> None:
    """Refuse a split that is not there."""
    if split not in have:
        raise DataError(f"a split that {where} has", got=split, hint=f"it has {', '.join(have) or 'none'}")


def refuse_shared_patients(train: Data, test: Data) -> None:
    """Refuse a patient in both: what is judged on images of patients it learnt from looks better than it is.

    Raises:
        DataError: If there is one.
    """
    if both := set(train.patients or ()) & set(test.patients or ()):
        raise DataError("each patient in one split", got=f"{len(both)} in train and test", hint="split by patient")
