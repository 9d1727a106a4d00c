"""Images inside tables: Parquet files as Hugging Face has them, and folders that `datasets` saved to disk.

Only pyarrow reads them; nothing in them is run, and paths in them are not followed.
Source: the Parquet and Arrow formats; the layout of the library datasets (Lhoest et al. 2021).
"""

import json
import re
import struct
import zlib
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rempart.core.errors import DataError
from rempart.core.names import normal
from rempart.data import files
from rempart.data.arrays import MAX_CLASSES, numbered, whole_numbers
from rempart.data.modifiers import Modifiers
from rempart.data.reading import pictures
from rempart.data.samples import SPLITS, Data, choose, split_of

_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    NotImplementedError,
    AttributeError,
    MemoryError,
    struct.error,
)
_ENDINGS = (".parquet", ".arrow")
_LONGEST = 500  # letters of a label
_INFO, _DICT, _STATE = "dataset_info.json", "dataset_dict.json", "state.json"


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are read together.

    Attributes:
        file: Where they are.
        group: The row group of a Parquet file; None for a whole Arrow file.
        rows: How many.
    """

    file: Path
    group: int | None
    rows: int


@dataclass(frozen=True, slots=True)
class Rows:
    """The images of a table, by the number of their row.

    Attributes:
        parts: In order.
        starts_at: Number of the first row of each.
        column: The column of the images; its bytes are in `column.bytes` or the column itself.
    """

    parts: tuple[Part, ...]
    starts_at: tuple[int, ...]
    column: str

    def contents(self, names: Iterable[str]) -> Iterator[bytes]:
        """The bytes of the image files."""
        for name in names:
            at = bisect(self.starts_at, int(name)) - 1
            part = self.parts[at]
            with _parsing(part.file):
                stamp = part.file.stat()
                values = _images(part, self.column, stamp.st_mtime_ns, stamp.st_size)
                content = values[int(name) - self.starts_at[at]].as_py()
            if not content:
                hint = "store the bytes in the table: paths in it are not followed"
                raise DataError("the bytes of every image", got=f"none in row {name}", hint=hint)
            files.within(len(content), files.MAX_IMAGE_BYTES, "MAX_IMAGE_BYTES", f"row {name}")
            yield content

    def starts(self, names: Iterable[str], size: int) -> Iterator[bytes]:
        """The first bytes of each."""
        return (content[:size] for content in self.contents(names))

    def stamps(self, names: Iterable[str]) -> Iterator[tuple[int, int]]:
        """CRC-32 and size of each."""
        return ((zlib.crc32(content), len(content)) for content in self.contents(names))


def is_table(path: Path) -> bool:
    """Whether a path is a Parquet file or a folder of tables."""
    if path.is_dir():
        return any((path / name).is_file() for name in (_INFO, _DICT)) or bool(_parquet_files(path))
    return path.suffix.lower() in _ENDINGS


def image_table(path: Path, split: str, modifiers: Modifiers) -> Data:
    """Images in a column of a table, their classes in another; the names of the classes from the table's own notes."""
    modifiers.only("@64", "@grey or @rgb", "@label", "@image", what="tables of images")
    saved = path.is_dir() and any((path / name).is_file() for name in (_INFO, _DICT))
    found = _saved(path) if saved else _by_split([path] if path.is_file() else _parquet_files(path), path)
    split = "all" if "all" in found else split
    choose(split, [name for name in (*SPLITS, "all") if name in found], path.name)
    with _parsing(path):
        features = _features(found[split][0])
        image, label = _columns(found[split][0], features, modifiers)
        wanted = {name: _labels(found[name], label) for name in dict.fromkeys((split, "train")) if name in found}
        parts = tuple(part for file in found[split] for part in _parts(file, image))
    names = features.get(label, {}).get("names")
    numbers, class_names = _named(wanted, split, names)
    starts = np.cumsum([0, *(part.rows for part in parts)]).tolist()
    files.within(starts[-1], files.MAX_ENTRIES * 10, "ten times MAX_ENTRIES", path.name, "rows")
    store = Rows(parts, tuple(starts[:-1]), image)
    rows = [str(k) for k in range(len(numbers))]
    if not rows or len(rows) != starts[-1]:
        raise DataError("as many labels as images, and one at least", got=f"{len(rows)} for {starts[-1]}")
    return pictures(store, rows, numbers, split, class_names, modifiers, first="0")


