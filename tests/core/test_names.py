"""Which class of a model a class of data is: spellings, encodings, numbers and subsets."""

import unicodedata
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rempart.attacks.preflight import preflight
from rempart.audit.risk import read_costs
from rempart.core.errors import DataError
from rempart.core.model import Classifier, class_number
from rempart.core.names import find, whole
from rempart.data import Data, open_data

STEP = 15


class Levels(nn.Module):
    """Logit k is largest where the mean grey level is 15 k."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("levels", torch.arange(classes, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(((x.mean((1, 2, 3)) * 255 / STEP)[:, None] - self.levels) ** 2)


def model(names: Sequence[str] | int) -> Classifier:
    count = names if isinstance(names, int) else len(names)
    given = None if isinstance(names, int) else names
    return Classifier(Levels(count), shape=(1, 8, 8), num_classes=count, class_names=given).eval()


def grey(level: int) -> bytes:
    stream = BytesIO()
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def folders(root: Path, names: dict[str, int]) -> str:
    """Class folders of two images, whose grey level is that of the output a class stands for."""
    for name, number in names.items():
        (root / name).mkdir(parents=True)
        for k in range(2):
            (root / name / f"{k}.png").write_bytes(grey(STEP * number + k))
    return str(root)


def table(root: Path, labels: dict[str, int]) -> str:
    folders(root, {f"images-{number}": number for number in labels.values()})
    rows = (f"images-{number}/0.png,{label}" for label, number in labels.items())
    (root / "t.csv").write_text("\n".join(("path,label", *rows)), "utf-8")
    return str(root / "t.csv")


def status(spec: str, known: Classifier) -> str:
    """That of the check of classes, once every image has turned out to have the class of its grey level."""
    data = open_data(spec).seen_by(known)
    batch = data.batch(torch.arange(len(data)))
    assert torch.equal(known(batch.x).argmax(1), batch.y), data.labels
    assert data.digest == open_data(spec).digest, "however classes are numbered, the data are the same"
    return next(check.status for check in preflight(known, data)[1] if check.name == "classes")


ACCENTED = ("muscle", "zone", "épithélium", "Ödem")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_the_same_in_every_unicode_form(tmp_path: Path, form: str) -> None:
    names = {unicodedata.normalize(form, name): k for k, name in enumerate(ACCENTED)}
    other = "NFD" if form == "NFC" else "NFC"
    told = [unicodedata.normalize(other, name) for name in ACCENTED]
    assert status(folders(tmp_path, names), model(told)) in ("repaired", "passed")
    assert class_number(unicodedata.normalize(form, "Ödem"), told) == 3


@pytest.mark.parametrize(
    ("own", "known"),
    [
        ({"no_tumor": 0, "glioma-tumor": 1}, ["No Tumor", "Glioma Tumor"]),
        ({"NOTUMOR": 1, "Glioma": 0}, ["glioma", "no-tumor"]),
        ({" cat": 1, "dog": 0}, ["dog", "cat"]),
        ({"01": 0, "02": 1}, ["1", "2"]),
    ],
)
def test_names_that_differ_in_case_and_separators_are_matched_and_reported(
    tmp_path: Path, own: dict[str, int], known: list[str]
) -> None:
    assert status(folders(tmp_path, own), model(known)) == "repaired"


@pytest.mark.parametrize("own", [{"a b": 0, "a_b": 1, "c": 2}, {"no tumor": 0, "No_Tumor": 1}])
def test_a_spelling_that_two_classes_share_matches_nothing(tmp_path: Path, own: dict[str, int]) -> None:
    known = model(["ab", "x", "c"][: len(own)] if len(own) == 3 else ["notumor", "x"])
    with pytest.raises(DataError, match="data with the model's"):
        open_data(folders(tmp_path, own)).seen_by(known)


class Encoded(zipfile.ZipInfo):
    """An entry whose name is not in UTF-8, as Windows writes it."""

    encoding = "gbk"

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode(self.encoding), self.flag_bits & ~0x800


@pytest.mark.parametrize(
    ("encoding", "names"),
    [
        ("gbk", ["胶质瘤", "垂体瘤", "无肿瘤", "脑膜瘤"]),
        ("cp932", ["正常", "腫瘍", "出血"]),
        ("cp850", ["épithélium", "Ödem", "zone"]),
        ("cp1252", ["épithélium", "Ödem", "zone"]),
        ("cp866", ["норма", "опухоль", "киста"]),
        ("utf-8", ["épithélium", "胶质瘤"]),
    ],
)
def test_names_in_a_zip_are_read_in_the_encoding_that_makes_them_the_models(
    tmp_path: Path, encoding: str, names: list[str]
) -> None:
    def entry(name: str) -> zipfile.ZipInfo:
        made = Encoded(name)
        made.encoding = encoding
        return made

    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for k, name in enumerate(names):
            archive.writestr(entry(f"test/{name}/0.png"), grey(STEP * k))
    assert status(str(tmp_path / "w.zip"), model(names)) in ("passed", "repaired")
    if encoding != "utf-8":
        with pytest.raises(DataError, match="class names in UTF-8"):
            open_data(str(tmp_path / "w.zip")).seen_by(model([f"other {k}" for k in range(len(names))]))


@pytest.mark.parametrize(
    "written",
    ["{:.1f}", "{}", "{:03d}", "+{}", " {} ", "{}e0", "{}."],
)
def test_whole_numbers_are_class_numbers_however_they_are_written(tmp_path: Path, written: str) -> None:
    numbers = range(13)
    labels = {written.format(float(k) if ".1f" in written else k): k for k in numbers}
    assert status(table(tmp_path, labels), model(13)) == "passed"


def test_folders_of_numbers_follow_text_order_or_the_names_of_the_model(tmp_path: Path) -> None:
    names = sorted(map(str, range(13)))
    assert status(folders(tmp_path / "text", {name: k for k, name in enumerate(names)}), model(13)) == "warned"
    own = {str(k): k for k in range(13)}
    assert status(folders(tmp_path / "named", own), model([str(k) for k in range(13)])) == "repaired"
    assert status(table(tmp_path / "table", {name: k for k, name in enumerate(names)}), model(names)) == "repaired"


@pytest.mark.parametrize("own", [{"cat": 7}, {"cat": 7, "ant": 0}, {"BEE": 1, "cat": 7, "ant": 0}])
def test_folders_of_some_classes_fit_a_model_that_has_them(tmp_path: Path, own: dict[str, int]) -> None:
    known = model(["ant", "bee", "c2", "c3", "c4", "c5", "c6", "cat", "c8", "c9"])
    assert status(folders(tmp_path, own), known) in ("passed", "repaired")
    assert open_data(str(tmp_path)).seen_by(known).num_classes == 10
    with pytest.raises(DataError, match=r"name its outputs in their order with --classes"):
        open_data(str(tmp_path)).seen_by(model(10))


@pytest.mark.parametrize("numbers", [(0, 3, 7), (4,), (0,)])
def test_numbers_of_some_classes_fit_a_model_that_has_more(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    known = model(10)
    assert status(table(tmp_path, {str(k): k for k in numbers}), known) == "passed"
    images = np.stack([np.full((8, 8), STEP * k, np.uint8) for k in numbers])
    np.savez(tmp_path / "medical.npz", test_images=images, test_labels=np.array(numbers)[:, None])
    np.savez(tmp_path / "attack.npz", x_adv=images[:, None] / np.float32(255), y=np.array(numbers))
    np.savez(tmp_path / "keras.npz", x_test=images, y_test=np.eye(10)[list(numbers)])
    for name in ("medical", "attack", "keras"):
        assert status(str(tmp_path / f"{name}.npz"), known) == "passed"


def test_labels_counted_from_one_get_a_hint(tmp_path: Path) -> None:
    where = table(tmp_path, {str(k): k - 1 for k in range(1, 11)})
    with pytest.raises(DataError, match="counted from 1 to 10: subtract 1"):
        open_data(where).seen_by(model(10))
    (tmp_path / "t.csv").write_text("".join((tmp_path / "t.csv").read_text().splitlines(keepends=True)[:-1]))
    data = open_data(where).seen_by(model(10))
    check = preflight(model(10), data)[1][0]
    assert check.status == "warned" and "counted from 1" in check.message


@pytest.mark.parametrize(
    ("own", "known", "message"),
    [
        (("glioma", "no_tumor", "pituitary"), ("glioma_tumor", "no_tumor", "pituitary_tumor"), "it does not have"),
        (("n01440764", "n02102040"), ("tench", "English springer", "church"), "WordNet ids"),
        (("ant", "bee"), ("ant", "bear"), "it does not have bee"),
    ],
)
def test_names_that_agree_in_part_are_not_matched_by_number(
    tmp_path: Path, own: tuple[str, ...], known: tuple[str, ...], message: str
) -> None:
    where = folders(tmp_path, {name: k for k, name in enumerate(own)})
    with pytest.raises(DataError, match=message):
        open_data(where).seen_by(model(known))


def test_names_that_differ_altogether_are_matched_in_order_with_a_warning(tmp_path: Path) -> None:
    where = folders(tmp_path, {"Hund": 0, "Katze": 1})
    assert status(where, model(["dog", "cat"])) == "warned"
    assert status(where, model(["LABEL_0", "LABEL_1"])) == "passed", "names that Hugging Face makes up are none"


@pytest.mark.parametrize("own", [{"English_springer": 1, "tench": 0}, {"tench": 0, "Cardigan": 2}, {"CARDIGAN": 2}])
def test_names_that_the_model_has_twice_do_not_stand_in_the_way_of_others(tmp_path: Path, own: dict[str, int]) -> None:
    """Of ImageNet, torchvision calls a dog Cardigan and a garment cardigan; other lists have `crane` twice."""
    known = model(["tench", "English springer", "Cardigan", "cardigan", "crane", "crane"])
    where = folders(tmp_path, own)
    if "CARDIGAN" in own:
        with pytest.raises(DataError, match=r"got 1 \(CARDIGAN\); rename"):
            open_data(where).seen_by(known)
    else:
        assert status(where, known) in ("passed", "repaired")


def test_two_names_of_the_data_for_one_class_are_called_so(tmp_path: Path) -> None:
    where = folders(tmp_path, {"No_Tumor": 0, "no tumor": 0, "glioma": 1})
    with pytest.raises(DataError, match="'No_Tumor' and 'no tumor', which are one class of the model; write each"):
        open_data(where).seen_by(model(["no tumor", "glioma"]))


def test_costs_name_classes_in_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "costs.csv").write_text("true,No_Tumor,glioma\nglioma,5,0\nno tumor,0,1\n")
    assert read_costs(tmp_path / "costs.csv", ["Glioma", "no-tumor"]).tolist() == [[0, 5], [1, 0]]


def test_files_with_other_endings_are_counted(tmp_path: Path) -> None:
    where = folders(tmp_path, {"ant": 0, "bee": 1})
    for name in ("ant/0.heic", "ant/1.heic", "bee/x.mgz", "bee/.DS_Store", "bee/Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    data: Data = open_data(where)
    assert data.notes == ("Files of endings that are not read were left out of the class folders: 2 .heic, 1 .mgz.",)
    check = next(check for check in preflight(model(2), data)[1] if check.name == "files")
    assert check.status == "warned" and "2 .heic" in check.message


def test_no_file_is_left_out_of_the_count(tmp_path: Path) -> None:
    """Fifteen endings, one of them in two cases, one of them in a folder of a class."""
    where = folders(tmp_path, {"ant": 0, "bee": 1})
    (tmp_path / "bee" / "masks").mkdir()
    for name in (*(f"x.e{k}x" for k in range(13)), "0.heic", "1.HEIC", "masks/2.heic", "masks/3.mgz"):
        (tmp_path / "bee" / name).write_bytes(b"x")
    (note,) = open_data(where).notes
    assert ": 3 .heic, " in note
    counts = [int(part.split()[0]) for part in note.partition(": ")[2].split(", ")]
    assert sum(counts) == 17 and note.endswith(f"{counts[-1]} of {counts[-1]} other endings.")


@pytest.mark.parametrize("name", ["5e40", "1" * 30, "3e-40", "9" * 60 + ".5"])
def test_hexadecimal_and_long_names_are_names(name: str) -> None:
    assert find(name, ("cat", "dog")) is None and find(name, ("cat", name)) == 1
    assert whole("7e0") == 7 and whole("0.5") is None
