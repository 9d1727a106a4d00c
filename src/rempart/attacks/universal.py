"""One perturbation for all images: `universal`, and `fit_universal`, which gives the perturbation itself."""

from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import LossName, climb_direction, reached, score
from rempart.core.events import Event, Notify, silent
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels


@attacks.register("universal", Traits(norms=("linf", "l2"), targeted=True, random=True, joint=True))
def universal(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    epochs: Annotated[int, Ge(1)] = 20,
    batch: Annotated[int, Ge(1)] = 64,
    step: Annotated[Pixels, Gt(0)] | None = None,
    loss: LossName = "ce",
    cap: Annotated[float, Gt(0)] = 9.0,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Add one perturbation, the same for all images, that breaks as many of them as possible.

    Maximises the mean over images of min(loss(model(clip(x + v))), cap) over v in the ball, by projected steepest
    ascent over mini-batches. The cap keeps images that are broken for good from drawing the perturbation. The images
    are those it was fitted on: `fit_universal` gives v, to be tried on others.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: True classes, or classes to reach if `targeted`.
        threat: Needs a budget.
        epochs: Passes over the images; each costs one gradient and one further forward pass per image.
        batch: Images per step.
        step: Step length in pixel units, measured in the norm of the threat. Default 2.5 * eps / number of steps.
        loss: Score to climb.
        cap: Largest score an image can add.
        targeted: Move towards `y` instead of away from it.
        rng: Source of the start and of the order of the images.
        notify: Receives one event per step.

    Returns:
        x + v cut to the box, so that every image is feasible. v is the best at the end of an epoch: most images broken,
        then the highest mean score.

    Source:
        Moosavi-Dezfooli et al. 2017, arXiv:1610.08401, set the problem; the solver is that of Shafahi et al. 2020,
        arXiv:1811.11304. Differs in the log-odds instead of the cross-entropy, and in keeping the best epoch.
    """
    if threat.budget == 0 or len(x) == 0:
        return x.clone()
    v = fit_universal(
        model,
        x,
        y,
        threat,
        epochs=epochs,
        batch=batch,
        step=step,
        loss=loss,
        cap=cap,
        targeted=targeted,
        rng=rng,
        notify=notify,
    )
    return (x + v).clamp(threat.low, threat.high)


def fit_universal(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    epochs: int = 20,
    batch: int = 64,
    step: float | None = None,
    loss: LossName = "ce",
    cap: float = 9.0,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Tensor:
    """The perturbation of `universal`, shape (1, c, *spatial), at most `eps` long; takes the same arguments."""
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    goal = score(loss, targeted=targeted, num_classes=classes)
    rng = rng or Draws(0, torch.arange(len(x)))
    joint = replace(rng, index=torch.zeros(1, dtype=torch.int64))  # one start, whoever is there
    zero, wide = torch.zeros_like(x[:1]), threat.high - threat.low + threat.budget
    ball = Threat(norm=threat.norm, eps=threat.budget, low=-wide, high=wide)  # of perturbations: the box is the images'
    per_epoch = -(-len(x) // batch)
    length = 2.5 * threat.budget / (epochs * per_epoch) if step is None else step
    v = best = ball.start(zero, joint.at("start"))
    standing = (-1, 0.0)
    for epoch in range(epochs):
        keys = rng.at("order", epoch).uniform(x.flatten(1)[:, :1].double())[:, 0]
        for number, rows in enumerate(keys.argsort().split(batch)):
            notify(Event(stage="universal", done=epoch * per_epoch + number, total=epochs * per_epoch))
            moved = x[rows] + v
            image = moved.clamp(threat.low, threat.high)
            slopes, _, _ = climb_direction(model, image, y[rows], lambda z, y: goal(z, y).clamp_max(cap))
            free = (moved >= threat.low) & (moved <= threat.high)  # what the box cuts off, v does not move
            v = ball.project(zero, v + ball.ascend(v, (slopes * free).sum(0, keepdim=True), length))
        broken, total = 0, 0.0
        with torch.no_grad():
            for rows in keys.argsort().split(batch):
                z = model((x[rows] + v).clamp(threat.low, threat.high))
                broken += int(reached(z, y[rows], targeted=targeted).sum())
                total += float(goal(z, y[rows]).clamp_max(cap).nan_to_num(0.0, cap, -cap).sum())
        if (broken, total) > standing:
            best, standing = v, (broken, total)
    return best
