"""The audit: worst case, intervals, curves and partial reports, recomputed by other means."""

import base64
import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

import toys
from alike import differences
from rempart.attacks import attack_data
from rempart.attacks.plan import plan
from rempart.audit import Audit, audit
from rempart.core.errors import Cancelled, SpecError, ThreatError
from rempart.core.events import Event, silent
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.report.schema import AttackChoice, AuditSpec, Curve, ModelCard, Report, unpack
from rempart.report.text import verdict

SHAPE = (1, 4, 4)
N = 40
ATTACKS = ("fgsm", "pgd", "deepfool")


def toy(classes: int = 4) -> tuple[Classifier, Data]:
    """A linear model and images of which about one in four is labelled wrongly."""
    model = toys.linear(SHAPE, classes)
    x = toys.images(SHAPE, N)
    y = toys.labels(model, x)
    y = torch.where(torch.arange(N) % 4 == 0, (y + 1) % classes, y)
    names = tuple(str(k) for k in range(classes))
    data = Data(
        source="toy", split="test", index=torch.arange(N) + 100, labels=y, shape=SHAPE, class_names=names,
        read=lambda numbers: x[numbers - 100],
    )  # fmt: skip
    return model, data


def card(model: Classifier) -> ModelCard:
    return ModelCard(
        source="toy", name="linear", digest="0", parameters=1, shape=model.shape, classes=model.class_names
    )


def request(threat: str, *names: str, **others: object) -> AuditSpec:
    choices = tuple(AttackChoice(name=name) for name in names or ATTACKS)
    return AuditSpec(model="toy", data="toy", threat=threat, attacks=choices, **others)  # type: ignore


def run(threat: str, *names: str, notify: Callable[[Event], None] = silent, **others: object) -> Audit:
    model, data = toy()
    result = audit(model, data, request(threat, *names, **others), card=card(model), notify=notify)
    assert result is not None
    return result


def images_of(name: str, threat: str) -> Tensor:
    """What the attack of `run` returns, by itself."""
    model, data = toy()
    return attack_data(model, data, Threat.parse(threat), name).x_adv


def truth(eps: float, classes: int = 4) -> np.ndarray:
    """Which samples stand at eps, from the closed form."""
    model, data = toy(classes)
    x = data.batch(torch.arange(N)).x
    right = (model(x).argmax(1) == data.labels).numpy()
    return right & (toys.radius(model, x, toys.labels(model, x), "linf").numpy() > eps)


def median_radius() -> float:
    model, data = toy()
    x = data.batch(torch.arange(N)).x
    return float(toys.radius(model, x, toys.labels(model, x), "linf").median())


def comparable(report: Report) -> dict[str, object]:
    """A report without what may differ between two runs."""
    timed = {"seconds": 0.0}
    attacks = tuple(result.model_copy(update=timed) for result in report.attacks)
    changed = {**timed, "created": "", "environment": {}, "attacks": attacks, "spec": None}
    return report.model_copy(update=changed).model_dump(exclude={"spec"})


def test_clean_and_worst_case_are_the_closed_form() -> None:
    eps = median_radius() * 1.001
    report = run(f"linf:{eps}").report
    standing = truth(eps)
    assert report.clean is not None and report.clean.k == truth(0).sum() and report.clean.n == N
    assert report.worst_case is not None and report.worst_case.k == standing.sum()
    assert report.samples is not None
    assert np.array_equal(report.samples.worst_case(), standing)
    assert report.samples.index == tuple(range(100, 100 + N)), "keyed by sample number"
    assert report.complete and report.not_run == ()


def test_worst_case_is_the_and_over_attacks_per_sample() -> None:
    report = run("linf:0.02", *ATTACKS, "bim").report
    assert report.samples is not None and report.worst_case is not None
    rows = [unpack(row) for row in report.samples.right.values()]
    assert len(rows) == 4
    assert report.worst_case.k == np.logical_and.reduce([unpack(report.samples.clean), *rows]).sum()
    assert all(report.worst_case.k <= result.accuracy.k for result in report.attacks)


def test_intervals_are_wilson() -> None:
    report = run("linf:0.02").report
    for rate in (report.clean, report.worst_case, *(result.accuracy for result in report.attacks)):
        assert rate is not None
        expected = binomtest(rate.k, rate.n).proportion_ci(0.95, method="wilson")
        assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_samples_wrong_at_first_count_as_broken_and_not_as_successes() -> None:
    result = run("linf:0.0001", "fgsm").report.attacks[0]
    right = int(truth(0).sum())
    assert result.accuracy.k == int(truth(0.0001).sum())
    assert result.success is not None and result.success.n == right


