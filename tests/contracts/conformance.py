"""What every attack must do, as plain functions: `check_...(entry, norm)` raises AssertionError where it does not.

`test_attacks` calls each check for each registered attack and norm; `test_mutants` calls them for attacks with a
planted flaw. They know the traits and the option names of an attack, nothing else. `CASES` has a row for each attack;
one without a row runs on its defaults and fails `check_declared_budget` until its budget is written down.
"""

import random
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toys
from rempart.attacks import Attack, Outcome, Traits, attack_batch, attack_data
from rempart.attacks.preflight import preflight
from rempart.attacks.run import TargetRule, join, native, targets
from rempart.core.errors import AttackError, Cancelled, ModelError, ThreatError
from rempart.core.events import Event
from rempart.core.model import Classifier
from rempart.core.registry import Entry
from rempart.core.repro import Draws
from rempart.core.threat import Norm, Threat, vector_norm
from rempart.data import Data

AttackEntry = Entry[Attack, Traits]
Options = Mapping[str, Any]
Budget = Callable[[Any, int], tuple[int, int]]
"""From the full options and the number of classes to the most queries and gradients one sample may cost."""

FAR = 3.0
"""Multiple of the radius at which every attack breaks every image of an affine toy, on its cheap options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How the suite runs one attack.

    Attributes:
        cheap: Options for the checks that need an attack, not a good one.
        sharp: Options with which it breaks every image of a two-class affine toy at `reach` times the radius.
        reach: See `sharp`.
        reaches: `reach` in the norms where it is another.
        classes: Further numbers of classes for which `sharp` holds.
        budget: The most that one sample may cost.
    """

    cheap: Options = field(default_factory=dict[str, Any])
    sharp: Options = field(default_factory=dict[str, Any])
    reach: float = 1.05
    reaches: Mapping[Norm, float] = field(default_factory=dict[Norm, float])
    classes: tuple[int, ...] = ()
    budget: Budget | None = None


