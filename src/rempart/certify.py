"""Randomised smoothing: the vote of a model over Gaussian noise, and the radius within which it cannot change.

Everything certified here is about the smoothed classifier, which answers with the class that wins most often under
noise. It says nothing about the model inside.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import binom
from torch import Tensor, nn

from rempart.attacks.losses import undefined
from rempart.attacks.run import attack_data, check_images
from rempart.core import given
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.core.events import Event, Notify, silent
from rempart.core.model import Classifier, accelerated, frozen, placed
from rempart.core.repro import Draws
from rempart.core.stats import clopper_pearson, wilson
from rempart.core.threat import Norm, Threat
from rempart.core.types import Images, Labels, Logits, Mask, Scores
from rempart.data import Data
from rempart.data.samples import spread
from rempart.report.schema import Bracket, Certificate, Curve

ABSTAIN = -1
"""The answer where the votes are too close."""

_GROUP = 16  # images certified together; an interruption keeps what was finished before
_SHOWN = 6  # images on which a faster copy of the model is checked
_STRIDE = 2**32  # the noise of sample i and draw j has the number i * 2**32 + j
_JUDGED = 1_000  # draws that judge an adversarial image


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the smoothed classifier is asked: the noise, how often, and how sure the answer shall be.

    Attributes:
        sigma: Standard deviation of the noise in pixel units.
        samples: Draws that count.
        selection: Draws that choose the class.
        alpha: Probability with which an answer may be wrong.
        batch_size: Noisy images per forward pass.
        seed: Seed of the noise.

    Raises:
        SpecError: If a number is out of its range, or `samples` too few for any certificate.
    """

    sigma: float
    samples: int = 10_000
    selection: int = 100
    alpha: float = 1e-3
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        _check_noise(self.sigma, self.samples, self.alpha, self.batch_size)
        if self.selection < 1:
            raise SpecError("selection >= 1", got=self.selection)
        if self.alpha ** (1 / self.samples) <= 0.5:
            least = math.floor(-math.log2(self.alpha)) + 1
            raise SpecError(
                f"samples >= {least} at alpha {self.alpha:g}", got=self.samples, hint="fewer could certify nothing"
            )

    @property
    def largest_radius(self) -> float:
        """The l2 radius where every draw falls to the same class: sigma * Phi^-1(alpha^(1 / samples))."""
        return self.sigma * NormalDist().inv_cdf(self.alpha ** (1 / self.samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """What is known about the smoothed classifier at each sample, shape (n) throughout.

    Attributes:
        index: Sample numbers.
        label: True classes.
        predicted: Class of the smoothed classifier, -1 where it abstains.
        radius: l2 radius in pixel units, float64: nearer than that, the smoothed classifier says the same. 0 where it
            abstains. It belongs to the predicted class, right or wrong.
        p_lower: Lower bound of the probability of the selected class under noise.
        votes: How many of the draws fell to the selected class.
        correct: Whether the model itself, without noise, is right.
    """

    index: Tensor
    label: Labels
    predicted: Labels
    radius: Scores
    p_lower: Scores
    votes: Tensor
    correct: Mask

    @property
    def right(self) -> Mask:
        """The smoothed classifier surely gives the true class."""
        return self.predicted == self.label

    @property
    def wrong(self) -> Mask:
        """The smoothed classifier surely gives another class."""
        return ~self.right & (self.predicted != ABSTAIN)

    def certified(self, radius: float) -> Mask:
        """The smoothed classifier surely gives the true class at every image up to this l2 distance, in pixel units."""
        return self.right & (self.radius > radius)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """What an attack did to the smoothed classifier, for the samples in the order of their certificates.

    Attributes:
        predicted: Class by vote on the adversarial image (on the original where that was wrong already), -1 where it
            abstains.
        broken: Surely of another class than the label, at first or within the threat.
        votes: Draws per vote.
        queries: Images the attack sent through the smoothed classifier, each of which costs `draws` noisy images.
        gradients: The same, backward.
        seconds: Wall-clock time of the attack and of the votes on its images.
    """

    predicted: Labels
    broken: Mask
    votes: int
    queries: int
    gradients: int
    seconds: float


def certify(
    model: Classifier,
    data: Data,
    *,
    sigma: float,
    samples: int = 10_000,
    selection: int = 100,
    alpha: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
    notify: Notify = silent,
) -> Certificates:
    """Certify the smoothed classifier g(x) = the class of highest P(model(x + sigma * N(0, I))) around each sample.

    `selection` draws choose a class, `samples` further ones count how often it wins. With p the one-sided
    Clopper-Pearson lower bound of that share at level `alpha`, g is constant nearer than sigma * Phi^-1(p) in l2 if
    p > 1/2; otherwise it abstains. Each certificate is wrong with a probability of at most `alpha`, each taken alone.

    The noise is not cut to the box: g is defined on all of R^d, and the model must bear pixels outside it. Every
    sample gets all its draws: to stop as soon as a radius is reached would spoil the level of the bound. Draws are
    keyed by sample, so that batch size, order and part of the data change them not; a tie in the model's logits may
    fall otherwise in another batch by rounding.

    Args:
        model: The classifier inside; it is left as it was.
        data: The samples.
        sigma: Standard deviation of the noise in pixel units. A model that was not trained with such noise has
            small radii.
        samples: Draws that count, n in the paper. No radius exceeds sigma * Phi^-1(alpha^(1 / samples)).
        selection: Draws that choose the class, n0 in the paper.
        alpha: Probability with which a certificate may be wrong, in (0, 1/2).
        batch_size: Noisy images per forward pass; memory does not grow with `samples`.
        seed: Seed of the noise.
        notify: Receives one event per forward pass.

    Raises:
        SpecError: If a number is out of its range, or `samples` too few for any certificate.
        DataError: If the data do not fit the model.
        ModelError: If logits are not finite.

    Source:
        Cohen, Rosenfeld, Kolter 2019, arXiv:1902.02918, section 3.2.2, CERTIFY.
    """
    sampling = Sampling(
        sigma=sigma, samples=samples, selection=selection, alpha=alpha, batch_size=batch_size, seed=seed
    )
    return join(certify_groups(model, data, sampling, notify=notify))


def certify_groups(
    model: Classifier, data: Data, sampling: Sampling, *, notify: Notify = silent
) -> Iterator[Certificates]:
    """`certify`, a few images at a time, so that an interruption keeps what was finished."""
    sigma, samples, size, seed = sampling.sigma, sampling.samples, sampling.batch_size, sampling.seed
    done, certified = 0, 0
    for batch in data.batches(max(_GROUP, math.ceil(size / sampling.selection))):
        count = len(batch.y)

        def report(event: Event, done: int = done, certified: int = certified, count: int = count) -> None:
            values = {"certified": certified / done} if done else {}
            part = event.done / (event.total or 1)
            at = done + int(part * count)
            notify(Event(stage="certify", done=at, total=len(data), values={**values, "batch": part}))

        x, y = check_images(model, batch.x, batch.y)
        x = placed(model, x)
        y = y.to(x.device)
        with frozen(model):
            correct = _finite(_logits(model, x)).argmax(1) == y
            first = _votes(model, x, batch.index, sigma, sampling.selection, "select", size, seed)
            chosen = first[:, : model.num_classes].argmax(1)
            counts = _votes(model, x, batch.index, sigma, samples, "estimate", size, seed, report)
        votes = counts.gather(1, chosen[:, None])[:, 0].cpu()
        bounds = [
            clopper_pearson(int(k), samples, 1 - 2 * sampling.alpha).low for k in votes
        ]  # two-sided: alpha on each side
        p_lower = torch.tensor(bounds, dtype=torch.float64)
        sure = p_lower > 0.5
        part = Certificates(
            index=batch.index,
            label=batch.y,
            predicted=torch.where(sure, chosen.cpu(), ABSTAIN),
            radius=torch.where(sure, sigma * torch.special.ndtri(p_lower), 0.0),
            p_lower=p_lower,
            votes=votes,
            correct=correct.cpu(),
        )
        done, certified = done + count, certified + int(part.right.sum())
        yield part  # before the news, so that a listener that stops the work loses nothing
        notify(Event(stage="certify", done=done, total=len(data), values={"certified": certified / done}))


def predict(
    model: Classifier,
    x: Images | ArrayLike,
    *,
    sigma: float,
    samples: int = _JUDGED,
    alpha: float = 1e-3,
    index: Tensor | ArrayLike | None = None,
    batch_size: int = 256,
    seed: int = 0,
    notify: Notify = silent,
) -> Labels:
    """The class of the smoothed classifier by vote, or -1 where the two leading classes are too close to tell.

    A class is given if an exact two-sided binomial test of its votes against those of the second rejects a tie at
    level `alpha`; it is then not the class of the smoothed classifier with a probability of at most `alpha`.

    Args:
        model: The classifier inside; it is left as it was.
        x: Images in its box; the noise is not cut to the box.
        sigma: Standard deviation of the noise in pixel units.
        samples: Draws per image.
        alpha: Level of the test, in (0, 1/2).
        index: Sample numbers: the key of the noise. Default 0 to n - 1.
        batch_size: Noisy images per forward pass.
        seed: Seed of the noise.
        notify: Receives one event per forward pass.

    Raises:
        SpecError: If a number is out of its range.
        DataError: If the images do not fit the model.

    Source:
        Cohen, Rosenfeld, Kolter 2019, arXiv:1902.02918, section 3.2.1, PREDICT; the test as in Hung & Fithian 2019.
    """
    _check_noise(sigma, samples, alpha, batch_size)
    x = given.images(model, x)
    index = given.numbers(index, len(x))
    where = next(model.parameters(), x)
    with frozen(model):
        counts = _votes(model, x.to(where), index, sigma, samples, "predict", batch_size, seed, notify)
    top = counts.topk(2, dim=1)
    first, second = top.values.cpu().numpy().T
    chance = np.minimum(1.0, 2 * binom.sf(first - 1, first + second, 0.5))
    leader = top.indices[:, 0].cpu()
    return torch.where(torch.from_numpy(chance <= alpha) & (leader < model.num_classes), leader, ABSTAIN)


def smoothed(model: Classifier, sigma: float, draws: int = 16, *, seed: int = 0) -> Classifier:
    """The smoothed classifier in its soft form, as a classifier: the mean softmax over fixed draws of noise.

    The noise is drawn once, the same for all images and calls, so that it is a deterministic and differentiable
    classifier that can be attacked and audited like any other: the expectation over noise that an attack has to climb,
    as in Salman et al. 2019. Another seed gives other draws. Its certificate is that of the hard vote over all noise,
    of which it is an approximation: judge by `predict`.

    Args:
        model: The classifier inside, shared and not copied.
        sigma: Standard deviation of the noise in pixel units.
        draws: Noisy copies of each image; n images cost n * draws in time and memory.
        seed: Seed of the noise.

    Raises:
        SpecError: If `sigma` is not positive or `draws` less than 1.

    Example:
        >>> defended = smoothed(load("runs/noisy"), sigma=0.25, draws=32)

    Source:
        Salman et al. 2019, arXiv:1906.04584, section 3.
    """
    _check_noise(sigma, draws)
    return Classifier(
        _Smoothed(model, sigma, draws, seed),
        shape=model.shape,
        num_classes=model.num_classes,
        class_names=model.class_names,
        low=model.low,
        high=model.high,
    ).train(model.training)


def attack_smoothed(
    model: Classifier,
    data: Data,
    certificates: Certificates,
    threat: Threat,
    attack: str,
    options: Mapping[str, Any],
    sampling: Sampling,
    *,
    draws: int = 16,
    notify: Notify = silent,
) -> Attacked:
    """Attack the smoothed classifier in its soft form, and judge what comes back by vote with other noise.

    Broken is what the vote surely gives to another class: an abstention breaks nothing, so that the share left is an
    upper bound of the accuracy of the smoothed classifier. Samples that its certificate shows to be wrong are not
    attacked; nor are those that the soft form alone gets wrong.

    Raises:
        ThreatError: If the attack cannot work in this threat.
    """
    predicted, broken = certificates.predicted.clone(), certificates.wrong.clone()
    at, votes = (~broken).nonzero()[:, 0], min(sampling.samples, _JUDGED)
    if len(at) == 0:
        return Attacked(predicted=predicted, broken=broken, votes=votes, queries=0, gradients=0, seconds=0.0)
    left = data.take(at)
    with frozen(model):
        fast = accelerated(model, left.batch(spread(len(left))[:_SHOWN]).x)
        outcome = attack_data(
            smoothed(fast, sampling.sigma, draws, seed=sampling.seed),
            left,
            threat,
            attack,
            options,
            batch_size=max(1, sampling.batch_size // draws),
            seed=sampling.seed,
            notify=notify,
        )
    for rows in torch.arange(len(left)).split(_GROUP):

        def told(event: Event, done: int = int(rows[0])) -> None:
            part = {"batch": event.done / (event.total or 1)}
            notify(Event(stage="vote", done=done, total=len(left), values=part))

        batch, z = left.batch(rows), outcome.x_adv[rows]
        classes = predict(
            model,
            z,
            sigma=sampling.sigma,
            samples=votes,
            alpha=sampling.alpha,
            index=batch.index,
            batch_size=sampling.batch_size,
            seed=sampling.seed,
            notify=told,
        )
        within = threat.holds(batch.x, z.to(batch.x.dtype))
        predicted[at[rows]] = classes
        broken[at[rows]] = within & (classes != batch.y) & (classes != ABSTAIN)
    return Attacked(
        predicted=predicted,
        broken=broken,
        votes=votes,
        queries=outcome.queries,
        gradients=outcome.gradients,
        seconds=outcome.seconds,
    )


def covering(threat: Threat, dims: int) -> float:
    """The smallest l2 radius, in pixel units, whose ball holds every perturbation of `dims` pixels within the threat.

    l2: eps. l1: eps, because no vector is longer in l2 than in l1. linf: eps * sqrt(dims), the corner of the cube.
    """
    return threat.budget * (math.sqrt(dims) if threat.norm == "linf" else 1.0)


def section(certificates: Certificates, sampling: Sampling, bracket: Bracket | None) -> Certificate:
    """The figures of a certification for the report."""
    n = len(certificates.index)
    radius = torch.where(certificates.right, certificates.radius, 0.0)
    return Certificate(
        sigma=sampling.sigma,
        samples=sampling.samples,
        selection=sampling.selection,
        alpha=sampling.alpha,
        largest=sampling.largest_radius,
        right=wilson(int(certificates.right.sum()), n),
        abstained=wilson(int((certificates.predicted == ABSTAIN).sum()), n),
        median_radius=float(np.median(radius.numpy())),
        bracket=bracket,
    )


def bracketed(
    certificates: Certificates,
    attacked: Attacked,
    threat: Threat,
    attack: str,
    options: Mapping[str, Any],
    *,
    draws: int,
    dims: int,
) -> Bracket:
    """Certificate and attack side by side, about the same classifier and the same samples."""
    radius, n = covering(threat, dims), len(certificates.index)
    certified = certificates.certified(radius)
    return Bracket(
        norm=threat.norm,
        eps=threat.budget,
        radius=radius,
        lower=wilson(int(certified.sum()), n),
        upper=wilson(int((~attacked.broken).sum()), n),
        contradictions=int((certified & attacked.broken).sum()),
        attack=attack,
        options=dict(options),
        draws=draws,
        votes=attacked.votes,
        queries=attacked.queries,
        gradients=attacked.gradients,
        seconds=attacked.seconds,
    )


def certified_curve(
    certificates: Certificates, sampling: Sampling, norm: Norm, *, dims: int, extra: float | None = None
) -> Curve:
    """Certified accuracy against the budget of a norm, at every quarter of sigma that a certificate can reach."""
    scale = covering(Threat(norm=norm, eps=1.0), dims)
    step = sampling.sigma / 4
    radii = [k * step for k in range(math.floor(sampling.largest_radius / step) + 2)]
    grid = sorted({*(radius / scale for radius in radii), *(() if extra is None else (extra,))})
    counts = [int(certificates.certified(eps * scale).sum()) for eps in grid]
    rates = tuple(wilson(k, len(certificates.index)) for k in counts)
    return Curve(label="certified", norm=norm, eps=tuple(grid), accuracy=rates)


def join(parts: Iterable[Certificates]) -> Certificates:
    """One table out of several, in their order."""
    parts = list(parts)
    if not parts:
        raise DataError("at least one image to certify", got="none", hint="check the selection of the data")
    names = [field.name for field in fields(Certificates)]
    return Certificates(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def _check_noise(sigma: float, samples: int, alpha: float = 0.1, batch_size: int = 1) -> None:
    if not (math.isfinite(sigma) and sigma > 0):
        raise SpecError("a noise level sigma > 0 in pixel units", got=sigma, hint="for example 0.25")
    if samples < 1:
        raise SpecError("one draw of noise or more", got=samples)
    if not 0 < alpha < 0.5:
        raise SpecError("alpha in (0, 0.5)", got=alpha, hint="write 0.001 for an error in a thousand")
    if batch_size < 1:
        raise SpecError("a batch size >= 1", got=batch_size)


def _votes(
    model: Classifier,
    x: Images,
    index: Tensor,
    sigma: float,
    samples: int,
    stage: str,
    batch_size: int,
    seed: int,
    notify: Notify = silent,
) -> Tensor:
    """How many draws of noise fall to each class, and to none (`undefined`), int64, shape (n, K + 1).

    Raises:
        ModelError: If none of the draws of a pass falls to a class.
    """
    n, classes, total = len(x), model.num_classes + 1, len(x) * samples
    counts = torch.zeros(n * classes, dtype=torch.int64, device=x.device)
    for first in range(0, total, batch_size):
        notify(Event(stage=stage, done=first, total=total))
        pairs = torch.arange(first, min(first + batch_size, total))
        rows, numbers = pairs // samples, pairs % samples
        draws = Draws(seed, index[rows] * _STRIDE + numbers, ("smoothing", stage))
        rows = rows.to(x.device)
        images = x[rows]
        z = _logits(model, images + sigma * draws.normal(images))
        none = undefined(z)
        if bool(none.all()):
            raise ModelError(
                "finite logits",
                got="NaN or infinity under noise",
                hint="the noise is not cut to the box: can the model bear pixels outside it?",
            )
        voted = z.argmax(1).masked_fill(none, classes - 1)
        counts += torch.bincount(rows * classes + voted, minlength=n * classes)
    return counts.view(n, classes)


def _logits(model: Classifier, x: Images) -> Logits:
    with torch.no_grad():
        return model(x)


def _finite(z: Logits) -> Logits:
    if not bool(torch.isfinite(z).all()):
        raise ModelError("finite logits", got="NaN or infinity", hint="check weights and input range")
    return z


class _Smoothed(nn.Module):
    """The logarithm of the mean softmax over draws of noise."""

    noise: Tensor

    def __init__(self, model: Classifier, sigma: float, draws: int, seed: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws
        like = torch.empty((draws, *model.shape), dtype=torch.float64)
        noise = sigma * Draws(seed, torch.arange(draws), ("smoothing", "soft")).normal(like)
        self.register_buffer("noise", noise.to(next(model.parameters(), torch.zeros(()))))

    def forward(self, x: Images) -> Logits:
        """Logits of the mean over noise."""
        noisy = (x[:, None] + self.noise.to(x)).flatten(0, 1)
        if noisy.requires_grad:
            noisy.register_hook(lambda slope: slope.nan_to_num(0.0, 0.0, 0.0))  # of one draw: the others go on
        odds = self.model(noisy).log_softmax(1)
        odds = odds.masked_fill(odds.isnan(), -torch.inf)  # a draw that falls to no class votes for none
        z = odds.unflatten(0, (len(x), self.draws)).logsumexp(1) - math.log(self.draws)
        return z.masked_fill(z.isneginf().all(1, keepdim=True), 0.0)  # all draws fall to none: no class is preferred
