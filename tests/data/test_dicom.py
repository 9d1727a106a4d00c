"""DICOM files against intensities worked out from the bytes by hand."""

import os
import pickle
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rempart.core.errors import DataError
from rempart.data import Data, files, open_data

pydicom = pytest.importorskip("pydicom")
RNG = np.random.default_rng(0)
SIGNED = RNG.integers(-1100, 2000, (6, 5)).astype(np.int16)


def dicom(pixels: np.ndarray, **tags: Any) -> bytes:
    """A file with these stored values."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=["a"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.RescaleSlope, made.RescaleIntercept = 1, 0
    made.Modality, made.PatientName, made.PatientID = "CT", "Doe^Jane", "4711"
    colour = pixels.ndim > 2 and pixels.shape[-1] == 3
    made.SamplesPerPixel, made.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        made.PlanarConfiguration = 0
    made.Rows, made.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    if pixels.ndim - colour == 3:
        made.NumberOfFrames = len(pixels)
    bits = 8 * pixels.dtype.itemsize
    made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
    made.PixelRepresentation = int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    made["PixelData"].VR = "OW" if bits > 8 else "OB"
    for key, value in tags.items():
        setattr(made, key, value)
    stream = BytesIO()
    made.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def folder(root: Path, **contents: bytes) -> Path:
    """Class folders: the name says class and file, `ant_0` is ant/0.dcm."""
    for name, content in contents.items():
        kind, _, number = name.partition("_")
        (root / kind).mkdir(parents=True, exist_ok=True)
        (root / kind / (number if "." in number else f"{number}.dcm")).write_bytes(content)
    return root


def everything(data: Data) -> torch.Tensor:
    return data.batch(torch.arange(len(data))).x


def test_intensities_are_rescaled_windowed_and_kept_as_floats(tmp_path: Path) -> None:
    content = dicom(SIGNED, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=40, WindowWidth=400)
    where = folder(tmp_path, ant_0=content, bee_0=content)
    hounsfield = SIGNED * 2.0 - 100
    for spec, (low, high) in {
        "": (-160, 240),
        "@window=-50:1500": (-800, 700),
        "@window=full": (-65636, 65434),
    }.items():
        data = open_data(f"{where}{spec}")
        expected = np.clip((hounsfield - low) / (high - low), 0, 1).astype(np.float32)
        assert (data.unit, data.span, data.shape) == ("HU", (low, high), (1, 6, 5))
        assert np.array_equal(everything(data)[0, 0].numpy(), expected)
    wide = everything(open_data(f"{where}@window=full"))[0]
    assert len(wide.unique()) == len(np.unique(SIGNED)), "sixteen bits are left, not eight"


def test_first_file_sets_the_window_of_all_and_own_windows_have_no_unit(tmp_path: Path) -> None:
    low, high = (dicom(SIGNED, WindowCenter=c, WindowWidth=100) for c in (0, 500))
    where = folder(tmp_path, ant_0=low, bee_0=high)
    shared, own = open_data(str(where)), open_data(f"{where}@window=own")
    assert shared.span in ((-50, 50), (450, 550)) and shared.unit == "HU"
    assert (own.unit, own.span) == ("1", (0, 1))
    for data in (shared, own):
        for x, y in zip(everything(data), data.labels.tolist(), strict=True):
            start = shared.span[0] if data is shared else (-50, 450)[y]
            assert np.array_equal(x[0].numpy(), np.clip((SIGNED - start) / 100, 0, 1).astype(np.float32))
    assert shared.digest != own.digest != open_data(f"{where}@window=0:100").digest


def test_monochrome1_is_turned(tmp_path: Path) -> None:
    both = {
        f"{kind}_0": dicom(SIGNED, PhotometricInterpretation=f"MONOCHROME{k}", WindowCenter=0, WindowWidth=900)
        for k, kind in ((1, "one"), (2, "two"))
    }
    x = everything(data := open_data(str(folder(tmp_path, **both))))
    assert data.class_names == ("one", "two")
    torch.testing.assert_close(x[data.labels == 0], 1 - x[data.labels == 1])


def test_frames_are_a_volume_or_slices_of_one(tmp_path: Path) -> None:
    frames = RNG.integers(0, 4096, (4, 6, 5)).astype(np.uint16)
    content = dicom(frames, WindowCenter=2048, WindowWidth=4096, SeriesInstanceUID="1.2.3", Modality="MR")
    where = folder(tmp_path, ant_0=content, bee_0=content)
    expected = torch.from_numpy((frames / 4096).astype(np.float32))
    whole, slices = open_data(str(where)), open_data(f"{where}@slice=frame:1::2")
    assert whole.shape == (1, 4, 6, 5) and torch.equal(everything(whole)[0, 0], expected) and whole.unit == "raw"
    assert slices.shape == (1, 6, 5) and torch.equal(everything(slices)[:2, 0], expected[[1, 3]])
    assert slices.labels.tolist() == [0, 0, 1, 1] or slices.labels.tolist() == [1, 1, 0, 0]
    assert slices.volumes is not None and len(set(slices.volumes)) == 1, "one series"
    last = open_data(f"{where}@slice=frame:-1")
    assert torch.equal(everything(last)[0, 0], expected[3])
    with pytest.raises(DataError, match="a slice out of 4"):
        open_data(f"{where}@slice=frame:4")


def test_slices_of_flat_images_are_refused(tmp_path: Path) -> None:
    where = folder(tmp_path, ant_0=WHOLE, bee_0=WHOLE)
    with pytest.raises(DataError, match="volumes, to take slices of them"):
        open_data(f"{where}@slice=frame")


def test_every_frame_has_its_own_rescale(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset

    groups: list[Dataset] = []
    for k in range(2):
        group, rescale = Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = k + 1, -10 * k, "HU"
        group.PixelValueTransformationSequence = [rescale]
        groups.append(group)
    stored = RNG.integers(0, 100, (2, 6, 5)).astype(np.uint16)
    content = dicom(stored, PerFrameFunctionalGroupsSequence=groups)
    x = everything(open_data(f"{folder(tmp_path, ant_0=content, bee_0=content)}@window=100:200"))[0, 0]
    expected = np.stack([stored[0], stored[1] * 2.0 - 10]) / 200
    torch.testing.assert_close(x, torch.from_numpy(expected.clip(0, 1).astype(np.float32)))
    assert open_data(f"{tmp_path}@window=full").span == (-10, 2 * 65535 - 10), "what any of the frames can hold"


def test_colour_images_are_pixels(tmp_path: Path) -> None:
    colour = RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8)
    data = open_data(str(folder(tmp_path, ant_0=dicom(colour, Modality="US"), bee_0=dicom(colour, Modality="US"))))
    assert (data.unit, data.shape) == ("1", (3, 6, 5))
    assert torch.equal(everything(data)[0], torch.from_numpy(colour.transpose(2, 0, 1) / np.float32(255)))
    with pytest.raises(DataError, match="other modifiers for colour images, got @window"):
        open_data(f"{tmp_path}@window=40:400")


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    stored, colours = RNG.integers(0, 4, (6, 5)).astype(np.uint8), RNG.integers(0, 256, (3, 256)).astype(np.uint8)
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, column in zip(("Red", "Green", "Blue"), colours, strict=True):
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        tags[f"{name}PaletteColorLookupTableData"] = column.tobytes()
    data = open_data(str(folder(tmp_path, ant_0=dicom(stored, **tags), bee_0=dicom(stored, **tags))))
    assert data.shape == (3, 6, 5)
    assert torch.equal(everything(data)[0], torch.from_numpy(colours[:, stored] / np.float32(255)))


def test_files_without_an_ending_and_in_zips_are_found(tmp_path: Path) -> None:
    content = dicom(SIGNED, WindowCenter=0, WindowWidth=900)
    for name in ("ant/IM0001", "bee/1.2.840.7"):
        (tmp_path / "f" / name).parent.mkdir(parents=True)
        (tmp_path / "f" / name).write_bytes(content)
    (tmp_path / "f" / "ant" / "README").write_bytes(b"no image")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in sorted((tmp_path / "f").rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(tmp_path / "f"))
    here, there = open_data(str(tmp_path / "f")), open_data(str(tmp_path / "x.zip"))
    assert len(here) == 2 and here.digest == there.digest and torch.equal(everything(here), everything(there))


def test_resized_images_are_those_of_torch(tmp_path: Path) -> None:
    stored = RNG.integers(0, 1000, (24, 20)).astype(np.uint16)
    content = dicom(stored, WindowCenter=500, WindowWidth=1000)
    x = everything(open_data(f"{folder(tmp_path, ant_0=content, bee_0=content)}@7x5@rgb"))
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(stored / 1000)[None, None], size=(5, 7), mode="bilinear", antialias=True
    )
    assert x.shape == (2, 3, 5, 7)
    assert float((x[:1] - expected).abs().max()) < 1e-3


def test_patients_are_told_apart_and_not_told(tmp_path: Path) -> None:
    a, b = (dicom(SIGNED, PatientID=p, WindowCenter=0, WindowWidth=900) for p in ("4711", "0815"))
    data = open_data(str(folder(tmp_path, ant_0=a, ant_1=b, bee_0=a, bee_1=b)))
    assert data.patients is not None and len(set(data.patients)) == 2
    assert "4711" not in repr(data) and "Doe" not in repr(data)
    part = data.take(torch.tensor([2, 0]))
    assert part.patients == (data.patients[2], data.patients[0])
    nobody = open_data(str(folder(tmp_path, ant_2=dicom(SIGNED, PatientID="", WindowCenter=0, WindowWidth=900))))
    assert nobody.patients is None


def test_a_file_shipped_by_pydicom_has_its_own_units(tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    path = Path(str(get_testdata_file("CT_small.dcm", download=False)))
    content = path.read_bytes()
    where = folder(tmp_path, ant_0=content, bee_0=content)
    with pytest.raises(DataError, match=r"a window in the first file.*@window=40:400"):
        open_data(str(where))
    data = open_data(f"{where}@window=40:400")
    raw = np.frombuffer(content[-(128 * 128 * 2) - 138 - 8 :], dtype="<i2")  # pixels, then the padding behind them
    assert data.unit == "HU" and data.shape == (1, 128, 128)
    header = pydicom.dcmread(path)
    stored = np.frombuffer(header.PixelData, "<i2").reshape(128, 128)
    assert len(raw) and (header.RescaleSlope, header.RescaleIntercept) == (1, -1024)
    expected = ((stored - 1024.0 + 160) / 400).clip(0, 1).astype(np.float32)
    assert np.array_equal(everything(data)[0, 0].numpy(), expected)
    magnetic = Path(str(get_testdata_file("MR_small.dcm", download=False))).read_bytes()
    own = open_data(str(folder(tmp_path / "mr", ant_0=magnetic, bee_0=magnetic)))
    assert (own.unit, own.span, own.shape) == ("raw", (-200, 1400), (1, 64, 64))


# ---- what is refused


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch trapped",)


WHOLE = dicom(SIGNED, WindowCenter=0, WindowWidth=900)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Trap()), "a DICOM file with the letters DICM"),
        (b"\0" * 128 + b"DICM" + pickle.dumps(Trap()), "a DICOM file that can be read"),
        (b"", "a DICOM file with the letters DICM"),
        (WHOLE[:-30], "a DICOM file that can be read"),
        (dicom(SIGNED, Rows=60000, Columns=60000), "MAX_PIXELS"),
        (dicom(SIGNED, NumberOfFrames=10**9), "MAX_VOXELS"),
        (dicom(SIGNED, Rows=0), "positive size"),
        (dicom(SIGNED, Rows=7, WindowCenter=0, WindowWidth=9), "a DICOM file that can be read"),
        (dicom(SIGNED, WindowCenter=0, WindowWidth=9, RescaleSlope="1e308"), "finite intensities"),
        (dicom(SIGNED, WindowCenter=0, WindowWidth=0), "a window of positive width"),
        (dicom(SIGNED, PhotometricInterpretation="CMYK"), "pixels as MONOCHROME1"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "x", ant_0=content, bee_0=content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message) as caught:
        everything(open_data("x"))
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"
    assert "Doe" not in str(caught.value) and "4711" not in str(caught.value)


def test_deflated_files_are_not_inflated(tmp_path: Path) -> None:
    import zlib

    start = WHOLE.index(b"1.2.840.10008.1.2.1\0")
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packed.compress(bytes(2**24)) + packed.flush()
    content = WHOLE[:start] + b"1.2.840.10008.1.2.1.99" + WHOLE[start + 20 :][:200] + bomb
    with pytest.raises(DataError, match="deflated"):
        open_data(str(folder(tmp_path, ant_0=content, bee_0=content)))


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    from PIL import Image

    folder(tmp_path, ant_0=WHOLE, bee_0=WHOLE)
    Image.fromarray(np.zeros((6, 5), np.uint8)).save(tmp_path / "ant" / "1.png")
    with pytest.raises(DataError, match=r"files of one kind, got .*DICOM.*picture|picture.*DICOM"):
        open_data(str(tmp_path))


def test_size_of_a_volume_file_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = folder(tmp_path, ant_0=WHOLE, bee_0=WHOLE)
    monkeypatch.setattr(files, "MAX_VOLUME_BYTES", 300)
    with pytest.raises(DataError, match="MAX_VOLUME_BYTES"):
        open_data(str(where))


def test_images_of_two_sizes_are_told_with_both_and_what_resizes_them(tmp_path: Path) -> None:
    for name, height in (("a/1.dcm", 4), ("b/2.dcm", 6)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(dicom(SIGNED[:1].repeat(height, 0)))
    data = open_data(f"{tmp_path}@window=0:100")
    with pytest.raises(DataError, match=r"one size, (\d+x[46]) like [ab]/.\.dcm, got \d+x[46] in .*; add @\1 to"):
        data.batch(torch.arange(2))
    assert open_data(f"{tmp_path}@window=0:100@5x5").batch(torch.arange(2)).x.shape == (2, 1, 5, 5)
