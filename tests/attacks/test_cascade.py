"""cascade: closed forms, a class that only aiming finds, the budget to the last gradient, and batch mates."""

import math
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import toys
from attacks.conftest import Digits
from rempart.attacks import attack_batch, cascade
from rempart.attacks.cascade import STAGES, Stage, climb
from rempart.core.errors import ThreatError
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, Norm, Threat


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 9, 100])
def test_linear_models_fall_at_their_radius(classes: int, norm: Norm) -> None:
    model = toys.linear((1, 12, 10) if classes > 16 else (2, 3, 4), classes=classes).double()
    x, y, radius = toys.equidistant(model, norm)
    # The ten nearest of 100 classes lie so close together in l1 that ranks by the logits may miss the nearest of all.
    for factor, expected in ((0.98, 0), (1.1 if (classes, norm) == (100, "l1") else 1.02, len(x))):
        outcome = attack_batch(model, x, y, Threat(norm=norm, eps=factor * radius), "cascade")
        assert int(outcome.success.sum()) == expected


@pytest.mark.parametrize("make", [toys.one_logit, toys.squashed, toys.probabilities])
def test_other_outputs(make: Callable[..., Classifier]) -> None:
    model = make((1, 2, 3, 4), seed=3).double()
    x, y, radius = toys.equidistant(model, "linf")
    for factor, expected in ((0.98, 0), (1.02, len(x))):
        outcome = attack_batch(model, x, y, Threat(norm="linf", eps=factor * radius), "cascade")
        assert int(outcome.success.sum()) == expected


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5), ("l1", 1.2)])
def test_no_weaker_than_a_much_longer_pgd(digits: Digits, norm: Norm, eps: float) -> None:
    """Sample by sample: at most one of 48 differs in favour of PGD on the margin with at least twice the gradients."""
    threat = Threat(norm=norm, eps=eps)
    ours = attack_batch(digits.model, digits.x, digits.y, threat, "cascade")
    options = {"steps": 100, "restarts": 3, "loss": "margin"}
    theirs = attack_batch(digits.model, digits.x, digits.y, threat, "pgd", options)
    assert 5 < int(theirs.right.sum()) < 43, "the comparison needs broken and unbroken samples"
    assert int(ours.right.sum()) <= int(theirs.right.sum())
    assert int((ours.right & ~theirs.right).sum()) <= 1
    assert 2 * ours.gradients < theirs.gradients


class _Decoys(nn.Module):
    """Classes 1 to 3 lead the others but never reach class 0, each on a pixel of its own; class 4 does, on the rest."""

    def forward(self, x: Tensor) -> Tensor:
        u = x.flatten(1) - 0.5
        decoys = 0.05 * torch.tanh(20 * u[:, :3]) - torch.tensor([0.1, 0.2, 0.3])
        return torch.cat([0 * u[:, :1], decoys, 10 * u[:, 3:].mean(1, keepdim=True) - 0.5], 1)


def test_a_class_that_only_aiming_finds() -> None:
    """Untargeted ascents climb class 1; class 4 is the fourth closest, and 0.05 per pixel reaches it."""
    model = Classifier(_Decoys(), shape=(1, 8, 8), num_classes=5)
    x, y = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.long)
    threat, rng = Threat(norm="linf", eps=0.06), Draws(0, torch.arange(4))
    broken = [
        (model(climb(model, x, y, threat, stages, rng=rng)).argmax(1) == 4).tolist()
        for stages in (STAGES[:2], [Stage(50, "best", targets=3)], [Stage(10, "best", targets=4)], STAGES)
    ]
    assert broken == [[False] * 4, [False] * 4, [True] * 4, [True] * 4]


def test_with_two_classes_aiming_changes_nothing() -> None:
    model = toys.smooth(classes=2)
    x = toys.images(model.shape, 16)
    y, rng = toys.labels(model, x), Draws(0, torch.arange(16))
    for start in ("origin", "random"):
        for norm in NORMS:
            plain, aimed = (
                climb(model, x, y, Threat(norm=norm, eps=0.01), [Stage(8, start, targets=m)], rng=rng) for m in (0, 9)
            )
            assert torch.equal(plain, aimed) and not torch.equal(plain, x)


