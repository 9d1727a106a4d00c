"""DeepFool: exact on affine models, and its cost beside other libraries."""

import math

import pytest
import torch
from torch import Tensor, nn

import toys
from rempart.attacks import deepfool
from rempart.core.model import metered
from rempart.core.threat import Threat

DUAL = {"l2": 2, "linf": 1}
LENGTH = {"l2": 2, "linf": math.inf}


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("classes", toys.CLASSES)
@pytest.mark.parametrize("overshoot", [0.0, 0.02, 0.5])
def test_one_step_crosses_the_boundary_of_an_affine_model(norm, classes, overshoot):
    """Distance (1 + overshoot) times the radius, to the class the radius belongs to, straight along w_k - w_y.

    Beside the radius there is the 1e-6 that carries a first step past the boundary.
    """
    model, x = toys.linear(classes=classes).double(), toys.images((1, 4, 4), 20).double()
    y = toys.labels(model, x)
    path: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: path.append(inputs[0]))
    z = deepfool(model, x, y, Threat(norm=norm), steps=1, overshoot=overshoot, candidates=classes, refine=0)
    handle.remove()
    assert len(path) == 3, "the candidates, one linearisation, one verdict"
    radii = toys.radii(model, x, y, norm)
    step = (z - x).flatten(1)
    length = torch.linalg.vector_norm(step, LENGTH[norm], dim=1)
    assert torch.allclose(length, (radii.amin(1) + 1e-6) * (1 + overshoot), rtol=1e-9, atol=0)
    weight, _ = toys.affine(model)
    nearest = radii.argmin(1)
    slope = weight[nearest] - weight[y]
    along = slope.sign() if norm == "linf" else slope / slope.norm(dim=1, keepdim=True)
    assert torch.allclose(step, along * length[:, None], atol=1e-12)
    assert torch.equal(model(z).argmax(1), nearest)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_only_candidates_are_considered(norm):
    """With two candidates the step goes to the runner-up's boundary, even where another class is nearer."""
    model, x = toys.linear(classes=9).double(), toys.images((1, 4, 4), 40).double()
    y = toys.labels(model, x)
    runner_up = model(x).topk(2, dim=1).indices[:, 1]
    z = deepfool(model, x, y, Threat(norm=norm), steps=1, overshoot=0.0, candidates=2, refine=0)
    radii = toys.radii(model, x, y, norm)
    expected = radii.gather(1, runner_up[:, None])[:, 0] + 1e-6
    length = torch.linalg.vector_norm((z - x).flatten(1), LENGTH[norm], dim=1)
    inside = (z > 0).flatten(1).all(1) & (z < 1).flatten(1).all(1)
    assert torch.allclose(length[inside], expected[inside], rtol=1e-9, atol=0)
    assert bool((radii.argmin(1) != runner_up)[inside].any())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_refinement_ends_on_the_boundary(norm):
    """Half-way search: an overshoot of half a radius shrinks to at most 2^-halvings of the whole way, still across."""
    model, x = toys.linear(classes=4).double(), toys.images((1, 4, 4), 20).double()
    y = toys.labels(model, x)
    radius = toys.radius(model, x, y, norm)
    before = torch.full_like(radius, math.inf)
    for halvings in (0, 2, 5, 9):
        z = deepfool(model, x, y, Threat(norm=norm), overshoot=0.5, candidates=4, refine=halvings)
        size = Threat(norm=norm).distance(x, z)
        assert bool((model(z).argmax(1) != y).all())
        assert bool((size <= radius * (1 + 1.5 * 2**-halvings) + 1e-5).all()) and bool((size >= radius).all())
        assert bool((size <= before).all())
        before = size


def test_a_flat_model_is_left_alone():
    model, x = toys.constant().double(), toys.images((1, 4, 4)).double()
    assert torch.equal(deepfool(model, x, torch.zeros(len(x), dtype=torch.long), Threat(norm="l2"), steps=3), x)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("pale", [False, True])
def test_costs_no_more_gradients_than_foolbox_and_finds_no_larger_norms(norm, pale, digits):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    model, x, y = (digits.pale_model, digits.pale, digits.y) if pale else (digits.model, digits.x, digits.y)
    attack = {"l2": foolbox.attacks.L2DeepFoolAttack, "linf": foolbox.attacks.LinfDeepFoolAttack}[norm](steps=50)
    with metered(model) as meter:
        ours, cost = deepfool(model, x, y, Threat(norm=norm)), meter.gradients
        _, theirs, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None)
        peer_cost = meter.gradients - cost
    assert cost <= peer_cost
    assert_no_larger(model, x, y, ours, theirs, norm)


def test_costs_no_more_gradients_than_torchattacks_and_finds_no_larger_norms(digits):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    model, x, y = digits.model, digits.x[:6], digits.y[:6]
    with metered(model) as meter:
        ours, cost = deepfool(model, x, y, Threat(norm="l2")), meter.gradients
        theirs = torchattacks.DeepFool(model, steps=50, overshoot=0.02)(x, y)
        peer_cost = meter.gradients - cost
    assert cost <= peer_cost
    assert_no_larger(model, x, y, ours, theirs, "l2")


def assert_no_larger(model: nn.Module, x: Tensor, y: Tensor, ours: Tensor, theirs: Tensor, norm: str) -> None:
    """Median and mean over what both find, up to 0.2 %: the paths differ in how far past the boundary they aim."""
    mine, peer = (
        torch.where(model(z).argmax(1) != y, Threat(norm=norm).distance(x, z), torch.inf) for z in (ours, theirs)
    )
    assert not mine.isinf().any()
    both = ~peer.isinf()
    assert float(mine[both].median()) <= float(peer[both].median()) * 1.002
    assert float(mine[both].mean()) <= float(peer[both].mean()) * 1.002
