"""The parts that the views of one deployment share."""

from dataclasses import dataclass

from flask import current_app

from rempart.serve.auth import Tokens
from rempart.serve.jobs import Jobs
from rempart.serve.live import Cache
from rempart.serve.settings import Settings
from rempart.serve.store import Store


@dataclass(frozen=True, slots=True)
class Service:
    """One deployment in one web process."""

    settings: Settings
    store: Store
    jobs: Jobs
    cache: Cache
    tokens: Tokens


def service() -> Service:
    """That of the request."""
    return current_app.extensions["rempart"]
