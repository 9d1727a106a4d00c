"""From the names of files to `Data`: what kind they are, what their pixels mean, and which samples they hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rempart.core.errors import DataError
from rempart.data import dicom, files, nifti
from rempart.data.modifiers import PLANES, Modifiers
from rempart.data.samples import PLAIN, Data

_SIZES = 2**16  # bytes of a file in which the size of a volume is found
People = Callable[[files.Store, Sequence[str]], tuple[tuple[str, ...] | None, tuple[str, ...] | None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """What to know of a kind of file beside pictures.

    Attributes:
        decoder: From the first file of the data set and the modifiers to what decodes them all.
        depths: From the first bytes of a file to the axes (depth, height, width) of its volume.
        people: From files to the patient and the volume of each, where they say so.
    """

    decoder: Callable[[str, bytes, Modifiers], "dicom.Dicom | nifti.Nifti"]
    depths: Callable[[str, bytes], tuple[int, int, int]]
    people: People


_KINDS = {
    files.DICOM: Kind(dicom.decoder, dicom.depths, dicom.people),
    files.NIFTI: Kind(nifti.decoder, nifti.depths, lambda _, names: (None, tuple(names))),
}


def of_files(
    store: files.Store,
    names: Sequence[str],
    labels: Tensor,
    split: str,
    class_names: tuple[str, ...],
    modifiers: Modifiers,
    *,
    first: str,
    patients: Sequence[str] | None = None,
    masks: tuple[files.Store, Sequence[str]] | None = None,
) -> Data:
    """The samples of these files.

    Args:
        store: Where they lie.
        names: The files of this split, in order.
        labels: Their classes.
        split: The split.
        class_names: Of the data set.
        modifiers: How they become images.
        first: A file of the data set, the same one for each split: it says what the files do not agree on.
        patients: The patient of each file, where known.
        masks: Where the masks lie, and the mask of each file.

    Raises:
        DataError: If they are of several kinds, or of one that cannot be read so.
    """
    kinds = {files.kind(store, name): name for name in (first, *names)}
    if len(kinds) > 1:
        raise DataError("files of one kind", got=", ".join(f"{name} ({kind})" for kind, name in kinds.items()))
    (kind,) = kinds
    if kind == files.PICTURE:
        modifiers.only("@64", "@grey or @rgb", "@mask", what="pictures")
        data = pictures(store, names, labels, split, class_names, modifiers, first=first, patients=patients)
        return data if masks is None else _masked(data, names, masks)
    if kind is None:
        raise DataError("files of a kind that is known", got=names[0], hint=f"pictures are {' '.join(files.SUFFIXES)}")
    modifiers.only("@64", "@grey or @rgb", "@window", "@slice", "@mask", what=f"{kind} files")
    data = _volumes(_KINDS[kind], store, names, labels, split, class_names, modifiers, first, patients)
    return data if masks is None else _masked(data, names, masks)


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Where images may change, read from files of the same size: what is not 0 counts as inside."""

    read: files.Files

    def __call__(self, numbers: Tensor) -> Tensor:
        """Booleans of shape (n, 1, *s)."""
        return self.read(numbers) > 0.5


def _masked(data: Data, names: Sequence[str], masks: tuple[files.Store, Sequence[str]]) -> Data:
    """The same data with a mask for each image, sliced and resized like it."""
    store, own = masks
    if odd := [name for name in own if files.kind(store, name) not in (files.PICTURE, files.NIFTI)]:
        raise DataError("masks that are pictures or NIfTI files", got=odd[0])
    assert isinstance(data.read, files.Files)
    mask_of = dict(zip(names, own, strict=True))
    read = replace(
        data.read,
        store=store,
        names=tuple(mask_of[name] for name in data.read.names),
        shape=(1, *data.shape[1:]),
        decode=_mask,
        note="",
    )
    return replace(data, mask=Masks(read))


