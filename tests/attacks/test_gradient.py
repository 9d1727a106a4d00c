"""The attacks that climb the loss: each one's own idea, and the fast copy they climb on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import toys
from rempart.attacks import attack_batch, bim, fgsm, mim, pgd
from rempart.attacks.gradient import _Best
from rempart.attacks.losses import reached
from rempart.core.model import Classifier, accelerated, frozen
from rempart.core.repro import Draws
from rempart.core.threat import Threat

PEERS = {
    "fgsm l2": (fgsm, "l2", {}, "L2FastGradientAttack", {}),
    "bim l2": (bim, "l2", {}, "L2BasicIterativeAttack", {"steps": 8, "abs_stepsize": 0.05}),
    "pgd linf targeted": (pgd, "linf", {"targeted": True}, "LinfPGD", {"steps": 8, "abs_stepsize": 0.05}),
    "pgd l2 targeted": (pgd, "l2", {"targeted": True}, "L2PGD", {"steps": 8, "abs_stepsize": 0.05}),
}
"""What `test_peers.py` leaves out."""


def draws(x: Tensor) -> Draws:
    return Draws(3, torch.arange(len(x)))


@pytest.mark.parametrize("pair", PEERS)
def test_agrees_with_foolbox(pair, digits, monkeypatch):
    """The same image to 1e-5, in float64, from the same random start; the box is out of reach."""
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")
    attack, norm, own, name, options = PEERS[pair]
    model, x, y, threat = digits.pale_model, digits.pale, digits.y, Threat(norm=norm, eps=0.2)
    if attack is not fgsm:
        own = own | {"steps": 8, "step": 0.05, "keep": "last"}
    if attack is pgd:
        start = foolbox.devutils.ep.astensor(threat.start(x, draws(x).at("pgd", 0)))
        monkeypatch.setattr(getattr(foolbox.attacks, name), "get_random_start", lambda *_: start)
    criterion = y
    if own.get("targeted"):
        y = (y + 3) % 10
        criterion = foolbox.criteria.TargetedMisclassification(y)
    peer, wrapped = getattr(foolbox.attacks, name)(**options), foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, theirs, _ = peer(wrapped, x, criterion, epsilons=0.2)
    ours = attack(model, x, y, threat, rng=draws(x), **own)
    assert float((ours - x).abs().max()) > 0.01
    assert float((ours - theirs).abs().max()) < 1e-5


class Curved:
    """z = W x + A tanh(B x): logits and the gradient of cross-entropy by hand, in NumPy; and the same for torch."""

    def __init__(self, dims: int = 12, hidden: int = 7, classes: int = 4) -> None:
        rng = np.random.default_rng(5)
        self.w, self.a = rng.normal(size=(classes, dims)), rng.normal(size=(classes, hidden))
        self.b = rng.normal(size=(hidden, dims))

    def gradient(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        h = np.tanh(x @ self.b.T)
        z = x @ self.w.T + h @ self.a.T
        p = np.exp(z - z.max(1, keepdims=True))
        slope = p / p.sum(1, keepdims=True) - np.eye(len(self.w))[y]
        return slope @ self.w + (slope @ self.a * (1 - h**2)) @ self.b

    def classifier(self) -> Classifier:
        w, a, b = (torch.from_numpy(m) for m in (self.w, self.a, self.b))

        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                flat = x.flatten(1)
                return flat @ w.T + (flat @ b.T).tanh() @ a.T

        return Classifier(Net(), shape=(1, 3, 4), num_classes=4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_mim_sums_gradients_of_equal_l1_norm(norm, momentum):
    """Algorithm 1 of the paper, once more: g <- mu g + grad / |grad|_1, then a step along g and the projection."""
    curved, (n, eps, steps) = Curved(), (9, 0.15, 6)
    x = np.random.default_rng(1).uniform(0.4, 0.6, size=(n, 12))
    y = np.arange(n) % 4
    z, velocity = x.copy(), np.zeros_like(x)
    for _ in range(steps):
        gradient = curved.gradient(z, y)
        velocity = momentum * velocity + gradient / np.abs(gradient).sum(1, keepdims=True)
        if norm == "linf":
            z = np.clip(z + eps / steps * np.sign(velocity), x - eps, x + eps)
        else:
            z = z + eps / steps * velocity / np.linalg.norm(velocity, axis=1, keepdims=True)
            z = x + (z - x) * np.minimum(1, eps / np.linalg.norm(z - x, axis=1, keepdims=True))
    images, labels = torch.from_numpy(x).view(n, 1, 3, 4), torch.from_numpy(y)
    threat = Threat(norm=norm, eps=eps)
    ours = mim(curved.classifier(), images, labels, threat, steps=steps, momentum=momentum, keep="last")
    assert np.abs(ours.flatten(1).numpy() - z).max() < 1e-9


@pytest.mark.parametrize("attack", [bim, mim])
def test_bim_and_mim_reach_the_budget_with_their_last_step(attack):
    """Default step eps / steps: on an affine model of two classes every step goes the same way, up to the ball."""
    model, x = toys.linear(classes=2).double(), toys.images((1, 4, 4)).double()
    y = toys.labels(model, x)
    path = recorded(model, lambda net: attack(net, x, y, Threat(norm="linf", eps=0.04), steps=5))
    for t, point in enumerate(path):
        moved = (point - x).abs().flatten(1)
        assert torch.allclose(moved, torch.full_like(moved, 0.04 * t / 5), atol=1e-12)
    assert len(path) == 6


def test_pgd_returns_the_best_iterate(digits):
    """Recomputed from every point the model was asked about: broken before unbroken, then the highest loss."""
    model, x, y = digits.model, digits.x, digits.y
    threat = Threat(norm="linf", eps=0.08)
    options = {"steps": 6, "step": 0.07, "rng": draws(x)}  # long steps: the loss goes up and down
    found: list[Tensor] = []
    path = recorded(model, lambda net: found.append(pgd(net, x, y, threat, **options)))
    z = torch.stack([model(point) for point in path[1:]])  # the start is no iterate
    loss = torch.stack([cross_entropy(part, y, reduction="none") for part in z])
    broken = z.argmax(2) != y
    loss = torch.where(broken.any(0) & ~broken, -torch.inf, loss)
    assert torch.equal(model(found[0]).argmax(1) != y, broken.any(0))
    assert torch.allclose(cross_entropy(model(found[0]), y, reduction="none"), loss.amax(0), rtol=1e-9)
    assert bool((loss.argmax(0) < 5).any()), "the last iterate is not always the best one"
    assert 0 < int(broken.any(0).sum()) < len(x)
    final = pgd(model, x, y, threat, **options, keep="last")
    assert torch.equal(final, path[-1])


def test_broken_comes_before_unbroken_then_the_higher_score():
    """Four samples, three points: kept are the highest, the broken one, the higher broken one, the first of equals."""
    kept = _Best.at(torch.full((4, 1, 1), -1.0))
    history = (([0, 0, 1, 0], [1, 9, 5, 3]), ([0, 1, 1, 0], [2, 1, 7, 3]), ([0, 0, 0, 0], [0, 8, 9, 3]))
    for number, (hit, value) in enumerate(history):
        kept.update(torch.full((4, 1, 1), float(number)), torch.tensor(hit) > 0, torch.tensor(value).float())
    assert kept.image.flatten().tolist() == [1, 1, 1, 0]
    assert kept.hit.tolist() == [False, True, True, False]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_restarts_only_help(norm, digits):
    """More restarts begin with those of fewer: what is broken stays broken, what is not only gains loss."""
    model, x, y = digits.model, digits.x, digits.y
    threat = Threat(norm=norm, eps={"linf": 0.06, "l2": 0.4, "l1": 1.5}[norm])
    value, hit = [], []
    for restarts in (1, 2, 6):
        z = model(pgd(model, x, y, threat, steps=4, restarts=restarts, rng=draws(x)))
        hit.append(reached(z, y, targeted=False))
        value.append(cross_entropy(z, y, reduction="none"))
    for few, many in ((0, 1), (1, 2)):
        assert bool((hit[many] | ~hit[few]).all())
        assert bool((value[many] >= value[few] - 1e-12)[~hit[many]].all())
    assert bool((value[2] > value[0] + 1e-6).any()), "restarts do something"


def test_l1_steps_begin_wide_and_end_on_one_coordinate():
    """5 % of D = 128 is 6.4 coordinates; four steps move 6.4^(1 - t/3) of them, rounded, by equal parts of the step."""
    model, x = toys.linear((2, 8, 8)).double(), toys.images((2, 8, 8)).double()
    y = toys.labels(model, x)
    path = recorded(model, lambda net: bim(net, x, y, Threat(norm="l1", eps=0.4), steps=4, step=0.05))
    for before, after, count in zip(path[:-1], path[1:], (6, 3, 2, 1), strict=True):
        moved = (after - before).abs().flatten(1)
        assert (moved > 1e-9).sum(1).tolist() == [count] * len(x)
        assert torch.allclose(moved.amax(1), torch.full((len(x),), 0.05 / count).double(), atol=1e-9)
        weight, _ = toys.affine(model)
        slope = _log_odds_slope(model, before, y, weight).abs()
        smallest = torch.where(moved > 1e-9, slope, torch.inf).amin(1)
        assert bool((smallest >= torch.where(moved > 1e-9, 0.0, slope).amax(1) - 1e-12).all()), "the steepest ones"


def _log_odds_slope(model: Classifier, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    others = model(x).scatter(1, y[:, None], -torch.inf).softmax(1)
    return others @ weight - weight[y]


def recorded(model: Classifier, run: Callable[[nn.Module], object]) -> list[Tensor]:
    """The points a model is asked about while `run` uses it, in order."""
    points: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: points.append(inputs[0].detach().clone()))
    try:
        run(model)
    finally:
        handle.remove()
    return points


# --- the fast copy that attacks climb --------------------------------------------------------------------------------


class Rounding(torch.autograd.Function):
    """Rounds to eighths; its backward pass lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Rounded(nn.Module):
    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return self.net(Rounding.apply(x))
        with torch.no_grad():
            change = (x * 8).round() / 8 - x
        return self.net(x + change)


