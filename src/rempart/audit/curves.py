"""Accuracy against the budget: from the distances of one minimum-norm attack, and from an eps sweep."""

from dataclasses import replace

import numpy as np
import torch

from rempart.attacks.run import Verdict, attack_data
from rempart.core.events import Notify, silent
from rempart.core.model import Classifier
from rempart.core.stats import wilson
from rempart.core.threat import TOLERANCE, Threat, wider
from rempart.data import Data
from rempart.report.schema import Curve

_POINTS = 25
_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SWEEP_SAMPLES = 200


def from_distances(label: str, verdict: Verdict, threat: Threat) -> Curve:
    """The whole curve from one run: at each budget a sample stands if its smallest perturbation is larger."""
    distance = torch.where(verdict.found, verdict.own_distance, torch.inf).numpy()
    finite = distance[np.isfinite(distance)]
    reach = float(np.quantile(finite, 0.99)) if len(finite) else 0.0
    top = max(1.1 * reach, 2 * (threat.eps or 0.0)) or 1.0
    grid: list[float] = np.union1d(np.linspace(0, top, _POINTS), [threat.eps or 0.0]).tolist()
    standing = [int((verdict.correct.numpy() & (distance > eps * (1 + TOLERANCE))).sum()) for eps in grid]
    rates = tuple(wilson(k, len(distance)) for k in standing)
    return Curve(label=f"{label}, smallest perturbations", norm=verdict.norm, eps=tuple(grid), accuracy=rates)


def sweep(
    model: Classifier,
    data: Data,
    threat: Threat,
    *,
    eot: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    notify: Notify = silent,
) -> Curve:
    """Attack with pgd (20 steps on each of two losses) at growing budgets, on up to 200 samples.

    They lie evenly over the data. Each gradient is the mean over `eot` passes, for random models.

    A sample broken at one budget stays broken at the larger ones, where its image is feasible too; only the others are
    attacked again.
    """
    data = data.spread(_SWEEP_SAMPLES)
    limit = threat.high - threat.low if threat.norm == "linf" else np.inf
    grid = [eps for multiple in _MULTIPLES if not wider(eps := multiple * threat.budget, limit)]
    if len(grid) < len(_MULTIPLES) and wider(limit, grid[-1]):
        grid.append(limit)
    standing = torch.ones(len(data), dtype=torch.bool)
    counts = [0]
    for eps in grid:
        for loss in ("ce", "margin"):
            at = standing.nonzero()[:, 0]
            if len(at) == 0:
                break
            outcome = attack_data(
                model,
                data.take(at),
                replace(threat, eps=eps),
                "pgd",
                {"steps": 20, "loss": loss, "eot": eot, "early_stop": True},
                batch_size=batch_size,
                seed=seed,
                random=eot > 1,
                notify=notify,
            )
            if len(at) == len(data):
                counts[0] = int(outcome.correct.sum())
            standing[at] = outcome.right
        counts.append(int(standing.sum()))
    rates = tuple(wilson(k, len(data)) for k in counts)
    return Curve(label="pgd, eps sweep", norm=threat.norm, eps=(0.0, *grid), accuracy=rates)
