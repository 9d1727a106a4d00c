"""DICOM files: intensities in modality units, through one window, as floating point; nothing of the patient gets out.

Source: DICOM PS3.3, C.7.6.3 (image pixels), C.11.1 (rescale), C.11.2 (window). We differ in one point: a window of
centre C and width W runs from C - W/2 to C + W/2, as the function LINEAR_EXACT has it, for every file; LINEAR lies half
a unit beside it.
"""

import secrets
import struct
import warnings
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from typing import Any

import numpy as np

from rempart.core.errors import DataError, SpecError
from rempart.data import files
from rempart.data.modifiers import FULL, OWN, Modifiers
from rempart.data.samples import PLAIN, RAW

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_GREY, _COLOUR = (
    ("MONOCHROME1", "MONOCHROME2"),
    ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
)
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
_BROKEN = (
    *(AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, OSError, EOFError, SyntaxError),
    *(NotImplementedError, RuntimeError, AssertionError, ArithmeticError, struct.error, zlib.error, MemoryError),
)
_TAGS = (
    *("PhotometricInterpretation", "BitsStored", "BitsAllocated", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PlanarConfiguration", "TransferSyntaxUID", "RescaleSlope", "RescaleIntercept"),
)
_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Dicom:
    """Decodes DICOM files.

    Attributes:
        unit: Of the intensities: HU, `raw` where it has no name we know, 1 where pixels are in [0, 1] already.
        span: Lowest and highest intensity of the window, which become 0 and 1.
        own: Each file has a window of its own.
        sigmoid: The window bends: a sigmoid of four times the distance from its centre, over its width.
    """

    unit: str
    span: tuple[float, float]
    own: bool
    sigmoid: bool = False

    def __call__(self, name: str, content: bytes) -> np.ndarray:
        """The image or volume (c, *s) in [0, 1], float32; MONOCHROME1 is turned so that larger is lighter."""
        with _parsing(name):
            header = _header(content, name, pixels=True)
            pixels = _pixels(header, name)
            if _colour(header):
                if self.unit != PLAIN:
                    raise DataError("grey images like the first file", got=f"{name}, which is in colour")
                return pixels
            unit = _unit(header)
            if not self.own and not self.sigmoid and unit != self.unit:
                raise DataError(f"intensities in {self.unit} like those of the first file", got=f"{unit} in {name}")
            low, high = _window(header, name) or _extremes(pixels) if self.own else self.span
            place = (pixels - low) / (high - low)
            bent = _is_sigmoid(header, name) and _window(header, name) is not None if self.own else self.sigmoid
            image = (1 / (1 + np.exp(-4 * (place - 0.5))) if bent else place.clip(0, 1)).astype(np.float32)
            return 1 - image if header.PhotometricInterpretation == "MONOCHROME1" else image


def decoder(name: str, content: bytes, modifiers: Modifiers) -> Dicom:
    """What decodes all files of a data set, as its first file and the modifiers say.

    Raises:
        DataError: If there is no window.
    """
    with _parsing(name):
        header = _header(content, name)
        if _colour(header):
            modifiers.only("@64", "@grey or @rgb", "@slice", "@mask", what="colour images")
            return Dicom(PLAIN, (0.0, 1.0), own=False)
        if modifiers.window == OWN:
            return Dicom(PLAIN, (0.0, 1.0), own=True)
        if isinstance(modifiers.window, tuple):
            span = modifiers.window
        elif modifiers.window == FULL:
            span = _stored(header, name)
        elif (span := _window(header, name)) is not None and _is_sigmoid(header, name):
            return Dicom(PLAIN, span, own=False, sigmoid=True)  # no step of pixels is one number of units
    if span is None:
        hint = "add @window=CENTRE:WIDTH, for example @window=40:400 for soft tissue in CT, or @window=full"
        raise DataError("a window in the first file, or one in the data spec", got=f"none in {name}", hint=hint)
    return Dicom(_unit(header), span, own=False)


def depths(name: str, start: bytes) -> tuple[int, int, int]:
    """Frames, rows and columns."""
    with _parsing(name):
        header = _header(start, name)
        return int(header.get("NumberOfFrames") or 1), int(header.Rows), int(header.Columns)


def people(store: files.Store, names: Sequence[str]) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Patient and series of each file, as keyed hashes; None where a file does not say.

    The key is drawn once per process and kept nowhere: who sees a hash cannot try out names or numbers.
    """
    patients: list[str] = []
    series: list[str] = []
    for name, content in zip(names, store.contents(names), strict=True):
        with _parsing(name):
            header = _header(content, name)
            patients.append(str(header.get("PatientID") or ""))
            series.append(str(header.get("SeriesInstanceUID") or ""))
    found = tuple(tuple(map(_hashed, column)) if all(column) else None for column in (patients, series))
    return found[0], found[1]


def _hashed(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogateescape"), key=_KEY, digest_size=8).hexdigest()


@contextmanager
def _parsing(name: str) -> Generator[None]:
    """Errors of the parser as DataError; its words are dropped, because they may hold what stands in the header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except SpecError:
        raise
    except _BROKEN as error:
        tag = getattr(error, "name", None)
        lacks = (
            f"it lacks the tag {tag}" if isinstance(error, AttributeError) and tag in _TAGS else type(error).__name__
        )
        raise DataError("a DICOM file that can be read", got=f"{name} ({lacks})") from None


def _header(content: bytes, name: str, *, pixels: bool = False) -> Any:
    """The tags of a file that holds an image of a size within the limits."""
    try:
        from pydicom import dcmread
    except ImportError:
        hint = "pip install 'rempart[medical]'"
        raise DataError("the package pydicom, to read DICOM files", got="none", hint=hint) from None

    if content[128:132] != b"DICM" or _DEFLATED in content:
        came = "one that is deflated" if content[128:132] == b"DICM" else "no such file"
        raise DataError("a DICOM file with the letters DICM at byte 128, not deflated", got=f"{name}: {came}")
    header = dcmread(BytesIO(content), stop_before_pixels=not pixels)
    if "Rows" not in header or "Columns" not in header or (pixels and not any(header.get(key) for key in _PIXELS)):
        raise _no_image(header, name)
    rows, columns = int(header.Rows), int(header.Columns)
    frames, layers = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
    if min(rows, columns, frames, layers) < 1:
        raise DataError("an image of positive size", got=f"{columns}x{rows} in {name}")
    files.within(rows * columns, files.MAX_PIXELS, "MAX_PIXELS", name, "pixels")
    files.within(rows * columns * frames * layers, files.MAX_VOXELS, "MAX_VOXELS", name, "values")
    if header.PhotometricInterpretation not in (*_GREY, *_COLOUR):
        raise DataError(f"pixels as {', '.join((*_GREY, *_COLOUR))}", got=name)
    if header.get("ModalityLUTSequence"):
        raise DataError("intensities by slope and intercept", got=f"a lookup table in {name}")
    return header


def _no_image(header: Any, name: str) -> DataError:
    """What a file without pixels is, as the standard names it; nothing that only the file says."""
    from pydicom.uid import UID

    uid = UID(str(header.get("SOPClassUID") or getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID") or ""))
    if uid.name == str(uid):
        return DataError("a DICOM file that can be read", got=f"{name} (no pixels, and no kind that DICOM knows)")
    hint = "leave it out: not every file of a DICOM export is an image"
    return DataError("a DICOM file that holds an image", got=f"{name}, {uid.name} without pixels", hint=hint)


def _colour(header: Any) -> bool:
    return header.PhotometricInterpretation in _COLOUR


def _pixels(header: Any, name: str) -> np.ndarray:
    """Intensities (1, *s) in modality units, float64; of colour images pixels (3, *s) in [0, 1], float32."""
    from PIL import Image
    from pydicom.pixels.processing import apply_color_lut

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        stored = _decoded(header, name)
    frames = int(header.get("NumberOfFrames") or 1)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, header)
    expected = (*([frames] if frames > 1 else []), int(header.Rows), int(header.Columns))
    if stored.shape != (*expected, *([3] if _colour(header) else [])):
        raise DataError(f"pixels of shape {expected}", got=f"{stored.shape} in {name}")
    if _colour(header):
        palette = header.PhotometricInterpretation == "PALETTE COLOR"
        top = np.iinfo(stored.dtype).max if palette else 2 ** int(header.BitsStored) - 1
        return (np.moveaxis(stored, -1, 0).astype(np.float32) / np.float32(top)).clip(0, 1)
    slope, intercept = (
        np.reshape(_rescale(header, key, default, name), (-1, *(1,) * (stored.ndim - 1)) if frames > 1 else ())
        for key, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    with np.errstate(over="ignore", invalid="ignore"):
        values = (stored * slope + intercept)[None]
    if not np.isfinite(values).all():
        raise DataError("finite intensities", got=f"NaN or infinity in {name}")
    return values


def _decoded(header: Any, name: str) -> np.ndarray:
    try:
        return header.pixel_array
    except _BROKEN as error:
        if not header.file_meta.TransferSyntaxUID.is_compressed:
            raise
        hint = "if it opens elsewhere: convert it to an uncompressed transfer syntax"
        came = f"{name} ({header.file_meta.TransferSyntaxUID.name}: {type(error).__name__})"
        raise DataError("a DICOM file that can be read", got=came, hint=hint) from None


def _rescale(header: Any, key: str, default: float, name: str) -> Any:
    """A value of the rescale, or one for each frame where frames have their own; an empty tag says nothing."""
    for sequence in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        groups = header.get(sequence) or []
        found = [
            group.PixelValueTransformationSequence[0] for group in groups if "PixelValueTransformationSequence" in group
        ]
        if found:
            values = np.array([float(getattr(one, key)) for one in found])
            break
    else:
        value = header.get(key)
        values = np.array([default if value is None else float(value)])
    if key == "RescaleSlope" and not values.all():
        raise DataError("a rescale slope that is not 0, which makes all pixels alike", got=name)
    return values[0] if len(values) == 1 else values


def _unit(header: Any) -> str:
    """Hounsfield units where the file says so, or is a CT with a rescale; screenshots of a scanner have none."""
    kind = str(_rescaled(header, "RescaleType") or "")
    computed = header.get("Modality") == "CT" and _rescaled(header, "RescaleSlope") is not None
    return "HU" if kind == "HU" or (not kind and computed) else RAW


def _is_sigmoid(header: Any, name: str) -> bool:
    function = str(_in_frames(header, "FrameVOILUTSequence", "VOILUTFunction") or _FUNCTIONS[0]).upper()
    if function not in _FUNCTIONS:
        hint = "add @window=CENTRE:WIDTH"
        raise DataError(f"a window as {', '.join(_FUNCTIONS)}", got=f"one of another function in {name}", hint=hint)
    return function == "SIGMOID"


def _rescaled(header: Any, key: str) -> Any:
    return _in_frames(header, "PixelValueTransformationSequence", key)


def _in_frames(header: Any, sequence: str, key: str) -> Any:
    """A tag of the file, or of the functional groups of its first frame; None where neither has it."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in list(header.get(groups) or [])[:1]:
            for item in list(group.get(sequence) or [])[:1]:
                if key in item:
                    return item.get(key)
    return header.get(key)


def _window(header: Any, name: str) -> tuple[float, float] | None:
    """The first window that the file names."""
    centre, width = (_in_frames(header, "FrameVOILUTSequence", key) for key in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        if header.get("VOILUTSequence"):
            came, hint = f"a lookup table (VOI LUT) in {name}", "add @window=CENTRE:WIDTH or @window=full"
            raise DataError("a window by centre and width", got=came, hint=hint)
        return None
    middle, wide = (float(value[0] if hasattr(value, "__len__") else value) for value in (centre, width))
    if not wide > 0:
        raise DataError("a window of positive width", got=name, hint="add @window=CENTRE:WIDTH")
    return middle - wide / 2, middle + wide / 2


def _stored(header: Any, name: str) -> tuple[float, float]:
    """The range of intensities that the bits of the file can hold."""
    if "BitsStored" not in header and header.get("BitsAllocated") in (32, 64):
        hint = "add @window=CENTRE:WIDTH"
        raise DataError("a window for floating-point numbers", got=f"@window=full for {name}", hint=hint)
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation) == 1
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])[:, None]
    values = ends * _rescale(header, "RescaleSlope", 1.0, name) + _rescale(header, "RescaleIntercept", 0.0, name)
    return float(values.min()), float(values.max())


def _extremes(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low, low + 1)
