"""The suite is tested too: for each planted flaw the named check fails, and the twin without a flaw passes them all."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contracts import conformance
from contracts.conformance import CHECKS, AttackEntry
from rempart.attacks import Attack, Traits, attacks, gradient, optimise, run
from rempart.attacks.losses import Score, reached, score
from rempart.core.errors import Cancelled
from rempart.core.events import Event, Notify, silent
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, Norm, Threat
from rempart.core.types import Images, Labels, Scores

Check = Callable[[AttackEntry, Norm], None]


def ascent(flaw: str = "") -> Attack:
    """Projected gradient ascent in the plainest form, with one flaw planted or none."""

    def attack(
        model: Classifier,
        x: Images,
        y: Labels,
        threat: Threat,
        *,
        steps: int = 6,
        step: float | None = None,
        restarts: int = 1,
        targeted: bool = False,
        rng: Draws | None = None,
        notify: Notify = silent,
    ) -> Images:
        box = (-9.0, 10.0) if flaw == "no clamp to the box" else (threat.low, threat.high)
        eps = threat.budget / 255 if flaw == "eps divided by 255 again" else threat.budget
        threat = replace(threat, eps=eps, low=box[0], high=box[1])
        length = 2.5 * eps / steps if step is None else step
        targeted = targeted and flaw != "targets ignored"
        rng = Draws(1, rng.index) if rng and flaw == "seed ignored" else rng or Draws(0, torch.arange(len(x)))
        margin = score("margin", targeted=targeted, num_classes=model.num_classes)
        best, standing = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype)
        if flaw == "train mode":
            model.train()
        if flaw == "the clean image":
            steps, restarts = 0, 0
            notify(Event(stage="ascent", done=0))
        for restart in range(restarts):
            point = threat.start(x, rng.at(restart))
            if flaw == "global random numbers":
                point = threat.project(x, x + eps * (torch.rand_like(x) - 0.5))
            for t in range(steps):
                with suppress(Cancelled) if flaw == "deaf to cancelling" else nullcontext():
                    notify(Event(stage="ascent", done=t, total=steps))
                g = _gradient(flaw, model, point, y, targeted)
                if flaw == "projection before the step":
                    point = threat.project(x, point)
                    point = point + threat.ascend(point, g, length)
                elif flaw == "step divided by the norm of the batch":
                    point = threat.project(x, point + length * g / g.norm())
                else:
                    point = threat.project(x, point + threat.ascend(point, g, length))
                if flaw in ("stop when one sample falls", "a query nobody declared"):
                    with torch.no_grad():
                        hit = reached(torch.cat([model(point), model(point)])[: len(y)], y, targeted=targeted)
                    if flaw == "stop when one sample falls" and bool(hit.any()):
                        break
            with torch.no_grad():
                value = margin(model(point), y)
            better = value > (-torch.inf if flaw == "only the last restart" else standing)
            best[better], standing[better] = point[better], value[better]
        if flaw == "zeros on failure":
            best[standing <= 0] = 0
        if flaw == "writes into its input":
            x.copy_(best)
        if flaw == "returns its input":
            return x.copy_(best)
        if flaw == "attached":
            best.requires_grad_()
        if flaw == "another dtype":
            best = best.float()
        if flaw == "not finite":
            best[0] = torch.nan
        return best

    return attack


def _gradient(flaw: str, model: Classifier, point: Images, y: Labels, targeted: bool) -> Images:
    goal = score("ce", targeted=targeted, num_classes=model.num_classes)
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        z = model(point)
        if flaw == "softmax that saturates":
            value = cross_entropy(z, y, reduction="none") * (-1 if targeted else 1)
        else:
            value = goal(z, y) * (-1 if flaw == "sign of the loss" else 1)
    if flaw == "parameter gradients":
        value.sum().backward()
        return point.grad if point.grad is not None else point
    return torch.autograd.grad(value.sum(), point)[0]


FLAWS: list[tuple[str, Check, Norm]] = [
    ("sign of the loss", conformance.check_breaks_just_beyond_the_radius, "linf"),
    ("no clamp to the box", conformance.check_images_are_feasible, "linf"),
    ("no clamp to the box", conformance.check_images_are_feasible, "l2"),
    ("projection before the step", conformance.check_images_are_feasible, "linf"),
    ("projection before the step", conformance.check_never_breaks_within_the_radius, "l2"),
    ("eps divided by 255 again", conformance.check_breaks_just_beyond_the_radius, "linf"),
    ("train mode", conformance.check_model_is_left_alone_during_the_attack, "linf"),
    ("stop when one sample falls", conformance.check_batch_mates_do_not_matter, "linf"),
    ("step divided by the norm of the batch", conformance.check_batch_mates_do_not_matter, "l2"),
    ("only the last restart", conformance.check_more_restarts_break_no_fewer, "linf"),
    ("parameter gradients", conformance.check_model_is_left_alone_during_the_attack, "linf"),
    ("global random numbers", conformance.check_global_random_state, "linf"),
    ("global random numbers", conformance.check_seeds, "linf"),
    ("seed ignored", conformance.check_seeds, "linf"),
    ("zeros on failure", conformance.check_failure_gives_the_worst_image_found, "linf"),
    ("zeros on failure", conformance.check_constant_model, "linf"),
    ("the clean image", conformance.check_breaks_just_beyond_the_radius, "linf"),
    ("the clean image", conformance.check_one_step_moves, "l2"),
    ("the clean image", conformance.check_failure_gives_the_worst_image_found, "l2"),
    ("softmax that saturates", conformance.check_logits_times_1000, "linf"),
    ("targets ignored", conformance.check_targets, "linf"),
    ("a query nobody declared", conformance.check_declared_budget, "linf"),
    ("deaf to cancelling", conformance.check_cancelling, "linf"),
    ("writes into its input", conformance.check_kind_of_tensor, "linf"),
    ("returns its input", conformance.check_kind_of_tensor, "linf"),
    ("attached", conformance.check_kind_of_tensor, "linf"),
    ("another dtype", conformance.check_kind_of_tensor, "linf"),
    ("not finite", conformance.check_images_are_feasible, "linf"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("norm", NORMS)
def test_the_twin_without_a_flaw_passes(norm: Norm, check: Check) -> None:
    with planted(ascent()) as entry:
        check(entry, norm)


@pytest.mark.parametrize(("flaw", "check", "norm"), FLAWS, ids=[f"{f}-{c.__name__[6:]}-{n}" for f, c, n in FLAWS])
def test_a_flawed_attack_fails(flaw: str, check: Check, norm: Norm) -> None:
    with planted(ascent(flaw)) as entry, pytest.raises((AssertionError, pytest.fail.Exception)):
        check(entry, norm)


def test_an_attack_without_a_row_is_asked_for_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other check runs on it as it is, on the defaults."""
    monkeypatch.delitem(conformance.CASES, "pgd")
    with planted(ascent()) as entry:
        conformance.check_breaks_just_beyond_the_radius(entry, "linf")
        with pytest.raises(AssertionError, match="add a row to CASES"):
            conformance.check_declared_budget(entry, "linf")


