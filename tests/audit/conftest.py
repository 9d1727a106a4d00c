"""The networks of `planted`, trained once."""

import pytest

from audit.planted import Trained, networks


@pytest.fixture(scope="session")
def trained() -> Trained:
    return networks()
