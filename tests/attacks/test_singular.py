"""Networks with roots, logarithms and quotients: gradients and answers that are no numbers, inside the threat.

The networks see two or three pixels, so that the worst case is found on a grid.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rempart.attacks import attack_batch, attacks
from rempart.attacks.losses import climb_direction, finite, lead, reached, score, surely_reached, undefined
from rempart.core.model import Classifier, metered
from rempart.core.threat import NORMS, Norm, Threat, unit, vector_norm

Reading = Callable[[Tensor], Tensor]
"""From pixels, shape (n, D), to the number whose sign is the class."""
INF, NAN = torch.inf, torch.nan


def spread(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)).square().mean(1).sqrt()


def saturation(x: Tensor) -> Tensor:
    return (x.amax(1) - x.amin(1)) / x.amax(1)


def hue(x: Tensor) -> Tensor:
    return torch.atan2(x[:, 0] - x[:, 1], x[:, 0] + x[:, 1] - 2 * x[:, -1]).cos()  # without a jump


SMOOTH: dict[str, tuple[int, float, Reading]] = {
    "root": (2, 0.0, lambda x: x[:, 0].sqrt() - x[:, 1].sqrt() + 0.2),
    "power": (2, 0.0, lambda x: 0.8 - (x**0.3).mean(1)),
    "logarithm": (2, 0.02, lambda x: (x[:, 0] + 1e-30).log() - x[:, 1].log() + 1),
    "distance": (2, 0.5, lambda x: (x - 0.5).square().sum(1).sqrt() - 0.15),
    "spread": (3, 0.4, lambda x: 0.1 - spread(x)),
    "standardised": (3, 0.4, lambda x: ((x - x.mean(1, keepdim=True)) / spread(x)[:, None])[:, 0] - 0.3),
    "saturation": (3, 0.0, lambda x: 0.3 - saturation(x)),
    "hue": (3, 0.4, lambda x: 0.5 - hue(x)),
}
"""Pixels, the grey that lies at the singularity, and what is read."""


class Signed(nn.Module):
    """Logits (0, s)."""

    def __init__(self, read: Reading) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x.flatten(1))[:, None]


def classifier(read: Reading, pixels: int, channels: int = 1) -> Classifier:
    return Classifier(Signed(read), shape=(channels, 1, pixels // channels), num_classes=2).eval()


def samples(name: str, n: int = 10) -> tuple[Classifier, Tensor, Tensor]:
    """Images near the singularity, some of them on it as far as the answer there is defined."""
    pixels, grey, read = SMOOTH[name]
    model = classifier(read, pixels)
    x = (grey + 0.25 * torch.rand((n, 1, 1, pixels), generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    x[:2] = grey
    with torch.no_grad():
        z = model(x)
    kept = z.isfinite().all(1)
    return model, x[kept], z.argmax(1)[kept]


def worst(name: str, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Largest margin against each label over a grid of the threat; infinite where an answer is undefined."""
    pixels, _, read = SMOOTH[name]
    steps = 161 if pixels == 2 else 41
    axis = torch.linspace(-1, 1, steps, dtype=torch.float64)
    cube = threat.budget * torch.cartesian_prod(*[axis] * pixels)
    found: list[Tensor] = []
    for image, label in zip(x.double().flatten(1), y.tolist(), strict=True):
        point = (image + cube).clamp(threat.low, threat.high)
        point = point[vector_norm(point - image, threat.norm) <= threat.budget]
        s = read(point)
        found.append((s if label == 0 else -s).nan_to_num(INF, INF).max())
    return torch.stack(found)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SMOOTH)
def test_the_default_suite_breaks_what_a_grid_breaks(name: str, norm: Norm) -> None:
    model, x, y = samples(name)
    before = len(x)
    for eps in (0.05, 0.15):
        threat, left = Threat(norm=norm, eps=eps), torch.ones(len(x), dtype=torch.bool)
        for attack, options in (("cascade", {}), ("square", {"queries": 300, "rescale": True})):
            left &= attack_batch(model, x, y, threat, attack, options).right
        margin = worst(name, x, y, threat)
        assert not bool((left & (margin > 1e-3)).any()), (name, eps, margin[left])
        assert int(left.sum()) <= before
        before = int(left.sum())


