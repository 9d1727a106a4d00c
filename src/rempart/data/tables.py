"""Tables in CSV: images by path with their labels, and patients by path or number."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path, PureWindowsPath

import torch

from rempart.core.errors import DataError
from rempart.core.names import normal
from rempart.data import files
from rempart.data.arrays import read_labels
from rempart.data.modifiers import Modifiers
from rempart.data.reading import of_files
from rempart.data.samples import SPLITS, Data, choose, split_of

MAX_TABLE_BYTES = 64 * 2**20
"""Size of a CSV file."""

Row = Mapping[str, str]


def table(path: Path, split: str, modifiers: Modifiers) -> Data:
    """Images listed with their labels: columns `path` and `label`, optionally `split`, `patient` and `mask`.

    Paths are relative to the folder of the table, and none leads out of it. The samples keep the order of the table.
    """
    rows = read_table(path, ("path", "label"), ("split", "patient", "mask"))
    for row in rows:
        if files.leads_out(row["path"]):
            came = f"{row['path']!r} in line {row['line']}"
            raise DataError("paths inside the folder of the table", got=came, hint="lay the images beside the table")
    if modifiers.mask is not None:
        raise DataError("masks in the column mask of a table", got=f"@mask={modifiers.mask}")
    _once([_path(row["path"]) for row in rows], path)
    split, own = _split(rows, split, path)
    _apart(rows, path)
    store = files.Folder(path.parent, closed=True)
    names = [_there(store, path, row["path"], row["line"]) for row in own]
    masks = [row["mask"] for row in own] if "mask" in rows[0] else None
    if masks is not None and (odd := [name for name in masks if not name or files.leads_out(name)]):
        raise DataError("a mask inside the folder of the table in every line", got=repr(odd[0]))
    if masks is not None:
        masks = [_there(store, path, row["mask"], row["line"]) for row in own]
    first = store.actual(rows[0]["path"]) or rows[0]["path"]
    number_of, class_names = read_labels([row["label"] for row in rows], path.name)
    return of_files(
        store,
        names,
        torch.tensor([number_of[row["label"]] for row in own]),
        split,
        class_names,
        modifiers,
        first=first,
        patients=[row["patient"] for row in own] if all(row.get("patient") for row in own) else None,
        masks=None if masks is None else (store, masks),
    )


def with_patients(data: Data, path: Path) -> Data:
    """The same data with the patient of each sample, from a table with the columns `patient` and `path` or `number`.

    Args:
        data: As `open_data` gives it.
        path: The table. A path is that of the image inside its folder or archive, a number that of the sample.

    Raises:
        DataError: If the table cannot be read, or a sample is not in it.
    """
    rows = read_table(path, ("patient",), ("path", "number"))
    key = "path" if "path" in rows[0] else "number"
    if key not in rows[0]:
        raise DataError("a column path or number beside patient", got=path.name)
    names = data.read.names if isinstance(data.read, files.Files) else None
    if key == "path" and names is None:
        raise DataError("a column number, for data that are no files", got=f"path in {path.name}")
    form = _path if key == "path" else str
    _once([form(row[key]) for row in rows], path)
    known = {form(row[key]): row["patient"] for row in rows}
    keys = [str(k) if names is None or key == "number" else _path(names[k]) for k in data.index.tolist()]
    if missing := [key for key in keys if not known.get(key)]:
        raise DataError("a patient for every sample", got=f"none for {len(missing)}, such as {missing[0]}")
    return replace(data, patients=tuple(known[key] for key in keys))


def read_table(path: Path, needed: Sequence[str], optional: Sequence[str]) -> list[Row]:
    """The rows of a CSV file with a header, those columns only; values without the blanks around them.

    Under `line` stands the number of the line, counted from 1 with the header.

    Raises:
        DataError: If it cannot be read, is too large, or a column or a value that is needed is not there.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TABLE_BYTES + 1)
        files.within(len(content), MAX_TABLE_BYTES, "MAX_TABLE_BYTES", path.name)
        lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        hint = "save it as UTF-8 (in Excel: CSV UTF-8)" if isinstance(error, UnicodeDecodeError) else ""
        raise DataError("a CSV file in UTF-8", got=f"{path.name}: {type(error).__name__}", hint=hint) from None
    files.within(len(lines), files.MAX_ENTRIES, "MAX_ENTRIES", path.name, "lines")
    header = [name.strip().lower() for name in lines[0]] if lines else []
    wanted = [name for name in (*needed, *optional) if name in header]
    if lacking := [name for name in needed if header.count(name) != 1]:
        raise DataError(f"one column named {lacking[0]}", got=f"{', '.join(header) or 'nothing'} in {path.name}")
    rows: list[Row] = []
    short: list[int] = []
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        row = {name: line[header.index(name)].strip() for name in wanted} if len(line) == len(header) else {}
        if all(row.get(name) for name in needed):
            rows.append({**row, "line": str(number)})
        else:
            short.append(number)
    if short:
        more = f" and {len(short) - 1:,} more" if len(short) > 1 else ""
        hint = "fill in or leave out the lines that lack one"
        raise DataError(f"{', '.join(needed)} in every line", got=f"line {short[0]} of {path.name}{more}", hint=hint)
    if not rows:
        raise DataError("lines below the header", got=f"none in {path.name}")
    return rows


def _path(name: str) -> str:
    """A relative path in one form, whatever its Unicode form and slashes."""
    return normal(PureWindowsPath(name).as_posix())


def _there(store: files.Folder, table: Path, name: str, line: str) -> str:
    """The name of a file of the table as the disk spells it."""
    found = store.actual(name)
    if found is None:
        hint = "paths are relative to the folder of the table"
        raise DataError("files that are there", got=f"none at {name!r}, line {line} of {table.name}", hint=hint)
    return found


def _once(values: Sequence[str], path: Path) -> None:
    if len(set(values)) < len(values):
        seen: set[str] = set()
        twice = next(value for value in values if value in seen or seen.add(value))
        raise DataError("every image once", got=f"{twice} twice in {path.name}")


def _split(rows: Sequence[Row], split: str, path: Path) -> tuple[str, Sequence[Row]]:
    """The split, and its rows; one split `all` where no column says."""
    if "split" not in rows[0]:
        return "all", rows
    if odd := {row["split"] for row in rows if split_of(row["split"]) is None}:
        raise DataError(f"splits out of {', '.join(SPLITS)}", got=f"{sorted(odd)[0]!r} in {path.name}")
    choose(split, [name for name in SPLITS if any(split_of(row["split"]) == name for row in rows)], f"{path.name}")
    return split, [row for row in rows if split_of(row["split"]) == split]


def _apart(rows: Sequence[Row], path: Path) -> None:
    """Refuse a patient in two splits: a model tested on patients it learnt from looks better than it is."""
    people = {name: {row.get("patient") for row in rows if split_of(row.get("split", "")) == name} for name in SPLITS}
    for first, second in combinations(SPLITS, 2):
        if both := (people[first] & people[second]) - {"", None}:
            came = f"{len(both)} in {first} and {second} of {path.name}"
            raise DataError("each patient in one split", got=came, hint="split the table by patient")
