"""What is told of several models, and of several attacks over several batches."""

import numpy as np
import pytest
import torch
from scipy.stats import permutation_test, spearmanr

import toys
from rempart.core.stats import wilson
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.explain import Subject, against, explain, trend
from rempart.models import card
from rempart.report.schema import AttackChoice, Explained, ExplainSpec, Layer
from report.conftest import build


def model(relative: float, held: int, shared: float | None = None) -> Explained:
    moved = {"absolute": (1.0,), "relative": (relative,), "overall": relative, "shared_relative": shared}
    layer = Layer(name="a", sensitive=(0,), **moved)
    given = {"label": "m", "model": build(attacks=False).model, "pairs": 50, "tested": 0}
    return Explained(**given, clean=wilson(50, 60), attacked=wilson(held, 60), layers=(layer,))


def test_the_trend_is_the_correlation_of_ranks_over_three_models_or_more():
    falling = [model(0.9, 5), model(0.3, 20, 0.1), model(0.2, 40, 0.2), model(0.1, 41, 0.3)]
    found = trend(falling)
    assert found is not None and found.models == 4
    assert found.spearman == pytest.approx(-1) and found.shared == pytest.approx(1)
    assert found.chance == pytest.approx(2 / 24) and found.shared_chance == pytest.approx(2 / 6)
    mixed = trend([model(0.1, 10), model(0.2, 30), model(0.3, 20)])
    assert mixed is not None and mixed.spearman == pytest.approx(1 - 6 * 2 / (3 * 8)) and mixed.shared is None
    assert mixed.chance == 1, "of six orders two are +-1, four +-1/2: all are as far from 0"
    level = trend([model(0.1, 10), model(0.2, 10), model(0.3, 10)])
    assert level is not None and level.spearman is None
    assert trend(falling[:2]) is None


def test_of_many_models_the_share_of_orders_is_estimated():
    values = torch.rand(2, 9, generator=torch.Generator().manual_seed(2)).tolist()
    found = trend([model(a, round(50 * b)) for a, b in zip(*values, strict=True)])
    held = [round(50 * b) for b in values[1]]
    exact = permutation_test(
        (values[0],),
        lambda a: abs(spearmanr(a, held).statistic),
        permutation_type="pairings",
        n_resamples=9999,
        rng=0,
        alternative="greater",
    )
    assert found is not None and 0.05 < found.chance < 0.95, "a case that says something"
    assert found.chance == pytest.approx(exact.pvalue, abs=0.05)


def test_no_gap_is_zero():
    """Without rounding, sums of a third and two thirds leave 1e-17, which would read as more than chance."""
    same = np.array([True] * 23 + [False])
    gap = against(same, np.stack([same] * 5), seed=0)
    assert gap.value == 0 and gap.low < 0 < gap.high and "-" not in f"{gap.value:+.1f}"


def test_an_attack_keeps_its_name_from_batch_to_batch_and_a_second_one_gets_a_number():
    net, x = toys.conv((1, 4, 4)), toys.images((1, 4, 4), n=12)
    data = Data(
        source="toy",
        split="test",
        index=torch.arange(12),
        labels=toys.labels(net, x),
        shape=(1, 4, 4),
        class_names=("a", "b", "c"),
        read=lambda at: x[at],
    )
    fgsm, threat = AttackChoice(name="fgsm"), Threat.parse("linf:0.1", low=net.low, high=net.high)
    twice = AttackChoice(name="pgd", options={"steps": 2})
    attacks = (twice, fgsm, twice)
    spec = ExplainSpec(models=("m",), data="d", threat="linf:0.1", attacks=attacks, batch_size=5, test=0, out="o")
    (told,) = explain({"m": Subject(net, card(net, "toy"))}, data, threat, spec).explained
    assert list(dict.fromkeys(row.beside for row in told.overlaps)) == ["fgsm", "pgd 3"]
    again = [row.jaccard for row in told.overlaps if row.beside == "pgd 3"]
    assert again == [1] * len(told.layers), "the same attack over the same images"
