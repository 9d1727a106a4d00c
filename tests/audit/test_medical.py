"""From medical files to a report in their own units, by patient and by volume, with nothing of the patient in it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import rempart
from rempart.core.errors import DataError, ThreatError
from rempart.data import open_data
from rempart.report.html import page
from rempart.report.schema import AttackChoice, AttackSpec, AuditSpec, Report
from rempart.report.text import table

FACTORY = """
import torch
from torch import nn
from rempart import Classifier

class Mean(nn.Module):
    # class 1 where the mean pixel lies above a threshold
    def __init__(self, threshold):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x):
        s = 10 * (x.flatten(1).mean(1) - self.threshold)
        return torch.stack([-s, s], 1)

def classifier():
    return Classifier(Mean({threshold}), shape={shape}, num_classes=2)
"""


def model_of(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, threshold: float, shape: object) -> str:
    (folder / f"{name}.py").write_text(FACTORY.format(threshold=threshold, shape=shape))
    monkeypatch.syspath_prepend(str(folder))
    return f"python:{name}:classifier"


def lowered(x: np.ndarray, eps: float) -> float:
    """The least mean within eps: every pixel goes down, none below 0."""
    return float(np.clip(x - eps, 0, 1).mean())


def test_a_ct_slice_shipped_by_pydicom_is_audited_in_hounsfield_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file

    path = Path(str(get_testdata_file("CT_small.dcm", download=False)))
    header = pydicom.dcmread(path)
    (tmp_path / "ct.dcm").write_bytes(path.read_bytes())
    (tmp_path / "ct.csv").write_text("path,label\nct.dcm,1\n")
    x = ((header.pixel_array - 1024.0 + 160) / 400).clip(0, 1)
    threshold = (lowered(x, 6 / 400) + lowered(x, 10 / 400)) / 2
    model = model_of(tmp_path, monkeypatch, "mean_of_ct", threshold, (1, 128, 128))
    data, pgd = f"{tmp_path / 'ct.csv'}@window=40:400", AttackChoice(name="pgd", options={"steps": 5})
    reports: dict[int, Report] = {}
    for eps in (6, 10):
        out = str(tmp_path / f"run-{eps}")
        spec = AuditSpec(model=model, data=data, threat=f"linf:{eps}HU", attacks=(pgd,), sweep=False, out=out)
        report = rempart.run(spec)
        assert report is not None and report.worst_case is not None and report.clean is not None
        reports[eps] = report
        assert (report.clean.k, report.worst_case.k) == (1, int(eps == 6))
        assert (report.data.unit, report.data.span) == ("HU", (-160, 240))
        told = table(report), page(report)
        assert all(f"{eps} HU ({eps / 400:.3g} of the box [0, 1])" in text for text in told)
    broken, stood = reports[10].attacks[0].similarity, reports[6].attacks[0].similarity
    assert stood is None and broken is not None and broken.n == 1 and broken.ssim is not None
    # a uniform change by eps has a PSNR of -20 log10(eps); pixels at the border of the window change less
    assert -20 * np.log10(10 / 400) <= broken.psnr < -20 * np.log10(10 / 400) + 6
    assert broken.psnr == broken.psnr_low
    with np.load(tmp_path / "run-10" / "samples.npz") as samples:
        assert samples["pgd/psnr"] == pytest.approx([broken.psnr])
        assert samples["pgd/ssim"] == pytest.approx([broken.ssim])
        assert samples["pgd/distance"] == pytest.approx([10 / 400], rel=1e-4) and samples["patient"].tolist() == [0]
    secrets = [str(header[tag].value) for tag in ("PatientName", "PatientID", "StudyInstanceUID") if tag in header]
    assert secrets[:2] == ["CompressedSamples^CT1", "1CT1"]
    for file in tmp_path.glob("run-*/*"):
        assert not [word for word in secrets if word.encode() in file.read_bytes()], file
    again = rempart.run(reports[10].spec.model_copy(update={"out": None}))
    assert again is not None and again.data.digest == reports[10].data.digest
    assert again.samples == reports[10].samples
    with pytest.raises(ThreatError, match="and the data are in HU"):
        rempart.run(spec.model_copy(update={"threat": "linf:10Bq"}))


def test_a_volume_shipped_by_nibabel_is_attacked_in_raw_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nibabel = pytest.importorskip("nibabel")
    shipped = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    (tmp_path / "brain.nii").write_bytes(shipped.read_bytes())
    (tmp_path / "brain.csv").write_text("path,label\nbrain.nii,1\n")
    values = nibabel.as_closest_canonical(nibabel.load(shipped)).get_fdata()
    x = (values / 10_000).clip(0, 1).transpose(2, 1, 0)
    given = f"{tmp_path / 'brain.csv'}@window=5000:10000"
    model = model_of(tmp_path, monkeypatch, "mean_of_brain", lowered(x, 0.02), (1, *x.shape))
    pgd, out = AttackChoice(name="pgd", options={"steps": 5}), str(tmp_path / "out" / "brain.npz")
    for eps, right in ((150, 1), (250, 0)):
        report = rempart.run(AttackSpec(model=model, data=given, threat=f"linf:{eps}raw", attack=pgd, out=out))
        assert report is not None and report.attacks[0].accuracy.k == right
        assert f"{eps} raw" in table(report) and (report.data.unit, report.data.span) == ("raw", (0, 10_000))
    shape = x.shape[1:]
    slices = f"{given}@slice=axial"
    means = x.reshape(len(x), -1).mean(1)
    threshold = float(np.sort(means)[len(means) // 2 - 1 : len(means) // 2 + 1].mean())
    model = model_of(tmp_path, monkeypatch, "mean_of_slice", threshold, (1, *shape))
    report = rempart.run(AttackSpec(model=model, data=slices, threat="linf:250raw", attack=pgd, out=out))
    assert report is not None and report.clean is not None
    (groups,) = report.groups
    weakest = np.array([lowered(one, 0.025) > threshold for one in x])
    assert (groups.kind, groups.n, groups.most) == ("volume", 1, len(x))
    assert groups.clean.pooled.value == pytest.approx((means > threshold).mean()) == report.clean.value
    assert groups.worst.pooled.value == pytest.approx(weakest.mean()) and groups.worst.whole.k == 0


def test_results_by_patient_are_those_worked_out_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    levels = {"a": (90, 92), "b": (90, 60), "c": (40, 41)}  # threshold 50, eps 20: 60 falls; 40 and 41 are wrong
    lines = ["path,label,patient"]
    for patient, values in levels.items():
        for k, value in enumerate(values):
            Image.fromarray(np.full((12, 12), value, np.uint8)).save(tmp_path / f"{patient}{k}.png")
            lines.append(f"{patient}{k}.png,1,secret-{patient}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    model = model_of(tmp_path, monkeypatch, "mean_of_patients", 50 / 255, (1, 12, 12))
    fgsm = (AttackChoice(name="fgsm"),)
    data, out = str(tmp_path / "t.csv"), str(tmp_path / "o")
    spec = AuditSpec(model=model, data=data, threat="linf:20/255", attacks=fgsm, sweep=False, out=out)
    report = rempart.run(spec)
    assert report is not None
    (groups,) = report.groups
    assert (groups.kind, groups.n, groups.most) == ("patient", 3, 2)
    assert (groups.clean.whole.k, groups.worst.whole.k, groups.worst.whole.n) == (2, 1, 3)
    assert groups.clean.mean.value == pytest.approx(2 / 3) and groups.worst.mean.value == pytest.approx((1 + 0.5) / 3)
    assert groups.worst.pooled.value == pytest.approx(3 / 6)
    assert (groups.worst.mean.low, groups.worst.mean.high) == (0, 1), "all three draws may be of one patient"
    written = [file.read_bytes() for file in (tmp_path / "o").iterdir()]
    assert not any(b"secret" in content for content in written)
    with np.load(tmp_path / "o" / "samples.npz") as samples:
        assert samples["patient"].tolist() == [0, 0, 1, 1, 2, 2]
    assert "3 patients" in table(report) and "By patient" in page(report)
    people = tmp_path / "people.csv"
    people.write_text("number,patient\n" + "".join(f"{k},x\n" for k in range(6)))
    one = rempart.run(spec.model_copy(update={"patients": str(people), "out": None}))
    assert one is not None and one.groups[0].n == 1 and one.groups[0].worst.whole.k == 0


def test_training_sets_whole_patients_aside_and_refuses_one_in_both_splits(tmp_path: Path) -> None:
    from dataclasses import replace

    from rempart.train.run import _splits, set_aside

    data = open_data("digits:train[:300]")
    people = tuple(f"p{k // 7}" for k in range(300))
    learn, aside = set_aside(replace(data, patients=people), 1000)
    assert aside is not None and aside.patients is not None and learn.patients is not None
    assert not set(learn.patients) & set(aside.patients) and len(learn) + len(aside) == 300
    assert len(aside) in (27, 28, 30) or len(aside) % 7 == 0
    assert 30 - 7 < len(aside) <= 30, "as many as fit into a tenth"
    again = set_aside(replace(data, patients=people), 1000)[1]
    assert again is not None and torch.equal(again.index, aside.index)
    assert set_aside(replace(data, patients=("one",) * 300), 1000)[1] is None
    (tmp_path / "people.csv").write_text("number,patient\n" + "".join(f"{k},p{k}\n" for k in range(2000)))
    with pytest.raises(DataError, match=r"each patient in one split, got 454 in train and test"):
        _splits("digits", str(tmp_path / "people.csv"))
