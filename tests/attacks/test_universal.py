"""One perturbation for all: its closed form on an affine model, and a trained network that it fools on new images."""

from typing import Any

import pytest
import torch

import toys
from rempart.attacks import attack_batch, fit_universal
from rempart.core.repro import Draws
from rempart.core.threat import Norm, Threat, vector_norm


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("batch", [3, 64])
def test_for_images_of_one_class_it_is_the_direction_to_the_other(norm: Norm, batch: int) -> None:
    """z_k - z_y grows by (w_k - w_y) v: at most at eps sign(w_k - w_y), or eps (w_k - w_y) / |w_k - w_y|."""
    model = toys.linear(classes=2).double()
    x = toys.images(model.shape, 30).double()
    y = toys.labels(model, x)
    x = x[y == 1]
    y = torch.ones(len(x), dtype=torch.int64)
    weight, _ = toys.affine(model)
    slope = (weight[0] - weight[1]).view(1, *model.shape)
    eps = 0.5 * float(toys.radius(model, x, y, norm).min())
    expected = eps * (slope.sign() if norm == "linf" else slope / slope.norm())
    v = fit_universal(model, x, y, Threat(norm=norm, eps=eps), batch=batch, step=eps / 3)
    assert len(x) > 8 and v.shape == expected.shape
    torch.testing.assert_close(v, expected, rtol=0, atol=eps * (1e-9 if norm == "linf" else 0.02))
    outcome = attack_batch(model, x, y, Threat(norm=norm, eps=eps), "universal", {"batch": batch, "step": eps / 3})
    torch.testing.assert_close(outcome.x_adv - x, v.expand_as(x), rtol=0, atol=eps * 0.05)  # other samples, other start
    aimed = fit_universal(model, x, y, Threat(norm=norm, eps=eps), batch=batch, step=eps / 3, targeted=True)
    torch.testing.assert_close(aimed, -expected, rtol=0, atol=eps * (1e-9 if norm == "linf" else 0.02))


def test_it_fools_a_trained_network_far_more_than_noise_and_on_images_it_never_saw(digits: Any) -> None:
    threat = Threat(norm="linf", eps=0.3)
    seen, new = slice(0, 24), slice(24, 48)
    v = fit_universal(digits.model, digits.x[seen], digits.y[seen], threat, batch=8)
    assert float(vector_norm(v.flatten(1), "linf")) <= 0.3 * (1 + 1e-9)

    def fooled(part: slice, change: torch.Tensor) -> float:
        z = digits.model((digits.x[part] + change).clamp(0, 1))
        return float((z.argmax(1) != digits.y[part]).double().mean())

    noise = [0.3 * Draws(seed, torch.zeros(1).long(), ("noise",)).sign(digits.x[:1]) for seed in range(10)]
    chance = max(fooled(slice(0, 48), n) for n in noise)
    assert fooled(seen, v) > chance + 0.25, (fooled(seen, v), chance)
    assert fooled(new, v) > chance + 0.25, (fooled(new, v), chance)


def test_more_epochs_of_the_same_steps_lose_nothing(digits: Any) -> None:
    """The best epoch is kept: what four epochs find, eight of the same steps do not give back."""
    threat = Threat(norm="l2", eps=1.2)
    rates = []
    for epochs in (1, 4, 8):
        v = fit_universal(digits.model, digits.x, digits.y, threat, epochs=epochs, batch=16, step=0.2)
        rates.append(int((digits.model((digits.x + v).clamp(0, 1)).argmax(1) != digits.y).sum()))
    assert rates == sorted(rates) and rates[0] < rates[-1], rates
