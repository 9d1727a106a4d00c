"""PSNR and SSIM against the formulas of the paper, written out place by place."""

import math

import numpy as np
import pytest
import torch

from rempart.attacks.similarity import psnr, ssim


def written_out(x: np.ndarray, z: np.ndarray, span: float) -> float:
    """Wang et al. 2004, equations 13 to 17, one window after the other."""
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    w = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)])
    w /= w.sum()
    found: list[float] = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], z[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            sa, sb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
            sab = (w * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + c1) * (2 * sab + c2) / ((ma**2 + mb**2 + c1) * (sa + sb + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize(("low", "span"), [(0, 1), (-1, 2), (0, 255)])
def test_ssim_is_that_of_the_paper(low: float, span: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((2, 3, 15, 13)) * span + low
    z = (x + rng.normal(0, 0.1 * span, x.shape)).clip(low, low + span)
    expected = [np.mean([written_out(x[k, c], z[k, c], span) for c in range(3)]) for k in range(2)]
    found = ssim(torch.from_numpy(x), torch.from_numpy(z), span)
    assert found.numpy() == pytest.approx(expected, abs=1e-10)
    volume = ssim(torch.from_numpy(x[:, None]), torch.from_numpy(z[:, None]), span)
    torch.testing.assert_close(volume, found)  # a volume counts by its slices


def test_equal_images_are_alike_and_small_ones_have_no_ssim() -> None:
    x = torch.rand(3, 1, 11, 11, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ssim(x, x, 1), torch.ones(3).double(), atol=1e-12)
    assert psnr(x, x, 1).isinf().all()
    assert ssim(x[..., :10], x[..., :10], 1).isnan().all()
    assert len(ssim(x[:0], x[:0], 1)) == len(psnr(x[:0], x[:0], 1)) == 0


def test_psnr_of_known_errors() -> None:
    x = torch.zeros(2, 1, 4, 4)
    z = x.clone()
    z[0] += 0.1  # mean squared error 0.01
    z[1, 0, 0, 0] = 0.4  # 0.16 / 16 = 0.01
    assert psnr(x, z, 1).tolist() == pytest.approx([20, 20], abs=1e-5)
    assert psnr(x, z, 255).tolist() == pytest.approx([20 + 20 * math.log10(255)] * 2, abs=1e-5)
