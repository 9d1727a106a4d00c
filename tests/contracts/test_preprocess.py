"""What every preprocessing defence must do, and planted flaws that the checks must find.

Each `check_...(make, traits)` takes a factory of modules and what it says of itself. They know the contract in
`catalogue.py` and nothing of a method.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toys
from rempart.core.model import Classifier, accelerated, frozen
from rempart.preprocess import Traits, defended, preprocessors

Make = Callable[[], nn.Module]
SHAPES = ((1, 12, 12), (3, 12, 12), (1, 9, 14), (3, 17, 5), (4, 6, 7))
KNOWN = [pytest.param(entry.function, entry.traits, id=entry.name) for entry in preprocessors]


def pictures(shape: tuple[int, ...], n: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ramps with some noise, a part of the pixels black or white."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.linspace(-0.2, 1.1, shape[-1]).expand(n, *shape) + 0.03 * torch.randn(n, *shape, generator=generator)
    return x.clamp(0, 1).to(dtype)


def passed(module: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module(x)


# ---- the checks


def check_images_to_images(make: Make, traits: Traits) -> None:
    for shape in SHAPES:
        for n in (1, 4):
            for dtype in (torch.float32, torch.float64):
                x = pictures(shape, n, dtype)
                before = x.clone()
                y = passed(make(), x)
                assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device), "another kind of tensor"
                assert bool(y.isfinite().all()) and float(y.min()) >= 0 and float(y.max()) <= 1, "outside [0, 1]"
                assert torch.equal(x, before), "the images were written into"
        assert passed(make(), pictures(shape)[:0]).shape == (0, *shape), "no images"
    for level in (0.0, 1.0):
        y = passed(make(), torch.full((2, 1, 12, 12), level))
        assert bool(y.isfinite().all()) and float(y.min()) >= 0 and float(y.max()) <= 1, "flat images"


def check_it_does_something(make: Make, traits: Traits) -> None:
    x = pictures((3, 12, 12))
    assert float((passed(make(), x) - x).abs().max()) > 1e-3, "the images come back as they went in"


def check_images_do_not_depend_on_batch_mates(make: Make, traits: Traits) -> None:
    x = pictures((3, 12, 12))
    other = x.clone()
    other[1:] = 1 - x[1:].flip(0)
    first, second = passed(make(), x)[0], passed(make(), other)[0]
    assert torch.allclose(first, second, atol=1e-6), "batch mates matter"
    if not traits.random:
        alone = torch.cat([passed(make(), one) for one in x.split(1)])
        assert torch.allclose(passed(make(), x), alone, atol=1e-6), "the size of the batch matters"
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(passed(make(), last), passed(make(), x), atol=1e-6), "the order in memory matters"


def check_the_gradient_flows(make: Make, traits: Traits) -> None:
    for shape in SHAPES:
        x = pictures(shape).requires_grad_()
        y = passed(make(), x)
        (slope,) = torch.autograd.grad((y * torch.rand(y.shape, generator=torch.Generator().manual_seed(1))).sum(), x)
        assert bool(slope.isfinite().all()), "a gradient that is not finite"
        assert bool((slope.flatten(1) != 0).any(1).all()), "no gradient"
        assert torch.allclose(y.detach(), passed(make(), x.detach()), atol=1e-6), "with a graph the images are others"
        with torch.no_grad():
            assert torch.allclose(y.detach(), passed(make(), x), atol=1e-6), "without gradients the images are others"


def check_differentiable_means_what_it_says(make: Make, traits: Traits) -> None:
    """Along a random direction the gradient predicts the change; where it does not, the module must not claim so."""
    x = (0.1 * torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(5)) + 0.4).double()
    generator = torch.Generator().manual_seed(6)
    way, mix = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def value(t: Tensor) -> Tensor:
        return (passed(make(), t) * mix).sum()

    (slope,) = torch.autograd.grad(value(x.requires_grad_()), x)
    with torch.no_grad():
        steps = [float(value(x + h * way) - value(x - h * way)) / (2 * h) for h in (1e-7, 1e-6)]
    told = float((slope * way).sum())
    agrees = any(abs(step - told) <= 1e-3 * max(1.0, abs(told)) for step in steps)
    assert agrees == traits.differentiable, f"gradient {told}, differences {steps}"


def check_random_means_what_it_says(make: Make, traits: Traits) -> None:
    x, module = pictures((1, 12, 12)), make()
    same = torch.equal(passed(module, x, 1), passed(module, x, 2))
    assert same != traits.random, "random and said not to be, or the other way round"
    assert torch.equal(passed(module, x, 1), passed(module, x, 1)), "it does not follow torch's generator"
    if traits.random:
        one = x[:1].expand(4, -1, -1, -1)
        y = passed(module, one)
        assert not bool((y == y[:1]).all()), "all images of a batch get the same draw"
    else:
        torch.manual_seed(3)
        before = torch.get_rng_state()
        module(x)
        assert torch.equal(before, torch.get_rng_state()), "draws numbers for nothing"


def check_both_modes_agree(make: Make, traits: Traits) -> None:
    module, x = make(), pictures((3, 12, 12))
    assert torch.equal(passed(module.train(), x), passed(module.eval(), x)), "another result in training mode"
    assert not list(module.parameters()), "it has weights"


def check_a_copy_does_the_same(make: Make, traits: Traits) -> None:
    module, x = make(), pictures((3, 12, 12))
    assert torch.equal(passed(copy.deepcopy(module), x), passed(module, x))


CHECKS = [value for name, value in globals().items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("make", "traits"), KNOWN)
def test_contract(make: Make, traits: Traits, check: Callable[[Make, Traits], None]) -> None:
    check(make, traits)


# ---- in front of a classifier


@pytest.mark.parametrize("name", [entry.name for entry in preprocessors])
def test_inside_a_classifier_whose_box_is_not_0_to_1(name: str) -> None:
    bare = toys.conv((3, 12, 12))
    shifted = Classifier(nn.Sequential(_Unit(), bare.net), shape=bare.shape, num_classes=3, low=-1.0).eval()
    x = pictures((3, 12, 12))
    with torch.no_grad():
        in_unit = passed(defended(bare, [(name, {})]), x)
        in_box = passed(defended(shifted, [(name, {})]), 2 * x - 1)
    torch.testing.assert_close(in_unit, in_box, atol=2e-2 if name in ("jpeg", "bit-depth") else 1e-4, rtol=1e-3)
    model = defended(shifted, [(name, {})])
    assert (model.low, model.high) == (-1.0, 1.0) and not any(module.training for module in model.modules())
    with frozen(model):
        z = (2 * x - 1).requires_grad_()
        (slope,) = torch.autograd.grad(model(z)[:, 0].sum(), z)
    assert bool(slope.isfinite().all()) and bool((slope.flatten(1) != 0).any(1).all())


@pytest.mark.parametrize(("make", "traits"), KNOWN)
def test_the_copy_that_attacks_use_is_the_model(make: Make, traits: Traits, request: pytest.FixtureRequest) -> None:
    """Behind a defence that draws nothing the network is still made faster; a random one is attacked as it is."""
    name = request.node.callspec.id
    model = defended(toys.conv((3, 12, 12)), [(name, {})])
    x = pictures((3, 12, 12))
    with frozen(model):
        fast = accelerated(model, x)
        with torch.no_grad():
            torch.testing.assert_close(passed(fast, x), passed(model, x), atol=1e-4, rtol=1e-4)
    assert (fast is model) == traits.random


class _Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) / 2


# ---- planted flaws


class _Flawed(nn.Module):
    """Noise on the pixels (or none), with one flaw."""

    def __init__(self, flaw: str = "", sigma: float = 0.0) -> None:
        super().__init__()
        self.flaw, self.sigma = flaw, sigma
        if flaw == "weights":
            self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        draw = torch.zeros_like(x)
        if self.sigma > 0 or self.flaw == "draws for nothing":
            draw = torch.randn_like(x[:1] if self.flaw == "one draw for all" else x)
        if self.flaw == "its own generator":
            draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        y = (0.9 * x + self.sigma * draw + 0.02).clamp(0, 1)
        if self.flaw == "not cut":
            y = y + 0.1
        if self.flaw == "detached":
            y = y.detach() + 0 * x
        if self.flaw == "rounded":
            y = x + ((y * 7).round() / 7 - x).detach()
        if self.flaw == "batch mean":
            y = (y + y.mean(0, keepdim=True)) / 2
        if self.flaw == "other in training" and self.training:
            y = y * 0.5
        if self.flaw == "not finite":
            y = y + 0 * (x - x).sqrt()
        if self.flaw == "in place":
            with torch.no_grad():
                x.data.mul_(0.9)
        if self.flaw == "cropped":
            y = y[:, :, 1:, :]
        if self.flaw == "nothing":
            y = x
        if self.flaw == "other with a graph" and x.requires_grad:
            y = y * 0.99
        return y


FLAWS = [
    ("not cut", 0.0, check_images_to_images),
    ("in place", 0.0, check_images_to_images),
    ("cropped", 0.0, check_images_to_images),
    ("nothing", 0.0, check_it_does_something),
    ("batch mean", 0.0, check_images_do_not_depend_on_batch_mates),
    ("batch mean", 0.1, check_images_do_not_depend_on_batch_mates),
    ("detached", 0.0, check_the_gradient_flows),
    ("not finite", 0.0, check_the_gradient_flows),
    ("other with a graph", 0.0, check_the_gradient_flows),
    ("rounded", 0.0, check_differentiable_means_what_it_says),
    ("detached", 0.0, check_differentiable_means_what_it_says),
    ("draws for nothing", 0.0, check_random_means_what_it_says),
    ("one draw for all", 0.1, check_random_means_what_it_says),
    ("its own generator", 0.1, check_random_means_what_it_says),
    ("other in training", 0.0, check_both_modes_agree),
    ("weights", 0.0, check_both_modes_agree),
]


@pytest.mark.parametrize(("flaw", "sigma", "check"), FLAWS)
def test_planted_flaws_are_found(flaw: str, sigma: float, check: Callable[[Make, Traits], None]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check(lambda: _Flawed(flaw, sigma), Traits(differentiable=True, random=sigma > 0))


def test_a_false_trait_is_found() -> None:
    for sigma in (0.0, 0.1):
        with pytest.raises(AssertionError):
            traits = Traits(differentiable=True, random=sigma == 0)
            check_random_means_what_it_says(lambda sigma=sigma: _Flawed("", sigma), traits)
    with pytest.raises(AssertionError):
        check_differentiable_means_what_it_says(_Flawed, Traits(differentiable=False, random=False))


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_twin_without_a_flaw_passes(check: Callable[[Make, Traits], None], sigma: float) -> None:
    check(lambda: _Flawed("", sigma), Traits(differentiable=True, random=sigma > 0))
