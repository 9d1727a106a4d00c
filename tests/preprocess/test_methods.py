"""Each defence against another implementation: SciPy, Pillow, a loop in NumPy, or the answer in closed form."""

import io
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import median_filter
from torch import Tensor

from rempart.preprocess import preprocessors
from rempart.preprocess.pixel_deflection import denoised
from rempart.preprocess.windows import mirrored


def made(name: str, **options: object) -> torch.nn.Module:
    entry = preprocessors[name]
    return entry.function(**entry.parse(options))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (2, 2), (7, 9)])
def test_a_margin_is_that_of_numpy(before: int, after: int) -> None:
    x = rand(2, 1, 3, 4)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (before, after), (before, after)), mode="symmetric")
    assert np.array_equal(mirrored(x, before, after).numpy(), expected)


@pytest.mark.parametrize("bits", [1, 3, 7])
def test_bit_depth_gives_the_nearest_of_its_levels(bits: int) -> None:
    x = rand(3, 1, 6, 6)
    levels = np.linspace(0, 1, 2**bits)
    y = made("bit-depth", bits=bits)(x).numpy()
    assert np.allclose(y, levels[np.abs(x.numpy()[..., None] - levels).argmin(-1)])
    assert np.allclose(np.abs(y[..., None] - levels).min(-1), 0)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(1, 7, 9), (3, 6, 4)])
def test_median_is_that_of_scipy(size: int, shape: tuple[int, ...]) -> None:
    x = rand(3, *shape)
    expected = median_filter(x.numpy(), size=(1, 1, size, size), mode="reflect")
    assert np.array_equal(made("median", size=size)(x).numpy(), expected)


