"""CSV tables of images, and tables of patients."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rempart.core.errors import DataError
from rempart.data import Data, files, open_data, tables, with_patients

RNG = np.random.default_rng(0)
PIXELS = {f"{k}.png": RNG.integers(0, 256, (6, 5), dtype=np.uint8) for k in range(6)}


def png(array: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def scans(root: Path, text: str, *, name: str = "scans.csv") -> str:
    (root / "images").mkdir(parents=True, exist_ok=True)
    for file, array in PIXELS.items():
        (root / "images" / file).write_bytes(png(array))
    (root / name).write_text(text, "utf-8")
    return str(root / name)


def everything(data: Data) -> torch.Tensor:
    return data.batch(torch.arange(len(data))).x


def lines(*rows: str, header: str = "path,label") -> str:
    return "\n".join((header, *(f"images/{row}" for row in rows))) + "\n"


FOUR = lines("3.png,wolf", "0.png,cat", "5.png,wolf", "1.png,cat")


def test_images_keep_the_order_of_the_table(tmp_path: Path) -> None:
    data = open_data(scans(tmp_path, FOUR))
    expected = np.stack([PIXELS[f"{k}.png"] for k in (3, 0, 5, 1)])[:, None] / np.float32(255)
    assert torch.equal(everything(data), torch.from_numpy(expected))
    assert data.labels.tolist() == [1, 0, 1, 0] and data.class_names == ("cat", "wolf")
    assert (data.split, data.unit, data.patients) == ("all", "1", None)
    assert data.source == "scans.csv (no split folders)"
    resized = open_data(f"{tmp_path / 'scans.csv'}@3x2@rgb[1:]")
    assert resized.shape == (3, 2, 3) and resized.index.tolist() == [1, 2, 3]


def test_paths_with_the_slashes_of_windows_are_the_same(tmp_path: Path) -> None:
    expected = open_data(scans(tmp_path, FOUR))
    data = open_data(scans(tmp_path, FOUR.replace("/", "\\")))
    assert data.digest == expected.digest and torch.equal(everything(data), everything(expected))
    people = tmp_path / "people.csv"
    people.write_text("patient,path\n" + "".join(f"q{k},images\\{k}.png\n" for k in (0, 1, 3, 5)))
    assert with_patients(expected, people).patients == ("q3", "q0", "q5", "q1")
    with pytest.raises(DataError, match="every image once"):
        open_data(scans(tmp_path, FOUR + "images\\3.png,wolf\n"))


def test_the_digest_tells_pixels_labels_and_order_but_not_other_columns(tmp_path: Path) -> None:
    first = open_data(scans(tmp_path, FOUR)).digest
    same = lines("3.png,x,wolf", "0.png,y,cat", "5.png,z,wolf", "1.png,,cat", header="\ufeffPath, note ,LABEL")
    assert open_data(scans(tmp_path, same)).digest == first
    others = [
        lines("3.png,cat", "0.png,cat", "5.png,wolf", "1.png,cat"),
        lines("0.png,cat", "3.png,wolf", "5.png,wolf", "1.png,cat"),
    ]
    assert len({first, *(open_data(scans(tmp_path, text)).digest for text in others)}) == 3
    data = open_data(scans(tmp_path, FOUR))
    (tmp_path / "images" / "5.png").write_bytes(png(255 - PIXELS["5.png"]))
    assert data.digest != first


def test_splits_classes_and_patients_come_from_their_columns(tmp_path: Path) -> None:
    header = "path,split,patient,label"
    rows = ("0.png,train,p1,0", "1.png,test,p2,2", "2.png,test,p2,0", "3.png,val,p3,1", "4.png,test,p 4,1")
    where = scans(tmp_path, lines(*rows, header=header))
    data = open_data(where)
    assert data.labels.tolist() == [2, 0, 1] and data.patients == ("p2", "p2", "p 4") and data.split == "test"
    assert data.class_names == ("0", "1", "2") == open_data(f"{where}:train").class_names
    assert data.take(torch.tensor([2, 0])).patients == ("p 4", "p2")
    assert data.load().patients == data.patients and data.scaled(-1, 1).patients == data.patients
    torch.testing.assert_close(everything(data)[1, 0], torch.from_numpy(PIXELS["2.png"] / np.float32(255)))
    only = scans(tmp_path, lines("0.png,train,a", "1.png,train,b", header="path,split,label"))
    with pytest.raises(DataError, match=r"it has train"):
        open_data(only)


def test_refuses_a_patient_in_two_splits(tmp_path: Path) -> None:
    header = "path,split,patient,label"
    rows = ("0.png,train,secret-1,0", "1.png,test,secret-1,2", "2.png,test,p2,0")
    with pytest.raises(DataError, match=r"each patient in one split, got 1 in train and test of scans\.csv") as caught:
        open_data(scans(tmp_path, lines(*rows, header=header)))
    assert "secret" not in str(caught.value)


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(PIXELS["0.png"]))
    home = tmp_path / "home"
    for path in ("../outside.png", str(outside), "images/../../outside.png", "..\\outside.png", "C:\\x.png"):
        with pytest.raises(DataError, match="paths inside the folder of the table"):
            open_data(scans(home, f"path,label\n{path},a\nimages/0.png,b\n"))
    scans(home, "")
    (home / "images" / "link.png").symlink_to(outside)
    (home / "linked").symlink_to(tmp_path)
    for path in ("images/link.png", "linked/outside.png"):
        where = scans(home, f"path,label\nimages/0.png,b\n{path},a\n")
        with pytest.raises(DataError, match=r"files inside home, got .*(link|outside)"):
            everything(open_data(where))
    (home / "images" / "inner.png").symlink_to(home / "images" / "0.png")
    assert len(everything(open_data(scans(home, lines("0.png,b", "inner.png,a"))))) == 2
    os.mkfifo(home / "images" / "pipe.png")
    with pytest.raises(DataError, match="files inside"):
        everything(open_data(scans(home, lines("0.png,b", "pipe.png,a"))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one column named path, got nothing"),
        ("path,label\n", "lines below the header"),
        ("path\nimages/0.png\n", "one column named label, got path"),
        ("path,label,label\nimages/0.png,a,b\n", "one column named label"),
        (lines("0.png,a", "1.png"), "path, label in every line, got line 3"),
        (lines("0.png,a", "1.png,"), "path, label in every line, got line 3"),
        (lines("0.png,0", "1.png,1.5"), r"words, or whole numbers.*got 1 others, such as 1\.5"),
        (lines("0.png,0", "1.png,-1", "2.png,-1"), "got 2 others, such as -1"),
        (lines("0.png,0.0", "1.png,nan", "2.png,NaN"), r"a label for every image.*got 2 of 3 without one \('nan'\)"),
        (lines("0.png,ant", "1.png,nan"), "a label for every image"),
        (lines("0.png,a", "0.png,b"), "every image once, got images/0.png twice"),
        (lines("0.png,a", ".//0.png,b"), "every image once, got images/0.png twice"),
        (lines("0.png,x,a", "1.png,test,b", header="path,split,label"), "splits out of train, val, test, got 'x'"),
        (lines("0.png,a", "none.txt,b"), "files of one kind"),
        (lines("0.png,a", "9.png,b"), r"none at 'images/9\.png', line 3 of scans\.csv"),
        (lines('0.png,"a', "1.png,b"), "a CSV file in UTF-8"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    where = scans(tmp_path, text)
    (tmp_path / "images" / "none.txt").touch()
    with pytest.raises(DataError, match=message):
        everything(open_data(where))


def test_names_the_limits_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = scans(tmp_path, FOUR)
    for module, constant in ((tables, "MAX_TABLE_BYTES"), (files, "MAX_ENTRIES")):
        with monkeypatch.context() as patch, pytest.raises(DataError, match=constant):
            patch.setattr(module, constant, 4)
            open_data(where)
    (tmp_path / "x.csv").write_bytes(b"path,label\n\xff,a\n")
    with pytest.raises(DataError, match="a CSV file in UTF-8"):
        open_data(str(tmp_path / "x.csv"))


def test_patients_of_any_data_come_from_a_table_of_their_own(tmp_path: Path) -> None:
    data = open_data(scans(tmp_path, FOUR))
    people = tmp_path / "people.csv"
    people.write_text("number,patient\n" + "".join(f"{k},p{k % 2}\n" for k in range(9)))
    assert with_patients(data, people).patients == ("p0", "p1", "p0", "p1")
    assert with_patients(open_data("digits[5:8]"), people).patients == ("p1", "p0", "p1")
    people.write_text("patient,path\n" + "".join(f"q{k},images/{k}.png\n" for k in (0, 1, 3, 5)))
    assert with_patients(data, people).patients == ("q3", "q0", "q5", "q1")
    for text, message in (
        ("patient,path\nq,images/0.png\n", "a patient for every sample, got none for 3"),
        ("patient\nq\n", "a column path or number"),
        ("patient,number\nq,1\nq,1\n", "every image once"),
    ):
        people.write_text(text)
        with pytest.raises(DataError, match=message):
            with_patients(data, people)
    people.write_text("patient,path\nq,0\n")
    with pytest.raises(DataError, match="a column number"):
        with_patients(open_data("digits[:2]"), people)


def test_a_table_names_medical_files_too(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    pytest.importorskip("nibabel")
    import nibabel
    from pydicom.data import get_testdata_file

    for name in ("CT_small.dcm", "MR_small.dcm"):
        (tmp_path / name).write_bytes(Path(str(get_testdata_file(name, download=False))).read_bytes())
    (tmp_path / "t.csv").write_text("path,label,patient\nCT_small.dcm,1,x\n")
    data = open_data(f"{tmp_path / 't.csv'}@window=40:400")
    assert (data.unit, data.num_classes, data.patients) == ("HU", 2, ("x",)), "the column goes before the tag"
    (tmp_path / "t.csv").write_text("path,label\nCT_small.dcm,1\nMR_small.dcm,0\n")
    with pytest.raises(DataError, match=r"intensities in HU like those of the first file, got raw in MR_small\.dcm"):
        everything(open_data(f"{tmp_path / 't.csv'}@window=40:400@64"))
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "v.nii.gz")
    (tmp_path / "t.csv").write_text("path,label,patient\nv.nii.gz,1,x\n")
    slices = open_data(f"{tmp_path / 't.csv'}@window=0:9@slice=sagittal")
    assert slices.patients == ("x",) * 3 and slices.volumes == ("v.nii.gz",) * 3 and slices.shape == (1, 5, 4)


def test_an_archive_whose_names_lead_out_is_refused(tmp_path: Path) -> None:
    import zipfile

    for name in ("../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png"):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for kind in "ab":
                archive.writestr(f"{kind}/0.png", png(PIXELS["0.png"]))
            archive.writestr(name, png(PIXELS["0.png"]))
        with pytest.raises(DataError, match="an archive whose names stay inside it"):
            open_data(str(tmp_path / "x.zip"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"] and not (tmp_path.parent / "evil.png").exists()


def test_a_file_that_is_not_there_is_told_with_table_and_line(tmp_path: Path) -> None:
    where = scans(tmp_path, lines("3.png,wolf", "", "0.png,cat", "gone.png,cat").replace("images/\n", "\n"))
    with pytest.raises(DataError, match=r"none at 'images/gone\.png', line 5 of scans\.csv; .*folder of the table"):
        open_data(where)
    (tmp_path / "m.png").write_bytes(png(PIXELS["0.png"]))
    where = scans(tmp_path, lines("3.png,wolf,m.png", "0.png,cat,no.png", header="path,label,mask"))
    with pytest.raises(DataError, match=r"none at 'no\.png', line 3 of scans\.csv"):
        open_data(where)
    elsewhere = scans(tmp_path, lines("3.png,test,a", "1.png,test,b", "gone.png,train,a", header="path,split,label"))
    assert len(open_data(elsewhere)) == 2, "what another split lacks does no harm"