_SHORT = {"steps": 6}
CASES: dict[str, Case] = {
    "fgsm": Case(budget=lambda o, k: (1, 1)),
    "bim": Case(cheap=_SHORT, sharp=_SHORT, budget=lambda o, k: (o.steps + 1, o.steps)),
    "mim": Case(cheap=_SHORT, sharp=_SHORT, budget=lambda o, k: (o.steps + 1, o.steps)),
    "pgd": Case(
        cheap=_SHORT,
        sharp={"steps": 20},
        budget=lambda o, k: (o.restarts * (o.steps + 1 + (o.restarts > 1)), o.restarts * o.steps),
    ),
    "apgd": Case(
        cheap={"steps": 20},  # in l1 the first steps go to many coordinates
        sharp={"steps": 50},
        budget=lambda o, k: (
            o.restarts * o.eot * (o.steps + (3 if o.large_steps else 1)),
            o.restarts * o.eot * o.steps,
        ),
    ),
    "apgd-t": Case(
        cheap={"steps": 20, "loss": "margin"},
        sharp={"steps": 50, "loss": "margin"},
        budget=lambda o, k: (
            o.eot * (1 + min(o.targets, k - 1) * o.restarts * (o.steps + (3 if o.large_steps else 1))),
            o.eot * min(o.targets, k - 1) * o.restarts * o.steps,
        ),
    ),
    "deepfool": Case(
        cheap={"steps": 6},
        reach=1.02,
        classes=(3, 4, 10),
        budget=lambda o, k: (1 + 2 * o.steps + o.refine, o.steps * (min(k, o.candidates) - 1)),
    ),
    "cw": Case(
        cheap={"steps": 20, "search_steps": 5, "learning_rate": 0.004, "initial_const": 1e-3, "abort_early": False},
        sharp={"steps": 100, "search_steps": 6, "initial_const": 0.1},
        budget=lambda o, k: (o.search_steps * (o.steps + 1), o.search_steps * (o.steps + 1)),
    ),
    "ead": Case(
        cheap={"steps": 20, "search_steps": 5, "initial_const": 0.01},
        sharp={"steps": 100, "search_steps": 8, "initial_const": 0.1, "rule": "l1", "beta": 0.02},
        reach=1.1,
        budget=lambda o, k: (2 * o.search_steps * o.steps, o.search_steps * o.steps),
    ),
    "fab": Case(
        cheap={"steps": 6, "restarts": 2},
        sharp={"steps": 20},
        reach=1.02,
        classes=(3, 4, 10),
        budget=lambda o, k: (o.restarts * (o.steps + 1) + o.refine + 2, o.restarts * o.steps * (k - 1)),
    ),
    "fab-t": Case(
        cheap={"steps": 6, "restarts": 2},
        sharp={"steps": 20},
        reach=1.02,
        classes=(3, 4, 10),
        budget=lambda o, k: (
            1 + min(o.targets, k - 1) * o.restarts * (o.steps + 1) + o.refine + 2,
            min(o.targets, k - 1) * o.restarts * o.steps,
        ),
    ),
    "square": Case(
        cheap={"queries": 100, "rescale": True},
        sharp={"queries": 600, "rescale": True},
        reaches={"l2": 1.6, "l1": 2.6},  # on 4 x 4 pixels, with the shape of 3 x 3 bumps
        budget=lambda o, k: (o.restarts * o.queries, 0),
    ),
    "hopskipjump": Case(
        cheap={"steps": 5, "initial_probes": 40},
        sharp={"steps": 20},
        reaches={"linf": 1.1},
        # five starts, of 100 tries each; a bisection for each and in each step, of 24 halvings in the worst case; the
        # halvings and the probes of each step; the move past the boundary
        budget=lambda o, k: (5 * 124 + o.steps * (24 + 20 + int(o.initial_probes * o.steps**0.5)) + 1, 0),
    ),
    "ddn": Case(
        cheap={"steps": 12},
        sharp={"steps": 100},
        reach=1.01,
        budget=lambda o, k: (o.steps + 1, o.steps),
    ),
    "fmn": Case(
        cheap={"steps": 12},
        sharp={"steps": 100},
        reach=1.01,
        budget=lambda o, k: (o.steps + 1, o.steps),
    ),
    "universal": Case(cheap={"epochs": 6}, sharp={"epochs": 20}, budget=lambda o, k: (2 * o.epochs + 1, o.epochs)),
    "cascade": Case(
        cheap={"effort": 0.3},
        reach=1.02,
        classes=(3, 4, 10),
        budget=lambda o, k: _cascade_budget(o, k),
    ),
}


def _cascade_budget(o: Any, k: int) -> tuple[int, int]:
    """All stages, every row to its end: a forward pass more than gradients, and one at the original."""
    stages = ((10, 1), (30, 1), (10, 9), (30, 2), (80, 2), (100, 2))
    rows = [(round(o.effort * steps), min(m, k - 1)) for steps, m in stages]
    gradients = sum(steps * m for steps, m in rows)
    return 1 + o.eot * gradients + sum(m for _, m in rows), o.eot * gradients


# ---- 1: the radius


def check_breaks_just_beyond_the_radius(entry: AttackEntry, norm: Norm) -> None:
    """Two classes, where the gradient always points at the boundary: every image falls at `reach` times the radius."""
    case, reach = _case(entry), _reach(entry, norm)
    two = toys.linear(classes=2), toys.one_logit(seed=1), toys.linear((3, 2, 5), classes=2, seed=2).double()
    for model in (*two, *(toys.linear(classes=k) for k in case.classes)):
        x, y, radius = toys.equidistant(model, norm)
        outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=reach * radius), case.sharp)
        assert bool(outcome.success.all()), f"unbroken at {reach} of the radius: {outcome.own_distance / radius}"
        assert bool((outcome.predicted != y).all())


def check_never_breaks_within_the_radius(entry: AttackEntry, norm: Norm) -> None:
    for model in (*(toys.linear(classes=k) for k in (2, 3, 10)), toys.one_logit()):
        x, y, radius = toys.equidistant(model, norm)
        outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=0.95 * radius))
        assert not bool(outcome.success.any()), "broken where the closed form says that nothing can be"
        assert bool((outcome.distance[outcome.found] > 0.999 * radius).all()), "broken nearer than the radius"


