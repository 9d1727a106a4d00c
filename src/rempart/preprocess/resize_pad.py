"""A random size at a random place."""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from rempart.core.types import Images
from rempart.preprocess.catalogue import Traits, preprocessors


@preprocessors.register("resize-pad", Traits(differentiable=True, random=True))
def resize_pad(*, smallest: Annotated[float, Ge(0.1), Le(1)] = 0.9) -> nn.Module:
    """Shrink each image to a random size and put it at a random place on black.

    Height uniform over the whole numbers from smallest * h to h, the width in proportion; nearest neighbour at pixel
    centres.

    Args:
        smallest: Least height over that of the image.

    Source:
        Xie, Wang, Zhang, Ren, Yuille 2018, arXiv:1711.01991: 299 pixels grow to between 310 and 330 on a canvas of 331.
        Ours keeps the size of the image, so that any network fits behind it: the image shrinks, from the same share
        of the canvas on (0.937 there, 0.9 here). The paper's mean over 30 passes is left to who uses the model.
    """
    return _ResizePad(smallest)


class _ResizePad(nn.Module):
    def __init__(self, smallest: float) -> None:
        super().__init__()
        self.smallest = smallest

    def forward(self, x: Images) -> Images:
        n, c, h, w = x.shape
        u = torch.rand(3, n, 1, device=x.device, dtype=torch.float64)
        least = max(1, math.ceil(self.smallest * h))
        height = least + (u[0] * (h - least + 1)).long()
        width = ((2 * height * w + h) // (2 * h)).clamp_min(1)  # rounded
        rows, inside_rows = _places(h, height, (u[1] * (h - height + 1)).long())
        columns, inside_columns = _places(w, width, (u[2] * (w - width + 1)).long())
        x = x.gather(2, rows[:, None, :, None].expand(n, c, h, w))
        x = x.gather(3, columns[:, None, None, :].expand(n, c, h, w))
        return x * (inside_rows[:, None, :, None] & inside_columns[:, None, None, :])


def _places(size: int, part: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """For each place of an axis, where its pixel comes from, and whether it holds one."""
    at = torch.arange(size, device=part.device) - start
    return ((2 * at + 1) * size // (2 * part)).clamp(0, size - 1), (at >= 0) & (at < part)
