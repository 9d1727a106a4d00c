"""Images inside tables, written with pyarrow as Hugging Face lays them out."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rempart.core.errors import DataError
from rempart.data import Data, files, open_data, parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (7, 6, 5), dtype=np.uint8)
LABELS = [2, 0, 1, 1, 0, 2, 2]
NAMES = ["ant", "bee", "cow"]


def png(array: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def features(image: str = "image", label: str = "label") -> dict[str, Any]:
    return {image: {"_type": "Image"}, label: {"names": NAMES, "_type": "ClassLabel"}}


def rows(
    pixels: np.ndarray = PIXELS,
    labels: object = LABELS,
    *,
    image: str = "image",
    label: str = "label",
    told: bool = True,
) -> Any:
    """A table with the columns of an image data set."""
    bytes_of = [png(array) for array in pixels]
    struct = pa.StructArray.from_arrays(
        [pa.array(bytes_of, pa.binary()), pa.array(["../x.png"] * len(bytes_of), pa.string())], ["bytes", "path"]
    )
    note = {"huggingface": json.dumps({"info": {"features": features(image, label)}})} if told else None
    table = pa.table({image: struct, label: labels})
    return table.replace_schema_metadata(note)


def saved(folder: Path, table: Any, *, cut: int = 4, notes: bool = True) -> Path:
    """What `save_to_disk` writes: Arrow streams, state.json and dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-{k:05d}-of-00002.arrow" for k in range(2)]
    for name, part in zip(names, (table.slice(0, cut), table.slice(cut)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features()} if notes else {}))
    return folder


def everything(data: Data) -> torch.Tensor:
    return data.batch(torch.arange(len(data))).x


EXPECTED = torch.from_numpy(PIXELS[:, None] / np.float32(255))


def test_images_labels_and_names_come_from_the_table(tmp_path: Path) -> None:
    pq.write_table(rows(), tmp_path / "test-00000-of-00001.parquet", row_group_size=3)
    data = open_data(str(tmp_path / "test-00000-of-00001.parquet"))
    assert torch.equal(everything(data), EXPECTED) and data.labels.tolist() == LABELS
    assert (data.class_names, data.split, data.shape) == (tuple(NAMES), "test", (1, 6, 5))
    assert torch.equal(data.batch(torch.tensor([6, 0, 6, 3])).x, EXPECTED[[6, 0, 6, 3]])
    part = open_data(f"{tmp_path}@3x2@rgb:test[2:]")
    assert part.shape == (3, 2, 3) and part.index.tolist() == [2, 3, 4, 5, 6]
    with pytest.raises(DataError, match="it has test"):
        open_data(f"{tmp_path}:train")


def test_splits_are_told_by_names_of_files_or_folders(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(rows(PIXELS[:3], LABELS[:3]), tmp_path / "data" / "train-00000-of-00002.parquet")
    pq.write_table(rows(PIXELS[3:5], LABELS[3:5]), tmp_path / "data" / "train-00001-of-00002.parquet")
    (tmp_path / "validation").mkdir()
    pq.write_table(rows(PIXELS[5:], LABELS[5:]), tmp_path / "validation" / "0000.parquet")
    train, val = open_data(f"{tmp_path}:train"), open_data(f"{tmp_path}:val")
    assert torch.equal(torch.cat([everything(train), everything(val)]), EXPECTED)
    assert train.labels.tolist() + val.labels.tolist() == LABELS
    pq.write_table(rows(), tmp_path / "more.parquet")
    with pytest.raises(DataError, match="files named like their splits"):
        open_data(f"{tmp_path}:train")


def test_a_saved_dataset_and_a_parquet_file_are_the_same_data(tmp_path: Path) -> None:
    pq.write_table(rows(), tmp_path / "all.parquet", row_group_size=2)
    flat, table = open_data(str(saved(tmp_path / "flat", rows(), notes=True))), open_data(str(tmp_path / "all.parquet"))
    assert torch.equal(everything(flat), EXPECTED) and flat.class_names == tuple(NAMES) and flat.split == "all"
    assert flat.digest == table.digest != open_data(f"{tmp_path / 'all.parquet'}[:-1]").digest
    for name, part in (("train", rows(PIXELS[:4], LABELS[:4])), ("test", rows(PIXELS[4:], LABELS[4:]))):
        saved(tmp_path / "both" / name, part, cut=2)
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert torch.equal(everything(open_data(str(tmp_path / "both"))), EXPECTED[4:])
    assert open_data(f"{tmp_path / 'both'}:train").labels.tolist() == LABELS[:4]


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    where = tmp_path / "x.parquet"
    pq.write_table(rows(image="img", label="coarse").append_column("fine", pa.array(LABELS[::-1])), where)
    assert open_data(str(where)).labels.tolist() == LABELS, "by the features"
    assert open_data(f"{where}@label=fine").labels.tolist() == LABELS[::-1]
    assert open_data(f"{where}@label=fine").class_names == ("0", "1", "2")
    pq.write_table(rows(image="picture", label="kind", told=False), where)
    with pytest.raises(DataError, match=r"one column of images, got picture, kind; name it: @image=COLUMN"):
        open_data(str(where))
    assert torch.equal(everything(open_data(f"{where}@image=picture@label=kind")), EXPECTED)
    pq.write_table(rows(labels=[NAMES[k] for k in LABELS], told=False), where)
    words = open_data(str(where))
    assert words.labels.tolist() == LABELS and words.class_names == tuple(NAMES)


def test_bytes_without_a_struct_are_read(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([png(array) for array in PIXELS]), "label": LABELS})
    pq.write_table(table, tmp_path / "x.parquet")
    assert torch.equal(everything(open_data(str(tmp_path / "x.parquet"))), EXPECTED)


