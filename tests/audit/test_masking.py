"""Models that hide their gradients, each in another way, are flagged by the right check; honest ones are not."""

from collections.abc import Callable

import pytest
import torch

from audit.planted import THREAT, Reversed, Rounded, Trained, audited, before, behind
from rempart.audit import audit
from rempart.audit.checks import Diagnosis, diagnose, stamp
from rempart.core.model import Classifier
from rempart.report.schema import AuditSpec, Check, ModelCard, Report


def noise(x: torch.Tensor) -> torch.Tensor:
    return x + 0.2 * torch.randn_like(x)


PLANTED: dict[str, tuple[Callable[[Trained], Classifier], dict[str, str]]] = {
    "logits times 1000": (lambda t: behind(t.plain, lambda z: 1000 * z), {"naive gradients": "warned"}),
    "exploding logits": (  # on some images, rescaled logits break two more: a find, which fails the check
        lambda t: behind(t.plain, lambda z: z.sign() * z.abs().exp()),
        {"naive gradients": "warned or failed"},
    ),
    "bounded outputs": (lambda t: behind(t.plain, lambda z: (3 * z).tanh()), {"probabilities": "failed"}),
    "quantiser": (
        lambda t: before(t.plain, lambda x: (x * 8).round() / 8),
        {"zero gradients": "failed", "without gradients": "failed", "large budgets": "failed"},
    ),
    "noise inside": (lambda t: before(t.plain, noise), {"randomness": "warned"}),
    "flat loss": (lambda t: t.flat, {"local linearity": "warned"}),
    "reversed gradients": (
        lambda t: before(t.plain, Reversed.apply),
        {"local linearity": "failed", "large budgets": "failed", "without gradients": "failed"},
    ),
}


def found(model: Classifier, trained: Trained, *, thorough: bool = False) -> Diagnosis:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        verdicts = audited(model, trained.data)
        return diagnose(model, trained.data, THREAT, verdicts, thorough=thorough)


def flagged(diagnosis: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in diagnosis.checks if check.status in ("warned", "failed")}


@pytest.mark.parametrize("name", ["plain", "hardened"])
@pytest.mark.parametrize("thorough", [False, True])
def test_an_honest_network_passes_every_check(name: str, thorough: bool, trained: Trained) -> None:
    diagnosis = found(getattr(trained, name), trained, thorough=thorough)
    assert flagged(diagnosis) == {}
    assert stamp(diagnosis.checks) == "valid"


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_flagged_by_its_check(name: str, trained: Trained) -> None:
    made, expected = PLANTED[name]
    diagnosis = found(made(trained), trained)
    flags = {key: check.status for key, check in flagged(diagnosis).items()}
    assert all(flags[check] in status.split(" or ") for check, status in expected.items())
    if name in ("logits times 1000", "exploding logits", "flat loss", "noise inside"):
        assert set(flags) == set(expected), "and by no other"
    assert stamp(diagnosis.checks) == ("invalid" if "failed" in flags.values() else "suspicious")


def test_without_its_stairs_the_flat_network_passes(trained: Trained) -> None:
    honest = Classifier(trained.flat.net[1:], shape=(1, 8, 8), num_classes=10)  # type: ignore
    assert "local linearity" not in flagged(found(honest, trained))


def test_a_quantiser_with_gradients_of_its_own_is_no_fault_of_gradients(trained: Trained) -> None:
    assert set(flagged(found(before(trained.plain, Rounded.apply), trained))) <= {
        "local linearity",
        "without gradients",
    }


def test_a_little_scale_is_ordinary_confidence(trained: Trained) -> None:
    assert flagged(found(behind(trained.plain, lambda z: 3 * z), trained)) == {}


def test_the_remedy_of_a_quantiser_finds_what_an_attack_with_its_gradients_finds(trained: Trained) -> None:
    masked = before(trained.plain, lambda x: (x * 8).round() / 8)
    remedy = flagged(found(masked, trained))["zero gradients"].remedy
    assert remedy is not None and remedy.name == "straight through"
    known = before(trained.plain, Rounded.apply)
    diagnosis = diagnose(known, trained.data, THREAT, audited(known, trained.data), thorough=False)
    index = next(iter(found(masked, trained).outcomes.values())).index
    verdicts = audited(known, trained.data)
    right = torch.stack([v.right for v in verdicts.values()]).all(0)
    truth = right[torch.isin(verdicts["pgd"].index, index)].double().mean()
    assert remedy.before.value > 0.9
    assert remedy.after.value == pytest.approx(float(truth), abs=0.1)
    assert "zero gradients" not in flagged(diagnosis)


def test_reversed_gradients_are_helped_by_a_surrogate(trained: Trained) -> None:
    flags = flagged(found(before(trained.plain, Reversed.apply), trained, thorough=True))
    assert flags["transfer"].status == "failed"
    remedy = flags["large budgets"].remedy
    assert remedy is not None and remedy.name == "surrogate gradient"
    assert remedy.after.value < remedy.before.value - 0.2


IN_AN_AUDIT = {
    "bounded outputs": "probabilities",
    "logits times 1000": "naive gradients",
    "exploding logits": "naive gradients",
    "quantiser": "zero gradients",
    "noise inside": "randomness",
    "flat loss": "local linearity",
    "reversed gradients": "large budgets",
}


def whole(model: Classifier, trained: Trained) -> Report:
    spec = AuditSpec(model="", data="", threat="linf:0.1", suite="fast", sweep=False)
    card = ModelCard(source="", name="", digest="0", parameters=1, shape=model.shape, classes=model.class_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = audit(model, trained.data.head(40), spec, card=card)
    assert result is not None and result.report.complete
    return result.report


@pytest.mark.parametrize("name", PLANTED)
def test_an_audit_says_of_a_planted_fault_that_its_figures_may_be_too_high(name: str, trained: Trained) -> None:
    report = whole(PLANTED[name][0](trained), trained)
    assert report.stamp != "valid"
    assert IN_AN_AUDIT[name] in report.fired


@pytest.mark.parametrize("name", ["plain", "hardened"])
def test_an_audit_of_an_honest_network_is_valid(name: str, trained: Trained) -> None:
    report = whole(getattr(trained, name), trained)
    assert report.stamp == "valid" and report.fired == ()


def test_probabilities_are_mended_before_the_checks(trained: Trained) -> None:
    report = whole(behind(trained.plain, lambda z: z.softmax(1)), trained)
    assert {check.name: check.status for check in report.preflight}["logits"] == "repaired"
