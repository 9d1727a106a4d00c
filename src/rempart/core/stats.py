"""Rates and means with confidence intervals, intervals for medians, and paired differences."""

from collections.abc import Sequence
from math import sqrt

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.optimize import brentq
from scipy.stats import beta, binom, norm, rankdata, t

from rempart.core.errors import SpecError


class Rate(BaseModel):
    """A share k / n with its interval.

    Attributes:
        k: Successes.
        n: Trials.
        low: Lower end of the interval, in [0, 1].
        high: Upper end of the interval, in [0, 1].
        confidence: Coverage the interval aims at.
        method: How the interval was made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    k: int
    n: int
    low: float
    high: float
    confidence: float = 0.95
    method: str = "wilson"

    @property
    def value(self) -> float:
        """The point estimate k / n, in [0, 1]."""
        return self.k / self.n

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] (n={self.n})"


def wilson(k: int, n: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval for a share (Wilson 1927): sound near 0 and 1, where the normal one is not.

    Raises:
        SpecError: If n is 0, k is not in [0, n] or the confidence not in (0, 1).
    """
    _check(k, n)
    z = float(norm.isf(_tail(confidence)))
    p, scale = k / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return Rate(k=k, n=n, low=low, high=high, confidence=confidence)


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Rate:
    """The exact (conservative) interval for a share (Clopper, Pearson 1934)."""
    _check(k, n)
    tail = _tail(confidence)
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return Rate(k=k, n=n, low=low, high=high, confidence=confidence, method="clopper-pearson")


def median_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval for the median, from the order statistics (Conover 1999, section 3.2).

    Infinite values are allowed: an attack that found nothing has an infinite minimum norm. Few values (at 95 %
    fewer than 6) cannot carry the confidence: then the interval is their range and covers less.

    Raises:
        SpecError: If there is no value, or one is not a number.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    if n == 0:
        raise SpecError("at least one value for a median", got="none")
    if np.isnan(ordered[-1]):
        raise SpecError("values that are numbers or infinite", got=f"{np.isnan(ordered).sum()} nan")
    rank = int(binom.ppf(_tail(confidence), n, 0.5))
    return float(ordered[max(rank - 1, 0)]), float(ordered[min(n - rank, n - 1)])


class Difference(BaseModel):
    """A paired difference of two shares on the same samples, first minus second."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95


def paired_bootstrap(
    first: Sequence[bool] | np.ndarray,
    second: Sequence[bool] | np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Percentile bootstrap over samples of mean(first) - mean(second), keeping pairs together (Efron 1979).

    Args:
        first: One boolean per sample.
        second: The same samples in the same order.
        confidence: Coverage of the interval.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        SpecError: If the two do not have the same, positive length.
    """
    if len(first) != len(second) or len(first) == 0:
        raise SpecError("two equally long, non-empty sequences", got=f"{len(first)} and {len(second)}")
    gap = np.asarray(first, dtype=int) - np.asarray(second, dtype=int)
    counts = np.array([(gap == v).sum() for v in (-1, 0, 1)])
    draws = np.random.default_rng(seed).multinomial(len(gap), counts / len(gap), size=resamples)
    means = (draws[:, 2] - draws[:, 0]) / len(gap)
    tail = _tail(confidence)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(value=float(gap.mean()), low=float(low), high=float(high), n=len(gap), confidence=confidence)


