"""Splits counted by hand, and gathered sets against the exact radii of affine models."""

from dataclasses import replace

import pytest
import torch

import toys
from rempart.core.errors import DataError, ThreatError
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.detect.protocol import Crafting, gather, split
from rempart.detect.run import parts as parts_of
from rempart.report.schema import AttackChoice, DetectorChoice, DetectSpec

LINF = Threat.parse("linf:0.02")


def data_of(x, y, first=100):
    """These images numbered from `first` on, in reverse, so that a number is no position."""
    index = torch.arange(first + len(x) - 1, first - 1, -1)
    names = tuple(str(k) for k in range(int(y.max()) + 1))
    return Data("toy", "test", index, y, tuple(x.shape[1:]), names, lambda numbers: x[first + len(x) - 1 - numbers])


def case(n=40, classes=2):
    """A linear model, images whose every fifth label is wrong, their labels and their radii in linf."""
    model = toys.linear((1, 4, 4), classes)
    x = toys.images(model.shape, n)
    y = toys.labels(model, x)
    wrong = torch.where(torch.arange(n) % 5 == 0, (y + 1) % classes, y)
    return model, x, wrong, toys.radius(model, x, y, "linf")


# ---- splits


def many(counts=(40, 20, 10)):
    y = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
    return data_of(torch.zeros(len(y), 1, 2, 2), y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))])


def test_parts_are_disjoint_and_keep_the_shares_of_the_classes(untouched_rng):
    parts = split(many(), [0.5, 0.3])
    assert [part.labels.bincount().tolist() for part in parts] == [[20, 10, 5], [12, 6, 3]]
    numbers = torch.cat([part.index for part in parts])
    assert len(numbers.unique()) == len(numbers) == 56
    whole = dict(zip(many().index.tolist(), many().labels.tolist(), strict=True))
    assert all(whole[int(i)] == int(y) for part in parts for i, y in zip(part.index, part.labels, strict=True))


def test_shares_that_fill_the_whole_lose_no_image():
    parts = split(many((7, 11, 5)), [0.3, 0.3, 0.4])
    assert sorted(torch.cat([part.index for part in parts]).tolist()) == sorted(many((7, 11, 5)).index.tolist())


def test_the_choice_depends_on_the_seed_and_not_on_the_order():
    data = many()
    first, again, other = split(data, [0.5])[0], split(data, [0.5])[0], split(data, [0.5], seed=1)[0]
    assert torch.equal(first.index, again.index)
    assert set(first.index.tolist()) != set(other.index.tolist())
    turned = split(data.take(torch.arange(len(data)).flip(0)), [0.5])[0]
    assert set(turned.index.tolist()) == set(first.index.tolist())


def test_patients_are_not_parted():
    data = many((60, 60))
    people = replace(data, patients=tuple(f"p{(k - 100) // 3}" for k in data.index.tolist()))
    found = split(people, [0.5, 0.25, 0.25])
    seen = [set(part.patients) for part in found]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 40 and sum(map(len, found)) == 120
    assert all(abs(len(names) - share * 40) <= 2 for names, share in zip(seen, (0.5, 0.25, 0.25), strict=True))
    turned = split(people.take(torch.arange(120).flip(0)), [0.5, 0.25, 0.25])
    assert [set(part.patients) for part in turned] == seen
    with pytest.raises(DataError, match="images for 2 parts"):
        split(replace(data, patients=("one",) * 120), [0.5, 0.5])


def test_detectors_are_not_judged_on_patients_they_learnt_from():
    choices = {"detectors": (DetectorChoice(name="max-softmax"),), "attacks": (AttackChoice(name="fgsm"),)}
    spec = DetectSpec(model="m", data="d", threat="linf:0.1", out="o", **choices)
    train, test = (replace(many(), split=name, patients=(f"{name} alone",) * 69 + ("both",)) for name in ("a", "b"))
    with pytest.raises(DataError, match="each patient in one split, got 1 in train and test"):
        parts_of(train, test, spec)


@pytest.mark.parametrize("shares", [[], [0.0, 0.5], [-0.1], [0.7, 0.4], [0.5, 1e-4]])
def test_wrong_shares_are_refused(shares):
    with pytest.raises(DataError):
        split(many(), shares)


# ---- gathered sets


