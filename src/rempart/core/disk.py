"""Files written whole or not at all."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: no reader meets half a file, a failed write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
