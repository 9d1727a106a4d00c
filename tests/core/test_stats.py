"""Intervals against independent formulas, exact binomial tails and simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, norm, ttest_1samp

from rempart.core.errors import SpecError
from rempart.core.stats import (
    auroc,
    bootstrap_mean,
    clopper_pearson,
    median_interval,
    paired_bootstrap,
    student,
    wilson,
)

CASES = [(k, n) for n in (1, 2, 7, 50, 1000) for k in {0, 1, n // 3, n - 1, n}]


@pytest.mark.parametrize(("k", "n"), CASES)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_solves_its_quadratic(k, n, confidence):
    """The ends are the p at which |k/n - p| is z standard errors of that very p."""
    z = norm.ppf(0.5 + confidence / 2)

    def excess(p):
        return (k / n - p) ** 2 - z * z * p * (1 - p) / n

    rate = wilson(k, n, confidence)
    low = 0.0 if k == 0 else brentq(excess, 1e-15, k / n - 1e-15 if k == n else k / n, xtol=1e-14)
    high = 1.0 if k == n else brentq(excess, k / n if k else 1e-15, 1 - 1e-15, xtol=1e-14)
    assert rate.low == pytest.approx(low, abs=1e-9)
    assert rate.high == pytest.approx(high, abs=1e-9)
    assert (rate.k, rate.n, rate.confidence, rate.method) == (k, n, confidence, "wilson")


@pytest.mark.parametrize(("n", "p"), [(30, 0.1), (100, 0.5), (1000, 0.01)])
def test_wilson_covers(n, p):
    """Exact coverage, summed over the binomial, is close to the nominal one (Brown, Cai, DasGupta 2001)."""
    covered = sum(binom.pmf(k, n, p) for k in range(n + 1) if wilson(k, n).low <= p <= wilson(k, n).high)
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize(("k", "n"), CASES)
def test_clopper_pearson_tails_are_exact(k, n):
    """At the lower end P(X >= k) is alpha / 2, at the upper end P(X <= k) is."""
    rate = clopper_pearson(k, n, 0.9)
    assert rate.low == 0 if k == 0 else binom.sf(k - 1, n, rate.low) == pytest.approx(0.05, rel=1e-6)
    assert rate.high == 1 if k == n else binom.cdf(k, n, rate.high) == pytest.approx(0.05, rel=1e-6)
    assert rate.method == "clopper-pearson"


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_clopper_pearson_closed_form_at_the_ends(n):
    assert clopper_pearson(n, n, 0.99).low == pytest.approx(0.005 ** (1 / n), rel=1e-9)
    assert clopper_pearson(0, n, 0.99).high == pytest.approx(1 - 0.005 ** (1 / n), rel=1e-9)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_hold_the_estimate_and_mirror(kn):
    k, n = kn
    for interval in (wilson, clopper_pearson):
        rate, mirror = interval(k, n), interval(n - k, n)
        assert 0 <= rate.low <= rate.value <= rate.high <= 1
        assert rate.low == pytest.approx(1 - mirror.high, abs=1e-9)
    assert clopper_pearson(k, n).high - clopper_pearson(k, n).low > 0


def test_rate_in_words():
    assert str(wilson(45, 100)) == "45.0% [35.6%, 54.8%] (n=100)"


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(interval, k, n):
    with pytest.raises(SpecError, match=f"k={k}, n={n}"):
        interval(k, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.5, math.nan])
def test_impossible_confidence_is_refused(confidence):
    """95 for 95 % must not give an interval of nan."""
    for call in (
        lambda: wilson(1, 2, confidence),
        lambda: clopper_pearson(1, 2, confidence),
        lambda: median_interval([1.0], confidence),
        lambda: paired_bootstrap([True], [False], confidence=confidence),
    ):
        with pytest.raises(SpecError, match=r"confidence in \(0, 1\)"):
            call()


@pytest.mark.parametrize("n", [6, 7, 20, 99, 1000])
def test_median_interval_is_the_narrowest_pair_of_order_statistics_that_covers(n):
    """P(X_(r) <= m <= X_(n+1-r)) = 1 - 2 P(B(n, 1/2) < r) for 1-based r: enough for r, not for r + 1."""
    low, high = median_interval(np.random.default_rng(n).permutation(n) + 1.0)
    rank = int(low)
    assert high == n + 1 - rank
    assert 1 - 2 * binom.cdf(rank - 1, n, 0.5) >= 0.95 > 1 - 2 * binom.cdf(rank, n, 0.5)


def test_median_interval_covers_by_simulation():
    draws = np.random.default_rng(0).exponential(size=(2000, 40))
    hits = np.mean([low <= math.log(2) <= high for low, high in map(median_interval, draws)])
    nominal = 1 - 2 * binom.cdf(13, 40, 0.5)
    assert hits == pytest.approx(nominal, abs=4 * math.sqrt(nominal * (1 - nominal) / 2000))


def test_median_interval_of_few_infinite_or_no_values():
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([2.0, 1.0, 3.0]) == (1.0, 3.0)
    assert median_interval([0.1] * 3 + [math.inf] * 17) == (math.inf, math.inf)
    with pytest.raises(SpecError, match="at least one value"):
        median_interval([])
    with pytest.raises(SpecError, match="got 1 nan"):
        median_interval([1.0, math.nan, 2.0])


def test_paired_bootstrap_is_resampling_of_pairs():
    """Against the plain form: draw sample numbers with replacement, take both columns, subtract the means."""
    rng = np.random.default_rng(3)
    first = rng.random(80) < 0.7
    second = np.where(rng.random(80) < 0.8, first, rng.random(80) < 0.3)
    picks = rng.integers(0, 80, size=(20_000, 80))
    low, high = np.quantile(first[picks].mean(1) - second[picks].mean(1), [0.05, 0.95])
    found = paired_bootstrap(first, second, confidence=0.9, resamples=20_000)
    assert found.value == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    assert found.low == pytest.approx(low, abs=0.0126)  # one step of 1 / 80
    assert found.high == pytest.approx(high, abs=0.0126)
    unpaired = np.quantile(first[picks].mean(1) - second[picks[::-1]].mean(1), [0.05, 0.95])
    assert unpaired[1] - unpaired[0] > 1.2 * (found.high - found.low), "the example must tell pairs from no pairs"
    assert (found.n, found.confidence) == (80, 0.9)


def test_paired_bootstrap_orientation_seed_and_certainty():
    first, second = [True, True, True, False], [True, False, False, False]
    one = paired_bootstrap(first, second)
    back = paired_bootstrap(second, first)
    assert (one.value, back.value) == (0.5, -0.5)
    assert one.low >= 0 and back.high <= 0
    assert one == paired_bootstrap(first, second) != paired_bootstrap(first * 20, second * 20)
    always = paired_bootstrap([True] * 9, [False] * 9)
    assert (always.value, always.low, always.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_paired_bootstrap_refuses_sequences_that_do_not_pair(first, second):
    with pytest.raises(SpecError, match=f"got {len(first)} and {len(second)}"):
        paired_bootstrap(first, second)


@pytest.mark.usefixtures("untouched_rng")
def test_bootstrap_leaves_the_global_state_alone():
    paired_bootstrap([True, False], [False, False])


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_student_is_the_interval_of_the_t_test(confidence):
    values = [4.9, 5.1, 5.3, 4.7]
    expected = ttest_1samp(values, 0).confidence_interval(confidence)
    mean = student(values, confidence)
    assert (mean.value, mean.low, mean.high) == pytest.approx((5.0, expected.low, expected.high))
    assert (mean.n, mean.confidence) == (4, confidence)


def test_one_value_has_no_finite_interval_and_none_has_no_mean():
    assert (student([3.0]).low, student([3.0]).value, student([3.0]).high) == (-math.inf, 3.0, math.inf)
    for values in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(SpecError, match="finite values"):
            student(values)


def test_auroc_counts_pairs_and_ties_half():
    rng = np.random.default_rng(0)
    negatives, positives = rng.integers(0, 6, 17), rng.integers(2, 8, 11)
    gap = positives[:, None] - negatives
    found = auroc(negatives, positives)
    assert found.value == pytest.approx(((gap > 0) + 0.5 * (gap == 0)).mean(), abs=1e-12)
    assert (found.negatives, found.positives) == (17, 11)
    assert found.low < found.value < found.high


def test_the_interval_of_auroc_is_mirrored_where_the_scores_are():
    negatives, positives = [0.1, 0.4, 0.2, 0.9], [0.3, 0.8, 1.0]
    there, back = auroc(negatives, positives), auroc(positives, negatives)
    assert (back.value, back.low, back.high) == pytest.approx((1 - there.value, 1 - there.high, 1 - there.low))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 5), (30, 7), (2000, 3000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_auroc_of_parted_scores_ends_where_the_polynomial_does(m, n, confidence):
    """At an area of 1 the lower end solves (1 - a) m n = z^2 a (1 + h (1 - a) / (2 - a) + h a / (1 + a))."""
    z, h = norm.isf((1 - confidence) / 2), (m + n) / 2 - 1
    a = np.polynomial.Polynomial([0, 1])
    left, right = m * n * (1 - a), z**2 * a
    roots = (left * (2 - a) * (1 + a) - right * ((2 - a) * (1 + a) + h * (1 - a) * (1 + a) + h * a * (2 - a))).roots()
    (low,) = [r.real for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    if m == n == 1:
        assert low == pytest.approx(1 / (1 + z**2))
    best = auroc(np.zeros(m), np.ones(n), confidence)
    worst = auroc(np.ones(m), np.zeros(n), confidence)
    assert (best.value, best.low, best.high) == (1.0, pytest.approx(low, abs=1e-9), 1.0)
    assert (worst.value, worst.low, worst.high) == (0.0, 0.0, pytest.approx(1 - low, abs=1e-9))


@pytest.mark.parametrize("area", [0.5, 0.8, 0.95])
def test_the_interval_of_auroc_covers(area):
    shift = math.sqrt(2) * norm.ppf(area)
    rng = np.random.default_rng(0)
    found = [auroc(rng.normal(size=30), rng.normal(size=20) + shift) for _ in range(400)]
    assert 0.93 <= np.mean([interval.low <= area <= interval.high for interval in found]) <= 0.99


@pytest.mark.parametrize(
    ("negatives", "positives"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([0.0], [math.inf])]
)
def test_auroc_needs_finite_scores_of_both_kinds(negatives, positives):
    with pytest.raises(SpecError, match=f"{len(negatives)} negatives, {len(positives)} positives, "):
        auroc(negatives, positives)


def test_a_bootstrap_over_groups_of_equal_size_is_that_of_their_means() -> None:
    # Two groups, one all right and one all wrong: a resample holds 0, 1 or 2 of the right one.
    found = bootstrap_mean([1, 1, 0, 0], ["a", "a", "b", "b"], confidence=0.4)
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 2)
    assert (bootstrap_mean([1, 1, 0, 0], ["a", "a", "b", "b"]).low, bootstrap_mean([1, 0], ["a", "b"]).high) == (0, 1)
    # Sizes 1 and 3: the mean of a resample is 1, 1/4 or 0, with chance 1/4, 1/2 and 1/4.
    uneven = bootstrap_mean([1, 0, 0, 0], ["a", "b", "b", "b"], confidence=0.4)
    assert uneven.value == 0.25 and (uneven.low, uneven.high) == (0.25, 0.25)
    ones = bootstrap_mean([1] * 9, list("aaabbbccc"))
    ends = wilson(3, 3)
    assert (ones.value, ones.high, ones.n) == (1, ends.high, 3) and ones.low == pytest.approx(ends.low)
    with pytest.raises(SpecError):
        bootstrap_mean([1, 0], ["a"])


def test_a_bootstrap_over_groups_covers_where_images_of_a_group_hang_together() -> None:
    rng = np.random.default_rng(0)
    covered = narrow = 0
    for trial in range(200):
        shares = rng.beta(0.6, 0.4, 40)  # mean 0.6, far apart
        values = (rng.random((40, 10)) < shares[:, None]).ravel()
        found = bootstrap_mean(values, np.repeat(np.arange(40), 10), resamples=500, seed=trial)
        plain = wilson(int(values.sum()), 400)
        covered += found.low <= 0.6 <= found.high
        narrow += plain.low <= 0.6 <= plain.high
    assert 0.88 <= covered / 200 <= 0.99
    assert narrow / 200 < 0.75, "intervals over images are too narrow there"


@pytest.mark.parametrize("values", [[1.0, 0.0, 1.0], [1.0, 1.0]])
def test_one_group_alone_says_nothing_of_others(values):
    mean = bootstrap_mean(values, ["a"] * len(values), bounds=(-1, 2))
    assert (mean.value, mean.low, mean.high, mean.n) == (sum(values) / len(values), -1, 2, 1)
    several = bootstrap_mean(values, [str(k) for k in range(len(values))], bounds=(-1, 2))
    assert several.high - several.low < 3
