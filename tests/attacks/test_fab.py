"""FAB: the projection against linear programmes and bisection, exact on affine models, no larger norms than peers."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import toys
from rempart.attacks import attack_batch, fab, fab_targeted
from rempart.attacks.fab import project_on_plane
from rempart.core.model import Classifier, metered
from rempart.core.threat import Norm, Threat

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
ATTACKS = [fab, fab_targeted]


def shortest(x: np.ndarray, w: np.ndarray, gap: float, norm: Norm, low: float = 0.0, high: float = 1.0) -> float:
    """Length of the shortest move m with gap + w . m = 0 that stays in the box; None has no such move: infinity.

    Linear programmes over (m, bound) and (m+, m-), and for l2 200 bisections on the multiplier.
    """
    d = len(x)
    if norm == "l2":
        sign = -np.sign(gap)

        def move(t: float) -> np.ndarray:
            return np.clip(x + t * sign * w, low, high) - x

        near, far = 0.0, 1e6
        if abs(w @ move(far)) < abs(gap):
            return math.inf
        for _ in range(200):
            middle = (near + far) / 2
            near, far = (middle, far) if abs(w @ move(middle)) < abs(gap) else (near, middle)
        return float(np.linalg.norm(move(far)))
    if norm == "linf":
        eye, one = np.eye(d), np.ones((d, 1))
        bounds = [(low - v, high - v) for v in x] + [(0, None)]
        found = linprog(
            [0.0] * d + [1.0],
            A_ub=np.block([[eye, -one], [-eye, -one]]),
            b_ub=np.zeros(2 * d),
            A_eq=np.append(w, 0.0)[None],
            b_eq=[-gap],
            bounds=bounds,
        )
    else:
        bounds = [(0, high - v) for v in x] + [(0, v - low) for v in x]
        found = linprog([1.0] * (2 * d), A_eq=np.append(w, -w)[None], b_eq=[-gap], bounds=bounds)
    return float(found.fun) if found.status == 0 else math.inf


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-1.0, 2.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_is_the_shortest_move_in_the_box(norm, box, dtype):
    """Pixels on the walls, zero slopes, near and far hyperplanes on both sides, and some out of reach."""
    generator = torch.Generator().manual_seed(1)
    n, d = 60, 9
    x = torch.rand((n, d), generator=generator, dtype=torch.float64)
    x = torch.where(x < 0.3, 0.0, torch.where(x > 0.7, 1.0, x)) * (box[1] - box[0]) + box[0]
    w = torch.randn((n, d), generator=generator, dtype=torch.float64)
    w = torch.where(w.abs() < 0.3, 0.0, w)
    w = w / w.abs().amax(1, keepdim=True)
    gap = (
        torch.randn((n, 1), generator=generator, dtype=torch.float64)
        * torch.tensor([0.1, 0.7, 3.0]).repeat(20)[:, None]
    )
    x, w, gap = x.to(dtype), w.to(dtype), gap.to(dtype)
    move = project_on_plane(x, w, gap, Threat(norm=norm, low=box[0], high=box[1]))
    x, w, gap, move = x.double(), w.double(), gap.double(), move.double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert float((x + move).min()) >= box[0] - tolerance and float((x + move).max()) <= box[1] + tolerance
    length = torch.linalg.vector_norm(move, {"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)
    exact = [shortest(x[i].numpy(), w[i].numpy(), float(gap[i]), norm, *box) for i in range(n)]
    exact = torch.tensor(exact, dtype=torch.float64)
    reached = exact.isfinite()
    assert 0 < int((~reached).sum()) < n / 2, "the test needs hyperplanes out of reach"
    assert torch.allclose(length[reached], exact[reached], rtol=tolerance, atol=tolerance)
    left = (gap[:, 0] + (w * move).sum(1)).abs()
    assert float(left[reached].max()) < tolerance
    corner = torch.where(w * gap > 0, box[0], box[1])
    furthest = torch.where(w == 0, x, corner) - x
    assert torch.allclose(move[~reached], furthest[~reached], atol=tolerance), "out of reach: as far as the box goes"


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_exact_over_many_pixels(norm):
    """More pixels than the l1 form looks at first; tiny slopes; nothing to do; and no slope at all."""
    generator = torch.Generator().manual_seed(2)
    x, w = (torch.rand((6, 800), generator=generator, dtype=torch.float64) for _ in range(2))
    w = w - 0.5
    w[4] *= torch.logspace(0, -300, 800, dtype=torch.float64)
    w = w / w.abs().amax(1, keepdim=True)
    w[5] = 0
    gap = torch.tensor([3.0, -40.0, 90.0, 0.0, 0.05, 1.0], dtype=torch.float64)[:, None]
    move = project_on_plane(x, w, gap, Threat(norm=norm))
    assert float((gap[:5] + (w * move).sum(1, keepdim=True)[:5]).abs().max()) < 1e-9
    assert not bool(move[3].any()) and not bool(move[5].any())
    length = torch.linalg.vector_norm(move, {"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)
    for i in range(3):
        exact = shortest(x[i].numpy(), w[i].numpy(), float(gap[i]), norm)
        assert float(length[i]) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_affine_models_fall_at_their_radius(attack, norm, classes):
    model = toys.linear(classes=classes).double()
    x = toys.images(model.shape, 12).double()
    y = toys.labels(model, x)
    z = attack(model, x, y, Threat(norm=norm), steps=20)
    share = Threat(norm=norm).distance(x, z) / toys.radius(model, x, y, norm)
    assert bool((model(z).argmax(1) != y).all())
    assert float(share.min()) >= 1 - 1e-6 and float(share.max()) <= 1.001, share


@pytest.mark.parametrize("norm", NORMS)
def test_affine_model_with_the_box_in_the_way(norm):
    """Half of the pixels at the walls, a boundary far off: the exact answer is a linear (quadratic) programme."""
    model = toys.linear((1, 3, 4), classes=2).double()
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand((40, 1, 3, 4), generator=generator).double() * 3 - 1).clamp(0, 1)
    y = toys.labels(model, x)
    weight, _ = toys.affine(model)
    w = (weight[1 - y] - weight[y]).numpy()
    logits = model(x).detach()
    gap = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    exact = torch.tensor([shortest(x[i].flatten().numpy(), w[i], float(gap[i]), norm) for i in range(40)])
    free = gap.abs() / torch.tensor(np.linalg.norm(w, {"linf": 1, "l2": 2, "l1": np.inf}[norm], axis=1))
    can = exact.isfinite()
    assert int((exact > 1.05 * free)[can].sum()) >= 3, "the walls must matter"
    for attack, options in ((fab, {}), (fab_targeted, {}), (fab, {"targeted": True})):
        z = attack(model, x, 1 - y if options else y, Threat(norm=norm), steps=40, **options)
        assert torch.equal(model(z).argmax(1) != y, can)
        share = (Threat(norm=norm).distance(x, z) / exact)[can]
        assert float(share.min()) >= 1 - 1e-6 and float(share.max()) <= 1.005, share


@pytest.mark.parametrize("norm", NORMS)
def test_one_forward_and_one_backward_pass_per_step(norm):
    model = toys.smooth(classes=4)
    x = toys.images(model.shape, 5)
    y = toys.labels(model, x)
    for attack, runs, passes, ahead in ((fab, 2, 3, 0), (fab_targeted, 6, 1, 1)):
        with metered(model) as meter:
            attack(model, x, y, Threat(norm=norm), steps=7, restarts=2, refine=0)
        assert meter.queries == 5 * (runs * 8 + ahead)
        assert meter.gradients == 5 * runs * 7 * passes


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["fab", "fab-t"])
def test_within_stops_early_and_breaks_the_same_samples(norm, name, digits):
    """The samples that fall within a budget are those whose smallest perturbation, searched to the end, is in it."""
    eps = {"linf": 0.09, "l2": 0.45, "l1": 1.7}[norm]
    threat = Threat(norm=norm, eps=eps)
    options = {"steps": 15, **({"targets": 3} if name == "fab-t" else {})}
    full = attack_batch(digits.model, digits.x, digits.y, threat, name, options)
    early = attack_batch(digits.model, digits.x, digits.y, threat, name, {**options, "within": eps})
    assert 0.2 < float(full.success.double().mean()) < 0.9, "the test needs broken and unbroken samples"
    assert torch.equal(full.success, early.success)
    assert torch.equal(full.distance <= eps, early.success)
    assert torch.allclose(full.x_adv[~early.success], early.x_adv[~early.success], atol=1e-8)
    assert early.queries < 0.8 * full.queries and early.gradients < 0.8 * full.gradients


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_no_larger_than_those_of_foolbox(norm, digits):
    """Medians beside FMN, with ten times the steps, and DeepFool; l1 lives on the walls, where FAB could stall."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
        peers = {
            "linf": [foolbox.attacks.LInfFMNAttack(steps=300), foolbox.attacks.LinfDeepFoolAttack()],
            "l2": [foolbox.attacks.L2FMNAttack(steps=300), foolbox.attacks.L2DeepFoolAttack()],
            "l1": [foolbox.attacks.L1FMNAttack(steps=300)],
        }[norm]
        peer = foolbox.PyTorchModel(digits.model, bounds=(0, 1), device="cpu")
        theirs = [attack(peer, digits.x, digits.y, epsilons=None)[1] for attack in peers]
    sizes = [median(digits.model, digits.x, digits.y, z, norm) for z in theirs]
    for attack in ATTACKS:
        ours = attack(digits.model, digits.x, digits.y, Threat(norm=norm), steps=30)
        size = median(digits.model, digits.x, digits.y, ours, norm)
        assert size <= min(sizes) * 1.005, (attack.__name__, size, sizes)


