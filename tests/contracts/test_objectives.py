"""What every training objective must do, and planted flaws that the checks must find.

Each `check_...(make)` takes a factory that takes the options of the case and gives an objective in a fresh state. They
know the contract in `catalogue.py` and the row of an objective in `CASES`, nothing else.
"""

import copy
import random
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

import toys
from rempart.core.errors import ModelError, ThreatError
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.objectives import Loss, Objective, awp, objectives
from rempart.objectives.catalogue import boxed, hits


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How the suite meets one objective.

    Attributes:
        options: Given wherever it is made; those that it does not have are left out.
        norms: Norms of the threats tried; those that it refuses by a ThreatError are left out.
        freezes: Whether crafting sees the model in inference mode and without gradients to its parameters.
        statistics: Whether batch norm sees each training pass of the loss, neither more nor less.
        spares: Kinds of layers whose parameters need no gradient.
        still: Whether a threat without budget leaves images as they are.
    """

    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    norms: tuple[str, ...] = ("linf", "l2", "l1")
    freezes: bool = True
    statistics: bool = True
    spares: tuple[type[nn.Module], ...] = ()
    still: bool = True


CASES: dict[str, Case] = {
    "deep-defense": Case(statistics=False, spares=(nn.BatchNorm2d,)),  # batch norm in inference mode, not trained
}
_CHEAP = {"steps": 3}


@dataclass(frozen=True, slots=True)
class Make:
    """A factory of objectives with the case it is checked by."""

    factory: Callable[..., Objective]
    case: Case = Case()
    has: frozenset[str] = frozenset()

    def __call__(self, **options: Any) -> Objective:
        given = {**_CHEAP, **self.case.options, **options}
        return self.factory(**{key: value for key, value in given.items() if key in self.has})


# ---- models and batches


def mlp(
    shape: tuple[int, ...] = (1, 4, 4), classes: int = 3, outputs: int = 0, dropout: float = 0.0, **box: float
) -> Classifier:
    """Two layers and a ReLU, no batch norm: what one image costs does not depend on its batch mates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dims = int(np.prod(shape))
        layers = [nn.Linear(dims, 12), nn.ReLU(), nn.Linear(12, outputs or classes)]
    if dropout:
        layers.insert(2, nn.Dropout(dropout))
    return Classifier(nn.Sequential(nn.Flatten(), *layers), shape=shape, num_classes=classes, **box).train()


def conv(shape: tuple[int, ...] = (1, 4, 4)) -> Classifier:
    return toys.conv(shape).train()


def batch(model: Classifier, n: int = 6) -> tuple[Tensor, Tensor, Draws]:
    """Images, of which every third has black and white pixels, labels of all classes, and draws out of order."""
    x = toys.images(model.shape, n)
    x[::3] = torch.where(x[::3] < 0.48, 0.0, torch.where(x[::3] > 0.52, 1.0, x[::3]))
    x = x * (model.high - model.low) + model.low
    return (
        x.to(next(model.parameters()).dtype),
        torch.arange(n) % model.num_classes,
        Draws(3, torch.arange(n) * 5 % 11),
    )


def ready(objective: Objective, model: Classifier, n: int = 6, epoch: int = 1) -> Objective:
    """The objective before an epoch over the images of `batch`."""
    if objective.before_epoch is not None:
        x, y, rng = batch(model, n)
        row = {int(number): at for at, number in enumerate(rng.index)}
        names = model.class_names
        data = Data(
            "toy", "train", rng.index, y, model.shape, names, lambda index: x[[row[int(number)] for number in index]]
        )
        objective.before_epoch(model, data, rng=rng.at("epoch", epoch), epoch=epoch)
    return objective


def crafted(objective: Objective, model: Classifier, x: Tensor, y: Tensor, rng: Draws) -> Tensor:
    return objective.craft(model, x, y, rng=rng, progress=0.5)


# ---- the checks


