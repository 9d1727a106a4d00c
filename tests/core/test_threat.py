"""The geometry of the threat model against linear and quadratic programmes, and the distributions of its starts."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from scipy.stats import beta, kstest

import toys
from rempart.core.errors import ThreatError
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, TOLERANCE, Threat, dual, vector_norm

pytestmark = pytest.mark.usefixtures("untouched_rng")
BOXES = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-1024.0, 3071.0)]


def problem(seed: int, dims: int = 5, n: int = 1):
    """Images in the unit box with some pixels on its faces, and targets that leave box and ball on all sides."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 1, (n, 1, dims))
    x = np.where(rng.random(x.shape) < 0.4, rng.choice([0.0, 1.0, 0.98, 0.02], x.shape), x)
    z = x + rng.normal(0, 0.7, x.shape) * rng.choice([0.0, 0.3, 1.0], x.shape)
    return torch.tensor(x), torch.tensor(z)


def feasible(threat: Threat, x: torch.Tensor, seed: int, count: int) -> torch.Tensor:
    """Points of ball and box made without `project`: a point of the box, pulled towards x until the ball holds it."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 1, (count, *x.shape[1:]))
    d = torch.tensor(np.where(rng.random(corner.shape) < 0.5, np.round(corner), corner)) - x
    size = vector_norm(d.flatten(1), threat.norm)
    share = (threat.budget / size.clamp_min(1e-300)).clamp_max(1) * torch.tensor(rng.choice([1.0, 0.7], count))
    return x + d * share[:, None, None]


# --- project ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("seed", range(12))
def test_projection_is_the_quadratic_programme(norm, seed):
    """min |p - z|^2 over ball and box, by SLSQP in the positive and negative parts of p - x."""
    x, z = problem(seed)
    x0, delta, eps = x.flatten().numpy(), (z - x).flatten().numpy(), [0.1, 0.4, 1.2][seed % 3]
    size = {"l1": lambda u: eps - u.sum(), "l2": lambda u: eps**2 - ((u[:5] - u[5:]) ** 2).sum()}[norm]
    solved = minimize(
        lambda u: ((u[:5] - u[5:] - delta) ** 2).sum(),
        np.full(10, 1e-3),
        bounds=[(0, b) for b in (*(1 - x0), *x0)],
        constraints={"type": "ineq", "fun": size},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    expected = x0 + solved.x[:5] - solved.x[5:]
    found = Threat(norm=norm, eps=eps).project(x, z).flatten().numpy()
    assert found == pytest.approx(expected, abs=2e-5)
    assert ((found - z.flatten().numpy()) ** 2).sum() <= solved.fun + 1e-9


@given(seed=st.integers(0, 10**6), eps=st.sampled_from([1e-3, 0.05, 0.3, 0.9, 1.0]), dims=st.integers(1, 9))
@pytest.mark.parametrize("norm", NORMS)
def test_projection_satisfies_the_variational_inequality(norm, seed, eps, dims):
    """p is the projection of z exactly when p is feasible and <z - p, v - p> <= 0 for every feasible v."""
    threat = Threat(norm=norm, eps=eps)
    x, z = problem(seed, dims)
    p = threat.project(x, z)
    assert float(threat.distance(x, p)) <= eps + 1e-12 and p.min() >= 0 and p.max() <= 1
    v = feasible(threat, x, seed, 20)
    assert bool((threat.distance(x.expand_as(v), v) <= eps + 1e-12).all()), "the test's own points must be feasible"
    assert float(((z - p) * (v - p)).flatten(1).sum(1).max()) <= 1e-9
    assert torch.allclose(threat.project(x, p), p, rtol=0, atol=1e-12), "idempotent"
    assert torch.allclose(threat.project(x, v[:1]), v[:1], rtol=0, atol=1e-12), "feasible points stay"


@pytest.mark.parametrize("norm", NORMS)
def test_no_budget_no_change(norm):
    x, z = problem(1, 50, 20)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(Threat(norm=norm, eps=0.0).project(x.to(dtype), z.to(dtype)), x.to(dtype))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("low", "high"), BOXES)
def test_projections_hold_at_the_size_of_real_images(norm, low, high):
    """128 x 128 pixels in float32, random and flat; l1 and l2 keep the budget without any slack, and use it."""
    x = torch.cat(
        [torch.rand((2, 1, 16384), generator=torch.Generator().manual_seed(0)), torch.full((2, 1, 16384), 0.7)]
    )
    x[3] = 1.0
    z = x.roll(1, 2).flip(0) * 1.4 - 0.2
    x, z = x * (high - low) + low, z * (high - low) + low
    for share in (1e-3, 1 / 255, 0.03):
        eps = share * (high - low) * {"linf": 1, "l2": 20, "l1": 800}[norm]
        threat = Threat(norm=norm, eps=eps, low=low, high=high)
        p = threat.project(x, z)
        assert p.dtype == torch.float32 and p.shape == x.shape
        assert bool(threat.holds(x, p).all())
        ulp = 2**-23 * max(-low, high)
        assert bool((threat.distance(x, p) <= eps * (1 + 1e-12) + (ulp if norm == "linf" else 0)).all())
        assert bool((threat.distance(x, p) >= eps - ulp * {"linf": 1, "l2": 128, "l1": 16384}[norm]).all())


@pytest.mark.parametrize("value", [0.3, 0.7, 1.0])
def test_rounding_does_not_add_up_over_a_large_flat_image(value):
    """224 x 224 x 3 equal pixels, moved by less than a rounding unit each: all are rounded the same way."""
    x = torch.full((1, 3, 224, 224), value)
    for eps in (0.01, 0.5, 1.0, 12.0):
        threat = Threat(norm="l1", eps=eps)
        p = threat.project(x, torch.full_like(x, 0.5))
        assert float(threat.distance(x, p)) <= eps and bool(threat.holds(x, p))


def test_projection_of_an_empty_batch():
    x = torch.zeros(0, 1, 2, 2)
    for norm in NORMS:
        threat = Threat(norm=norm, eps=0.1)
        assert threat.project(x, x).shape == threat.start(x, Draws(0, torch.arange(0))).shape == x.shape
        assert threat.ascend(x, x, 0.1).shape == threat.quantise(x, x).shape == x.shape
        assert threat.holds(x, x).shape == (0,)


def test_a_sample_is_projected_the_same_in_any_batch():
    x, z = (part.float() for part in problem(4, 300, 9))
    for norm in NORMS:
        threat = Threat(norm=norm, eps=0.7)
        rows = [threat.project(x[i : i + 1], z[i : i + 1]) for i in range(9)]
        torch.testing.assert_close(threat.project(x, z), torch.cat(rows), rtol=0, atol=1e-6)  # sums of rows


# --- ascend ----------------------------------------------------------------------------------------------------------


def best_step(x: np.ndarray, gradient: np.ndarray, length: float, norm: str) -> float:
    """max <gradient, d> over |d| <= length and the box, by linear programming in the two parts of d."""
    room = [*(1 - x), *x]
    bounds = [(0, min(r, length) if norm == "linf" else r) for r in room]
    total = None if norm == "linf" else np.ones((1, 2 * len(x)))
    solved = linprog(-np.r_[gradient, -gradient], A_ub=total, b_ub=None if total is None else [length], bounds=bounds)
    return -solved.fun


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("seed", range(15))
def test_steepest_ascent_is_the_linear_programme(norm, seed):
    x, z = problem(seed, 6)
    gradient, length = (z - x) + 0.01, [0.05, 0.4, 1.0, 2.5][seed % 4]
    threat = Threat(norm=norm, eps=min(length, 1.0) if norm == "linf" else length)
    moved = threat.project(x, x + threat.ascend(x, gradient, threat.budget))
    gain = float(((moved - x) * gradient).sum())
    assert gain == pytest.approx(best_step(x.flatten().numpy(), gradient.flatten().numpy(), threat.budget, norm))
    if norm == "l1":  # needs no projection: the step itself stays in ball and box
        assert torch.allclose(moved, x + threat.ascend(x, gradient, length), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_ascent_meets_the_dual_norm_away_from_the_box(norm):
    """The largest of <g, d> over |d| <= length is length times the dual norm of g (Hoelder), and it is attained."""
    x, z = problem(0, 7, 30)
    gradient, threat = z - x + 1e-3, Threat(norm=norm, eps=0.01)
    x = torch.full_like(x, 0.5)
    step = threat.ascend(x, gradient, 0.01)
    gain = (step * gradient).flatten(1).sum(1)
    assert torch.allclose(gain, 0.01 * vector_norm(gradient.flatten(1), dual(norm)))
    assert torch.allclose(vector_norm(step.flatten(1), norm), torch.full((30,), 0.01, dtype=torch.float64))
    other = feasible(threat, x[:1], 3, 30) - 0.5
    assert bool(((other * gradient).flatten(1).sum(1) <= gain + 1e-12).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_the_size_of_the_gradient_does_not_matter(norm, scale):
    """A saturated loss has gradients far below 1e-23, whose squares are 0 in float32; the step must not be."""
    x = torch.full((2, 1, 30), 0.5)
    gradient = torch.linspace(-1, 2, 60).view(2, 1, 30)
    threat = Threat(norm=norm, eps=0.1)
    assert torch.allclose(threat.ascend(x, gradient * scale, 0.1), threat.ascend(x, gradient, 0.1), rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gradients_and_lengths_per_sample(norm):
    x = torch.full((3, 1, 6), 0.5)
    gradient = torch.linspace(-1, 2, 18).view(3, 1, 6)
    gradient[1] = 0
    threat = Threat(norm=norm, eps=1.0)
    length = torch.tensor([[0.1], [0.2], [0.3]])
    step = threat.ascend(x, gradient, length)
    assert not step[1].any()
    for i in (0, 2):
        alone = threat.ascend(x[i : i + 1], gradient[i : i + 1], float(length[i]))
        torch.testing.assert_close(step[i : i + 1], alone)  # sums of rows


@pytest.mark.parametrize(("share", "moved"), [(0.0, 1), (0.01, 1), (0.1, 4), (0.5, 20), (1.0, 40)])
def test_a_share_of_the_coordinates_moves_evenly(share, moved):
    """Inside the box: `moved` coordinates of largest gradient, length / moved each, with the sign of the gradient."""
    x = torch.full((1, 1, 40), 0.5, dtype=torch.float64)
    gradient = torch.linspace(-1, 1.1, 40, dtype=torch.float64).view(1, 1, 40)
    step = Threat(norm="l1", eps=1.0).ascend(x, gradient, 0.2, share=share).flatten()
    leaders = gradient.flatten().abs().argsort(descending=True)[:moved]
    expected = torch.zeros_like(step)
    expected[leaders] = 0.2 / moved * gradient.flatten()[leaders].sign()
    assert torch.allclose(step, expected, rtol=0, atol=1e-12)


def test_a_full_coordinate_hands_its_share_on():
    x = torch.tensor([[[1.0, 0.95, 0.5, 0.5]]], dtype=torch.float64)
    gradient = torch.tensor([[[9.0, 5.0, 3.0, -1.0]]], dtype=torch.float64)
    threat = Threat(norm="l1", eps=1.0)
    step = threat.ascend(x, gradient, 0.2, share=0.5)
    assert step.flatten().tolist() == pytest.approx([0.0, 0.05, 0.1, -0.05])
    assert threat.ascend(x, gradient, 0.2).flatten().tolist() == pytest.approx([0.0, 0.05, 0.15, 0.0])


# --- start -----------------------------------------------------------------------------------------------------------


def test_starts_are_uniform_in_the_ball():
    """(r / eps)^D is uniform, d_1^2 / r^2 is Beta(1/2, (D-1)/2) in l2, |d_1| / r is Beta(1, D-1) in l1."""
    n, dims, eps = 4000, 6, 0.2
    x = torch.full((n, 1, 2, 3), 0.5, dtype=torch.float64)
    for norm in ("l2", "l1"):
        d = (Threat(norm=norm, eps=eps).start(x, Draws(5, torch.arange(n))) - x).flatten(1)
        r = vector_norm(d, norm)
        assert kstest(((r / eps) ** dims).numpy(), "uniform").pvalue > 1e-3
        law = beta(0.5, (dims - 1) / 2) if norm == "l2" else beta(1, dims - 1)
        for i in range(dims):
            part = (d[:, i].abs() / r) ** (2 if norm == "l2" else 1)
            assert kstest(part.numpy(), law.cdf).pvalue > 1e-4
            assert abs(float(d[:, i].sign().mean())) < 4 / math.sqrt(n)
            assert abs(float((d[:, i] / r).mean())) < 4 / math.sqrt(n * dims), "the sign does not go with the size"
        assert np.abs(np.corrcoef(d.sign().T.numpy()) - np.eye(dims)).max() < 5 / math.sqrt(n)
    d = (Threat(norm="linf", eps=eps).start(x, Draws(5, torch.arange(n))) - x).flatten()
    assert kstest(d.numpy(), "uniform", (-eps, 2 * eps)).pvalue > 1e-3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("low", "high"), BOXES)
def test_starts_hold_where_the_box_is_active(norm, low, high):
    x = torch.rand((20, 3, 8, 9), generator=torch.Generator().manual_seed(1))
    x[::2] = x[::2].round()
    x = x * (high - low) + low
    threat = Threat(norm=norm, eps=0.5 * (high - low), low=low, high=high)
    z = threat.start(x, Draws(0, torch.arange(20)))
    assert z.dtype == x.dtype and bool(threat.holds(x, z).all()) and bool(((z >= low) & (z <= high)).all())
    assert bool((threat.distance(x, z) > 0).all()), "every sample moves"
    slack = 1e-6 * max(abs(low), abs(high))  # sums of rows
    torch.testing.assert_close(threat.start(x[3:7], Draws(0, torch.arange(3, 7))), z[3:7], rtol=0, atol=slack)
    assert not torch.equal(threat.start(x, Draws(1, torch.arange(20))), z)


# --- holds, distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), BOXES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dims", [12, 50_000])
def test_holds_accepts_rounding_and_refuses_an_excess(norm, low, high, dims):
    span = high - low
    x = torch.full((1, 1, dims), low + span / 2)
    eps = span / 16
    threat = Threat(norm=norm, eps=eps, low=low, high=high)
    direction = torch.full_like(x, {"linf": 1, "l2": dims**-0.5, "l1": 0}[norm])
    if norm == "l1":
        direction[..., 0] = 1
    assert bool(threat.holds(x, x)) and bool(threat.holds(x, x + eps * direction))
    assert not threat.holds(x, x + eps * direction * 1.01)
    edge = torch.full_like(x, high)
    wide = Threat(norm=norm, low=low, high=high)
    assert bool(wide.holds(x, edge)) and not wide.holds(x, edge + span * 1e-4)
    assert bool(wide.holds(x, edge - span)) and not wide.holds(x, edge - span * 1.0001)


def test_holds_is_per_sample_and_refuses_what_is_no_number():
    x = torch.full((4, 1, 3), 0.5)
    z = x.clone()
    z[1, 0, 0], z[2, 0, 1], z[3, 0, 2] = math.nan, math.inf, 0.9
    assert Threat(norm="linf", eps=0.1).holds(x, z).tolist() == [True, False, False, False]
    assert Threat(norm="linf").holds(x, z).tolist() == [True, False, False, True]


def test_distances_are_taken_in_float64():
    x = torch.full((1, 1, 30000), 0.5)
    z = x + 2.0**-20
    for norm, value in (("linf", 2**-20), ("l2", 2**-20 * math.sqrt(30000)), ("l1", 2**-20 * 30000)):
        assert Threat(norm=norm).distance(x, z).tolist() == pytest.approx([value], rel=1e-12)


# --- quantise --------------------------------------------------------------------------------------------------------


def stored(x: float, z: float, low: float, high: float, levels: int) -> set[float]:
    """The rule in exact fractions: the nearest level, unless it is further from x than z by more than rounding.

    Then the level closest to z between x and z, or, where there is none, a level closest to x.
    """
    unit = (Fraction(high) - Fraction(low)) / (levels - 1)
    origin, exact = (Fraction(x) - Fraction(low)) / unit, (Fraction(z) - Fraction(low)) / unit
    slack = Fraction(TOLERANCE) * Fraction(max(abs(low), abs(high))) / unit
    nearest, inner = round(exact), math.floor(exact) if exact > origin else math.ceil(exact)
    fallback = inner if min(origin, exact) <= inner <= max(origin, exact) else round(origin)
    if abs(nearest - origin) <= abs(exact - origin):
        kept = {nearest}
    elif abs(nearest - origin) <= abs(exact - origin) + slack:  # rounding decides: both are right
        kept = {nearest, fallback}
    else:
        kept = {fallback}
    return {float(np.float32(float(Fraction(low) + k * unit))) for k in kept}


@given(
    x=st.floats(0, 1, width=32),
    z=st.floats(0, 1, width=32),
    grid=st.booleans(),
    levels=st.sampled_from([2, 3, 16, 256, 4096, 65536]),
    box=st.sampled_from(BOXES),
)
def test_quantise_follows_its_rule(x, z, grid, levels, box):
    low, high = box
    start = torch.tensor([[[x]]]) * (high - low) + low
    if grid:
        start = torch.tensor([[[round(x * (levels - 1)) / (levels - 1)]]]) * (high - low) + low
    point = torch.tensor([[[z]]]) * (high - low) + low
    threat = Threat(norm="linf", eps=None, low=low, high=high)
    found = threat.quantise(start, point, levels)
    ulp = 2**-23 * max(abs(low), abs(high))
    assert any(abs(float(found) - s) <= ulp for s in stored(float(start), float(point), low, high, levels))
    assert torch.equal(threat.quantise(start, found, levels), found), "what is stored already stays"
    moved, was = abs(float(found) - float(start)), abs(float(point) - float(start))
    assert moved <= max(was + TOLERANCE * max(abs(low), abs(high)), 0.5 * (high - low) / (levels - 1) + ulp)


@pytest.mark.parametrize("norm", NORMS)
def test_a_stored_attack_on_a_stored_image_still_holds(norm):
    x = torch.randint(0, 256, (20, 1, 30, 30), generator=torch.Generator().manual_seed(0)) / 255
    threat = Threat(norm=norm, eps={"linf": 0.01, "l2": 0.5, "l1": 12.0}[norm])
    z = threat.project(x, x.roll(3, 3))
    q = threat.quantise(x, z)
    assert bool(threat.holds(x, q).all())
    assert torch.equal((q * 255).round() / 255, q), "exactly what a file of 8 bits gives back"
    assert bool((q != x).any()) or norm == "l1"


def test_quantise_keeps_16_bits():
    x = (torch.arange(65536) / 65535).view(1, 1, 256, 256)
    z = x.roll(7)
    assert torch.equal(Threat(norm="linf").quantise(x, z, 65536), z)


# --- names and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "norm", "eps"),
    [
        ("linf:8/255", "linf", 8 / 255),
        ("l2:0.5", "l2", 0.5),
        ("l1:12", "l1", 12.0),
        (" L2 ", "l2", None),
        ("linf:0", "linf", 0.0),
        ("LINF:1", "linf", 1.0),
        ("l2:1e-3", "l2", 1e-3),
    ],
)
def test_parse(text, norm, eps):
    assert Threat.parse(text) == Threat(norm=norm, eps=eps)
    again = Threat.parse(str(Threat.parse(text))).eps
    assert again is None if eps is None else again == pytest.approx(eps, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("linf:8", ["linf eps in [0, 1]", "got 8.0", "did you mean 8/255?"]),
        ("linf:1.01", ["linf eps in [0, 1]", "1.01"]),
        ("linf:300", ["got 300.0", "units of the box"]),
        ("linf:-1/255", ["linf eps >= 0", "-0.0039"]),
        ("l2:nan", ["l2 eps >= 0", "nan"]),
        ("l2:inf", ["l2 eps >= 0", "inf"]),
        ("l1:-inf", ["l1 eps >= 0", "-inf"]),
        ("lif:0.1", ["linf, l2, l1", "'lif'", "did you mean 'linf'?"]),
        ("l0:3", ["linf, l2, l1", "'l0'"]),
        ("", ["linf, l2, l1", "''"]),
        ("8/255", ["a norm before", "'8/255'", "write linf:8/255"]),
        ("0.1", ["write linf:0.1"]),
        (".1", ["write linf:.1"]),
        ("linf:", ["such as linf:8/255", "'linf:'"]),
        ("linf:1/0", ["such as linf:8/255", "'linf:1/0'"]),
        ("linf:8/255:2", ["such as linf:8/255"]),
        ("linf:eight", ["such as linf:8/255", "eight"]),
    ],
)
def test_parse_errors_say_what_to_write(text, words):
    with pytest.raises(ThreatError) as error:
        Threat.parse(text)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_box_sets_the_scale_of_eps():
    assert Threat.parse("linf:8", high=255).budget == 8
    assert Threat.parse("linf:2", low=-1).budget == 2
    assert Threat.parse("l2:900").budget == 900, "an l2 ball may be wider than the box"
    with pytest.raises(ThreatError, match=r"linf eps in \[0, 2\]"):
        Threat.parse("linf:2.1", low=-1)


@pytest.mark.parametrize(("low", "high"), [(1, 0), (0, 0), (math.nan, 1), (0, math.inf)])
def test_impossible_boxes_are_refused(low, high):
    with pytest.raises(ThreatError, match="finite low < high"):
        Threat(norm="linf", eps=0.0, low=low, high=high)


def test_norms_that_are_no_words_are_refused():
    with pytest.raises(ThreatError, match="got None"):
        Threat(norm=None)  # pyright: ignore[reportArgumentType]


def test_a_budget_is_asked_for():
    with pytest.raises(ThreatError, match="a threat with a budget, got l2; write for example l2:8/255"):
        _ = Threat(norm="l2").budget


# --- the toys, because every later suite trusts them -----------------------------------------------------------------


@pytest.mark.parametrize("shape", toys.SHAPES)
@pytest.mark.parametrize("norm", NORMS)
def test_radii_of_the_toys_are_where_the_class_changes(shape, norm):
    """Steepest ascent of z_k - z_y by 1.01 radii makes k lead; by 0.99 radii no direction makes any class lead."""
    for classes in (2, 3, 10):
        for model in (toys.linear(shape, classes, 1), toys.squashed(shape, classes, 1)):
            weight, _ = toys.affine(model)
            x = toys.images(shape)
            y = toys.labels(model, x)
            radius, nearest = toys.radii(model, x, y, norm).min(1)
            slope = (weight[nearest] - weight[y]).view_as(x)
            for share, moves in ((1.01, True), (0.99, False)):
                step = Threat(norm=norm).ascend(x.double(), slope, share * radius[:, None])
                z = x + step
                assert float(z.min()) > 0 and float(z.max()) < 1, "the box is not active"
                assert bool(((model(z.float()).argmax(1) != y) == moves).all())
            assert torch.equal(toys.radius(model, x, y, norm), radius)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_radii_of_the_toys_are_the_linear_programme(norm):
    """min t over |d| <= t, x + d in the box and z_k >= z_y, for each k, with d in two parts and t (or its sum) last."""
    model = toys.linear((1, 3, 3), 4)
    x = toys.images((1, 3, 3), 3)
    y = toys.labels(model, x)
    weight, bias = (part.numpy() for part in toys.affine(model))
    for i, k in [(i, k) for i in range(3) for k in range(4) if k != int(y[i])]:
        x0 = x[i].double().flatten().numpy()
        row, gap = weight[k] - weight[y[i]], (weight[y[i]] - weight[k]) @ x0 + bias[y[i]] - bias[k]
        caps = np.c_[np.eye(18), -np.ones(18)] if norm == "linf" else np.r_[np.ones(18), -1][None]
        solved = linprog(
            np.r_[np.zeros(18), 1],
            A_ub=np.r_[caps, [np.r_[-row, row, 0]]],
            b_ub=np.r_[np.zeros(len(caps)), -gap],
            bounds=[*((0, b) for b in (*(1 - x0), *x0)), (0, None)],
        )
        assert float(toys.radii(model, x, y, norm)[i, k]) == pytest.approx(solved.fun, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "norm", "eps"),
    [
        ("linf:10HU", "linf", 10 / 400 * 2),
        ("linf:10raw", "linf", 10 / 400 * 2),
        ("l2:1/2hu", "l2", 0.5 / 400 * 2),
        ("l1: 1e2 HU", "l1", 100 / 400 * 2),
        ("linf:0.05", "linf", 0.05),
        ("linf", "linf", None),
    ],
)
def test_budgets_in_the_units_of_the_data_become_the_same_share_of_the_box(text: str, norm: str, eps: float) -> None:
    threat = Threat.parse(text, low=-1, high=1, unit="HU", span=(-160, 240))
    assert threat.norm == norm and threat.eps == pytest.approx(eps)


@pytest.mark.parametrize(
    ("text", "unit", "message"),
    [
        ("linf:10HU", "1", "have no unit of their own; write linf:10/255$"),
        ("linf:0.1x", "1", "have no unit of their own; write linf:0.1$"),
        ("l2:10HU", "1", "have no unit of their own; write l2:10$"),
        ("10HU", "1", "a norm before the budget, got '10HU'; write linf:10HU"),
        ("0.1x", "HU", "a norm before the budget, got '0.1x'; write linf:0.1x"),
        ("linf:10", "HU", "pixel units, or in HU, got 'linf:10'; did you mean linf:10HU, or linf:10/255[?]"),
        ("linf:10", "raw", "did you mean linf:10raw, or linf:10/255[?]"),
        ("linf:300", "HU", "did you mean linf:300HU[?]"),
        ("linf:10raw", "1", "have no unit of their own"),
        ("linf:10Bq", "HU", "are in HU; write linf:10HU"),
        ("linf:HU", "HU", "a threat such as"),
        ("linf:1/0HU", "HU", "a threat such as"),
        ("linf:500HU", "HU", r"linf eps in \[0, 400\] HU, got 'linf:500HU', and the pixels stand for -160 to 240 HU"),
    ],
)
def test_other_units_are_refused(text: str, unit: str, message: str) -> None:
    with pytest.raises(ThreatError, match=message):
        Threat.parse(text, unit=unit, span=(-160, 240))


# ---- rounding of budgets


@pytest.mark.parametrize(
    ("low", "high", "eps"),
    [
        (0.5, 0.7, 0.2),
        (0.1, 0.4, 0.3),
        (-0.3, -0.1, 0.2),
        (-1024.0, 3071.0, 4095.0),
        (0.0, 1e-3, 0.1 * 0.01),
        (0.2, 0.2 + 8 / 255, 8 / 255),
        (100.1, 100.2, 0.1),
    ],
)
def test_a_budget_may_be_as_wide_as_the_box(low, high, eps):
    """0.7 - 0.5 is less than 0.2 in floating point; any image of the box is then within the threat."""
    threat = Threat(norm="linf", eps=eps, low=low, high=high)
    x, z = torch.full((1, 1, 2, 2), low).double(), torch.full((1, 1, 2, 2), high).double()
    assert bool(threat.holds(x, z).all()) and bool(threat.holds(x, threat.project(x, z)).all())
    assert Threat.parse(f"linf:{eps!r}", low=low, high=high) == threat
    assert (
        Threat.parse("linf:300HU", low=low, high=high, unit="HU", span=(-100.0, 200.0)).budget <= (high - low) * 1.001
    )
    with pytest.raises(ThreatError, match="linf eps in"):
        Threat(norm="linf", eps=eps * 1.001, low=low, high=high)
