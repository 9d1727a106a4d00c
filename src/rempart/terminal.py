"""Progress on a terminal: a bar where there is one, a line now and then where the output goes to a file."""

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rempart.core.events import Event, Notify

_QUIET_SECONDS = 10.0


@contextmanager
def progress() -> Generator[Notify]:
    """Yield a `Notify` that shows progress on the error stream."""
    console = Console(stderr=True)
    if console.is_terminal:
        with _bars(console) as notify:
            yield notify
    else:
        yield _lines()


@contextmanager
def _bars(console: Console) -> Generator[Notify]:
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, refresh_per_second=5) as bars:

        def notify(event: Event) -> None:
            key = f"{event.stage}/{event.total}"
            if key not in tasks or event.done < bars.tasks[tasks[key]].completed:
                tasks[key] = bars.add_task(event.stage, total=event.total, values="")
            shown = _values(event)
            bars.update(tasks[key], completed=event.done, values=shown)

        yield notify


def _lines() -> Notify:
    last_stage, last_time = "", 0.0

    def notify(event: Event) -> None:
        nonlocal last_stage, last_time
        finished = event.total is not None and event.done >= event.total
        now = time.monotonic()
        if event.stage == last_stage and not finished and now - last_time < _QUIET_SECONDS:
            return
        last_stage, last_time = event.stage, now
        total = "" if event.total is None else f"/{event.total}"
        print(f"{event.stage:<14} {event.done}{total}  {_values(event)}".rstrip(), file=sys.stderr, flush=True)

    return notify


def _values(event: Event) -> str:
    shown = [
        f"{name} {value:.1%}" if "accuracy" in name else f"{name} {value:.4g}" for name, value in event.values.items()
    ]
    return "  ".join([*(s for s in shown if not s.startswith("batch ")), *([event.note] if event.note else [])])