def test_norm_statistics_match_the_outcome() -> None:
    result = run("linf:0.02", "deepfool")
    stats, found = result.report.attacks[0].norms, images_of("deepfool", "linf:0.02")
    model, data = toy()
    x = data.batch(torch.arange(N)).x
    right = truth(0)
    exact = toys.radius(model, x, toys.labels(model, x), "linf").numpy()[right]
    assert stats is not None and stats.found == stats.n == right.sum()
    assert stats.median == pytest.approx(np.median(exact), rel=0.02)
    delta = (found - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert stats.rho2 == pytest.approx(float(delta[torch.from_numpy(right)].mean()), rel=1e-5)
    assert stats.median_low is not None and stats.median_high is not None
    assert stats.median_low <= stats.median <= stats.median_high


def test_minimum_norm_attacks_of_another_norm_are_judged_in_the_threat() -> None:
    result = run("linf:0.05", "cw")
    outcome = result.verdicts["cw"]
    assert result.report.attacks[0].norm == outcome.norm == "l2"
    inside = outcome.distance <= 0.05 + 1e-6
    assert torch.equal(outcome.success & outcome.attacked, outcome.found & outcome.attacked & inside)


def test_curves_fall_and_agree_with_the_closed_form() -> None:
    model, data = toy(classes=2)  # with two classes pgd climbs the one gap there is, so both curves have a closed form
    result = audit(model, data, request("linf:0.02", "deepfool"), card=card(model))
    assert result is not None
    report = result.report
    assert {curve.label for curve in report.curves} == {"deepfool, smallest perturbations", "pgd, eps sweep"}
    for curve in report.curves:
        counts = [rate.k for rate in curve.accuracy]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == truth(0, 2).sum() and curve.eps[0] == 0
        # an attack that lands within 2.5 % of the optimum lies between these two closed-form curves
        for eps, k in zip(curve.eps, counts, strict=True):
            assert truth(eps + 1e-6, 2).sum() <= k <= truth(eps * 0.975 - 1e-6, 2).sum()


def test_batch_size_changes_nothing() -> None:
    one, other = (run("linf:0.02", *ATTACKS, "pgd", batch_size=size).report for size in (7, 64))
    assert not list(differences(comparable(one), comparable(other)))  # a product of fewer rows is rounded otherwise


def test_the_same_spec_gives_the_same_report() -> None:
    assert comparable(run("l2:0.1", "pgd").report) == comparable(run("l2:0.1", "pgd").report)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Cancelled])
def test_an_interruption_keeps_what_was_finished(error: type[BaseException]) -> None:
    def stop(event: Event) -> None:
        if event.stage == "pgd":
            raise error

    whole, part = run("linf:0.02").report, run("linf:0.02", notify=stop).report
    assert not part.complete
    assert [result.label for result in part.attacks] == ["fgsm"]
    assert part.not_run == ("pgd", "deepfool", "eps sweep", "checks")
    assert part.clean == whole.clean and part.attacks[0].accuracy == whole.attacks[0].accuracy
    assert Report.model_validate_json(part.model_dump_json()) == part


def test_an_interruption_before_the_first_attack_leaves_no_worst_case() -> None:
    def stop(event: Event) -> None:
        raise Cancelled

    part = run("linf:0.02", notify=stop).report
    assert part.worst_case is None and part.clean is None and not part.complete


def test_examples_show_the_images_that_were_judged() -> None:
    result = run("linf:0.3", "pgd")
    assert 1 <= len(result.report.examples) <= 4
    _, data = toy()
    for example in result.report.examples:
        at = example.index - 100
        stored = np.asarray(Image.open(io.BytesIO(base64.b64decode(example.adversarial_png)))) / 255
        assert np.abs(stored - images_of("pgd", "linf:0.3")[at, 0].numpy()).max() <= 0.5 / 255 + 1e-6
        assert example.label == int(data.labels[at]) == example.predicted != example.adversarial
        assert 0 < example.distance <= 0.3 + 1e-6
        enlarged = np.asarray(Image.open(io.BytesIO(base64.b64decode(example.perturbation_png)))) / 255 - 0.5
        change = (images_of("pgd", "linf:0.3")[at] - data.batch(torch.tensor([at])).x[0])[0].numpy()
        assert np.abs(enlarged - change * example.amplification).max() <= 1 / 255


