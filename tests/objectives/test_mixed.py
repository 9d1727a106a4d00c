"""Half and half: written out, on the worst images of an affine model, and where a weight vanishes."""

import numpy as np
import pytest

from objectives.written_out import RNG, affine, ce, check, check_extremes, same
from rempart.objectives import mixed, pgd_at, plain


@pytest.mark.parametrize("weight", [0.3, 1.0, 4.0])
def test_the_formula(weight):
    check(
        mixed(weight=weight),
        lambda z, z_adv, y: (ce(z, y).mean() + weight * ce(z_adv, y).mean()) / (1 + weight),
    )


@pytest.mark.parametrize("steps", [1, 10])
def test_the_worst_images_of_an_affine_model(steps):
    """One step moves at most 2.5 eps from a start in the ball: it reaches the corner."""
    model, x, y, z, worst = affine(0.01)
    loss = mixed(threat="linf:0.01", steps=steps, weight=0.5)(model, x, y, rng=RNG)
    label = y.numpy()
    expected = (ce(z, label).mean() + 0.5 * ce(worst, label).mean()) / 1.5
    np.testing.assert_allclose(loss.value.item(), expected, rtol=1e-4)
    assert loss.parts["accuracy"].item() == 7 / 8
    assert loss.parts["accuracy_adv"].item() == (worst.argmax(1) == label).mean() < 7 / 8


def test_no_weight_is_ordinary_training_bit_by_bit():
    assert same((mixed(weight=0, steps=2), plain()))
    assert not same((mixed(steps=2), pgd_at(steps=2)))


def test_confident_logits():
    check_extremes(mixed())
