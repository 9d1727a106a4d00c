"""Gradient-feature alignment."""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from rempart.attacks.losses import score
from rempart.core.features import blocks, features
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels, Mask, Scores
from rempart.objectives.catalogue import Loss, Objective, hits, objectives, ramp

_IMAGE = "input"
_PENALTIES: Mapping[str, Callable[[Scores], Scores]] = {
    "abs": lambda cosine: 1 - cosine.abs(),
    "sq": lambda cosine: 1 - cosine.square(),
    "neg": lambda cosine: 1 + cosine,
    "pos": lambda cosine: 1 - cosine,
}


@objectives.register("gfa", None)
def gfa(
    *,
    layers: str = "first",
    task: Literal["mse", "ce"] = "mse",
    penalty: Literal["abs", "sq", "neg", "pos"] = "abs",
    weight: Annotated[float, Ge(0)] = 1.0,
    warmup: Annotated[float, Ge(0), Le(1)] = 0.2,
    origin: Annotated[float, Ge(0), Le(1)] = 0.5,
) -> Objective:
    """Minimise the task loss, and make its gradient parallel to the image or to the activations.

    Loss: mean l_i + weight * sum over layers of the mean penalty of cos(h_i, dl_i/dh_i), where h_i are the activations
    of a layer for image i, or the image itself counted from `origin`, all flattened. The mean penalty is over images
    that are classified correctly at the moment and have a gradient. That gate and the warm-up keep the training away
    from the inverted classifier, which `abs` and `sq` cannot tell from the right one; watch the clean accuracy all the
    same.

    This is a way to shape gradients, and such defences have a record of hiding gradients from attacks instead of
    withstanding them; expect that here too. What the authors claim over adversarial training was not confirmed by
    strong attacks in small experiments of ours. Audit the result with attacks on other losses than the one it was
    trained with, and with attacks that use no gradient.

    Args:
        layers: `first`: the image alone. `deep`: the image and the output of every block, behind its pooling. Or
            names of modules separated by commas, `input` being the image.
        task: mse: squared distance of the logits from the one-hot label, summed over the classes, as the paper is
            reported to do. ce: cross-entropy.
        penalty: abs: 1 - |cos|. sq: 1 - cos^2. neg: 1 + cos, which suits ce, whose gradient points away from the
            features of a correct image. pos: 1 - cos. With mse the sign of the cosine depends on the sign of the
            residual, which leaves abs and sq.
        weight: Of the penalty, the same for each layer.
        warmup: Share of the training over which the weight rises from 0.
        origin: The grey that counts as 0 in the image, as a share of the box. 0.5 stands for the range [-1, 1] of the
            paper; at 0 black pixels have no part in the alignment. It changes what is learned.

    Source:
        Lin, Yeap, Kiringa, Zhang 2025, arXiv:2511.13749, of which we know the abstract and what reviews say: alignment
        by cosine, on the first layer or on several, weighted and added to a squared error, on images in [-1, 1]. Our
        design: the penalties and their sign, which layers `deep` means, the weights, warm-up, gate, and to leave
        gradients of zero out. The gradient of cross-entropy is taken as that of the log-odds, which has its direction
        and does not underflow. With batch norm it is the gradient of the sum over the batch in training mode, which
        holds the influence of an image on its batch mates.
    """
    penalise = _PENALTIES[penalty]

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        names = _names(model, layers)
        x = x_adv.detach().requires_grad_(True)
        with features(model, [name for name in names if name != _IMAGE]) as seen:
            z = model(x)
        if task == "mse":
            costs = climbed = F.mse_loss(z, F.one_hot(y, z.shape[1]).to(z), reduction="none").sum(1)
        else:
            costs = F.cross_entropy(z, y, reduction="none")
            climbed = score("ce", targeted=False, num_classes=z.shape[1])(z, y)  # same direction, without underflow
        low, high = getattr(model, "low", 0.0), getattr(model, "high", 1.0)
        points = [x if name == _IMAGE else seen[name] for name in names]
        slopes = torch.autograd.grad(climbed.sum(), points, create_graph=True)
        correct = z.argmax(1) == y
        total = z.new_zeros(())
        for point, slope in zip(points, slopes, strict=True):
            cosine, defined = cosines(point - (low + origin * (high - low)) if point is x else point, slope)
            total = total + _mean(penalise(cosine), correct & defined)
        value = costs.mean() + weight * ramp(progress, warmup) * total
        return Loss(value, {"accuracy": hits(z, y), "task": costs.mean().detach(), "penalty": total.detach()})

    return Objective(loss=loss)


def cosines(a: Tensor, b: Tensor) -> tuple[Scores, Mask]:
    """The cosine between each row of two batches, and where it is defined: where neither vector is 0.

    Both are scaled by their largest entry first, because the squares of a tiny gradient vanish in float32; numbers of
    half precision are widened to that.
    """
    a, b = (v.flatten(1).to(torch.promote_types(v.dtype, torch.float32)) for v in (a, b))
    tops = [v.detach().abs().amax(1, keepdim=True) for v in (a, b)]
    a, b = (v / torch.where(top > 0, top, 1) for v, top in zip((a, b), tops, strict=True))
    size = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / size.clamp_min(1e-6), ((tops[0] > 0) & (tops[1] > 0))[:, 0]


def _names(model: nn.Module, layers: str) -> list[str]:
    if layers in ("first", "deep"):
        return [_IMAGE, *(blocks(model, pooled=True) if layers == "deep" else ())]
    return [name.strip() for name in layers.split(",")]


def _mean(values: Scores, where: Mask) -> Tensor:
    """Mean over the images that count; 0 if none does."""
    return torch.where(where, values, 0.0).sum() / where.sum().clamp_min(1)
