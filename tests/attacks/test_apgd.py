"""apgd and apgd-t against closed forms, and against the paper's algorithm written out for one sample."""

import copy
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import toys
from attacks.conftest import Digits
from rempart.attacks import apgd, apgd_targeted, attack_batch
from rempart.attacks.losses import LossName, score
from rempart.core.errors import SpecError, ThreatError
from rempart.core.model import Classifier, metered
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, Norm, Threat


def draws(n: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.arange(n))


def loss_of(model: nn.Module, z: Tensor, y: Tensor, loss: LossName = "ce") -> Tensor:
    return score(loss, targeted=False, num_classes=model(z).shape[1])(model(z), y)


# ---- linear models: the best point of ball and box is known


def best_gap(x: Tensor, slope: Tensor, norm: Norm, eps: float) -> float:
    """max slope . d over |d| <= eps and x + d in [0, 1]; l1 by linear programming, l2 by bisection."""
    low, high = -x, 1 - x
    if norm == "linf":
        return float(torch.where(slope > 0, high.clamp_max(eps) * slope, low.clamp_min(-eps) * slope).sum())
    if norm == "l1":
        n = len(x)
        bounds = [(0, float(u)) for u in high] + [(0, float(-v)) for v in low]
        found = linprog(torch.cat([-slope, slope]).tolist(), A_ub=[[1.0] * 2 * n], b_ub=[eps], bounds=bounds)
        return float(-found.fun)
    small, large = 0.0, 1e6
    for _ in range(200):
        middle = (small + large) / 2
        inside = float(torch.minimum(torch.maximum(middle * slope, low), high).norm()) < eps
        small, large = (middle, large) if inside else (small, middle)
    return float(torch.minimum(torch.maximum(small * slope, low), high) @ slope)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("name", ["apgd", "apgd-t"])
def test_it_ends_at_the_best_point_of_ball_and_box(norm: Norm, box: bool, name: str) -> None:
    """A bias keeps every image unbroken; with `box`, most pixels are close to a bound."""
    model = toys.linear((1, 5, 6), classes=2).double()
    x = toys.images(model.shape, 6).double()
    x = torch.where(x < 0.49, 0.02, torch.where(x > 0.51, 0.99, x)) if box else x
    weight, _ = toys.affine(model)
    y = torch.zeros(6, dtype=torch.long)
    model.net[1].bias.data = torch.tensor([100.0, 0.0]).double()  # type: ignore
    eps = {"linf": 0.05, "l2": 0.3, "l1": 0.4}[norm]
    threat = Threat(norm=norm, eps=eps)
    outcome = attack_batch(model, x, y, threat, name, {"loss": "margin"})
    slope = weight[1] - weight[0]
    gained = (outcome.x_adv - x).flatten(1) @ slope
    best = torch.tensor([best_gap(row, slope, norm, eps) for row in x.flatten(1)]).double()
    slack = {"linf": 1e-7, "l2": 1e-5, "l1": 1e-2 if box else 1e-6}[norm]  # linprog solves to 1e-7
    assert bool((gained <= best * (1 + 1e-6)).all()), "further than the threat allows"
    assert bool((gained >= best * (1 - slack)).all()), gained / best
    assert float(threat.distance(x, outcome.x_adv).max()) <= eps * (1 + 1e-6)
    assert outcome.x_adv.min() >= 0 and outcome.x_adv.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_reach_no_lower_loss(digits: Digits, norm: Norm) -> None:
    """A short run is not the beginning of a longer one, whose steps halve later: hence the slack."""
    eps = {"linf": 0.03, "l2": 0.15, "l1": 0.6}[norm]
    threat = Threat(norm=norm, eps=eps)
    found = [apgd(digits.model, digits.x, digits.y, threat, steps=s, rng=draws(48)) for s in (5, 20, 80)]
    values = [loss_of(digits.model, z, digits.y).mean() for z in found]
    assert values[0] < values[1] <= values[2] + 0.01, values


# ---- the algorithm, written out


