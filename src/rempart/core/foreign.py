"""Code that is not Rempart's: where it is, and a fence around it, so that it ends no process and leaves no trace."""

import functools
import os
import signal
import sys
import sysconfig
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from rempart.core.errors import ModelError, SpecError

STOPPED = threading.Event()
"""Set by the first Ctrl-C, where `stop` handles it."""

_HOME = Path(__file__).resolve().parents[1]
_LIBRARY = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
_INSTALLED = {"site-packages", "dist-packages"}


def stop(*_: object) -> NoReturn:
    """The handler of SIGINT in a process of Rempart: its interruption is told from one that foreign code raises."""
    STOPPED.set()
    raise KeyboardInterrupt


def by_user(error: BaseException) -> bool:
    """Whether somebody pressed Ctrl-C; without our handler there is no telling, and an interruption counts as one."""
    return isinstance(error, KeyboardInterrupt) and (STOPPED.is_set() or signal.getsignal(signal.SIGINT) is not stop)


@functools.cache
def own(path: Path) -> bool:
    """Whether a file is the user's own code, not that of Python, of an installed package or of Rempart."""
    inside = (_HOME, *_LIBRARY)
    return not _INSTALLED & set(path.parts) and not any(path.is_relative_to(place) for place in inside)


def names(code: types.CodeType) -> Iterator[str]:
    """Names that compiled code uses, its inner functions included."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from names(inner)


def place(error: BaseException) -> str:
    """Where an error comes from: the last line of the user's own code, else of an installed package, else the last."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    mine = [at for at in frames if own(at[0])] or [at for at in frames if _INSTALLED & set(at[0].parts)] or frames
    return f"{mine[-1][0].name}, line {mine[-1][1]}" if mine else "code of no known place"


def ending(expected: str, error: BaseException, kind: type[SpecError] = ModelError) -> SpecError:
    """What to say of code that raised what no `except Exception` catches, such as SystemExit, of its own accord."""
    what = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else type(error).__name__
    hint = (
        "nothing was computed: take out what ends the process; where a module is also a script, "
        "put what the script does, reading arguments too, under `if __name__ == '__main__':`"
    )
    return kind(expected, got=f"{what} in {place(error)}", hint=hint)


@contextmanager
def contained(expected: str, kind: type[SpecError] = ModelError) -> Generator[None]:
    """Run foreign code that may not end the process; `os._exit`, and a crash of compiled code, cannot be contained.

    Args:
        expected: What it should do instead, for the message.
        kind: The error to raise.

    Raises:
        SpecError: In place of SystemExit and of all else that is no `Exception`, but for a user's KeyboardInterrupt.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if by_user(error):
            raise
        raise ending(expected, error, kind) from error


@contextmanager
def undisturbed() -> Generator[None]:
    """Put back what foreign code changes for the whole process and verdicts or output depend on.

    Modes of torch (gradients, anomalies, determinism, precision of products), its default dtype, device and number of
    threads, the current directory, arguments, the standard streams (also where they were closed), warnings and the
    handlers of signals. Where modules are found stays found, and after it what was added. The states of random
    generators stay: a factory may seed them for what is built after it, and Rempart draws from none of them.
    """
    import torch  # here, because the command line sets up its handlers before it needs torch

    here, arguments, streams, places = os.getcwd(), list(sys.argv), (sys.stdout, sys.stderr), list(sys.path)
    spares = [_spare(stream) for stream in streams]
    settings: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    )
    modes: list[Any] = [read() for read, _ in settings]
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        with warnings.catch_warnings(), torch.inference_mode(torch.is_inference_mode_enabled()):
            yield
    finally:
        os.chdir(here)
        sys.argv[:] = arguments
        sys.path[:] = [*places, *(added for added in sys.path if added not in places)]
        sys.stdout, sys.stderr = (_reopened(*pair) for pair in zip(streams, spares, strict=True))
        for (read, write), mode in zip(settings, modes, strict=True):
            if read() != mode:
                write(mode)
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def _spare(stream: TextIO) -> int | None:
    """A second descriptor of what a stream writes to; None for a stream without one."""
    with suppress(OSError, ValueError, AttributeError):
        return os.dup(stream.fileno())
    return None


def _reopened(stream: TextIO, spare: int | None) -> TextIO:
    """The stream, or another to the same place where it was closed."""
    if spare is None:
        return stream
    if not stream.closed:
        os.close(spare)
        return stream
    return open(spare, "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
