"""Noise of the right size, keyed by sample, cut by nothing."""

import torch

import toys
from rempart.core.repro import Draws
from rempart.objectives import gaussian, plain

SHAPE = (1, 16, 16)
RNG = Draws(3, torch.arange(200))
ORDINARY = {"progress": 0.0}


def noise(sigma, rng=RNG, x=None):
    x = torch.full((len(rng.index), *SHAPE), 0.9) if x is None else x
    return gaussian(sigma=sigma).craft(None, x, None, rng=rng, **ORDINARY) - x


def test_moments_are_those_of_the_normal_distribution_outside_the_box_too():
    """Over n = 51,200 pixels the first four moments of N(0, sigma^2) lie within five of their standard errors."""
    found, n = noise(0.25).double().flatten() / 0.25, 200 * 256
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(float(found.pow(power).mean()) - mean) < 5 * (variance / n) ** 0.5
    above = float((noise(0.25) + 0.9 > 1).double().mean())  # P(N > 0.4) = 0.3446
    assert abs(above - 0.3446) < 5 * (0.3446 * 0.6554 / n) ** 0.5


def test_noise_belongs_to_the_sample_and_to_the_epoch(untouched_rng):
    some = torch.tensor([7, 3])
    assert torch.equal(noise(0.25, RNG.select(some)), noise(0.25)[some])
    assert not torch.equal(noise(0.25, RNG.at("2")), noise(0.25))
    assert torch.allclose(noise(0.5), 2 * noise(0.25), atol=1e-6)


def test_no_noise_is_plain():
    model, x = toys.linear((1, 4, 4), 2), toys.images((1, 4, 4))
    y = torch.arange(8) % 2
    values = [objective(model, x, y, rng=Draws(0, torch.arange(8))).value for objective in (gaussian(sigma=0), plain())]
    torch.testing.assert_close(*values)