def test_bilateral_is_the_weighted_mean_of_its_formula() -> None:
    x, r, color, space = rand(2, 3, 5, 6) * 0.3, 2, 0.1, 1.5
    wide = np.pad(x.numpy(), ((0, 0), (0, 0), (r, r), (r, r)), mode="symmetric")
    expected = np.zeros(x.shape)
    for n, i, j in np.ndindex(2, 5, 6):
        total, weights = np.zeros(3), 0.0
        for di, dj in np.ndindex(5, 5):
            other = wide[n, :, i + di, j + dj]
            gap = ((wide[n, :, i + r, j + r] - other) ** 2).sum()
            weight = np.exp(-((di - r) ** 2 + (dj - r) ** 2) / (2 * space**2) - gap / (2 * color**2))
            total, weights = total + weight * other, weights + weight
        expected[n, :, i, j] = total / weights
    assert np.allclose(made("bilateral", radius=r, sigma_color=color, sigma_space=space)(x).numpy(), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_non_local_means_is_the_weighted_mean_of_its_formula(channels: int) -> None:
    x, s, p, strength = rand(1, channels, 5, 6) * 0.1 + 0.4, 2, 1, 0.05
    m = s + p
    wide = np.pad(x.numpy(), ((0, 0), (0, 0), (m, m), (m, m)), mode="symmetric")[0]
    expected = np.zeros(x.shape)
    for i, j in np.ndindex(5, 6):
        total, weights = np.zeros(channels), 0.0
        here = wide[:, i + m - p : i + m + p + 1, j + m - p : j + m + p + 1]
        for k in range(i + m - s, i + m + s + 1):
            for l in range(j + m - s, j + m + s + 1):  # noqa: E741
                gap = ((here - wide[:, k - p : k + p + 1, l - p : l + p + 1]) ** 2).mean()
                weight = np.exp(-gap / strength**2)
                total, weights = total + weight * wide[:, k, l], weights + weight
        expected[0, :, i, j] = total / weights
    y = made("non-local-means", search=s, patch=p, strength=strength)(x).numpy()
    assert np.allclose(y, expected) and not np.allclose(y, x.numpy(), atol=1e-3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize(("quality", "subsampling"), [(75, "4:2:0"), (20, "4:4:4")])
def test_jpeg_is_that_of_pillow(channels: int, mode: str, quality: int, subsampling: str) -> None:
    x = rand(2, channels, 19, 13).float()
    y = made("jpeg", quality=quality, subsampling=subsampling)(x)
    for one, found in zip(x, y, strict=True):
        levels = (one.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(levels[..., 0] if channels == 1 else levels, mode).save(
            file, "JPEG", quality=quality, subsampling={"4:4:4": 0, "4:2:0": 2}[subsampling]
        )
        read = np.asarray(Image.open(file), np.float32).reshape(19, 13, channels) / 255
        assert np.array_equal(found.permute(1, 2, 0).numpy(), read)


def test_jpeg_of_two_channels_writes_each_as_grey() -> None:
    x, jpeg = rand(2, 2, 8, 8).float(), made("jpeg")
    assert torch.equal(jpeg(x), torch.cat([jpeg(x[:, :1]), jpeg(x[:, 1:])], 1))


def test_noise_has_its_moments_and_is_cut() -> None:
    y = made("gaussian-noise", sigma=0.1)(torch.full((50, 1, 30, 30), 0.5))
    assert abs(float(y.mean()) - 0.5) < 5 * 0.1 / 45_000**0.5
    assert abs(float(y.std()) - 0.1) < 5 * 0.1 / (2 * 45_000) ** 0.5
    black = made("gaussian-noise", sigma=0.1)(torch.zeros(50, 1, 30, 30))
    assert abs(float((black == 0).double().mean()) - 0.5) < 5 * 0.5 / 45_000**0.5


def test_total_variation_of_two_pixels_has_a_closed_form() -> None:
    """min (z - x)^2 / 2 + w |z1 - z2|: each moves by w towards the other, or both to the mean if they are near."""
    x = torch.tensor([[0.2, 0.9], [0.5, 0.52]]).double().view(2, 1, 1, 2)
    y = made("tv", weight=0.1, keep=1, steps=2000)(x).view(2, 2)
    torch.testing.assert_close(y, torch.tensor([[0.3, 0.8], [0.51, 0.51]]).double(), atol=1e-4, rtol=0)


def objective(z: np.ndarray, x: np.ndarray, kept: np.ndarray, weight: float) -> float:
    down, right = np.zeros_like(z), np.zeros_like(z)
    down[:-1], right[:, :-1] = np.diff(z, axis=0), np.diff(z, axis=1)
    return 0.5 * (kept * (z - x) ** 2).sum() + weight * np.sqrt(down**2 + right**2).sum()


def test_total_variation_reaches_the_lower_bound_of_its_dual() -> None:
    """The dual gives a lower bound: <x, D'q> - |D'q|^2 / 2 for every field q of lengths at most the weight.

    It is raised here by projected gradient steps in NumPy.
    """
    x, weight = rand(6, 7, seed=4).numpy(), 0.15
    z = made("tv", weight=weight, keep=1, steps=3000)(torch.from_numpy(x)[None, None])[0, 0].numpy()
    down, right = np.zeros_like(x), np.zeros_like(x)

    def transposed() -> np.ndarray:
        total = np.zeros_like(x)
        total[1:] += down[:-1]
        total[:-1] -= down[:-1]
        total[:, 1:] += right[:, :-1]
        total[:, :-1] -= right[:, :-1]
        return total

    for _ in range(4000):
        ahead = x - transposed()
        down[:-1] += np.diff(ahead, axis=0) / 8
        right[:, :-1] += np.diff(ahead, axis=1) / 8
        length = np.maximum(1, np.hypot(down, right) / weight)
        down, right = down / length, right / length
    bound = (x * transposed()).sum() - 0.5 * (transposed() ** 2).sum()
    assert 0 <= objective(z, x, np.ones_like(x), weight) - bound < 1e-4
    assert objective(x, x, np.ones_like(x), weight) - bound > 0.1


def test_total_variation_fills_in_from_the_pixels_kept_and_never_looks_at_the_others() -> None:
    tv = made("tv", weight=0.001, keep=0.5, steps=400)
    flat = torch.full((2, 1, 10, 10), 0.3).double()
    torch.testing.assert_close(tv(flat), flat, atol=1e-6, rtol=0)
    x = rand(1, 1, 8, 8)
    torch.manual_seed(5)
    kept = torch.rand(1, 1, 8, 8, dtype=torch.float64) < 0.5
    results = []
    for other in (x, torch.where(kept, x, 1 - x)):
        torch.manual_seed(5)
        results.append(tv(other))
    assert torch.equal(*results), "dropped pixels change the result"
    assert 20 < int(kept.sum()) < 44 and not torch.equal(tv(x), tv(x))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 20)])
