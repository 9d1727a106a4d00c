"""Masking and replacing against a network of two layers written out in numpy; contributions where they are exact."""

import numpy as np
import pytest
import torch
from torch import nn

from rempart.core.errors import DataError, ModelError
from rempart.core.features import blocks
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.explain import Pairs, against, effects, pull, top
from rempart.explain.contribution import TESTS
from rempart.models import build
from rempart.report.schema import EVERY

GENERATOR = torch.Generator().manual_seed(0)
N = 40
HIDDEN = ("net.2", "net.4")


def network():
    """Two hidden layers of 8 and 6 ReLU, drawn at random, on images of four pixels."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    return Classifier(net, shape=(1, 2, 2), num_classes=3)


def made(model, n=N, shape=(1, 2, 2)):
    """Pairs far apart; their classes are those the model gives to the images."""
    x, x_adv = torch.rand(2, n, *shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = model(x).argmax(1)
    return Pairs(index=torch.arange(n), x=x, x_adv=x_adv, y=y)


def written_out(model, shown, other, masks, test, means):
    """Logits by hand, where the neurons of each hidden layer are replaced one layer after the other."""
    weights = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in model.net if isinstance(m, nn.Linear)]

    def layer(number, value):
        out = value @ weights[number][0].T + weights[number][1]
        return np.maximum(out, 0) if number < 2 else out

    value, twin = shown.flatten(1).numpy(), other.flatten(1).numpy()
    for number, name in enumerate(HIDDEN):
        value, twin = layer(number, value), layer(number, twin)
        new = {"zero": 0 * value, "mean": means[number] + 0 * value}.get(test.partition(",")[0], twin)
        value = np.where(masks[name].numpy() if name in masks else False, new, value)
    return layer(2, value)


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_masking_and_replacing_are_those_of_the_network_written_out(share, batch_size):
    model = network()
    pairs = made(model)
    sigma = {"net.2": torch.rand(8, generator=GENERATOR), "net.4": torch.rand(6, generator=GENERATOR)}
    w = [m for m in model.net if isinstance(m, nn.Linear)]
    with torch.no_grad():
        first = w[0](pairs.x.flatten(1)).relu()
        means = [first.mean(0).numpy(), w[1](first).relu().mean(0).numpy()]
    rows = list(effects(model, sigma, pairs, [share], draws=3, seed=5, batch_size=batch_size))
    assert [row.layer for row in rows[::6]] == [*HIDDEN, EVERY] and [row.test for row in rows[:6]] == list(TESTS)
    rng = Draws(5, torch.zeros(1, dtype=torch.int64), ("explain",))
    changed = 0
    for row in rows:
        shown, other = (
            (pairs.x, pairs.x_adv) if row.test in ("zero, clean", "mean, clean", "planted") else (pairs.x_adv, pairs.x)
        )
        group = HIDDEN if row.layer == EVERY else [row.layer]

        def right(masks, shown=shown, other=other, row=row):
            z = written_out(model, shown, other, masks, row.test, means)
            return z.argmax(1) == pairs.y.numpy()

        most, least = ({name: top(sigma[name], share, how) for name in group} for how in ("sensitive", "least"))
        random = [{name: top(sigma[name], share, "random", rng.at(name, draw)) for name in group} for draw in range(3)]
        assert row.before.k == right({}).sum() and row.before.n == N and row.share == share
        assert row.sensitive.k == right(most).sum() and row.least.k == right(least).sum()
        expected = [right(masks).mean() for masks in random]
        assert row.random.value == pytest.approx(np.mean(expected))
        assert row.gap.value == pytest.approx(row.sensitive.value - np.mean(expected))
        changed += row.sensitive.k != row.before.k
    assert changed > 9  # the tests do something


def test_all_neurons_restored_give_the_clean_accuracy_and_planted_that_under_attack():
    model = network()
    pairs = made(model)
    sigma = {"net.2": torch.rand(8, generator=GENERATOR), "net.4": torch.rand(6, generator=GENERATOR)}
    rows = {(row.layer, row.test): row for row in effects(model, sigma, pairs, [1.0], draws=2)}
    attacked = int((model(pairs.x_adv).argmax(1) == pairs.y).sum())
    assert 0 < attacked < N
    for layer in (*HIDDEN, EVERY):
        restored, planted = rows[layer, "restored"], rows[layer, "planted"]
        assert (restored.before.k, restored.sensitive.k, restored.random.value) == (attacked, N, 1)
        assert (planted.before.k, planted.sensitive.k, planted.least.k) == (N, attacked, attacked)
        assert restored.gap.value == pytest.approx(0, abs=1e-12) and restored.gap.low < 0 < restored.gap.high


def test_a_layer_that_runs_twice_in_a_pass_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.relu, self.second, self.head = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.relu(self.second(self.relu(self.first(x.flatten(1))))))

    model = Classifier(Twice(), shape=(1, 2, 2), num_classes=3)
    with pytest.raises(ModelError, match=r"2 times net\.relu"):
        next(effects(model, {"net.relu": torch.rand(6)}, made(network()), [0.4], draws=2))


def test_the_model_is_left_as_it_was():
    model = build("convnet", shape=(3, 8, 8), num_classes=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = made(build("convnet", shape=(3, 8, 8), num_classes=3), 4, (3, 8, 8))
    list(effects(model, {"net.1.11": torch.rand(64)}, pairs, [0.1], draws=2))
    pull(model, pairs, blocks(model))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_pairs_or_one_draw_are_refused():
    model = network()
    for pairs, draws in ((made(model, 0), 5), (made(model), 1)):
        with pytest.raises(DataError, match="one pair and two draws"):
            next(effects(model, {"net.2": torch.rand(8)}, pairs, [0.1], draws=draws))


# ---- the interval of a difference


def test_the_difference_is_exact():
    first = np.array([1, 1, 0, 1], bool)
    draws = np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)
    found = against(first, draws)
    assert found.value == 0.75 - (0.25 + 0.75) / 2 and found.low <= found.value <= found.high and found.n == 4
    many = first.repeat(9), draws.repeat(9, axis=1).repeat(4, axis=0)
    assert against(*many, seed=1) == against(*many, seed=1) != against(*many, seed=2)


@pytest.mark.parametrize(("n", "draws"), [(60, 2), (60, 5), (60, 8), (12, 5)])
@pytest.mark.parametrize("spread", [0.0, 0.1, 0.25])
def test_the_interval_covers_the_difference_of_two_rates_at_least_as_often_as_it_says(n, draws, spread):
    """First right with 0.7, each draw with a rate of its own around 0.5: the difference is 0.2."""
    generator, hits = np.random.default_rng(0), 0
    for trial in range(200):
        rates = generator.uniform(0.5 - spread, 0.5 + spread, size=draws)
        found = against(generator.random(n) < 0.7, generator.random((draws, n)) < rates[:, None], seed=trial)
        hits += found.low <= 0.2 <= found.high
    assert hits / 200 >= 0.91  # 0.95 less three standard errors


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 30])
def test_few_images_without_any_effect_seldom_look_like_one(n):
    generator, wrong = np.random.default_rng(1), 0
    for trial in range(200):
        found = against(generator.random(n) < 0.5, generator.random((5, n)) < 0.5, seed=trial)
        wrong += found.low > 0 or found.high < 0
    assert wrong / 200 <= 0.09


def test_images_that_all_agree_leave_an_interval():
    found = against(np.ones(1, bool), np.zeros((5, 1), bool))
    assert (found.value, found.high) == (1, 1) and found.low < 0
    many = against(np.ones(200, bool), np.zeros((5, 200), bool))
    assert (many.value, many.high) == (1, 1) and 0.95 < many.low < 1


def test_the_interval_is_that_of_resampling_written_out():
    generator = np.random.default_rng(3)
    first, draws = generator.random(50) < 0.8, generator.random((6, 50)) < 0.5
    ours, theirs = np.append(first, [1, 0]), np.concatenate([draws, np.tile([0, 1], (6, 1))], 1)
    stretch = np.sqrt(6 / 5) * 2.570582 / 1.959964  # Student's quantile of 5 degrees of freedom over the normal one
    gaps = []
    for _ in range(4000):
        images, chosen = generator.integers(52, size=52), generator.integers(6, size=6)
        rates = theirs[:, images].mean(1)
        gaps.append(ours[images].mean() - (rates.mean() + stretch * (rates[chosen].mean() - rates.mean())))
    found = against(first, draws)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(gaps, [0.025, 0.975])), abs=0.02)


# ---- first-order contribution


def test_pull_of_an_affine_network_is_the_difference_of_logits_and_sums_over_each_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 4))
    model = Classifier(net, shape=(1, 3, 3), num_classes=4).double()
    x, x_adv = torch.rand(2, 9, 1, 3, 3, generator=GENERATOR, dtype=torch.float64)
    y = torch.arange(9) % 4
    z, z_adv = model(x).detach(), model(x_adv).detach()
    rival = torch.where(z_adv.argmax(1) == y, z_adv.topk(2).indices[:, 1], z_adv.argmax(1))
    assert bool((z_adv.argmax(1) == y).any()) and bool((z_adv.argmax(1) != y).any())
    rows = torch.arange(9)
    gain = (z_adv - z)[rows, rival] - (z_adv - z)[rows, y]
    pairs = Pairs(index=rows, x=x, x_adv=x_adv, y=y)
    found = pull(model, pairs, ["net.0", "net.2"], batch_size=4)
    assert [len(found["net.0"]), len(found["net.2"])] == [3, 5] and found["net.0"].dtype == torch.float64
    for layer in found:
        assert float(found[layer].sum()) == pytest.approx(float(gain.mean()), abs=1e-9)
    hidden = net[2](net[1](net[0](x_adv))) - net[2](net[1](net[0](x)))
    slope = net[3].weight[rival] - net[3].weight[y]
    assert torch.allclose(found["net.2"], (hidden * slope).mean(0).detach())


def test_pull_of_pairs_that_do_not_differ_is_0_and_a_layer_that_leads_nowhere_has_none():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.aside, self.first, self.head = nn.Linear(4, 2), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            self.aside(x.flatten(1))
            return self.head(self.first(x.flatten(1)))

    model = Classifier(Aside(), shape=(1, 2, 2), num_classes=2)
    pairs = made(model)
    found = pull(model, pairs, ["net.aside", "net.first"])
    assert not found["net.aside"].any() and found["net.first"].any()
    same = Pairs(index=pairs.index, x=pairs.x, x_adv=pairs.x, y=pairs.y)
    assert not pull(model, same, ["net.first"])["net.first"].any()
