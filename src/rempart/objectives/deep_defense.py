"""Deep Defense: the length of a differentiable DeepFool perturbation as a regulariser."""

import math
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from rempart.core.errors import TrainError
from rempart.core.repro import Draws
from rempart.core.threat import per_image, vector_norm
from rempart.core.types import Images, Labels, Logits, Scores
from rempart.data import Data
from rempart.objectives.catalogue import Loss, Objective, hits, objectives

Rate = Annotated[float, Ge(0)]
Forward = Callable[[Images, Tensor], Logits]
"""From images and their places in the batch to logits."""

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@objectives.register("deep-defense", None)
def deep_defense(
    *,
    weight: Rate = 15.0,
    c: Rate = 25.0,
    d: Rate = 5.0,
    steps: Annotated[int, Ge(1)] = 5,
    overshoot: Rate = 0.02,
    candidates: Annotated[int, Ge(2)] = 10,
    stabiliser: Annotated[float, Gt(0)] = 5e-6,
    cap: Annotated[float, Ge(1)] | None = None,
    origin: Literal["black", "mean"] = "black",
) -> Objective:
    """Fine-tune on cross-entropy and on the length of the perturbation that DeepFool needs for each image.

    With r the l2 length of that perturbation over the l2 length of the image, an image classified right adds
    weight * exp(-c r), which pushes the boundary away, and one classified wrong adds weight * exp(d r), where the
    perturbation is the one back to its true class. The gradient runs through all steps of DeepFool, second
    derivatives included; which classes it chooses and when it stops count as constants. Nothing is cut to the box.

    The model is meant to be trained already. All passes are taken with the running statistics of batch norm, whose
    scales and shifts get no gradient and stay what they were; layers of dropout draw one mask per image and batch for
    all passes. Dropout that is called as a function instead of a layer draws anew in each pass.

    Args:
        weight: Weight of the regulariser beside the cross-entropy, lambda in the paper.
        c: How fast the term of an image classified right falls with r.
        d: How fast the term of an image classified wrong grows with r.
        steps: Largest number of linearisations per image and batch. Memory grows with it.
        overshoot: The perturbation is longer than to the linearised boundary by this share.
        candidates: Classes considered for an image classified right, its own included: those of highest logit. Each
            but the own one costs a backward pass per linearisation.
        stabiliser: Added to every element of a gradient before its norm is taken, in logits per pixel unit. The
            published value belongs to pixels of 0 to 255, where it weighs 255 times as much.
        cap: Largest exp(d r), beyond which the term is constant; 50 is that of the authors' later code. Default: none,
            as published.
        origin: Where the length of an image is measured from: a black image, or the mean of the training images, as
            published.

    Source:
        Yan, Guo, Zhang 2018, arXiv:1803.00404; formulas and defaults after the released code. Differs in
        differentiating once through the linearisation chosen instead of once for every class, in images that leave as
        soon as they are done (same loss, same gradient), in pixels of [0, 1], in `cap`, and in measuring from a black
        image by default. The published code has no dropout that works; one mask for all passes is our design.
    """
    plan = Plan(steps, overshoot, candidates, stabiliser)
    state: dict[str, Tensor] = {}

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        with _one_function(model) as forward:
            x = x_adv.detach().requires_grad_(True)
            z = forward(x, torch.arange(len(x), device=x.device))
            delta = perturbations(forward, x, y, z, plan, create_graph=True)
        right = z.argmax(1) == y
        r = ratios(delta, x.detach(), _origin(state, origin, x))
        pull = (d * r).clamp_max(math.log(cap) if cap else math.inf)
        value = F.cross_entropy(z, y) + weight * torch.where(right, -c * r, pull).exp().mean()
        mean = (r.detach() * right).sum() / right.sum().clamp_min(1)
        return Loss(value, {"accuracy": hits(z, y), "r": mean})

    def remember_mean(model: nn.Module, data: Data, *, rng: Draws, epoch: int) -> None:
        if "mean" not in state:
            sums = [batch.x.double().sum(0) for batch in data.batches(1000)]
            state["mean"] = (torch.stack(sums).sum(0) / len(data)).float()

    return Objective(loss=loss, before_epoch=remember_mean if origin == "mean" else None, state=state)


@dataclass(frozen=True, slots=True)
class Plan:
    """How DeepFool runs; the options of `deep_defense`."""

    steps: int = 5
    overshoot: float = 0.02
    candidates: int = 10
    stabiliser: float = 5e-6