def _mask(name: str, content: bytes) -> np.ndarray:
    """1 where a mask is not 0, else 0: float32, shape (1, *s)."""
    if name.lower().endswith(files.SUFFIXES):
        return files.nonzero(name, content)
    return (nifti.Nifti(PLAIN, (0.0, 1.0), own=False)(name, content) > 0).astype(np.float32)


def pictures(
    store: files.Store,
    names: Sequence[str],
    labels: Tensor,
    split: str,
    class_names: tuple[str, ...],
    modifiers: Modifiers,
    *,
    first: str,
    patients: Sequence[str] | None = None,
) -> Data:
    """The same of files that are known to be pictures."""
    resize = modifiers.size is not None
    shape = files.image_shape(store, names[0], first, modifiers.size, modifiers.channels)
    read = files.Files(store, tuple(names), shape, files.Pictures(shape, resize, names[0]), resize=resize)
    return _data(read, labels, split, class_names, patients, None, PLAIN, (0.0, 1.0))


def _volumes(
    kind: Kind,
    store: files.Store,
    names: Sequence[str],
    labels: Tensor,
    split: str,
    class_names: tuple[str, ...],
    modifiers: Modifiers,
    first: str,
    patients: Sequence[str] | None,
) -> Data:
    (content,) = store.contents([first])
    decode = kind.decoder(first, content, modifiers)
    own, volumes = kind.people(store, names)
    patients = own if patients is None else patients
    axis = None if modifiers.plane is None else PLANES[modifiers.plane]
    picked: list[tuple[int, int]] = []
    if axis is not None:
        picked = [
            (row, plane)
            for row, (name, start) in enumerate(zip(names, store.starts(names, _SIZES), strict=True))
            for plane in _planes(kind.depths(name, start)[axis - 1], modifiers.part, name)
        ]
        if not picked:
            raise DataError("slices that are there", got="none", hint="look at the number of slices")
        names, labels = [names[row] for row, _ in picked], labels[torch.tensor([row for row, _ in picked])]
        patients = None if patients is None else [patients[row] for row, _ in picked]
        volumes = None if volumes is None else tuple(volumes[row] for row, _ in picked)
    (content,) = store.contents(names[:1])
    image = decode(names[0], content)
    image = image if axis is None else files.plane(image, axis, picked[0][1], names[0])
    if image.ndim != 3 and modifiers.size is not None:
        raise DataError("images that are flat, to resize them", got=names[0], hint="take slices: @slice=axial")
    size = image.shape[1:] if modifiers.size is None else modifiers.size[::-1]
    read = files.Files(
        store,
        tuple(names),
        (modifiers.channels or len(image), *size),
        decode,
        resize=modifiers.size is not None,
        axis=axis,
        planes=tuple(plane for _, plane in picked),
        note=str(decode),
    )
    return _data(read, labels, split, class_names, patients, volumes, decode.unit, decode.span)


def _planes(depth: int, part: int | slice | None, name: str) -> Sequence[int]:
    """The numbers of the slices asked for, of so many."""
    if part is None or isinstance(part, slice):
        return range(depth)[part or slice(None)]
    if not -depth <= part < depth:
        raise DataError(f"a slice out of {depth}, counted from 0", got=f"{part} of {name}")
    return [part % depth]


def _data(
    read: files.Files,
    labels: Tensor,
    split: str,
    class_names: tuple[str, ...],
    patients: Sequence[str] | None,
    volumes: Sequence[str] | None,
    unit: str,
    span: tuple[float, float],
) -> Data:
    several = volumes is not None and len(set(volumes)) < len(volumes)
    return Data(
        source="",
        split=split,
        index=torch.arange(len(labels)),
        labels=labels,
        shape=read.shape,
        class_names=class_names,
        read=read,
        stamps=read.stamps,
        unit=unit,
        span=span,
        patients=None if patients is None else tuple(patients),
        volumes=tuple(volumes) if volumes is not None and several else None,
    )
