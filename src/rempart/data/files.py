"""Files where they lie, in folders and zip archives: listed, read and decoded within limits, never extracted."""

import hashlib
import os
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from rempart.core.errors import DataError, SpecError
from rempart.core.names import normal
from rempart.core.types import Images

MAX_ENTRIES = 200_000
"""Entries in one zip archive."""
MAX_IMAGE_BYTES = 64 * 2**20
"""Uncompressed size of one image file."""
MAX_VOLUME_BYTES = 2 * 2**30
"""Uncompressed size of one DICOM or NIfTI file."""
MAX_TOTAL_BYTES = 20 * 2**30
"""Uncompressed size of all images of an archive, or of one array file."""
MAX_RATIO = 100
"""Uncompressed over compressed size of all images of an archive; a single blank image may exceed it."""
MAX_PIXELS = 50_000_000
"""Width times height of one image."""
MAX_VOXELS = 150_000_000
"""Values of one volume, all channels counted."""

SUFFIXES = (
    *(".apng", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm"),
    *(".ppm", ".tif", ".tiff", ".webp"),
)
VOLUMES = (".dcm", ".dicom", ".nii", ".nii.gz")
DICOM, NIFTI, PICTURE = "DICOM", "NIfTI", "picture"
_MAGIC = 132  # bytes of a DICOM file up to the letters DICM and with them
_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_MANY = ("GIF", "PNG", "TIFF", "WEBP")  # not MPO: cameras put a preview behind the photograph
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts an image upright, by its EXIF orientation."""
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF; photometric 0: white is zero
_NOISE = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "dicomdir", "__macosx", "$recycle.bin", "@eadir")
"""Files and folders that systems leave behind."""
_TEXTS = (".txt", ".md", ".csv", ".json", ".xml", ".html", ".yaml", ".yml", ".log", ".pdf")
_GREY_MODES = ("1", "L", "LA")
_MOST = 12  # endings that a sentence lists
_BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error),
)

Decode = Callable[[str, bytes], np.ndarray]
"""From the name and the bytes of a file to its image, channels first: uint8, or float32 in [0, 1]."""


class Store(Protocol):
    """Where files lie."""

    def contents(self, names: Iterable[str]) -> Iterator[bytes]:
        """The files' bytes."""
        ...

    def starts(self, names: Iterable[str], size: int) -> Iterator[bytes]:
        """The first bytes of each file."""
        ...

    def stamps(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """CRC-32 and size of each file."""
        ...


@dataclass(frozen=True, slots=True)
class Folder:
    """Files in a folder.

    Attributes:
        root: The folder.
        closed: Whether a file outside it is refused, however its name or a link leads there.
    """

    root: Path
    closed: bool = False

    def names(self) -> Iterator[str]:
        """Relative names of everything inside, folders ending in a slash, a little deeper than images belong."""
        return self._walk("", 4)

    def actual(self, name: str) -> str | None:
        """A relative name as the disk spells it, in whatever Unicode form; None where nothing has it.

        Where a link leads is asked when it is read.
        """
        if os.path.lexists(self.root / name):
            return name
        found = ""
        for part in PureWindowsPath(name).parts:  # with slashes or backslashes between them
            try:
                there = [entry for entry in os.listdir(self.root / found) if normal(entry) == normal(part)]
            except OSError:
                return None
            if not there:
                return None
            found = f"{found}/{there[0]}".lstrip("/")
        return found

    def contents(self, names: Iterable[str]) -> Iterator[bytes]:
        """The files' bytes."""
        for name in names:
            constant, limit = _limit(name)
            content = self._read(name, limit + 1)
            within(len(content), limit, constant, name)
            yield content

    def starts(self, names: Iterable[str], size: int) -> Iterator[bytes]:
        """The first bytes of each file."""
        return (self._read(name, size) for name in names)

    def stamps(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """CRC-32 and size of each file."""
        return ((zlib.crc32(content), len(content)) for content in self.contents(names))

    def _read(self, name: str, size: int) -> bytes:
        path = self.root / name
        try:
            if self.closed:
                path = path.resolve(strict=True)
                if not path.is_relative_to(self.root.resolve()) or not path.is_file():
                    raise DataError(f"files inside {self.root.resolve().name}", got=name)
            with path.open("rb") as file:
                return file.read(min(size, os.fstat(file.fileno()).st_size + 1))  # room is made for all that is asked
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "a loop of links"
            raise DataError("a file that can be read", got=f"{name}: {reason}") from None

    def _walk(self, prefix: str, depth: int) -> Iterator[str]:
        try:
            entries = list(os.scandir(self.root / prefix))
        except OSError as error:
            raise DataError("a folder that can be read", got=f"{self.root.name}/{prefix}: {error.strerror}") from None
        for entry in entries:
            if not entry.is_dir():
                yield prefix + entry.name
            elif depth:
                yield f"{prefix}{entry.name}/"
                yield from self._walk(f"{prefix}{entry.name}/", depth - 1)


@dataclass(frozen=True, slots=True)
class _Member:
    """Where a file lies in an archive, from the archive's directory."""

    offset: int
    packed: int
    size: int
    crc: int
    method: int


@dataclass(frozen=True, slots=True)
class Zip:
    """Files in a zip archive, read in place: nothing is written to disk, no handle stays open between calls.

    Attributes:
        path: The archive.
        members: What it holds; None for folders and for files that are not read.
        undecoded: Whether names are not in UTF-8, but in an encoding that is not known.

    Members are inflated here, not by `zipfile`, which would parse the directory again on every call (0.5 s for 60,000
    entries) and believes the size an entry claims.
    """

    path: Path
    members: Mapping[str, _Member | None]
    undecoded: bool = False

    def names(self) -> Iterable[str]:
        """Names of all entries, folders ending in a slash."""
        return self.members

    def contents(self, names: Iterable[str]) -> Iterator[bytes]:
        """The files' bytes, checked against their CRC-32."""
        try:
            with self.path.open("rb") as file:
                for name in names:
                    yield self._inflated(file, name)
        except OSError as error:
            raise DataError("an archive that can be read", got=f"{self.path.name}: {error.strerror}") from None

    def starts(self, names: Iterable[str], size: int) -> Iterator[bytes]:
        """The first bytes of each file, unchecked."""
        try:
            with self.path.open("rb") as file:
                for name in names:
                    yield self._content(file, name, size)[:size]
        except OSError as error:
            raise DataError("an archive that can be read", got=f"{self.path.name}: {error.strerror}") from None

    def stamps(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """CRC-32 and size of each file, from the directory alone."""
        members = (self.members[name] for name in names)
        return ((member.crc, member.size) for member in members if member)

    def _inflated(self, file: BinaryIO, name: str) -> bytes:
        member = self.members[name]
        assert member is not None
        content = self._content(file, name, member.size + 1)
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise DataError("an archive that is whole", got=f"{name} with a wrong size or checksum")
        return content

    def _content(self, file: BinaryIO, name: str, size: int) -> bytes:
        """What is in a file, inflated to so many bytes at most."""
        member = self.members[name]
        assert member is not None
        content = b""
        with suppress(struct.error, zlib.error, OverflowError):
            file.seek(member.offset + 26)  # the lengths of the two fields between the entry's header and its data
            file.seek(sum(struct.unpack("<2H", file.read(4))), os.SEEK_CUR)
            content = file.read(member.packed)
            if member.method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-15).decompress(content, size)
        return content


def open_zip(path: Path) -> Zip:
    """Read the directory of an archive and check it against the limits; nothing is decompressed.

    Raises:
        DataError: If it is no zip archive, or exceeds a limit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (OSError, ValueError, EOFError, struct.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError("a zip archive that is whole", got=f"{path.name}: {error}", hint="fetch it again") from None
    within(len(infos), MAX_ENTRIES, "MAX_ENTRIES", path.name, "entries")
    for info in infos:
        if leads_out(info.filename):
            raise DataError("an archive whose names stay inside it", got=repr(info.filename), hint="zip it anew")
    images = [info for info in infos if not info.is_dir() and (is_image(info.filename) or _may_be(info.filename))]
    for info in images:
        constant, limit = _limit(info.filename)
        within(max(info.file_size, info.compress_size), limit, constant, info.filename)
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError("entries stored or deflated, without a password", got=info.filename, hint="zip them anew")
    size, packed = sum(info.file_size for info in images), sum(info.compress_size for info in images)
    within(size, MAX_TOTAL_BYTES, "MAX_TOTAL_BYTES", path.name)
    within(size / max(packed, 1), MAX_RATIO, "MAX_RATIO", path.name, "times the compressed size")
    name_of, undecoded = _decoded_names(infos)
    members: dict[str, _Member | None] = dict.fromkeys(name_of.values())
    for i in images:
        members[name_of[i.filename]] = _Member(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type)
    return Zip(path, members, undecoded)


def _decoded_names(infos: Iterable[zipfile.ZipInfo]) -> tuple[dict[str, str], bool]:
    """The names of entries, and whether their encoding is unknown.

    Names without the flag for UTF-8 come as CP437. Many programs write UTF-8 all the same; the others write what their
    system has. Some of Windows write backslashes between folders.
    """
    name_of = {info.filename: info.filename for info in infos}
    if not any("/" in name for name in name_of) and all(map(str.isascii, name_of)):  # elsewhere it is half a letter
        name_of = {name: name.replace("\\", "/") for name in name_of}
    unflagged = [i.filename for i in infos if not i.flag_bits & 0x800 and not i.filename.isascii()]
    try:
        return name_of | {name: name.encode("cp437").decode("utf-8") for name in unflagged}, False
    except UnicodeError:
        return name_of, True


@dataclass(frozen=True, slots=True, eq=False)
class Files:
    """Reads files and brings their images to one shape.

    Attributes:
        store: Where they lie.
        names: The file of each sample; several samples may be slices of one.
        shape: Of one sample: channels, then spatial axes.
        decode: From a file to its image.
        resize: Whether an image of another size is resized; otherwise it is an error.
        axis: The axis of a volume, channels counted, along which samples are slices.
        planes: Which slice each sample is.
        note: What else the pixels depend on, for the digest.
    """

    store: Store
    names: tuple[str, ...]
    shape: tuple[int, ...]
    decode: Decode
    resize: bool = False
    axis: int | None = None
    planes: tuple[int, ...] = ()
    note: str = ""

    def __call__(self, numbers: Tensor) -> Images:
        """The images of these sample numbers, float32 in [0, 1]."""
        images = torch.empty((len(numbers), *self.shape), dtype=torch.float32)
        rows: dict[str, list[tuple[int, int]]] = {}
        for row, number in enumerate(numbers.tolist()):
            rows.setdefault(self.names[number], []).append((row, number))
        for (name, samples), content in zip(rows.items(), self.store.contents(rows), strict=True):
            image = self.decode(name, content)
            for row, number in samples:
                one = image if self.axis is None else plane(image, self.axis, self.planes[number], name)
                images[row] = unit(torch.from_numpy(np.ascontiguousarray(self._fitted(one, name))))
        return images

    def stamps(self, numbers: Tensor) -> Iterator[bytes]:
        """CLASS/NAME, CRC-32 and size of each file, and what else the pixels depend on."""
        chosen = numbers.tolist()
        names = dict.fromkeys(self.names[number] for number in chosen)
        known = dict(zip(names, self.store.stamps(names), strict=True))
        for number in chosen:
            name = self.names[number]
            cut = "" if self.axis is None else f" {self.axis} {self.planes[number]}"
            yield _key(name) + struct.pack("<IQ", *known[name]) + f"{self.note}{cut}".encode()

    def _fitted(self, image: np.ndarray, name: str) -> np.ndarray:
        if image.shape == self.shape:
            return image
        flat = image.ndim == len(self.shape) == 3
        if image.shape[1:] != self.shape[1:] and not (self.resize and flat):
            hint = _resizing(self.shape) if flat else "take @slice=axial of them"
            raise DataError(
                f"images of one size, {_size(self.shape)} like {self.names[0]}",
                got=f"{_size(image.shape)} in {name}",
                hint=hint,
            )
        return resized(image, self.shape) if flat else channels(image, self.shape[0])


def plane(image: np.ndarray, axis: int, number: int, name: str) -> np.ndarray:
    """One slice (c, h, w) of a volume (c, d, h, w)."""
    if image.ndim != 4:
        raise DataError("volumes, to take slices of them", got=f"a flat image in {name}")
    return image.take(number, axis)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Decodes picture files to one shape (channels, height, width).

    Attributes:
        shape: What they are brought to.
        resize: Whether one of another size is resized; otherwise it is an error.
        like: The name of the file whose size it is.
    """

    shape: tuple[int, int, int]
    resize: bool
    like: str

    def __call__(self, name: str, content: bytes) -> np.ndarray:
        """The image: uint8, or float32 in [0, 1] with one channel for 16-bit files."""
        channels, height, width = self.shape
        with _upright(name, content) as image:
            if not self.resize and image.size != (width, height):
                raise DataError(
                    f"images of one size, {width}x{height} like {self.like}",
                    got=f"{image.width}x{image.height} in {name}",
                    hint=_resizing(self.shape),
                )
            return _pixels(image, channels, (width, height))


def nonzero(name: str, content: bytes) -> np.ndarray:
    """1 where a grey picture is not black, else 0: float32, shape (1, height, width)."""
    with _upright(name, content) as image:
        grey = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    return (grey > 0).astype(np.float32)[None]


def channels(image: np.ndarray, number: int) -> np.ndarray:
    """An image (c, *s) of floats with one or three channels; grey is the luma of ITU-R 601-2."""
    if len(image) == number:
        return image
    if number == 3:
        return np.repeat(image[:1], 3, axis=0)
    return np.tensordot(np.array([0.299, 0.587, 0.114], dtype=np.float32), image[:3], axes=1)[None].astype(np.float32)


def resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An image (c, h, w) of floats in [0, 1] in another size and number of channels; bilinear, antialiased."""
    image = channels(image, shape[0])
    if image.shape == shape:
        return image
    size = shape[2], shape[1]
    scaled = [np.array(Image.fromarray(layer).resize(size, Image.Resampling.BILINEAR)) for layer in image]
    return np.stack(scaled).clip(0, 1)


def _resizing(shape: tuple[int, ...]) -> str:
    """What to try where flat images differ in size."""
    return f"add @{_size(shape)} to the data spec, or the size that the model takes, to resize all"


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, reversed(shape[1:])))


def image_shape(
    store: Store, own: str, first: str, size: tuple[int, int] | None = None, channels: int | None = None
) -> tuple[int, int, int]:
    """Channels, height and width of pictures: as given, or from the headers of two of them.

    Args:
        store: Where they lie.
        own: The picture whose size counts.
        first: The picture whose channels count.
        size: Width and height to resize to.
        channels: 1 or 3.
    """
    if channels is None:
        with _opened(first, *store.contents([first])) as image:
            channels = 1 if image.mode in _GREY_MODES or image.mode.startswith("I") else 3
    if size is None:
        with _opened(own, *store.contents([own])) as image:
            turned = _turn(image) in (5, 6, 7, 8)
            size = (image.height, image.width) if turned else image.size
    return channels, size[1], size[0]


def read_image(path: Path, shape: tuple[int, ...]) -> Images:
    """One image file as a batch of one, float32 in [0, 1], grey or colour as the shape says.

    Raises:
        DataError: If it cannot be read, is of another size, or the shape is none of a flat image.
    """
    if len(shape) != 3:
        raise DataError("--data for a model of images that are not flat", got=f"the image file {path}")
    channels, height, width = shape
    store = Folder(Path())
    found = image_shape(store, str(path), str(path))[1:]
    if found != (height, width):
        expected, hint = f"an image of {width}x{height}", "resize it as the training images were"
        raise DataError(expected, got=f"{found[1]}x{found[0]} in {path}", hint=hint)
    decode = Pictures((channels, height, width), False, str(path))
    return Files(store, (str(path),), decode.shape, decode)(torch.zeros(1, dtype=torch.int64))


def decoded(name: str, content: bytes, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, int]]:
    """The bytes of an image file brought to a shape, float32 in [0, 1], and the width and height they came with.

    Raises:
        DataError: If they cannot be read or exceed a limit, or the shape is none of a flat grey or colour image.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise DataError("an image file for a model of flat grey or colour images", got=f"one of shape {shape}")
    within(len(content), MAX_IMAGE_BYTES, "MAX_IMAGE_BYTES", name)
    with _upright(name, content) as image:
        size = image.size
    pixels = Pictures((shape[0], shape[1], shape[2]), True, name)(name, content)
    return unit(torch.from_numpy(np.ascontiguousarray(channels(pixels, shape[0])))), size


def _opened(name: str, content: bytes) -> Image.Image:
    """An image with its header read and its number of pixels checked; the pixels are still to be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"at most {MAX_PIXELS:,} pixels (MAX_PIXELS)", got=f"{name}: {error}") from None
    except _BROKEN_IMAGE as error:
        reason = "in none of the formats" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(f"an image ({', '.join(_FORMATS)})", got=f"{name}: {reason}") from None
    within(image.width * image.height, MAX_PIXELS, "MAX_PIXELS", name, "pixels")
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # of a PGM, "I" is 16 bits
        came = f"{name} with {'32-bit floating-point' if image.mode == 'F' else '32-bit or signed'} pixels"
        raise DataError("8-bit or unsigned 16-bit pixels", got=came, hint="convert the file")
    if image.format in _MANY and _several(image):
        hint = "save each page or frame as a file of its own"
        raise DataError("one image in a file", got=f"several pages or frames in {name}", hint=hint)
    return image


def _several(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except _BROKEN_IMAGE:
        return False  # what is wrong is found when the pixels are decoded


def _turn(image: Image.Image) -> int:
    """The EXIF orientation, which says how to turn pixels; TIFF files are turned where they are decoded."""
    try:
        return 1 if image.format == "TIFF" else int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN_IMAGE:
        return 1  # notes that cannot be read do not make the image one


@contextmanager
def _upright(name: str, content: bytes) -> Generator[Image.Image]:
    """A decoded image, turned as its EXIF orientation says; what breaks from then on is told with its name."""
    with _opened(name, content) as image:
        try:
            image.load()
            turn = _TURNS.get(_turn(image))
            yield image if turn is None else image.transpose(turn)
        except SpecError:
            raise
        except _BROKEN_IMAGE as error:
            raise DataError("an image that can be read", got=f"{name}: {error}") from None


def _pixels(image: Image.Image, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Decode to (channels, height, width): uint8, or float32 in [0, 1] with one channel for 16-bit images."""
    if image.mode.startswith("I"):  # scaled by hand: convert("L") cuts everything above 255
        tags: Mapping[int, object] = getattr(image, "tag_v2", {})
        top = np.float32(4095 if tags.get(_BITS) in (12, (12,)) else 65535)
        values = np.asarray(image).astype(np.float32)
        image = Image.fromarray((top - values if tags.get(_PHOTOMETRIC) == 0 else values) / top)
    else:
        if image.mode == "P" and "transparency" in image.info:  # Pillow goes to RGB by way of RGBA only
            image = image.convert("RGBA")
        image = image.convert("L" if channels == 1 else "RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def is_noise(name: str) -> bool:
    """Whether a file says nothing of images: what systems leave behind (`.DS_Store`, `__MACOSX`), and texts."""
    left_behind = any(part.startswith(".") or part.lower() in _NOISE for part in PurePosixPath(name).parts)
    return left_behind or name.lower().endswith(_TEXTS)


def ending(name: str) -> str:
    """The ending of a file name as people say it: `.nii.gz`, `.heic`; `without an ending`."""
    suffixes = PurePosixPath(name).suffixes[-2:]
    compressed = len(suffixes) == 2 and suffixes[-1].lower() == ".gz"
    last = "".join(suffixes if compressed else suffixes[-1:])
    return "without an ending" if not last or last[1:].isdigit() else last.lower()


def counted(endings: Counter[str]) -> str:
    """How many files have which ending, the commonest first; those of the rarest in one number."""
    named, rest = endings.most_common(_MOST), endings.most_common()[_MOST:]
    others = [f"{sum(number for _, number in rest):,} of {len(rest)} other endings"] if rest else []
    return ", ".join([*(f"{number:,} {name}" for name, number in named), *others])


def is_image(name: str) -> bool:
    """Whether a file is named like a picture or a volume."""
    return name.lower().endswith((*SUFFIXES, *VOLUMES))


def kind(store: Store, name: str) -> str | None:
    """What a file is, by its ending; without one that says anything, by its first bytes; None: nothing known."""
    lower = name.lower()
    if lower.endswith(SUFFIXES):
        return PICTURE
    if lower.endswith(VOLUMES):
        return DICOM if lower.endswith((".dcm", ".dicom")) else NIFTI
    if not _may_be(name):
        return None
    (start,) = store.starts([name], _MAGIC)
    return DICOM if start[128:] == b"DICM" else None


def _may_be(name: str) -> bool:
    """Whether a file might be DICOM, as far as its name goes: without an ending, with a number for one, or .IMA."""
    last = PurePosixPath(name).suffix[1:].lower()
    return not last or last.isdigit() or last in ("ima", "img", "dic")


def _limit(name: str) -> tuple[str, int]:
    """The limit on the bytes of a file, with its name."""
    if name.lower().endswith(SUFFIXES):
        return "MAX_IMAGE_BYTES", MAX_IMAGE_BYTES
    return "MAX_VOLUME_BYTES", MAX_VOLUME_BYTES


def leads_out(name: str) -> bool:
    """Whether a name in an archive or a table points outside its folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return ".." in parts or name.startswith(("/", "\\")) or (len(name) > 1 and name[1] == ":") or "\0" in name


def _key(name: str) -> bytes:
    """CLASS/NAME, wherever the class folder lies."""
    return normal("/".join(PurePosixPath(name).parts[-2:])).encode("utf-8", "surrogateescape")


def order(name: str) -> bytes:
    """Sort key of a file: mixes the classes, and depends on CLASS/NAME alone."""
    return hashlib.sha1(_key(name), usedforsecurity=False).digest()


def within(value: float, limit: int, constant: str, name: str, unit: str = "bytes") -> None:
    """Raise a DataError that names the limit where a value exceeds it."""
    if value > limit:
        raise DataError(f"at most {limit:,} {unit} ({constant})", got=f"{value:,.0f} in {name}")


def unit(images: Tensor) -> Tensor:
    """Pixels in [0, 1]: bytes are divided by 255."""
    return images.to(torch.float32) / 255 if images.dtype == torch.uint8 else images
