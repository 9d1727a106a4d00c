"""Fit, calibrate, keep and take up again; and what is refused."""

import copy
import json
import pickle
from dataclasses import replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_bytes

import toys
from rempart import Classifier
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.core.stats import wilson
from rempart.detectors import Fitted, Learning, calibrate, fit, load, save
from rempart.detectors.fitted import CARD, STATE

MODEL = toys.conv((1, 4, 4))
X, Y, INDEX = toys.images((1, 4, 4), 60), torch.arange(60) % 3, torch.arange(60)
NEW, NEW_INDEX = toys.images((1, 4, 4), 8, 7), torch.arange(8) + 100


def learnt(name: str = "max-softmax", **options: Any) -> Fitted:
    return fit(name, options, MODEL, Learning(x=X, y=Y, index=INDEX), seed=5)


# ---- the threshold


def test_the_threshold_is_the_conformal_quantile() -> None:
    detector, scores = learnt(), torch.randperm(40, generator=torch.Generator().manual_seed(0)).double()
    for n, fpr in ((19, 0.05), (39, 0.05), (40, 0.05), (40, 0.1), (40, 0.25), (40, 0.9)):
        found = calibrate(detector, scores[:n], fpr).card.threshold
        k = ceil((n + 1) * (1 - Fraction(str(fpr))))
        assert found is not None and found.value == float(scores[:n].sort().values[k - 1])
        assert (found.fpr, found.n) == (fpr, n)
    assert detector.card.threshold is None, "the detector given was changed"


def test_fresh_clean_scores_are_flagged_at_the_rate_asked_for_on_average() -> None:
    """With n = 99 exactly 5 % for scores without ties, mean over calibrations; no more for scores with ties."""
    detector, generator = learnt(), torch.Generator().manual_seed(0)
    continuous, tied = [], []
    for _ in range(300):
        scores = torch.randn(99 + 1000, generator=generator)
        for kind, found in ((scores, continuous), ((2 * scores).round(), tied)):
            found.append(float(calibrate(detector, kind[:99]).flags(kind[99:]).float().mean()))
    mean, error = torch.tensor(continuous).mean(), torch.tensor(continuous).std() / 300**0.5
    assert abs(float(mean) - 0.05) < 3 * float(error) and float(error) < 0.002
    assert 0.005 < float(torch.tensor(tied).mean()) < 0.05


@pytest.mark.parametrize(("name", "options"), [("max-softmax", {}), ("knn", {"k": 3})])
def test_fresh_clean_images_are_flagged_at_the_rate_asked_for(name: str, options: dict[str, Any]) -> None:
    x = toys.images((1, 4, 4), 4000, 3)
    scores = learnt(name, **options).score(x, torch.arange(4000) + 1000).detach()
    detector = calibrate(learnt(name, **options), scores[:2000], 0.05)
    rate = wilson(int(detector.flags(scores[2000:]).sum()), 2000)
    assert rate.low <= 0.05 <= rate.high


def test_what_is_no_number_is_flagged() -> None:
    detector = calibrate(learnt(), torch.arange(30.0))
    assert detector.flags(torch.tensor([0.0, 29.0, 30.0, torch.nan, torch.inf])).tolist() == [False, False, *[True] * 3]


@pytest.mark.parametrize(
    ("scores", "fpr", "message"),
    [
        (torch.zeros(18), 0.05, "19 or more clean images"),
        (torch.zeros(98), 0.01, "99 or more clean images"),
        (torch.zeros(0), 0.05, "19 or more clean images"),
        (torch.zeros(100), 0.0, "false-positive rate in"),
        (torch.zeros(100), 1.0, "false-positive rate in"),
        (torch.tensor([torch.nan] * 50), 0.05, "finite scores"),
    ],
)
def test_calibration_refuses(scores: torch.Tensor, fpr: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        calibrate(learnt(), scores, fpr)


def test_without_a_threshold_nothing_is_flagged_or_let_through() -> None:
    with pytest.raises(DataError, match="calibrated"):
        learnt().flags(torch.zeros(3))


# ---- on disk


@pytest.mark.parametrize(
    ("name", "options"),
    [("energy", {"temperature": 2.0}), ("mahalanobis", {"nu": "1/255"}), ("noise", {}), ("isolation-forest", {})],
)
def test_what_is_saved_comes_back_without_pickle(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    before = calibrate(learnt(name, **options), torch.arange(30.0), 0.1)
    expected = before.score(NEW, NEW_INDEX)
    for module, attribute in ((pickle, "load"), (pickle, "loads"), (pickle, "dumps"), (torch, "load")):
        monkeypatch.setattr(module, attribute, refuse)
    save(before, tmp_path / "new" / "folder")
    after = load(tmp_path / "new" / "folder", MODEL)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CARD, STATE]
    assert after.card == before.card and after.card.seed == 5 and after.card.fitted_on == 60
    assert torch.equal(after.score(NEW, NEW_INDEX), expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(learnt("knn", k=3), tmp_path / "knn")
    return tmp_path / "knn"


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"which the detector in .* was fitted on"):
        load(folder, toys.conv((1, 4, 4), seed=1))


@pytest.mark.parametrize("output", ["logits", "sigmoids"])
def test_the_same_weights_with_a_step_in_front_or_read_otherwise_are_refused(folder: Path, output: Any) -> None:
    net = copy.deepcopy(MODEL.net)
    if output == "logits":
        inner = net.forward
        net.forward = lambda x: inner(x.flip(-1))
    other = Classifier(net, shape=(1, 4, 4), num_classes=3, output=output)
    with pytest.raises(ModelError, match="the same weights"):
        load(folder, other)


def test_an_upgrade_that_changes_no_answer_keeps_a_detector_and_one_of_old_still_opens(folder: Path) -> None:
    """Rounding of another processor or version; a card without code and answers, as earlier versions wrote."""
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"answers": [a * (1 + 1e-6) for a in card["answers"]]}))
    assert load(folder, MODEL).card.detector == "knn"
    del card["code"], card["answers"]
    (folder / CARD).write_text(json.dumps(card))
    assert load(folder, MODEL).card.code == ""


