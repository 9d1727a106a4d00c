"""The programs in `examples`: what they print and write is what the reports say."""

import importlib.util
import io
import json
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import rempart
from rempart.report import store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mri() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_mri", ROOT / "examples" / "mri.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def textures(path: Path) -> None:
    """Four classes of noisy 16 x 16 images: stripes across, stripes down, a chequered and an even field.

    The contrast of some is small enough for an attack to wipe out, that of others is not.
    """
    rng, (row, column) = np.random.default_rng(0), np.indices((16, 16)) // 2
    patterns = {"glioma": row, "meningioma": column, "notumor": np.zeros((16, 16), int), "pituitary": row + column}
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", 40), ("test", 30)):
            for name, pattern in patterns.items():
                for i in range(count):
                    drawn = 100 + rng.integers(8, 60) * (pattern % 2) + rng.integers(0, 8, (16, 16))
                    stream = io.BytesIO()
                    Image.fromarray(drawn.astype(np.uint8)).save(stream, "PNG")
                    archive.writestr(f"{split}/{name}/{i}.png", stream.getvalue())


def ones(*rows: str) -> int:
    """How many places hold a 1 in all of these."""
    return sum(set(place) == {"1"} for place in zip(*rows, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Keras takes a warning of torch's for a number it cannot read
def test_the_mri_story_tells_what_its_reports_hold_and_does_nothing_twice(
    mri: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    textures(tmp_path / "scans.zip")
    monkeypatch.chdir(tmp_path)
    arguments = ["mri.py", "--data", "scans.zip", "--side", "16", "--quick", "--json", "figures.json"]
    monkeypatch.setattr("sys.argv", arguments)
    mri.main()
    printed, told = capsys.readouterr().out, json.loads(Path("figures.json").read_text())
    runs = Path("runs/mri-quick")
    page = (runs / "story.html").read_text("utf-8")
    for row, name in zip(told["table"], ("plain", "hardened", "defended"), strict=True):
        samples = json.loads((runs / f"audit-{name}" / "report.json").read_text())["samples"]
        expected = {"clean": ones(samples["clean"]), "worst": ones(samples["clean"], *samples["right"].values())}
        assert row["model"] == name and {key: row[key]["k"] for key in expected} == expected
        found = {label: rate["k"] for label, rate in row["attacks"].items()}
        assert found == {label: ones(right) for label, right in samples["right"].items()}
        assert {rate["n"] for rate in (row["clean"], row["worst"])} == {mri.QUICK["images"]}
    assert told["table"][0]["clean"]["k"] > mri.QUICK["images"] / 2, "Keras has learnt nothing"
    with np.load(runs / "detectors" / "samples.npz") as table:
        report = store.read(runs / "detectors")
        limit = next(d.threshold for d in report.detection if d.label == "max-softmax")
        accepted = int((table["max-softmax/clean"] <= limit).sum())
    (row,) = (row for row in told["detectors"]["table"] if row["detector"] == "max-softmax")
    assert (row["held"]["none"]["k"], row["held"]["none"]["n"]) == (accepted, mri.QUICK["images"])
    assert all(words in printed and words in page for words in ("behind bit-depth and median", "max-softmax"))
    assert "worst case" in printed and str(runs / "story.html") in printed

    monkeypatch.setattr(rempart, "run", None)
    monkeypatch.setattr(mri, "train_keras", None)
    mri.main()
    assert json.loads(Path("figures.json").read_text()) == told