def options_of(name: str) -> dict[str, Any]:
    few = {
        "cw": {"steps": 40, "search_steps": 4, "initial_const": 1.0, "learning_rate": 0.1},
        "apgd-t": {"loss": "margin"},
    }
    few |= {"ead": {"steps": 40, "search_steps": 4, "initial_const": 1.0}, "hopskipjump": {"steps": 4}}
    return few.get(
        name,
        {"queries": 100} if name == "square" else {"steps": 20} if name not in ("fgsm", "cascade", "universal") else {},
    )


@pytest.mark.parametrize("name", [entry.name for entry in attacks])
def test_every_attack_goes_through_every_singularity(name: str) -> None:
    """No crash, and what is returned holds to the contract, also where the clean image has no gradient."""
    entry = attacks[name]
    for reading in ("root", "spread", "saturation"):
        model, x, y = samples(reading, 4)
        for norm in entry.traits.norms:
            threat = Threat(norm=norm, eps=0.15)
            found = attack_batch(model, x, y, threat, name, options_of(name))
            assert bool(found.distance.isfinite().all()), (reading, norm)
            if entry.traits.targeted:
                attack_batch(model, x, y, threat, name, options_of(name), target=lambda z, y: 1 - y)


# ---- answers that are not defined


def hole(x: Tensor) -> Tensor:
    """Class 1 everywhere, but no answer where the first pixel is below 0.1."""
    return torch.where(x[:, 0] < 0.1, torch.nan, x[:, 0] + 0.1)


def pole(x: Tensor) -> Tensor:
    """Class 1 everywhere; 0 / 0 where both pixels are 0, which is the minimum of a smooth function else."""
    return (x.square().sum(1) + 0 * x.sum(1)) / x.square().sum(1).sqrt() + 0.01


@pytest.mark.parametrize("name", ["fgsm", "bim", "mim", "pgd", "apgd", "cascade", "universal", "square", "hopskipjump"])
@pytest.mark.parametrize(("read", "nearest"), [(hole, 0.2), (pole, 0.3)])
def test_no_answer_within_the_threat_is_a_success(read: Reading, nearest: float, name: str) -> None:
    """The first pixel (pole: the larger one) is 0.3, so that a linf budget of 0.31 suffices and 0.15 does not."""
    if (name, read) == ("hopskipjump", pole):
        pytest.skip("a single point that no random search can meet")
    model, y = classifier(read, 2), torch.tensor([1])
    x = torch.tensor([[[[0.3, 0.25]]]])
    options = options_of(name)
    small, large = (attack_batch(model, x, y, Threat(norm="linf", eps=eps), name, options) for eps in (0.15, 0.31))
    assert small.right.tolist() == [True] and small.undefined.tolist() == [False]
    if read is hole or name not in ("mim", "square", "universal"):
        assert large.right.tolist() == [False] and large.undefined.tolist() == [True]
        assert large.predicted.tolist() == [-1] and large.margin.tolist() == [-INF]
        assert nearest - 1e-6 <= float(large.distance[0]) <= 0.31 + 1e-6


def test_no_answer_reaches_no_target() -> None:
    x, y = torch.tensor([[[[0.3, 0.25]]]]), torch.tensor([1])
    found = attack_batch(
        classifier(hole, 2), x, y, Threat(norm="linf", eps=0.31), "pgd", target=lambda z, y: torch.zeros_like(y)
    )
    assert found.success.tolist() == [False]


def test_which_logits_name_a_class() -> None:
    rows: list[tuple[list[float], int | None]] = [
        ([1.0, 2.0, 0.0], 1),
        ([1.0, INF, 0.0], 1),
        ([-INF, -INF, -3.0], 2),
        ([2.0, 2.0, 1.0], 0),
        ([INF, INF, 0.0], None),
        ([0.0, INF, INF], None),
        ([-INF, -INF, -INF], None),
        ([NAN, 1.0, 2.0], None),
        ([1.0, NAN, INF], None),
    ]
    z = torch.tensor([row for row, _ in rows])
    assert undefined(z).tolist() == [k is None for _, k in rows]
    for y in range(3):
        label = torch.full((len(rows),), y)
        assert reached(z, label, targeted=True).tolist() == [k == y for _, k in rows]
        assert reached(z, label, targeted=False).tolist() == [k != y for _, k in rows]
        assert surely_reached(z, label, targeted=False)[4:].tolist() == [True] * 5
        assert not lead(z, label).isnan().any()