def check_the_loss_is_a_number_with_gradients(make: Make) -> None:
    """For every shape, two classes, one logit, one image: a finite scalar that reaches every trained parameter."""
    models = (mlp(), conv(), conv((3, 4, 4)), mlp((3, 5, 2)), mlp(classes=2), mlp(classes=2, outputs=1), mlp((2, 7)))
    for model in models:
        for n in (1, 6):
            first = next(model.parameters()).requires_grad_(n == 1)
            x, y, rng = batch(model, n)
            loss = ready(make(), model, n)(model, x, y, rng=rng)
            assert loss.value.shape == () and bool(loss.value.isfinite()) and loss.value.requires_grad
            assert not any(part.requires_grad for part in loss.parts.values()), "a part keeps the graph"
            assert all(part.shape == () and bool(part.isfinite()) for part in loss.parts.values())
            assert 0 <= float(loss.parts["accuracy"]) <= 1
            loss.value.backward()
            spared = {id(p) for m in model.modules() if isinstance(m, make.case.spares) for p in m.parameters()}
            for name, p in model.named_parameters():
                if p is first and n > 1:
                    assert p.grad is None, "a frozen parameter got a gradient"
                else:
                    assert id(p) in spared or p.grad is not None, f"no gradient reaches {name}"
                    assert p.grad is None or bool(p.grad.isfinite().all())
            model.zero_grad()


def check_the_loss_depends_on_the_labels(make: Make) -> None:
    model = mlp()
    x, y, rng = batch(model)
    objective = ready(make(), model)
    x_adv = crafted(objective, model, x, y, rng).detach()
    first, second = (
        objective.loss(model, x, x_adv, labels, rng=rng, progress=1.0).value for labels in (y, (y + 1) % 3)
    )
    assert not torch.equal(first, second), "the labels do not matter"


def check_the_model_is_left_alone(make: Make) -> None:
    """Modes, requires_grad, .grad, hooks, weights; a buffer changes only as it does in the passes of the loss."""
    for model in (conv(), mlp()):
        _mixed(model)
        x, y, rng = batch(model)
        before = x.clone(), y.clone()
        with _unchanged(model):
            objective = ready(make(), model)
            x_adv = crafted(objective, model, x, y, rng)
        twin = copy.deepcopy(model)
        with _unchanged(model, buffers=False), _recorded(model) as passes:
            objective.loss(model, x, x_adv, y, rng=rng, progress=0.5)
        if make.case.statistics:
            for given in passes:
                twin(given)
            for (name, found), expected in zip(model.named_buffers(), twin.buffers(), strict=True):
                torch.testing.assert_close(found, expected, msg=f"{name} is not what the passes of the loss make it")
        assert torch.equal(x, before[0]) and torch.equal(y, before[1]), "the batch was written into"
        assert x.grad is None and not x.requires_grad


def check_crafting_freezes_the_model(make: Make) -> None:
    for model in (conv(), mlp(dropout=0.5)):
        objective = ready(make(), model)
        x, y, rng = batch(model)
        modes: list[bool] = []

        def note(given: Tensor, model: Classifier = model, modes: list[bool] = modes) -> None:
            modes.append(any(module.training for module in model.modules()))
            modes.append(any(parameter.requires_grad for parameter in model.parameters()))

        with _watched(model, note):
            x_adv = crafted(objective, model, x, y, rng)
        assert not any(modes), "images were crafted in training mode, or with a graph of the parameters"
        assert (x_adv.shape, x_adv.dtype, x_adv.device) == (x.shape, x.dtype, x.device)


def check_an_error_leaves_the_model_as_it_was(make: Make) -> None:
    for call in (1, 2, 3, 4):
        objective, model = make(), toys.raising(toys.opaque(conv()), 10**9)
        ready(objective, model)
        model.net.calls, model.net.on_call = 0, call
        x, y, rng = batch(_mixed(model))
        with _unchanged(model, buffers=False), suppress(ModelError):
            objective(model, x, y, rng=rng)


