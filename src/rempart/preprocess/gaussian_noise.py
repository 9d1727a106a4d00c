"""Gaussian noise."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import nn

from rempart.core.types import Images
from rempart.preprocess.catalogue import Traits, preprocessors


@preprocessors.register("gaussian-noise", Traits(differentiable=True, random=True))
def gaussian_noise(*, sigma: Annotated[float, Gt(0)] = 0.1) -> nn.Module:
    """Add Gaussian noise to every pixel and cut to [0, 1].

    One draw per pass. The certificate of randomised smoothing does not hold for it: that needs a vote over many draws,
    and noise that is not cut (`rempart certify`).

    Args:
        sigma: Standard deviation in pixel values of [0, 1].

    Source:
        A common baseline; the default is ours.
    """
    return _Noise(sigma)


class _Noise(nn.Module):
    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Images) -> Images:
        return (x + self.sigma * torch.randn_like(x)).clamp(0, 1)
