"""Set up the process before torch loads, and fixtures that several files use."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["KERAS_BACKEND"] = "torch"

import importlib.util
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import sklearn.datasets  # noqa: F401  (draws from the global random state of Python when first imported)
import torch
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)  # a busy machine fails no test, nor does chance
settings.load_profile("steady")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    """Put back the handlers of signals: the command line sets its own, and is called in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Fail the test if it draws from a global random state: of Python, of NumPy or of torch.

    Ask for it by name; it cannot be autouse, because building any torch layer draws its first weights there.
    """
    python, legacy, torch_state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # pyright: ignore
    yield
    assert random.getstate() == python, "the global random state of Python was touched"
    assert np.array_equal(np.random.get_state()[1], legacy), "the global random state of NumPy was touched"  # pyright: ignore
    assert torch.equal(torch.get_rng_state(), torch_state), "the global random state of torch was touched"


@pytest.fixture
def docs_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Load a module beside the pages, as mkdocs loads a hook."""
    docs = Path(__file__).resolve().parents[1] / "docs"
    monkeypatch.syspath_prepend(docs)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"docs_{name}", docs / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
