"""`rempart serve`: the web process, and one worker beside it.

The two live apart: jobs go on when the web process dies, and a worker that dies is started again. `worker.lock` in the
data directory belongs to the one worker of `rempart serve`. Another waits for it, so that a web process that is started
anew finds the worker of the one before it at work, and ends it with itself. Workers started by `rempart worker` are
their operator's.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rempart.core.errors import SpecError
from rempart.serve.app import create_app
from rempart.serve.auth import LOCAL_HOSTS, Tokens
from rempart.serve.lock import holder
from rempart.serve.server import CONNECTIONS, server
from rempart.serve.settings import DATABASE, LOCK, Settings, prepared

_LEAVE = 12.0  # seconds for a worker that leaves
_PAUSE, _LONGEST = 1.0, 60.0  # seconds before a worker that died is started again
_STEADY = 60.0  # seconds after which its death is none of a row


def serve(settings: Settings, host: str, port: int, *, worker: bool = True, say: Callable[[str], None]) -> None:
    """Answer requests until SIGTERM, SIGINT or SIGHUP.

    Args:
        settings: The deployment; whether it asks for tokens is decided here.
        host: Interface to listen on.
        port: Port to listen on; 0: a free one.
        worker: Whether to run a worker beside.
        say: Told the address, and what becomes of the worker.

    Raises:
        SpecError: If the data directory, the database or the port cannot be used, or a token is needed first.
    """
    leaving = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: leaving.set())
    settings = guarded(prepared(settings), host)
    app = create_app(settings)
    listening = bound(host, port)
    tempfile.tempdir = str(settings.folder / "incoming")  # large bodies wait there, and nowhere else
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it tells of each request that waits
    answering = server(app, settings, listening)
    keeper = threading.Thread(target=_keep, args=(settings, leaving, say))
    if worker:
        keeper.start()
    threading.Thread(target=_answer, args=(answering, leaving), daemon=True).start()
    address = f"[{host}]" if ":" in host else host
    say(f"http://{address}:{listening.getsockname()[1]}")
    leaving.wait()
    answering.task_dispatcher.shutdown(timeout=2)
    if worker:
        keeper.join()


def _answer(answering: Any, leaving: threading.Event) -> None:
    """Answer requests; a process that cannot any more leaves."""
    try:
        answering.run()
    finally:
        leaving.set()


def guarded(settings: Settings, host: str) -> Settings:
    """The same settings, asking for tokens where there are some, or where others than users of this machine can come.

    Raises:
        SpecError: If a token is needed and there is none.
    """
    known = bool(Tokens.of(settings.folder).all())
    if host not in LOCAL_HOSTS and not known:
        hint = f"make one: rempart token add NAME --role admin --folder {settings.folder}"
        raise SpecError(f"a token, before others than this machine reach {host}", got="none", hint=hint)
    return replace(settings, tokens=known)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        SpecError: If that cannot be.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        came = f"{host}:{port} ({error.strerror})"
        raise SpecError("an address to listen on", got=came, hint="choose another --host or --port") from None


def _keep(settings: Settings, leaving: threading.Event, say: Callable[[str], None]) -> None:
    """Keep a worker running until the web process leaves; then end it, and one that was there before it."""
    pause = _PAUSE
    while not leaving.is_set():
        started = time.monotonic()
        process = subprocess.Popen(command(settings), env=environment(settings), start_new_session=True)
        while process.poll() is None and not leaving.wait(0.2):
            pass
        if process.returncode is None:
            _end(process, settings.folder / LOCK)
            return
        say(f"the worker ended with status {process.returncode}; it is started again in {pause:g} seconds")
        leaving.wait(pause)
        pause = _PAUSE if time.monotonic() - started > _STEADY else min(2 * pause, _LONGEST)


def _end(process: "subprocess.Popen[bytes]", lock: Path) -> None:
    """End a worker, and the one that it waits for."""
    until = time.monotonic() + _LEAVE
    asked: set[int] = set()
    while (left := {holder(lock)} | ({process.pid} if process.poll() is None else set[int]())) - {None}:
        number = signal.SIGTERM if time.monotonic() < until else signal.SIGKILL
        for pid in left - {None} if number == signal.SIGKILL else left - {None} - asked:
            assert pid is not None
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            asked.add(pid)
        time.sleep(0.1)


def command(settings: Settings) -> list[str]:
    """The worker of this deployment, as a command line; the URL of the database is in its environment."""
    told = {name: value for name, value in asdict(settings).items() if name != "database"}
    return [sys.executable, "-P", "-m", "rempart.serve.worker", json.dumps(told, default=str)]


def environment(settings: Settings) -> dict[str, str]:
    """That of the worker."""
    return {**os.environ} if settings.database is None else {**os.environ, DATABASE: settings.database}
