"""Square: its schedule, what its candidates look like, and what it finds on models with known answers."""

import math

import pytest
import torch
from torch import Tensor, nn

import toys
from rempart.attacks import attack_batch, pgd, square
from rempart.attacks.losses import lead
from rempart.attacks.square import bumps, side_length
from rempart.core.threat import NORMS, Norm, Threat, vector_norm


def watched(norm: Norm, eps: float, queries: int, shape: tuple[int, ...] = (3, 9, 8), seed: int = 0):
    """Originals and candidates seen by a model that nothing breaks, with their margins."""
    net = toys.smooth(shape).double()
    x = toys.images(shape, 4, seed).double()
    y, seen, margins = toys.labels(net, x), list[Tensor](), list[Tensor]()

    def model(z: Tensor) -> Tensor:
        logits = net(z).scatter_add(1, y[:, None], torch.full((len(y), 1), 1e3).double())
        seen.append(z.clone())
        margins.append(lead(logits, y))
        return logits

    out = square(model, x, y, Threat(norm=norm, eps=eps), queries=queries)  # type: ignore
    return x, seen, torch.stack(margins), out


FIRST = [(0, 1), (10, 1), (11, 2), (50, 2), (51, 4), (200, 4), (201, 8), (500, 8), (501, 16), (1000, 16), (1001, 32)]
LATER = [(2000, 32), (2001, 64), (4000, 64), (4001, 128), (6000, 128), (6001, 256), (8000, 256), (8001, 512)]


@pytest.mark.parametrize(("t", "share"), [*FIRST, *LATER])
def test_the_schedule_is_the_papers(t: int, share: int) -> None:
    size = (224, 224)
    assert side_length(t, size, "linf", 10_000, 0.8, False) == round(math.sqrt(0.8 / share * 224 * 224))
    twice_as_fast = side_length(t // 2, size, "linf", 5000, 0.8, True)
    assert twice_as_fast == side_length(t // 2 * 2, size, "linf", 5000, 0.8, False)


def test_sides_of_windows() -> None:
    """On 28 x 28 as in the paper's code; at most the shortest side; odd and at least 3 for l2 and l1."""
    linf = [side_length(t, (28, 28), "linf", 5000, 0.8, False) for t in (0, 11, 51, 201, 501, 1001, 2001, 4001)]
    assert linf == [25, 18, 13, 9, 6, 4, 3, 2]
    l2 = [side_length(t, (28, 28), "l2", 5000, 0.8, False) for t in (0, 11, 51, 201, 501, 1001, 2001, 4001)]
    assert l2 == [25, 19, 13, 9, 7, 5, 3, 3]
    assert side_length(0, (3, 40), "linf", 5000, 0.8, False) == 3
    assert side_length(0, (10, 10, 10), "linf", 5000, 0.8, False) == 9
    assert side_length(0, (10,), "linf", 5000, 0.8, False) == 8


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 4)])
def test_bumps_are_nested_squares(norm: Norm, power: int) -> None:
    """Rings added one by one, as the paper writes them, for each half; the second is negative; both axes."""
    expected = torch.zeros(5, 5).double()
    for top, depth, sign in ((0, 2, 1), (2, 3, -1)):
        half = torch.zeros(depth, 5).double()
        for r in range(3):
            half[max(depth // 2 - r, 0) : depth // 2 + r + 1, 2 - r : 3 + r] += 1 / (r + 1) ** power
        expected[top : top + depth] = sign * half / vector_norm(half.view(1, -1), norm)
    expected /= vector_norm(expected.view(1, -1), norm)
    got = bumps(5, 2, norm)
    assert torch.allclose(got[0], expected) and torch.allclose(got[1], expected.t())


@pytest.mark.parametrize("norm", NORMS)
def test_candidates_use_the_whole_budget_and_the_margin_never_rises(norm: Norm) -> None:
    eps = {"linf": 0.03, "l2": 0.2, "l1": 1.0}[norm]
    x, seen, margins, out = watched(norm, eps, 150)
    for z in seen:
        step = (z - x).flatten(1)
        if norm == "linf":
            assert torch.allclose(step.abs(), torch.full_like(step, eps), atol=1e-12)
        else:
            assert torch.allclose(vector_norm(step, norm), torch.full((len(x),), eps).double(), rtol=1e-9)
    best = margins.argmin(0)
    assert bool((best > 0).all()), "the start was never improved on"
    for i, t in enumerate(best.tolist()):
        assert torch.equal(out[i], seen[t][i]), "not the image of lowest margin"
    kept, changed = seen[0], 0
    lowest = margins[0]
    for t in range(1, len(seen)):  # each candidate differs from the best one before it by one window (two in l2, l1)
        side = side_length(t - 1, (9, 8), norm, 150, 0.8, False)
        pixels = (seen[t] != kept).any(1).flatten(1).sum(1)
        assert bool((pixels <= side**2 * (1 if norm == "linf" else 2)).all())
        better = margins[t] < lowest
        changed += int(better.sum())
        kept = torch.where(better.view(-1, 1, 1, 1), seen[t], kept)
        lowest = torch.minimum(lowest, margins[t])
    assert changed > 4


def test_linf_images_end_at_eps_or_at_the_box() -> None:
    model, x = toys.smooth((1, 6, 6)), toys.images((1, 6, 6))
    x = torch.where(x > 0.52, 1.0, x)
    z = square(model, x, toys.labels(model, x), Threat(norm="linf", eps=1e-3), queries=60)
    assert bool((((z - x).abs() - 1e-3).abs() < 1e-6).logical_or((z == 1) & (x == 1)).all())


@pytest.mark.parametrize(("norm", "factor"), [("linf", 1.01), ("l2", 1.25)])
def test_comes_near_the_radius_of_an_affine_model(norm: Norm, factor: float) -> None:
    model = toys.linear(classes=2)
    x, y, radius = toys.equidistant(model, norm)
    outcome = attack_batch(model, x, y, Threat(norm=norm, eps=factor * radius), "square", {"queries": 1000})
    assert bool(outcome.success.all())
    assert outcome.gradients == 0


def test_breaks_a_model_without_gradient_where_pgd_does_not() -> None:
    """Logits in steps of 0.01: their gradient is zero, their decisions nearly those of the affine model."""

    class Stairs(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return (100 * plain(z)).floor() / 100 + 0 * z.flatten(1).sum(1, keepdim=True)

    plain, model = toys.linear(classes=2), Stairs()
    x, y, radius = toys.equidistant(plain, "linf", 12)
    x, y = x[model(x).argmax(1) == y], y[model(x).argmax(1) == y]
    assert len(x) >= 6
    threat = Threat(norm="linf", eps=2 * radius)
    assert torch.equal(model(pgd(model, x, y, threat, steps=10, random_start=False)).argmax(1), y)
    assert bool((model(square(model, x, y, threat, queries=400)).argmax(1) != y).all())


def test_more_queries_extend_the_same_search() -> None:
    (_, short, _, _), (_, long, _, _) = (watched("linf", 0.03, q) for q in (20, 130))
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))
    assert len(short) == 20 and len(long) == 130