def check_same_draws_same_loss(make: Make) -> None:
    model = conv()
    x, y, rng = batch(model)
    runs = []
    for _ in range(2):
        torch.manual_seed(len(runs))
        twin = copy.deepcopy(model)
        objective = ready(make(), twin)
        x_adv = crafted(objective, twin, x, y, rng).detach()
        runs.append((x_adv, objective.loss(twin, x, x_adv, y, rng=rng, progress=0.5).value.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "the same draws gave another loss"


def check_a_wrapper_changes_nothing(make: Make) -> None:
    """The loop hands over the model as Lightning Fabric wraps it: other names of modules, the same box and loss."""
    bare = conv()
    wrapped = Fabric(accelerator="cpu", devices=1).setup_module(copy.deepcopy(bare))
    x, y, rng = batch(bare)
    first, second = (ready(make(), model)(model, x, y, rng=rng).value for model in (bare, wrapped))
    assert torch.equal(first, second), "a wrapped model gives another loss"


def check_the_order_of_a_batch_does_not_matter(make: Make) -> None:
    model = mlp().double()
    x, y, rng = batch(model)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    first, second = (
        ready(make(), model)(model, x[at], y[at], rng=rng.select(at)).value for at in (torch.arange(6), order)
    )
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def check_the_global_random_state_is_left_alone(make: Make) -> None:
    for model in (conv(), mlp()):
        x, y, rng = batch(model)
        torch.manual_seed(0)
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
        ready(make(), model)(model, x, y, rng=rng).value.backward()
        assert torch.equal(torch.get_rng_state(), before[0]), "the global random state of torch was touched"
        assert (str(np.random.get_state()), random.getstate()) == before[1:], "a global random state was touched"


def check_images_stay_within_the_threat(make: Make) -> None:
    """In the box of the model, too, which need not be [0, 1]."""
    for objective in (make(), *_within(make, 0.05)):
        if objective.threat is None:
            continue
        for model in (mlp(), mlp((3, 4, 4), low=-1.0, high=3.0), conv()):
            ready(objective, model)
            x, y, rng = batch(model)
            x_adv = crafted(objective, model, x, y, rng).detach()
            assert bool(boxed(objective.threat, model).holds(x, x_adv).all()), f"outside {objective.threat}"


def check_without_a_budget_images_stay_as_they_are(make: Make) -> None:
    if make.case.still:
        for objective in _within(make, 0):
            for model in (mlp(), conv()):
                x, y, rng = batch(model)
                x_adv = crafted(ready(objective, model), model, x, y, rng)
                assert torch.equal(x_adv.detach(), x), "eps = 0 changed a bit"


def check_the_state_is_all_there_is(make: Make) -> None:
    """Three steps in a row, or two, then the third by an objective that knows their state only."""
    assert make().state is not make().state, "two objectives share their state"

    def steps(objective: Objective, model: Classifier, epochs: Iterable[int]) -> list[Tensor]:
        optimiser, losses = torch.optim.SGD(model.parameters(), 0.05), []
        for epoch in epochs:
            x, y, rng = batch(model)
            ready(objective, model, epoch=epoch)
            for _ in range(objective.repeats):
                loss = objective(model, x, y, rng=rng.at(epoch), progress=epoch / 4)
                optimiser.zero_grad()
                loss.value.backward()
                optimiser.step()
                if objective.after_step is not None:
                    objective.after_step(model, loss.parts)
                losses.append(loss.value.detach())
        return [*losses, *(parameter.detach() for parameter in model.parameters())]

    model, objective = conv(), make()
    steps(objective, model, (1, 2))
    again, twin = make(), copy.deepcopy(model)
    again.state.update({name: tensor.clone() for name, tensor in objective.state.items()})
    for expected, found in zip(steps(objective, model, (3,)), steps(again, twin, (3,)), strict=True):
        assert torch.equal(expected, found), "the state does not hold all that the third step depends on"
    assert objective.state.keys() == again.state.keys()
    assert all(isinstance(tensor, Tensor) and not tensor.requires_grad for tensor in objective.state.values())


CHECKS: tuple[Callable[[Make], None], ...] = tuple(
    value for name, value in list(globals().items()) if name.startswith("check_")
)


def _within(make: Make, eps: float) -> list[Objective]:
    found = []
    for norm in make.case.norms if "threat" in make.has else ():
        with suppress(ThreatError):
            found.append(make(threat=f"{norm}:{eps}"))
    return found


def _mixed(model: Classifier) -> Classifier:
    """In training mode but for one layer, one parameter frozen, one with a gradient from before."""
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.Linear)).eval()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    return model