def written_out(
    value_of: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, threat: Threat, steps: int
) -> tuple[Tensor, list[float]]:
    """Algorithm 1 of arXiv:2003.01690 for one image in linf or l2: the best point and the step lengths."""

    def value_and_slope(z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        value = value_of(z)
        return float(value.detach()), torch.autograd.grad(value, z)[0]

    checkpoints = [0]
    window = max(int(0.22 * steps), 1)
    while checkpoints[-1] + window <= steps:
        checkpoints.append(checkpoints[-1] + window)
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    eta, lengths = 2 * threat.budget, [2 * threat.budget]
    value, slope = value_and_slope(start)
    values = [value]
    best, best_value, best_slope = start, value, slope
    best_then, halved_then = value, True
    here, previous, last_checkpoint = start, start, 0
    for k in range(steps):
        direction = slope.sign() if threat.norm == "linf" else slope / slope.norm()
        after = threat.project(x, here + eta * direction)
        if k > 0:
            after = threat.project(x, here + 0.75 * (after - here) + 0.25 * (here - previous))
        previous, here = here, after
        value, slope = value_and_slope(here)
        values.append(value)
        if value > best_value:
            best, best_value, best_slope = here, value, slope
        if k + 1 in checkpoints:
            rises = sum(values[i + 1] > values[i] for i in range(last_checkpoint, k + 1))
            few = rises <= 0.75 * (k + 1 - last_checkpoint)
            stuck = not halved_then and best_value <= best_then
            halved_then, best_then, last_checkpoint = few or stuck, best_value, k + 1
            if halved_then:
                eta /= 2
                here, slope = best, best_slope
            lengths.append(eta)
    return best, lengths


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 7, 30, 100])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_it_is_the_algorithm_of_the_paper(digits: Digits, norm: Norm, steps: int, loss: LossName) -> None:
    """Sample by sample in float64, from the same start; cross-entropy itself is climbed here."""
    model, x, y = digits.model, digits.x[:6], digits.y[:6]
    threat = Threat(norm=norm, eps=0.01 if norm == "linf" else 0.05)
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    mine = apgd(model, x, y, threat, steps=steps, loss=loss, rng=draws(6))
    hook.remove()
    assert bool((model(mine).argmax(1) == y).all()), "the comparison needs unbroken images"
    halvings = 0
    for i in range(6):
        label = y[i : i + 1]

        def value_of(z: Tensor, label: Tensor = label) -> Tensor:
            logits = model(z)
            if loss == "ce":
                return cross_entropy(logits, label)
            ordered = logits[0].sort(descending=True).values
            return (ordered[1] - ordered[0]) / (ordered[0] - ordered[2] + 1e-12)

        best, lengths = written_out(value_of, x[i : i + 1], seen[0][i : i + 1], threat, steps)
        halvings += len(set(lengths)) - 1
        # the last steps are a few millionths long, and rounding decides which of their ends is best
        torch.testing.assert_close(mine[i : i + 1], best, rtol=0, atol=1e-5)
    assert halvings > 0 or steps < 30, "no step was halved: nothing was compared"


def test_step_halving_by_hand() -> None:
    """One pixel, loss -|x - 0.4|, the box as ball, 10 steps: checkpoints after steps 2, 3, 4 and so on."""

    class Peak(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = -(x.flatten(1) - 0.4).abs() - 1
            return torch.cat([torch.zeros_like(level), level], 1)

    model = Classifier(Peak(), shape=(1, 1, 1), num_classes=2)
    x, y = torch.full((1, 1, 1, 1), 0.5).double(), torch.zeros(1, dtype=torch.long)
    seen: list[float] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0].detach())))
    apgd(model, x, y, Threat(norm="linf", eps=0.5), steps=10, loss="margin", rng=draws(1))
    expected = [
        0.0,  # a corner of the ball
        1.0,  # one step of 1
        0.5,  # 1 - 0.75 * 1 + 0.25 * 1; the loss rose once in two steps: halve to 0.5
        0.0,  # 0.5 - 0.75 * 0.5 + 0.25 * -0.5; no rise: halve to 0.25, back to 0.5
        0.3125,  # 0.5 - 0.75 * 0.25 + 0.25 * 0; a rise, and a new best point
        0.453125,  # 0.3125 + 0.75 * 0.25 + 0.25 * (0.3125 - 0.5); a rise
        0.30078125,  # 0.453125 - 0.75 * 0.25 + 0.25 * 0.140625; no rise: halve to 0.125, back to 0.453125
        0.359375,  # 0.453125 - 0.75 * 0.125
        0.4296875,  # 0.359375 + 0.75 * 0.125 + 0.25 * (0.359375 - 0.453125)
        0.353515625,  # 0.4296875 - 0.75 * 0.125 + 0.25 * 0.0703125; no rise: halve, back to 0.4296875
        0.3828125,  # 0.4296875 - 0.75 * 0.0625
    ]
    assert seen == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 20, 100])
