"""Files written whole or not at all."""

import os
from pathlib import Path

from rempart.core.errors import SpecError


def replace(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: no reader meets half a file, a failed write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def refuse_folder(path: Path) -> None:
    """Say that a file cannot be written where a folder is, before the work that it is for.

    Raises:
        SpecError: If there is a folder under that name.
    """
    if path.is_dir():
        raise SpecError("--out to name a file", got=f"{path}, which is a folder", hint=f"for example {path}/out.csv")


def unread(error: OSError) -> str:
    """What is not there, as a path: the folder, or the folder without the file; what else is wrong, in brackets."""
    file = Path(error.filename)
    if not file.parent.is_dir():
        return f"{file.parent}, which {'is no folder' if file.parent.exists() else 'does not exist'}"
    return f"{file} ({error.strerror})" if file.exists() else f"{file.parent} without {file.name}"
