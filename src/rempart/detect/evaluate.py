"""What a detector is worth: how well it tells attacked images from clean ones, and what an attacker leaves of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rempart.core.events import Event, Notify, silent
from rempart.core.repro import Draws
from rempart.core.stats import Rate, auroc, wilson
from rempart.core.threat import Threat
from rempart.core.types import Mask, Scores
from rempart.detect.adaptive import evade, verdict
from rempart.detectors.catalogue import Learning
from rempart.detectors.fitted import Fitted, threshold
from rempart.report.schema import ALL, KNOWS, NONE, Held, Separation

RATES = (0.01, 0.05)
"""False-positive rates that true-positive rates are given at."""


_LARGEST = torch.finfo(torch.float64).max


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of a detector on the three sets, all made from the same source images.

    Attributes:
        calibration: Of clean images that neither the fit nor the test saw.
        clean: Of the clean test images that the model gets right.
        noisy: Of the same under random noise.
        attacked: By attack, the positions in `clean` of what it broke, and the scores of the images it made.
    """

    calibration: Scores
    clean: Scores
    noisy: Scores
    attacked: Mapping[str, tuple[Tensor, Scores]]


def scored(fitted: Fitted, calibration: Learning, test: Learning, *, batch_size: int = 256) -> Scored:
    """Score the three sets. A score that is no number is the largest, as it is flagged; thresholds take none."""

    def raw(x: Tensor, index: Tensor) -> Scores:
        with torch.no_grad():
            parts = [fitted.score(a, b) for a, b in zip(x.split(batch_size), index.split(batch_size), strict=True)]
        return torch.cat(parts).double() if parts else torch.empty(0, dtype=torch.float64)

    def of(x: Tensor, index: Tensor) -> Scores:
        return raw(x, index).nan_to_num(nan=torch.inf).clamp(-_LARGEST, _LARGEST)

    noisy = test.x[:0] if test.noisy is None else test.noisy
    return Scored(
        calibration=raw(calibration.x, calibration.index),
        clean=of(test.x, test.index),
        noisy=of(noisy, test.index[: len(noisy)]),
        attacked={name: (at, of(x, test.index[at])) for name, (at, x) in test.attacked.items()},
    )


def separations(found: Scored, learnt: Sequence[str] = ()) -> tuple[Separation, ...]:
    """How well the scores tell each attack's images from clean and noisy ones. Attacks that broke nothing are left out.

    Negatives are clean and noisy images; positives, images that broke the model. Thresholds come from the calibration
    images alone.
    """
    negatives = torch.cat([found.clean, found.noisy]).numpy()
    rows: list[Separation] = []
    for name, (_, scores) in found.attacked.items():
        if not len(scores):
            continue
        caught = {
            f"{rate:g}": wilson(int((scores > limit).sum()), len(scores))
            for rate, limit in _thresholds(found.calibration, RATES).items()
        }
        rows.append(
            Separation(
                attack=name,
                n=len(scores),
                learnt=name in learnt,
                auroc=auroc(negatives, scores.numpy()),
                caught=caught,
            )
        )
    return tuple(rows)


def false_alarms(found: Scored, fpr: float) -> dict[str, Rate]:
    """Share of the clean test images that are flagged, by the rate the threshold was set for: `fpr` and the usual."""
    limits = _thresholds(found.calibration, sorted({*RATES, fpr}))
    return {f"{rate:g}": wilson(int((found.clean > limit).sum()), len(found.clean)) for rate, limit in limits.items()}


def with_rejection(fitted: Fitted, found: Scored, test: Learning, n: int, threat: Threat) -> tuple[Held, ...]:
    """Share of all n test images that model and detector hold together: as they are, under all attacks, and under each.

    An image is held if the model gets it right, it is not flagged as it is, and the attack either leaves it right or
    makes an image that is flagged. Images that the model gets wrong from the first are not held. Under all attacks
    only images within the threat count; those of minimum-norm attacks and of larger budgets may be outside.
    """
    accepted = ~fitted.flags(found.clean)
    rows: list[Held] = []
    for name, (at, scores) in found.attacked.items():
        held = accepted.clone()
        held[at[~fitted.flags(scores)]] = False
        rows.append(Held(attack=name, held=wilson(int(held.sum()), n)))
    held = accepted & ~_through(fitted, found, test, threat)
    first = [Held(attack=name, held=wilson(int(kept.sum()), n)) for name, kept in ((NONE, accepted), (ALL, held))]
    return (*first, *rows)


def alone(test: Learning, n: int, threat: Threat) -> Rate:
    """Share of all n test images that the model keeps right under the same attacks, within the threat, undefended."""
    broken = torch.zeros(len(test.x), dtype=torch.bool)
    for at, x in test.attacked.values():
        broken[at[threat.holds(test.x[at], x)]] = True
    return wilson(int((~broken).sum()), n)


def under_evasion(
    fitted: Fitted,
    found: Scored,
    test: Learning,
    n: int,
    threat: Threat,
    *,
    surrogate: Fitted | None = None,
    steps: int = 100,
    passes: int = 1,
    batch_size: int = 64,
    notify: Notify = silent,
) -> tuple[Held, Rate | None]:
    """The same under an attacker who knows the detector and its threshold, and may use the other attacks too.

    Returns:
        The share held, and the share of the images that were right and accepted of which the attacker got one through:
        None where no image was.
    """
    rng = Draws(fitted.card.seed, test.index, ("evade",))
    accepted = ~fitted.flags(found.clean)
    through = _through(fitted, found, test, threat)
    spread = float(found.calibration.std(correction=0))
    stand_in = None
    if surrogate is not None:
        with torch.no_grad():
            stand_in = surrogate, float(surrogate.score(test.x, test.index).std(correction=0))
    left = (accepted & ~through).nonzero()[:, 0]
    for done, part in enumerate(left.split(batch_size)):
        x, y = test.x[part], test.y[part]

        def told(event: Event, done: int = done) -> None:
            notify(replace(event, done=done * batch_size, total=len(left)))

        given: Any = {"steps": steps, "passes": passes, "rng": rng.select(part), "notify": told}
        x_adv = evade(fitted, x, y, threat, spread=spread, surrogate=stand_in, **given)
        wrong, unseen = verdict(fitted, x_adv, y, test.index[part], passes=passes)
        through[part] = wrong & unseen & threat.holds(x, x_adv)
    held, caught = int((accepted & ~through).sum()), int((accepted & through).sum())
    evaded = wilson(caught, held + caught) if held + caught else None
    return Held(attack=KNOWS, held=wilson(held, n)), evaded


def _through(fitted: Fitted, found: Scored, test: Learning, threat: Threat) -> Mask:
    """Images of which an attack that does not know the detector got one past it, within the threat."""
    through = torch.zeros(len(test.x), dtype=torch.bool)
    for name, (at, scores) in found.attacked.items():
        within = threat.holds(test.x[at], test.attacked[name][1])
        through[at[within & ~fitted.flags(scores)]] = True
    return through


def _thresholds(calibration: Scores, rates: Sequence[float]) -> dict[float, float]:
    """For each rate, where there are images enough."""
    limits = {rate: threshold(calibration, rate) for rate in rates}
    return {rate: limit for rate, limit in limits.items() if limit is not None}
