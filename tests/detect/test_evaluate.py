"""Figures of detectors, counted by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detect.planted import first_pixel, planted
from rempart.core.stats import auroc, wilson
from rempart.core.threat import Threat
from rempart.detect import evaluate
from rempart.detect.evaluate import Scored, alone, false_alarms, scored, separations, under_evasion, with_rejection
from rempart.detectors.catalogue import Learning
from rempart.report.schema import ALL, KNOWS

LINF = Threat.parse("linf:0.1")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def images(*pixels: float) -> Tensor:
    """One image of two equal pixels for each value."""
    return torch.tensor(pixels)[:, None, None, None].expand(-1, 1, 1, 2).clone()


# ---- thresholds


def test_false_alarms_are_counted_above_the_conformal_quantile():
    calibration = f64(*range(1, 20))  # 19: k = 19 for 5 %, ceil(20 * 0.8) = 16 for 20 %, and too few for 1 %
    found = Scored(calibration, f64(16, 16.5, 19, 19.5), f64(), {})
    alarms = false_alarms(found, 0.2)
    assert list(alarms) == ["0.05", "0.2"]
    assert [(rate.k, rate.n) for rate in alarms.values()] == [(1, 4), (3, 4)]


def test_separations_take_clean_and_noisy_images_for_negatives_and_thresholds_from_the_calibration():
    positives = f64(18, 19, 19.5, 40)
    attacked = {
        "seen": (torch.arange(4), positives),
        "none": (torch.arange(0), f64()),
        "new": (torch.arange(1), f64(1)),
    }
    found = Scored(f64(*range(1, 20)), f64(1, 18, 30, 2, 3), f64(18.5), attacked)
    first, second = separations(found, ["seen"])
    assert (first.attack, first.n, first.learnt, second.attack, second.learnt) == ("seen", 4, True, "new", False)
    assert first.auroc == auroc([1, 18, 30, 2, 3, 18.5], positives.numpy())
    assert {rate: (share.k, share.n) for rate, share in first.caught.items()} == {"0.05": (2, 4)}


def test_sets_are_scored_by_their_sample_numbers_whatever_the_batch():
    model = first_pixel()
    detector = planted(model, lambda x, rng: x.flatten(1).sum(1) + rng.index, 0.0, random=True)
    x, index = images(0.1, 0.2, 0.3), torch.tensor([70, 50, 60])
    test = Learning(
        x=x, y=torch.zeros(3, dtype=torch.int64), index=index, noisy=x + 0.1,
        attacked={"a": (torch.tensor([2, 0]), images(0.5, 0.6)), "none": (torch.arange(0), x[:0])},
    )  # fmt: skip
    for batch_size in (1, 2, 100):
        found = scored(detector, Learning(x=x[:1], y=test.y[:1], index=index[:1]), test, batch_size=batch_size)
        assert torch.allclose(found.clean, f64(70.2, 50.4, 60.6)) and torch.allclose(found.noisy, found.clean + 0.2)
        assert torch.allclose(found.attacked["a"][1], f64(61.0, 71.2)) and len(found.attacked["none"][1]) == 0
        assert torch.allclose(found.calibration, f64(70.2))


# ---- held together
#
# Eight test images, of which the model gets the six of `test` right. Flagged is what scores above 1. By number:
# 0 accepted, broken by `near` unseen                    1 accepted, broken by `near` and flagged
# 2 accepted, broken by nothing                          3 flagged as it is
# 4 accepted, broken unseen by `far` outside the threat  5 flagged as it is, broken by `near` unseen

CLEAN = images(0.45, 0.45, 0.3, 0.45, 0.2, 0.45)
TEST = Learning(
    x=CLEAN,
    y=torch.zeros(6, dtype=torch.int64),
    index=torch.arange(10, 16),
    attacked={
        "near": (torch.tensor([0, 1, 5]), images(0.52, 0.53, 0.54)),
        "far": (torch.tensor([4, 1]), images(0.6, 0.6)),
    },
)
FOUND = Scored(
    calibration=f64(0, 1, 0.5, 0.5),
    clean=f64(1.0, 0, 0, 1.1, 0, 5),
    noisy=f64(),
    attacked={"near": (torch.tensor([0, 1, 5]), f64(1.0, 1.5, 0)), "far": (torch.tensor([4, 1]), f64(0, 9))},
)


def flagged_above(limit=1.0, **traits):
    return planted(first_pixel(), lambda x, rng: x[:, 0, 0, 1], limit, **traits)


def test_held_with_rejection_by_hand():
    rows = {row.attack: row.held for row in with_rejection(flagged_above(), FOUND, TEST, 8, LINF)}
    assert list(rows) == ["none", ALL, "near", "far"]
    held = {"none": 4, "near": 3, "far": 3, ALL: 3}
    assert rows == {name: wilson(k, 8) for name, k in held.items()}, "0, 1, 2, 4; then without 0; without 4; without 0"


def test_the_model_alone_keeps_what_no_attack_broke_within_the_threat():
    assert alone(TEST, 8, LINF) == wilson(3, 8), "2, 3 and 4, whose image is too far; 0, 1 and 5 are broken"
    assert alone(TEST, 8, Threat.parse("linf:0.5")) == wilson(2, 8)
    assert alone(replace(TEST, attacked={}), 8, LINF) == wilson(6, 8)


def test_scores_that_are_no_number_are_flagged():
    broken = replace(FOUND, attacked={"near": (torch.tensor([0]), f64(float("nan")))})
    test = replace(TEST, attacked={"near": (torch.tensor([0]), images(0.52))})
    rows = {row.attack: row.held.k for row in with_rejection(flagged_above(), broken, test, 8, LINF)}
    assert rows["near"] == rows["none"] == 4


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_attacker_who_knows_adds_what_is_wrong_unseen_and_within_the_threat(monkeypatch, batch_size):
    """Of 1, 2 and 4, which are left, 1 gets through, 2 is seen, and 4 is moved by 0.54: too far, or not."""
    moves = {11: (0.51, 0.5), 12: (0.51, 0.8), 14: (0.74, 0.2)}
    tried = []

    def evade(fitted, x, y, threat, *, rng, **_):
        tried.extend(rng.index.tolist())
        return torch.tensor([moves[number] for number in rng.index.tolist()])[:, None, None]

    monkeypatch.setattr(evaluate, "evade", evade)
    detector = planted(first_pixel(), lambda x, rng: x[:, 0, 0, 1] + 0.25, 1.0)
    test = replace(TEST, attacked={"near": TEST.attacked["near"]})
    found = replace(FOUND, attacked={"near": FOUND.attacked["near"]})
    for threat, added in (("linf:0.5", 1), ("linf:0.6", 2)):
        tried.clear()
        held, evaded = under_evasion(detector, found, test, 8, Threat.parse(threat), batch_size=batch_size)
        assert tried == [11, 12, 14], "0 is through already, 3 and 5 are flagged"
        assert held.attack == KNOWS and held.held == wilson(3 - added, 8)
        assert evaded == wilson(1 + added, 4)


def test_where_nothing_is_accepted_there_is_no_share_of_it():
    held, evaded = under_evasion(flagged_above(-1.0), FOUND, TEST, 8, LINF, steps=1)
    assert (held.held.k, evaded) == (0, None)


def test_a_score_that_is_no_number_counts_as_flagged():
    def broken_score(x, rng):
        return torch.where(x[:, 0, 0, 1] > 0.9, torch.nan, x[:, 0, 0, 1])

    fitted = planted(first_pixel(), broken_score, 0.5)
    x = torch.tensor([[0.1, 0.2], [0.1, 0.3]]).view(2, 1, 1, 2)
    attacked = torch.tensor([[0.9, 0.95], [0.9, 0.1]]).view(2, 1, 1, 2)
    at = torch.arange(2)
    test = Learning(x=x, y=torch.zeros(2, dtype=torch.int64), index=at, attacked={"a": (at, attacked)})
    many = x[:1].expand(40, -1, -1, -1)
    calm = Learning(x=many, y=torch.zeros(40, dtype=torch.int64), index=torch.arange(40))
    (row,) = separations(scored(fitted, calm, test))
    assert row.caught["0.05"].k == 1 and row.auroc.value == 0.5  # 0.1 lies below both clean scores