@pytest.mark.parametrize("norm", NORMS)
def test_aims_at_a_class(norm, digits):
    """The class asked for is reached, further away than the nearest one."""
    x, y = digits.x[:16], digits.y[:16]
    aim, threat = (y + 1) % 10, Threat(norm=norm)
    z = fab(digits.model, x, aim, threat, steps=40, targeted=True)
    hit = digits.model(z).argmax(1) == aim
    assert int(hit.sum()) >= 15
    nearest = threat.distance(x, fab(digits.model, x, y, threat, steps=40))
    aimed = threat.distance(x, z)
    assert float(nearest.median()) < float(aimed[hit].median()) < 6 * float(nearest.median())


def test_restarts_never_lose_and_keep_to_the_bound(digits):
    """Later starts lie at half of what was found, or half of `within`; the nearest point of all starts is returned."""
    seen: list[Tensor] = []
    threat, x, y = Threat(norm="linf"), digits.x[:8], digits.y[:8]
    once, thrice = (fab(digits.model, x, y, threat, steps=10, restarts=r, refine=0) for r in (1, 3))
    assert bool((threat.distance(x, thrice) <= threat.distance(x, once)).all())
    handle = digits.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    fab(digits.model, x, y, threat, steps=2, restarts=2, refine=0, within=1e-3)
    handle.remove()
    start = threat.distance(x, seen[3])
    assert bool((start <= 0.5e-3 + 1e-9).all()) and float(start.min()) > 0.4e-3


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm", NORMS)
def test_flat_models_and_empty_batches_are_left_alone(attack, norm):
    model, x = toys.constant(), toys.images((1, 4, 4))
    y = torch.zeros(len(x), dtype=torch.long)
    assert torch.equal(attack(model, x, y, Threat(norm=norm), steps=3, restarts=2), x)
    assert attack(model, x[:0], y[:0], Threat(norm=norm), steps=3).shape == (0, 1, 4, 4)


def median(model: nn.Module | Classifier, x: Tensor, y: Tensor, z: Tensor, norm: Norm) -> float:
    found = model(z).argmax(1) != y
    return float(torch.where(found, Threat(norm=norm).distance(x, z), torch.inf).median())
