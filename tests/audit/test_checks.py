"""The parts of the checks: straight-through gradients, searches on another model, tests of pairs, the stamp."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

import toys
from audit.planted import before, behind
from rempart.attacks import Outcome, Verdict, attack_batch, attack_data
from rempart.attacks.losses import climb_direction, score
from rempart.attacks.preflight import above_chance
from rempart.audit import checks, remedies
from rempart.audit.checks import RULES, diagnose, stamp
from rempart.core.errors import Cancelled, ModelError
from rempart.core.model import Classifier, frozen
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.report.schema import ACCURACY, Check

SHAPE = (1, 4, 4)
N = 40


def given(model: Classifier, n: int = N) -> Data:
    x = toys.images(model.shape, n)
    return Data(
        source="toy", split="test", index=torch.arange(n) + 100, labels=toys.labels(model, x), shape=model.shape,
        class_names=tuple(map(str, range(model.num_classes))), read=lambda numbers: x[numbers - 100],
    )  # fmt: skip


def around(model: Classifier, data: Data, factor: float = 1.0) -> Threat:
    x = data.batch(torch.arange(len(data))).x
    return Threat(norm="linf", eps=factor * float(toys.radius(model, x, data.labels, "linf").median()))


def statuses(found: checks.Diagnosis) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


# ---- straight through


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (torch.round, lambda x: torch.ones_like(x)),
        (lambda x: x.floor(), lambda x: torch.ones_like(x)),
        (lambda x: torch.ceil(input=x), lambda x: torch.ones_like(x)),
        (lambda x: (x * 3).trunc_(), lambda x: torch.full_like(x, 3)),
        (lambda x: torch.round(x, decimals=1), lambda x: torch.ones_like(x)),
        (torch.sign, lambda x: (x.abs() <= 1).to(x)),
        (lambda x: (x * 1).sign_(), lambda x: (x.abs() <= 1).to(x)),
        (lambda x: torch.heaviside(x, torch.zeros(1)), lambda x: (x.abs() <= 1).to(x) / 2),
        (lambda x: x.sin(), lambda x: x.cos()),
    ],
)
def test_straight_through_keeps_values_and_passes_gradients(function, slope) -> None:
    x = torch.linspace(-2.3, 2.3, 21, requires_grad=True)
    with remedies.straight_through():
        y = function(x)
    assert torch.equal(y, function(x.detach().clone()))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, slope(x.detach()))
    assert torch.autograd.grad(torch.round(x).sum(), x)[0].abs().sum() == 0, "and only inside the context"


def test_a_quantised_linear_model_gets_the_gradient_of_the_linear_one() -> None:
    plain = toys.linear(SHAPE)
    masked = before(plain, lambda x: (x * 255).round() / 255)
    x = toys.images(SHAPE)
    y = toys.labels(plain, x)
    goal = score("margin", targeted=False, num_classes=3)
    with frozen(masked):
        gradient, z, _ = climb_direction(remedies.through_rounding(masked), x, y, goal)
        assert torch.equal(z, masked(x))
    assert torch.allclose(gradient, climb_direction(plain, x, y, goal)[0], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_smoothed_and_rescaled_gradients_of_a_linear_model_are_its_own(norm) -> None:
    plain = toys.linear(SHAPE)
    x = toys.images(SHAPE)
    y = toys.labels(plain, x)
    goal = score("margin", targeted=False, num_classes=3)
    expected, logits, _ = climb_direction(plain, x, y, goal)
    gradient, z, _ = climb_direction(remedies.smoothed(plain, Threat(norm=norm, eps=0.01)), x, y, goal)
    assert torch.equal(z, logits) and torch.allclose(gradient, expected, atol=1e-5)
    gradient, _, _ = climb_direction(remedies.rescaled(plain, 7.0), x, y, goal)
    assert torch.allclose(gradient * 7, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5, 2), (1, 3, 4, 5), (2, 7)])
def test_a_surrogate_learns_any_shape_and_leaves_the_random_state(
    shape, untouched_rng: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toys.linear(shape)
    x = torch.rand((64, *shape), generator=torch.Generator().manual_seed(0))
    with frozen(model):
        monkeypatch.setattr(remedies, "_STEPS", 3)
        first, again = (remedies.surrogate(model, x, width=0.1, seed=3) for _ in range(2))
        assert torch.equal(first(x), again(x))
        monkeypatch.setattr(remedies, "_STEPS", 100)
        learned = remedies.surrogate(model, x, width=0.1, seed=3)
        assert remedies.agreement(model, learned, x) > max(0.8, remedies.agreement(model, first, x))


# ---- searching on one model, judging by another


def test_the_model_judges_what_was_searched_on_another() -> None:
    model, other = toys.linear(SHAPE), toys.linear(SHAPE, seed=5)
    data = given(model)
    batch, threat = data.batch(torch.arange(N)), around(model, given(model))
    found = attack_batch(model, batch.x, batch.y, threat, "fgsm", search=other)
    with torch.no_grad():
        assert torch.equal(found.broken, model(found.x_adv).argmax(1) != batch.y)
    own = attack_batch(model, batch.x, batch.y, threat, "fgsm")
    assert int(own.broken.sum()) > int(found.broken.sum())
    goal = score("ce", targeted=False, num_classes=3)
    step = climb_direction(other, batch.x, batch.y, goal)[0].sign() * threat.budget
    assert torch.allclose(found.x_adv, batch.x + step, atol=1e-6)


def test_pgd_with_mean_gradients_asks_for_each_of_them() -> None:
    model = toys.linear(SHAPE)
    data = given(model)
    once, often = (attack_data(model, data, around(model, data), "pgd", {"steps": 5, "eot": k}) for k in (1, 4))
    assert torch.allclose(once.x_adv, often.x_adv, atol=1e-5), "all draws are the same for a fixed model"
    assert often.gradients == 4 * once.gradients


# ---- the diagnosis


def test_checks_come_in_order_and_are_the_same_every_time(untouched_rng: None) -> None:
    model = toys.linear(SHAPE)
    data, state = given(model), {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    threat = around(model, data)
    found, again = (diagnose(model, data, threat, {}, thorough=True, batch_size=size) for size in (64, 64))
    assert [check.name for check in found.checks] == [rule.name for rule in RULES]
    assert found.checks == again.checks
    assert model.training and all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    cheap = diagnose(model, data, threat, {}, thorough=False)
    assert [check.name for check in cheap.checks] == [rule.name for rule in RULES if not rule.thorough]
    assert all(check.reading for check in found.checks)
    assert all(torch.isin(verdict.index, data.index).all() for verdict in found.outcomes.values())


def test_without_a_budget_only_what_needs_none_is_checked() -> None:
    model = toys.linear(SHAPE)
    found = statuses(diagnose(model, given(model), Threat(norm="l2"), {}, thorough=True))
    assert {name for name, status in found.items() if status != "skipped"} == {
        rule.name for rule in RULES if not rule.budget
    }


def test_a_remedy_that_the_model_does_not_bear_is_left_out() -> None:
    plain = toys.linear(SHAPE)
    model = behind(before(plain, lambda x: x.float()), lambda z: 1e6 * z)
    data = given(model)
    with pytest.raises(ModelError, match=r"[Ff]loat.*[Dd]ouble|[Dd]ouble.*[Ff]loat"):
        attack_data(model, data, around(plain, data), "pgd", {"steps": 1}, search=remedies.rescaled(model, 1.0))
    found = diagnose(model, data, around(plain, data), {}, thorough=False)
    check = next(check for check in found.checks if check.name == "naive gradients")
    assert check.status != "passed" and "remedy: other losses" in found.outcomes
    assert "remedy: rescaled logits" not in found.outcomes
    assert "skipped" not in statuses(found).values()


@pytest.mark.parametrize(("error", "told"), [(ValueError("no\nmore"), "ValueError: no"), (Cancelled(), None)])
def test_a_check_that_breaks_down_is_skipped_and_the_others_stand(
    error: Exception, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Outcome:
        raise error

    model = toys.linear(SHAPE)
    data = given(model)
    verdicts = {"pgd": attack_data(model, data, around(model, data), "pgd").verdict}
    monkeypatch.setattr(checks, "attack_data", broken)
    if told is None:
        with pytest.raises(Cancelled):
            diagnose(model, data, around(model, data), verdicts, thorough=False)
        return
    found = {check.name: check for check in diagnose(model, data, around(model, data), verdicts, thorough=False).checks}
    assert found["large budgets"].status == found["silent success"].status == "skipped"
    assert found["large budgets"].message == f"It could not be made: {told}"
    assert found["zero gradients"].status == found["local linearity"].status == "passed"


def test_no_pass_has_more_images_than_a_batch() -> None:
    sizes: list[int] = []

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return (x * 255).round() / 255  # sets off remedies

    model = before(behind(toys.linear(SHAPE), lambda z: 1e6 * z), counted)
    data = given(model)
    sizes.clear()
    diagnosis = diagnose(model, data, around(toys.linear(SHAPE), data), {}, thorough=True, batch_size=7)
    assert {"remedy: rescaled logits", "remedy: surrogate gradient", "probe: transfer"} <= set(diagnosis.outcomes)
    assert "skipped" not in statuses(diagnosis).values()
    assert max(sizes) == 7


def test_a_model_that_is_never_right_is_not_checked() -> None:
    model = toys.linear(SHAPE)
    data = replace(given(model), labels=(given(model).labels + 1) % 3)
    assert set(statuses(diagnose(model, data, Threat(norm="linf", eps=0.1), {}, thorough=False)).values()) == {
        "skipped"
    }


def without(verdict: Verdict, keep: Tensor) -> Verdict:
    """The verdict with only some of its finds."""
    return replace(verdict, broken=verdict.broken & keep, success=verdict.success & keep, found=verdict.found & keep)


def test_an_audit_too_weak_is_invalid_and_the_probe_tells_by_how_much() -> None:
    model = toys.linear(SHAPE)
    data = given(model)
    threat = around(model, data, 1.01)
    some = attack_data(model, data, threat, "pgd").verdict
    weak = without(some, torch.zeros(N, dtype=torch.bool))
    truth = toys.radius(model, data.batch(torch.arange(N)).x, data.labels, "linf") <= threat.budget
    strong = replace(some, broken=truth)
    found = diagnose(model, data, threat, {"pgd": weak}, thorough=True)
    check = next(check for check in found.checks if check.name == "other losses")
    assert check.status == "failed" and stamp(found.checks) == "invalid"
    assert 0 < check.evidence["added to the audit"] <= int(truth.sum())
    assert check.evidence["union"] * N <= int(truth.sum()) + 1e-6
    assert check.remedy is not None and N - int(truth.sum()) <= check.remedy.after.k < check.remedy.before.k == N
    assert statuses(diagnose(model, data, threat, {"pgd": strong}, thorough=True))["other losses"] == "passed"


def test_what_plain_pgd_breaks_too_is_no_merit_of_a_remedy() -> None:
    """An ordinary model after a weak attack: its gradients are fine, and the report says what was wrong."""
    model = behind(toys.linear(SHAPE), lambda z: 1e6 * z)
    data = given(model)
    threat = around(model, data, 1.01)
    weak = {"pgd": attack_data(model, data, threat, "pgd", {"steps": 1, "step": 0.001}).verdict}
    truth = toys.radius(toys.linear(SHAPE), data.batch(torch.arange(N)).x, data.labels, "linf") <= threat.budget
    found = diagnose(model, data, threat, weak, thorough=False)
    check = next(check for check in found.checks if check.name == "naive gradients")
    assert check.status == "failed" and check.remedy is not None
    assert check.remedy.name == "more steps" and "too weak" in check.remedy.message
    assert check.remedy.before.k == N - int(weak["pgd"].broken.sum()) > check.remedy.after.k == N - int(truth.sum())
    strong = {"pgd": attack_data(model, data, threat, "pgd", {"loss": "margin"}).verdict}
    assert statuses(diagnose(model, data, threat, strong, thorough=False))["naive gradients"] == "warned"


def test_attacks_without_gradients_that_do_better_are_seen_also_in_a_cascade() -> None:
    model = toys.linear(SHAPE)
    data = given(model)
    threat = around(model, data, 1.01)
    strong = attack_data(model, data, threat, "pgd").verdict
    half = without(strong, torch.arange(N) < N // 2)
    ahead = int((strong.broken & ~half.broken).sum())
    rest = half.right.nonzero()[:, 0]
    blind = attack_data(model, data.take(rest), threat, "pgd").verdict  # stands for the attack named
    names = [entry.name for entry in checks.attacks if entry.traits.access != "gradients"]
    if not names:
        pytest.skip("no attack without gradients is registered")
    found = diagnose(model, data, threat, {"pgd": half, names[0]: blind}, thorough=False)
    check = next(check for check in found.checks if check.name == "without gradients")
    assert check.status == "failed" and check.evidence["without gradients alone"] == ahead


def test_one_step_that_does_better_is_seen() -> None:
    model = toys.linear(SHAPE)
    data = given(model)
    threat = around(model, data, 1.01)
    single = attack_data(model, data, threat, "fgsm").verdict
    verdicts = {"fgsm": single, "bim": without(single, torch.zeros(N, dtype=torch.bool))}
    assert statuses(diagnose(model, data, threat, verdicts, thorough=False))["one step against many"] == "failed"
    verdicts["bim"] = single
    assert statuses(diagnose(model, data, threat, verdicts, thorough=False))["one step against many"] == "passed"


def test_an_attack_that_does_not_return_what_it_met_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.linear(SHAPE)
    data = given(model)
    threat = around(model, data, 1.2)
    assert statuses(diagnose(model, data, threat, {}, thorough=False))["silent success"] == "passed"

    def forgetful(model, x, y, threat, *, steps=10, early_stop=False, targeted=False, rng=None, notify=None, **_):
        found = x
        for _ in range(steps + 1):  # walks there and back
            with torch.no_grad():
                model(found)
            goal = score("ce", targeted=False, num_classes=3)
            found = threat.project(x, x + climb_direction(model, x, y, goal)[0].sign() * threat.budget)
        return x.clone()

    run = checks.attack_data
    monkeypatch.setattr(
        checks,
        "attack_data",
        lambda m, d, t, attack, options, **others: run(
            m, d, t, forgetful if "early_stop" not in options else attack, options, **others
        ),
    )
    assert statuses(diagnose(model, data, threat, {}, thorough=False))["silent success"] == "warned"


@pytest.mark.parametrize(
    ("gain", "n", "overturned"),
    [(0, 64, False), (1, 64, False), (2, 64, True), (1, 10, False), (2, 10, True), (5, 200, False), (6, 200, True)],
)
def test_a_fixed_model_is_overturned_by_two_finds_and_three_points(gain: int, n: int, overturned: bool) -> None:
    bench = bench_of(n)
    assert checks._beaten(bench, torch.arange(n) < gain) == (gain, overturned)
    beside = torch.arange(n) < 1
    assert checks._beaten(bench, torch.arange(n) < gain + 1, beside)[0] == gain, "what the control breaks is no merit"


@pytest.mark.parametrize(
    ("gain", "loss", "n"), [(0, 0, 64), (6, 0, 64), (7, 0, 64), (7, 1, 64), (20, 9, 64), (7, 0, 300)]
)
def test_a_random_model_is_overturned_by_the_exact_paired_test(gain: int, loss: int, n: int) -> None:
    bench = bench_of(n)
    bench.random = True
    broken, beside = torch.arange(n) < gain, torch.arange(n) >= n - loss
    level = binomtest(gain, gain + loss, 0.5, "greater").pvalue if gain else 1.0
    assert checks._beaten(bench, broken, beside) == (gain, level < 0.01 and gain - loss >= 0.03 * n)


def bench_of(n: int) -> checks._Bench:
    model = toys.linear(SHAPE)
    bench = checks._bench(model, given(model, n), Threat(norm="linf", eps=0.0), {}, n, 64, 0)
    assert bench is not None
    return bench


def test_the_stamp() -> None:
    def of(*given: str) -> str:
        return stamp([Check(name="a", status=status, message="") for status in given])  # type: ignore

    assert of() == of("passed", "skipped", "repaired") == "valid"
    assert of("passed", "warned") == "suspicious"
    assert of("warned", "failed") == "invalid"


def test_the_page_on_reading_a_report_has_every_check_in_order() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reading-a-report.md").read_text("utf-8")
    told = page.partition("## Checks after the attacks")[2].partition("\n## ")[0]
    names = [line.split("|")[1].strip() for line in told.splitlines() if line.count("|") == 5]
    rules = [f"{rule.name} (thorough)" if rule.thorough else rule.name for rule in RULES]
    assert names[2:] == [ACCURACY, *rules]


@pytest.mark.parametrize(
    ("true", "predicted", "status"),
    [
        ([0, 1] * 20, [0, 1] * 20, "passed"),
        ([0, 1] * 20, [1, 0] * 20, "warned"),
        ([0, 1] * 20, [0, 0] * 20, "warned"),
        ([0] * 36 + [1] * 4, [0] * 40, "warned"),  # 90 % right, by one answer to everything
        ([0] * 36 + [1] * 4, [0] * 39 + [1], "passed"),
        ([0] * 40, [0] * 40, "passed"),  # images of one class alone say nothing of the others
        ([0, 1] * 20, [0, 1] * 12 + [0, 0] * 8, "passed"),  # 32 of 40 right: Wilson's interval begins at 65 %
        ([0, 1] * 20, [0, 1] * 4 + [0, 0] * 16, "warned"),  # 24 of 40 right: it begins at 45 %
    ],
)
def test_accuracy_is_above_chance_where_its_interval_is_and_answers_differ(true, predicted, status) -> None:
    check = above_chance(np.array(true), np.array(predicted), ("cat", "dog"))
    assert check.status == status
    assert ("taken for cat" in check.message) == (len(set(predicted)) == 1 < len(set(true)))
    assert ("too few to tell" in check.message) == (check.evidence["accuracy"] == 0.6)