@pytest.mark.parametrize("eot", [1, 3])
@pytest.mark.parametrize("classes", [2, 4, 10])
def test_gradients_to_the_last(classes: int, eot: int) -> None:
    """On a linear model the share of the margin left is known, and with it which stages a sample enters."""
    model = toys.linear(classes=classes)
    x, y, radius = toys.equidistant(model, "linf")
    m, n = min(9, classes - 1), len(x)
    stages = [(10, 1), (30, 1), (10, m), (30, min(2, m)), (80, min(2, m)), (100, min(2, m))]
    for factor, entered in ((0.5, 3), (0.9, 4), (0.96, 5), (0.98, 6)):  # left over lost: 1, 0.11, 0.042, 0.02
        outcome = attack_batch(model, x, y, Threat(norm="linf", eps=factor * radius), "cascade", {"eot": eot})
        gradients = sum(steps * rows for steps, rows in stages[:entered])
        assert outcome.gradients == n * eot * gradients
        assert outcome.queries == n * (1 + eot * gradients + sum(rows for _, rows in stages[:entered]))


def test_broken_samples_cost_nothing_more() -> None:
    model = toys.linear(classes=10)
    x, y, radius = toys.equidistant(model, "linf")
    outcome = attack_batch(model, x, y, Threat(norm="linf", eps=3 * radius), "cascade")
    assert bool(outcome.success.all()) and outcome.gradients == 2 * len(x)


def test_effort_multiplies_the_steps() -> None:
    model = toys.linear(classes=4)
    x, y, radius = toys.equidistant(model, "l2")
    counts = [
        attack_batch(model, x, y, Threat(norm="l2", eps=0.5 * radius), "cascade", {"effort": effort}).gradients
        for effort in (0.01, 0.5, 1, 2)
    ]
    assert counts == [len(x) * c for c in (1 + 1 + 3, 5 + 15 + 15, 10 + 30 + 30, 20 + 60 + 60)]


def test_batch_mates_and_passes_do_not_matter(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    threat = Threat(norm="linf", eps=0.1)
    whole = attack_batch(digits.model, digits.x, digits.y, threat, "cascade")
    assert 5 < int(whole.right.sum()) < 43
    odd = torch.arange(47, 0, -2)
    part = attack_batch(digits.model, digits.x[odd], digits.y[odd], threat, "cascade", index=odd)
    monkeypatch.setattr(import_module("rempart.attacks.cascade"), "_ROWS", 7)
    narrow = attack_batch(digits.model, digits.x, digits.y, threat, "cascade")
    for other, at in ((part, odd), (narrow, torch.arange(48))):
        assert torch.equal(other.right, whole.right[at])
        torch.testing.assert_close(other.x_adv, whole.x_adv[at], rtol=0, atol=1e-9)


def test_what_is_not_found_is_the_lowest_margin_seen(digits: Digits) -> None:
    """Never above the margin of any single stage run alone."""
    threat, rng = Threat(norm="linf", eps=0.05), Draws(0, torch.arange(48))
    with frozen(digits.model), torch.no_grad():

        def margin(stages: tuple[Stage, ...]) -> Tensor:
            z = digits.model(climb(digits.model, digits.x, digits.y, threat, stages, rng=rng))
            own = z.gather(1, digits.y[:, None])[:, 0]
            return own - z.scatter(1, digits.y[:, None], -math.inf).amax(1)

        steps = [margin(STAGES[: k + 1]) for k in range(len(STAGES))]
    standing = steps[-1] > 0
    for before, after in pairwise(steps):
        assert bool((after <= before)[standing].all())
    assert bool((steps[-1] < steps[0])[standing].any())


def test_no_targets() -> None:
    model = toys.linear()
    x = toys.images(model.shape)
    with pytest.raises(ThreatError):
        cascade(model, x, toys.labels(model, x), Threat(norm="linf", eps=0.1), targeted=True)
