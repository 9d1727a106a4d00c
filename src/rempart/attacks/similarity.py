"""How much two images look alike: PSNR and SSIM."""

import numpy as np
import torch
from scipy.ndimage import correlate1d

from rempart.core.types import Images, Scores

_REACH, _SIGMA = 5, 1.5  # a window of 11 x 11
_K1, _K2 = 0.01, 0.03


def psnr(x: Images, z: Images, span: float) -> Scores:
    """Peak signal-to-noise ratio 10 log10(span^2 / mean squared difference) of each pair, in dB; infinite where equal.

    Args:
        x: Images.
        z: Images to compare with them.
        span: Width of the range of pixels: of the box.
    """
    error = (z.double() - x.double()).flatten(1).square().mean(1) if len(x) else torch.empty(0, dtype=torch.float64)
    return 10 * (span**2 / error).log10()


def ssim(x: Images, z: Images, span: float) -> Scores:
    """Mean structural similarity of each pair, in [-1, 1]; 1 where equal, NaN for images smaller than the window.

    A Gaussian window of 11 x 11 pixels (sigma 1.5), K1 = 0.01, K2 = 0.03, over the places where the window lies inside
    the image.

    Args:
        x: Images.
        z: Images to compare with them.
        span: Width of the range of pixels: of the box.

    Source:
        Wang, Bovik, Sheikh, Simoncelli 2004, IEEE Transactions on Image Processing 13:600, section III. Differs in
        taking images with channels, and volumes, of which the paper does not speak: the mean over channels and slices.
    """
    if x.ndim < 4 or min(x.shape[-2:]) <= 2 * _REACH:
        return torch.full((len(x),), torch.nan, dtype=torch.float64)
    pairs = zip(x.double().numpy(), z.double().numpy(), strict=True)
    return torch.tensor([_ssim(*pair, span) for pair in pairs], dtype=torch.float64)


def _ssim(x: np.ndarray, z: np.ndarray, span: float) -> float:
    c1, c2 = (_K1 * span) ** 2, (_K2 * span) ** 2
    mean_x, mean_z = _smooth(x), _smooth(z)
    var_x, var_z = _smooth(x * x) - mean_x**2, _smooth(z * z) - mean_z**2
    both = _smooth(x * z) - mean_x * mean_z
    likeness = (2 * mean_x * mean_z + c1) * (2 * both + c2)
    return float((likeness / ((mean_x**2 + mean_z**2 + c1) * (var_x + var_z + c2))).mean())


def _smooth(values: np.ndarray) -> np.ndarray:
    """Weighted means over windows that lie inside, along the last two axes."""
    window = np.exp(-((np.arange(-_REACH, _REACH + 1) / _SIGMA) ** 2) / 2)
    for axis in (-2, -1):
        values = correlate1d(values, window / window.sum(), axis=axis)
    return values[..., _REACH:-_REACH, _REACH:-_REACH]
