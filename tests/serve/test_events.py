"""Answers with events: they last, and those who watch leave room for those who ask."""

import time

import pytest

from rempart.report.schema import TrainSpec
from rempart.serve import api
from rempart.serve.app import create_app
from rempart.serve.settings import Settings


@pytest.fixture
def app(tmp_path):
    made = create_app(Settings(folder=tmp_path / "data"))
    yield made
    made.extensions["rempart"].jobs.table.destroy()


def test_when_many_watch_further_ones_are_told_what_is_there_and_come_back(app):
    """Each that stays holds a thread of the server: were there no limit, sixteen open pages would stop it."""
    jobs = app.extensions["rempart"].jobs
    id = jobs.submit({}, TrainSpec(data="digits", model="mlp", out="x"), user="u", key=None)[0].id
    url = f"/api/v1/jobs/{id}/events"
    staying = [app.test_client().get(url) for _ in range(8)]
    started = time.monotonic()
    told = app.test_client().get(url).get_data(as_text=True)
    assert time.monotonic() - started < 2
    assert told.startswith("event: state\ndata: {") and '"state":"queued"' in told
    for answer in staying:
        answer.close()  # as where a page is closed
    assert api._STAYING._value == 8
    watched = app.test_client().get(url)
    assert api._STAYING._value == 7
    jobs.cancel(id)
    assert watched.get_data(as_text=True).endswith("\n\n")
    assert api._STAYING._value == 8
