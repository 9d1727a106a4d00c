"""Image files where they lie, in folders and zip archives: listed, read and decoded within limits, never extracted."""

import hashlib
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rempart.core.errors import DataError
from rempart.core.types import Images

MAX_ENTRIES = 200_000
"""Entries in one zip archive."""
MAX_IMAGE_BYTES = 64 * 2**20
"""Uncompressed size of one image file."""
MAX_TOTAL_BYTES = 20 * 2**30
"""Uncompressed size of all images of an archive, or of one array file."""
MAX_RATIO = 100
"""Uncompressed over compressed size of all images of an archive; a single blank image may exceed it."""
MAX_PIXELS = 50_000_000
"""Width times height of one image."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GREY_MODES = ("1", "L", "LA")
_BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error),
)


@dataclass(frozen=True, slots=True)
class Folder:
    """Image files in a folder."""

    root: Path

    def names(self) -> Iterator[str]:
        """Relative names of everything inside, folders ending in a slash, a little deeper than images belong."""
        return self._walk("", 4)

    def contents(self, names: Iterable[str]) -> Iterator[bytes]:
        """The files' bytes."""
        for name in names:
            try:
                with (self.root / name).open("rb") as file:
                    content = file.read(MAX_IMAGE_BYTES + 1)
            except OSError as error:
                raise DataError("a file that can be read", got=f"{name}: {error.strerror}") from None
            within(len(content), MAX_IMAGE_BYTES, "MAX_IMAGE_BYTES", name)
            yield content

    def stamps(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """CRC-32 and size of each file."""
        return ((zlib.crc32(content), len(content)) for content in self.contents(names))

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
    """Image files in a zip archive, read in place: nothing is written to disk, no handle stays open between calls.

    Members are inflated here, not by `zipfile`, which would parse the directory again on every call (0.5 s for 60,000
    entries) and believes the size an entry claims.
    """

    path: Path
    members: Mapping[str, _Member | None]

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

    def stamps(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """CRC-32 and size of each file, from the directory alone."""
        members = (self.members[name] for name in names)
        return ((member.crc, member.size) for member in members if member)

    def _inflated(self, file: BinaryIO, name: str) -> bytes:
        member = self.members[name]
        assert member is not None
        content = b""
        with suppress(struct.error, zlib.error, OverflowError):
            file.seek(member.offset + 26)  # the lengths of the two fields between the entry's header and its data
            file.seek(sum(struct.unpack("<2H", file.read(4))), os.SEEK_CUR)
            content = file.read(member.packed)
            if member.method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-15).decompress(content, member.size + 1)
        if len(content) != member.size or zlib.crc32(content) != member.crc:
            raise DataError("an archive that is whole", got=f"{name} with a wrong size or checksum")
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
    images = [info for info in infos if is_image(info.filename)]
    for info in images:
        within(max(info.file_size, info.compress_size), MAX_IMAGE_BYTES, "MAX_IMAGE_BYTES", info.filename)
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError("entries stored or deflated, without a password", got=info.filename, hint="zip them anew")
    size, packed = sum(info.file_size for info in images), sum(info.compress_size for info in images)
    within(size, MAX_TOTAL_BYTES, "MAX_TOTAL_BYTES", path.name)
    within(size / max(packed, 1), MAX_RATIO, "MAX_RATIO", path.name, "times the compressed size")
    members = {
        i.filename: _Member(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in images
    }
    return Zip(path, {**dict.fromkeys(info.filename for info in infos if info.is_dir()), **members})


@dataclass(frozen=True, slots=True, eq=False)
class Files:
    """Reads image files and brings them to one shape."""

    store: Folder | Zip
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    resize: bool

    def __call__(self, numbers: Tensor) -> Images:
        """The images of these sample numbers, float32 in [0, 1]."""
        names = [self.names[number] for number in numbers.tolist()]
        images = torch.empty((len(names), *self.shape), dtype=torch.float32)
        for row, (name, content) in enumerate(zip(names, self.store.contents(names), strict=True)):
            images[row] = unit(torch.from_numpy(self._decode(name, content)))
        return images

    def stamps(self, numbers: Tensor) -> Iterator[bytes]:
        """CLASS/NAME, CRC-32 and size of each file."""
        names = [self.names[number] for number in numbers.tolist()]
        for name, (crc, size) in zip(names, self.store.stamps(names), strict=True):
            yield _key(name) + struct.pack("<IQ", crc, size)

    def _decode(self, name: str, content: bytes) -> np.ndarray:
        channels, height, width = self.shape
        with _opened(name, content) as image:
            if not self.resize and image.size != (width, height):
                raise DataError(
                    f"images of one size, {width}x{height} like {self.names[0]}",
                    got=f"{image.width}x{image.height} in {name}",
                    hint="add @128 to the data spec, or another size, to resize all",
                )
            try:
                return _pixels(image, channels, (width, height))
            except _BROKEN_IMAGE as error:
                raise DataError("an image that can be read", got=f"{name}: {error}") from None


def image_shape(store: Folder | Zip, own: str, first: str, modifiers: str) -> tuple[int, int, int]:
    """Channels, height and width, from the modifiers or from the headers of two images."""
    size = channels = None
    for word in modifiers.split("@")[1:]:
        if word[0].isdigit():
            width, _, height = word.partition("x")
            size = int(width), int(height or width)
            within(size[0] * size[1], MAX_PIXELS, "MAX_PIXELS", f"@{word}", "pixels")
        else:
            channels = 1 if word == "grey" else 3
    if channels is None:
        with _opened(first, *store.contents([first])) as image:
            channels = 1 if image.mode in _GREY_MODES or image.mode.startswith("I;16") else 3
    if size is None:
        with _opened(own, *store.contents([own])) as image:
            size = image.size
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
    found = image_shape(store, str(path), str(path), "")[1:]
    if found != (height, width):
        expected, hint = f"an image of {width}x{height}", "resize it as the training images were"
        raise DataError(expected, got=f"{found[1]}x{found[0]} in {path}", hint=hint)
    return Files(store, (str(path),), (channels, height, width), resize=False)(torch.zeros(1, dtype=torch.int64))


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
    if image.mode in ("I", "F"):
        raise DataError("8-bit or 16-bit pixels", got=f"{name} with 32-bit pixels", hint="convert the file")
    return image


def _pixels(image: Image.Image, channels: int, size: tuple[int, int]) -> np.ndarray:
    """Decode to (channels, height, width): uint8, or float32 in [0, 1] with one channel for 16-bit images."""
    if image.mode.startswith("I;16"):  # scaled by hand: convert("L") cuts everything above 255
        image = Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(65535))
    else:
        if image.mode == "P" and "transparency" in image.info:  # Pillow goes to RGB by way of RGBA only
            image = image.convert("RGBA")
        image = image.convert("L" if channels == 1 else "RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    array = np.array(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def is_image(name: str) -> bool:
    """Whether a file is named like an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _key(name: str) -> bytes:
    """CLASS/NAME, wherever the class folder lies."""
    return "/".join(PurePosixPath(name).parts[-2:]).encode("utf-8", "surrogateescape")


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
