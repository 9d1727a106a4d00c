"""One piece of work in several processes: who am I, how many are we, and everybody's results to the first."""

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from rempart.core.errors import RempartError, SpecError

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for the first one to listen."""


_LARGEST = 2**22
"""Bytes sent at a time: the store refuses values over 8 MiB."""
_PARENT = "REMPART_PARENT"


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that share the work.

    Attributes:
        number: 0 is the first; it gets the results and writes the report.
        world: Number of processes.
        local: Number among those on this machine: its GPU.
        gather: Takes this process's results; returns those of all in the first process, None in the others.
        store: Where the processes meet, for `torch.distributed`; None for a process alone.
    """

    number: int
    world: int
    local: int
    gather: Callable[[Sequence[bytes]], list[bytes] | None]
    store: Any = None


ALONE = Ranks(0, 1, 0, list)


def launched() -> tuple[int, int, int] | None:
    """Number, world and local number, where torchrun or `srun` started this process as one of several."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            number, world, local = (int(os.environ[name]) for name in names)
            if world > 1:
                return number, world, local
    return None


@contextmanager
def ranks(processes: int, command: Sequence[str]) -> Generator[Ranks]:
    """Join the processes that were started with this one, or start `processes - 1` more that run `command`.

    On a processor the threads of this machine are shared out. When this process leaves, those it started end.

    Raises:
        SpecError: If started by `srun` without MASTER_ADDR and MASTER_PORT.
        RempartError: From `gather`, if another process failed.
    """
    place, parent = launched(), os.environ.pop(_PARENT, None)
    if parent is not None:
        threading.Thread(target=_follow, args=(int(parent),), daemon=True).start()
    if place is None and processes == 1:
        yield ALONE
        return
    started: list[subprocess.Popen[bytes]] = []
    threads = torch.get_num_threads()
    if place is None:
        place = 0, processes, 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        torch.set_num_threads(max(1, threads // processes))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        os.environ |= shared
        shared["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        for number in range(1, processes):
            own = {"RANK": str(number), "LOCAL_RANK": str(number), _PARENT: str(os.getpid())}
            env = {**os.environ, **shared, **own}
            started.append(subprocess.Popen([*command], env=env, stdout=subprocess.DEVNULL))
    elif not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        hint = "export MASTER_ADDR=$(scontrol show hostnames $SLURM_NODELIST | head -n 1) MASTER_PORT=29500"
        raise SpecError("MASTER_ADDR and MASTER_PORT in the environment", got="neither or one", hint=hint)
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    number, world, local = place
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun listens for us
    met = False

    def gather(mine: Sequence[bytes]) -> list[bytes] | None:
        nonlocal met
        for at, content in enumerate(mine if number else ()):
            parts = range(0, len(content), _LARGEST) or (0,)
            for part in parts:
                store.set(f"{number}/{at}/{part}", content[part : part + _LARGEST])  # pyright: ignore[reportArgumentType]
            store.set(f"{number}/{at}", str(len(content)))
        if number:
            store.set(str(number), str(len(mine)))
            return None
        everything = list(mine)
        for other in range(1, world):
            while not store.check([str(other)]):
                for at, process in enumerate(started, 1):
                    status = process.poll()  # a process that has sent everything ends with 0
                    if status is not None and (status or not store.check([str(at)])):
                        expected, hint = (
                            f"process {at} of {world} to finish",
                            "see its message above; what is done is kept",
                        )
                        raise RempartError(expected, got=f"exit status {process.returncode}", hint=hint)
                time.sleep(0.05)  # a wait inside the store would be deaf to Ctrl-C
            for name in (f"{other}/{at}" for at in range(int(store.get(str(other))))):
                parts = range(0, int(store.get(name)), _LARGEST) or (0,)
                everything.append(b"".join(store.get(f"{name}/{part}") for part in parts))
        met = True
        torch.set_num_threads(threads)  # the others are done
        return everything

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        first = number == 0 and not hosted
        server = TCPStore(host, port, world, is_master=first, timeout=_PATIENCE, wait_for_workers=False)
        store = PrefixStore(f"rempart/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)
        yield Ranks(number, world, local, gather, store)
    finally:
        for process in started:
            if not met:
                process.terminate()
        for process in started:
            process.wait()
        torch.set_num_threads(threads)


def _follow(parent: int) -> None:
    """End this process when the one that started it is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(130)
