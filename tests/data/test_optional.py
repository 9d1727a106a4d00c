"""What reads a kind of data is named where it is not installed."""

import sys
from pathlib import Path

import pytest

from rempart.core.errors import DataError
from rempart.data import open_data


@pytest.mark.parametrize(
    ("name", "modules", "extra"),
    [
        ("0.dcm", ("pydicom",), "medical"),
        ("0.nii", ("nibabel", "nibabel.orientations"), "medical"),
        ("x.parquet", ("pyarrow",), "parquet"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, modules: tuple[str, ...], extra: str
) -> None:
    for kind in "ab":
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes(b"\0" * 128 + b"DICM")
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    place = tmp_path / "a" / name if extra == "parquet" else tmp_path
    with pytest.raises(DataError, match=rf"the package {modules[0]}.*pip install 'rempart\[{extra}\]'"):
        open_data(str(place))
