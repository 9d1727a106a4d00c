"""What every detector must do, and planted flaws that the checks must find.

Each `check_...(make)` takes a factory of detectors and the row of `CASES` it is checked by. They know the contract in
`catalogue.py`, nothing else.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import toys
from contracts.test_objectives import _mixed, _unchanged
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.detectors import Detector, Learning, State, detectors


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How the suite meets one detector.

    Attributes:
        options: Given wherever it is made.
        planted: Which images it must find suspicious: those `far` from what it was fitted on, or those at the
            `boundary` between two classes.
        axes: Numbers of spatial axes it takes.
    """

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    planted: Literal["far", "boundary"] = "far"
    axes: tuple[int, ...] = (1, 2, 3)


CASES: dict[str, Case] = {
    "max-softmax": Case(planted="boundary"),
    "margin": Case(planted="boundary"),
    "energy": Case(planted="boundary"),
    "noise": Case(planted="boundary", options={"passes": 4}),
    "squeezing": Case(planted="boundary", options={"search": 3}),
    "mahalanobis": Case(options={"nu": 0.001}),
    "lid": Case(options={"k": 5, "references": 30}),
    "kernel-density": Case(options={"passes": 3}),
    "knn": Case(options={"k": 3}),
    "lof": Case(options={"k": 5}),
    "isolation-forest": Case(options={"trees": 20}),
    "magnet": Case(options={"width": 2, "epochs": 3}),
    "binary": Case(options={"epochs": 60}),
    "attack-type": Case(options={"epochs": 60}),
}
FROM_ATTACKS = {
    name: replace(CASES[name], options={**CASES[name].options, "combine": "logistic"})
    for name in CASES
    if "combine" in detectors[name].params.model_fields
}


@dataclass(frozen=True, slots=True)
class Make:
    """A factory of detectors with the case it is checked by."""

    factory: Callable[..., Detector]
    case: Case = Case()

    def __call__(self) -> Detector:
        return self.factory(**self.case.options)


# ---- models and images


