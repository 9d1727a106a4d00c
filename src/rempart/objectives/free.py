"""Adversarial training at the price of ordinary training."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from rempart.core.repro import Draws
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Objective, boxed, budgeted, objectives
from rempart.objectives.plain import cross_entropy


@objectives.register("free", None)
def free(*, threat: str = "linf:8/255", replays: Annotated[int, Ge(1)] = 8) -> Objective:
    """Replay every batch, and let each backward pass move both the weights and the perturbation.

    The perturbation is never set back: there is one for each position in a batch, and the next batch starts from it.
    An epoch takes `replays` steps per batch and costs as much as so many ordinary epochs, so ask for fewer of them.
    The attack is part of the training step, so it sees the model in training mode. In one process only.

    Args:
        threat: What to harden against, for example `linf:8/255`.
        replays: Steps in a row on the same batch.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Shafahi et al. 2019, arXiv:1904.12843, algorithm 1, with the cut to the box of the code of Wong et al. 2020.
        Differs in cutting to the box of a new batch before its first pass too, not only after it. l2 and l1, with
        steps of eps along the steepest ascent, are ours.
    """
    within = budgeted(threat)
    state: dict[str, Tensor] = {}

    def craft(model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float) -> Images:
        ball, n = boxed(within, model), len(x)
        state["delta"] = _grown(state.get("delta", x[:0]).to(x), n)
        point = ball.project(x, x + state["delta"][:n])

        def move(gradient: Images) -> None:
            slope = gradient.nan_to_num(0.0)  # a gradient that a loss scale made overflow
            state["delta"][:n] = ball.project(x, point + ball.ascend(point, slope, ball.budget)) - x

        leaf = point.detach().requires_grad_(True)
        leaf.register_hook(move)
        return leaf

    return Objective(loss=cross_entropy, craft=craft, threat=within, repeats=replays, state=state, alone=True)


def _grown(delta: Tensor, n: int) -> Tensor:
    """The perturbations with at least n rows; new ones are zero."""
    missing = n - len(delta)
    return delta if missing <= 0 else torch.cat([delta, delta.new_zeros(missing, *delta.shape[1:])])