def _named(labels: Mapping[str, np.ndarray], split: str, names: Any) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The numbers of the labels of a split, and the class names."""
    if not names or labels[split].dtype.kind in "UO":
        return numbered(labels, split)
    if not isinstance(names, list) or len(names) > MAX_CLASSES:
        raise DataError(f"a list of at most {MAX_CLASSES:,} class names", got=type(names).__name__)
    own = whole_numbers(labels[split], f"{split} labels", lowest=-1)
    if len(names) < 2 or own.min(initial=0) < 0 or own.max(initial=0) >= len(names):
        came = f"{own.min(initial=0)} to {own.max(initial=0)} for {len(names)} names"
        hint = "choose another split" + ("; -1 stands for images without a label" if own.min(initial=0) < 0 else "")
        raise DataError("labels that number two or more class names", got=came, hint=hint)
    return torch.from_numpy(own.astype(np.int64)), tuple(normal(str(name)) for name in names)


class _parsing:
    """Errors of pyarrow as DataError."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError:
            hint = "pip install 'rempart[parquet]'"
            raise DataError("the package pyarrow, to read tables of images", got="none", hint=hint) from None
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, _: object) -> None:
        if isinstance(error, _BROKEN) and not isinstance(error, DataError):
            raise DataError(
                "a table of images that is whole", got=f"{self.path.name}: {type(error).__name__}"
            ) from None


def _parquet_files(path: Path) -> list[Path]:
    """The Parquet files of a folder, in folders of configurations and splits too, as `config/train/0000.parquet`."""
    depths = ("*", "*/*", "*/*/*")
    found = [file for depth in depths for file in path.glob(depth) if file.suffix.lower() == ".parquet"]
    return sorted(file for file in found if file.is_file() and not files.is_noise(str(file.relative_to(path))))


def _by_split(tables: list[Path], path: Path) -> dict[str, list[Path]]:
    """Files by the split that their name or their folder names; else `all`."""
    found: dict[str, list[Path]] = {}
    configurations: dict[str, None] = {}
    for file in tables:
        folders = () if file == path else file.relative_to(path).parts[:-1]
        named = [split for word in re.split(r"[-_.\s]", file.name) if (split := split_of(word))]
        of_folder = [split for folder in folders if (split := split_of(folder.removeprefix("partial-")))]
        splits = dict.fromkeys(of_folder[-1:] or named)
        found.setdefault(next(iter(splits)) if len(splits) == 1 else "all", []).append(file)
        own = [folder for folder in folders if folder != "data" and not split_of(folder.removeprefix("partial-"))]
        configurations |= {"/".join(own): None}
    if len(configurations) > 1:
        came = ", ".join(name or "files beside it" for name in configurations)
        raise DataError(f"one configuration in {path.name}", got=came, hint="give the folder of one of them")
    if "all" in found and len(found) > 1:
        came = f"{found['all'][0].name} beside others"
        raise DataError("files named like their splits, train-00000-of-00001.parquet", got=came)
    return found


def _saved(path: Path) -> dict[str, list[Path]]:
    """The Arrow files of a folder that `save_to_disk` wrote, by split."""
    if not (path / _DICT).is_file():
        return {"all": _arrow_files(path)}
    names = _json(path / _DICT).get("splits") or []
    found: dict[str, list[Path]] = {}
    for name in names:
        split = split_of(str(name))
        if split is None or split in found:
            raise DataError(
                f"one split each of {', '.join(SPLITS)}", got=f"{', '.join(map(str, names))} in {path.name}"
            )
        found[split] = _arrow_files(path / name)
    return found


