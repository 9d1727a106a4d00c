"""Do the neurons that change most carry the wrong prediction? Mask them, put back what they were, and compare."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.stats import norm as normal
from scipy.stats import t as student_t
from torch import Tensor

from rempart.core.errors import DataError, ModelError
from rempart.core.features import Neurons, features, watched
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.core.stats import Difference, Mean, Rate, student, wilson
from rempart.core.types import Images, Labels
from rempart.explain.sensitivity import Choose, top
from rempart.report.schema import EVERY, Effect, Test

TESTS: tuple[Test, ...] = ("zero, clean", "zero, attacked", "mean, clean", "mean, attacked", "restored", "planted")
CLEAN = ("zero, clean", "mean, clean", "planted")
"""The tests that show the original images; the others show the attacked ones."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Images that a model gets right, and what an attack made of them.

    Attributes:
        index: Numbers of the images in their data set.
        x: The images, shape (n, c, *s).
        x_adv: Their counterparts.
        y: True classes.
    """

    index: Tensor
    x: Images
    x_adv: Images
    y: Labels


def effects(
    model: Classifier,
    sigma: Neurons,
    pairs: Pairs,
    shares: Sequence[float],
    *,
    draws: int = 5,
    seed: int = 0,
    batch_size: int = 64,
) -> Iterator[Effect]:
    """Do to the most sensitive neurons, the least sensitive and random ones what each test says; measure accuracy.

    Sensitivities should come from other images than `pairs`. Tests run layer by layer, and on all layers at once.

    Args:
        model: The classifier; left as it was.
        sigma: By layer, the sensitivities to choose by.
        pairs: What to test on.
        shares: Of the neurons of each layer.
        draws: Random choices, two or more.
        seed: Of these choices.
        batch_size: Images at a time.

    Raises:
        DataError: If there are no pairs, or too few draws.
        ModelError: If a layer runs several times in a pass.

    Source:
        The claim is that of Zhang et al. 2021, arXiv:1909.06978, abstract; the tests are our design.
    """
    if len(pairs.x) == 0 or draws < 2:
        raise DataError("one pair and two draws or more", got=f"{len(pairs.x)} pairs, {draws} draws")
    layers = list(sigma)
    run_once(model, pairs.x[:1], layers)
    rng = Draws(seed, torch.zeros(1, dtype=torch.int64), ("explain",))
    with frozen(model), torch.no_grad():
        means = _means(model, pairs.x, layers, batch_size)
        intact = {kind: _right(model, pairs, kind, means, batch_size, {}) for kind in ("zero, clean", "zero, attacked")}
        for group in (*([layer] for layer in layers), *([layers] if len(layers) > 1 else [])):
            for share in shares:

                def masks(choose: Choose, draw: int = 0, group: Sequence[str] = group, share: float = share) -> Neurons:
                    return {name: top(sigma[name], share, choose, rng.at(name, draw)) for name in group}

                for test in TESTS:
                    run = partial(_right, model, pairs, test, means, batch_size)
                    most, least = run(masks("sensitive")), run(masks("least"))
                    random = np.stack([run(masks("random", draw)) for draw in range(draws)])
                    before = intact["zero, clean" if test in CLEAN else "zero, attacked"]
                    yield effect(group, test, share, before, most, least, random, seed=seed)


def effect(
    layers: Sequence[str],
    test: Test,
    share: float,
    before: np.ndarray,
    sensitive: np.ndarray,
    least: np.ndarray,
    random: np.ndarray,
    *,
    seed: int = 0,
) -> Effect:
    """The figures of one test from which images were right, shape (n); under the random choices, shape (draws, n)."""
    return Effect(
        layer=layers[0] if len(layers) == 1 else EVERY,
        test=test,
        share=share,
        before=_rate(before),
        sensitive=_rate(sensitive),
        least=_rate(least),
        random=_cut(student(random.mean(1))),
        gap=against(sensitive, random, seed=seed),
    )


def against(first: np.ndarray, draws: np.ndarray, *, seed: int = 0, confidence: float = 0.95) -> Difference:
    """mean(first) - mean(draws) with a percentile bootstrap that draws images and draws anew, both with replacement.

    Of few images or draws a bootstrap is too sure, of images that all agree wholly so. Two images stand beside those
    there are, one for each side, and the deviations of the draws are stretched to Student's.

    Source:
        Our design; the two images are in the manner of Agresti, Min 2005, Statistics in Medicine 24, who add half an
        observation to each cell of the table of matched pairs.

    Args:
        first: One boolean per image, shape (n).
        draws: The same images under each draw, shape (draws, n).
        seed: Of the resampling.
        confidence: Coverage of the interval.
    """
    n, many = len(first), len(draws)
    generator = np.random.default_rng(seed)
    ours, theirs = np.append(first, [1.0, 0.0]), np.column_stack([draws, np.zeros(many), np.ones(many)])
    images = generator.multinomial(n + 2, np.full(n + 2, 1 / (n + 2)), size=_RESAMPLES) / (n + 2)
    weights = generator.multinomial(many, np.full(many, 1 / many), size=_RESAMPLES) / many
    tail = (1 + confidence) / 2
    stretch = np.sqrt(many / (many - 1)) * student_t.ppf(tail, many - 1) / normal.ppf(tail)
    weights = 1 / many + stretch * (weights - 1 / many)
    gaps = images @ ours - ((images @ theirs.T) * weights).sum(1)
    value = first.mean() - draws.mean()
    low, high = np.quantile(gaps, [1 - tail, tail])
    ends = min(low, value), max(high, value)
    value, low, high = np.round([value, *np.clip(ends, -1, 1)], 12) + 0.0  # a zero is no rounding error, nor -0
    return Difference(value=float(value), low=float(low), high=float(high), n=n, confidence=confidence)


def pull(model: Classifier, pairs: Pairs, layers: Sequence[str], *, batch_size: int = 64) -> Neurons:
    """First-order contribution of each neuron to the adversarial class: <F(x') - F(x), gradient of (z_y' - z_y) at x'>.

    y' is the class given to x'; where that is still y, the most likely other one. Mean over pairs, float64, on the CPU;
    positive where the change of the neuron pushes towards y'.

    Source:
        Our design: the sources weigh sensitivities by gradients without saying how (`explain` in the methods page).
    """
    sums: dict[str, Tensor] = {}
    for x, x_adv, y in zip(*(part.split(batch_size) for part in (pairs.x, pairs.x_adv, pairs.y)), strict=True):
        with frozen(model):
            with torch.no_grad(), features(model, layers) as seen:
                model(x)
            before = {layer: seen[layer].clone() for layer in layers}
            with torch.enable_grad(), features(model, layers) as seen:
                z = model(x_adv.detach().clone().requires_grad_())
            rival = z.detach().scatter(1, y[:, None], -torch.inf).argmax(1)
            gain = (z.gather(1, rival[:, None]) - z.gather(1, y[:, None])).sum()
            slopes = torch.autograd.grad(gain, [seen[layer] for layer in layers], materialize_grads=True)
        for layer, slope in zip(layers, slopes, strict=True):
            part = (seen[layer].detach() - before[layer]) * slope
            part = part.flatten(2).sum(2) if part.ndim > 2 else part
            part = part.double().sum(0).cpu()
            sums[layer] = sums[layer] + part if layer in sums else part
    return {layer: value / len(pairs.x) for layer, value in sums.items()}


def _right(
    model: Classifier,
    pairs: Pairs,
    test: Test,
    means: Neurons,
    batch_size: int,
    chosen: Neurons,
) -> np.ndarray:
    """Which images are classified rightly while the test is done to the chosen neurons."""
    shown, other = (pairs.x, pairs.x_adv) if test in CLEAN else (pairs.x_adv, pairs.x)
    right: list[Tensor] = []
    for x, twin, y in zip(*(part.split(batch_size) for part in (shown, other, pairs.y)), strict=True):
        twins: Neurons = {}
        if test in ("restored", "planted") and chosen:
            with features(model, chosen) as seen:
                model(twin)
            twins = dict(seen)

        def put(layer: str, value: Tensor, twins: Neurons = twins) -> Tensor:
            mask = chosen[layer].to(value.device).view(1, -1, *(1,) * (value.ndim - 2))
            if test in ("restored", "planted"):
                new = twins[layer]
            elif test.startswith("mean"):
                new = means[layer].to(value)
            else:
                new = torch.zeros((), dtype=value.dtype, device=value.device)
            return torch.where(mask, new, value)

        with watched(model, chosen, put):
            right.append(model(x).argmax(1) == y)
    return torch.cat(right).cpu().numpy()


def _means(model: Classifier, x: Images, layers: Sequence[str], batch_size: int) -> Neurons:
    """The mean activation of each neuron over images, place by place, shape (1, neurons, *map)."""
    sums: dict[str, Tensor] = {}
    for part in x.split(batch_size):
        with features(model, layers) as seen:
            model(part)
        for layer in layers:
            value = seen[layer].sum(0, keepdim=True)
            sums[layer] = sums[layer] + value if layer in sums else value
    return {layer: value / len(x) for layer, value in sums.items()}


def run_once(model: Classifier, x: Images, layers: Sequence[str]) -> None:
    """Refuse layers that run several times in a pass: which time is to be masked would be a choice of ours.

    Raises:
        ModelError: If there is one.
    """
    runs = Counter[str]()
    with frozen(model), torch.no_grad(), watched(model, layers, lambda layer, _: runs.update([layer])):
        model(x)
    if several := [f"{runs[layer]} times {layer}" for layer in layers if runs[layer] > 1]:
        raise ModelError("layers that run once in a pass", got=", ".join(several), hint="name others with --layers")


def _cut(mean: Mean) -> Mean:
    """No accuracy lies outside [0, 1], whatever Student's interval says."""
    return mean.model_copy(update={"low": max(mean.low, 0.0), "high": min(mean.high, 1.0)})


def _rate(right: np.ndarray) -> Rate:
    return wilson(int(right.sum()), len(right))
