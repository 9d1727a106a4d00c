"""Pixels replaced by neighbours, then denoised."""

import math
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle

from rempart.core.types import Images
from rempart.preprocess.catalogue import Traits, preprocessors


@preprocessors.register("pixel-deflection", Traits(differentiable=True, random=True))
def pixel_deflection(
    *, count: Annotated[int, Ge(1)] = 200, window: Annotated[int, Ge(1)] = 10, sigma: Annotated[float, Ge(0)] = 0.04
) -> nn.Module:
    """Replace random pixels by random neighbours and take off noise in the Haar wavelet domain.

    Args:
        count: Pixels replaced, all of them at most.
        window: How many rows and columns away a neighbour may lie.
        sigma: Noise that the wavelets take off, in pixel values of [0, 1]; 0 leaves that step out.

    Source:
        Prakash, Moran, Garber, DiLillo, Storer 2018, arXiv:1801.08926, and the authors' code: 200 pixels, window 10,
        soft BayesShrink with sigma 0.04. Ours differs: pixels are distinct and take the values of the image as it came,
        no class-activation map protects some of them, and each channel is denoised on its own, not in YCbCr. The count
        is made for 299 x 299 pixels and is a large share of a small image.
    """
    return _PixelDeflection(count, window, sigma)


class _PixelDeflection(nn.Module):
    def __init__(self, count: int, window: int, sigma: float) -> None:
        super().__init__()
        self.count, self.window, self.sigma = count, window, sigma

    def forward(self, x: Images) -> Images:
        n, c, h, w = x.shape
        place = torch.rand(n, h * w, device=x.device).argsort(1)[:, : self.count]
        u = torch.rand(2, *place.shape, device=x.device)
        row, column = _near(place // w, h, self.window, u[0]), _near(place % w, w, self.window, u[1])
        source = torch.arange(h * w, device=x.device).expand(n, -1).scatter(1, place, row * w + column)
        x = x.flatten(2).gather(2, source[:, None].expand(n, c, -1)).view(n, c, h, w)
        if self.sigma == 0:
            return x
        return denoised(x, self.sigma, max(1, int(math.log2(min(h, w))) - 3)).clamp(0, 1)


def _near(at: Tensor, size: int, window: int, u: Tensor) -> Tensor:
    """A whole number at most `window` from `at` and inside 0..size - 1, by `u` uniform in [0, 1)."""
    low, high = (at - window).clamp_min(0), (at + window).clamp_max(size - 1)
    return torch.minimum(low + (u * (high - low + 1)).long(), high)


def denoised(x: Images, sigma: float, levels: int) -> Images:
    """Soft thresholding of Haar wavelet coefficients by BayesShrink, in each image, channel and band.

    The threshold of a band is sigma^2 / sqrt(max(mean square - sigma^2, 0)). An odd last row or column counts twice.
    The number of levels is that of scikit-image's `denoise_wavelet`, three less than could be.
    """
    h, w = x.shape[2:]
    even = pad(x, (0, w % 2, 0, h % 2), mode="replicate") if h % 2 or w % 2 else x
    a, b, c, d = (even[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
    mean = (a + b + c + d) / 2
    across, down, both = (
        _shrunk(band, sigma) for band in ((a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)
    )
    if levels > 1:
        mean = denoised(mean, sigma, levels - 1)
    pixels = (mean + across + down + both, mean - across + down - both)
    pixels += (mean + across - down - both, mean - across - down + both)
    return pixel_shuffle(torch.stack(pixels, 2).flatten(1, 2) / 2, 2)[:, :, :h, :w]


def _shrunk(band: Tensor, sigma: float) -> Tensor:
    spread = (band.square().mean((2, 3), keepdim=True) - sigma**2).clamp_min(1e-12).sqrt()
    return band.sign() * (band.abs() - sigma**2 / spread).relu()