@contextmanager
def _watched(model: Classifier, look: Callable[[Tensor], None]) -> Generator[None]:
    """Call `look` with the images of every pass."""
    handle = model.register_forward_pre_hook(lambda _, given: look(given[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _recorded(model: Classifier) -> Generator[list[Tensor]]:
    """The images of every pass."""
    passes: list[Tensor] = []
    with _watched(model, lambda given: passes.append(given.detach().clone())):
        yield passes


@contextmanager
def _unchanged(model: Classifier, *, buffers: bool = True) -> Generator[None]:
    def state() -> dict[str, Any]:
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return {
            "modules": {name: id(module) for name, module in modules.items()},
            "modes": {name: module.training for name, module in modules.items()},
            "hooks": {name: [list(getattr(module, kind)) for kind in hooks] for name, module in modules.items()},
            "forward": {name: "forward" in module.__dict__ for name, module in modules.items()},
            "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
            "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in parameters.items()},
            "parameters": {name: (id(p), p.tolist()) for name, p in parameters.items()},
            "buffers": {name: b.tolist() for name, b in model.named_buffers()} if buffers else {},
        }

    before = state()
    yield
    after = state()
    for what, old in before.items():
        assert old == after[what], f"the {what} of the model changed"


# ---- every objective


def _make(name: str) -> Make:
    entry = objectives[name]
    return Make(entry.function, CASES.get(name, Case()), frozenset(entry.params.model_fields))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", [entry.name for entry in objectives])
def test_contract(name: str, check: Callable[[Make], None]) -> None:
    check(_make(name))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", [entry.name for entry in objectives])
def test_contract_with_perturbed_weights(name: str, check: Callable[[Make], None]) -> None:
    """Around every objective; its passes at the weights as they are do not count for batch norm."""
    make = _make(name)

    def factory(**options: Any) -> Objective:
        return awp(make.factory(**options), 0.01)

    check(replace(make, factory=factory, case=replace(make.case, statistics=False)))


# ---- planted flaws


def flawed(flaw: str = "") -> Callable[..., Objective]:
    """Adversarial training by one step, with a loss that grows slowly step by step, and one flaw planted or none."""

    def factory(*, threat: str = "linf:0.1") -> Objective:
        within = Threat.parse(threat)
        state = {"steps": torch.zeros(())} if flaw != "state shared" else _SHARED
        hidden = [0.0]

        def craft(model: nn.Module, x: Tensor, y: Tensor, *, rng: Draws, progress: float) -> Tensor:
            if flaw == "crafting in training mode":
                return step(model, x, y, rng)
            if flaw == "not restored after an error":
                modes = [(module, module.training) for module in model.modules()]
                model.eval()
                found = step(model, x, y, rng)
                for module, mode in modes:
                    module.training = mode
                return found
            if flaw == "left in inference mode":
                model.eval()
            if flaw == "a hook left":
                model.register_forward_hook(lambda *_: None)
            if flaw == "writes into the batch":
                x.clamp_(0.2)
            with frozen(model):
                found = step(model, x, y, rng)
            if flaw == "gradients left":
                F.cross_entropy(model(x), y).backward()
            if flaw == "all parameters thawed":
                model.requires_grad_(True)
            if flaw == "another dtype":
                found = found.half()
            return found

        def step(model: nn.Module, x: Tensor, y: Tensor, rng: Draws) -> Tensor:
            threat = boxed(within, model)
            z = threat.start(x, rng)
            if flaw == "unseeded noise":
                z = threat.project(x, x + threat.budget * (torch.rand_like(x) - 0.5))
            if flaw == "draws by position":
                z = threat.start(x, Draws(rng.seed, torch.arange(len(x))))
            z.requires_grad_()
            loss = F.cross_entropy(model(z), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, z)
            z = z.detach() + threat.ascend(x, gradient, threat.budget)
            if flaw == "eps beyond the threat":
                return replace(threat, eps=2 * threat.budget).project(x, z)
            if flaw == "the box of [0, 1]":
                return within.project(x, z)
            if flaw == "moves without a budget":
                return z + 1e-4 if threat.budget == 0 else threat.project(x, z)
            return threat.project(x, z)

        def loss(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, *, rng: Draws, progress: float) -> Loss:
            if flaw == "a pass nobody sees":
                getattr(model, "net")(x)  # noqa: B009
            if flaw == "statistics rolled back":
                with _kept(model):
                    z = model(x_adv)
            else:
                z = model(x_adv)
            value = F.cross_entropy(z, (z.argmax(1) if flaw == "its own labels" else y))
            if flaw == "one value per image":
                value = F.cross_entropy(z, y, reduction="none")
            if flaw == "asks for the type of the model" and isinstance(model, Classifier):
                value = value + 0.1 * z.square().mean()
            if flaw == "no gradient":
                value = value.detach()
            if flaw == "the last layer only":
                value = F.cross_entropy(z.detach() + sum(p.sum() for p in list(model.parameters())[-2:]), y)
            if flaw == "not finite":
                value = value - value.detach().sub(value.detach()).log()
            if flaw == "weighted by position":
                value = value + 1e-3 * (torch.arange(len(y)) * z[:, 0]).mean()
            age = hidden[0] if flaw == "hidden state" else state["steps"]
            accuracy = value if flaw == "a part with a graph" else hits(z, y)
            return Loss(value * (1 + 0.1 * age), {"accuracy": accuracy})

        def after_step(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
            hidden[0] += 1
            state["steps"] += 1

        return Objective(loss=loss, craft=craft, threat=within, state=state, after_step=after_step)

    return factory


_SHARED = {"steps": torch.zeros(())}


@contextmanager
def _kept(model: nn.Module) -> Generator[None]:
    values = {name: value.clone() for name, value in model.named_buffers()}
    yield
    for name, value in model.named_buffers():
        value.copy_(values[name])


FLAWS: list[tuple[str, Callable[[Make], None]]] = [
    ("one value per image", check_the_loss_is_a_number_with_gradients),
    ("no gradient", check_the_loss_is_a_number_with_gradients),
    ("the last layer only", check_the_loss_is_a_number_with_gradients),
    ("not finite", check_the_loss_is_a_number_with_gradients),
    ("a part with a graph", check_the_loss_is_a_number_with_gradients),
    ("all parameters thawed", check_the_loss_is_a_number_with_gradients),
    ("its own labels", check_the_loss_depends_on_the_labels),
    ("left in inference mode", check_the_model_is_left_alone),
    ("a hook left", check_the_model_is_left_alone),
    ("gradients left", check_the_model_is_left_alone),
    ("all parameters thawed", check_the_model_is_left_alone),
    ("writes into the batch", check_the_model_is_left_alone),
    ("crafting in training mode", check_the_model_is_left_alone),
    ("a pass nobody sees", check_the_model_is_left_alone),
    ("statistics rolled back", check_the_model_is_left_alone),
    ("crafting in training mode", check_crafting_freezes_the_model),
    ("not restored after an error", check_crafting_freezes_the_model),
    ("another dtype", check_crafting_freezes_the_model),
    ("not restored after an error", check_an_error_leaves_the_model_as_it_was),
    ("unseeded noise", check_same_draws_same_loss),
    ("asks for the type of the model", check_a_wrapper_changes_nothing),
    ("draws by position", check_the_order_of_a_batch_does_not_matter),
    ("weighted by position", check_the_order_of_a_batch_does_not_matter),
    ("unseeded noise", check_the_global_random_state_is_left_alone),
    ("eps beyond the threat", check_images_stay_within_the_threat),
    ("the box of [0, 1]", check_images_stay_within_the_threat),
    ("moves without a budget", check_without_a_budget_images_stay_as_they_are),
    ("hidden state", check_the_state_is_all_there_is),
    ("state shared", check_the_state_is_all_there_is),
]


@pytest.mark.parametrize(("flaw", "check"), FLAWS, ids=[f"{flaw}-{check.__name__}" for flaw, check in FLAWS])
def test_a_planted_flaw_is_found(flaw: str, check: Callable[[Make], None]) -> None:
    with pytest.raises(AssertionError):
        check(Make(flawed(flaw), has=frozenset({"threat"})))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_twin_without_a_flaw_passes(check: Callable[[Make], None]) -> None:
    check(Make(flawed(), has=frozenset({"threat"})))


def test_every_check_finds_a_flaw() -> None:
    assert {check for _, check in FLAWS} == set(CHECKS)
