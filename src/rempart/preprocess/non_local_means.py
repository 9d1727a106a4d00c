"""The mean of pixels whose surroundings look alike."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import nn
from torch.nn.functional import avg_pool2d

from rempart.core.types import Images
from rempart.preprocess.catalogue import Traits, bpda, preprocessors
from rempart.preprocess.windows import mirrored


@preprocessors.register("non-local-means", Traits(differentiable=False, random=False))
def non_local_means(
    *,
    search: Annotated[int, Ge(1), Le(10)] = 5,
    patch: Annotated[int, Ge(0), Le(3)] = 1,
    strength: Annotated[float, Gt(0)] = 4 / 255,
) -> nn.Module:
    """Replace each pixel by a mean of the pixels around it, those with similar surroundings counting most.

    The weight of q is exp(-d(p, q) / strength^2), where d is the mean squared difference of the patches around p and q
    over pixels and channels. Edges are mirrored. Backwards it counts as the identity.

    Args:
        search: Pixels are looked for up to that many rows and columns away: a window of 2 search + 1.
        patch: A patch has a side of 2 patch + 1 pixels.
        strength: In pixel values of [0, 1].

    Source:
        Buades, Coll, Morel 2005, CVPR; as a defence Xu, Evans, Qi 2018, arXiv:1704.01155, section 4.2, written there as
        window, patch and strength in levels, 11-3-4 for ImageNet: the default. Theirs is OpenCV's, on 8-bit images;
        ours works on real numbers, in torch.
    """
    return bpda(_NonLocalMeans(search, patch, strength))


class _NonLocalMeans(nn.Module):
    def __init__(self, search: int, patch: int, strength: float) -> None:
        super().__init__()
        self.search, self.patch, self.strength = search, patch, strength

    def forward(self, x: Images) -> Images:
        s, p, (h, w) = self.search, self.patch, x.shape[2:]
        wide = mirrored(x, s + p, s + p)
        here = wide[:, :, s : s + h + 2 * p, s : s + w + 2 * p]
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for i in range(2 * s + 1):
            for j in range(2 * s + 1):
                there = wide[:, :, i : i + h + 2 * p, j : j + w + 2 * p]
                distance = avg_pool2d((here - there).square().mean(1, keepdim=True), 2 * p + 1, 1)
                weight = distance.div_(-(self.strength**2)).clamp_min_(-80).exp_()  # denormal numbers would be slow
                total.addcmul_(weight, there[:, :, p : p + h, p : p + w])
                weights += weight
        return (total / weights).clamp(0, 1)