@pytest.mark.parametrize("how", ["function", "no_grad"])
def test_a_backward_pass_of_ones_own_is_climbed(how, digits):
    """Tracing would drop it and leave the attack with the gradient of rounding, zero: the model looks robust."""
    model = Classifier(Rounded(digits.model.net, how), shape=(1, 8, 8), num_classes=10).eval()
    assert accelerated(model) is model
    threat = Threat(norm="linf", eps=0.25)
    outcome = attack_batch(model, digits.x, digits.y, threat, "pgd", {"steps": 10, "random_start": False})
    assert float(outcome.success.double().mean()) > 0.8


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, (2, 1), 4])
@pytest.mark.parametrize("kernel", [1, 3, 5, (2, 7)])
@pytest.mark.parametrize("padding", [0, 2, (1, 3)])
def test_gradients_of_first_layers_are_exact(channels, stride, kernel, padding):
    """The copy takes them by blocks of pixels; sides that are no multiple of a block are there too."""
    for size in ((11, 14), (16, 8)):
        net = nn.Sequential(nn.Conv2d(channels, 5, kernel, stride, padding), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        generator = torch.Generator().manual_seed(0)
        x = torch.rand((3, channels, *size), generator=generator).double()
        net = net.double()
        net(x)
        model = Classifier(net, shape=(channels, *size), num_classes=3).eval().requires_grad_(False)
        fast = accelerated(model)
        assert fast is not model
        for k in range(3):
            expected, got = (_gradient(m, x, k) for m in (model, fast))
            assert torch.allclose(expected, got, rtol=0, atol=1e-12)


def test_pooling_before_relu_changes_nothing(digits):
    fast = accelerated(digits.model)
    kinds = [type(m) for m in fast.modules() if isinstance(m, (nn.ReLU, nn.MaxPool2d))]
    assert fast is not digits.model and len(kinds) == 5
    with frozen(digits.model):
        x = torch.cat([digits.x, torch.zeros_like(digits.x[:1])])  # a flat image is all ties
        assert torch.allclose(fast(x), digits.model(x), rtol=0, atol=1e-12)
        for k in range(10):
            assert torch.allclose(_gradient(fast, x, k), _gradient(digits.model, x, k), rtol=0, atol=1e-12)


def test_other_neighbours_keep_their_order():
    """Only max pooling may come before ReLU; a swap of anything else would cost the whole fast copy."""
    layers = (nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    model = Classifier(nn.Sequential(*layers).double(), shape=(1, 14, 14), num_classes=3).eval()
    fast = accelerated(model)
    assert fast is not model
    kinds = [type(module) for module in fast.net.children()]
    assert kinds[1:4] == [nn.MaxPool2d, nn.ReLU, nn.AvgPool2d]


def _gradient(model: nn.Module, x: Tensor, k: int) -> Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(model(x)[:, k].sum(), x)[0]
