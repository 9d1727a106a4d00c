"""What clients brought: models, data sets and guards, each in a folder named by the service.

Of the name that a client chose, letters, digits and hyphens become the name of the file, for reports to show; nothing
else of it is ever part of a path. A thing is there whole or not at all: it is received and looked at in `incoming`, and
put in its place by one rename.
"""

import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from pydantic import Field, ValidationError

from rempart.core.disk import replace
from rempart.core.errors import DataError, ModelError, RempartError, SpecError
from rempart.models.formats.hugging_face import PARTS
from rempart.models.save import CONFIG, WEIGHTS
from rempart.report.schema import AS_IT_IS, Reading, Strict
from rempart.serve.errors import Missing, TooLarge

Kind = Literal["model", "data", "guard"]
FORMS: dict[Kind, tuple[str, ...]] = {
    "model": (".keras", ".h5", ".hdf5", ".onnx", ".zip"),
    "data": (".zip", ".npz", ".parquet"),
    "guard": (),
}
"""Endings of files that are taken. A .pt2 runs code of its author, as a pickle does: neither is."""

_FOLDERS: dict[Kind, str] = {"model": "models", "data": "data", "guard": "guards"}
_CARD = "card.json"
_ID = re.compile(r"[0-9a-f]{16}")
_MEMBERS = {CONFIG, WEIGHTS, *PARTS}
_MEMBER_BYTES = 4 * 2**30
_PIECE = 2**20
_NAME = 100  # characters
_ABANDONED = 24 * 3600.0  # seconds


class Item(Strict):
    """One thing in the store.

    Attributes:
        id: 16 hexadecimal digits, chosen by the service.
        kind: What it is.
        name: What the client calls it; for people alone.
        form: Ending of the file it came in; `guard` for guards.
        file: Name of its file or folder in the store.
        size: Bytes.
        created: When it came, ISO 8601 in UTC.
        reading: How a model is read.
        facts: What was found when it was looked at: of a model its `rempart inspect`, of data its splits and classes,
            of a guard its detector.
    """

    id: str
    kind: Kind
    name: str
    form: str
    file: str
    size: int
    created: str
    reading: Reading = AS_IT_IS
    facts: dict[str, Any] = Field(default_factory=dict)


Look = Callable[[Kind, Path, Reading], dict[str, Any]]
"""Looks at an upload before it is taken, in a process of its own, and says what it is. Raises where it is unusable."""


@dataclass(frozen=True, slots=True)
class Store:
    """The things of one data directory."""

    folder: Path
    look: Look
    limit: int

    def add(self, kind: Kind, name: str, stream: IO[bytes], reading: Reading = AS_IT_IS) -> Item:
        """Receive an upload, look at it, and keep it.

        Args:
            kind: What it is said to be.
            name: The client's name of the file; its ending says what form it has.
            stream: Its bytes.
            reading: How a model is read.

        Raises:
            TooLarge: If there are more bytes than the limit.
            ModelError, DataError: If it is not what it is said to be, or is unsafe.
            OSError: If the disk is full.
        """
        form = next((form for form in FORMS[kind] if name.lower().endswith(form)), None)
        if form is None:
            endings = ", ".join(FORMS[kind])
            what = "data set" if kind == "data" else kind
            hint = "export it to ONNX: pickles and .pt2 files can run code" if kind == "model" else ""
            raise SpecError(f"a {what} as {endings}", got=repr(label(name)), hint=hint)
        new = secrets.token_hex(8)
        with _room(self.folder / "incoming" / new) as room:
            file = room / f"{_slug(name, form)}{form}"
            size = _receive(stream, file, self.limit)
            if kind == "model" and form == ".zip":
                _unpack(file, file.with_suffix(""))
                file.unlink()
                file = file.with_suffix("")
            facts = self.look(kind, file, reading)
            item = Item(id=new, kind=kind, name=label(name), form=form, file=file.name, size=size, created=_now())
            return self._keep(room, item.model_copy(update={"reading": reading, "facts": facts}))

    def make(self, kind: Kind, name: str, facts: dict[str, Any], write: Callable[[Path], None]) -> Item:
        """Keep something the service makes itself, written by `write` to a folder it is given."""
        new = secrets.token_hex(8)
        with _room(self.folder / "incoming" / new) as room:
            file = room / _slug(name, "")
            write(file)
            size = sum(path.stat().st_size for path in room.rglob("*") if path.is_file())
            item = Item(id=new, kind=kind, name=label(name), form=kind, file=file.name, size=size, created=_now())
            return self._keep(room, item.model_copy(update={"facts": facts}))

    def items(self, kind: Kind) -> list[Item]:
        """All of a kind, the newest first."""
        read = map(self._read, (self.folder / _FOLDERS[kind]).glob(f"*/{_CARD}"))
        return sorted(filter(None, read), key=lambda item: (item.created, item.id), reverse=True)

    def find(self, kind: Kind, id: str) -> Item:
        """One of them.

        Raises:
            Missing: If there is none under that id.
        """
        item = self._read(self.folder / _FOLDERS[kind] / id / _CARD) if _ID.fullmatch(id) else None
        if item is None:
            raise Missing(f"the id of a {kind} that is here", got=repr(id[:40]), hint=f"list the {_FOLDERS[kind]}")
        return item

    def place(self, item: Item) -> Path:
        """The file or folder with its content, as `models.load`, `open_data` and `load_guard` take it."""
        return self.folder / _FOLDERS[item.kind] / item.id / item.file

    def remove(self, kind: Kind, id: str) -> None:
        """Delete one of them.

        Raises:
            Missing: If there is none under that id.
        """
        item = self.find(kind, id)
        gone = self.folder / "incoming" / f"{item.id}.gone"
        (self.folder / _FOLDERS[kind] / item.id).rename(gone)  # whole or not at all, also for who is listing them
        shutil.rmtree(gone, ignore_errors=True)

    def _keep(self, room: Path, item: Item) -> Item:
        replace(room / _CARD, item.model_dump_json(indent=1).encode())
        room.rename(self.folder / _FOLDERS[item.kind] / item.id)
        return item

    def _read(self, path: Path) -> Item | None:
        try:
            return Item.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValidationError) as error:
            raise DataError("a card that the service wrote", got=f"{path.parent.name}/{_CARD}: {error}") from None