def test_eight_bit_judges_the_rounded_image() -> None:
    result = run("linf:0.02", "pgd", eight_bit=True)
    outcome, found, model = result.verdicts["pgd"], images_of("pgd", "linf:0.02"), toy()[0]
    x, y = toy()[1].batch(torch.arange(N)).x, toy()[1].labels
    stored = Threat(norm="linf", eps=0.02).quantise(x, found)
    assert torch.allclose(stored * 255, (stored * 255).round(), atol=1e-3)
    kept = int(((model(stored).argmax(1) == y) & outcome.correct).sum())
    rate = result.report.attacks[0].eight_bit
    assert rate is not None and rate.k == kept


def test_eight_bit_in_a_cascade_counts_what_survives_rounding_after_all_attacks_so_far() -> None:
    """At a budget of 0.4 levels no change survives rounding, so that each image is right after it as before."""
    model, data = toy()
    spec = AuditSpec(model="", data="", threat="linf:0.02", suite="fast", eight_bit=True, sweep=False, chunk=16)
    for threat, survive in (("linf:0.02", True), (f"linf:{0.4 / 255}", False)):
        result = audit(model, data, spec.model_copy(update={"threat": threat}), card=card(model))
        assert result is not None
        rates = [attack.eight_bit for attack in result.report.attacks if attack.label != "checks"]
        assert all(rate is not None and rate.n == N for rate in rates)
        exact = [attack.accuracy.k for attack in result.report.attacks][: len(rates)]
        for rate, k in zip(rates, exact, strict=True):
            assert rate is not None and rate.k >= k
            assert rate.k < truth(0).sum() if survive else rate.k == truth(0).sum()


def test_no_stamp_where_nothing_could_be_checked() -> None:
    model, data = toy()
    masked = replace(data, mask=lambda numbers: torch.ones((len(numbers), *SHAPE), dtype=torch.bool))
    blind = audit(model, masked, request("linf:0.02", "fgsm"), card=card(model))
    assert blind is not None and blind.report.complete and blind.report.stamp is None
    assert run("linf:0.02", "fgsm", "pgd").report.stamp is not None


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3])
def test_a_model_at_or_below_chance_is_never_valid(share: float) -> None:
    model, data = toy()
    known = model(data.batch(torch.arange(N)).x).argmax(1)
    labels = torch.where(torch.arange(N) < share * N, known, (known + 1) % 4)
    result = audit(model, replace(data, labels=labels), request("linf:0.02", "fgsm"), card=card(model))
    assert result is not None and result.report.stamp == "suspicious" and "clean accuracy" in result.report.fired
    check, clean = result.report.checks[0], result.report.clean
    assert clean is not None and clean.k == share * N
    assert check.evidence == {"accuracy": share, "low": clean.low, "high": clean.high, "chance": 0.25, "n": N}
    assert str(clean) in check.message and "chance is 25.0%" in check.message
    assert "--box" in verdict(result.report)
    assert ("may have failed" in verdict(result.report)) == (len(result.report.fired) > 1)


def test_a_model_in_double_precision_is_audited() -> None:
    model, data = toy()
    model.double()
    result = audit(model, data, request("linf:0.02", "fgsm", "pgd"), card=card(model))
    assert result is not None and result.error is None and result.report.complete
    assert result.report.worst_case is not None and abs(result.report.worst_case.k - int(truth(0.02).sum())) <= 1


def test_plans_number_repeated_labels_and_fill_in_defaults() -> None:
    threat = Threat.parse("linf:0.1")
    labels = [attack.label for attack in plan(request("linf:0.1", "pgd", "pgd", "bim"), threat, 4)[0]]
    assert labels == ["pgd", "pgd 2", "bim"]
    assert plan(request("linf:0.1", "pgd"), threat, 4)[0][0].options["steps"] == 40
    assert len(plan(AuditSpec(model="", data="", threat="linf:0.1"), threat, 4)[0]) == 2, "the suite fast by default"


@pytest.mark.parametrize(
    ("threat", "choice", "error", "message"),
    [
        ("linf:0.1", AttackChoice(name="pdg"), SpecError, "did you mean 'pgd'"),
        ("linf:0.1", AttackChoice(name="pgd", options={"step_size": 1}), SpecError, "unknown option 'step_size'"),
        ("linf:0.1", AttackChoice(name="pgd", options={"steps": 0}), SpecError, "steps=0"),
        ("linf", AttackChoice(name="pgd"), ThreatError, "a budget for pgd"),
        ("linf:8", AttackChoice(name="pgd"), ThreatError, "did you mean 8/255"),
    ],
)
def test_a_wrong_request_stops_before_anything_runs(
    threat: str, choice: AttackChoice, error: type[Exception], message: str
) -> None:
    model, data = toy()
    spec = AuditSpec(model="toy", data="toy", threat=threat, attacks=(choice,))

    def never(event: Event) -> None:
        raise AssertionError(event)

    with pytest.raises(error, match=message):
        audit(model, data, spec, card=card(model), notify=never)


