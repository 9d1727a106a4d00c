"""Randomised smoothing against closed forms: for an affine model of two classes everything about it is known."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import toys
from rempart.attacks import attack_batch
from rempart.attacks.preflight import preflight
from rempart.certify import (
    ABSTAIN,
    Certificates,
    Sampling,
    _votes,
    attack_smoothed,
    bracketed,
    certified_curve,
    certify,
    certify_groups,
    covering,
    predict,
    section,
    smoothed,
)
from rempart.core.errors import Cancelled, DataError, ModelError, SpecError, ThreatError
from rempart.core.events import Event
from rempart.core.model import Classifier, Normalize
from rempart.core.threat import NORMS, Norm, Threat, vector_norm
from rempart.data import Data, open_data


def data_of(model: Classifier, x: Tensor, y: Tensor, numbers: Tensor | None = None) -> Data:
    numbers = torch.arange(len(x)) if numbers is None else numbers
    row = {int(number): at for at, number in enumerate(numbers)}
    return Data("toy", "test", numbers, y, model.shape, model.class_names, lambda i: x[[row[int(k)] for k in i]])


def affine(n: int = 24) -> tuple[Classifier, Data, Tensor, float]:
    """A model of two classes, images, their distances from the boundary, and a sigma in the middle of those."""
    model = toys.linear(classes=2)
    x = toys.images(model.shape, n)
    y = toys.labels(model, x)
    distance = toys.radius(model, x, y, "l2")
    return model, data_of(model, x, y), distance, float(distance.median())


def on_the_boundary(n: int) -> tuple[Classifier, Data]:
    """Class 1 where the first pixel is above 1/2, and images where it is 1/2: a fair coin under noise."""
    model = toys.one_logit((1, 2, 2))
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        layer.bias.fill_(-0.5)
    x = torch.full((n, 1, 2, 2), 0.5)
    return model, data_of(model, x, torch.zeros(n, dtype=torch.int64))


# ---- the certificate


def test_an_affine_model_is_certified_up_to_its_distance_and_never_further() -> None:
    """P(class) = Phi(distance / sigma) exactly, so that the certified radius tends to the distance from below."""
    model, data, distance, sigma = affine()
    table = certify(model, data, sigma=sigma, samples=20_000)
    assert bool((table.p_lower <= torch.from_numpy(norm.cdf(distance / sigma))).all())
    assert bool((table.radius <= distance).all()), "further than the boundary"
    share = table.votes.double() / 20_000
    spread = 4 * (share * (1 - share) / 20_000).sqrt() + 1e-3
    gap = (share - torch.from_numpy(norm.cdf(distance / sigma))).abs()
    assert bool((gap < spread)[distance > 0.2 * sigma].all()), "not this noise"
    near = distance < 2 * sigma
    sure = table.predicted != ABSTAIN
    assert bool((distance - table.radius < 0.1 * sigma)[near & sure].all()), "the bound is loose"
    assert int((near & sure).sum()) > 12 and bool(table.right[sure].all()) and bool(table.correct.all())
    assert bool((distance[~sure] < 0.1 * sigma).all()), "it abstains far from the boundary"


def test_a_label_that_is_wrong_is_never_certified() -> None:
    model, data, distance, sigma = affine()
    x = data.read(data.index)
    table = certify(model, data_of(model, x, 1 - data.labels), sigma=sigma, samples=2_000)
    sure = distance > 0.2 * sigma
    assert not bool(table.right.any()) and bool(table.wrong[sure].all()) and not bool(table.correct.any())
    assert bool((table.radius[sure] > 0).all()), "the radius belongs to the class that is given"
    assert not bool(table.certified(0.0).any())


@pytest.mark.parametrize(("samples", "alpha"), [(100, 0.001), (1_000, 0.05), (10, 0.49)])
def test_a_unanimous_vote_gives_the_largest_radius(samples: int, alpha: float) -> None:
    """All n of n: Clopper and Pearson's one-sided bound is alpha^(1/n)."""
    model = toys.constant()
    x = toys.images(model.shape, 3)
    data = data_of(model, x, torch.tensor([0, 0, 1]))
    table = certify(model, data, sigma=0.5, samples=samples, selection=5, alpha=alpha)
    assert table.votes.tolist() == [samples] * 3 and table.predicted.tolist() == [0, 0, 0]
    expected = 0.5 * norm.ppf(alpha ** (1 / samples))
    torch.testing.assert_close(table.p_lower, torch.full((3,), alpha ** (1 / samples)).double())
    torch.testing.assert_close(table.radius, torch.full((3,), expected).double())
    sampling = Sampling(sigma=0.5, samples=samples, alpha=alpha)
    assert sampling.largest_radius == pytest.approx(expected, rel=1e-9)
    assert table.certified(expected * 0.999).tolist() == [True, True, False]
    assert not bool(table.certified(float(table.radius[0])).any()), "the ball is open"