# ---- 2: the image returned


def check_images_are_feasible(entry: AttackEntry, norm: Norm) -> None:
    """Ball and box measured by hand, on images with a third of the pixels black and a third white."""
    model = toys.linear((1, 4, 5))
    x = toys.images(model.shape, 12)
    x = torch.where(x < 0.48, 0.0, torch.where(x > 0.52, 1.0, x))
    y = toys.labels(model, x)
    for eps in {"linf": (0.02, 0.4), "l2": (0.1, 1.5), "l1": (0.3, 6.0)}[norm]:
        outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=eps))
        z = outcome.x_adv
        assert bool(z.isfinite().all())
        assert float(z.min()) >= -1e-6 and float(z.max()) <= 1 + 1e-6, "pixels outside the box"
        size = vector_norm((z.double() - x).flatten(1), norm)
        assert bool((size <= eps * (1 + 2e-5)).all()) or entry.traits.minimum, f"{size.max()} > {eps}"
        assert bool((size <= eps * (1 + 2e-5))[outcome.success].all()), "a success outside the ball"


def check_kind_of_tensor(entry: AttackEntry, norm: Norm) -> None:
    """Same dtype, shape and device, detached, new; images and labels are left as they came."""
    for dtype in (torch.float32, torch.float64):
        model = toys.linear((3, 2, 5)).to(dtype)
        x, y, radius = toys.equidistant(model, norm)
        before = x.clone(), y.clone()
        threat = Threat(norm=norm, eps=FAR * radius)
        for z in (attacked(entry, model, x, y, threat).x_adv, raw(entry, model, x, y, threat)):
            assert (z.dtype, z.shape, z.device, z.requires_grad) == (dtype, x.shape, x.device, False)
            assert z.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), "the input itself came back"
        assert torch.equal(x, before[0]) and torch.equal(y, before[1]), "the attack wrote into its input"
        assert not x.requires_grad and x.grad is None


# ---- 3: no budget, one step


def check_zero_budget(entry: AttackEntry, norm: Norm) -> None:
    model = toys.smooth()
    x = toys.images(model.shape)
    outcome = attacked(entry, model, x, toys.labels(model, x), Threat(norm=norm, eps=0.0))
    assert not bool(outcome.success.any())
    assert torch.equal(outcome.x_adv, x) or entry.traits.minimum, "eps = 0 changed a bit"


def check_one_step_moves(entry: AttackEntry, norm: Norm) -> None:
    """No gradient of these toys is zero, so every image moves, and by more than rounding."""
    for model in (toys.linear(), toys.smooth(classes=2)):
        x = toys.images(model.shape)
        threat = Threat(norm=norm, eps=0.02 if norm == "linf" else 0.1)
        outcome = attacked(entry, model, x, toys.labels(model, x), threat, _given(entry, steps=1))
        moved = (outcome.x_adv - x).flatten(1).abs().amax(1)
        assert bool((moved > 1e-4).all()), f"one step left images where they were: {moved}"


# ---- 4: failure


def check_failure_gives_the_worst_image_found(entry: AttackEntry, norm: Norm) -> None:
    """At half the radius there is nothing to find: the image is feasible, not zeros, and of lower margin."""
    for model in (toys.linear(classes=2), toys.linear(classes=4)):
        x, y, radius = toys.equidistant(model, norm)
        threat = Threat(norm=norm, eps=0.5 * radius)
        outcome = attacked(entry, model, x, y, threat)
        assert not bool(outcome.success.any())
        assert float(outcome.x_adv.flatten(1).amax(1).min()) > 0.1, "the zero image"
        with torch.no_grad():
            before = margin(model(x), y)
        assert bool((outcome.margin < before).all()), "no worse than the original: a no-op"
        assert bool(threat.holds(x, outcome.x_adv).all()) or entry.traits.minimum