def test_an_error_keeps_what_was_finished() -> None:
    def stop(event: Event) -> None:
        if event.stage == "pgd":
            raise RuntimeError("out of memory")

    result = run("linf:0.02", notify=stop)
    assert isinstance(result.error, RuntimeError) and not result.report.complete
    assert [attack.label for attack in result.report.attacks] == ["fgsm"]
    assert "out of memory" in result.report.notes[0]


def test_a_loss_undefined_for_so_few_classes_stops_before_anything_runs() -> None:
    choice = AttackChoice(name="pgd", options={"loss": "dlr"})
    with pytest.raises(SpecError, match="at least 3 classes"):
        plan(AuditSpec(model="", data="", threat="linf:0.1", attacks=(choice,)), Threat.parse("linf:0.1"), 2)


# ---- random models


class Jitter(torch.nn.Module):
    """Noise on the pixels, with a gradient that changes from pass to pass."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn_like(x) * x


def jittery(sigma: float) -> tuple[Classifier, Data]:
    model, data = toy()
    net = torch.nn.Sequential(Jitter(sigma), model.net)
    return Classifier(net, shape=SHAPE, num_classes=4).eval(), data


def test_attacks_on_a_random_model_take_mean_gradients_unless_told_how_many() -> None:
    names = ("fgsm", "pgd", "deepfool", "cascade", "apgd", "square", "pgd")
    choices = [AttackChoice(name=name, options={"steps": 3} if name == "pgd" else {}) for name in names]
    choices += [AttackChoice(name="pgd", options={"eot": 3}), AttackChoice(name="apgd", options={"eot": 1})]
    spec = AuditSpec(model="toy", data="toy", threat="linf:0.1", attacks=tuple(choices))
    threat = Threat.parse("linf:0.1")
    planned, notes = plan(spec, threat, 4, random=True)
    assert [attack.options.get("eot") for attack in planned] == [None, 20, None, 20, 20, None, 20, 3, 1]
    assert [attack.options["steps"] for attack in planned if attack.name == "pgd"] == [3, 3, 40]
    assert notes == ("The model is random: pgd, cascade, apgd climbed the mean gradient of 20 passes (eot=20).",)
    steady, none = plan(spec, threat, 4)
    assert [attack.options.get("eot") for attack in steady] == [None, 1, None, 1, 1, None, 1, 3, 1] and none == ()
    assert plan(request("linf:0.1", "fgsm", "square"), threat, 4, random=True)[1] == ()


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_an_audit_measures_whether_the_model_is_random_and_says_what_it_did(
    sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[int] = []

    def sweep(*_: object, eot: int, **__: object) -> Curve:
        swept.append(eot)
        return Curve(label="sweep", norm="linf", eps=(), accuracy=())

    monkeypatch.setattr("rempart.audit.sweep", sweep)
    model, data = jittery(sigma)
    spec = AuditSpec(
        model="toy", data="toy", threat="linf:0.1", attacks=(AttackChoice(name="pgd", options={"steps": 2}),), limit=8
    )
    result = audit(model, data.head(8), spec, card=card(model))
    assert result is not None
    passes = 20 if sigma else 1
    assert result.report.attacks[0].options["eot"] == passes and swept == [passes]
    noted = any("climbed the mean gradient of 20 passes" in note for note in result.report.notes)
    assert noted == bool(sigma)
    tried = result.report.attacks[0].tried
    assert tried and result.report.attacks[0].gradients == 2 * passes * tried


def test_progress_names_attack_and_threat() -> None:
    told: list[Event] = []
    run("linf:0.02", "pgd", notify=told.append)
    named = {event.stage: {e.note for e in told if e.stage == event.stage} for event in told}
    assert named["pgd"] == {"linf:0.02, samples 100 to 139"}
    assert len(named["eps sweep"]) > 2 and all(note.startswith("pgd linf:") for note in named["eps sweep"])
    searches = [note for stage, notes in named.items() if stage.startswith("check ") for note in notes]
    assert searches and all(note.split(" linf:")[1:] for note in searches)
