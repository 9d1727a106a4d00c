"""The public surface, and what importing it costs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import rempart


def test_every_public_name_exists_and_every_lazy_name_is_public() -> None:
    assert sorted(rempart.__all__) == sorted(name for names in rempart._HOMES.values() for name in names)
    for name in rempart.__all__:
        assert getattr(rempart, name).__name__ == name


def test_no_lazy_name_hides_a_submodule() -> None:
    folder = Path(rempart.__file__).parent
    assert not {path.stem for path in folder.iterdir()} & set(rempart.__all__)


def test_import_does_not_load_torch() -> None:
    code = "import rempart, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchvision_is_absent_or_imports() -> None:
    """A torchvision built for another torch breaks torchmetrics and transformers at import; it must not creep in."""
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("torchvision")


def test_the_old_place_of_the_data_can_be_imported() -> None:
    old, new = importlib.import_module("rempart.core.data"), importlib.import_module("rempart.data")
    assert all(getattr(old, name) is getattr(new, name) for name in new.__all__)
    for name in ("samples", "arrays", "dicom"):
        assert importlib.import_module(f"rempart.core.data.{name}") is importlib.import_module(f"rempart.data.{name}")