def test_a_coin_is_abstained_from_and_is_thrown_anew_to_be_counted() -> None:
    """Were the draws that choose the class counted too, it would win more than half of the time."""
    model, data = on_the_boundary(300)
    table = certify(model, data, sigma=0.25, samples=100, selection=100, alpha=0.001)
    assert bool((table.predicted == ABSTAIN).all()) and float(table.radius.max()) == 0
    assert abs(float(table.votes.double().mean()) - 50) < 4 * 5 / math.sqrt(300)


def test_the_level_holds_on_a_coin() -> None:
    """At alpha = 0.2 about one coin in five is called, and no more."""
    model, data = on_the_boundary(400)
    table = certify(model, data, sigma=0.25, samples=99, selection=1, alpha=0.2)
    called = float((table.predicted != ABSTAIN).double().mean())
    assert 0.08 < called < 0.2 + 3 * math.sqrt(0.2 * 0.8 / 400)


def test_batch_size_order_and_part_change_nothing() -> None:
    model, data, _, sigma = affine()
    model = toys.samplewise(model)
    numbers = torch.arange(24) * 7 % 25
    data = data_of(model, data.read(data.index), data.labels, numbers)
    whole = certify(model, data, sigma=sigma, samples=60, selection=11)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    runs = {
        "batches of 7": (certify(model, data, sigma=sigma, samples=60, selection=11, batch_size=7), torch.arange(24)),
        "one batch": (certify(model, data, sigma=sigma, samples=60, selection=11, batch_size=4000), torch.arange(24)),
        "another order": (certify(model, data.take(order), sigma=sigma, samples=60, selection=11), order),
        "a part": (certify(model, data.take(order[:5]), sigma=sigma, samples=60, selection=11), order[:5]),
    }
    for what, (table, at) in runs.items():
        for name in Certificates.__slots__:
            torch.testing.assert_close(getattr(table, name), getattr(whole, name)[at], msg=f"{what}: {name}")
    other = certify(model, data, sigma=sigma, samples=60, selection=11, seed=1)
    assert not torch.equal(other.votes, whole.votes)


def test_samples_and_draws_have_noise_of_their_own() -> None:
    """The images the model sees: no two alike, standard normal, not cut to the box."""
    seen: list[Tensor] = []
    model = toys.opaque(toys.linear())
    x = torch.zeros((3, *model.shape))
    model.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    certify(model, data_of(model, x, torch.zeros(3).long()), sigma=2.0, samples=500, selection=100)
    noise = torch.cat(seen)[3:] / 2.0  # behind the three images without noise
    assert noise.shape[0] == 3 * 600 and len(noise.flatten(1).unique(dim=0)) == 1800
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.02
    assert float(noise.min()) < -3, "pixels below the box stay there"
    paired = (noise[:900] * noise[900:]).mean()
    assert abs(float(paired)) < 0.04


