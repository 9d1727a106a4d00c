"""NIfTI volumes, turned to the canonical orientation: axes from left to right, back to front and foot to head (RAS+).

The header is read by nibabel, from the bytes; extensions, which may hold anything, are not looked at.
Source: the NIfTI-1 standard (nifti1.h, Cox et al. 2004).
"""

import gzip
import math
import warnings
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from rempart.core.errors import DataError, SpecError
from rempart.data import files
from rempart.data.modifiers import FULL, OWN, Modifiers
from rempart.data.samples import PLAIN, RAW

_HEADER = 540  # bytes of the longer of the two headers
_BROKEN = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    ArithmeticError,
    OSError,
    EOFError,
    zlib.error,
    MemoryError,
)


@dataclass(frozen=True, slots=True)
class Nifti:
    """Decodes NIfTI files.

    Attributes:
        unit: `raw`: the format has no name for units of intensity; 1 where each file has its own window.
        span: Lowest and highest intensity of the window, which become 0 and 1.
        own: Each file has a window of its own.
    """

    unit: str
    span: tuple[float, float]
    own: bool

    def __call__(self, name: str, content: bytes) -> np.ndarray:
        """The volume (1, D, H, W) in [0, 1], float32: D runs foot to head, H back to front, W left to right."""
        with _parsing(name):
            header, axes = _header(_unpacked(content, _HEADER), name)
            values = _values(header, axes, content, name)
            low, high = _window(header) or (float(values.min()), float(values.max())) if self.own else self.span
            width = high - low if high > low else 1.0
            return ((values - low) / width).clip(0, 1).astype(np.float32).transpose(2, 1, 0)[None]


def decoder(name: str, content: bytes, modifiers: Modifiers) -> Nifti:
    """What decodes all files of a data set, as its first file and the modifiers say.

    Raises:
        DataError: If there is no window.
    """
    if modifiers.plane == "frame":
        raise DataError("axial, coronal or sagittal slices", got="@slice=frame")
    if modifiers.window == OWN:
        return Nifti(PLAIN, (0.0, 1.0), own=True)
    with _parsing(name):
        header, _ = _header(_unpacked(content, _HEADER), name)
        if isinstance(modifiers.window, tuple):
            span = modifiers.window
        else:
            span = _stored(header, name) if modifiers.window == FULL else _window(header)
    if span is None:
        hint = "add @window=CENTRE:WIDTH in the units of the file, @window=own for that of each, or @window=full"
        raise DataError("a display range in the first file, or a window", got=f"none in {name}", hint=hint)
    return Nifti(RAW, span, own=False)


def depths(name: str, start: bytes) -> tuple[int, int, int]:
    """Slices from foot to head, from back to front and from left to right."""
    with _parsing(name):
        header, axes = _header(_unpacked(start, _HEADER), name)
        shape = header.get_data_shape()
        across = [shape[int(k)] for k in np.argsort(axes[:, 0])]
        return across[2], across[1], across[0]


@contextmanager
def _parsing(name: str) -> Generator[None]:
    from_nibabel: tuple[type[Exception], ...] = ()
    try:
        from nibabel.orientations import OrientationError
        from nibabel.spatialimages import HeaderDataError

        from_nibabel = (OrientationError, HeaderDataError)
    except ImportError:
        hint = "pip install 'rempart[medical]'"
        raise DataError("the package nibabel, to read NIfTI files", got="none", hint=hint) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except SpecError:
        raise
    except (*_BROKEN, *from_nibabel) as error:
        raise DataError("a NIfTI file that can be read", got=f"{name} ({type(error).__name__})") from None


def _unpacked(content: bytes, size: int) -> bytes:
    """The first bytes of what a file holds; never more are inflated."""
    if content[:2] != b"\x1f\x8b":
        return content[:size]
    with gzip.GzipFile(fileobj=BytesIO(content)) as file:
        return file.read(size)


def _header(start: bytes, name: str) -> tuple[Any, np.ndarray]:
    """The header of a volume of a size within the limits, and how its axes lie."""
    from nibabel import Nifti1Header, Nifti2Header, io_orientation

    known: dict[int, Any] = {348: Nifti1Header, 540: Nifti2Header}
    length = next((n for n in known for order in ("little", "big") if start[:4] == n.to_bytes(4, order)), _HEADER + 1)
    if len(start) < length:
        raise DataError("a NIfTI file (.nii or .nii.gz)", got=name)
    header = known[length](start[:length], check=False)
    if bytes(header["magic"])[:2] != b"n+":
        raise DataError("a NIfTI file with header and volume in one", got=f"{name}, a part of a pair")
    shape, dtype = tuple(int(k) for k in header.get_data_shape()), header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise DataError("one whole or real number per voxel", got=f"{dtype} in {name}")
    if len(shape) < 3 or min(shape) < 1 or math.prod(shape[3:]) != 1:
        hint = "split a series into volumes"
        raise DataError("one volume of three axes per file", got=f"{'x'.join(map(str, shape))} in {name}", hint=hint)
    files.within(math.prod(shape), files.MAX_VOXELS, "MAX_VOXELS", name, "values")
    header.set_data_shape(shape[:3])
    axes = io_orientation(header.get_best_affine())
    if np.isnan(axes).any():
        raise DataError("an affine matrix that says how the axes lie", got=name)
    return header, axes


def _values(header: Any, axes: np.ndarray, content: bytes, name: str) -> np.ndarray:
    """Intensities on the axes left to right, back to front, foot to head; float64."""
    from nibabel import apply_orientation

    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header.get_data_offset())
    if not 348 <= offset <= 2**20:
        raise DataError("a volume that begins behind its header", got=f"byte {offset} of {name}")
    end = offset + math.prod(shape) * dtype.itemsize
    body = _unpacked(content, end)
    if len(body) < end:
        raise DataError(f"{end:,} bytes, as the header says", got=f"{len(body):,} in {name}")
    stored = np.frombuffer(body, dtype, offset=offset).reshape(shape, order="F")
    slope, intercept = header.get_slope_inter()
    values = stored.astype(np.float64)
    if slope is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            values = values * slope + (intercept or 0.0)
    if not np.isfinite(values).all():
        raise DataError("finite intensities", got=f"NaN or infinity in {name}")
    return apply_orientation(values, axes)


def _window(header: Any) -> tuple[float, float] | None:
    """The range the file asks to be shown in."""
    low, high = float(header["cal_min"]), float(header["cal_max"])
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low < high else None


def _stored(header: Any, name: str) -> tuple[float, float]:
    """The range of intensities that the numbers of the file can hold."""
    dtype = header.get_data_dtype()
    if dtype.kind == "f":
        raise DataError("a window for floating-point numbers", got=f"@window=full for {name}")
    slope, intercept = header.get_slope_inter()
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype=np.float64)
    values = ends * (1.0 if slope is None else slope) + (intercept or 0.0)
    return float(values.min()), float(values.max())
