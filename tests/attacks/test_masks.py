"""Perturbations inside masks: exact answers of a linear model, and every attack there is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from rempart.attacks import attack_batch, attacks
from rempart.core.errors import DataError, ThreatError
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.data import open_data

SHAPE = (1, 4, 4)
FEW: Mapping[str, dict[str, Any]] = {
    "apgd-t": {"loss": "margin"},
    "square": {"queries": 60},
    "hopskipjump": {"queries": 300},
    "cw": {"steps": 60},
    "ead": {"steps": 60},
}
MASK = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
MASK[0, :, :2], MASK[1, :, :, 3] = True, True


def linear() -> Classifier:
    """Class 1 where the mean over 16 pixels lies above 1/2: within a mask of m pixels, eps moves it by eps m / 16."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = 20 * (x.flatten(1).mean(1) - 0.5)
            return torch.stack([-s, s], 1)

    return Classifier(Mean(), shape=SHAPE, num_classes=2)


X, Y = torch.full((2, *SHAPE), 0.55), torch.ones(2, dtype=torch.int64)
NEEDED = torch.tensor([0.05 * 16 / 8, 0.05 * 16 / 4])  # per pixel: 0.1 in the mask of 8, 0.2 in that of 4


@pytest.mark.parametrize("name", [entry.name for entry in attacks if not entry.traits.joint])
def test_every_attack_keeps_to_its_mask_and_finds_what_the_mask_allows(name: str) -> None:
    options = {key: value for key, value in FEW.get(name, {}).items() if key in attacks[name].params.model_fields}
    norm = "linf" if "linf" in attacks[name].traits.norms else attacks[name].traits.norms[0]
    # The sum over pixels has to fall by 0.8: in l2 that takes 0.8 / sqrt(m), in l1 0.8 in either mask.
    threat = Threat(norm=norm, eps={"linf": 0.15, "l2": 0.34, "l1": 1.2}[norm])
    index = torch.tensor([7, 3])
    outcome = attack_batch(linear(), X, Y, threat, name, options, index=index, mask=MASK)
    outside = ~MASK.expand_as(X)
    assert torch.equal(outcome.x_adv[outside], X[outside]), "outside nothing changes"
    assert outcome.broken.tolist() == [True, norm == "l1"], "enough in the larger mask, too little in the other"
    alone = attack_batch(linear(), X[:1], Y[:1], threat, name, options, index=index[:1], mask=MASK[:1])
    torch.testing.assert_close(alone.x_adv, outcome.x_adv[:1])  # whatever its batch


def test_the_same_without_masks_reaches_both() -> None:
    outcome = attack_batch(linear(), X, Y, Threat(norm="linf", eps=0.15), "pgd", {"steps": 10})
    assert outcome.broken.tolist() == [True, True] and not torch.equal(outcome.x_adv[~MASK], X[~MASK])


def test_queries_are_counted_and_smallest_perturbations_are_those_inside() -> None:
    outcome = attack_batch(linear(), X, Y, Threat(norm="linf", eps=1), "fgsm", {}, mask=MASK)
    assert outcome.queries >= 2 and outcome.gradients == 2
    least = attack_batch(linear(), X, Y, Threat(norm="l2"), "deepfool", {}, mask=MASK)
    expected = NEEDED * MASK.flatten(1).sum(1).sqrt()
    assert least.distance.numpy() == pytest.approx(expected.numpy(), rel=0.05)


def test_one_perturbation_for_all_images_is_refused() -> None:
    with pytest.raises(ThreatError, match="an attack that can be kept inside masks, got universal"):
        attack_batch(linear(), X, Y, Threat(norm="linf", eps=0.1), "universal", {}, mask=MASK)


def test_masks_come_from_a_column_or_a_folder_and_count_in_the_digest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inside = {"a0": rng.random((6, 5)) > 0.5, "b0": rng.random((6, 5)) > 0.5}
    for name, mask in inside.items():
        for folder, pixels in (("data", rng.integers(0, 256, (6, 5))), ("masks", mask * 7)):
            (tmp_path / folder / name[0]).mkdir(parents=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / name[0] / f"{name}.png")
    rows = [f"data/{n[0]}/{n}.png,{n[0]},masks/{n[0]}/{n}.png" for n in inside]
    (tmp_path / "t.csv").write_text("path,label,mask\n" + "\n".join(rows))
    table, folder = open_data(str(tmp_path / "t.csv")), open_data(f"{tmp_path / 'data'}@mask=masks")
    plain = open_data(str(tmp_path / "data"))
    for data in (table, folder):
        batch = data.take(data.labels.argsort()).batch(torch.arange(2))
        assert batch.mask is not None
        assert np.array_equal(batch.mask[:, 0].numpy(), np.stack(list(inside.values())))
        assert data.mask is not None and data.load().mask is data.mask
    assert folder.digest != plain.digest and plain.mask is None
    before = folder.digest
    Image.fromarray(np.zeros((6, 5), np.uint8)).save(tmp_path / "masks" / "a" / "a0.png")
    assert open_data(f"{tmp_path / 'data'}@mask=masks").digest != before
    resized = open_data(f"{tmp_path / 't.csv'}@3x2").batch(torch.arange(2))
    assert resized.mask is not None and resized.mask.shape == (2, 1, 2, 3)
    (tmp_path / "masks" / "a" / "a0.png").unlink()
    with pytest.raises(DataError, match=r"one mask in masks.* got 0 for a/a0\.png"):
        open_data(f"{tmp_path / 'data'}@mask=masks")
    (tmp_path / "t.csv").write_text("path,label,mask\n" + rows[0] + "\n" + rows[1].replace("masks/", "../masks/"))
    with pytest.raises(DataError, match="a mask inside the folder"):
        open_data(str(tmp_path / "t.csv"))


def test_masks_of_volumes_are_sliced_like_them(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    volume, mask = rng.integers(0, 99, (3, 4, 5)).astype(np.int16), (rng.random((3, 4, 5)) > 0.5).astype(np.int16)
    turned = np.diag([-1.0, 1, 1, 1])  # stored from right to left
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii.gz")
    nibabel.save(nibabel.Nifti1Image(mask[::-1].copy(), turned), tmp_path / "m.nii.gz")
    (tmp_path / "t.csv").write_text("path,label,mask\nv.nii.gz,1,m.nii.gz\n")
    data = open_data(f"{tmp_path / 't.csv'}@window=50:100@slice=axial:1::2")
    batch = data.batch(torch.arange(2))
    assert batch.mask is not None
    assert np.array_equal(batch.mask[:, 0].numpy(), mask.transpose(2, 1, 0)[[1, 3]] > 0)