# ---- directions


def test_a_direction_is_finite_pixel_by_pixel() -> None:
    x = torch.tensor([[0.0, 0.0, 0.5, 1.0, 0.5]]).view(1, 1, 1, 5).expand(3, -1, -1, -1)
    slope = torch.tensor([[INF, -INF, NAN, -INF, -3.0], [1.0, 2.0, -4.0, 0.0, 5.0], [NAN] * 5]).view_as(x)
    got = finite(slope, x, 0.0, 1.0).view(3, 5)
    assert got[0].tolist() == [3.0, 0.0, 0.0, -3.0, -3.0]
    assert got[1].tolist() == slope[1].flatten().tolist()
    assert bool((got[2] != 0).all()) and float(got[2, 0]) > 0 > float(got[2, 3])  # away from the walls
    assert torch.equal(finite(slope[1:2], x[:1], 0.0, 1.0), slope[1:2])


def test_a_sample_without_gradient_leaves_its_batch_mates_alone() -> None:
    model = classifier(SMOOTH["spread"][2], 3)
    x = torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.3, 0.7]]).view(2, 1, 1, 3)
    goal = score("margin", targeted=False, num_classes=2)
    with metered(model) as meter:
        both, _, _ = climb_direction(model, x, torch.tensor([1, 1]), goal)
        alone, _, _ = climb_direction(model, x[1:], torch.tensor([1]), goal)
    assert torch.equal(both[1:], alone) and bool(both.isfinite().all())
    assert (meter.gradients, int(meter.singular)) == (3, 1)


def test_the_unit_of_a_gradient_rounds_nothing() -> None:
    x = torch.tensor([[3e-41, 0.0], [1.5, -7.0], [0.0, 0.0], [-3.4e38, 1.0], [1e19, 1e19]])
    scale = unit(x)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    size = (x / scale).abs().amax(1)
    assert bool(((size >= 1) & (size < 2) | (x == 0).all(1)).all()) and scale[1:3, 0].tolist() == [4.0, 1.0]


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        generator, self.factor = torch.Generator().manual_seed(0), factor
        self.register_buffer("first", torch.randn((9, 24), generator=generator) / 2)
        self.register_buffer("last", torch.randn((24, 5), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.first).tanh() @ self.last * self.factor


@pytest.mark.parametrize("factor", [2.0**63, 2.0**-100])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("deepfool", "fab", "fab-t", "cascade", "square")),
        ("apgd-t", {"steps": 10, "targets": 2}),
        *((name, {"loss": "margin", "steps": 20}) for name in ("ddn", "fmn", "mim")),
        *((name, {"loss": "dlr", "steps": 20}) for name in ("pgd", "apgd")),
    ],
)
def test_the_scale_of_the_logits_changes_no_answer(name: str, options: dict[str, Any], factor: float) -> None:
    """Powers of two round nothing: the same decisions and gradients times the factor, hence the same images."""
    x = 0.1 + 0.8 * torch.rand((6, 1, 3, 3), generator=torch.Generator().manual_seed(1))
    plain, scaled = (Classifier(Scaled(f), shape=(1, 3, 3), num_classes=5) for f in (1.0, factor))
    y = plain(x).argmax(1)
    options = options | ({"queries": 50} if name == "square" else {"steps": 20} if "fab" in name else {})
    for norm in attacks[name].traits.norms:
        threat = Threat(norm=norm, eps={"linf": 0.1, "l2": 0.2, "l1": 0.5}[norm])
        first, second = (attack_batch(model, x, y, threat, name, options) for model in (plain, scaled))
        assert first.broken.tolist() == second.broken.tolist()
        torch.testing.assert_close(first.x_adv, second.x_adv, rtol=1e-5, atol=1e-5)
