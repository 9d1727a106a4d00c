"""DDN and FMN: nearly exact on affine models, projections checked against sorting, norms beside foolbox."""

from functools import partial

import pytest
import torch
from torch import Tensor

import toys
from rempart.attacks import ddn, fmn
from rempart.attacks.radius import _free, into_ball
from rempart.core.model import Classifier, metered
from rempart.core.threat import Threat, vector_norm

RUNS = [("ddn", "l2"), ("fmn", "linf"), ("fmn", "l2"), ("fmn", "l1")]
ATTACKS = {"ddn": ddn, "fmn": fmn}
both = pytest.mark.parametrize(("name", "norm"), RUNS)


def sizes(model: Classifier, x: Tensor, y: Tensor, z: Tensor, norm: str) -> Tensor:
    """Sizes of the perturbations, infinite where the class did not change."""
    with torch.no_grad():
        return torch.where(model(z).argmax(1) != y, Threat(norm=norm).distance(x, z), torch.inf)


@both
@pytest.mark.parametrize("seed", range(3))
def test_radius_of_an_affine_model(name, norm, seed):
    """|z_1 - z_0| / |w_1 - w_0|_dual, between 1 and 1.01 times that after 100 steps."""
    model, x = toys.linear((1, 4, 5), classes=2, seed=seed).double(), toys.images((1, 4, 5), 16, seed).double()
    y = toys.labels(model, x)
    z = ATTACKS[name](model, x, y, Threat(norm=norm))
    ratio = sizes(model, x, y, z, norm) / toys.radius(model, x, y, norm)
    assert bool((ratio >= 1 - 1e-9).all()) and bool((ratio <= 1.01).all()), ratio


@both
@pytest.mark.parametrize("low", [-3.0, 0.25])
def test_box_and_scale_change_nothing(name, norm, low):
    """In the box [low, low + 8] the same digits give the same perturbations, eight times as large."""
    model, x = toys.smooth((1, 4, 4)).double(), toys.images((1, 4, 4)).double() * 2 - 0.5
    y = toys.labels(model, x)
    attack = partial(ATTACKS[name], steps=30)
    small = attack(model, x, y, Threat(norm=norm)) - x
    scaled = attack(lambda v: model((v - low) / 8), x * 8 + low, y, Threat(norm=norm, low=low, high=low + 8))
    assert float((scaled - (x * 8 + low) - 8 * small).abs().max()) < 1e-6
    assert float(small.abs().max()) > 0.01


@both
@pytest.mark.parametrize("targeted", [False, True])
def test_the_smallest_success_seen_is_returned(name, norm, targeted, digits):
    """No image that passed through the model and did what was asked lies nearer than the one returned."""
    model, x, y = digits.model, digits.x[:12], digits.y[:12]
    goal = (y + 3) % 10 if targeted else y
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with metered(model) as meter:
        z = ATTACKS[name](model, x, goal, Threat(norm=norm), steps=40, targeted=targeted)
    handle.remove()
    assert (meter.queries, meter.gradients) == (41 * 12, 40 * 12)
    threat, nearest = Threat(norm=norm), torch.full((12,), torch.inf).double()
    with torch.no_grad():
        for point in seen:
            assert bool(threat.holds(x, point).all())
            ordered = model(point).sort(dim=1, descending=True)
            right = ordered.indices[:, 0] == goal
            clear = ordered.values[:, 0] - ordered.values[:, 1] > 1e-3  # success by more than rounding
            hit = (right if targeted else ~right) & clear
            nearest = torch.where(hit, torch.minimum(nearest, threat.distance(x, point)), nearest)
        right = model(z).argmax(1) == goal
    assert bool((right if targeted else ~right).all())
    assert bool((threat.distance(x, z) <= nearest * (1 + 1e-9)).all())


@both
def test_nothing_found_gives_the_point_of_best_margin(name, norm):
    """A single step cannot cross here: the target's lead is better than at the original, and the box holds."""
    model, x = toys.linear(classes=4).double(), toys.images((1, 4, 4)).double()
    y = (toys.labels(model, x) + 1) % 4
    before = model(x).gather(1, y[:, None])[:, 0] - model(x).amax(1)
    z = ATTACKS[name](model, x, y, Threat(norm=norm), steps=1, gamma=0.001, targeted=True)
    after = model(z).gather(1, y[:, None])[:, 0] - model(z).amax(1)
    assert bool((after > before).all())
    flat = toys.constant().double()
    assert torch.equal(ATTACKS[name](flat, x, torch.zeros_like(y), Threat(norm=norm), steps=3), x)


@pytest.mark.parametrize("length", [0.0, 0.3, 2.0, 100.0])
def test_projection_onto_the_ball(length):
    """Against the definition: linf by clamping, l2 by scaling, l1 by the threshold found by sorting."""
    change = torch.randn((20, 2, 5, 3), generator=torch.Generator().manual_seed(0)).double()
    change[0] = 0
    room = torch.full((20,), length).double() * torch.linspace(0.5, 1.5, 20)
    flat = change.flatten(1)
    ordered = flat.abs().sort(dim=1, descending=True).values
    ramp = (ordered.cumsum(1) - room[:, None]) / torch.arange(1, 31)
    threshold = ramp.amax(1, keepdim=True).clamp_min(0)
    expected = {
        "linf": torch.stack([row.clamp(-float(r), float(r)) for row, r in zip(flat, room, strict=True)]),
        "l2": torch.stack(
            [row * min(1, float(r / row.norm().clamp_min(1e-9))) for row, r in zip(flat, room, strict=True)]
        ),
        "l1": flat.sign() * (flat.abs() - threshold).clamp_min(0),
    }
    for norm, values in expected.items():
        got = into_ball(change, room, norm).flatten(1)  # type: ignore
        assert torch.allclose(got, values, atol=1e-12)
        assert bool((vector_norm(got, norm) <= room + 1e-9).all())  # type: ignore


def test_pixels_held_by_the_box_leave_the_gradient():
    point, slope = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]]), torch.tensor([[-1.0, 1.0, -1.0, -1.0, 1.0]])
    assert _free(slope, point, Threat(norm="l2")).tolist() == [[0, 1, -1, -1, 0]]


@both
@pytest.mark.parametrize("pale", [False, True])
def test_no_larger_norms_than_foolbox_at_equal_steps(name, norm, pale, digits):
    """Medians over all images, those it did not break counting as infinite; up to 0.2 % where both are on the floor."""
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    model, x, y = (digits.pale_model, digits.pale, digits.y) if pale else (digits.model, digits.x, digits.y)
    kinds = {
        "linf": foolbox.attacks.LInfFMNAttack,
        "l2": foolbox.attacks.L2FMNAttack,
        "l1": foolbox.attacks.L1FMNAttack,
    }
    kind = foolbox.attacks.DDNAttack if name == "ddn" else kinds[norm]
    wrapped = foolbox.PyTorchModel(model.float(), bounds=(0, 1), device="cpu")
    try:  # in float32, because foolbox mixes the two
        x = x.float()
        _, theirs, _ = kind(steps=100)(wrapped, x, y, epsilons=None)
        ours = ATTACKS[name](model, x, y, Threat(norm=norm), steps=100)
        mine, peer = sizes(model, x, y, ours, norm), sizes(model, x, y, theirs, norm)
    finally:
        model.double()
    assert not mine.isinf().any()
    assert float(mine.median()) <= float(peer.median()) * 1.002
    found = ~peer.isinf()
    assert float(mine[found].mean()) <= float(peer[found].mean()) * 1.002
