"""What is left of a network without some neurons: where its neurons are the pixels, that is an affine model."""

import pytest
import torch
from torch import nn

import toys
from rempart.attacks.plan import EOT
from rempart.core.errors import SpecError
from rempart.core.features import features
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.explain import Pairs, layers_of, prune, top
from rempart.explain import anew as running
from rempart.explain.anew import anew, without
from rempart.models import build
from rempart.report.schema import EVERY, ExplainSpec

N, EPS = 60, 0.05
THREAT = Threat.parse(f"linf:{EPS}")
LAYER = "net.2"
WEIGHT = torch.tensor([[1.0, -0.4, 0.9, 0.05, -0.7, 0.3, 0.02, -0.01]])


def spec(**changes) -> ExplainSpec:
    given = {"models": ("m",), "data": "d", "threat": str(THREAT), "share": 0.25, "draws": 3, "suite": "fast"}
    return ExplainSpec.model_validate({**given, "out": "o", "seed": 4} | changes)


def pixels() -> Classifier:
    """Eight pixels, eight neurons with their values, one logit: WEIGHT times pixels minus its mean value."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(8))
        net[1].bias.zero_()
        net[3].weight.copy_(WEIGHT)
        net[3].bias.copy_(-0.5 * WEIGHT.sum(1))
    return Classifier(net, shape=(1, 2, 4), num_classes=2)


def pairs(model: Classifier) -> Pairs:
    x = 0.25 + 0.5 * torch.rand(N, 1, 2, 4, generator=torch.Generator().manual_seed(3))
    return Pairs(index=torch.arange(N) + 7, x=x, x_adv=torch.zeros_like(x), y=toys.labels(model, x))


def holds(given: Pairs, mask: torch.Tensor) -> int:
    """Images on which the margin of what is left exceeds what the budget can take from it."""
    weight = (WEIGHT[0] * ~mask).double()
    margin = given.x.flatten(1).double() @ weight - 0.5 * WEIGHT.sum()
    sign = 2.0 * given.y - 1
    return int((sign * margin > EPS * weight.abs().sum()).sum())


def test_the_worst_case_of_what_is_left_is_that_of_the_affine_model_left():
    model = pixels()
    given, sigma = pairs(model), {LAYER: WEIGHT[0].abs()}
    row = anew(model, sigma, given, THREAT, spec())
    rng = Draws(4, torch.zeros(1, dtype=torch.int64), ("explain",))
    masks = [top(sigma[LAYER], 0.25, "random", rng.at(LAYER, draw)) for draw in range(3)]
    assert (row.layer, row.test, row.share, row.before.n) == (LAYER, "zero, attacked anew", 0.25, N)
    assert row.before.k == holds(given, torch.zeros(8, dtype=torch.bool))
    assert row.sensitive.k == holds(given, torch.tensor([1, 0, 1, 0, 0, 0, 0, 0], dtype=torch.bool))
    assert row.least.k == holds(given, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool))
    random = [holds(given, mask) / N for mask in masks]
    assert row.random.value == pytest.approx(sum(random) / 3)
    assert row.gap.value == pytest.approx(row.sensitive.value - sum(random) / 3)
    assert len({row.before.k, row.sensitive.k, *(round(N * value) for value in random)}) > 2, "all alike"


def test_neurons_of_all_layers_go_at_once():
    model = build("mlp", shape=(1, 4, 4), num_classes=3, options={"first": 8, "second": 8}).eval()
    layers = layers_of(model)
    assert len(layers) > 1
    x = toys.images(model.shape, 6)
    given = Pairs(index=torch.arange(6), x=x, x_adv=x, y=toys.labels(model, x))
    with torch.no_grad(), features(model, layers) as seen:
        model(x)
        sigma = {layer: value.abs().mean(0) for layer, value in seen.items()}
    assert anew(model, sigma, given, THREAT, spec(draws=2)).layer == EVERY


@pytest.mark.parametrize("name", ["lenet", "convnet", "mlp"])
def test_a_network_without_neurons_is_the_pruned_one(name):
    shape = {"lenet": (1, 16, 16), "convnet": (3, 8, 8), "mlp": (1, 8, 8)}[name]
    model = build(name, shape=shape, num_classes=3).eval()
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), features(model, layers_of(model)) as seen:
        model(x)
        masks = {layer: torch.arange(value.shape[1]) % 3 == 1 for layer, value in seen.items()}
        left = without(model, masks)
        assert torch.allclose(left(x), prune(model, masks)(x), atol=1e-5) and not torch.allclose(left(x), model(x))
    assert (left.shape, left.class_names, left.low, left.high) == (model.shape, model.class_names, 0, 1)


def test_an_unknown_suite_is_refused():
    model = pixels()
    with pytest.raises(SpecError, match="quick"):
        anew(model, {LAYER: WEIGHT[0].abs()}, pairs(model), THREAT, spec(suite="fats"))


@pytest.mark.parametrize(("random", "passes"), [(False, 1), (True, EOT)])
def test_what_is_left_of_a_random_model_is_attacked_by_mean_gradients(monkeypatch, random, passes):
    seen = []
    attack_chunk = running.attack_chunk

    def heard(model, part, number, planned, *rest):
        seen.extend(attack.options.get("eot", 1) for attack in planned if "eot" in attack.options)
        return attack_chunk(model, part, number, planned, *rest)

    monkeypatch.setattr(running, "attack_chunk", heard)
    model = pixels()
    anew(model, {LAYER: WEIGHT[0].abs()}, pairs(model), THREAT, spec(draws=2), random=random)
    assert seen and set(seen) == {passes}
