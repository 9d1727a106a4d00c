"""What clients bring: kept whole or not at all, looked at in a process of its own, under names the service chose."""

import errno
import io
import os
import time
import zipfile

import pytest

from bringing import data_zip, model_zip, zipped
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.models import load
from rempart.report.schema import AS_IT_IS, Reading
from rempart.serve.errors import Missing, TooLarge
from rempart.serve.look import looker
from rempart.serve.settings import Settings, prepared
from rempart.serve.store import Store, label, sweep


def nothing(kind, path, reading):
    return {"seen": path.name}


@pytest.fixture
def store(tmp_path):
    return Store(prepared(Settings(folder=tmp_path / "data")).folder, nothing, 10_000)


def kept(store):
    """Everything below the data directory but its folders."""
    return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())


def test_an_upload_is_found_listed_and_removed_by_the_id_it_got(store):
    first = store.add("data", "../Scans of May.ZIP", io.BytesIO(b"PK content"))
    second = store.add("data", "b.npz", io.BytesIO(b"x" * 10_000))
    assert (first.name, first.form, first.file, first.size) == ("Scans of May.ZIP", ".zip", "scans-of-may.zip", 10)
    assert first.facts == {"seen": "scans-of-may.zip"} and first.reading == AS_IT_IS
    assert store.items("data") == [second, first] and store.items("model") == []
    assert store.find("data", first.id) == first
    assert store.place(first).read_bytes() == b"PK content"
    store.remove("data", first.id)
    assert store.items("data") == [second]
    with pytest.raises(Missing, match="the id of a data that is here"):
        store.find("data", first.id)
    store.remove("data", second.id)
    assert kept(store) == []


def test_what_is_too_large_empty_or_of_a_wrong_kind_leaves_nothing(store):
    with pytest.raises(TooLarge, match="at most 10,000 bytes"):
        store.add("data", "a.npz", io.BytesIO(b"x" * 10_001))
    with pytest.raises(SpecError, match="a file with something in it"):
        store.add("data", "a.npz", io.BytesIO(b""))
    for name in ("a.pt2", "a.pkl", "a", ".zip/a", "a.zip.exe"):
        with pytest.raises(SpecError, match=r"a model as \.keras"):
            store.add("model", name, io.BytesIO(b"x"))
    assert kept(store) == [] and not list((store.folder / "incoming").iterdir())


class Cut(io.BytesIO):
    """A connection that breaks, or a disk that is full, after the first piece."""

    def __init__(self, number):
        super().__init__(b"x" * 100)
        self.number = number

    def read(self, size=-1):
        if self.tell():
            raise OSError(self.number, os.strerror(self.number))
        return super().read(50)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ECONNRESET])
def test_an_upload_that_is_cut_off_leaves_nothing(store, number):
    with pytest.raises(OSError, match=os.strerror(number)):
        store.add("data", "a.npz", Cut(number))
    assert kept(store) == [] and not list((store.folder / "incoming").iterdir())


def test_what_is_refused_when_looked_at_leaves_nothing(tmp_path):
    def refuse(kind, path, reading):
        assert path.read_bytes() == b"bad"
        raise DataError("better data")

    store = Store(prepared(Settings(folder=tmp_path / "data")).folder, refuse, 1000)
    with pytest.raises(DataError, match="better data"):
        store.add("data", "a.npz", io.BytesIO(b"bad"))
    assert kept(store) == []


@pytest.mark.parametrize(
    ("name", "shown", "file"),
    [
        ("C:\\temp\\x.npz", "x.npz", "x.npz"),
        ("<script>alert(1)</script>.npz", "script>.npz", "script.npz"),
        ("\x1b[31mred\n.npz", "[31mred.npz", "31mred.npz"),
        ("..npz", "..npz", "unnamed.npz"),
        ("脑.npz", "脑.npz", "unnamed.npz"),
        ("a" * 300 + ".npz", "a" * 100, None),
    ],
)
def test_of_a_clients_name_nothing_can_be_part_of_a_path(store, name, shown, file):
    assert label(name) == shown
    item = store.add("data", name, io.BytesIO(b"x"))
    assert file is None or item.file == file
    assert store.place(item).resolve().parent == store.folder / "data" / item.id


