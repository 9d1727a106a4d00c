"""HopSkipJump: the closed-form radius, and its norms beside foolbox."""

import warnings

import pytest
import torch
from torch import Tensor

import toys
from rempart.attacks import attack_batch, hopskipjump
from rempart.core.threat import Norm, Threat

NORMS: tuple[Norm, ...] = ("l2", "linf")


@pytest.mark.parametrize("norm", NORMS)
def test_ends_near_the_radius_of_an_affine_model(norm: Norm) -> None:
    model = toys.linear(classes=2)
    x, y, radius = toys.equidistant(model, norm)
    outcome = attack_batch(model, x, y, Threat(norm=norm, eps=1.1 * radius), "hopskipjump", {"steps": 25})
    assert bool(outcome.success.all()), outcome.own_distance / radius
    assert outcome.gradients == 0


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_class_counts(norm: Norm) -> None:
    """The same images whatever the logits that give the class."""
    plain = toys.smooth()
    x = toys.images(plain.shape)
    y = toys.labels(plain, x)

    def classes(z: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(plain(z).argmax(1), 3).to(z.dtype)

    a, b = (hopskipjump(m, x, y, Threat(norm=norm), steps=3, initial_probes=20) for m in (plain, classes))  # type: ignore
    assert torch.equal(a, b)
    assert bool((plain(a).argmax(1) != y).all())


def test_where_there_is_no_other_class_the_original_comes_back() -> None:
    model, x = toys.constant(), toys.images((1, 4, 4))
    assert torch.equal(hopskipjump(model, x, torch.zeros(8, dtype=torch.long), Threat(norm="l2"), steps=2), x)


@pytest.mark.parametrize("norm", NORMS)
def test_no_larger_norms_than_foolbox(norm: Norm, digits) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foolbox = pytest.importorskip("foolbox")
    model, x, y = digits.model, digits.x[:16], digits.y[:16]
    ours = hopskipjump(model, x, y, Threat(norm=norm), steps=6)
    attack = foolbox.attacks.HopSkipJumpAttack(steps=6, constraint=norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, theirs, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None)
    assert bool((model(ours).argmax(1) != y).all())
    mine, peer = (float(Threat(norm=norm).distance(x, z).median()) for z in (ours, theirs))
    assert mine <= 1.05 * peer
