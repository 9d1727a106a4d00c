"""A file that one process at a time holds until it ends, however it does."""

import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO


def hold(path: Path, *, given_up: Callable[[], bool] = lambda: False) -> IO[str] | None:
    """Wait for the lock and write our machine and number into the file.

    Args:
        path: The file.
        given_up: Whether to wait no more; asked several times a second.

    Returns:
        The file, which is to be kept; None if given up.
    """
    file = path.open("a+")
    while not _taken(file):
        if given_up():
            file.close()
            return None
        time.sleep(0.2)
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()}")
    file.flush()
    return file


def holder(path: Path) -> int | None:
    """Number of the process of this machine that holds the lock; None if none does."""
    try:
        with path.open("a+") as file:
            if _taken(file):
                return None
            file.seek(0)
            host, _, number = file.read().partition(" ")
            return int(number) if host == socket.gethostname() else None
    except ValueError:  # it is being written
        return None


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