def test_the_model_and_the_random_state_are_left_alone() -> None:
    model = toys.conv().train()
    model.requires_grad_(True)
    x = toys.images(model.shape, 4)
    data = data_of(model, x, torch.zeros(4).long())
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    certify(model, data, sigma=0.1, samples=20, selection=5)
    predict(model, x, sigma=0.1, samples=20)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before[0]) and str(np.random.get_state()) == before[1]
    assert random.getstate() == before[2]


def test_progress_can_stop_the_work_and_what_was_finished_is_kept() -> None:
    model, data, _, sigma = affine(40)
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        if event.done >= 16:
            raise Cancelled

    sampling = Sampling(sigma=sigma, samples=200, selection=50, batch_size=100)
    parts: list[Certificates] = []
    with pytest.raises(Cancelled):
        for part in certify_groups(model, data, sampling, notify=lambda e: events.append(e)):
            parts.append(part)
            if len(parts) == 1:
                raise Cancelled
    assert parts[0].index.tolist() == list(range(16))
    with pytest.raises(Cancelled):
        certify(model, data, sigma=sigma, samples=200, notify=stop)
    assert {event.total for event in events} == {40} and {event.stage for event in events} == {"certify"}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sigma": 0.0}, "sigma > 0"),
        ({"sigma": math.nan}, "sigma > 0"),
        ({"samples": 0}, "one draw"),
        ({"samples": 9}, "samples >= 10 at alpha 0.001"),
        ({"selection": 0}, "selection >= 1"),
        ({"alpha": 0.5}, "alpha in"),
        ({"alpha": 0.0}, "alpha in"),
        ({"batch_size": 0}, "batch size"),
    ],
)
def test_requests_nothing_can_come_of_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Sampling(**{"sigma": 0.25, **wrong})
    assert Sampling(sigma=0.25, samples=10).largest_radius > 0


def test_data_and_logits_that_cannot_be_used_are_refused() -> None:
    class Narrow(nn.Module):
        """No answer but for one image."""

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return torch.where((x == 0.5).all(1, keepdim=True), x[:, :2], torch.nan)

    model = Classifier(Narrow(), shape=(1, 2, 2), num_classes=2)
    x = torch.full((2, 1, 2, 2), 0.5)
    with pytest.raises(ModelError, match="outside"):
        certify(model, data_of(model, x, torch.zeros(2).long()), sigma=1.0, samples=50)
    with pytest.raises(DataError, match="box"):
        certify(model, data_of(model, x + 1, torch.zeros(2).long()), sigma=1.0, samples=50)


# ---- prediction by vote


def test_predictions_are_those_of_an_exact_binomial_test() -> None:
    model = toys.linear(classes=4)
    x = toys.images(model.shape, 40)
    counts = _votes(model, x, torch.arange(40), 0.1, 60, "predict", 33, 5)
    assert bool((counts.sum(1) == 60).all())
    expected: list[int] = []
    for row in counts.tolist():
        (first, at), (second, _) = sorted(((v, k) for k, v in enumerate(row)), reverse=True)[:2]
        expected.append(at if binomtest(first, first + second, 0.5).pvalue <= 0.01 else ABSTAIN)
    given = predict(model, x, sigma=0.1, samples=60, alpha=0.01, seed=5, batch_size=256)
    assert given.tolist() == expected
    assert 4 < expected.count(ABSTAIN) < 36 and len(set(expected)) > 3


def test_a_tie_is_abstained_from() -> None:
    model, data = on_the_boundary(50)
    given = predict(model, data.read(data.index), sigma=0.3, samples=200, alpha=0.001)
    assert bool((given == ABSTAIN).all())


# ---- the soft form


