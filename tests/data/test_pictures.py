"""Pictures and tables as other programs write them, against Pillow, pydicom and pyarrow."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rempart.core.errors import DataError
from rempart.data import Data, files, one_image, open_data

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (6, 5)).astype(np.uint16)
PHOTO = np.kron(RNG.integers(0, 256, (3, 2, 3)), np.ones((4, 4, 1))).astype(np.uint8)  # 12 high, 8 wide


def everything(data: Data) -> torch.Tensor:
    return data.batch(torch.arange(len(data))).x


def two(root: Path, name: str, content: bytes) -> str:
    for kind in "ab":
        (root / kind).mkdir(parents=True, exist_ok=True)
        (root / kind / name).write_bytes(content)
    return str(root)


def photo(turn: int, form: str = "JPEG") -> bytes:
    stream, notes = BytesIO(), Image.Exif()
    notes[0x112] = turn
    options: dict[str, Any] = {"tiffinfo": {0x112: turn}} if form == "TIFF" else {"exif": notes.tobytes()}
    Image.fromarray(PHOTO).save(stream, form, **options)
    return stream.getvalue()


def upright(content: bytes) -> torch.Tensor:
    image = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    assert image is not None
    return torch.from_numpy(np.moveaxis(np.asarray(image.convert("RGB")), -1, 0) / np.float32(255))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright_wherever_they_come_from(tmp_path: Path, turn: int, form: str) -> None:
    content = photo(turn, form)
    expected = upright(content)
    where = two(tmp_path, f"0.{form.lower()}", content)
    assert torch.equal(everything(open_data(where))[0], expected)
    shape = tuple(expected.shape)
    path = tmp_path / "a" / f"0.{form.lower()}"
    assert torch.equal(everything(one_image(str(path), shape=shape, label=0, class_names=("a", "b")))[0], expected)
    image, size = files.decoded("upload", content, shape)
    assert torch.equal(image, expected) and size == (shape[2], shape[1])
    (tmp_path / "t.csv").write_text(f"path,label\na/0.{form.lower()},0\nb/0.{form.lower()},1\n")
    assert torch.equal(everything(open_data(str(tmp_path / "t.csv")))[1], expected)


@pytest.mark.parametrize("where", ["parquet", "saved", "arrow file"])
def test_photographs_in_tables_are_turned_too(tmp_path: Path, where: str) -> None:
    pa = pytest.importorskip("pyarrow")
    contents = [photo(turn) for turn in (6, 8, 5, 7)]
    table = pa.table({"image": pa.array(contents, pa.large_binary()), "label": ["x", "y", "x", "y"]})
    data = open_data(written(tmp_path, table, where))
    assert torch.equal(everything(data), torch.stack([upright(content) for content in contents]))


def written(root: Path, table: Any, how: str) -> str:
    """A table as a Parquet file, as `datasets` saves it, or in the file format of Arrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if how == "parquet":
        pq.write_table(table, root / "T.PARQUET")
        return str(root / "T.PARQUET")
    name = "t.arrow" if how == "arrow file" else "data-00000-of-00001.arrow"
    write = pa.ipc.new_file if how == "arrow file" else pa.ipc.new_stream
    with pa.OSFile(str(root / name), "wb") as file, write(file, table.schema) as out:
        out.write_table(table)
    if how == "arrow file":
        return str(root / name)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (root / "dataset_info.json").write_text("{}")
    return str(root)


def png(array: np.ndarray = PHOTO) -> bytes:
    stream = BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("how", ["parquet", "saved", "arrow file"])
@pytest.mark.parametrize(
    ("labels", "kind", "numbers", "names"),
    [
        (["dog", "cat", "dog"], "large_string", [1, 0, 1], ("cat", "dog")),
        (["dog", "cat", "dog"], "string_view", [1, 0, 1], ("cat", "dog")),
        (["dog", "cat", "dog"], "dictionary", [1, 0, 1], ("cat", "dog")),
        (["10", "2", "0"], "string", [10, 2, 0], tuple(map(str, range(11)))),
        ([2.0, 0.0, 1.0], "float64", [2, 0, 1], ("0", "1", "2")),
        ([True, False, True], "bool_", [1, 0, 1], ("0", "1")),
    ],
)
def test_labels_of_every_type_of_column(
    tmp_path: Path, how: str, labels: list[Any], kind: str, numbers: list[int], names: tuple[str, ...]
) -> None:
    pa = pytest.importorskip("pyarrow")
    column = pa.array(labels).dictionary_encode() if kind == "dictionary" else pa.array(labels, getattr(pa, kind)())
    data = open_data(written(tmp_path, pa.table({"image": [png()] * 3, "label": column}), how))
    assert data.labels.tolist() == numbers and data.class_names == names