def damage(folder: Path, how: str) -> None:
    card, state = folder / CARD, folder / STATE
    content = state.read_bytes()
    if how == "no card":
        card.unlink()
    elif how == "no tensors":
        state.unlink()
    elif how == "half a card":
        card.write_bytes(card.read_bytes()[:40])
    elif how == "a card of bytes":
        card.write_bytes(b"\x80\x04\xff\x00")
    elif how == "a card with more":
        card.write_bytes(card.read_bytes().replace(b"{", b'{"more": 1,', 1))
    elif how == "half the tensors":
        state.write_bytes(content[: len(content) // 2])
    elif how == "a flipped bit":
        state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "other tensors":
        state.write_bytes(to_bytes({"references": torch.zeros(3, 8)}))
    else:
        for path in (card, state):
            path.unlink()
        folder.rmdir()
        folder.write_bytes(b"no folder")


@pytest.mark.parametrize(
    "how",
    ["no card", "no tensors", "half a card", "a card of bytes", "a card with more", "half the tensors",
     "a flipped bit", "other tensors", "no folder"],
)  # fmt: skip
def test_damage_is_noticed(folder: Path, how: str) -> None:
    damage(folder, how)
    with pytest.raises(ModelError, match="got"):
        load(folder, MODEL)


# ---- what is refused


def test_messages_name_the_folder_the_field_and_the_defences(folder: Path) -> None:
    with pytest.raises(ModelError, match=f"got {folder}/none, which does not exist$"):
        load(folder / "none", MODEL)
    with pytest.raises(ModelError, match="each --defence of the fit"):
        load(folder, toys.conv((1, 4, 4), seed=1))
    (folder / CARD).write_text('{"detector": 3}')
    with pytest.raises(ModelError, match=r"`rempart detect evaluate` wrote.*damaged .detector: Input should") as error:
        load(folder, MODEL)
    assert "pydantic" not in str(error.value) and "\n" not in str(error.value)
    (folder / CARD).unlink()
    with pytest.raises(ModelError, match=f"got {folder} without {CARD}$"):
        load(folder, MODEL)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(1, 4, 4\).*got \(1, 5, 5\)"):
        learnt().score(toys.images((1, 5, 5), 2), torch.arange(2))
    with pytest.raises(DataError, match=r"got \(3, 4, 4\)"):
        fit("energy", {}, MODEL, Learning(x=toys.images((3, 4, 4), 9), y=Y[:9], index=INDEX[:9]))


def test_a_detector_that_learns_from_attacks_needs_some() -> None:
    with pytest.raises(DataError, match="images that an attack broke"):
        learnt("mahalanobis", combine="logistic")
    none = {"pgd": (torch.zeros(0).long(), X[:0])}
    with pytest.raises(DataError, match="images that an attack broke"):
        fit("lid", {"combine": "logistic"}, MODEL, Learning(x=X, y=Y, index=INDEX, attacked=none))


def test_wrong_names_and_options_are_refused() -> None:
    for name, options in (("mahalanobi", {}), ("energy", {"temperature": 0}), ("knn", {"n": 3})):
        with pytest.raises(SpecError):
            learnt(name, **options)


def test_what_is_not_finite_is_not_kept() -> None:
    broken = torch.where(INDEX.view(-1, 1, 1, 1) == 3, torch.nan, X)
    with pytest.raises(ModelError, match="finite values"):
        fit("knn", {"k": 3}, MODEL, Learning(x=broken, y=Y, index=INDEX))


def test_the_seed_of_the_card_is_that_of_the_scores() -> None:
    detector = learnt("noise")
    other = replace(detector, card=detector.card.model_copy(update={"seed": 6}))
    assert torch.equal(detector.score(NEW, NEW_INDEX), learnt("noise").score(NEW, NEW_INDEX))
    assert not torch.equal(detector.score(NEW, NEW_INDEX), other.score(NEW, NEW_INDEX))
