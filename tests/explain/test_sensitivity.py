"""Sets of sensitive neurons: what is chosen, how far two sets agree, and which layers are looked at."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import toys
from rempart.core.errors import ModelError, SpecError
from rempart.core.features import Moved, blocks
from rempart.core.repro import Draws
from rempart.explain import jaccard, layers_of, top
from rempart.explain.sensitivity import by_chance, joined, rank_correlation
from rempart.models import build

SIGMA = torch.tensor([0.2, 0.5, 0.5, 0.0, 0.5, 0.1])


def chosen(*arguments, **given):
    return top(*arguments, **given).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("share", "choose", "expected"),
    [
        (0.01, "sensitive", [1]),  # at least one, and of equal ones the first
        (0.34, "sensitive", [1, 2]),
        (0.5, "sensitive", [1, 2, 4]),
        (0.34, "least", [0, 5]),  # neuron 3 never moves
        (0.67, "least", [0, 1, 2, 5]),
        (1.0, "sensitive", [0, 1, 2, 4, 5]),
        (1.0, "least", [0, 1, 2, 4, 5]),
    ],
)
def test_a_share_is_chosen_and_of_equal_neurons_the_first(share, choose, expected):
    assert chosen(SIGMA, share, choose) == expected


@pytest.mark.parametrize("choose", ["sensitive", "least", "random"])
def test_neurons_that_never_move_are_not_chosen(choose):
    rng = Draws(0, torch.zeros(1, dtype=torch.int64), ("explain",))
    sigma = torch.zeros(50).index_fill(0, torch.tensor([3, 20, 21, 44]), 0.5)
    for share in (0.01, 0.05, 0.5):
        assert set(chosen(sigma, share, choose, rng)) <= {3, 20, 21, 44}
        assert len(chosen(sigma, share, choose, rng)) == min(max(1, round(50 * share)), 4)
    assert chosen(torch.zeros(50), 0.1, choose, rng) == []


def test_random_neurons_depend_on_the_draws_alone():
    rng, other = (Draws(seed, torch.zeros(1, dtype=torch.int64), ("explain",)) for seed in (0, 1))
    sigma = torch.rand(200, generator=torch.Generator().manual_seed(0))
    mask = top(sigma, 0.1, "random", rng)
    assert mask.sum() == 20 and torch.equal(mask, top(sigma.flip(0), 0.1, "random", rng))
    assert not torch.equal(mask, top(sigma, 0.1, "random", other))
    assert not torch.equal(mask, top(sigma, 0.1, "random", rng.at("2")))
    drawn = torch.stack([top(sigma, 0.1, "random", rng.at(draw)) for draw in range(400)]).double().mean(0)
    assert float(drawn.mean()) == pytest.approx(0.1) and float(drawn.std()) < 0.025  # sqrt(0.1 * 0.9 / 400) = 0.015


def test_jaccard_by_hand_and_by_chance():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert jaccard(a, b) == pytest.approx(1 / 3) and jaccard(a, a) == 1 and jaccard(a, ~a) == 0
    rng = Draws(0, torch.zeros(1, dtype=torch.int64))
    for shares in ((0.25, 0.25), (0.25, 0.1)):
        masks = [top(torch.ones(200), shares[draw % 2], "random", rng.at(draw)) for draw in range(200)]
        mean = sum(jaccard(*pair) for pair in zip(masks[::2], masks[1::2], strict=True)) / 100
        assert mean == pytest.approx(by_chance(200, *(round(200 * share) for share in shares)), abs=0.02)
    assert by_chance(200, 50, 50) == pytest.approx(50 / 350) and by_chance(5, 5, 5) == 1


def test_rank_correlation_is_spearmans_and_none_where_there_is_none():
    a, b = torch.randn(2, 30, generator=torch.Generator().manual_seed(0)).double().round(decimals=1)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(a, a.exp()) == pytest.approx(1) and rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.ones(30).double()) is None and rank_correlation(a[:2], b[:2]) is None


def test_sums_of_batches_add_up():
    part = Moved(torch.tensor([1.0, 2]), torch.tensor([4.0, 4]), 2)
    whole = joined([{"a": part}, {}, {"a": part, "b": part}])
    assert whole["a"].pairs == 4 and whole["a"].change.tolist() == [2, 4] and whole["a"].clean.tolist() == [8, 8]
    assert whole["b"] == part


def test_layers_are_blocks_or_what_patterns_name_in_the_order_of_the_network():
    model = build("lenet", shape=(1, 8, 8), num_classes=3)
    assert layers_of(model) == blocks(model) == ["net.1.1", "net.1.3", "net.1.6"]
    assert layers_of(model, ["net.1.3", "net.1.0"]) == ["net.1.0", "net.1.3"]
    assert layers_of(model, ["net.1.*"]) == [f"net.1.{i}" for i in range(7)]  # the eighth gives the logits
    assert layers_of(model, ["*.1", "net.1.[13]"]) == ["net.1.1", "net.1.3"]
    for wrong in ("net.1.7", "net.1", "net", "conv*", ""):
        with pytest.raises(SpecError, match="name of a layer"):
            layers_of(model, ["net.1.1", wrong])
    with pytest.raises(ModelError, match="hidden layers"):
        layers_of(toys.linear())
    wrapped = nn.Module()
    wrapped.module = model
    assert layers_of(wrapped, ["net.1.3"]) == ["net.1.3"]
