"""What an attack did to the samples of a data set, as the report tells it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rempart.attacks import Verdict, attacks
from rempart.attacks.plan import Planned
from rempart.attacks.run import native
from rempart.core.stats import median_interval, wilson
from rempart.core.threat import Threat
from rempart.report.schema import AttackResult, NormStats, Similarity


def measure(
    attack: Planned,
    threat: Threat,
    verdict: Verdict | None,
    right: np.ndarray,
    *,
    rounded: np.ndarray | None = None,
) -> AttackResult:
    """The figures of one attack, with their intervals.

    Args:
        attack: What was planned.
        threat: The audit's.
        verdict: On the samples the attack was given; None where there was none.
        right: For all samples, whether they are still right after it.
        rounded: The same where only images that survive rounding to 8 bit count, if that was asked for.
    """
    entry = attacks[attack.name]
    tried = 0 if verdict is None else int(verdict.attacked.sum())
    return AttackResult(
        label=attack.label,
        name=attack.name,
        options=attack.options,
        norm=native(entry, threat).norm,
        accuracy=wilson(int(right.sum()), len(right)),
        success=wilson(int((verdict.attacked & verdict.success).sum()), tried)
        if verdict is not None and tried
        else None,
        eight_bit=None if rounded is None else wilson(int(rounded.sum()), len(rounded)),
        norms=_norms(verdict) if verdict is not None and entry.traits.minimum and not attack.survivors else None,
        similarity=None if verdict is None else _similarity(verdict),
        survivors=attack.survivors,
        tried=tried,
        queries=0 if verdict is None else verdict.queries,
        gradients=0 if verdict is None else verdict.gradients,
        seconds=0.0 if verdict is None else verdict.seconds,
        **({} if verdict is None else odd([verdict])),
    )


def _norms(outcome: Verdict) -> NormStats:
    """Sizes of the perturbations over the samples attacked; those without a find count as infinite in the median."""
    attacked = outcome.attacked
    found = attacked & outcome.found
    size = torch.where(outcome.found, outcome.own_distance, torch.inf)[attacked].numpy()
    finds = outcome.own_distance[found].numpy()
    low, high = median_interval(size) if len(size) else (np.inf, np.inf)
    return NormStats(
        norm=outcome.norm,
        found=int(found.sum()),
        n=int(attacked.sum()),
        median=_finite(np.median(size)) if len(size) else None,
        median_low=_finite(low),
        median_high=_finite(high),
        mean=float(finds.mean()) if len(finds) else None,
        quartiles=(float(np.quantile(finds, 0.25)), float(np.quantile(finds, 0.75))) if len(finds) else None,
        rho2=float(outcome.relative[found].mean()) if bool(found.any()) else None,
    )


def _similarity(verdict: Verdict) -> Similarity | None:
    chosen = verdict.attacked & verdict.found
    if verdict.psnr is None or verdict.ssim is None or not bool(chosen.any()):
        return None
    found = verdict.psnr[chosen].numpy(), verdict.ssim[chosen].numpy()
    with np.errstate(invalid="ignore"):  # between two infinite ones: no number, as wanted
        psnr, psnr_low, ssim, ssim_low = (_finite(np.quantile(v, share)) for v in found for share in (0.5, 0.05))
    if psnr is None or psnr_low is None:  # a model that is random may turn an image that nobody changed
        return None
    return Similarity(n=int(chosen.sum()), psnr=psnr, psnr_low=psnr_low, ssim=ssim, ssim_low=ssim_low)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def odd(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What the attacks met that is no number: gradients, and answers, with the smallest distance of one."""
    none = torch.cat([verdict.index[verdict.undefined] for verdict in verdicts]).unique()
    distances = torch.cat([verdict.distance[verdict.undefined] for verdict in verdicts])
    return {
        "singular": sum(verdict.singular for verdict in verdicts),
        "undefined": len(none),
        "undefined_distance": float(distances.min()) if len(distances) else None,
    }


def per_image(outcome: Verdict) -> dict[str, np.ndarray]:
    """What is kept of each image, as columns of a table: `samples.npz` and the file of `rempart attack`."""
    looks = {"psnr": outcome.psnr, "ssim": outcome.ssim}
    return {name: column.numpy() for name, column in looks.items() if column is not None} | {
        "correct": outcome.correct.numpy(),
        "broken": outcome.broken.numpy(),
        "success": outcome.success.numpy(),
        "predicted": outcome.predicted.numpy(),
        "distance": outcome.distance.numpy(),
        "own_distance": outcome.own_distance.numpy(),
        "relative": outcome.relative.numpy(),
        "margin": outcome.margin.numpy(),
    }
