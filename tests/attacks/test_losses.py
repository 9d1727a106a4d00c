"""The scores attacks climb, against textbook formulas, hand-made numbers and torch's own cross-entropy."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, softplus

import toys
from rempart.attacks.losses import LossName, climb_direction, lead, reached, score, surely_reached
from rempart.core.errors import SpecError


def logits(n: int = 50, classes: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    z = scale * torch.randn((n, classes), generator=generator, dtype=torch.float64)
    return z, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("classes", toys.CLASSES)
def test_softplus_of_the_ce_score_is_the_cross_entropy(classes: int) -> None:
    z, y = logits(classes=classes)
    away = score("ce", targeted=False, num_classes=classes)(z, y)
    towards = score("ce", targeted=True, num_classes=classes)(z, y)
    torch.testing.assert_close(softplus(away), cross_entropy(z, y, reduction="none"), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(softplus(-towards), cross_entropy(z, y, reduction="none"), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_ce_climbs_in_the_direction_of_the_cross_entropy(classes: int, targeted: bool) -> None:
    """Cosine 1 to the gradient of the textbook loss in float64, where that gradient is alive."""
    model = toys.rescaled(toys.squashed(classes=classes), 4).double()
    x = toys.images(model.shape, 20).double()
    y = (toys.labels(model, x) + targeted) % classes
    ours, _, _ = climb_direction(model, x, y, score("ce", targeted=targeted, num_classes=classes))
    x.requires_grad_()
    loss = cross_entropy(model(x), y, reduction="sum") * (-1 if targeted else 1)
    (textbook,) = torch.autograd.grad(loss, x)
    cosine = cosine_similarity(ours.flatten(1), textbook.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)


def test_ce_is_alive_where_softmax_is_not() -> None:
    """At a margin of 1,000 float32 cross-entropy has gradient 0; ours is that of runner-up minus own logit."""
    z = torch.tensor([[1000.0, 0.0, -500.0]], requires_grad=True)
    y = torch.tensor([0])
    (dead,) = torch.autograd.grad(cross_entropy(z, y), z)
    (alive,) = torch.autograd.grad(score("ce", targeted=False, num_classes=3)(z, y).sum(), z)
    assert dead.tolist() == [[0, 0, 0]]
    assert alive.tolist() == [[-1, 1, 0]]
    (towards,) = torch.autograd.grad(score("ce", targeted=True, num_classes=3)(z, torch.tensor([2])).sum(), z)
    assert towards.tolist() == [[-1, 0, 1]]


def test_margin_by_hand() -> None:
    z = torch.tensor([[3.0, 1.0, -2.0], [0.5, 0.5, 4.0], [1.0, 7.0, 7.0]])
    y = torch.tensor([0, 1, 2])
    assert lead(z, y).tolist() == [2.0, -3.5, 0.0]
    assert score("margin", targeted=False, num_classes=3)(z, y).tolist() == [-2.0, 3.5, 0.0]
    assert score("margin", targeted=True, num_classes=3)(z, y).tolist() == [2.0, -3.5, 0.0]


def test_dlr_by_hand() -> None:
    """-(z_y - max other) / (z_1st - z_3rd); targeted (z_t - max other) / (z_1st - (z_3rd + z_4th) / 2)."""
    z = torch.tensor([[5.0, 4.0, 1.0, -3.0], [5.0, 4.0, 1.0, -3.0], [5.0, 4.0, 1.0, -3.0]])
    y = torch.tensor([0, 1, 3])
    away = score("dlr", targeted=False, num_classes=4)(z, y)
    torch.testing.assert_close(away, torch.tensor([-1 / 4, 1 / 4, 8 / 4]))
    towards = score("dlr", targeted=True, num_classes=4)(z, y)
    torch.testing.assert_close(towards, torch.tensor([1 / 6, -1 / 6, -8 / 6]))


@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_does_not_depend_on_scale_or_shift(targeted: bool) -> None:
    z, y = logits()
    goal = score("dlr", targeted=targeted, num_classes=5)
    torch.testing.assert_close(goal(1000 * z, y), goal(z, y))
    torch.testing.assert_close(goal(z + 100, y), goal(z, y))


def test_dlr_of_equal_logits_is_finite() -> None:
    z = torch.zeros((2, 4), requires_grad=True)
    value = score("dlr", targeted=False, num_classes=4)(z, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert value.tolist() == [0, 0] and bool(gradient.isfinite().all())


@pytest.mark.parametrize(("classes", "targeted"), [(2, False), (2, True), (3, True)])
def test_dlr_with_too_few_classes_is_refused(classes: int, targeted: bool) -> None:
    with pytest.raises(SpecError, match="loss=margin"):
        score("dlr", targeted=targeted, num_classes=classes)
    score("dlr", targeted=False, num_classes=3)
    score("dlr", targeted=True, num_classes=4)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["margin", "dlr"])
def test_a_score_is_positive_exactly_where_the_goal_is_reached(name: LossName, targeted: bool) -> None:
    z, y = logits(500)
    value = score(name, targeted=targeted, num_classes=5)(z, y)
    by_hand = torch.tensor(
        [(max(range(5), key=lambda k: float(row[k])) == int(t)) == targeted for row, t in zip(z, y, strict=True)]
    )
    assert torch.equal(value > 0, by_hand)
    assert torch.equal(reached(z, y, targeted=targeted), by_hand)
    assert 0 < int(by_hand.sum()) < 500


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["ce", "margin", "dlr"])
def test_a_score_grows_with_the_right_logit(name: LossName, targeted: bool) -> None:
    z, y = logits(200)
    goal = score(name, targeted=targeted, num_classes=5)
    raised = z.scatter_add(1, y[:, None], torch.full((200, 1), 0.1, dtype=z.dtype))
    change = (goal(raised, y) - goal(z, y)) * (1 if targeted else -1)
    assert bool((change >= -1e-12).all())
    assert name == "dlr" or bool((change > 0).all())  # numerator and denominator of dlr may grow by the same share


def test_surely_reached_asks_for_more_than_rounding() -> None:
    """A lead of 0.0005 among logits from 0 to 100 may be another order of summation; 0.01 is a lead."""
    z = torch.tensor([[100.0, 100.0, 0.0], [100.0, 100.0005, 0.0], [100.0, 100.01, 0.0], [100.01, 100.0, 0.0]])
    y = torch.zeros(4).long()
    assert reached(z, y, targeted=False).tolist() == [False, True, True, False]
    assert surely_reached(z, y, targeted=False).tolist() == [False, False, True, False]
    assert surely_reached(z, y, targeted=True).tolist() == [False, False, False, True]


def test_climb_direction_is_the_gradient_of_each_sample_alone() -> None:
    """Against one autograd call per sample; parameters get no gradient, and it works under no_grad."""
    model = toys.smooth().double()
    x = toys.images(model.shape, 5).double()
    y, goal = toys.labels(model, x), score("ce", targeted=False, num_classes=3)
    with torch.no_grad():
        gradient, z, value = climb_direction(model, x, y, goal)
    for i in range(5):
        one = x[i : i + 1].clone().requires_grad_()
        out = model(one)
        log_odds = torch.logsumexp(out[0, [k for k in range(3) if k != int(y[i])]], 0) - out[0, y[i]]
        (alone,) = torch.autograd.grad(log_odds, one)
        torch.testing.assert_close(gradient[i], alone[0])
        torch.testing.assert_close(z[i], out[0].detach())
        assert math.isclose(float(value[i]), log_odds.item(), rel_tol=1e-12)
    assert not x.requires_grad and not z.requires_grad and not value.requires_grad and not gradient.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