def test_only_images_classified_rightly_are_kept(untouched_rng):
    model, x, y, _ = case()
    found = gather(model, data_of(x, y), {})
    right = torch.arange(len(x)) % 5 != 0
    assert torch.equal(found.x, x[right]) and torch.equal(found.y, y[right])
    assert torch.equal(found.index, data_of(x, y).index[right])
    assert found.noisy is None and not found.attacked


def test_attacked_are_exactly_those_whose_radius_is_smaller_than_the_budget():
    model, x, y, radius = case()
    radius = radius[torch.arange(len(x)) % 5 != 0]
    eps = float(radius.median()) * 1.001
    crafts = {
        "step": Crafting(attack="fgsm", threat=Threat(norm="linf", eps=eps)),
        "least": Crafting(attack="deepfool", threat=Threat.parse("linf")),
        "bounded": Crafting(attack="deepfool", threat=Threat(norm="linf", eps=eps)),
    }
    found = gather(model, data_of(x, y), crafts)
    within = (radius < eps).nonzero()[:, 0]
    assert 0 < len(within) < len(radius)
    for name, positions in (("step", within), ("least", torch.arange(len(radius))), ("bounded", within)):
        at, images = found.attacked[name]
        assert torch.equal(at, positions), name
        assert bool((model(images).argmax(1) != found.y[at]).all())
    at, images = found.attacked["step"]
    assert torch.allclose((images - found.x[at]).abs().flatten(1).amax(1), torch.tensor(eps), atol=1e-6)


def test_noise_fills_its_ball_and_leaves_the_class():
    model, x, y, radius = case()
    for eps in (float(radius.min()) * 0.5, float(radius.median())):
        noise = Threat(norm="linf", eps=eps)
        found = gather(model, data_of(x, y), {}, noise=noise)
        assert torch.equal(model(found.noisy).argmax(1), found.y)
        size = (found.noisy - found.x).abs().flatten(1).amax(1)
        assert bool((size <= eps * 1.0001).all()) and bool((size > 0).all())
        assert bool((size > 0.6 * eps).float().mean() > 0.6)  # the largest of 16 uniform numbers is rarely smaller


def test_noise_that_breaks_an_image_is_halved_until_it_holds():
    model, x, y, _ = case()
    found = gather(model, data_of(x, y), {}, noise=Threat(norm="linf", eps=0.5))
    size = (found.noisy - found.x).abs().flatten(1).amax(1)
    assert bool((size > 0).all()) and bool((size < 0.25).any()) and bool((size > 0.25).any())
    assert torch.equal(model(found.noisy).argmax(1), found.y)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_sets_do_not_depend_on_the_batch_size(eight_bit):
    model, x, y, _ = case()
    model = toys.samplewise(model)
    crafts = {"pgd": Crafting(attack="pgd", threat=LINF, options={"steps": 3})}

    def run(size, seed=0):
        options = {"noise": LINF, "eight_bit": eight_bit, "batch_size": size, "seed": seed}
        found = gather(model, data_of(x, y), crafts, **options)
        return [found.x, found.y, found.index, found.noisy, *found.attacked["pgd"]]

    torch.testing.assert_close(run(64), run(7))
    other = run(64, seed=1)
    assert torch.equal(run(64)[0], other[0]) and not torch.equal(run(64)[3], other[3])


def test_images_of_eight_bits_are_whole_levels_and_still_broken():
    model, x, y, _ = case()
    crafts = {"pgd": Crafting(attack="pgd", threat=LINF, options={"steps": 3})}
    found = gather(model, data_of(x, y), crafts, noise=LINF, eight_bit=True)
    at, images = found.attacked["pgd"]
    assert len(at) > 0 and bool((model(images).argmax(1) != found.y[at]).all())
    for part in (found.x, found.noisy, images):
        assert torch.allclose(part * 255, (part * 255).round(), atol=1e-4)
    assert torch.equal(model(found.x).argmax(1), found.y) and torch.equal(model(found.noisy).argmax(1), found.y)


def test_nothing_to_learn_from_is_said():
    model, x, _, _ = case()
    with pytest.raises(DataError, match="classifies rightly"):
        gather(model, data_of(x, (toys.labels(model, x) + 1) % 2), {})
    with pytest.raises(ThreatError, match="budget"):
        gather(model, data_of(x, toys.labels(model, x)), {"a": Crafting(attack="pgd", threat=Threat.parse("linf"))})
