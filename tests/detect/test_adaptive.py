"""The attacker who knows, where what he can reach is known: a linear model and detectors of known geometry."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import toys
from detect.planted import first_pixel, planted
from rempart.core.errors import DataError
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.detect.adaptive import Rejecting, evade, verdict

LIMIT = 0.27


def hole(x, rng):
    """Flagged where the first pixel is high and the second does not follow it."""
    return x[:, 0, 0, 0] - 0.5 * x[:, 0, 0, 1]


def right_and_accepted(n=24):
    """Images of class 0 that `hole` accepts, and the least linf budget that leads each past model and detector.

    The first pixel has to go past 0.5; then the second has to be at 2 (0.5 - LIMIT) = 0.46 or higher.
    """
    x = torch.rand((400, 1, 1, 2), generator=torch.Generator().manual_seed(0)) * 0.5
    x = x[hole(x, None) < LIMIT][:n]
    need = torch.maximum(0.5 - x[:, 0, 0, 0], 2 * (0.5 - LIMIT) - x[:, 0, 0, 1])
    return x, torch.zeros(len(x), dtype=torch.int64), need


def through(fitted, x, y, eps, **given):
    """Which images get through, after checking that all that came back is feasible."""
    threat, index = Threat.parse(f"linf:{eps}"), torch.arange(100, 100 + len(x))
    found = evade(fitted, x, y, threat, spread=0.1, rng=Draws(0, index), **{"steps": 20, **given})
    assert bool(threat.holds(x, found).all())
    wrong, accepted = verdict(fitted, found, y, index)
    return wrong & accepted, wrong


@pytest.mark.parametrize("eps", [0.22, 0.3])
def test_who_knows_the_hole_gets_through_just_where_there_is_a_way(untouched_rng, eps):
    x, y, need = right_and_accepted()
    sure = (need - eps).abs() > 0.01
    got, _ = through(planted(first_pixel(), hole, LIMIT), x, y, eps)
    assert torch.equal(got[sure], need[sure] < eps)
    blind = x.clone()
    blind[:, 0, 0, 0] = 0.5 + 1e-3  # the shortest way past the model alone
    seen = hole(blind, None) > LIMIT
    assert int((got & seen).sum()) >= 3, "the example has images for which knowing the detector is needed"


def test_a_detector_that_flags_all_lets_nothing_through_and_images_that_fool_the_model_come_back():
    x, y, _ = right_and_accepted()
    got, wrong = through(planted(first_pixel(), lambda x, rng: 1 + 0 * x.flatten(1).sum(1), 0.0), x, y, 0.2, steps=5)
    near = 0.5 - x[:, 0, 0, 0]
    sure = (near - 0.2).abs() > 0.01
    assert not bool(got.any()) and torch.equal(wrong[sure], near[sure] < 0.2)


@pytest.mark.parametrize("level", [0.0, -1.0])
def test_a_detector_that_flags_none_leaves_the_attack_on_the_model(level):
    model = toys.linear((1, 4, 4), 3)
    x = toys.images(model.shape, 40)
    y = toys.labels(model, x)
    size = toys.radius(model, x, y, "linf")
    eps = float(size.median())
    sure = (size / eps - 1).abs() > 0.1
    got, wrong = through(planted(model, lambda x, rng: level + 0 * x.flatten(1).sum(1), 0.0), x, y, eps)
    assert torch.equal(got, wrong) and torch.equal(got[sure], (size < eps)[sure])


def test_a_surrogate_shows_the_way_past_a_detector_without_gradient():
    def stairs(x, rng):
        return (hole(x, rng) * 200).ceil().div(200).detach()

    x, y, need = right_and_accepted()
    eps = 0.2
    detector = planted(first_pixel(), stairs, LIMIT, differentiable=False)
    smooth = planted(first_pixel(), lambda x, rng: 1000 * hole(x, rng), None)
    alone, _ = through(detector, x, y, eps)
    guided, _ = through(detector, x, y, eps, surrogate=(smooth, 100.0))
    sure = (need - eps).abs() > 0.02
    assert torch.equal(guided[sure], need[sure] < eps)
    assert int(guided.sum()) >= int(alone.sum()) + 2, "the example must need the surrogate"


def test_the_rejecting_network_leads_with_the_last_class_just_where_an_image_is_flagged():
    model = toys.linear((1, 4, 4), 3)
    x = toys.images(model.shape, 50)
    detector = planted(model, lambda x, rng: x.flatten(1).sum(1), float(x.flatten(1).sum(1).median()))
    z = Rejecting(detector, 0.3)(x)
    assert torch.equal(z[:, :3], model(x)) and z.shape == (50, 4)
    assert torch.equal(z[:, 3] > z[:, :3].amax(1), detector.flags(detector.score(x, torch.arange(50))))
    size = (model(x).amax(1)[:, None] - model(x)).mean(1)
    told = model(x).amax(1) + size * (x.flatten(1).sum(1) - detector.card.threshold.value) / 0.3
    assert torch.allclose(z[:, 3], told)


def test_the_gradient_of_a_surrogate_counts_in_units_of_its_own_spread():
    """Scores in other units make no other network."""
    model, x = first_pixel(), torch.tensor([[[[0.4, 0.3]]], [[[0.6, 0.1]]]])
    detector = planted(model, lambda x, rng: hole(x, rng).detach(), LIMIT)
    slopes = []
    for scale in (1.0, 1000.0):
        smooth = planted(model, lambda x, rng, scale=scale: scale * hole(x, rng), None)
        point = x.clone().requires_grad_()
        z = Rejecting(detector, 0.1, (smooth, 0.2 * scale))(point)
        slopes.append(torch.autograd.grad(z[:, 2].sum(), point)[0])
    assert torch.allclose(slopes[0], slopes[1], rtol=1e-4) and bool((slopes[0][:, 0, 0, 1] != 0).all())


def test_a_random_detector_is_attacked_through_other_noise_than_it_is_judged_by():
    asked = []

    def score(x, rng):
        asked.append((torch.is_grad_enabled(), rng.stage, rng.seed, tuple(rng.index.tolist())))
        return hole(x, rng) + 0.01 * rng.normal(x[:, 0, 0, 0][:, None])[:, 0]

    x, y, _ = right_and_accepted(6)
    through(planted(first_pixel(), score, LIMIT, random=True, seed=7), x, y, 0.2, steps=3)
    judged = [call for call in asked if call[1] == ("detect",)]
    climbed = [call for call in asked if call[1] == ("evade",)]
    assert len(judged) + len(climbed) == len(asked)
    assert any(call[0] for call in climbed) and not any(call[0] for call in judged)
    assert {call[2] for call in judged} == {7} and {n for call in judged for n in call[3]} == set(range(100, 106))
    assert len({call[2] for call in climbed}) == len(climbed) >= 8, "new noise in each pass, eight to a step"


def test_noise_of_a_detector_does_not_hold_what_its_mean_lets_through():
    """At least as many get through as of those who know the best point and have one try."""

    def score(x, rng):
        return hole(x, rng) + 0.05 * rng.normal(x[:, 0, 0, 0][:, None])[:, 0]

    x, y, _ = right_and_accepted(150)
    eps = 0.3
    got, _ = through(planted(first_pixel(), score, LIMIT, random=True, seed=7), x, y, eps, steps=30)
    least = 0.5 - 0.5 * (x[:, 0, 0, 1] + eps).clamp_max(1)
    chance = torch.special.ndtr((LIMIT - least) / 0.05)[0.5 - x[:, 0, 0, 0] < eps]
    assert int(got.sum()) >= float(chance.sum()) - 1


def test_a_random_model_is_climbed_by_mean_gradients(monkeypatch):
    from rempart.detect import adaptive

    asked = []
    monkeypatch.setattr(adaptive, "apgd", lambda joint, x, *rest, eot, **given: asked.append(eot) or x.clone())
    x, y, _ = right_and_accepted(2)
    for random, passes in ((False, 1), (True, 1), (False, 20), (True, 20)):
        through(planted(first_pixel(), hole, LIMIT, random=random), x, y, 0.1, passes=passes)
    assert asked == [1] * 2 + [8] * 4 + [20] * 8, "twice as many where anything is random"


def test_verdicts_are_given_in_inference_mode():
    model = toys.dropout()
    x = toys.images(model.shape, 30)
    y = toys.labels(toys.linear(), x)
    wrong, accepted = verdict(planted(model, lambda x, rng: x[:, 0, 0, 0], 0.5), x, y, torch.arange(30))
    assert not bool(wrong.any()) and torch.equal(accepted, x[:, 0, 0, 0] <= 0.5) and model.training


def test_without_a_threshold_there_is_nothing_to_evade():
    with pytest.raises(DataError, match="calibrate"):
        Rejecting(planted(first_pixel(), hole, None), 0.1)


def test_scores_that_never_vary_have_a_network_all_the_same():
    detector = planted(first_pixel(), hole, LIMIT)
    x, _, _ = right_and_accepted(4)
    assert bool(Rejecting(replace(detector), 0.0)(x).isfinite().all())


def test_what_is_left_is_aimed_at_the_other_classes_too():
    """Of five classes only the least likely wrong one lies within reach and is not flagged."""
    layer = nn.utils.skip_init(nn.Linear, 2, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        layer.bias.copy_(torch.tensor([0.0, -0.20, -0.21, -0.22, -0.30]))
    model = Classifier(nn.Sequential(nn.Flatten(), layer), shape=(1, 1, 2), num_classes=5).eval()
    x, y = torch.zeros((3, 1, 1, 2)), torch.zeros(3, dtype=torch.int64)
    got, _ = through(planted(model, lambda x, rng: x[:, 0, 0, 0], 0.1), x, y, 0.4)
    assert bool(got.all())
