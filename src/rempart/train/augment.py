"""Random changes of the training images, keyed by sample."""

import torch
from torch.nn import functional as F

from rempart.core.repro import Draws
from rempart.core.types import Images


def augment(x: Images, *, flip: bool, shift: int, rng: Draws, black: float = 0.0) -> Images:
    """Mirror and move images at random.

    Args:
        x: Images of shape (n, c, h, w).
        flip: Mirror each image left to right with probability 1/2.
        shift: Move each image by up to so many pixels up or down and left or right; black comes in.
        rng: The draws of these samples.
        black: Smallest pixel value.
    """
    if flip:
        mirrored = rng.at("flip").uniform(x[:, :1, :1, :1]) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
    if shift:
        height, width = x.shape[2:]
        places = rng.at("shift").uniform(x.new_empty(len(x), 2, dtype=torch.float64), 0, 2 * shift + 1).long()
        windows = F.pad(x, [shift] * 4, value=black).unfold(2, height, 1).unfold(3, width, 1)
        x = windows[torch.arange(len(x), device=x.device), :, places[:, 0], places[:, 1]]
    return x