def test_the_soft_form_is_the_mean_softmax_over_its_noise() -> None:
    for base in (toys.smooth(), toys.conv((3, 4, 4)).double(), toys.probabilities(classes=3), toys.one_logit()):
        soft = smoothed(base, 0.3, 12, seed=3)
        x = toys.images(base.shape, 5).to(next(base.parameters()).dtype)
        noise = soft.net.noise
        with torch.no_grad():
            mean = sum(base(x + n).softmax(1) for n in noise) / 12
            torch.testing.assert_close(soft(x), mean.log(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(soft(x[2:3]), soft(x)[2:3])
        assert (soft.shape, soft.num_classes, soft.class_names) == (base.shape, base.num_classes, base.class_names)
    many = smoothed(toys.linear((1, 8, 8)), 0.3, 2_000).net.noise
    assert abs(float(many.mean())) < 0.005 and float(many.std()) == pytest.approx(0.3, rel=0.02)


def test_the_soft_form_passes_the_checks_of_an_audit_and_can_be_attacked() -> None:
    """Its boundary is that of the affine model inside, up to the mean of its draws of noise."""
    model, data, distance, _ = affine()
    sigma, draws = float(distance.min()), 400
    soft = smoothed(model.eval(), sigma, draws)
    x, y = data.read(data.index), data.labels
    _, checks = preflight(soft, data)
    assert {check.status for check in checks} == {"passed"}
    for factor, broken in ((0.7, False), (1.3, True)):
        for row in (0, int(distance.argmax())):
            threat = Threat(norm="l2", eps=factor * float(distance[row]))
            outcome = attack_batch(soft, x[row : row + 1], y[row : row + 1], threat, "pgd", {"steps": 10})
            assert outcome.success.tolist() == [broken]


# ---- certificate and attack


def test_the_ball_that_covers_a_threat() -> None:
    dims = 48
    delta = torch.randn((2_000, dims), generator=torch.Generator().manual_seed(0)).double()
    corner = torch.full((1, dims), 0.1).double()
    for threat_norm in NORMS:
        scaled = delta / vector_norm(delta, threat_norm)[:, None] * 0.1
        radius = covering(Threat(norm=threat_norm, eps=0.1), dims)
        assert float(vector_norm(scaled, "l2").max()) <= radius * (1 + 1e-9)
    assert covering(Threat(norm="linf", eps=0.1), dims) == pytest.approx(float(vector_norm(corner, "l2")))
    spike = torch.nn.functional.one_hot(torch.tensor([3]), dims).double() * 0.1
    assert covering(Threat(norm="l1", eps=0.1), dims) == pytest.approx(float(vector_norm(spike, "l2")))
    with pytest.raises(ThreatError, match="budget"):
        covering(Threat(norm="l2"), dims)


@pytest.mark.parametrize("threat_norm", NORMS)
def test_an_affine_model_breaks_beyond_its_distance_and_not_within(threat_norm: Norm) -> None:
    model, data, _, _ = affine()
    x, y = data.read(data.index), data.labels
    distance = toys.radius(model, x, y, threat_norm)
    sampling = Sampling(sigma=float(toys.radius(model, x, y, "l2").min()), samples=300, selection=20, alpha=0.01)
    wrong = torch.arange(24) < 3
    data = data_of(model, x, torch.where(wrong, 1 - y, y))
    table = certify(model, data, sigma=sampling.sigma, samples=300, selection=20, alpha=0.01)
    for eps, expected in ((0.5 * float(distance.min()), wrong), (1.5 * float(distance.max()), wrong | ~wrong)):
        threat = Threat(norm=threat_norm, eps=eps)
        found = attack_smoothed(model, data, table, threat, "pgd", {"steps": 20}, sampling, draws=32)
        assert torch.equal(found.broken, expected)
        assert torch.equal(found.predicted[wrong], y[wrong]), "what was wrong at first is left alone"
        assert found.votes == 300 and found.queries <= 21 * 21 and found.gradients <= 20 * 21
    far = Threat(norm=threat_norm, eps=0.5 * float(distance.min()))
    small = attack_smoothed(model, data, table, far, "deepfool", {}, sampling, draws=8)
    assert torch.equal(small.broken, wrong), "an image outside the threat breaks nothing"


def test_a_vote_too_close_to_call_breaks_nothing() -> None:
    model, data = on_the_boundary(10)
    sampling = Sampling(sigma=0.25, samples=100)
    table = certify(model, data, sigma=0.25, samples=100)
    found = attack_smoothed(model, data, table, Threat(norm="l2", eps=0.001), "pgd", {"steps": 2}, sampling, draws=4)
    assert bool((found.predicted == ABSTAIN).all()) and not bool(found.broken.any())


@pytest.fixture(scope="module")
def noisy() -> Classifier:
    """A small network trained on the embedded digits under Gaussian noise of 0.25."""
    data = open_data("digits:train").load()
    batch = data.batch(torch.arange(1000))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(Normalize([0.3], [0.4]), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(15):
            for part in torch.randperm(1000).split(50):
                optimiser.zero_grad()
                x = batch.x[part] + 0.25 * torch.randn_like(batch.x[part])
                cross_entropy(net(x), batch.y[part]).backward()
                optimiser.step()
    return Classifier(net, shape=(1, 8, 8), num_classes=10, class_names=data.class_names).eval()


@pytest.mark.parametrize("threat", ["l2:0.4", "l2:1.5", "linf:0.05", "l1:0.4"])
def test_no_attack_gets_below_the_certificate_of_a_trained_network(noisy: Classifier, threat: str) -> None:
    data = open_data("digits:test[:40]")
    sampling = Sampling(sigma=0.25, samples=1_000)
    table = certify(noisy, data, sigma=0.25, samples=1_000)
    options = {"steps": 20, "loss": "ce", "step": None, "restarts": 1}
    found = attack_smoothed(noisy, data, table, Threat.parse(threat), "pgd", options, sampling, draws=16)
    told = bracketed(table, found, Threat.parse(threat), "pgd", options, draws=16, dims=64)
    certified = table.certified(told.radius)
    assert not bool((certified & found.broken).any()) and told.contradictions == 0
    assert told.lower.k == int(certified.sum()) <= told.upper.k == int((~found.broken).sum())
    if threat == "l2:0.4":
        assert 20 < told.lower.k < told.upper.k <= 40, "the check needs images that are certified"
    if threat == "l2:1.5":
        assert told.lower.k == 0 and told.upper.k < 20, "the attack is no attack"


def test_the_section_of_the_report_counts_what_the_table_says(noisy: Classifier) -> None:
    data = open_data("digits:test[:50]")
    sampling = Sampling(sigma=0.25, samples=400)
    table = certify(noisy, data, sigma=0.25, samples=400)
    told = section(table, sampling, None)
    assert (told.right.k, told.right.n) == (int((table.predicted == data.labels).sum()), 50)
    assert told.abstained.k == int((table.predicted == -1).sum())
    sizes = [float(r) if p == y else 0.0 for r, p, y in zip(table.radius, table.predicted, table.label, strict=True)]
    assert told.median_radius == pytest.approx(np.median(sizes))
    curve = certified_curve(table, sampling, "l2", dims=64, extra=0.3)
    assert 0.3 in curve.eps and curve.eps[0] == 0 and list(curve.eps) == sorted(set(curve.eps))
    for eps, rate in zip(curve.eps, curve.accuracy, strict=True):
        assert rate.k == sum(size > eps for size in sizes) and rate.n == 50
    assert curve.accuracy[0].k == told.right.k and curve.accuracy[-1].k == 0 < curve.accuracy[2].k
    cube = certified_curve(table, sampling, "linf", dims=64)
    assert cube.eps[4] * 8 == pytest.approx(0.25)
    assert [r.k for r in cube.accuracy] == [r.k for e, r in zip(curve.eps, curve.accuracy, strict=True) if e != 0.3]
