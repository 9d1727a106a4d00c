"""The attack on a classifier and its detector together: wrong, and not flagged."""

from itertools import product

import torch
from torch import Tensor, nn

from rempart.attacks.apgd import apgd
from rempart.attacks.losses import mean_logits, reached
from rempart.core.errors import DataError
from rempart.core.events import Event, Notify, silent
from rempart.core.model import frozen
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels, Logits, Mask, Scores
from rempart.detectors.fitted import Fitted

_CLASSES = 9  # wrong classes aimed at in all
_LEAST = 1e-9
"""Spread of scores that are all the same."""


class Rejecting(nn.Module):
    """A classifier and its detector as one network with a class more: `rejected`.

    Its logit is max_k z_k + m (s - t) / sigma, with s the score, t the threshold, sigma the spread of clean scores and
    m the mean distance of the image's logits to their greatest (a constant for gradients). It leads just where the
    detector flags the image. The gradient of a surrogate is divided by the spread of its own scores. To be given a
    wrong class by this network is to fool both, so that every targeted attack on classifiers is an adaptive attack on
    detectors.

    Source:
        Carlini & Wagner 2017, arXiv:1705.07263, section 3.2, whose logit is (1 + s) max_k z_k. Ours does not depend on
        the scales of logits and scores.
    """

    def __init__(self, fitted: Fitted, spread: float, surrogate: tuple[Fitted, float] | None = None) -> None:
        super().__init__()
        if fitted.card.threshold is None:
            raise DataError("a calibrated detector", got="one without threshold", hint="calibrate it on clean images")
        self.fitted, self.surrogate = fitted, surrogate
        self.model, self.threshold, self.spread = fitted.model, fitted.card.threshold.value, max(spread, _LEAST)
        self.num_classes = fitted.model.num_classes + 1
        self.low, self.high = fitted.model.low, fitted.model.high
        self.noise = torch.Generator().manual_seed(0)

    def forward(self, x: Images) -> Logits:
        """Logits of the classes and of `rejected`, shape (n, classes + 1)."""
        z = self.model(x)
        top = z.amax(1)
        size = (top[:, None] - z).mean(1).detach().clamp_min(1e-6)
        return torch.cat([z, (top + size * self._excess(x).to(z.dtype))[:, None]], 1)

    def _excess(self, x: Images) -> Scores:
        """(s - t) / sigma, with the gradient of the surrogate where the detector has none of its own."""
        index = torch.arange(len(x))
        score = self.fitted.detector.score
        draw = int(torch.randint(2**31, (), generator=self.noise))
        rng = Draws(draw, index, ("evade",))  # not the noise of the defender
        excess = (score(self.model, x, self.fitted.state, rng=rng) - self.threshold) / self.spread
        if self.surrogate is None:
            return excess
        stand_in, spread = self.surrogate
        smooth = stand_in.detector.score(self.model, x, stand_in.state, rng=rng) / max(spread, _LEAST)
        return excess.detach() + smooth - smooth.detach()


def evade(
    fitted: Fitted,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    spread: float,
    surrogate: tuple[Fitted, float] | None = None,
    targets: int = 3,
    steps: int = 100,
    passes: int = 1,
    rng: Draws,
    notify: Notify = silent,
) -> Images:
    """Look for images that the model gets wrong and the detector accepts.

    APGD on the network of `Rejecting`, aimed at each of the most likely wrong classes in turn, on two losses, then at
    the other classes on one. A sample leaves once it is found. Noise of a random detector is averaged over 8 passes or
    more, and is not the noise it is judged by; it is drawn for the images attacked together, so that here the batch
    counts. Where detector or model is random, what lies just below the threshold is flagged by every other draw: what
    is left is attacked once more, with the threshold one spread lower.

    Args:
        fitted: A calibrated detector with its classifier.
        x: Images in the box.
        y: True classes.
        threat: Needs a budget.
        spread: Standard deviation of the detector's scores of clean images.
        surrogate: A fitted detector whose gradient stands in for one that has none, and the standard deviation of its
            scores of clean images.
        targets: Wrong classes to aim at on both losses, at most all; on one, up to 9.
        steps: Steps of each ascent.
        passes: Passes over which gradients are averaged: more than one where the model is random.
        rng: Draws of the samples.
        notify: Receives progress.

    Returns:
        Images like `x`, feasible for `threat`. Where none was found, an image that fools the classifier, if one was.

    Source:
        After Carlini & Wagner 2017, arXiv:1705.07263, and Tramer et al. 2020, arXiv:2002.08347.
    """
    joint = Rejecting(fitted, spread, surrogate)
    level = joint.threshold
    best, order = x.clone(), _wrong_first(fitted, x, y)[:, : max(targets, _CLASSES)]
    fooled = torch.zeros(len(x), dtype=torch.bool)
    todo = torch.arange(len(x))
    depths = (0.0, 1.0) if fitted.detector.random or passes > 1 else (0.0,)
    likely, others = range(min(targets, order.shape[1])), range(targets, order.shape[1])
    aims = [*product(("margin", "ce"), likely), *product(("margin",), others)]
    plans = [(depth, loss, k) for depth in depths for loss, k in aims]
    with frozen(fitted.model):
        for done, (depth, loss, k) in enumerate(plans):
            notify(Event(stage="evade", done=done, total=len(plans), values={"left": len(todo) / max(1, len(x))}))
            if len(todo) == 0:
                break
            joint.threshold = level - depth * joint.spread
            found = apgd(
                joint,
                x[todo],
                order[todo, k],
                threat,
                steps=steps,
                loss=loss,  # pyright: ignore[reportArgumentType]
                eot=max(passes, 8) if fitted.detector.random else passes,
                targeted=True,
                rng=rng.select(todo).at("evade", k, loss, *(["deeper"] if depth else [])),
            )
            wrong, accepted = verdict(fitted, found, y[todo], rng.index[todo], passes=passes)
            first = wrong & ~fooled[todo]
            fooled[todo] |= wrong
            best[todo[(wrong & accepted) | first]] = found[(wrong & accepted) | first]
            todo = todo[~(wrong & accepted)]
    return best


def verdict(fitted: Fitted, x: Images, y: Labels, index: Tensor, *, passes: int = 1) -> tuple[Mask, Mask]:
    """Which images the model gets wrong, by mean logits over `passes`, and which the detector accepts."""
    with frozen(fitted.model), torch.no_grad():
        wrong = reached(mean_logits(fitted.model, x, passes), y, targeted=False)
        return wrong, ~fitted.flags(fitted.score(x, index))


def _wrong_first(fitted: Fitted, x: Images, y: Labels) -> Tensor:
    """The wrong classes of each image, the most likely first."""
    with frozen(fitted.model), torch.no_grad():
        z = fitted.model(x).scatter(1, y[:, None], -torch.inf)
    return z.argsort(1, descending=True)[:, :-1]