def test_rows_without_a_label_are_counted(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": [png()] * 4, "label": ["a", None, "b", None]})
    with pytest.raises(DataError, match="a label in label for every image, got 2 of 4 rows"):
        open_data(written(tmp_path, table, "parquet"))


@pytest.mark.parametrize(
    "layout",
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("default/partial-train/0000.parquet", "default/partial-test/0000.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("birds-train.parquet", "birds-test.parquet"),
        ("Training/0.parquet", "Testing/0.parquet"),
    ],
)
def test_parquet_files_lie_in_folders_of_configurations_and_splits(tmp_path: Path, layout: tuple[str, str]) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, labels in zip(layout, ([0, 1, 1], [1, 0]), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [png()] * len(labels), "label": labels}), tmp_path / name)
    assert [open_data(f"{tmp_path}:{split}").labels.tolist() for split in ("train", "test")] == [[0, 1, 1], [1, 0]]
    (tmp_path / "other" / "test").mkdir(parents=True)
    pq.write_table(pa.table({"image": [png()], "label": [1]}), tmp_path / "other" / "test" / "0.parquet")
    with pytest.raises(DataError, match=r"one configuration.*got .*other"):
        open_data(str(tmp_path))


# ---- depths


def p2(array: np.ndarray, top: int) -> bytes:
    return f"P2\n5 6\n{top}\n{' '.join(map(str, array.ravel()))}\n".encode()


def saved(array: np.ndarray, form: str, **options: Any) -> bytes:
    stream = BytesIO()
    Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("0.pgm", b"P5\n5 6\n65535\n" + DEEP.astype(">u2").tobytes(), DEEP / 65535),
        ("0.PGM", b"P5\n5 6\n4095\n" + (DEEP >> 4).astype(">u2").tobytes(), (DEEP >> 4) / 4095),
        ("0.pnm", p2(DEEP, 65535), DEEP / 65535),
        ("0.pgm", p2(DEEP >> 6, 1023), (DEEP >> 6) / 1023),
        ("0.tif", saved(DEEP, "TIFF"), DEEP / 65535),
        ("0.TIFF", saved(DEEP, "TIFF", compression="tiff_lzw"), DEEP / 65535),
        ("0.jp2", saved(DEEP, "JPEG2000"), DEEP / 65535),
    ],
)
def test_sixteen_bit_pictures_are_scaled_by_their_top(
    tmp_path: Path, name: str, content: bytes, expected: np.ndarray
) -> None:
    data = open_data(two(tmp_path, name, content))
    assert data.shape == (1, 6, 5)
    torch.testing.assert_close(
        everything(data)[0, 0], torch.from_numpy(expected.astype(np.float32)), atol=1 / 65535, rtol=0
    )


@pytest.mark.parametrize("form", ["GIF", "TIFF", "PNG", "WEBP"])
def test_files_of_several_images_are_refused(tmp_path: Path, form: str) -> None:
    stream = BytesIO()
    frames = [Image.fromarray(255 * k - PHOTO if k else PHOTO) for k in range(2)]
    frames[0].save(stream, form, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"one image in a file, got several pages or frames in"):
        everything(open_data(two(tmp_path / "several", f"0.{form.lower()}", stream.getvalue())))
    stream = BytesIO()
    frames[0].save(stream, form)
    assert everything(open_data(two(tmp_path / "one", f"0.{form.lower()}", stream.getvalue()))).shape == (2, 3, 12, 8)


@pytest.mark.parametrize("ending", [".jfif", ".JPE", ".jpg", ".JFIF"])
def test_jpeg_files_have_many_endings(tmp_path: Path, ending: str) -> None:
    content = photo(1)
    assert torch.equal(everything(open_data(two(tmp_path, f"0{ending}", content)))[0], upright(content))


@pytest.mark.parametrize("last", [3, 4])
def test_arrays_of_colour_with_and_without_transparency(tmp_path: Path, last: int) -> None:
    array = RNG.integers(0, 256, (2, 6, 5, last)).astype(np.uint8)
    with (tmp_path / "T.NPZ").open("wb") as file:
        np.savez(file, x_test=array, y_test=np.array(["dog", "cat"]))
    data = open_data(str(tmp_path / "T.NPZ"))
    expected = torch.from_numpy(np.moveaxis(array[..., :3], -1, 1) / np.float32(255))
    assert data.shape == (3, 6, 5) and torch.equal(everything(data), expected)
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [1, 0]


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Training", "dev", "Testing")])
def test_split_folders_have_many_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for count, split in enumerate(names, 1):
        for kind in "ab":
            (tmp_path / split / kind).mkdir(parents=True)
            for k in range(count):
                (tmp_path / split / kind / f"{k}.png").write_bytes(png())
    assert [len(open_data(f"{tmp_path}:{split}")) for split in ("train", "val", "test")] == [2, 4, 6]


def test_a_class_may_be_called_valid(tmp_path: Path) -> None:
    for kind in ("valid", "invalid"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "0.png").write_bytes(png())
    assert open_data(str(tmp_path)).class_names == ("invalid", "valid")


# ---- DICOM