def sweep(folder: Path) -> None:
    """Take away uploads of a data directory that nobody receives any more: their process died in the midst of them."""
    for path in (folder / "incoming").iterdir():
        with suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > _ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def label(name: str) -> str:
    """A client's name for people to read: without folders and control characters, not too long."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return "".join(c for c in last if c.isprintable())[:_NAME] or "unnamed"


@contextmanager
def _room(folder: Path) -> Generator[Path]:
    """A folder for one upload, gone with all that is in it unless it was moved to its place."""
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _slug(name: str, form: str) -> str:
    """What of a client's name can be the name of a file."""
    plain = label(name)[: len(label(name)) - len(form)] if form else label(name)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:40] or "unnamed"


def _receive(stream: IO[bytes], file: Path, limit: int) -> int:
    size = 0
    with file.open("xb") as out:
        while piece := stream.read(_PIECE):
            size += len(piece)
            if size > limit:
                raise TooLarge(f"an upload of at most {limit:,} bytes", got="more")
            out.write(piece)
    if not size:
        raise SpecError("a file with something in it", got="no bytes")
    return size


def _unpack(archive: Path, folder: Path) -> None:
    """Take the files a model consists of out of an archive, in which they may lie in one folder; nothing else may."""
    try:
        with zipfile.ZipFile(archive) as file:
            infos = [info for info in file.infolist() if not info.is_dir()]
            paths = [PurePosixPath(info.filename) for info in infos]
            if len({path.parent for path in paths}) != 1 or len(paths) > len(_MEMBERS):
                raise ModelError(_FOLDER, got=f"{len(paths)} files in {len({p.parent for p in paths})} folders")
            folder.mkdir(mode=0o700)
            for info, path in zip(infos, paths, strict=True):
                if path.name not in _MEMBERS:
                    raise ModelError(_FOLDER, got=repr(label(info.filename)), hint="leave other files out")
                if info.file_size > _MEMBER_BYTES or info.flag_bits & 1:
                    came = f"{path.name} of {info.file_size:,} bytes"
                    raise ModelError(f"files of at most {_MEMBER_BYTES:,} bytes, without a password", got=came)
                with file.open(info) as source:
                    _receive(source, folder / path.name, info.file_size)
    except RempartError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ModelError("a zip archive that is whole", got=str(error)) from None


_FOLDER = f"a zip of one model's folder, with {', '.join(sorted(_MEMBERS))} of it and nothing else"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
