"""The flattest image that agrees with a part of the pixels."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from rempart.core.types import Images
from rempart.preprocess.catalogue import Traits, bpda, preprocessors


@preprocessors.register("tv", Traits(differentiable=False, random=True))
def total_variation(
    *,
    weight: Annotated[float, Gt(0)] = 0.03,
    keep: Annotated[float, Gt(0), Le(1)] = 0.5,
    steps: Annotated[int, Ge(1)] = 50,
) -> nn.Module:
    """Drop random pixels and rebuild the image by total-variation minimisation.

    Minimises |m (z - x)|^2 / 2 + weight * TV(z) over z, with m random in {0, 1}, one draw per pixel for all channels,
    and TV the sum over channels and pixels of the length of the gradient (forward differences, none across the edge).
    Backwards it counts as the identity.

    Args:
        weight: Of the total variation, in pixel values of [0, 1].
        keep: Chance of a pixel to be kept; 1 draws nothing.
        steps: Of the primal-dual iteration, from the mean of the pixels kept.

    Source:
        Guo, Rana, Cisse, van der Maaten 2018, arXiv:1711.00117, section 3.3: keep 0.5, weight 0.03. Their solver is a
        split Bregman iteration; ours is Chambolle, Pock 2011, J. Math. Imaging Vis. 40, algorithm 1, whose steps do not
        depend on the image. Identity backwards is how Athalye et al. 2018, arXiv:1802.00420, section 5.3, broke it.
    """
    return bpda(_TotalVariation(weight, keep, steps))


class _TotalVariation(nn.Module):
    def __init__(self, weight: float, keep: float, steps: int) -> None:
        super().__init__()
        self.weight, self.keep, self.steps = weight, keep, steps

    def forward(self, x: Images) -> Images:
        kept = torch.ones_like(x[:, :1])
        if self.keep < 1:
            kept = (torch.rand_like(kept) < self.keep).to(x.dtype)
        return _flattest(x, kept, self.weight, self.steps)


def _flattest(x: Images, kept: Tensor, weight: float, steps: int) -> Images:
    rate = 8**-0.5  # of both halves: the squared norm of the difference operator is below 8
    mean = (x * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True).clamp_min(1)
    z = ahead = torch.where(kept > 0, x, mean)
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(steps):
        down[:, :, :-1] += rate * ahead.diff(dim=2)
        right[:, :, :, :-1] += rate * ahead.diff(dim=3)
        shorter = (down.square() + right.square()).sqrt().div(weight).clamp_min(1)
        down, right = down / shorter, right / shorter
        before = z
        z = (z - rate * _transposed(down, right) + rate * kept * x) / (1 + rate * kept)
        ahead = 2 * z - before
    return z.clamp(0, 1)


def _transposed(down: Tensor, right: Tensor) -> Tensor:
    """The transpose of the forward differences; the last row of `down` and column of `right` are zero."""
    return down.roll(1, 2) - down + right.roll(1, 3) - right
