"""How images come in: a spec opens one split as `Data`, which gives batches of pixels in [0, 1] keyed by sample."""

import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from rempart.core.errors import DataError
from rempart.core.registry import suggestion
from rempart.data import files
from rempart.data.arrays import ADVERSARIAL, MAX_CLASSES, TRUE, digits, idx, npz
from rempart.data.folders import class_folders
from rempart.data.modifiers import EXAMPLES, PATTERN, read_modifiers
from rempart.data.parquet import image_table, is_table
from rempart.data.samples import PLAIN, SPLITS, Batch, Data, in_memory, refuse_shared_patients
from rempart.data.tables import table, with_patients

__all__ = [
    "ADVERSARIAL",
    "FORMS",
    "MAX_CLASSES",
    "PLAIN",
    "SPLITS",
    "TRUE",
    "Batch",
    "Data",
    "one_image",
    "open_data",
    "refuse_shared_patients",
    "with_patients",
]

FORMS = (
    "digits, mnist:DIR, cifar10:PATH, a folder or .zip of class folders, a MedMNIST-style .npz file, a .csv of paths "
    "and labels, a .parquet file or a folder of such"
)

_KINDS = ("digits", "mnist", "cifar10")
_SPEC = re.compile(
    rf"(?P<place>.+?)(?P<modifiers>(@({PATTERN}))*)(:(?P<split>train|val|test))?(?P<part>\[[^\[\]]*\]?)?"
)
_PART = re.compile(r"\[(-?[0-9]{1,18})?:(-?[0-9]{1,18})?(?::(-?[0-9]{1,18})?)?\]")


def open_data(spec: str, *, split: str = "test") -> Data:
    """Open the images that a spec names.

    Specs: `digits` (embedded); `mnist:DIR` (IDX files); the path of a folder or zip of class folders
    (`train/CLASS/NAME.jpg`, or `CLASS/NAME.jpg` for one split that answers to every name), `cifar10:PATH` being the
    same; the path of a `.csv` with the columns `path` and `label`, optionally `split`, `patient` and `mask`; the path
    of a `.parquet` file with image bytes, of a folder of such, or of one that `datasets` saved; the path of a
    MedMNIST-style `.npz`, or of one that `rempart attack` wrote, whose adversarial images with their true classes are
    one split that answers to every name. Then optionally modifiers, `:train`, `:val` or `:test`, and a Python slice:
    `brain-mri.zip@64@grey:test[:500]`.

    Modifiers of files: `@64` or `@64x48` (width x height; resizes, antialiased), `@grey` or `@rgb` (default: as the
    first image of the data set). Of DICOM and NIfTI files: `@window=CENTRE:WIDTH`, `@window=own` or `@window=full`
    (default: as the first file says), `@slice=axial`, `@slice=coronal:40`, `@slice=sagittal:10:60:5`, `@slice=frame`.
    Of folders: `@mask=FOLDER`. Of tables of images: `@image=COLUMN`, `@label=COLUMN`.

    Folders and zips are ordered by the SHA-1 of CLASS/NAME, so that the first N images are a fixed mix of classes;
    their classes are numbered in sorted order. Arrays and tables keep the order of their file. 8-bit values are divided
    by 255, 16-bit values by 65,535; transparency is dropped, and EXIF orientation is followed. Intensities of DICOM and
    NIfTI files go through the window as floating-point numbers; `unit` and `span` of the data say what a pixel means.

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
    suffix = path.suffix.lower()
    if modifiers and (place == "digits" or (alias and kind == "mnist") or suffix == ".npz"):
        raise DataError("@ modifiers on folders and zips of images only", got=spec)
    if place == "digits":
        data = digits(wanted)
    elif alias and kind == "mnist":
        data = idx(path, wanted)
    elif suffix == ".npz":
        data = npz(path, wanted)
    elif suffix == ".csv" and path.is_file():
        data = table(path, wanted, read_modifiers(modifiers))
    elif is_table(path):
        data = image_table(path, wanted, read_modifiers(modifiers))
    elif path.is_dir() or suffix == ".zip":
        data = class_folders(path, wanted, read_modifiers(modifiers))
    else:
        raise DataError(f"data out of {FORMS}", got=repr(place))
    name = kind if alias else Path(os.path.abspath(path)).name
    label = f":{data.split}" if data.split in SPLITS else "" if suffix == ".npz" else " (no split folders)"
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
    one = in_memory("all", images, torch.tensor([label]), class_names)
    return replace(one, source=Path(path).name)


def _unknown(place: str) -> DataError:
    """Say what is wrong with a place that does not exist; what follows a known one is a misspelt ending."""
    for mark, known, what in ((":", SPLITS, "a split"), ("@", EXAMPLES, "a modifier")):
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