@pytest.mark.parametrize("source", ["MR_small.dcm", "CT_small.dcm"])
@pytest.mark.parametrize("function", ["SIGMOID", "LINEAR_EXACT"])
@pytest.mark.parametrize("grey", ["MONOCHROME1", "MONOCHROME2"])
def test_windows_are_those_of_pydicom(tmp_path: Path, source: str, function: str, grey: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    header = pydicom.dcmread(pydicom.data.get_testdata_file(source, download=False))
    header.VOILUTFunction, header.WindowCenter, header.WindowWidth = function, 200, 700
    header.PhotometricInterpretation = grey
    two(tmp_path, "0.dcm", b"")
    for kind in "ab":
        header.save_as(tmp_path / kind / "0.dcm")
    shift = int(header.get("RescaleIntercept", 0))
    shown = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header)
    expected = (shown - (-32768.0 + shift)) / 65535
    expected = 1 - expected if grey == "MONOCHROME1" else expected
    for window in ("", "@window=own"):
        data = open_data(f"{tmp_path}{window}")
        assert float(np.abs(everything(data)[0, 0].numpy() - expected).max()) < 1e-6
        assert data.unit == ("1" if window or function == "SIGMOID" else "HU" if source == "CT_small.dcm" else "raw")


def changed(tmp_path: Path, source: str, change: Callable[[Any], None]) -> str:
    """Class folders of a file that pydicom ships, with other tags."""
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.dcmread(pydicom.data.get_testdata_file(source, download=False))
    change(header)
    where = two(tmp_path, "0.dcm", b"")
    for kind in "ab":
        header.save_as(tmp_path / kind / "0.dcm")
    return where


def having(**tags: Any) -> Callable[[Any], None]:
    def change(header: Any) -> None:
        for tag, value in tags.items():
            setattr(header, tag, value)

    return change


@pytest.mark.parametrize(
    "tags",
    [
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"ModalityLUTSequence": [], "VOILUTSequence": []},
        {"RescaleType": None, "VOILUTFunction": None, "NumberOfFrames": None},
    ],
)
def test_tags_without_a_value_say_nothing(tmp_path: Path, tags: dict[str, Any]) -> None:
    plain = everything(open_data(changed(tmp_path / "plain", "MR_small.dcm", having())))
    assert torch.equal(everything(open_data(changed(tmp_path / "empty", "MR_small.dcm", having(**tags)))), plain)


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_the_function_of_a_window_is_read_in_any_case_or_refused(tmp_path: Path) -> None:
    """pydicom takes the name in any case too, and raises for others."""
    upper = everything(open_data(changed(tmp_path / "upper", "MR_small.dcm", having(VOILUTFunction="SIGMOID"))))
    lower = open_data(changed(tmp_path / "lower", "MR_small.dcm", having(VOILUTFunction="sigmoid")))
    assert torch.equal(everything(lower), upper) and lower.unit == "1"
    where = changed(tmp_path / "other", "MR_small.dcm", having(VOILUTFunction="CURVE"))
    with pytest.raises(DataError, match="a window as LINEAR, LINEAR_EXACT, SIGMOID, got one of another function"):
        open_data(where)
    assert open_data(f"{where}@window=600:1600").unit == "raw"


@pytest.mark.parametrize("window", ["full", "own", "40:400"])
def test_a_slope_of_nothing_is_refused(tmp_path: Path, window: str) -> None:
    where = changed(tmp_path, "CT_small.dcm", having(RescaleSlope=0))
    with pytest.raises(DataError, match="a rescale slope that is not 0"):
        everything(open_data(f"{where}@window={window}"))


def without(*tags: str) -> Callable[[Any], None]:
    def change(header: Any) -> None:
        for tag in tags:
            delattr(header, tag)

    return change


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("test-SR.dcm", without(), "Comprehensive SR Storage without pixels"),
        ("rtplan.dcm", without(), "RT Plan Storage without pixels"),
        ("waveform_ecg.dcm", without(), "12-lead ECG Waveform Storage without pixels"),
        ("MR_small.dcm", without("PixelData"), "MR Image Storage without pixels"),
        ("MR_small.dcm", having(PixelData=b""), "MR Image Storage without pixels"),
        ("MR_small.dcm", without("BitsStored"), "it lacks the tag BitsStored"),
    ],
)
def test_a_dicom_file_without_an_image_is_called_so(
    tmp_path: Path, source: str, change: Callable[[Any], None], message: str
) -> None:
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.dcmread(pydicom.data.get_testdata_file(source, download=False))
    change(header)
    two(tmp_path, "0.dcm", b"")
    for kind in "ab":
        header.save_as(tmp_path / kind / "0.dcm")
    with pytest.raises(DataError, match=message) as caught:
        everything(open_data(f"{tmp_path}@window=full"))
    assert "transfer syntax" not in str(caught.value)


@pytest.mark.parametrize("tags", [("RescaleSlope", "RescaleIntercept")])
def test_a_scan_without_rescale_is_not_in_hounsfield_units(tmp_path: Path, tags: tuple[str, ...]) -> None:
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
    without(*tags)(header)
    two(tmp_path, "0.IMA", b"")
    for kind in "ab":
        header.save_as(tmp_path / kind / "0.IMA")
    data = open_data(f"{tmp_path}@window=40:400")
    assert data.unit == "raw"
    with pytest.raises(ValueError, match="HU"):
        data.threat("linf:10HU", 0, 1)
