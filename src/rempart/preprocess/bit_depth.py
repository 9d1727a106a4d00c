"""Fewer levels of grey or colour."""

from typing import Annotated

from annotated_types import Ge, Le
from torch import nn

from rempart.preprocess.catalogue import Traits, bpda, preprocessors


@preprocessors.register("bit-depth", Traits(differentiable=False, random=False))
def bit_depth(*, bits: Annotated[int, Ge(1), Le(7)] = 3) -> nn.Module:
    """Round each pixel to one of 2^bits levels.

    The levels are k / (2^bits - 1). Backwards the rounding is left out (straight through).

    Args:
        bits: Bits per channel; 8 would leave 8-bit images as they are.

    Source:
        Xu, Evans, Qi 2018, arXiv:1704.01155, section 4.1, with 1 bit for MNIST and 5 for CIFAR-10; the default is ours.
    """
    top = 2**bits - 1
    return bpda(lambda x: (x * top).round() / top)
