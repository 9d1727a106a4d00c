import gzip
import hashlib
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from rempart.core.errors import DataError, ThreatError
from rempart.data import Data, files, open_data, samples

REAL = Path(os.environ.get("REMPART_DATA") or Path(__file__).resolve().parents[2] / "../shared/data")
RNG = np.random.default_rng(0)


def encoded(array: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    file = BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def written(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def zipped(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def everything(data: Data) -> torch.Tensor:
    return data.batch(torch.arange(len(data))).x


def unit(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32) / np.float32(255))


ARRAYS = {f"{split}/{c}/{k}.png": pixels(6, 5) for split in ("train", "test") for c in ("ant", "bee") for k in range(4)}
FILES = {name: encoded(array) for name, array in ARRAYS.items()}


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    images, labels = pixels(7, 4, 3), np.array([2, 0, 1, 2, 2, 0, 1], dtype=np.uint8)
    train = {"train-images-idx3-ubyte.gz": gzip.compress(idx(images[:2])), "train-labels.idx1-ubyte": idx(labels[:2])}
    test = {"t10k-images.idx3-ubyte": idx(images), "t10k-labels-idx1-ubyte.gz": gzip.compress(idx(labels))}
    return written(tmp_path / "somewhere", train | test), images, labels


# ---- Data


def test_parts_keep_sample_numbers_and_order(mnist: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, images, labels = mnist
    data = open_data(f"mnist:{folder}")
    part = data.take(torch.tensor([6, 1, 4])).take(torch.tensor([2, 0]))
    assert part.index.tolist() == [4, 6] and len(part) == 2 and part.num_classes == 3
    batch = part.batch(torch.tensor([1]))
    assert batch.index.tolist() == [6] and batch.y.tolist() == [labels[6]]
    assert torch.equal(batch.x, unit(images[[6], None]))
    assert data.head(3).index.tolist() == [0, 1, 2]
    assert data.head(None) is data and data.head(99) is data
    batches = list(data.batches(3))
    assert [len(b.index) for b in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([b.x for b in batches]), unit(images[:, None]))
    assert batches[0].x.dtype == torch.float32 and batches[0].y.dtype == batches[0].index.dtype == torch.int64


@pytest.mark.parametrize("use", [lambda d: d.head(0), lambda d: d.batches(0)])
def test_refuses_empty_requests(use: object) -> None:
    with pytest.raises(DataError, match=">= 1, got 0"):
        use(open_data("digits"))  # type: ignore[operator]


def test_reading_does_not_hand_out_the_stored_tensor() -> None:
    data = open_data("digits[:2]")
    before = everything(data).clone()
    everything(data).zero_()
    assert torch.equal(everything(data), before)


def test_every_byte_survives_load_as_a_byte(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = zipped(tmp_path / "x.zip", {"a/0.png": encoded(ramp), "b/0.png": encoded(255 - ramp)})
    data = open_data(str(path))
    loaded = data.load()
    assert loaded.read.images.dtype == torch.uint8  # pyright: ignore
    path.unlink()
    assert torch.equal(everything(loaded).sum(0), torch.ones(1, 16, 16)) and loaded.load() is loaded


def test_load_keeps_sample_numbers_of_a_part(tmp_path: Path) -> None:
    data = open_data(f"{zipped(tmp_path / 'x.zip', FILES)}[::-3]")
    loaded = data.load()
    assert loaded.index.tolist() == [7, 4, 1]
    assert torch.equal(everything(loaded), everything(data))
    assert torch.equal(everything(loaded.take(torch.tensor([2]))), everything(data)[2:])


def test_load_goes_over_to_floats_when_bytes_would_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_CHUNK", 2)
    deep = np.full((6, 5), 12345, dtype=np.uint16)
    written(tmp_path, {**{f"a/{k}.png": encoded(pixels(6, 5)) for k in range(5)}, "b/0.png": encoded(deep)})
    data = open_data(f"{tmp_path}")
    order = torch.tensor(sorted(range(6), key=lambda k: int(data.labels[k])))  # the 16-bit image comes last
    loaded = data.take(order).load()
    assert loaded.read.images.dtype == torch.float32  # pyright: ignore
    assert torch.equal(everything(loaded), everything(data)[order])


def test_digest_is_one_for_folder_zip_and_load_and_tells_changes(tmp_path: Path) -> None:
    folder = open_data(str(written(tmp_path / "f", FILES)))
    archive = open_data(str(zipped(tmp_path / "x.zip", FILES)))
    stored = open_data(str(zipped(tmp_path / "y.zip", FILES, zipfile.ZIP_STORED)))
    assert folder.digest == archive.digest == stored.digest == archive.load().digest
    changed = ARRAYS["test/ant/1.png"].copy()
    changed[0, 0] ^= 1
    other = zipped(tmp_path / "z.zip", {**FILES, "test/ant/1.png": encoded(changed)})
    different = [open_data(str(other)), archive.head(3), archive.take(torch.arange(8).flip(0))]
    different += [open_data(f"{tmp_path / 'x.zip'}{words}") for words in ("@3", "@rgb", ":train")]
    assert len({archive.digest, *(d.digest for d in different)}) == 7
    named = [zipped(tmp_path / f"{k}.zip", {f"{c}/{k}.png": encoded(changed) for c in "ab"}) for k in (0, 2)]
    first, second = (open_data(str(path)) for path in named)  # the same images and labels in the same order
    assert torch.equal(first.labels, second.labels) and first.digest != second.digest


def test_digest_of_arrays_tells_pixels_and_labels() -> None:
    data = open_data("digits[:9]")
    labels, images = data.labels.clone(), everything(data)
    labels[0] += 1
    images[8, 0, 7, 7] += 1 / 16
    relabelled = Data(data.source, "test", data.index, labels, data.shape, data.class_names, data.read)
    repainted = Data(data.source, "test", data.index, data.labels, data.shape, data.class_names, images.__getitem__)
    moved = Data(
        data.source, "test", data.index + 1, data.labels, data.shape, data.class_names, lambda n: data.read(n - 1)
    )
    assert len({data.digest, relabelled.digest, repainted.digest, moved.digest}) == 4
    assert data.digest == open_data("digits[:9]").digest


# ---- specs


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(bounds=st.lists(st.none() | st.integers(-12, 12), min_size=2, max_size=3))
def test_slices_are_those_of_python(mnist: tuple[Path, np.ndarray, np.ndarray], bounds: list[int | None]) -> None:
    text = f"[{':'.join('' if b is None else str(b) for b in bounds)}]"
    if len(bounds) == 3 and bounds[2] == 0:
        with pytest.raises(DataError, match="a slice such as"):
            open_data(f"mnist:{mnist[0]}{text}")
        return
    expected = list(range(7))[slice(*bounds)]
    if expected:
        data = open_data(f"mnist:{mnist[0]}:test{text}")
        assert data.index.tolist() == expected and data.source == f"mnist:test{text}"
        assert data.labels.tolist() == mnist[2][expected].tolist()
    else:
        with pytest.raises(DataError, match="at least one sample"):
            open_data(f"mnist:{mnist[0]}{text}")


@pytest.mark.parametrize(
    ("ending", "source", "shape"),
    [
        ("", "birds.zip:test", (1, 6, 5)),
        (":train[1:]", "birds.zip:train[1:]", (1, 6, 5)),
        ("@4", "birds.zip@4:test", (1, 4, 4)),
        ("@4x3@rgb:test", "birds.zip@4x3@rgb:test", (3, 3, 4)),
        ("@grey@2[:2]", "birds.zip@grey@2:test[:2]", (1, 2, 2)),
    ],
)
def test_source_is_the_spec_without_directories(tmp_path: Path, ending: str, source: str, shape: object) -> None:
    data = open_data(f"{zipped(tmp_path / 'birds.zip', FILES)}{ending}")
    assert (data.source, data.shape, everything(data).shape[1:]) == (source, shape, shape)
    alias = open_data(f"cifar10:{tmp_path / 'birds.zip'}{ending}")
    assert alias.source == source.replace("birds.zip", "cifar10")


def test_the_spec_names_the_split_before_the_argument() -> None:
    assert open_data("digits", split="train").source == "digits:train"
    assert open_data("digits:test", split="train").source == "digits:test"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digts", r"data out of digits, mnist:DIR.*got 'digts'; did you mean 'digits'\?"),
        ("", "data out of digits"),
        ("mnist", "mnist:PATH"),
        ("mnist:/no/where", "a path that exists, got '/no/where'"),
        ("/no/where.zip", "a path that exists"),
        ("x" * 5000, "data out of digits"),
        ("~nobody-here/x", "a path that exists"),
        ("digits:tset", r"a split.*got :tset; did you mean 'test'\?"),
        ("digits:val", "a split that digits has, got val; it has train, test"),
        ("digits@32", "modifiers on folders and zips"),
        ("digits[3]", "a slice such as"),
        ("digits[:3", "a slice such as"),
        ("digits[a:b]", "a slice such as"),
        ("digits[5:5]", "at least one sample"),
    ],
)
def test_says_what_is_wrong_with_a_spec(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(spec)


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("@gray", r"a modifier.*got @gray; did you mean 'grey'\?"),
        ("@0", "a modifier"),
        ("@99999", "MAX_PIXELS"),
        (":val", "it has train, test"),
        (":tests", "did you mean 'test'"),
    ],
)
def test_says_what_is_wrong_with_an_ending(tmp_path: Path, ending: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(f"{zipped(tmp_path / 'x.zip', FILES)}{ending}")


def test_refuses_files_of_other_kinds_and_unknown_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data out of digits.*x\.tar"):
        open_data(str(written(tmp_path, {"x.tar": b""}) / "x.tar"))
    with pytest.raises(DataError, match="'dev'"):
        open_data("digits", split="dev")


# ---- arrays


def test_digits_are_split_by_class_without_loss() -> None:
    images, labels = load_digits(return_X_y=True)
    train, test = open_data("digits:train"), open_data("digits:test")
    rows = Counter((*image.tolist(), int(label)) for image, label in zip(images / 16, labels, strict=True))
    got = Counter(
        (*image.flatten().tolist(), int(label))
        for data in (train, test)
        for image, label in zip(everything(data), data.labels, strict=True)
    )
    assert got == rows and (len(train), len(test)) == (1343, 454) and test.shape == (1, 8, 8)
    counts = np.bincount(labels)
    assert test.labels.bincount().tolist() == [-(-n // 4) for n in counts]


def test_idx_files_are_read_exactly(mnist: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder, images, labels = mnist
    # the only 2 train labels are 2 and 0, so K is 3 for both splits
    test, train = open_data(f"mnist:{folder}"), open_data(f"mnist:{folder}:train")
    assert torch.equal(everything(test), unit(images[:, None])) and test.labels.tolist() == labels.tolist()
    assert torch.equal(everything(train), unit(images[:2, None])) and train.class_names == ("0", "1", "2")
    assert (test.source, test.split, test.shape) == ("mnist:test", "test", (1, 4, 3))
    with pytest.raises(DataError, match="it has train, test"):
        open_data(f"mnist:{folder}:val")


GOOD, GOOD_LABELS = idx(np.zeros((2, 4, 3), np.uint8)), idx(np.zeros(7, np.uint8))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t10k-images.idx3-ubyte", GOOD, "as many labels as images, got 7 labels for 2"),
        ("t10k-images.idx3-ubyte", b"\0\0\x08\x01" + GOOD[4:], "magic number 00000803, got 00000801 in t10k-images"),
        ("t10k-images.idx3-ubyte", GOOD[:9], "an IDX header"),
        ("t10k-images.idx3-ubyte", b"", "an IDX header"),
        ("t10k-images.idx3-ubyte", GOOD[:-1], "24 bytes after the header, got 23"),
        ("t10k-images.idx3-ubyte", GOOD + b"\0", "24 bytes after the header, got more"),
        ("t10k-images.idx3-ubyte", GOOD[:4] + b"\xff" * 12, "MAX_TOTAL_BYTES"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(GOOD_LABELS, mtime=0)[:-12], "an IDX file that is whole"),
        ("t10k-labels-idx1-ubyte.gz", GOOD, "an IDX file that is whole"),
        (
            "t10k-labels-idx1-ubyte.gz",
            gzip.compress(idx(np.full(7, 3, np.uint8)), mtime=0),
            "in 0 to 2, as in train, got 3",
        ),
        ("train-labels.idx1-ubyte", idx(np.zeros(2, np.uint8)), "2 to 100,000 classes.*got 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_broken_idx(
    mnist: tuple[Path, np.ndarray, np.ndarray], name: str, content: bytes, message: str
) -> None:
    (mnist[0] / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data(f"mnist:{mnist[0]}")


def saved(tmp_path: Path, images: object, labels: object, **more: object) -> str:
    np.savez_compressed(tmp_path / "d.npz", test_images=images, test_labels=labels, **more)  # pyright: ignore
    return str(tmp_path / "d.npz")


LABELS = np.array([[1], [0], [1]], dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((3, 4, 5), (0, 1, 2), (1, 4, 5)),
        ((3, 4, 5, 1), (0, 3, 1, 2), (1, 4, 5)),
        ((3, 4, 5, 3), (0, 3, 1, 2), (3, 4, 5)),
        ((3, 4, 5, 6), (0, 1, 2, 3), (1, 4, 5, 6)),
        ((3, 4, 5, 6, 3), (0, 4, 1, 2, 3), (3, 4, 5, 6)),
    ],
)
def test_npz_shapes(tmp_path: Path, shape: tuple[int, ...], axes: tuple[int, ...], expected: object) -> None:
    array = pixels(*shape)
    data = open_data(saved(tmp_path, array, LABELS))
    assert data.shape == expected and data.source == "d.npz:test" and data.labels.tolist() == [1, 0, 1]
    assert torch.equal(everything(data), unit(array.transpose(axes)).reshape(3, *data.shape))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "f4", "f8", ">f4"])
def test_npz_of_16_bit_and_floats(tmp_path: Path, dtype: str) -> None:
    whole = np.array([0, 1, 256, 65535], dtype=np.uint16).reshape(1, 2, 2).repeat(3, 0)
    expected = whole.astype(np.float64) / 65535
    data = open_data(saved(tmp_path, whole.astype(dtype) if "u" in dtype else expected.astype(dtype), LABELS))
    assert torch.equal(everything(data), torch.from_numpy(expected.astype(np.float32))[:, None])


def test_training_labels_define_the_classes_of_npz(tmp_path: Path) -> None:
    train = {"train_images": pixels(1, 4, 4), "train_labels": np.array([6])}
    assert open_data(saved(tmp_path, pixels(3, 4, 4), LABELS, **train)).num_classes == 7
    with pytest.raises(DataError, match="it has train, test"):
        open_data(f"{tmp_path / 'd.npz'}:val")


ZEROS = np.zeros((3, 4, 4))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (ZEROS, np.array([0, 1]), "as many labels as images, got 2 labels for 3"),
        (ZEROS, np.array([0, -1, 1]), "whole numbers >= 0, got -1"),
        (ZEROS, np.array([0, 0.5, 1]), r"whole numbers >= 0, got 0\.5"),
        (ZEROS, np.array([0, np.nan, 1]), "whole numbers >= 0, got nan"),
        (ZEROS, np.array([0, 1, 10**9]), "2 to 100,000 classes"),
        (ZEROS, np.zeros((3, 2), int), r"one number per image, got shape \(3, 2\)"),
        (ZEROS, np.array([0, 1, None]), "plain arrays"),
        (ZEROS + 255, LABELS, r"pixels in \[0, 1\], got \[255, 255\] in test_images; scale"),
        (ZEROS - 0.1, LABELS, r"got \[-0\.1, -0\.1\]"),
        (ZEROS * np.nan, LABELS, "got NaN"),
        (ZEROS + np.inf, LABELS, r"\[inf, inf\]"),
        (ZEROS.astype(int), LABELS, "uint8, uint16 or float"),
        (ZEROS[0], LABELS, "of shape N x H x W"),
        (ZEROS[:, :0], LABELS, "of shape N x H x W"),
        (np.zeros((3, 4, 4, 4, 2)), LABELS, "of shape N x H x W"),
    ],
)
def test_refuses_unusable_npz(tmp_path: Path, images: np.ndarray, labels: np.ndarray, message: str) -> None:
    path = saved(tmp_path, images, labels)
    with pytest.raises(DataError, match=message):
        open_data(path)


@pytest.mark.parametrize("shape", [(2, 4, 5), (3, 4, 5), (1, 3, 4, 5), (7,)])
def test_the_images_of_an_attack_are_one_split_as_the_model_took_them(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).random((5, *shape), dtype=np.float32)
    np.savez(tmp_path / "adv.npz", index=np.arange(20, 25), x_adv=x, y=np.array([0, 3, 1, 2, 2]), broken=np.ones(5))
    for split in ("train", "test"):
        data = open_data(f"{tmp_path / 'adv.npz'}[1:]", split=split)
        assert (data.split, data.source, data.shape, data.num_classes) == ("all", "adv.npz[1:]", shape, 4)
        assert data.index.tolist() == [1, 2, 3, 4] and data.labels.tolist() == [3, 1, 2, 2]
        assert np.array_equal(data.read(data.index).numpy(), x[1:])
    for wrong, message in (
        (x * 3, r"pixels in \[0, 1\].*x_adv"),
        (x[:, :0], "x_adv of shape"),
        (x[:4], "5 labels for 4"),
    ):
        np.savez(tmp_path / "adv.npz", x_adv=wrong, y=np.array([0, 3, 1, 2, 2]))
        with pytest.raises(DataError, match=message):
            open_data(str(tmp_path / "adv.npz"))


def test_refuses_npz_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(saved(tmp_path, ZEROS, LABELS))
    with monkeypatch.context() as patch, pytest.raises(DataError, match="MAX_TOTAL_BYTES"):
        patch.setattr(files, "MAX_TOTAL_BYTES", 500)
        open_data(str(path))
    header = b"\x93NUMPY\1\0\x76\0" + b"{'descr':'|u1','fortran_order':False,'shape':(99999999999999,9,9)}".ljust(118)
    for content in (path.read_bytes()[:-40], b"none", pickle.dumps([1])):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"plain arrays, got d\.npz"):
            open_data(str(path))
    zipped(path, {"test_images.npy": header, "test_labels.npy": header})
    with pytest.raises(DataError, match=r"plain arrays, got d\.npz"):
        open_data(str(path))
    whole = Path(saved(tmp_path, ZEROS, LABELS))
    with zipfile.ZipFile(whole) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:  # inflated at once, whatever size it claims
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(DataError, match="compressed otherwise than numpy does"):
        open_data(str(path))