# ---- what is refused


@pytest.mark.parametrize("told", [{"info": None}, {"info": {"features": None}}, {"info": {"features": []}}, None, []])
def test_notes_that_are_null_say_nothing(tmp_path: Path, told: Any) -> None:
    table = rows(labels=[0, 1, 1, 0, 1, 0, 1]).replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, tmp_path / "x.parquet")
    data = open_data(str(tmp_path / "x.parquet"))
    assert data.class_names == ("0", "1") and data.labels.tolist() == [0, 1, 1, 0, 1, 0, 1]


def broken(kind: str, folder: Path) -> str:
    where = folder / "x.parquet"
    if kind == "no table":
        where.write_bytes(b"PAR1 nothing PAR1")
    elif kind == "cut":
        pq.write_table(rows(), where)
        where.write_bytes(where.read_bytes()[:-40])
    elif kind == "paths":
        empty = pa.array([None] * 7, pa.binary())
        struct = pa.StructArray.from_arrays([empty, pa.array(["/etc/passwd"] * 7)], ["bytes", "path"])
        pq.write_table(pa.table({"image": struct, "label": LABELS}), where)
    elif kind == "paths alone":
        pq.write_table(pa.table({"image": [{"path": "/etc/passwd"}] * 7, "label": LABELS}), where)
    elif kind == "names":
        pq.write_table(rows(labels=[5, 0, 1, 1, 0, 2, 2]), where)
    elif kind == "unlabelled":
        pq.write_table(rows(labels=[-1] * 7), where)
    elif kind == "names that are none":
        table = rows()
        told = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": 5}}}}
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(told)}), where)
    elif kind == "numbers":
        pq.write_table(pa.table({"image": LABELS, "label": LABELS}), where)
    elif kind == "no image":
        pq.write_table(pa.table({"image": [b"none"] * 7, "label": LABELS}), where)
    elif kind in ("compressed", "escape", "selection", "offsets"):
        where = saved(folder / kind, rows())
        state = json.loads((where / "state.json").read_text())
        if kind == "escape":
            state["_data_files"][0]["filename"] = "../data.arrow"
        if kind == "selection":
            state["_indices_files"] = [{"filename": "indices.arrow"}]
        (where / "state.json").write_text(json.dumps(state))
        if kind == "compressed":
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            name = str(where / "data-00000-of-00002.arrow")
            with pa.OSFile(name, "wb") as file, pa.ipc.new_stream(file, rows().schema, options=options) as stream:
                stream.write_table(rows())
        if kind == "offsets":  # of the first image: far behind the end of the file
            name = where / "data-00000-of-00002.arrow"
            size = len(png(PIXELS[0]))
            second = size + len(png(PIXELS[1]))
            old = np.array([0, size, second], "<i4").tobytes()
            assert name.read_bytes().count(old)
            name.write_bytes(name.read_bytes().replace(old, np.array([0, 2**30, 2**30 + 9], "<i4").tobytes()))
    return str(where)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no table", "a table of images that is whole"),
        ("cut", "a table of images that is whole"),
        ("paths", "paths in it are not followed"),
        ("paths alone", "paths in it are not followed"),
        ("names", "labels that number two or more class names"),
        ("unlabelled", "labels that number two or more class names"),
        ("names that are none", "a list of at most 100,000 class names, got int"),
        ("numbers", "bytes of image files"),
        ("no image", "an image"),
        ("compressed", "not compressed"),
        ("escape", "the files that state.json names, beside it"),
        ("selection", "rows in the order of their file"),
        ("offsets", "a table of images that is whole"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        everything(open_data(broken(kind, tmp_path)))


def test_a_table_that_repeats_one_image_ten_thousand_times_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = png(RNG.integers(0, 256, (200, 200), dtype=np.uint8))
    table = pa.table({"image": [large] * 10_000, "label": [0, 1] * 5000})
    pq.write_table(table, tmp_path / "x.parquet", data_page_size=2**20)
    assert (tmp_path / "x.parquet").stat().st_size < 2**20 < len(large) * 10_000
    monkeypatch.setattr(files, "MAX_VOLUME_BYTES", 2**23)
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match="MAX_VOLUME_BYTES"):
        open_data(str(tmp_path / "x.parquet"))
    assert pa.total_allocated_bytes() - before < 2**24


def test_a_label_that_is_long_and_repeated_is_refused(tmp_path: Path) -> None:
    labels = ["a" * 2**16, "b"] * 5000
    pq.write_table(pa.table({"image": [b"x"] * 10_000, "label": labels}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="at most 500 letters"):
        open_data(str(tmp_path / "x.parquet"))


def test_names_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(rows(), tmp_path / "x.parquet")
    for constant in ("MAX_ENTRIES", "MAX_TOTAL_BYTES", "MAX_VOLUME_BYTES", "MAX_IMAGE_BYTES"):
        parquet._images.cache_clear()
        with monkeypatch.context() as patch, pytest.raises(DataError, match=constant):
            patch.setattr(files, constant, 3)
            everything(open_data(str(tmp_path / "x.parquet")))