@pytest.mark.parametrize("id", ["", "..", "../models", "0" * 15, "0" * 17, "G" * 16, "0" * 15 + "\n", "0" * 16])
def test_an_id_of_nothing_is_missing(store, id):
    for ask in (store.find, store.remove):
        with pytest.raises(Missing):
            ask("model", id)


def test_the_zip_of_a_models_folder_is_the_model(tmp_path):
    settings = prepared(Settings(folder=tmp_path / "data"))
    store = Store(settings.folder, looker(settings), 10**7)
    item = store.add("model", "net.zip", io.BytesIO(model_zip(tmp_path / "net")), Reading())
    assert load(str(store.place(item))).shape == (1, 8, 8)
    assert item.facts["model"]["classes"] == ["cat", "dog", "hare"]
    assert str(settings.folder) not in item.model_dump_json()


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"config.json": b"{}", "../model.safetensors": b"x"}, "in 2 folders"),
        ({"a/config.json": b"{}", "b/model.safetensors": b"x"}, "in 2 folders"),
        ({"config.json": b"{}", "evil.py": b"x"}, "'evil.py'"),
        ({f"{n}.json": b"{}" for n in range(50)}, "50 files"),
        ({}, "0 files"),
    ],
)
def test_a_zip_with_anything_else_is_refused(store, entries, told):
    with pytest.raises(ModelError, match=told):
        store.add("model", "net.zip", io.BytesIO(zipped(entries)))
    assert kept(store) == []


def test_a_zip_that_says_less_than_it_holds_or_is_broken_is_refused(store):
    content = bytearray(zipped({"config.json": b"{}" * 100}))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        start = archive.start_dir
    content[start + 24 : start + 28] = (3).to_bytes(4, "little")  # its size, as the directory tells it
    for broken in (bytes(content), b"PK\x03\x04 and no more", bytes(content[:60])):
        with pytest.raises(ModelError, match="a zip archive that is whole"):
            store.add("model", "net.zip", io.BytesIO(broken))
    assert kept(store) == []


def test_data_are_looked_at_in_a_process_of_its_own(tmp_path):
    settings = prepared(Settings(folder=tmp_path / "data"))
    store = Store(settings.folder, looker(settings), 10**7)
    item = store.add("data", "animals.zip", io.BytesIO(data_zip()))
    (split,) = item.facts["splits"].values()
    assert split == {"images": 15, "classes": {"cat": 5, "dog": 5, "hare": 5}}
    assert item.facts["shape"] == [1, 8, 8]
    with pytest.raises(DataError) as caught:
        store.add("data", "broken.zip", io.BytesIO(b"no zip"))
    assert str(settings.folder) not in str(caught.value)
    assert not list((settings.folder / "incoming").iterdir())


def test_what_ends_the_process_that_looks_at_it_is_refused(tmp_path):
    settings = prepared(Settings(folder=tmp_path / "data", memory=50 * 2**20))  # torch alone takes more
    store = Store(settings.folder, looker(settings), 10**7)
    with pytest.raises(DataError, match="ran out of memory"):
        store.add("data", "animals.zip", io.BytesIO(data_zip()))
    assert kept(store) == []


def test_what_a_process_that_died_was_receiving_is_swept_away(tmp_path):
    folder = prepared(Settings(folder=tmp_path / "data")).folder
    for name, age in (("old", 25), ("new", 23)):
        (folder / "incoming" / name).mkdir()
        (folder / "incoming" / name / "half.npz").write_bytes(b"half")
        (folder / "incoming" / f"{name}.tmp").write_bytes(b"half")
        for path in (folder / "incoming" / name, folder / "incoming" / f"{name}.tmp"):
            os.utime(path, times=(0, time.time() - 3600 * age))
    sweep(folder)
    assert {path.name for path in (folder / "incoming").iterdir()} == {"new", "new.tmp"}


def test_a_data_directory_is_its_owners_alone(tmp_path):
    settings = prepared(Settings(folder=tmp_path / "a" / "b"))
    assert all(path.stat().st_mode & 0o077 == 0 for path in (settings.folder, *settings.folder.iterdir()))
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match=r"a data directory that can be written to.*--folder"):
        prepared(Settings(folder=tmp_path / "file"))
    with pytest.raises(SpecError, match="a URL of PostgreSQL, got mysql://") as caught:
        prepared(Settings(folder=tmp_path, database="mysql://u:secret@h/d"))
    assert "secret" not in str(caught.value)