@pytest.mark.parametrize("large_steps", [False, True])
def test_l1_is_the_algorithm_of_the_paper(digits: Digits, steps: int, large_steps: bool) -> None:
    """Sample by sample: the sparse step, its schedule, and the larger balls first."""
    model, x, y = digits.model, digits.x[:6], digits.y[:6]
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    threat = Threat(norm="l1", eps=0.2)
    mine = apgd(model, x, y, threat, steps=steps, large_steps=large_steps, rng=draws(6))
    hook.remove()
    assert bool((model(mine).argmax(1) == y).all()), "the comparison needs unbroken images"
    large_steps = large_steps and steps >= 3
    part = math.ceil(0.3 * steps)
    stages = [(0.6, part), (0.4, part), (0.2, steps - 2 * part)] if large_steps else [(0.2, steps)]
    for i in range(6):
        point, original, label = seen[0][i : i + 1], x[i : i + 1], y[i : i + 1]
        dims = original.numel()
        for eps, count in stages:
            ball = Threat(norm="l1", eps=eps)
            here = ball.project(original, point)
            old = int((here - original).abs().gt(1e-9).sum()) if large_steps else dims
            chosen = max(1, 2 * old // 3) if large_steps else math.ceil(0.2 * dims)
            eta, period = eps, max(int(0.04 * count), 1)
            best, best_value, best_slope = here, -math.inf, here
            for k in range(count + 1):
                z = here.clone().requires_grad_()
                value = cross_entropy(model(z), label)
                (slope,) = torch.autograd.grad(value, z)
                if float(value.detach()) > best_value:
                    best, best_value, best_slope = here, float(value.detach()), slope
                if k > 0 and k % period == 0:
                    new = int((best - original).abs().gt(1e-9).sum())
                    if new < 0.95 * old:
                        eta, here, slope = eps, best, best_slope
                    else:
                        eta = max(eta / 1.5, eps / 10)
                    old, chosen = new, max(1, 2 * new // 3)
                step = torch.zeros(dims).double()
                flat, at = slope.flatten(), here.flatten()
                free = [j for j in range(dims) if (at[j] < 1 if flat[j] > 0 else at[j] > 0)]
                for j in sorted(free, key=lambda j: -abs(float(flat[j])))[:chosen]:
                    step[j] = flat[j].sign() * eta
                step = step / step.count_nonzero().clamp_min(1)
                here = ball.project(original, here + step.view_as(original))
            point = best
        torch.testing.assert_close(mine[i : i + 1], point, rtol=0, atol=1e-6)


# ---- what is returned, restarts, randomised models


def test_the_first_broken_iterate_comes_back_and_leaves_the_batch(digits: Digits) -> None:
    model, x, y, threat = digits.model, digits.x, digits.y, Threat(norm="linf", eps=0.15)
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    z = apgd(model, x, y, threat, steps=20, rng=draws(48))
    hook.remove()
    broken = model(z).argmax(1) != y
    assert 0 < int(broken.sum()) < 48
    first = {
        int(i): next(t for t, batch in enumerate(seen) if bool((batch == z[i]).flatten(1).all(1).any()))
        for i in broken.nonzero()[:, 0]
    }
    sizes = [48 - sum(t < now for t in first.values()) for now in range(len(seen))]
    assert [len(batch) for batch in seen] == sizes


def test_restarts_keep_the_highest_loss(digits: Digits) -> None:
    threat = Threat(norm="linf", eps=0.02)
    model, x, y = digits.model, digits.x, digits.y
    one, three = (apgd(model, x, y, threat, steps=5, restarts=r, rng=draws(48)) for r in (1, 3))
    held = model(three).argmax(1) == y
    gain = (loss_of(model, three, y) - loss_of(model, one, y))[held]
    assert bool((gain >= 0).all()) and int((gain > 0).sum()) > 10


def test_gradients_are_averaged_over_passes() -> None:
    """Two passes over slopes that alternate between 3 and -1 times the true one come to that of a fixed model."""

    class Alternating(nn.Module):
        def __init__(self, factors: tuple[float, ...]) -> None:
            super().__init__()
            self.factors, self.calls = factors, 0
            self.layer = toys.linear().double().requires_grad_(False).net[1]  # type: ignore

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.factors[self.calls % len(self.factors)] * self.layer(x.flatten(1))

    x = toys.images((1, 4, 4), 6).double()
    y = Alternating((1.0,))(x).argmax(1)
    threat, found = Threat(norm="l2", eps=1e-3), list[Tensor]()
    for factors, passes in (((1.0,), 1), ((3.0, -1.0), 2), ((3.0, -1.0), 1)):
        model = Classifier(Alternating(factors), shape=(1, 4, 4), num_classes=3)
        with metered(model) as meter:
            found.append(apgd(model, x, y, threat, steps=9, loss="margin", eot=passes, rng=draws(6)))
        if passes == 2:
            assert (meter.queries, meter.gradients) == (6 * 2 * 10, 6 * 2 * 9)
    still, averaged, single = (
        loss_of(Classifier(Alternating((1.0,)), shape=(1, 4, 4), num_classes=3), z, y, "margin") for z in found
    )
    assert bool((averaged > single + 1e-5).all())
    assert float((averaged - still).abs().max()) < 1e-3


# ---- apgd-t


class _Third(nn.Module):
    """Four classes: 1 and 2 follow the first pixel and never lead, 3 follows the second half of the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) - 0.5
        ahead = torch.tanh(x[:, 0])
        return torch.stack([0 * ahead, 0.2 * ahead - 0.2, 0.1 * ahead - 0.3, x[:, 8:].sum(1) - 0.6], 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["dlr", "margin"])
def test_apgd_t_goes_through_the_targets(norm: Norm, loss: str) -> None:
    """Only the third most likely wrong class can be reached."""
    model = Classifier(_Third(), shape=(1, 4, 4), num_classes=4)
    x, y = torch.full((5, 1, 4, 4), 0.5), torch.zeros(5, dtype=torch.long)
    threat = Threat(norm=norm, eps={"linf": 0.1, "l2": 0.3, "l1": 0.8}[norm])
    for targets, reached in ((1, 0), (2, 0), (3, 5), (9, 5)):
        outcome = attack_batch(model, x, y, threat, "apgd-t", {"steps": 20, "targets": targets, "loss": loss})
        assert int(outcome.success.sum()) == reached, targets
        assert outcome.predicted.tolist() == ([3] * 5 if reached else [0] * 5)
        ran = min(targets, 3)
        assert outcome.queries <= 5 * (1 + ran * 21) and outcome.queries >= 5 * (1 + min(ran, 2) * 21)


def test_the_targeted_dlr_is_equation_7(digits: Digits) -> None:
    """On the way to a single target in one step: the sign of its gradient, from autograd on the formula itself."""
    model, x, y = digits.model, digits.x[:8], digits.y[:8]
    threat = Threat(norm="linf", eps=1e-3)
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    apgd_targeted(model, x, y, threat, steps=1, targets=1, rng=draws(8))
    hook.remove()
    start = seen[1].clone().requires_grad_()
    z = model(start)
    ordered = z.sort(dim=1, descending=True).values
    rows, target = torch.arange(8), model(x).topk(2, dim=1).indices[:, 1]
    dlr = -(z[rows, y] - z[rows, target]) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2)
    (slope,) = torch.autograd.grad(dlr.sum(), start)
    expected = threat.project(x, start.detach() + 2e-3 * slope.sign())
    torch.testing.assert_close(seen[2], expected, rtol=0, atol=1e-12)


def test_apgd_t_refuses_what_it_cannot_do() -> None:
    model = toys.linear(classes=3)
    x = toys.images(model.shape)
    y, threat = toys.labels(model, x), Threat(norm="linf", eps=0.1)
    with pytest.raises(SpecError, match="loss=margin"):
        attack_batch(model, x, y, threat, "apgd-t")
    with pytest.raises(ThreatError, match="apgd-t"):
        apgd_targeted(model, x, y, threat, targeted=True)
    for name, options in (("apgd", {}), ("apgd-t", {"loss": "margin"})):
        with pytest.raises(ThreatError, match="l1"):
            attack_batch(model, x, y, threat, name, {**options, "large_steps": True})


# ---- the peer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("linf", 0.12), ("l2", 0.5)])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_it_breaks_as_many_as_torchattacks(digits: Digits, norm: Norm, eps: float, loss: LossName) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchattacks = pytest.importorskip("torchattacks")
    model = copy.deepcopy(digits.model).float()
    x, y = digits.x.float(), digits.y
    outcome = attack_batch(model, x, y, Threat(norm=norm, eps=eps), "apgd", {"steps": 50, "loss": loss})
    with torch.random.fork_rng(devices=[]):
        peer = torchattacks.APGD(model, norm=norm.capitalize(), eps=eps, steps=50, loss=loss)(x, y)
    theirs = int((model(peer).argmax(1) == y).sum())
    assert 0 < theirs < 48, "the comparison needs broken and unbroken images"
    assert int(outcome.right.sum()) <= theirs + 3, "the starts differ, and with them a few images"