def _arrow_files(path: Path) -> list[Path]:
    state = _json(path / _STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError("rows in the order of their file", got=f"a selection in {path.name}", hint="save it anew")
    names = [str(entry.get("filename")) for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    if not names or any(Path(name).name != name or not (path / name).is_file() for name in names):
        raise DataError("the files that state.json names, beside it", got=path.name)
    return [path / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(2**24)
        found = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("a JSON file that can be read", got=f"{path.name}: {type(error).__name__}") from None
    if not isinstance(found, dict):
        raise DataError("a JSON object", got=path.name)
    return found


def _features(file: Path) -> dict[str, Any]:
    """What the library wrote about the columns."""
    notes = (_schema(file).metadata or {}).get(b"huggingface")
    if notes is not None:
        body = json.loads(notes)
        info = body.get("info") if isinstance(body, dict) else None
    else:
        info = _json(file.parent / _INFO) if (file.parent / _INFO).is_file() else None
    found = info.get("features") if isinstance(info, dict) else None
    return {name: told for name, told in found.items() if isinstance(told, dict)} if isinstance(found, dict) else {}


def _schema(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        return pq.read_schema(file)
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(_stream(source)).schema


def _stream(source: Any) -> Any:
    """Where the stream begins: the file format puts eight bytes before it, and what stands behind it is not needed."""
    source.seek(8 if source.read(6) == b"ARROW1" else 0)
    return source


def _columns(file: Path, features: Mapping[str, Any], modifiers: Modifiers) -> tuple[str, str]:
    """The columns of images and labels: as named, by their features, or by the usual names."""
    have = _schema(file).names
    found: list[str] = []
    usual = (("image", "img", "pixel_values"), ("label", "labels", "class"))
    for what, named, feature, names in zip(
        ("image", "label"), (modifiers.image, modifiers.label), ("Image", "ClassLabel"), usual, strict=True
    ):
        typed = [name for name in have if features.get(name, {}).get("_type") == feature]
        known = [named] if named else typed if len(typed) == 1 else [name for name in names if name in have]
        if len(known) != 1 or known[0] not in have:
            raise DataError(f"one column of {what}s", got=", ".join(have), hint=f"name it: @{what}=COLUMN")
        found.append(known[0])
    return found[0], found[1]


def _labels(tables: Iterable[Path], column: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts: list[np.ndarray] = []
    for file in tables:
        if file.suffix.lower() == ".parquet":
            _within(pq.read_metadata(file), file)
            values = pq.read_table(file, columns=[column], read_dictionary=[column])[column]
        else:
            values = _arrow(file, file.stat().st_mtime_ns, file.stat().st_size)[column]
        values = _words(values)
        if values.null_count:
            came = f"{values.null_count:,} of {len(values):,} rows without one in {file.name}"
            raise DataError(f"a label in {column} for every image", got=came, hint="leave these rows out")
        text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        if not any(k(values.type) for k in (*text, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)):
            raise DataError(f"whole numbers or words in {column}", got=f"{values.type} in {file.name}")
        parts.append(values.to_numpy())
    return np.concatenate(parts)


def _words(values: Any) -> Any:
    """Labels in full: decoded once it is known that none is long, for a dictionary may repeat it at will."""
    import pyarrow as pa

    if not pa.types.is_dictionary(values.type):
        return values
    for chunk in values.chunks:
        longest = max((len(str(word)) for word in chunk.dictionary.to_pylist() if word is not None), default=0)
        files.within(longest, _LONGEST, "of a label", "the column of labels", "letters")
    return values.cast(values.type.value_type)


def _within(metadata: Any, file: Path) -> None:
    """Hold what a Parquet file claims against the limits."""
    size = packed = 0
    files.within(metadata.num_rows, files.MAX_ENTRIES, "MAX_ENTRIES", file.name, "rows")
    for group in range(metadata.num_row_groups):
        for k in range(metadata.num_columns):
            column = metadata.row_group(group).column(k)
            size, packed = size + column.total_uncompressed_size, packed + column.total_compressed_size
            files.within(column.total_uncompressed_size, files.MAX_VOLUME_BYTES, "MAX_VOLUME_BYTES", file.name)
    files.within(size, files.MAX_TOTAL_BYTES, "MAX_TOTAL_BYTES", file.name)
    if size > files.MAX_IMAGE_BYTES:
        files.within(size / max(packed, 1), files.MAX_RATIO, "MAX_RATIO", file.name, "times its compressed size")


def _parts(file: Path, column: str) -> Iterator[Part]:
    import pyarrow.parquet as pq

    if file.suffix.lower() == ".parquet":
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            yield Part(file, group, metadata.row_group(group).num_rows)
    else:
        yield Part(file, None, len(_arrow(file, file.stat().st_mtime_ns, file.stat().st_size)))


@lru_cache(maxsize=2)
def _images(part: Part, column: str, *stamp: int) -> Any:
    """The bytes of the images of some rows, as an Arrow array; `stamp` tells whether the file has changed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if part.group is None:
        return pa.chunked_array([_bytes_of(chunk) for chunk in _arrow(part.file, *stamp)[column].chunks])
    # Row by row: one image that a dictionary repeats a million times is to be noticed before it fills the memory.
    chunks: list[Any] = []
    total = 0
    with pq.ParquetFile(part.file) as file:
        for batch in file.iter_batches(batch_size=1, row_groups=[part.group], columns=[column]):
            values = _bytes_of(batch.column(column))
            total += values.nbytes
            files.within(total, files.MAX_VOLUME_BYTES, "MAX_VOLUME_BYTES", f"a row group of {part.file.name}")
            chunks.append(values)
    return pa.chunked_array(chunks)


def _bytes_of(values: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_struct(values.type):
        if values.type.get_field_index("bytes") < 0:
            hint = "store the bytes in the table: paths in it are not followed"
            raise DataError("the bytes of every image", got=str(values.type), hint=hint)
        values = values.field("bytes")
    if not any(kind(values.type) for kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        raise DataError("bytes of image files", got=str(values.type))
    return values


@lru_cache(maxsize=4)
def _arrow(file: Path, *_: int) -> Any:
    """An Arrow stream, mapped and not copied; validated, because offsets that point elsewhere would be followed."""
    import pyarrow as pa

    files.within(file.stat().st_size, files.MAX_TOTAL_BYTES, "MAX_TOTAL_BYTES", file.name)
    with pa.memory_map(str(file)) as source:
        for message in pa.ipc.MessageReader.open_stream(_stream(source)):
            if message.type == "record batch" and _compressed(message.metadata.to_pybytes()):
                raise DataError("Arrow data as datasets saves them, not compressed", got=file.name)
    found = pa.ipc.open_stream(_stream(pa.memory_map(str(file)))).read_all()
    found.validate(full=True)
    files.within(len(found), files.MAX_ENTRIES * 10, "ten times MAX_ENTRIES", file.name, "rows")
    return found


def _compressed(message: bytes) -> bool:
    """Whether the buffers of a record batch are compressed: field 3 of the table RecordBatch in its flatbuffer."""

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", message, table)[0]
        (size,) = struct.unpack_from("<H", message, vtable)
        place = 4 + 2 * number
        (offset,) = struct.unpack_from("<H", message, vtable + place) if place < size else (0,)
        return table + offset if offset else 0

    root = struct.unpack_from("<I", message, 0)[0]
    header = field(root, 2)  # Message: version, header type, header
    batch = header + struct.unpack_from("<I", message, header)[0]
    return field(batch, 3) != 0
