"""Training for a loss that is flat around the images."""

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn
from torch.nn import functional as F

from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.threat import Norm, Threat, dual, vector_norm
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Loss, Objective, hits, objectives


@objectives.register("input-gradient", None)
def input_gradient(
    *,
    weight: Annotated[float, Ge(0)] = 0.05,
    form: Literal["exact", "difference"] = "exact",
    norm: Norm = "l2",
    h: Annotated[Pixels, Gt(0)] = 0.01,
) -> Objective:
    """Minimise the cross-entropy plus the mean squared norm of its gradient with respect to the image.

    For small eps the loss rises by about eps times that norm within the threat `norm`:eps. No attack is run, and only
    what is near the images is flattened: audit what comes out with attacks that need no gradient too.

    Args:
        weight: Weight of the squared norm. Pixels count in units of the box, summed over the image.
        form: `exact` differentiates the gradient; `difference` takes the slope of the loss over a step of length h
            along its steepest ascent, which needs no second derivative but one more forward pass. That pass draws its
            own dropout, whose effect is divided by h: take `exact` for models that have any.
        norm: How the image moves. The gradient is measured in the dual norm: linf in l1, l2 in l2, l1 in linf.
        h: Length of the step of the difference in pixel units, measured in `norm`. It may leave the box.

    Source:
        Exact: Ross & Doshi-Velez 2018, arXiv:1711.09404, for l2; a mean over the batch where the paper has a sum.
        Difference: Finlay & Oberman 2019, arXiv:1905.11468. Differs in leaving out the factor 1/2 of their code, so
        that both forms measure the same (the default weight is their 0.1), and for linf in a step whose length is h in
        linf, where they have h in l2.
    """
    unit = Threat(norm=norm, low=-1.0, high=1.0)  # the unit ball around zero lies in this box

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        x = x.detach().requires_grad_(True)
        z = model(x)
        costs = F.cross_entropy(z, y, reduction="none")
        exact = form == "exact"
        (gradient,) = torch.autograd.grad(costs.sum(), x, create_graph=exact, retain_graph=True)
        if exact:
            slope = vector_norm(gradient.flatten(1), dual(norm))
        else:
            step = unit.ascend(torch.zeros_like(gradient), gradient, 1.0)
            slope = (F.cross_entropy(model(x.detach() + h * step), y, reduction="none") - costs) / h
        parts = {"accuracy": hits(z, y), "slope": slope.detach().mean()}
        return Loss(costs.mean() + weight * slope.square().mean(), parts)

    return Objective(loss=loss)