def check_constant_model(entry: AttackEntry, norm: Norm) -> None:
    """Nothing to find and no gradient: success only where the label was wrong, no exception, no zero image."""
    model = toys.constant()
    x, y = toys.images(model.shape), torch.tensor([0, 1, 0, 2, 0, 0, 0, 0])
    for eps in (0.1, 1.0):
        outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=eps))
        assert outcome.success.tolist() == (y != 0).tolist()
        assert outcome.right.tolist() == (y == 0).tolist()
        assert float(outcome.x_adv.flatten(1).amax(1).min()) > 0.1, "the zero image"


def check_wrong_samples_stay_untouched(entry: AttackEntry, norm: Norm) -> None:
    """What is misclassified already counts as broken, comes back bit for bit and costs nothing."""
    model = toys.linear()
    x, y, radius = toys.equidistant(model, norm)
    threat = Threat(norm=norm, eps=FAR * radius)
    wrong = torch.tensor([True, False] * 3)
    mixed = torch.where(wrong, (y + 1) % 3, y)
    outcome = attacked(entry, model, x, mixed, threat)
    assert torch.equal(outcome.x_adv[wrong], x[wrong]), "a misclassified image was changed"
    assert outcome.correct.tolist() == outcome.attacked.tolist() == (~wrong).tolist()
    assert bool(outcome.success[wrong].all()) and not bool(outcome.right[wrong].any())
    assert float(outcome.distance[wrong].max()) == 0
    alone = attacked(entry, model, x[~wrong], y[~wrong], threat, index=torch.arange(6)[~wrong])
    assert outcome.queries == alone.queries, "queries were spent on samples that were broken already"
    nothing = attacked(entry, model, x, (y + 1) % 3, threat)
    assert torch.equal(nothing.x_adv, x) and nothing.queries == nothing.gradients == 0


# ---- 5: the model


def check_model_is_restored(entry: AttackEntry, norm: Norm) -> None:
    """Modes, requires_grad, .grad and buffers; also after an exception in forward at the first, second, third call."""
    for model in (toys.conv(), toys.opaque(toys.conv()), toys.dropout()):
        x = toys.images(model.shape, 3)
        y = toys.labels(model, x)
        with _unchanged(_mixed(model)):
            attacked(entry, model, x, y, Threat(norm=norm, eps=0.1))
    for call in (1, 2, 3):
        plain = toys.opaque(toys.conv())
        x = toys.images(plain.shape, 3)
        y = toys.labels(plain, x)
        model = _mixed(toys.raising(plain, call))
        with _unchanged(model), pytest.raises(ModelError, match="planted"):
            attack_batch(model, x, y, Threat(norm=norm, eps=0.1), entry.name, _case(entry).cheap)


def check_model_is_left_alone_during_the_attack(entry: AttackEntry, norm: Norm) -> None:
    """Called by hand on a model nobody froze: inference mode throughout, and no gradient reaches a parameter."""
    model = toys.opaque(toys.conv())
    model.requires_grad_(True)
    x = toys.images(model.shape)
    y = toys.labels(model, x)
    modes: list[bool] = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    with _unchanged(model):
        raw(entry, model, x, y, Threat(norm=norm, eps=0.1))
    assert modes and not any(modes), "a module was in train mode during the attack"


# ---- 6: batches and shapes


def check_batch_mates_do_not_matter(entry: AttackEntry, norm: Norm) -> None:
    """To rounding: of float32 on models that see one image at a time, of float64 on a plain convnet.

    Torch computes tanh and sums by another formula on the rest of a tensor that does not fill its registers.
    """
    if entry.traits.joint:
        return  # its images do depend on each other: see check_joint_attacks_share_one_perturbation
    leaving = _given(entry, restarts=2, early_stop=True)  # samples leave the batch, the others must not notice
    for make, single, slack in ((toys.linear, True, 1e-5), (toys.conv, False, 1e-9)):
        model = toys.samplewise(make((1, 8, 8))) if single else make((1, 8, 8)).double()
        x = toys.images(model.shape, 5).to(next(model.parameters()).dtype)
        y, numbers = toys.labels(model, x), torch.tensor([3, 0, 8, 5, 11])
        threat = Threat(norm=norm, eps={"linf": 0.003, "l2": 0.018, "l1": 0.06}[norm])
        data = _data(model, x, y, numbers)
        for options in ({}, leaving) if leaving else ({},):

            def part(at: Tensor, options: Options = options) -> Outcome:
                return attacked(entry, model, x[at], y[at], threat, options, index=numbers[at])  # noqa: B023

            whole = part(torch.arange(5))
            assert entry.traits.minimum or 0 < int(whole.success.sum()) < 5, "the check needs broken and unbroken ones"
            others = {f"sample {i} alone": part(torch.tensor([i])) for i in range(5)}
            others["the order"] = part(torch.arange(5).flip(0))
            for size in (2, 4):
                given = {**_case(entry).cheap, **options}
                others[f"batch size {size}"] = attack_data(model, data, threat, entry.name, given, batch_size=size)
            for what, outcome in others.items():
                at = (outcome.index[:, None] == numbers).nonzero()[:, 1]
                gap = float((outcome.x_adv - whole.x_adv[at]).abs().max())
                assert gap < slack, f"{what}: pixels moved by {gap}"
                assert torch.equal(outcome.success, whole.success[at]), f"{what}: another verdict"


