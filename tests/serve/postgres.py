"""A PostgreSQL of a test's own: a cluster in a folder, reached through a socket in it, without a network."""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


def binaries() -> Path | None:
    """Where its programs are, if they are."""
    found = shutil.which("pg_ctl")
    places = [Path(found).parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


@dataclass
class Postgres:
    folder: Path
    place: Path

    @staticmethod
    def start(place: Path) -> "Postgres":
        folder = Path(tempfile.mkdtemp(prefix="rempart-pg-"))  # the name of a socket has 107 characters at most
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        server = Postgres(folder, place)
        server.run("initdb", "-D", f"{folder}/data", "-U", "rempart", "--auth=trust", "-E", "UTF8", "--no-sync")
        server.control("start")
        return server

    @property
    def url(self) -> str:
        return f"postgresql://rempart@/rempart?host={self.folder}"

    def control(self, what: str, *more: str) -> None:
        options = f"-k {self.folder} -c listen_addresses='' -c max_connections=60"
        log = f"{self.folder}/log"
        self.run("pg_ctl", "-D", f"{self.folder}/data", "-w", "-l", log, "-o", options, *more, what)

    def run(self, program: str, *arguments: str) -> None:
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        subprocess.run(
            [*user, str(self.place / program), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,  # a server keeps what it gets: nobody waits for its end
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
        )

    def close(self) -> None:
        self.control("stop", "-m", "immediate")
        shutil.rmtree(self.folder, ignore_errors=True)
