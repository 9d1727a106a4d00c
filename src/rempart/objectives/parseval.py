"""Training with layers that stay near orthonormal."""

import math
from collections.abc import Mapping
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from rempart.objectives.catalogue import Objective, objectives
from rempart.objectives.plain import cross_entropy


@objectives.register("parseval", None)
def parseval(*, beta: Annotated[float, Ge(0), Lt(1)] = 3e-4) -> Objective:
    """Minimise the cross-entropy, and after each step pull every linear and convolutional layer towards norm one.

    W <- (1 + beta) W - beta W W^T W moves each singular value s to (1 + beta) s - beta s^3, and so towards 1; a layer
    whose singular values are at most 1 does not lengthen a perturbation in l2. A kernel counts as the matrix of shape
    outputs x (inputs * taps), times the root of the number of taps, because each pixel is seen by so many of them.
    All layers are treated, the last one too, each group of a grouped convolution on its own.

    The bound is about these layers alone: normalisation layers, whose scales are left alone, and sums of branches can
    lengthen a perturbation again. Weight decay pulls against it, so the recipes have none.

    Args:
        beta: Share of the correction made after each step. 0 is `plain`.

    Source:
        Cisse et al. 2017, arXiv:1704.08847, algorithm 1. Differs in correcting all rows where the paper
        draws some, and in dividing the aim of a kernel by the root of its taps where the paper divides the output of
        the layer: the same function, and the architecture stays as it is. The convex combinations that the paper puts
        in the place of the sums in residual blocks are not done.
    """

    @torch.no_grad()
    def after_step(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.weight.requires_grad:
                layer.weight.copy_(tightened(layer, beta))

    return Objective(loss=cross_entropy, after_step=after_step)


def tightened(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, beta: float) -> Tensor:
    """The weight of a layer after one correction."""
    taps = math.prod(layer.weight.shape[2:])
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    w = layer.weight.flatten(1).unflatten(0, (groups, -1)) * math.sqrt(taps)
    wide = w.shape[1] <= w.shape[2]
    cube = w @ w.mT @ w if wide else w @ (w.mT @ w)  # the same product, by way of the smaller square
    return (((1 + beta) * w - beta * cube) / math.sqrt(taps)).reshape(layer.weight.shape)