def check_joint_attacks_share_one_perturbation(entry: AttackEntry, norm: Norm) -> None:
    """Through batches too: where the box is out of reach, every difference is the same; the order changes nothing."""
    if not entry.traits.joint:
        return
    model = toys.samplewise(toys.linear())
    x = toys.images(model.shape, 9)
    y, numbers = toys.labels(model, x), torch.arange(9) * 5 % 11
    threat, data = Threat(norm=norm, eps=0.05 if norm == "linf" else 0.2), _data(model, x, y, numbers)
    order, cheap = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5]), _case(entry).cheap
    whole = attack_data(model, data, threat, entry.name, cheap, batch_size=2)
    turned = attack_data(model, data.take(order), threat, entry.name, cheap, batch_size=4)
    change = (whole.x_adv.double() - x).flatten(1)
    assert float((change - change[0]).abs().max()) < 1e-6 and float(change.abs().max()) > 1e-3
    gap = float((turned.x_adv - whole.x_adv[order]).abs().max())
    assert gap < 1e-6, "the order of the images changed the perturbation"


def check_shapes(entry: AttackEntry, norm: Norm) -> None:
    """Channels, tall and wide images, volumes, signals; one image, and as many as one is wide."""
    far = max(FAR, 2 * _reach(entry, norm))
    for shape in toys.SHAPES:
        model = toys.linear(shape)
        for n in (1, shape[-1]):
            x, y, radius = toys.equidistant(model, norm, n)
            outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=far * radius))
            assert outcome.x_adv.shape == x.shape
            assert bool(outcome.success.all()), f"unbroken at {far} of the radius for shape {shape}, n = {n}"


def check_class_counts(entry: AttackEntry, norm: Norm) -> None:
    models = [toys.linear((1, 12, 10) if k > 16 else (1, 4, 4), classes=k) for k in toys.CLASSES]
    for model in (*models, toys.one_logit(), toys.probabilities(classes=3)):
        x, y, radius = toys.equidistant(model, norm, 4)
        outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=FAR * radius))
        assert bool(outcome.success.all()), f"unbroken at {FAR} of the radius for {model.num_classes} classes"


# ---- 7: randomness


def check_seeds(entry: AttackEntry, norm: Norm) -> None:
    """Same seed, same images seen and returned; another seed, other images seen where the attack is random."""

    def watch(seed: int) -> tuple[Tensor, list[Tensor]]:
        model, seen = toys.opaque(toys.smooth()), list[Tensor]()
        model.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        x = toys.images(model.shape)
        y = toys.labels(model, x)
        seen.clear()
        small = Threat(norm=norm, eps=0.01)  # not all may fall before the first draw
        return attacked(entry, model, x, y, small, seed=seed).x_adv, seen

    (first, path), (again, path_again), (_, other) = watch(0), watch(0), watch(1)
    assert torch.equal(first, again) and _same(path, path_again), "the same seed gave another result"
    assert _same(path, other) != entry.traits.random, "the seed and the trait `random` contradict each other"


