"""Logit pairing: written out, on the worst images of an affine model, and where its terms vanish."""

import numpy as np
import pytest
import torch

import toys
from objectives.written_out import RNG, SHAPE, affine, ce, check, check_extremes, costs, network, same
from rempart.objectives import alp, mixed, pgd_at


def formula(weight, clean):
    def value(z, z_adv, y):
        pairing = ((z - z_adv) ** 2).sum() / z.size
        return clean * ce(z, y).mean() + (1 - clean) * ce(z_adv, y).mean() + weight * pairing

    return value


@pytest.mark.parametrize(("weight", "clean"), [(0.5, 0.0), (2.0, 0.5)])
def test_the_formula(weight, clean):
    check(alp(weight=weight, clean=clean), formula(weight, clean))


def test_the_worst_images_of_an_affine_model():
    model, x, y, z, worst = affine(0.01)
    loss = alp(threat="linf:0.01", weight=3.0)(model, x, y, rng=RNG)
    np.testing.assert_allclose(loss.value.item(), formula(3.0, 0.0)(z, worst, y.numpy()), rtol=1e-4)


def test_without_pairing_it_is_adversarial_training():
    torch.manual_seed(0)
    plain_network = network(0.0)
    x, y = toys.images(SHAPE), torch.arange(8) % 3
    values = [o(plain_network, x, y, rng=RNG).value for o in (alp(weight=0, steps=2), pgd_at(steps=2))]
    torch.testing.assert_close(*values)
    half, other = costs(alp(weight=0, clean=0.5, steps=2), mixed(steps=2))
    for a, b in zip(half, other, strict=True):
        torch.testing.assert_close(a, b)


def test_without_a_budget_the_pairing_vanishes():
    torch.manual_seed(0)
    loss = alp(threat="linf:0")(network(0.0), toys.images(SHAPE), torch.arange(8) % 3, rng=RNG)
    assert loss.parts["pairing"].item() == 0
    assert not same((alp(weight=0, steps=2), alp(weight=1, steps=2)))


def test_confident_logits():
    check_extremes(alp())