# ---- flaws in our own code


def test_argmin_for_argmax_in_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "reached", lambda z, y, *, targeted: (z.argmin(1) == y) == targeted)
    fails("pgd", conformance.check_never_breaks_within_the_radius)


def test_a_loss_of_the_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(name: gradient.LossName, *, targeted: bool, num_classes: int) -> Score:
        goal = score(name, targeted=targeted, num_classes=num_classes)
        return lambda z, y: -goal(z, y)

    monkeypatch.setattr(gradient, "score", flipped)
    for name in ("fgsm", "bim", "mim", "pgd"):
        fails(name, conformance.check_breaks_just_beyond_the_radius)


def test_a_projection_that_forgets_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Threat, "project", lambda threat, x, z: x + (z - x).clamp(-threat.budget, threat.budget))
    for name in ("fgsm", "bim", "mim", "pgd"):
        fails(name, conformance.check_images_are_feasible)


def test_a_judge_that_forgets_the_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Threat, "holds", lambda threat, x, z: torch.ones(len(x), dtype=torch.bool))
    fails("deepfool", conformance.check_never_breaks_within_the_radius, "l2")


def test_a_runner_that_freezes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "frozen", nullcontext)
    fails("pgd", conformance.check_model_is_restored)


def test_a_runner_that_attacks_what_is_wrong_already(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(ready: run.Prepared, job: run._Job, batch: run.Batch, notify: Notify) -> run.Outcome:
        with torch.no_grad():
            y = ready.judge(batch.x).argmax(1)
        return original(ready, job, run.Batch(batch.index, batch.x, y), notify)

    original = run._attack
    monkeypatch.setattr(run, "_attack", everything)
    fails("pgd", conformance.check_wrong_samples_stay_untouched)


def test_one_const_for_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Carlini-Wagner with a search that looks at the batch instead of the sample, as one finds it in the wild."""

    def coupled(x: Images, rungs: int, first: float, best: optimise.Smallest) -> Iterator[tuple[Scores, int]]:
        const = torch.full((len(x),), first, dtype=x.dtype)
        for rung in range(rungs):
            best.won.zero_()
            yield const, rung
            const = const / 2 if bool(best.won.any()) else const * 10

    monkeypatch.setattr(optimise, "_search", coupled)
    fails("cw", conformance.check_batch_mates_do_not_matter, "l2")


def test_momentum_shared_by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the mean loss are divided by the batch size: harmless for a sign, not for a sum of gradients."""
    original = gradient.climb_direction

    def coupled(
        model: nn.Module, x: Images, y: Labels, goal: Score, *, passes: int = 1
    ) -> tuple[Images, Tensor, Scores]:
        g, z, value = original(model, x, y, goal, passes=passes)
        return g + 1e-3 * g.mean(0, keepdim=True), z, value

    monkeypatch.setattr(gradient, "climb_direction", coupled)
    fails("mim", conformance.check_batch_mates_do_not_matter, "l2")


def fails(name: str, check: Check, norm: Norm = "linf") -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(attacks[name], norm)


@contextmanager
def planted(function: Attack) -> Generator[AttackEntry]:
    """The function registered in the place of pgd, so that the runner finds it and the row of pgd applies to it."""
    kept = attacks._entries.pop("pgd")
    try:
        attacks.register("pgd", Traits(norms=NORMS, targeted=True, random=True))(function)
        yield attacks["pgd"]
    finally:
        attacks._entries["pgd"] = kept