# ---- folders and zips


@pytest.mark.parametrize("kind", ["folder", "zip", "stored"])
def test_image_files_are_read_exactly_in_hash_order(tmp_path: Path, kind: str) -> None:
    noise = {"test/ant/Thumbs.db": b"x", "test/.DS_Store": b"x", "__MACOSX/test/ant/._0.png": b"x", "README.md": b"x"}
    method = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
    files = dict(reversed({**FILES, **noise}.items()))
    path = written(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files, method)
    data = open_data(str(path))
    names = [f"{c}/{k}.png" for c in ("ant", "bee") for k in range(4)]
    names.sort(key=lambda name: hashlib.sha1(name.encode()).hexdigest())
    assert names != sorted(names)
    assert data.class_names == ("ant", "bee") and data.shape == (1, 6, 5)
    assert data.labels.tolist() == [int(name.startswith("bee")) for name in names]
    assert torch.equal(everything(data), unit(np.stack([ARRAYS[f"test/{name}"] for name in names])[:, None]))


def test_archives_are_read_in_place_from_copies_and_threads(tmp_path: Path) -> None:
    data = open_data(str(zipped(tmp_path / "x.zip", FILES)))
    expected = everything(data)
    before = sorted(tmp_path.rglob("*"))
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda k: data.batch(torch.tensor([k])).x, range(8)))
    assert torch.equal(torch.cat(rows), expected)
    assert torch.equal(everything(pickle.loads(pickle.dumps(data))), expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_with_the_slashes_of_windows_is_the_same(tmp_path: Path) -> None:
    files = {f"{split}/{kind}/0.png": encoded(pixels(5, 4)) for split in ("train", "test") for kind in "ab"}
    plain = open_data(str(zipped(tmp_path / "a.zip", files)))
    data = open_data(str(zipped(tmp_path / "b.zip", {name.replace("/", "\\"): files[name] for name in files})))
    assert data.class_names == ("a", "b") and data.split == "test" and data.digest == plain.digest
    assert torch.equal(everything(data), everything(plain))


def test_one_split_answers_to_every_name_and_says_so(tmp_path: Path) -> None:
    flat = {name.removeprefix("test/"): content for name, content in FILES.items() if name.startswith("test/")}
    noise = {"__MACOSX/": b"", "__MACOSX/ant/._0.png": b"x", "ant/._1.png": b"x", ".git/": b""}
    path = zipped(tmp_path / "flat.zip", flat | noise)
    data = open_data(f"{path}:train[:5]")
    assert (data.split, data.source, len(data)) == ("all", "flat.zip (no split folders)[:5]", 5)
    assert data.digest == open_data(f"{zipped(tmp_path / 'x.zip', FILES)}[:5]").digest


RGB, GREY = pixels(6, 5, 3), pixels(6, 5)
LUMA = ((RGB.astype(np.int64) @ np.array([19595, 38470, 7471]) + 2**15) >> 16).astype(np.uint8)  # ITU-R 601-2
PALETTE = Image.fromarray(RGB).quantize(16)
COLOURS = np.array(PALETTE.getpalette(), dtype=np.uint8).reshape(-1, 3)[np.asarray(PALETTE)]
DEEP = RNG.integers(0, 65536, (6, 5), dtype=np.uint16)


def palette(**options: object) -> bytes:
    file = BytesIO()
    PALETTE.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "modifier", "expected"),
    [
        (encoded(GREY), "", unit(GREY[None])),
        (encoded(GREY), "@rgb", unit(np.stack([GREY] * 3))),
        (encoded(RGB), "", unit(RGB.transpose(2, 0, 1))),
        (encoded(RGB), "@grey", unit(LUMA[None])),
        (encoded(np.dstack([RGB, GREY])), "", unit(RGB.transpose(2, 0, 1))),
        (encoded(np.dstack([GREY, GREY // 2])), "", unit(GREY[None])),
        (encoded(GREY > 99), "", unit((GREY > 99)[None] * 255)),
        (palette(), "", unit(COLOURS.transpose(2, 0, 1))),
        (palette(transparency=bytes(16)), "", unit(COLOURS.transpose(2, 0, 1))),
        (palette(transparency=3), "", unit(COLOURS.transpose(2, 0, 1))),
        (encoded(DEEP), "", torch.from_numpy(DEEP[None] / 65535).float()),
        (encoded(DEEP), "@rgb", torch.from_numpy(np.stack([DEEP] * 3) / 65535).float()),
        (encoded(DEEP, "TIFF"), "", torch.from_numpy(DEEP[None] / 65535).float()),
    ],
    ids=["L", "L-rgb", "RGB", "RGB-grey", "RGBA", "LA", "1", "P", "P-alpha", "P-index", "16", "16-rgb", "16-tiff"],
)
def test_modes(tmp_path: Path, content: bytes, modifier: str, expected: torch.Tensor) -> None:
    path = zipped(tmp_path / "x.zip", {"a/0.png": content, "b/0.png": content})
    x = everything(open_data(f"{path}{modifier}"))
    assert torch.equal(x, torch.stack([expected, expected]))


def test_one_mode_for_all_splits(tmp_path: Path) -> None:
    files = {f"{s}/{c}/0.png": encoded(GREY if s == "test" else RGB) for s in ("train", "test") for c in "ab"}
    path = zipped(tmp_path / "x.zip", files)
    assert open_data(f"{path}:test").shape == open_data(f"{path}:train").shape == (3, 6, 5)


@pytest.mark.parametrize(("array", "slack"), [(pixels(24, 20), 1.01), (DEEP.repeat(4, 0).repeat(4, 1), 1e-3)])
def test_resizing_is_antialiased_bilinear(tmp_path: Path, array: np.ndarray, slack: float) -> None:
    path = zipped(tmp_path / "x.zip", {"a/0.png": encoded(array), "b/0.png": encoded(array[:12])})
    x = everything(open_data(f"{path}@7x5"))
    top = np.iinfo(array.dtype).max
    for image, source in zip(x, (array, array[:12]), strict=True):
        reference = torch.nn.functional.interpolate(
            torch.from_numpy(source / top)[None, None], size=(5, 7), mode="bilinear", antialias=True
        )
        assert float((image - reference[0]).abs().max()) * 255 <= slack


def test_says_which_image_has_another_size(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {**FILES, "test/bee/odd.png": encoded(pixels(4, 9))})
    with pytest.raises(DataError, match=r"5x6 like test/.*got 9x4 in test/bee/odd\.png; add @5x6 to"):
        everything(open_data(str(path)))
    assert everything(open_data(f"{path}@3")).shape == (9, 1, 3, 3)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "class folders of images, got none"),
        ({"notes.txt": b""}, "class folders of images, got none"),
        ({**FILES, "test/cow/readme.txt": b"", "train/cow/0.png": FILES["train/ant/0.png"]}, "none in cow of test"),
        ({**FILES, "test/cow/0.png": FILES["test/ant/0.png"]}, "same classes in train and test, got cow only in test"),
        ({f"x/{name}": content for name, content in FILES.items()}, r"train/CLASS/NAME or CLASS/NAME, got x/t"),
        ({"test/0.png": FILES["test/ant/0.png"]}, r"train/CLASS/NAME or CLASS/NAME, got test/0\.png"),
        ({"ant/0.heic": b"", "bee/0.png": FILES["test/ant/0.png"]}, r"none in ant of all.*not read: 1 \.heic"),
        (
            {f"{split}/ant/0.png": FILES["test/ant/0.png"] for split in ("val", "Valid")},
            "one folder for the split val",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_refuses_other_trees(tmp_path: Path, kind: str, files: dict[str, bytes], message: str) -> None:
    folders = {f"{Path(name).parent}/": b"" for name in files if "/" in name}  # zips made by tools list them
    (tmp_path / "x").mkdir()
    path = written(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", folders | files)
    with pytest.raises(DataError, match=message):
        open_data(str(path))


def test_names_the_corrupt_image_when_it_is_read(tmp_path: Path) -> None:
    whole = FILES["test/bee/3.png"]
    for broken in (b"no image", whole[:-30], whole[:50], b""):
        data = open_data(str(zipped(tmp_path / "x.zip", {**FILES, "test/bee/3.png": broken})))
        with pytest.raises(DataError, match=r"an image.*test/bee/3\.png"):
            everything(data)
    float_pixels = encoded(np.zeros((6, 5), np.float32), "TIFF")
    path = zipped(tmp_path / "x.zip", {**FILES, "test/bee/4.tif": float_pixels})
    with pytest.raises(DataError, match=r"16-bit pixels, got test/bee/4\.tif"):
        everything(open_data(str(path)))


def test_says_when_files_are_gone(tmp_path: Path) -> None:
    folder, archive = written(tmp_path / "x", FILES), zipped(tmp_path / "x.zip", FILES)
    opened = open_data(str(folder)), open_data(str(archive))
    (folder / "test/ant/2.png").unlink()
    archive.unlink()
    with pytest.raises(DataError, match=r"test/ant/2\.png: No such file"):
        everything(opened[0])
    with pytest.raises(DataError, match=r"x\.zip: No such file"):
        everything(opened[1])


KINDS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "pgm": "PPM"}


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), cut=st.integers(0, 400), at=st.integers(0, 2000), value=st.binary(max_size=4)
)
def test_hostile_images_are_refused_or_read(tmp_path: Path, kind: str, cut: int, at: int, value: bytes) -> None:
    content = encoded(GREY, KINDS[kind])
    at %= len(content)
    content = (content[:at] + value + content[at + len(value) :])[: max(1, len(content) - max(0, cut - 300))]
    path = zipped(tmp_path / "x.zip", {"a/0.png": FILES["test/ant/0.png"], f"b/0.{kind}": content})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata
        try:
            x = everything(open_data(f"{path}@6@grey"))
        except DataError:
            return
    assert bool(((x >= 0) & (x <= 1)).all())


# ---- archives that are broken or hostile


def test_refuses_archives_that_are_none(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", FILES)
    whole = path.read_bytes()
    for content in (whole[:-30], whole[: len(whole) // 2], b"", b"none"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a zip archive that is whole, got x\.zip"):
            open_data(str(path))


def test_finds_a_damaged_entry(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", FILES, zipfile.ZIP_STORED)
    data = open_data(str(path))
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("test/ant/3.png").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 30 + len("test/ant/3.png") + 45] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test/ant/3\.png with a wrong size or checksum"):
        everything(data)
    path.write_bytes(content[:offset])
    with pytest.raises(DataError, match="wrong size or checksum"):
        everything(data)


def test_refuses_a_zip_bomb_without_inflating_it(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", FILES)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("test/ant/bomb.png", bytes(2**28))
    assert path.stat().st_size < 2**21
    tracemalloc.start()
    with pytest.raises(DataError, match=r"67,108,864 bytes \(MAX_IMAGE_BYTES\), got 268,435,456 in test/ant/bomb"):
        open_data(str(path))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_refuses_a_bomb_that_claims_to_be_small(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {**FILES, "test/bee/bomb.png": bytes(2**25)})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"test/bee/bomb.png") - 46  # its record in the archive's directory
    assert content[entry : entry + 4] == b"PK\1\2"
    content[entry + 24 : entry + 28] = struct.pack("<I", 1000)
    content[entry + 16 : entry + 20] = struct.pack("<I", zlib.crc32(bytes(1001)))  # right, were it to stop there
    path.write_bytes(content)
    data = open_data(str(path))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"test/bee/bomb\.png with a wrong size"):
        everything(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("constant", "limit"), [("MAX_ENTRIES", 15), ("MAX_IMAGE_BYTES", 60), ("MAX_TOTAL_BYTES", 500), ("MAX_PIXELS", 29)]
)
def test_names_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, constant: str, limit: int) -> None:
    path = zipped(tmp_path / "x.zip", FILES)
    open_data(str(path))
    monkeypatch.setattr(files, constant, limit)
    with pytest.raises(DataError, match=rf"at most {limit} \w+ \({constant}\)"):
        open_data(str(path))


def test_limits_the_files_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(str(written(tmp_path, FILES)))
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", 60)
    with pytest.raises(DataError, match=r"at most 60 bytes \(MAX_IMAGE_BYTES\), got 61 in test/"):  # the rest unread
        everything(data)


def test_limits_the_ratio_of_the_archive_not_of_a_blank_image(tmp_path: Path) -> None:
    blank, noisy = encoded(np.zeros((1000, 1000), np.uint8), "BMP"), encoded(pixels(1000, 1000), "BMP")
    blanks = {f"{c}/{k}.bmp": blank for c in "ab" for k in range(4)}
    with pytest.raises(DataError, match="MAX_RATIO"):
        open_data(str(zipped(tmp_path / "x.zip", blanks)))
    assert len(open_data(str(zipped(tmp_path / "x.zip", {**blanks, "a/5.bmp": noisy})))) == 9


@pytest.mark.parametrize("side", [7100, 12_000, 60_000])
def test_limits_the_pixels_of_an_image_before_decoding(tmp_path: Path, side: int) -> None:
    chunks = [b"IHDR" + struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(bytes(99))]
    sealed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(sealed)
    data = open_data(f"{zipped(tmp_path / 'x.zip', {**FILES, 'test/bee/bomb.png': bomb})}@5")
    with pytest.raises(DataError, match=r"at most 50,000,000 pixels \(MAX_PIXELS\).*test/bee/bomb"):
        everything(data)


def test_refuses_encrypted_entries(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", FILES)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="without a password"):
        open_data(str(path))


# ---- real data


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="MNIST is not beside the repository (set REMPART_DATA)")
def test_real_mnist() -> None:
    data = open_data(f"mnist:{REAL / 'mnist'}")
    assert (len(data), data.shape, data.num_classes) == (10_000, (1, 28, 28), 10)
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]
    stored = (everything(data) * 255).round().to(torch.uint8).numpy().tobytes()
    header = struct.pack(">4I", 2051, 10_000, 28, 28)
    md5 = hashlib.md5(header + stored, usedforsecurity=False).hexdigest()
    assert md5 == "2646ac647ad5339dbf082846283269ea"  # of the published file


@pytest.mark.data
@pytest.mark.skipif(not (REAL / "brain-mri.zip").is_file(), reason="brain-mri.zip is not there (set REMPART_DATA)")
def test_real_brain_mri() -> None:
    data = open_data(str(REAL / "brain-mri.zip"))
    assert data.class_names == ("glioma", "meningioma", "notumor", "pituitary")
    assert data.labels.bincount().tolist() == [300, 306, 405, 300] and data.shape == (1, 128, 128)
    assert len(open_data(f"{REAL / 'brain-mri.zip'}:train")) == 5708
    part = data.head(64)
    assert part.labels.bincount(minlength=4).min() >= 8  # a mix from the start
    assert torch.equal(everything(part.load()), everything(part))


@pytest.mark.parametrize("text", ["linf:0", "l2:0.0", "linf:0/255"])
def test_a_request_for_a_budget_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(ThreatError, match=r"a budget above 0, got .*; write l"):
        open_data("digits:test").threat(text, 0.0, 1.0)
    assert open_data("digits:test").threat("l2", 0.0, 1.0).eps is None
