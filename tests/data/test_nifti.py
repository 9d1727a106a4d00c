"""NIfTI files written byte by byte, and those that nibabel ships, against volumes worked out by hand."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from rempart.core.errors import DataError
from rempart.data import Data, files, open_data

nibabel = pytest.importorskip("nibabel")
RNG = np.random.default_rng(0)
VOLUME = RNG.integers(-500, 500, (3, 4, 5)).astype("<i2")  # x, y, z
CODES = {"u1": 2, "i2": 4, "i4": 8, "f4": 16, "f8": 64, "V3": 128}


def nifti(
    volume: np.ndarray,
    *,
    rows: object = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)),
    slope: float = 0.0,
    intercept: float = 0.0,
    shown: tuple[float, float] = (0.0, 0.0),
    shape: tuple[int, ...] = (),
    magic: bytes = b"n+1\0",
) -> bytes:
    """A NIfTI-1 file (nifti1.h): the affine in `rows`, the display range in `shown`."""
    shape = shape or volume.shape
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    kind = volume.dtype.str[1:]
    struct.pack_into("<2h", header, 70, CODES[kind], 8 * volume.dtype.itemsize)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<3f", header, 108, 352, slope, intercept)
    struct.pack_into("<2f", header, 124, shown[1], shown[0])
    struct.pack_into("<2h", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, *np.ravel(rows).tolist())  # pyright: ignore
    header[344:348] = magic
    return bytes(header) + volume.tobytes(order="F")


def folder(root: Path, content: bytes, ending: str = "nii") -> str:
    for kind in ("ant", "bee"):
        (root / kind).mkdir(parents=True, exist_ok=True)
        (root / kind / f"0.{ending}").write_bytes(content)
    return str(root)


def everything(data: Data) -> torch.Tensor:
    return data.batch(torch.arange(len(data))).x


def windowed(values: np.ndarray, low: float, high: float) -> torch.Tensor:
    return torch.from_numpy(((values - low) / (high - low)).clip(0, 1).astype(np.float32))


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_volume_has_depth_height_width_and_its_intensities(tmp_path: Path, ending: str) -> None:
    content = nifti(VOLUME, slope=0.5, intercept=10, shown=(-100, 200))
    where = folder(tmp_path, gzip.compress(content) if ending == "nii.gz" else content, ending)
    data = open_data(where)
    expected = windowed(VOLUME * 0.5 + 10, -100, 200).permute(2, 1, 0)
    assert (data.unit, data.span, data.shape) == ("raw", (-100, 200), (1, 5, 4, 3))
    torch.testing.assert_close(everything(data)[1, 0], expected, rtol=0, atol=1e-7)
    given = open_data(f"{where}@window=0:1000")
    assert given.span == (-500, 500) and given.digest != data.digest
    torch.testing.assert_close(everything(given)[0, 0], windowed(VOLUME * 0.5 + 10, -500, 500).permute(2, 1, 0))
    own = open_data(f"{where}@window=own")
    assert own.unit == "1" and torch.equal(everything(own), everything(data))


@pytest.mark.parametrize(
    ("rows", "turn"),
    [
        (((-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0)), lambda v: v[::-1, ::-1]),  # LPS, as DICOM has it
        (((0, 0, 2, 0), (1, 0, 0, 0), (0, 3, 0, 0)), lambda v: v.transpose(2, 0, 1)),  # stored y, z, x
        (((0, 0, -2, 0), (1, 0.1, 0, 0), (0, -3, 0, 0)), lambda v: v.transpose(2, 0, 1)[::-1, :, ::-1]),  # oblique
    ],
)
def test_axes_are_turned_to_right_front_head(tmp_path: Path, rows: object, turn: object) -> None:
    where = folder(tmp_path, nifti(VOLUME, rows=rows, shown=(-500, 500)))
    expected = windowed(turn(VOLUME).astype(float), -500, 500)  # type: ignore[operator]  # right, front, head
    assert torch.equal(everything(open_data(where))[0, 0], expected.permute(2, 1, 0))
    for plane, cut in {
        "axial:1": expected[:, :, 1].T,
        "coronal:-1": expected[:, -1].T,
        "sagittal:2": expected[2].T,
    }.items():
        data = open_data(f"{where}@slice={plane}")
        assert data.volumes is None and torch.equal(everything(data)[0, 0], cut), plane


def test_slices_of_volumes_know_their_volume(tmp_path: Path) -> None:
    where = folder(tmp_path, nifti(VOLUME, shown=(-500, 500)))
    data = open_data(f"{where}@slice=axial:1::2@8x6")
    assert len(data) == 4 and data.shape == (1, 6, 8) and data.volumes is not None
    assert data.volumes[0] == data.volumes[1] != data.volumes[2] and data.labels.tolist() in (
        [0, 0, 1, 1],
        [1, 1, 0, 0],
    )
    whole = open_data(f"{where}@slice=axial")
    assert len(whole) == 10 and len({whole.digest, data.digest, open_data(f"{where}@slice=coronal").digest}) == 3
    assert torch.equal(whole.batch(torch.tensor([7, 2, 2])).x, everything(whole)[[7, 2, 2]])
    part = whole.take(torch.tensor([9, 0]))
    assert part.volumes == (whole.volumes[9], whole.volumes[0])  # type: ignore[index]
    assert whole.digest == open_data(f"{where}@slice=axial").digest


def test_a_file_shipped_by_nibabel_is_read_as_nibabel_reads_it(tmp_path: Path) -> None:
    shipped = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    canonical = nibabel.as_closest_canonical(nibabel.load(shipped))
    values = canonical.get_fdata().transpose(2, 1, 0)
    data = open_data(f"{folder(tmp_path, shipped.read_bytes())}@window=5000:10000")
    assert data.shape == (1, *values.shape)
    torch.testing.assert_close(everything(data)[0, 0], windowed(values, 0, 10000), rtol=0, atol=1e-6)


WHOLE = nifti(VOLUME, shown=(-500, 500))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a NIfTI file"),
        (b"none at all" * 99, "a NIfTI file"),
        (WHOLE[:-1], "472 bytes, as the header says, got 471"),
        (gzip.compress(WHOLE)[:-20], "can be read"),
        (nifti(VOLUME, shape=(32767, 32767, 32767)), "MAX_VOXELS"),
        (gzip.compress(nifti(VOLUME, shape=(32767, 32767, 1000))), "MAX_VOXELS"),
        (nifti(VOLUME, shape=(3, -4, 5)), "one volume of three axes"),
        (nifti(VOLUME, shape=(3, 4, 5, 7)), "one volume of three axes"),
        (nifti(VOLUME, shape=(3, 20)), "one volume of three axes"),
        (nifti(VOLUME, magic=b"ni1\0"), "a part of a pair"),
        (nifti(VOLUME.astype("<f4") * np.float32(np.nan), shown=(0, 1)), "finite intensities"),
        (nifti(VOLUME, rows=np.full(12, np.nan), shown=(0, 1)), "a NIfTI file that can be read|how the axes lie"),
        (nifti(np.zeros((3, 4, 5), "V3")), "one whole or real number per voxel"),
        (nifti(VOLUME), "a display range in the first file"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    where = folder(tmp_path, content, "nii.gz" if content[:2] == b"\x1f\x8b" else "nii")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        everything(open_data(where))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bomb_is_inflated_no_further_than_its_header_says(tmp_path: Path) -> None:
    bomb = gzip.compress(WHOLE + bytes(2**26))
    data = open_data(folder(tmp_path, bomb, "nii.gz"))
    tracemalloc.start()
    assert everything(data).shape == (2, 1, 5, 4, 3)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_names_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = folder(tmp_path, WHOLE)
    for constant, limit in (("MAX_VOXELS", 59), ("MAX_VOLUME_BYTES", 400)):
        with monkeypatch.context() as patch, pytest.raises(DataError, match=constant):
            patch.setattr(files, constant, limit)
            open_data(where)


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        ("@slice=frame:1", "axial, coronal or sagittal"),
        ("@slice=axial:5", "a slice out of 5"),
        ("@slice=axial:5:9", "slices that are there"),
        ("@slice=axial:::0", "slices such as axial"),
        ("@slice=upwards", "a modifier"),
        ("@window=5:0", "positive width"),
        ("@64", "images that are flat"),
        ("@label=x", "other modifiers for NIfTI files, got @label"),
    ],
)
def test_says_what_is_wrong_with_a_modifier(tmp_path: Path, modifier: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(folder(tmp_path, WHOLE) + modifier)