def with_dropout() -> Classifier:
    """A small network of convolutions with dropout of maps and of neurons, in inference mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(8, 3),
        )  # fmt: skip
    return Classifier(net, shape=(1, 4, 4), num_classes=3).eval()


def learning(model: Classifier, n: int = 60, seed: int = 0) -> Learning:
    """Images of all classes, with noisy ones and with two attacks that broke every second and every third."""
    x = toys.images(model.shape, n, seed).to(next(model.parameters()).dtype)
    x = x * (model.high - model.low) + model.low
    moved = toys.images(model.shape, n, seed + 1).to(x) - 0.5
    second, third = torch.arange(0, n, 2), torch.arange(0, n, 3)
    attacked = {"one": (second, x[second] + 3 * moved[second]), "two": (third, x[third] - 3 * moved[third])}
    return Learning(x=x, y=torch.arange(n) % model.num_classes, index=torch.arange(n) * 7 % (7 * n + 1),
                    noisy=x + 0.1 * moved, attacked=attacked)  # fmt: skip


def queries(model: Classifier, n: int = 6) -> tuple[Tensor, Draws]:
    """Images the detector has not seen, one of them black, and draws out of order."""
    x = toys.images(model.shape, n, 5).to(next(model.parameters()).dtype)
    x[2] = 0.0
    return x * (model.high - model.low) + model.low, Draws(3, torch.arange(n) * 5 % 11 + 1000)


def fitted(detector: Detector, model: Classifier, **changes: Any) -> State:
    found = replace(learning(model), **changes)
    with frozen(model):
        return detector.fit(model, found, rng=Draws(3, found.index))


def scores(detector: Detector, model: Classifier, x: Tensor, state: State, rng: Draws) -> Tensor:
    with frozen(model):
        return detector.score(model, x, state, rng=rng)


def auroc(negative: Tensor, positive: Tensor) -> float:
    difference = positive[:, None] - negative
    return float(((difference > 0).double() + 0.5 * (difference == 0)).mean())


# ---- the checks


def check_scores_are_finite_numbers(make: Make) -> None:
    """For every shape, two classes, one logit, another box, dropout, one image."""
    models = [toys.conv((1, 4, 4)), toys.linear((3, 5, 2), 2), toys.one_logit((1, 3, 6)), with_dropout()]
    models += [toys.conv(shape) for shape in ((1, 3, 4, 5), (2, 7)) if len(shape) - 1 in make.case.axes]
    wide = toys.smooth((3, 4, 4))
    models.append(Classifier(wide.net, shape=wide.shape, num_classes=3, low=-1.0, high=3.0).eval())
    for model in models:
        detector = make()
        state = fitted(detector, model)
        for n in (1, 6):
            x, rng = queries(model, 6)
            found = scores(detector, model, x[:n], state, rng.select(torch.arange(n)))
            assert found.shape == (n,) and found.is_floating_point(), "not one number per image"
            assert bool(found.isfinite().all()), "a score is not finite"
        if detector.name is not None:
            with frozen(model):
                chances = detector.name(model, x, state, rng=rng)
            assert chances.shape == (len(x), 3), "not clean and both attacks"
            assert bool((chances >= 0).all())
            torch.testing.assert_close(chances.sum(1), torch.ones_like(chances[:, 0]))


def check_batch_mates_do_not_matter(make: Make) -> None:
    for model in (toys.conv().double(), with_dropout().double()):
        detector = make()
        state = fitted(detector, model)
        x, rng = queries(model)
        whole = scores(detector, model, x, state, rng)
        order = torch.tensor([4, 0, 5, 2, 1, 3])
        again = scores(detector, model, x[order], state, rng.select(order))
        torch.testing.assert_close(again, whole[order], rtol=1e-7, atol=1e-9)
        alone = torch.cat([scores(detector, model, x[[i]], state, rng.select(torch.tensor([i]))) for i in range(6)])
        torch.testing.assert_close(alone, whole, rtol=1e-7, atol=1e-9)


def check_same_seed_same_result(make: Make) -> None:
    runs: list[list[Tensor]] = []
    for seed in range(2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        model, detector = with_dropout(), make()
        state = fitted(detector, model)
        x, rng = queries(model)
        runs.append([*(state[key] for key in sorted(state)), scores(detector, model, x, state, rng)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "the same seed gave something else"


def check_the_global_random_state_is_left_alone(make: Make) -> None:
    model, detector = with_dropout(), make()
    x, rng = queries(model)
    torch.manual_seed(0)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    scores(detector, model, x, fitted(detector, model), rng)
    assert torch.equal(torch.get_rng_state(), before[0]), "the global random state of torch was touched"
    assert (str(np.random.get_state()), random.getstate()) == before[1:], "a global random state was touched"


def check_the_model_and_the_images_are_left_alone(make: Make) -> None:
    """Modes, requires_grad, .grad, hooks, weights and buffers, once those are back which the caller sets."""
    for model in (toys.conv(), with_dropout()):
        detector, known = make(), learning(_mixed(model))
        x, rng = queries(model)
        kept = x.clone(), known.x.clone(), known.y.clone(), *(images.clone() for _, images in known.attacked.values())
        with _unchanged(model), frozen(model):
            with _unchanged(model):
                state = detector.fit(model, known, rng=Draws(3, known.index))
            learnt = {key: tensor.clone() for key, tensor in state.items()}
            with _unchanged(model):
                detector.score(model, x, state, rng=rng)
        now = x, known.x, known.y, *(images for _, images in known.attacked.values())
        assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)), "images or labels were written into"
        assert all(torch.equal(learnt[key], state[key]) for key in learnt), "scoring changed what was learnt"


def check_the_gradient_is_as_declared(make: Make) -> None:
    """Finite, and not 0 everywhere, where there is one; scores do not depend on whether it is asked for."""
    for model in (toys.smooth((1, 4, 4)).double(), toys.smooth((3, 4, 4), 2).double()):
        detector = make()
        state = fitted(detector, model)
        x, rng = queries(model)
        found = scores(detector, model, x.clone().requires_grad_(), state, rng)
        with torch.no_grad():
            torch.testing.assert_close(scores(detector, model, x, state, rng), found.detach())
        if not detector.differentiable:
            assert not found.requires_grad, "a gradient that was not declared"
            continue
        assert found.requires_grad, "no graph from the images to the scores"
        start = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(scores(detector, model, start, state, rng).sum(), start)
        assert bool(slope.isfinite().all()), "a gradient is not finite"
        assert float((slope.flatten(1).abs().amax(1) > 0).double().mean()) > 0.5, "no gradient"


def check_the_state_is_all_there_is(make: Make) -> None:
    model, first = with_dropout(), make()
    state = fitted(first, model)
    assert all(isinstance(tensor, Tensor) and not tensor.requires_grad for tensor in state.values()), "not tensors"
    x, rng = queries(model)
    expected = scores(first, model, x, state, rng)
    again = load(save({key: tensor.clone().contiguous() for key, tensor in state.items()}))
    assert torch.equal(scores(make(), model, x, again, rng), expected), "the state does not hold all that was learnt"


class Forbidden(Mapping[str, Any]):
    """Attacks that nobody may look at."""

    def __getitem__(self, key: str) -> Any:
        raise AssertionError("looked at the attacks")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("looked at the attacks")

    def __len__(self) -> int:
        raise AssertionError("looked at the attacks")


def check_attacks_are_looked_at_only_if_declared(make: Make) -> None:
    model, detector = toys.conv(), make()
    if not detector.learns_attacks:
        fitted(detector, model, attacked=Forbidden())
        return
    x, rng = queries(model)
    other = {name: (at, images.flip(0)) for name, (at, images) in learning(model).attacked.items()}
    first, second = (scores(detector, model, x, fitted(detector, model, **more), rng) for more in ({},
                     {"attacked": other}))  # fmt: skip
    assert not torch.equal(first, second), "the attacks do not matter"


def check_randomness_is_as_declared(make: Make) -> None:
    model, detector = with_dropout(), make()
    state = fitted(detector, model)
    x, rng = queries(model)
    first, second = (scores(detector, model, x, state, replace(rng, seed=seed)) for seed in (3, 4))
    assert torch.equal(first, second) == (not detector.random), "random, or not, against what it declares"


def check_larger_is_more_suspicious(make: Make) -> None:
    """Images of one colour each: squeezing and noise leave them what they are, but for those between two classes."""
    model, detector = toys.rescaled(toys.linear((3, 4, 4), 3), 10.0), make()
    known = learning(model)
    if make.case.planted == "far":
        clean = toys.images(model.shape, 24, 9)
        odd = torch.rand((24, *model.shape), generator=torch.Generator().manual_seed(0))
        attacked = {"one": (torch.arange(60), known.x.flip(2) + odd.repeat(3, 1, 1, 1)[:60] - 0.5)}
    else:
        x = torch.rand((240, 3, 1, 1), generator=torch.Generator().manual_seed(0)).expand(-1, -1, 4, 4)
        top = model(x).detach().topk(2, dim=1).values
        order = (top[:, 0] - top[:, 1]).argsort()
        odd, clean, attacked = x[order[:24]], x[order[-24:]], known.attacked
    state = fitted(detector, model, attacked=attacked if detector.learns_attacks else {})
    numbers = Draws(3, torch.arange(48))
    first, second = (
        scores(detector, model, x, state, numbers.select(at))
        for x, at in ((clean, torch.arange(24)), (odd, torch.arange(24, 48)))
    )
    assert auroc(first, second) > 0.9, f"AUROC {auroc(first, second):.2f} on the planted images"


CHECKS: tuple[Callable[[Make], None], ...] = tuple(
    value for name, value in list(globals().items()) if name.startswith("check_")
)


# ---- every detector

ALL = {entry.name: Make(entry.function, CASES.get(entry.name, Case())) for entry in detectors}
ALL |= {f"{name} from attacks": Make(detectors[name].function, case) for name, case in FROM_ATTACKS.items()}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", ALL)
def test_contract(name: str, check: Callable[[Make], None]) -> None:
    check(ALL[name])


# ---- planted flaws


def flawed(flaw: str = "") -> Callable[..., Detector]:
    """Squared distance of the logits to their mean, under noise drawn per sample, and one flaw planted or none."""

    def factory() -> Detector:
        hidden: list[Tensor] = []

        def fit(model: Classifier, learning: Learning, *, rng: Draws) -> Any:
            if flaw == "looks at the attacks":
                list(learning.attacked)
            if flaw == "a hook left":
                model.register_forward_hook(lambda *_: None)
            if flaw == "left in training mode":
                model.train()
            if flaw == "fitted by chance":
                return {"mean": model(learning.x).mean(0) + 1e-3 * torch.rand(model.num_classes)}
            if flaw == "fitted in NumPy by chance":
                return {"mean": model(learning.x).mean(0) + 1e-3 * float(np.random.rand())}
            hidden.append(model(learning.x).mean(0))
            return {"mean": hidden[0].tolist() if flaw == "a list" else 0 * hidden[0] if flaw == "hidden state"
                    else hidden[0]}  # fmt: skip

        def score(model: Classifier, x: Tensor, state: State, *, rng: Draws) -> Tensor:
            if flaw == "writes into the images":
                x.clamp_(0.3)
            if flaw == "draws by position":
                rng = replace(rng, index=torch.arange(len(x)))
            given = x + 1e-3 * (torch.rand_like(x) if flaw == "unseeded" else rng.normal(x))
            mean = hidden[0] if flaw == "hidden state" and hidden else torch.as_tensor(state["mean"])
            found = (model(given) - mean).square().sum(1)
            if flaw == "counts the batch":
                found = found - found.mean()
            if flaw == "one score for all":
                found = found.mean()
            if flaw == "not finite":
                found = (found - found).log()
            if flaw == "no graph":
                found = found.detach()
            if flaw == "a gradient without end":
                found = found + (found - found.detach()).abs().sqrt()
            if flaw == "flat":
                found = found.detach() + 0 * found
            if flaw == "learns while it scores":
                state["mean"] += 1e-3
            return -found if flaw == "the other way round" else found

        return Detector(
            fit=fit, score=score, random=flaw != "randomness not declared",
            differentiable=flaw != "a gradient not declared", learns_attacks=flaw == "needs no attacks",
        )  # fmt: skip

    return factory


FLAWS: list[tuple[str, Callable[[Make], None]]] = [
    ("not finite", check_scores_are_finite_numbers),
    ("one score for all", check_scores_are_finite_numbers),
    ("counts the batch", check_batch_mates_do_not_matter),
    ("draws by position", check_batch_mates_do_not_matter),
    ("unseeded", check_same_seed_same_result),
    ("fitted by chance", check_same_seed_same_result),
    ("unseeded", check_the_global_random_state_is_left_alone),
    ("fitted in NumPy by chance", check_the_global_random_state_is_left_alone),
    ("a hook left", check_the_model_and_the_images_are_left_alone),
    ("left in training mode", check_the_model_and_the_images_are_left_alone),
    ("writes into the images", check_the_model_and_the_images_are_left_alone),
    ("learns while it scores", check_the_model_and_the_images_are_left_alone),
    ("no graph", check_the_gradient_is_as_declared),
    ("flat", check_the_gradient_is_as_declared),
    ("a gradient without end", check_the_gradient_is_as_declared),
    ("a gradient not declared", check_the_gradient_is_as_declared),
    ("hidden state", check_the_state_is_all_there_is),
    ("a list", check_the_state_is_all_there_is),
    ("looks at the attacks", check_attacks_are_looked_at_only_if_declared),
    ("needs no attacks", check_attacks_are_looked_at_only_if_declared),
    ("randomness not declared", check_randomness_is_as_declared),
    ("the other way round", check_larger_is_more_suspicious),
]


@pytest.mark.parametrize(("flaw", "check"), FLAWS, ids=[f"{flaw}-{check.__name__}" for flaw, check in FLAWS])
def test_a_planted_flaw_is_found(flaw: str, check: Callable[[Make], None]) -> None:
    with pytest.raises(AssertionError):
        check(Make(flawed(flaw)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_twin_without_a_flaw_passes(check: Callable[[Make], None]) -> None:
    check(Make(flawed()))


def test_every_check_finds_a_flaw() -> None:
    assert {check for _, check in FLAWS} == set(CHECKS)