class Mean(BaseModel):
    """A mean of real values with its interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95


def student(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Mean:
    """Student's interval for a mean (Student 1908): exact for normal values, close for many of any kind.

    One value alone says nothing about its spread: its interval is infinite.

    Raises:
        SpecError: If there is no value, or one is not finite.
    """
    sample = np.asarray(values, dtype=float)
    n = len(sample)
    if n == 0 or not np.isfinite(sample).all():
        raise SpecError("one or more finite values", got=sample.tolist() if n < 10 else f"{n} values")
    tail, value = _tail(confidence), float(sample.mean())
    reach = float(t.isf(tail, n - 1) * sample.std(ddof=1) / sqrt(n)) if n > 1 else np.inf
    return Mean(value=value, low=value - reach, high=value + reach, n=n, confidence=confidence)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[str] | np.ndarray | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Mean:
    """Mean of bounded values with a percentile bootstrap over samples, or over whole groups (images of one patient).

    Where all values are equal, a bootstrap sees no spread. Then up to Wilson's share of 0 in `n` might be other values,
    as far away as the bounds (our design). One group alone says nothing of others: its interval is the bounds.

    Args:
        values: One per sample.
        groups: The group of each; `n` counts the groups. None: each sample is drawn on its own.
        bounds: The least and the largest value there can be.
        confidence: Coverage of the interval; with few groups, say below 20, the bootstrap reaches less.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        SpecError: If there is no value, one is outside the bounds or not a number, or the groups are not as many.

    Source:
        Efron 1979; with groups, Davison, Hinkley 1997, Bootstrap Methods and their Application, section 3.8.
    """
    sample = np.asarray(values, dtype=float)
    least, most = bounds
    if len(sample) == 0 or not ((sample >= least) & (sample <= most)).all():
        raise SpecError(f"one or more values in [{least:g}, {most:g}]", got=f"{len(sample)} values")
    if groups is not None and len(groups) != len(sample):
        raise SpecError("one group for each value", got=f"{len(groups)} for {len(sample)}")
    number = np.arange(len(sample)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    counts, sums = np.bincount(number).astype(float), np.bincount(number, weights=sample)
    n, value = len(counts), float(sample.mean())
    if n == 1:
        return Mean(value=value, low=least, high=most, n=n, confidence=confidence)
    if sample.min() == sample.max():
        other = wilson(0, n, confidence).high
        low, high = value - other * (value - least), value + other * (most - value)
        return Mean(value=value, low=low, high=high, n=n, confidence=confidence)
    rng, tail = np.random.default_rng(seed), _tail(confidence)
    means: list[np.ndarray] = []
    for size in [500] * (resamples // 500) + [resamples % 500] * (resamples % 500 > 0):  # a table of draws stays small
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=size)
        means.append((drawn @ sums) / (drawn @ counts))
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Mean(value=value, low=float(low), high=float(high), n=n, confidence=confidence)


class Auroc(BaseModel):
    """The chance that a positive scores above a negative, ties counting half, with its interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    low: float
    high: float
    negatives: int
    positives: int
    confidence: float = 0.95


def auroc(
    negatives: Sequence[float] | np.ndarray, positives: Sequence[float] | np.ndarray, confidence: float = 0.95
) -> Auroc:
    """Area under the ROC curve (Mann, Whitney 1947), with an interval that is sound near 0 and 1.

    The interval holds the areas a whose distance to the one seen is at most z standard errors *at a*, as Wilson's does
    for shares (Newcombe 2006, Statistics in Medicine 25:559, method 5, with Hanley and McNeil's variance). It takes
    negatives and positives as independent; images and what an attack made of them are not quite.

    Raises:
        SpecError: If either is empty or not finite.
    """
    low, high = (np.asarray(values, dtype=float) for values in (negatives, positives))
    wrong = int((~np.isfinite(low)).sum() + (~np.isfinite(high)).sum())
    if not len(low) or not len(high) or wrong:
        came = f"{len(low)} negatives, {len(high)} positives, {wrong} of them not finite"
        raise SpecError("finite scores of both kinds", got=came)
    m, n = len(low), len(high)
    ranks = rankdata(np.concatenate([high, low]))
    area = float((ranks[:n].sum() - n * (n + 1) / 2) / (m * n))
    z = float(norm.isf(_tail(confidence)))

    def error(a: float) -> float:
        half = (m + n) / 2 - 1
        return sqrt(a * (1 - a) * (1 + half * (1 - a) / (2 - a) + half * a / (1 + a)) / (m * n))

    def beyond(a: float) -> float:
        return abs(a - area) - z * error(a)

    bottom = 0.0 if area == 0 else float(brentq(beyond, 0.0, area - 1e-9))  # pyright: ignore[reportArgumentType]
    top = 1.0 if area == 1 else float(brentq(beyond, area + 1e-9, 1.0))  # pyright: ignore[reportArgumentType]
    return Auroc(value=area, low=bottom, high=top, negatives=m, positives=n, confidence=confidence)


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise SpecError("a confidence in (0, 1)", got=confidence, hint="write 0.95 for 95 %")
    return (1 - confidence) / 2


def _check(k: int, n: int) -> None:
    if n <= 0 or not 0 <= k <= n:
        raise SpecError("a count k in [0, n] with n >= 1", got=f"k={k}, n={n}")
