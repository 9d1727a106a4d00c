"""A blur that stops at edges."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from rempart.core.types import Images
from rempart.preprocess.catalogue import Traits, preprocessors
from rempart.preprocess.windows import mirrored


@preprocessors.register("bilateral", Traits(differentiable=True, random=False))
def bilateral(
    *,
    radius: Annotated[int, Ge(1), Le(7)] = 2,
    sigma_color: Annotated[float, Gt(0)] = 0.1,
    sigma_space: Annotated[float, Gt(0)] = 3.0,
) -> nn.Module:
    """Replace each pixel by a mean of its neighbours, near ones and ones of similar colour counting most.

    The weight of neighbour q of pixel p is exp(-|p - q|^2 / (2 sigma_space^2) - |x_p - x_q|^2 / (2 sigma_color^2)),
    with the colour distance over all channels. Edges are mirrored.

    Args:
        radius: The window has a side of 2 radius + 1 pixels.
        sigma_color: In pixel values of [0, 1].
        sigma_space: In pixels.

    Source:
        Tomasi, Manduchi 1998, ICCV. The defaults are ours, within the ranges in use.
    """
    return _Bilateral(radius, sigma_color, sigma_space)


class _Bilateral(nn.Module):
    def __init__(self, radius: int, sigma_color: float, sigma_space: float) -> None:
        super().__init__()
        self.radius, self.sigma_color, self.sigma_space = radius, sigma_color, sigma_space

    def forward(self, x: Images) -> Images:
        r, (h, w) = self.radius, x.shape[2:]
        wide = mirrored(x, r, r)
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for i in range(2 * r + 1):
            for j in range(2 * r + 1):
                other = wide[:, :, i : i + h, j : j + w]
                near = ((i - r) ** 2 + (j - r) ** 2) / (2 * self.sigma_space**2)
                like = (x - other).square().sum(1, keepdim=True) / (2 * self.sigma_color**2)
                weight = (-near - like).exp()
                total, weights = total + weight * other, weights + weight
        return (total / weights).clamp(0, 1)
