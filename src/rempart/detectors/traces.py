"""What attacks leave in an image, as a fixed count of numbers: how neighbours differ, and what the model says of it."""

import torch
from torch import Tensor

from rempart.core.model import Classifier
from rempart.core.types import Images

LEVELS = 255
REACH = 12
"""Differences between neighbours are told apart up to this many levels."""
_WIDTH = 0.5  # of a bin, in levels: wide enough that whole levels, too, have a gradient
_LOGITS = 10  # largest logits looked at


def stored(x: Images, low: float, high: float) -> Images:
    """Images as a file of 256 levels keeps them, with the gradient of the images themselves."""
    scale = LEVELS / (high - low)
    return x + (((x.detach() - low) * scale).round() / scale + low - x.detach())


def histograms(x: Images, low: float, high: float) -> Tensor:
    """How often neighbours differ by so many levels: square roots of shares, shape (n, axes * 2 * (2 * REACH + 1)).

    First and second differences along each spatial axis, over all channels, counted in soft bins one level apart; the
    outermost bins take what lies beyond. Square roots even out the variance of rare and frequent bins.
    """
    levels = (x - low) * (LEVELS / (high - low))
    parts: list[Tensor] = []
    for axis in range(2, x.ndim):
        for order in (1, 2):
            difference = torch.diff(levels, n=order, dim=axis) if x.shape[axis] > order else torch.zeros_like(levels)
            flat = difference.flatten(1).clamp(-REACH, REACH)
            parts += [torch.exp(-0.5 * ((flat - k) / _WIDTH).square()).mean(1) for k in range(-REACH, REACH + 1)]
    return (torch.stack(parts, 1) + 1e-4).sqrt()


def responses(model: Classifier, x: Images) -> Tensor:
    """What the model says of images and of smoothed copies, shape (n, 2 k + 2), k = min(classes, 10).

    Its largest logits, sorted and less their mean; the same logits of the image smoothed by (1, 2, 1) / 4 along each
    axis; and for both log-sum-exp less the mean.
    """
    first, second = model(x), model(_smoothed(x))
    order = first.argsort(dim=1, descending=True)[:, :_LOGITS]
    middles = [z - z.mean(1, keepdim=True) for z in (first, second)]
    said = [z.gather(1, order) for z in middles] + [z.logsumexp(1, keepdim=True) for z in middles]
    return torch.cat(said, 1)


def _smoothed(x: Images) -> Images:
    for axis in range(2, x.ndim):
        size = x.shape[axis]
        before = x.index_select(axis, torch.arange(size, device=x.device).sub(1).clamp_min(0))
        after = x.index_select(axis, torch.arange(size, device=x.device).add(1).clamp_max(size - 1))
        x = (before + 2 * x + after) / 4
    return x
