"""A JPEG file written and read."""

import io
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from PIL import Image
from torch import nn

from rempart.core.types import Images
from rempart.preprocess.catalogue import Traits, bpda, preprocessors

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]


@preprocessors.register("jpeg", Traits(differentiable=False, random=False))
def jpeg(*, quality: Annotated[int, Ge(1), Le(100)] = 75, subsampling: Subsampling = "4:2:0") -> nn.Module:
    """Round to 8 bit, write as JPEG, read again.

    By libjpeg through Pillow: what a deployed system would see. One channel is written as grey, three as colour; of
    other numbers each channel is a grey image of its own. Backwards it counts as the identity.

    Args:
        quality: Of libjpeg.
        subsampling: Of the two colour channels.

    Source:
        Dziugaite, Ghahramani, Roy 2016, arXiv:1608.00853; Guo et al. 2018, arXiv:1711.00117, section 3.2: quality 75.
    """
    return bpda(_Jpeg(quality, subsampling))


class _Jpeg(nn.Module):
    def __init__(self, quality: int, subsampling: Subsampling) -> None:
        super().__init__()
        self.quality, self.subsampling = quality, subsampling

    def forward(self, x: Images) -> Images:
        pixels = (x.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        colour = x.shape[1] == 3
        pictures = (pixels.permute(0, 2, 3, 1) if colour else pixels.flatten(0, 1)).numpy()
        read = np.empty_like(pictures)
        for place, picture in zip(read, pictures, strict=True):
            place[:] = self._read(picture)
        found = torch.from_numpy(read)
        return (found.permute(0, 3, 1, 2) if colour else found.view(x.shape)).to(x.device, x.dtype) / 255

    def _read(self, picture: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=self.quality, subsampling=self.subsampling)
        return np.asarray(Image.open(file))