def check_global_random_state(entry: AttackEntry, norm: Norm) -> None:
    model = toys.smooth()
    x = toys.images(model.shape)
    y = toys.labels(model, x)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    attacked(entry, model, x, y, Threat(norm=norm, eps=0.05))
    assert torch.equal(torch.get_rng_state(), before[0]), "the global random state of torch was touched"
    assert str(np.random.get_state()) == before[1], "the global random state of NumPy was touched"
    assert random.getstate() == before[2], "the global random state of Python was touched"


# ---- 8: monotony, scale, budget


def check_more_budget_breaks_no_fewer(entry: AttackEntry, norm: Norm) -> None:
    model = toys.linear()
    x = toys.images(model.shape, 16)
    y = toys.labels(model, x)
    middle = float(toys.radius(model, x, y, norm).median())
    counts = [
        int(attacked(entry, model, x, y, Threat(norm=norm, eps=f * middle)).success.sum()) for f in (0, 0.3, 1.5, 3, 9)
    ]
    assert counts == sorted(counts), f"success fell as eps grew: {counts}"
    assert counts[0] == 0 < counts[2] < counts[-1] == 16, counts


def check_more_steps_break_no_fewer(entry: AttackEntry, norm: Norm) -> None:
    if "steps" not in entry.params.model_fields:
        return
    for model in (toys.linear(), toys.smooth()):
        x = toys.images(model.shape, 16)
        y = toys.labels(model, x)
        threat = Threat(norm=norm, eps={"linf": 0.01, "l2": 0.05, "l1": 0.1}[norm])
        counts = [int(attacked(entry, model, x, y, threat, {"steps": s}).success.sum()) for s in (1, 4, 16)]
        assert counts == sorted(counts), f"success fell as steps grew: {counts}"


def check_more_restarts_break_no_fewer(entry: AttackEntry, norm: Norm) -> None:
    """Sample by sample: what falls within r restarts falls within more. Tiny steps, so that the start decides.

    An attack that sets its steps itself meets a model without gradient at the original.
    """
    if "restarts" not in entry.params.model_fields:
        return
    sized = "step" in entry.params.model_fields
    if sized or entry.traits.access != "gradients" or entry.traits.minimum:
        model = toys.linear((1, 2, 2), classes=2)
        x, y, radius = toys.equidistant(model, norm, 24)
        threat = Threat(norm=norm, eps=1.5 * radius)
        options = _given(entry, steps=1, step=0.1 * radius, queries=3, p_init=0.1)
    else:
        model = toys.plateau()
        x, y = torch.full((24, *model.shape), 0.5), torch.zeros(24, dtype=torch.long)
        threat = Threat(norm=norm, eps={"linf": 0.1, "l2": 0.2, "l1": 0.4}[norm])
        options = _given(entry, steps=1)
    broken = [attacked(entry, model, x, y, threat, {**options, "restarts": r}).success for r in (1, 2, 3, 6)]
    for fewer, more in pairwise(broken):
        assert not bool((fewer & ~more).any()), "a sample broken by an early restart was forgotten"
    if not (entry.traits.minimum and bool(broken[0].all())):  # those reach a plane boundary at the first start
        assert int(broken[0].sum()) < int(broken[-1].sum()), (
            f"restarts changed nothing: {[int(b.sum()) for b in broken]}"
        )


def check_logits_times_1000(entry: AttackEntry, norm: Norm) -> None:
    """Softmax saturates (margins of hundreds); verdicts are those of the plain model, all broken and none broken."""
    for plain in (toys.linear(), toys.linear(classes=2)):
        x, y, radius = toys.equidistant(plain, norm)
        for model in (plain, toys.rescaled(plain, 1000)):
            for factor, expected in ((0.95, 0), (FAR, len(x))):
                outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=factor * radius))
                assert int(outcome.success.sum()) == expected, "the scale of the logits changed a verdict"


def check_logits_plus_1e6(entry: AttackEntry, norm: Norm) -> None:
    """The rounded model is another one: verdicts are the same, or the audit says that rounding decides."""
    plain = toys.linear()
    x, y, radius = toys.equidistant(plain, norm)
    model = toys.rescaled(plain, 1, 1e6)
    y = toys.labels(model, x)
    outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=FAR * radius))
    _, checks = preflight(model, _data(model, x, y))
    warned = {check.name for check in checks if check.status == "warned"}
    assert bool(outcome.success.all()) or "logit scale" in warned, "the model looks safe and nobody says why"


