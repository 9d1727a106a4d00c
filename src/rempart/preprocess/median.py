"""The median of a window."""

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import nn

from rempart.core.types import Images
from rempart.preprocess.catalogue import Traits, preprocessors
from rempart.preprocess.windows import mirrored


@preprocessors.register("median", Traits(differentiable=True, random=False))
def median(*, size: Annotated[int, Ge(2), Le(9)] = 2) -> nn.Module:
    """Replace each pixel by the median of a square window, channel by channel.

    Edges are mirrored. The gradient goes to the pixel that was the median, which is exact wherever no two are equal.

    Args:
        size: Side of the window. Of an even number of pixels the upper median counts, and an even window reaches one
            pixel further up and left than down and right.

    Source:
        Xu, Evans, Qi 2018, arXiv:1704.01155, section 4.2, with sizes 2 and 3; windows, edges and even sizes as in
        `scipy.ndimage.median_filter`, which the authors' code calls.
    """
    return _Median(size)


class _Median(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Images) -> Images:
        size, (h, w) = self.size, x.shape[2:]
        wide = mirrored(x, size // 2, size - 1 - size // 2)
        window = torch.stack([wide[:, :, i : i + h, j : j + w] for i in range(size) for j in range(size)], -1)
        return window.kthvalue(size * size // 2 + 1, -1).values
