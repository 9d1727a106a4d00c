"""Neighbourhoods of pixels near the edge of an image."""

import torch

from rempart.core.types import Images


def mirrored(x: Images, before: int, after: int) -> Images:
    """Images with a margin, reflected about the edge so that the last pixel comes twice (c b a | a b c | c b a).

    Args:
        x: Shape (n, c, h, w).
        before: Rows above and columns to the left.
        after: Rows below and columns to the right.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        at = torch.arange(-before, size + after, device=x.device) % (2 * size)
        x = x.index_select(axis, torch.where(at < size, at, 2 * size - 1 - at))
    return x
