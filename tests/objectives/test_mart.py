"""MART: written out with its constants, and on the worst images of an affine model."""

import numpy as np

from objectives.written_out import RNG, affine, ce, check, check_extremes, kl, log_p
from rempart.objectives import mart


def formula(beta):
    def value(z, z_adv, y):
        p, p_adv, rows = np.exp(log_p(z)), np.exp(log_p(z_adv)), np.arange(len(y))
        own = p[rows, y]
        p_adv[rows, y] = -1
        boosted = ce(z_adv, y) - np.log(1.0001 - p_adv.max(1) + 1e-12)
        return boosted.mean() + beta * (kl(z, z_adv) * (1.0000001 - own)).mean()

    return value


def test_the_formula():
    check(mart(beta=5.0), formula(5.0))


def test_the_worst_images_of_an_affine_model():
    model, x, y, z, worst = affine(0.01)
    loss = mart(threat="linf:0.01", beta=6.0)(model, x, y, rng=RNG)
    np.testing.assert_allclose(loss.value.item(), formula(6.0)(z, worst, y.numpy()), rtol=1e-4)
    assert loss.parts["accuracy_adv"].item() == (worst.argmax(1) == y.numpy()).mean()


def test_confident_logits():
    check_extremes(mart())