def check_declared_budget(entry: AttackEntry, norm: Norm) -> None:
    """Queries and gradients, where no sample falls early and where all do, stay within the formula of `CASES`."""
    budget = _case(entry).budget
    assert budget is not None, (
        f"no budget is declared for {entry.name!r}: add a row to CASES in tests/contracts/conformance.py, "
        "with the most queries and gradients one sample may cost"
    )
    for model in (toys.linear(classes=10), toys.opaque(toys.linear())):  # attacked on a copy where there is one
        x, y, radius = toys.equidistant(model, norm)
        for factor in (0.5, FAR):
            for extra in ({}, _given(entry, restarts=3), _given(entry, steps=1)):
                outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=factor * radius), extra)
                options = entry.params.model_validate({**_case(entry).cheap, **extra})
                queries, gradients = budget(options, model.num_classes)
                assert 0 < outcome.queries <= len(x) * queries, (
                    f"{outcome.queries} queries, {len(x) * queries} declared"
                )
                assert outcome.gradients <= len(x) * gradients, f"{outcome.gradients} gradients"


# ---- 9, 10: targets, cancelling, keeping


def check_targets(entry: AttackEntry, norm: Norm) -> None:
    """It reaches the class it was given, at the radius of that class; or the registry says no and it raises."""
    case, model = _case(entry), toys.linear(classes=2)
    x, y, radius = toys.equidistant(model, norm)
    if not entry.traits.targeted:
        with pytest.raises(ThreatError):
            attack_batch(model, x, y, Threat(norm=norm, eps=radius), entry.name, target=targets("nearest", model))
        with pytest.raises(ThreatError):
            raw(entry, model, x, 1 - y, Threat(norm=norm, eps=radius), targeted=True)
        return
    for factor, expected in ((0.95, 0), (_reach(entry, norm), len(x))):
        threat = Threat(norm=norm, eps=factor * radius)
        outcome = attacked(entry, model, x, y, threat, case.sharp, target=targets("nearest", model))
        assert int(outcome.success.sum()) == expected, f"{int(outcome.success.sum())} at {factor} of the radius"
    model, eps = toys.linear(classes=4), 0.2 if norm == "linf" else 1.0
    x = toys.images(model.shape, 12)
    y = toys.labels(model, x)
    for k in (1, 2):
        outcome = attacked(entry, model, x, y, Threat(norm=norm, eps=eps), case.sharp, target=_class(k))
        assert outcome.attacked.tolist() == (y != k).tolist(), "samples of the target class are not attacked"
        assert bool((outcome.predicted == k)[outcome.attacked].all()), f"reached {outcome.predicted} instead of {k}"
        assert bool(outcome.success[outcome.attacked].all())
        assert torch.equal(outcome.x_adv[y == k], x[y == k])


def check_cancelling(entry: AttackEntry, norm: Norm) -> None:
    """Every attack gives notice, and `Cancelled` raised by the listener gets out with the model restored."""
    for model in (toys.conv(), toys.opaque(toys.conv())):
        x = toys.images(model.shape, 3)
        y = toys.labels(model, x)
        events: list[Event] = []

        def stop(event: Event, events: list[Event] = events) -> None:
            assert event.total is None or 0 <= event.done <= event.total
            events.append(event)
            raise Cancelled

        with _unchanged(_mixed(model)), pytest.raises(Cancelled):
            attack_batch(model, x, y, Threat(norm=norm, eps=0.1), entry.name, _case(entry).cheap, notify=stop)
        assert len(events) == 1, "the attack went on after it was told to stop"


