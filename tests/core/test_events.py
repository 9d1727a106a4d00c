"""Events are frozen values, and the default listener ignores them."""

import dataclasses

import pytest

from rempart.core.events import Event, silent


def test_events_cannot_be_changed_and_do_not_share_values():
    event = Event(stage="s", done=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.done = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert (event.total, event.note, dict(event.values)) == (None, "", {})
    assert event.values is not Event(stage="s", done=1).values
    with pytest.raises(TypeError):
        Event("s", 1)  # pyright: ignore[reportCallIssue]  keyword only: fields may be added


def test_silent_says_nothing(capsys: pytest.CaptureFixture[str]):
    assert silent(Event(stage="s", done=1)) is None
    assert capsys.readouterr() == ("", "")
