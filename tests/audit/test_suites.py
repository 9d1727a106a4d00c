"""The suites on every kind of classifier the field knows, against the closed form; and their protocols, by heart."""

import pytest
import torch
from torch import nn

import toys
from rempart.attacks.plan import plan
from rempart.attacks.suites import SUITES, suite
from rempart.audit import audit
from rempart.core.errors import SpecError
from rempart.core.model import Classifier
from rempart.core.threat import NORMS, Norm, Threat
from rempart.data import Data
from rempart.report.schema import AuditSpec, ModelCard

KINDS = {
    "2 classes": lambda: toys.linear((1, 6, 6), 2),
    "3 classes": lambda: toys.linear((1, 6, 6), 3),
    "4 classes": lambda: toys.linear((1, 6, 6), 4),
    "9 classes": lambda: toys.linear((1, 6, 6), 9),
    "one logit": lambda: toys.one_logit((1, 6, 6)),
    "volume": lambda: toys.linear((1, 4, 4, 4), 4),
    "colour": lambda: toys.linear((3, 6, 5), 10),
}


def verdict(model: Classifier, name: str, norm: Norm, n: int = 10) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Which samples stand after the suite, their closed-form radii, and the budget: the median radius."""
    x = toys.images(model.shape, n)
    y = toys.labels(model, x)
    radius = toys.radius(model, x, y, norm)
    eps = float(radius.sort().values[n // 2 - 1 : n // 2 + 1].mean())
    data = Data("toy", "test", torch.arange(n), y, model.shape, model.class_names, lambda numbers: x[numbers])
    card = ModelCard(source="", name="", digest="", parameters=0, shape=model.shape, classes=model.class_names)
    spec = AuditSpec(model="", data="", threat=f"{norm}:{eps!r}", suite=name, sweep=False)
    result = audit(model, data, spec, card=card)
    assert result is not None and result.report.samples is not None
    assert (
        result.report.complete
        and result.report.notes == suite(name, Threat(norm=norm, eps=eps), len(card.classes)).notes
    )
    return torch.from_numpy(result.report.samples.worst_case()), radius, eps


@pytest.mark.parametrize("name", ["fast", "standard"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_suite_finds_the_truth_for_every_kind_of_classifier(kind: str, name: str) -> None:
    stands, radius, eps = verdict(KINDS[kind](), name, "linf")
    assert bool(stands[radius > 1.001 * eps].all()), "broken where nothing can be"
    assert not bool(stands[radius < 0.99 * eps].any()), "left standing within the budget"
    assert 0 < int(stands.sum()) < len(stands)


@pytest.mark.parametrize("name", ["fast", "standard"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_suite_finds_the_truth_in_every_norm(norm: Norm, name: str) -> None:
    stands, radius, eps = verdict(toys.linear((1, 6, 6), 10), name, norm)
    assert bool(stands[radius > 1.001 * eps].all())
    assert not bool(stands[radius < (0.98 if norm == "l2" else 0.9) * eps].any())


def test_standard_is_the_protocol_of_autoattack() -> None:
    """Croce & Hein 2020: order and budgets; l1 as in their code."""
    linf = suite("standard", Threat(norm="linf", eps=0.1), 10)
    assert linf.cascade and linf.notes == ()
    assert linf.members == (
        ("apgd", {"loss": "ce"}),
        ("apgd-t", {"targets": 9}),
        ("fab-t", {"targets": 9, "within": 0.1}),
        ("square", {}),
    )
    options = [a.options for a in plan(request("standard"), Threat(norm="linf", eps=0.1), 10)[0]]
    assert [o.get("steps", o.get("queries")) for o in options] == [100, 100, 100, 5000]
    assert [o.get("restarts") for o in options] == [1, 1, 1, 1]
    l1 = dict(suite("standard", Threat(norm="l1", eps=12), 10).members)
    assert l1["apgd"] == {"loss": "ce", "restarts": 5, "large_steps": True}
    assert l1["apgd-t"] == {"targets": 5, "large_steps": True}


def test_plus_and_rand_are_those_of_autoattack() -> None:
    threat = Threat(norm="l2", eps=0.5)
    names = [name for name, _ in suite("plus", threat, 10).members]
    assert names == ["apgd", "apgd", "fab", "square", "apgd-t", "fab-t"]
    assert [options.get("restarts") for _, options in suite("plus", threat, 10).members[:3]] == [5, 5, 5]
    rand = suite("rand", threat, 10).members
    assert [(o["loss"], o["eot"]) for _, o in rand] == [("ce", 20), ("dlr", 20)]


@pytest.mark.parametrize(
    ("classes", "loss", "targets"), [(2, "margin", 1), (3, "margin", 2), (4, "dlr", 3), (9, "dlr", 8)]
)
def test_targets_and_losses_follow_the_number_of_classes(classes: int, loss: str, targets: int) -> None:
    threat = Threat(norm="linf", eps=0.1)
    planned, notes = plan(request("standard"), threat, classes)
    options = {attack.name: attack.options for attack in planned}
    assert options["apgd-t"]["loss"] == loss and options["apgd-t"]["targets"] == options["fab-t"]["targets"] == targets
    assert any("margin instead" in note for note in notes) == (loss == "margin")
    assert any("where the protocol has 9" in note for note in notes)


@pytest.mark.parametrize("name", list(SUITES))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_every_suite_has_valid_options(name: str, norm: Norm, classes: int) -> None:
    planned, _ = plan(request(name), Threat(norm=norm, eps=0.1), classes)
    assert len({attack.label for attack in planned}) == len(planned)


@pytest.mark.parametrize("name", ["fast", "standard"])
def test_a_budget_of_nothing_breaks_nothing(name: str) -> None:
    model = toys.linear((1, 4, 4), 4)
    x = toys.images(model.shape, 6)
    data = Data("toy", "test", torch.arange(6), toys.labels(model, x), model.shape, model.class_names, lambda k: x[k])
    card = ModelCard(source="", name="", digest="", parameters=0, shape=model.shape, classes=model.class_names)
    result = audit(model, data, AuditSpec(model="", data="", threat="linf:1e-9", suite=name), card=card)
    assert result is not None and result.error is None and result.report.worst_case is not None
    assert result.report.worst_case.k == 6


@pytest.mark.parametrize("name", ["fast", "rand"])
def test_noise_alone_is_no_adversary(name: str) -> None:
    """At a budget of nearly nothing, the worst case of a random model is its accuracy, however many attacks run."""
    clean = toys.linear((1, 4, 4), 3)
    model = Classifier(nn.Sequential(clean.net, _Noise()), shape=clean.shape, num_classes=3)
    x = toys.images(model.shape, 60)
    y = toys.labels(clean, x)
    data = Data("toy", "test", torch.arange(60), y, model.shape, model.class_names, lambda k: x[k])
    card = ModelCard(source="", name="", digest="", parameters=0, shape=model.shape, classes=model.class_names)
    spec = AuditSpec(model="", data="", threat="linf:1e-7", suite=name, sweep=False)
    result = audit(model, data, spec, card=card)
    assert result is not None and result.report.worst_case is not None and result.report.clean is not None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        once = float((model(x).argmax(1) == y).double().mean())
    assert 0.7 < once < 0.97, "the noise should matter"
    assert result.report.clean.k - result.report.worst_case.k <= 6
    again = audit(model, data, spec, card=card)
    assert again is not None and again.report.checks == result.report.checks, "the same seed, other checks"


class _Noise(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + 0.3 * z.std() * torch.randn_like(z)


def test_suites_need_a_budget_where_their_attacks_do() -> None:
    with pytest.raises(SpecError, match="a budget for"):
        plan(request("standard"), Threat(norm="linf"), 10)


def request(name: str) -> AuditSpec:
    return AuditSpec(model="", data="", threat="linf:0.1", suite=name)
