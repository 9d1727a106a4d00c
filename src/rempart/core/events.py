"""Progress, heartbeat and cancellation: one event type, one callback."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One step of long work.

    Attributes:
        stage: What is running, for example `attack pgd`.
        done: Units finished, in [0, total].
        total: Units in all, or None where it is not known.
        values: Figures worth showing, for example the accuracy so far.
        note: One sentence for people.
    """

    stage: str
    done: int
    total: int | None = None
    values: Mapping[str, float] = field(default_factory=dict[str, float])
    note: str = ""


Notify = Callable[[Event], None]
"""Receives events. May raise `Cancelled` to stop the work."""


def named(stage: str, notify: Notify) -> Notify:
    """The same listener, told another name for what is running."""
    return lambda event: notify(replace(event, stage=stage))


def silent(event: Event) -> None:
    """Ignore the event: the default listener of every library function."""