def check_early_stop_changes_no_verdict(entry: AttackEntry, norm: Norm) -> None:
    """Nor does keeping the best iterate lose what the last one reaches."""
    if not {"early_stop", "keep"} <= entry.params.model_fields.keys():
        return
    for model in (toys.linear(), toys.smooth()):
        x = toys.images(model.shape, 16)
        y = toys.labels(model, x)
        threat = Threat(norm=norm, eps={"linf": 0.01, "l2": 0.04, "l1": 0.1}[norm])
        best, early, last = (
            attacked(entry, model, x, y, threat, options)
            for options in ({"keep": "best"}, {"keep": "best", "early_stop": True}, {"keep": "last"})
        )
        assert 0 < int(best.success.sum()) < 16, "the check needs broken and unbroken samples"
        assert torch.equal(best.success, early.success), "leaving early changed a verdict"
        assert early.queries <= best.queries
        assert not bool((last.success & ~best.success).any()), "the best iterate is worse than the last"


CHECKS: tuple[Callable[[AttackEntry, Norm], None], ...] = tuple(
    value for name, value in list(globals().items()) if name.startswith("check_")
)


# ---- how an attack is called


def attacked(
    entry: AttackEntry,
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    options: Options | None = None,
    *,
    index: Tensor | None = None,
    target: TargetRule | None = None,
    seed: int = 0,
) -> Outcome:
    """Attack through the runner, on the cheap options; a broken contract is a failed check."""
    options = {**_case(entry).cheap, **(options or {})}
    if entry.traits.joint and len(x) > 1:  # alone, an image gets the perturbation that suits it, as every check expects
        numbers = torch.arange(len(x)) if index is None else index
        alone = [torch.tensor([i]) for i in range(len(x))]
        return join(
            attacked(entry, model, x[i], y[i], threat, options, index=numbers[i], target=target, seed=seed)
            for i in alone
        )
    try:
        return attack_batch(model, x, y, threat, entry.name, options, index=index, target=target, seed=seed)
    except AttackError as error:
        raise AssertionError(str(error)) from error


def raw(
    entry: AttackEntry, model: Classifier, x: Tensor, y: Tensor, threat: Threat, *, targeted: bool = False
) -> Tensor:
    """Call the function itself, as a user would who freezes nothing."""
    options = entry.parse(_case(entry).cheap)
    rng = Draws(0, torch.arange(len(x)))
    return entry.function(model, x, y, native(entry, threat), targeted=targeted, rng=rng, **options)


def margin(z: Tensor, y: Tensor) -> Tensor:
    """Logit of the true class minus the best other, sample by sample and without `rempart`."""
    return torch.stack([row[k] - torch.cat([row[:k], row[k + 1 :]]).max() for row, k in zip(z, y, strict=True)])


def _case(entry: AttackEntry) -> Case:
    return CASES.get(entry.name, Case())


def _reach(entry: AttackEntry, norm: Norm) -> float:
    return _case(entry).reaches.get(norm, _case(entry).reach)


def _given(entry: AttackEntry, **options: Any) -> dict[str, Any]:
    """Those of the options that the attack has."""
    return {key: value for key, value in options.items() if key in entry.params.model_fields}


def _class(k: int) -> TargetRule:
    return lambda z, y: torch.full_like(y, k)


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _data(model: Classifier, x: Tensor, y: Tensor, numbers: Tensor | None = None) -> Data:
    numbers = torch.arange(len(x)) if numbers is None else numbers
    row = {int(number): at for at, number in enumerate(numbers)}
    return Data("toy", "test", numbers, y, model.shape, model.class_names, lambda i: x[[row[int(k)] for k in i]])


def _mixed(model: Classifier) -> Classifier:
    """In train mode but for one layer, one parameter frozen, one with a gradient from before."""
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.Linear)).eval()
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    return model


@contextmanager
def _unchanged(model: Classifier) -> Generator[None]:
    def state() -> list[tuple[str, Any]]:
        modes = [(name, module.training) for name, module in model.named_modules()]
        wanted = [
            (name, p.requires_grad, None if p.grad is None else p.grad.tolist()) for name, p in model.named_parameters()
        ]
        return [
            ("modes", modes),
            ("gradients", wanted),
            ("values", [(k, v.tolist()) for k, v in model.state_dict().items()]),
        ]

    before = state()
    yield
    for (what, old), (_, new) in zip(before, state(), strict=True):
        assert old == new, f"the attack changed the {what} of the model"