def test_resize_pad_is_a_smaller_picture_on_black(shape: tuple[int, ...]) -> None:
    _, h, w = shape
    x = (rand(60, *shape) * 0.9 + 0.1).float()  # nothing black, so that the picture's place can be seen
    y = made("resize-pad", smallest=0.7)(x)
    heights, corners = set(), set()
    for one, found in zip(x, y, strict=True):
        rows, columns = (torch.nonzero((found > 0).any(0).any(axis)).flatten() for axis in (1, 0))
        height, width = len(rows), len(columns)
        assert width == int(height * w / h + 0.5) and 0.7 * h <= height <= h
        down = [floor(Fraction(2 * i + 1, 2 * height) * h) for i in range(height)]
        right = [floor(Fraction(2 * j + 1, 2 * width) * w) for j in range(width)]
        inner = found[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert np.array_equal(inner.numpy(), one.numpy()[:, down][:, :, right])
        heights.add(height)
        corners.add((int(rows[0]), int(columns[0])))
    assert len(heights) > 3 and len(corners) > 10
    assert float((y == 0).double().mean()) > 0.05
    assert torch.equal(made("resize-pad", smallest=1)(x), x)


def test_pixel_deflection_moves_exactly_so_many_pixels_from_near_by() -> None:
    h, w, window = 20, 30, 3
    x = (torch.arange(h * w, dtype=torch.float64) / (h * w)).view(1, 1, h, w).expand(8, 1, h, w)
    y = made("pixel-deflection", count=50, window=window, sigma=0)(x)
    source = (y * h * w).round().long()
    place = torch.arange(h * w).view(h, w).expand_as(source)
    rows, columns = source // w - place // w, source % w - place % w
    assert int(rows.abs().max()) == window and int(columns.abs().max()) == window
    changed = (source != place).flatten(1).sum(1)
    assert int(changed.max()) <= 50 and int(changed.min()) > 40, "one in 49 is its own neighbour"
    spread = torch.bincount((rows + window).flatten()[(source != place).flatten()], minlength=7)
    assert int(spread.min()) > 20, "every row of the window occurs"


def haar(n: int) -> np.ndarray:
    """Two rows for each pair of pixels: their sum and their difference over the root of 2."""
    rows = np.zeros((n, n))
    for k in range(n // 2):
        rows[k, 2 * k : 2 * k + 2] = np.array([1, 1]) / 2**0.5
        rows[n // 2 + k, 2 * k : 2 * k + 2] = np.array([1, -1]) / 2**0.5
    return rows


def shrunk_in_numpy(x: np.ndarray, sigma: float, levels: int) -> np.ndarray:
    (h, w), sigma2 = x.shape, sigma**2
    a, b = haar(h), haar(w)
    z = a @ x @ b.T
    for rows, columns in ((0, 1), (1, 0), (1, 1)):
        part = (slice(rows * h // 2, (rows + 1) * h // 2), slice(columns * w // 2, (columns + 1) * w // 2))
        band = z[part]
        limit = sigma2 / np.sqrt(max((band**2).mean() - sigma2, 1e-12))
        z[part] = np.sign(band) * np.maximum(np.abs(band) - limit, 0)
    if levels > 1:
        z[: h // 2, : w // 2] = shrunk_in_numpy(z[: h // 2, : w // 2], sigma, levels - 1)
    return a.T @ z @ b


@pytest.mark.parametrize("levels", [1, 2])
def test_wavelets_are_those_of_the_haar_matrix(levels: int) -> None:
    x = rand(2, 1, 8, 12)
    for sigma in (0.0, 0.1, 0.4):
        y = denoised(x, sigma, levels).numpy()
        for one, found in zip(x.numpy(), y, strict=True):
            assert np.allclose(found[0], shrunk_in_numpy(one[0], sigma, levels))
    assert torch.allclose(denoised(rand(1, 3, 7, 5), 0.0, 2), rand(1, 3, 7, 5)), "without noise nothing changes"
