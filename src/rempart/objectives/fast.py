"""Adversarial training with a single step."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F

from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.threat import vector_norm
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Loss, Objective, boxed, budgeted, objectives
from rempart.objectives.pgd_at import pgd_images
from rempart.objectives.plain import cross_entropy


@objectives.register("fast", None)
def fast(
    *,
    threat: str = "linf:8/255",
    step: Annotated[Pixels, Gt(0)] | None = None,
    grad_align: Annotated[float, Ge(0)] = 0.0,
) -> Objective:
    """Minimise the cross-entropy one projected step away from a random start: adversarial training at a low price.

    The step may suddenly stop to find bad images (catastrophic overfitting): the accuracy under PGD then falls to
    nothing while the loss falls too. The recipe setting `collapse` watches for it; `grad_align` works against it.

    Args:
        threat: What to harden against, for example `linf:8/255`.
        step: Length of the step in pixel units. Default 1.25 * eps.
        grad_align: Weight of GradAlign, 0.2 in its paper for linf:8/255: one minus the cosine between the gradients
            with respect to the image at the image and at a random point within the threat. 0 leaves it out; otherwise
            each batch costs two more passes, one of them differentiated twice.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Wong et al. 2020, arXiv:2001.03994, algorithm 3. Differs in attacking in inference mode. GradAlign:
        Andriushchenko & Flammarion 2020, arXiv:2007.02617; as in its published code its passes run in training mode,
        only the gradient at the random point is differentiated, and samples with a zero gradient are left out of the
        mean. Differs in cutting the random point to the box, and in taking the first gradient at the image, as the
        paper writes it, where the code takes it at the start of the step.
    """
    within = budgeted(threat)
    length = 1.25 * within.budget if step is None else step

    def aligned(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        value, parts = cross_entropy(model, x, x_adv, y, rng=rng, progress=progress)
        bend = misalignment(model, x, boxed(within, model).start(x, rng.at("grad-align")), y)
        return Loss(value + grad_align * bend, {**parts, "misalignment": bend.detach()})

    return Objective(loss=aligned if grad_align else cross_entropy, craft=pgd_images(within, 1, length), threat=within)


def misalignment(model: nn.Module, x: Images, other: Images, y: Labels) -> Tensor:
    """Mean of 1 - cos between the input gradients at `x`, taken as given, and at `other`, zero gradients left out."""
    here = _slopes(model, x, y, again=False)
    there = _slopes(model, other, y, again=True)
    both = (vector_norm(here, "l2") > 0) & (vector_norm(there.detach(), "l2") > 0)
    here, there = here[both], there[both]
    sizes = vector_norm(here, "l2") * vector_norm(there, "l2")
    return (1 - (here * there).sum(1) / sizes).sum() / both.sum().clamp_min(1)


def _slopes(model: nn.Module, x: Images, y: Labels, *, again: bool) -> Tensor:
    """The gradient of each image's cross-entropy, flat, to be differentiated `again` or not."""
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x, create_graph=again)
    return gradient.flatten(1)
