"""Feature squeezing: does the prediction depend on detail that a coarser image does not have?"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn import functional as F

from rempart.core.errors import SpecError
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.types import Images, Scores
from rempart.detectors.catalogue import Detector, State, detectors
from rempart.detectors.logits import nothing

Squeezer = Callable[[Images], Images]
"""Images with pixels in [0, 1] to images of the same shape."""


@detectors.register("squeezing", None)
def squeezing(
    *,
    bits: Annotated[int, Ge(1), Le(8)] | None = 5,
    median: Annotated[int, Ge(2), Le(9)] | None = 2,
    search: Annotated[int, Ge(3)] | None = 13,
    patch: Annotated[int, Ge(1)] = 3,
    strength: Annotated[float, Gt(0)] = 2.0,
) -> Detector:
    """How much the probabilities change when detail is squeezed out of the image.

    Score: the largest, over the squeezers, of |softmax f(x) - softmax f(squeezed x)|_1, between 0 and 2. Squeezers are
    rounding to fewer bits, a median filter, and non-local means, which replaces a pixel by the mean of those around it
    whose neighbourhoods look alike. The published joint settings are `bits=1 search=none` for MNIST, the defaults for
    CIFAR-10, and `search=11 strength=4` for ImageNet. An attacker gets the exact gradient of the median; rounding and
    non-local means pass the gradient through as if they left the image as it is.

    Args:
        bits: Levels per channel, as a power of 2; none leaves rounding out.
        median: Width of the window of the median filter; none leaves it out.
        search: Width of the window, odd, in which non-local means looks for pixels; none leaves it out.
        patch: Width of the neighbourhoods it compares, odd.
        strength: Its difference between neighbourhoods, in 1/255 of the box, at which a weight falls to 1/e.

    Raises:
        SpecError: If no squeezer is left, or a width of non-local means is even.

    Source:
        Xu, Evans, Qi 2018, arXiv:1704.01155, and the authors' code (EvadeML-Zoo). The threshold there is the 95th
        percentile of clean scores, which is what `calibrate` sets. Ours differs: non-local means compares all channels
        at once and in floating point, where the authors' (OpenCV) works in Lab colours of 8 bits, and drops no small
        weights; borders repeat the last pixel.
    """
    squeezers: list[Squeezer] = []
    if bits is not None:
        squeezers.append(lambda x: _straight(x, rounded(x, bits)))
    if median is not None:
        squeezers.append(lambda x: median_filtered(x, median))
    if search is not None:
        if search % 2 == 0 or patch % 2 == 0:
            raise SpecError("odd widths of non-local means", got=f"search={search}, patch={patch}")
        squeezers.append(lambda x: _straight(x, non_local_means(x.detach(), search, patch, strength / 255)))
    if not squeezers:
        raise SpecError("one squeezer or more", got="none", hint="set bits, median or search")

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        p, scale = model(x).double().softmax(1), model.high - model.low
        unit = (x - model.low) / scale
        squeezed = (squeezer(unit) * scale + model.low for squeezer in squeezers)
        moved = [(model(s).double().softmax(1) - p).abs().sum(1) for s in squeezed]
        return torch.stack(moved).amax(0)

    return Detector(fit=nothing, score=score)


def rounded(x: Images, bits: int) -> Images:
    """Pixels in [0, 1] to the nearest of 2^bits levels, ties to the even one."""
    levels = 2**bits - 1
    return (x * levels).round() / levels


def median_filtered(x: Images, width: int) -> Images:
    """The median over a window in all spatial axes; of an even number of pixels, the upper of the two in the middle.

    A window of even width reaches one pixel further to the left and up.
    """
    axes = x.ndim - 2
    before, after = width // 2, (width - 1) // 2
    shifts = _shifts(_extended(x, before, after), x.shape[2:], product(range(width), repeat=axes))
    stack = torch.stack(list(shifts))
    return stack.kthvalue(len(stack) // 2 + 1, dim=0).values


def non_local_means(x: Images, search: int, patch: int, h: float) -> Images:
    """Mean of the pixels in a window, weighted by exp(-d / h^2), d the mean squared difference of their patches."""
    axes, reach, half = x.ndim - 2, search // 2, patch // 2
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    around = _extended(x, reach + half, reach + half)
    size = [length + 2 * half for length in x.shape[2:]]
    (here,) = _shifts(around, size, [(reach,) * axes])
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for other in _shifts(around, size, product(range(search), repeat=axes)):
        d = pool((other - here).square().mean(1, keepdim=True), patch, 1)
        weight = (-d / h**2).exp()
        (centre,) = _shifts(other, x.shape[2:], [(half,) * axes])
        total, weights = total + weight * centre, weights + weight
    return total / weights


def _straight(x: Images, squeezed: Images) -> Images:
    """Exactly the squeezed image, with the gradient of the image itself."""
    return squeezed.detach() + (x - x.detach())


def _extended(x: Images, before: int, after: int) -> Images:
    return F.pad(x, (before, after) * (x.ndim - 2), mode="replicate")


def _shifts(x: Images, size: Sequence[int], starts: Iterable[tuple[int, ...]]) -> Iterator[Tensor]:
    for start in starts:
        part = x
        for axis, (at, length) in enumerate(zip(start, size, strict=True)):
            part = part.narrow(axis + 2, at, length)
        yield part
