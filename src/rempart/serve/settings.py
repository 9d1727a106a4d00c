"""What a deployment of the service is told at its start."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from rempart.core.errors import SpecError

GIB = 2**30
DATABASE = "REMPART_DATABASE"
"""Environment variable of the URL, which holds a password that a command line would show to all users."""
LOCK = "worker.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One deployment: everything it keeps lies in `folder`, but for the job table where `database` is elsewhere.

    Attributes:
        folder: The data directory. Workers on other machines need the same one.
        database: URL of a PostgreSQL database for the job table; None: a SQLite file in `folder`.
        jobs: Jobs a worker runs at once. The table keeps it: of several workers, the last to start sets it for all.
        timeout: Seconds an attempt of a job may take.
        memory: Bytes of memory a job may use, with its children.
        upload: Bytes of one upload.
        attempts: How often a job whose process dies is tried.
        tokens: Whether every request needs a token; False on the loopback interface alone.
        secure: Whether the service is reached by HTTPS, so that cookies travel by nothing else.
    """

    folder: Path
    database: str | None = None
    jobs: int = 1
    timeout: float = 6 * 3600.0
    memory: int = 4 * GIB
    upload: int = 2 * GIB
    attempts: int = 3
    tokens: bool = False
    secure: bool = False

    @property
    def url(self) -> str:
        """URL of the job table."""
        return self.database or f"sqlite:///{self.folder / 'jobs.sqlite'}"


def prepared(settings: Settings) -> Settings:
    """The same settings, their data directory made, readable by its owner alone.

    Raises:
        SpecError: If nothing can be written there, or the database is of a kind not supported.
    """
    if settings.database is not None and not settings.database.startswith(("postgresql://", "sqlite:///")):
        hint = "for example postgresql://user:password@host/rempart"
        scheme = settings.database.partition("://")[0]
        raise SpecError("--database as a URL of PostgreSQL", got=f"{scheme}://...", hint=hint)
    try:
        settings.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("incoming", "models", "data", "guards", "jobs", "workers"):
            (settings.folder / name).mkdir(exist_ok=True, mode=0o700)
        if not os.access(settings.folder, os.W_OK):
            raise PermissionError(13, "not writable")
    except OSError as error:
        came = f"{settings.folder} ({error.strerror})"
        raise SpecError("a data directory that can be written to", got=came, hint="choose another --folder") from None
    return replace(settings, folder=settings.folder.resolve())


def memory_of_machine() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