def perturbations(forward: Forward, x: Images, y: Labels, z: Logits, plan: Plan, *, create_graph: bool) -> Images:
    """DeepFool perturbations in l2, overshoot included: away from `y` where `z` says `y`, else back to `y`.

    Args:
        forward: The model.
        x: Images that require a gradient.
        y: Classes.
        z: Logits of `x`, with the graph that leads back to it.
        plan: How it runs.
        create_graph: Whether the result is to be differentiated.

    Returns:
        Perturbations like `x`; where no boundary was crossed within the steps, what has come together so far.
    """
    right = z.argmax(1) == y
    others = z.detach().scatter(1, y[:, None], -torch.inf).topk(min(plan.candidates, z.shape[1]) - 1, dim=1).indices
    delta, active, point = torch.zeros_like(x), torch.arange(len(x), device=x.device), x
    for t in range(plan.steps):
        own, leaves = y[active], right[active]
        nearest = _nearest(z, point, own, others[active], plan.stabiliser) if bool(leaves.any()) else own
        start = torch.where(leaves, own, z.argmax(1))
        goal = torch.where(leaves, nearest, own)
        gap = (z.gather(1, goal[:, None]) - z.gather(1, start[:, None]))[:, 0]
        (slope,) = torch.autograd.grad(gap.sum(), point, create_graph=create_graph)
        length = (gap if create_graph else gap.detach()).abs() / _square(slope, plan.stabiliser)
        step = per_image(length, x) * slope
        delta = delta.index_add(0, active, step)
        if t + 1 == plan.steps:
            break
        with torch.no_grad():
            reached = forward(x[active] + (1 + plan.overshoot) * delta[active], active).argmax(1)
        active = active[(reached == own) == leaves]
        if len(active) == 0:
            break
        point = (x + delta)[active]
        z = forward(point, active)
    return (1 + plan.overshoot) * delta


def ratios(delta: Images, x: Images, origin: Tensor) -> Scores:
    """Length of each perturbation over that of its image; 0, without gradient, where the image is the origin."""
    length = vector_norm((x - origin).flatten(1), "l2")
    return vector_norm(delta.flatten(1), "l2") / torch.where(length > 0, length, torch.inf)


def _nearest(z: Logits, point: Images, y: Labels, others: Tensor, stabiliser: float) -> Labels:
    """The class with the nearest linearised boundary to class y, without a graph.

    One class at a time: one backward pass over all classes, batched or on repeated images, was slower on a CPU.
    """
    if others.shape[1] == 1:
        return others[:, 0]
    gaps = z.gather(1, others) - z.gather(1, y[:, None])
    squares = [
        _square(torch.autograd.grad(gaps[:, k].sum(), point, retain_graph=True)[0], stabiliser)
        for k in range(gaps.shape[1])
    ]
    nearest = (gaps.detach().square() / torch.stack(squares, 1)).argmin(1)
    return others.gather(1, nearest[:, None])[:, 0]


def _square(slope: Images, stabiliser: float) -> Scores:
    return (slope + stabiliser).flatten(1).square().sum(1)


def _origin(state: dict[str, Tensor], origin: str, x: Images) -> Tensor:
    if origin == "black":
        return x.new_zeros(())
    if "mean" not in state:
        raise TrainError("the mean training image", got="none yet", hint="call before_epoch first, or set origin=black")
    return state["mean"].to(x)


@contextmanager
def _one_function(model: nn.Module) -> Generator[Forward]:
    """Make a model in training mode one function for the time of a batch, and give its forward pass.

    Batch norm is in inference mode and its parameters take no gradient. Each layer of dropout draws a mask for every
    image in the first pass, that of the whole batch, and keeps it for later passes over some of the images.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    drops = [module for module in model.modules() if isinstance(module, _DROPOUT) and module.training]
    fixed = [parameter for norm in norms for parameter in norm.parameters() if parameter.requires_grad]
    masks: dict[tuple[nn.Module, int], Tensor] = {}
    calls: Counter[nn.Module] = Counter()  # a layer may be used more than once in a pass
    places = torch.empty(0)

    def drop(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
        key = (layer, calls[layer])
        calls[layer] += 1
        if key not in masks:
            layer.training = True
            masks[key] = layer.forward(torch.ones_like(output))
            layer.training = False
        return output * masks[key][places]

    def forward(x: Images, which: Tensor) -> Logits:
        nonlocal places
        places = which
        calls.clear()
        return model(x)

    hooks = [layer.register_forward_hook(drop) for layer in drops]
    try:
        for module in (*norms, *drops):
            module.training = False
        for parameter in fixed:
            parameter.requires_grad_(False)
        yield forward
    finally:
        for hook in hooks:
            hook.remove()
        for module in (*norms, *drops):
            module.training = True
        for parameter in fixed:
            parameter.requires_grad_(True)
