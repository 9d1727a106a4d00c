"""Attacks that climb the loss inside a ball: fgsm, bim, mim and pgd are one loop with small differences."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import LossName, Score, climb_direction, reached, score
from rempart.core.events import Event, Notify, silent
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, Threat, per_image
from rempart.core.types import Images, Labels, Mask, Scores

Steps = Annotated[int, Ge(1)]
Step = Annotated[Pixels, Gt(0)]
Keep = Literal["best", "last"]
_SPREAD = 0.05  # l1: share of the coordinates the first step moves, as in SLIDE (Tramer & Boneh 2019, 1 % to 5 %)


@attacks.register("fgsm", Traits(norms=NORMS, targeted=True))
def fgsm(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    loss: LossName = "ce",
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Take one step of the full budget along the gradient.

    linf: x + eps * sign(g). l2: x + eps * g / |g|. l1: the exact maximiser of the linearised loss over ball and box,
    which fills the coordinates of largest gradient. Cut to the box.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: True classes, or classes to reach if `targeted`.
        threat: Needs a budget.
        loss: Score to climb.
        targeted: Move towards `y` instead of away from it.
        rng: Not used: the attack draws nothing.
        notify: Receives one event.

    Returns:
        Images like `x`, moved wherever the gradient is not zero, even where the step turns out to help the model.

    Source:
        Goodfellow et al. 2015, arXiv:1412.6572, section 4. The l1 form is ours.
    """
    goal = score(loss, targeted=targeted, num_classes=_classes(model, x))
    return ascent(model, x, y, threat, goal, plan=Plan(1, threat.budget), targeted=targeted, start=x, notify=notify)


@attacks.register("bim", Traits(norms=NORMS, targeted=True))
def bim(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Steps = 10,
    step: Step | None = None,
    loss: LossName = "ce",
    keep: Keep = "best",
    early_stop: bool = False,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Repeat small steps along the gradient from the original image, projecting each time.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: True classes, or classes to reach if `targeted`.
        threat: Needs a budget.
        steps: Gradient evaluations per sample.
        step: Step length in pixel units, measured in the norm of the threat. Default eps / steps.
        loss: Score to climb.
        keep: The best iterate, or the last as in the paper.
        early_stop: Let a sample go as soon as it is broken; the first broken point is returned.
        targeted: Move towards `y` instead of away from it.
        rng: Not used: the attack draws nothing.
        notify: Receives one event per step.

    Returns:
        Images like `x`, feasible for `threat`.

    Source:
        Kurakin et al. 2017, arXiv:1607.02533, section 2.2. Differs in keeping the best point unless told otherwise.
    """
    plan = Plan(steps, threat.budget / steps if step is None else step, keep=keep, early_stop=early_stop)
    goal = score(loss, targeted=targeted, num_classes=_classes(model, x))
    return ascent(model, x, y, threat, goal, plan=plan, targeted=targeted, start=x, notify=notify)


@attacks.register("mim", Traits(norms=NORMS, targeted=True))
def mim(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Steps = 10,
    step: Step | None = None,
    momentum: Annotated[float, Ge(0)] = 1.0,
    loss: LossName = "ce",
    keep: Keep = "best",
    early_stop: bool = False,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Follow a running sum of gradients, each normalised by its l1 norm: `bim` with momentum.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: True classes, or classes to reach if `targeted`.
        threat: Needs a budget.
        steps: Gradient evaluations per sample.
        step: Step length in pixel units, measured in the norm of the threat. Default eps / steps.
        momentum: Weight of the old direction; 0 gives `bim`.
        loss: Score to climb.
        keep: The best iterate, or the last as in the paper.
        early_stop: Let a sample go as soon as it is broken.
        targeted: Move towards `y` instead of away from it.
        rng: Not used: the attack draws nothing.
        notify: Receives one event per step.

    Returns:
        Images like `x`, feasible for `threat`.

    Source:
        Dong et al. 2018, arXiv:1710.06081, algorithm 1. Differs in keeping the best point unless told otherwise.
    """
    length = threat.budget / steps if step is None else step
    plan = Plan(steps, length, momentum=momentum, keep=keep, early_stop=early_stop)
    goal = score(loss, targeted=targeted, num_classes=_classes(model, x))
    return ascent(model, x, y, threat, goal, plan=plan, targeted=targeted, start=x, notify=notify)


@attacks.register("pgd", Traits(norms=NORMS, targeted=True, random=True))
def pgd(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Steps = 40,
    step: Step | None = None,
    restarts: Annotated[int, Ge(1)] = 1,
    random_start: bool = True,
    loss: LossName = "ce",
    eot: Annotated[int, Ge(1)] = 1,
    keep: Keep = "best",
    early_stop: bool = False,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Raise the loss inside the threat by projected steepest ascent from random starts.

    Solves max loss(model(z), y) over z in ball and box, and keeps per sample the best point seen: a broken one before
    an unbroken one, then the higher loss. The last update is evaluated too, so steps=1 without a random start is FGSM.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: True classes, or classes to reach if `targeted`.
        threat: Needs a budget.
        steps: Gradient evaluations per sample and restart; one further forward pass judges the last point.
        step: Step length in pixel units, measured in the norm of the threat. Default 2.5 * eps / steps.
        restarts: Independent starts; later ones run only on samples not yet broken.
        random_start: Start uniformly in the ball, or at the original image (then only one start makes sense).
        loss: Score to climb.
        eot: Passes through the model that each gradient is the mean of; more than one helps where it is random.
        keep: The best iterate, or the last as in the paper.
        early_stop: Let a sample go as soon as it is broken; the rest of the batch gets cheaper.
        targeted: Move towards `y` instead of away from it.
        rng: Source of the random starts, keyed by sample.
        notify: Receives one event per step.

    Returns:
        Images like `x`, feasible for `threat`. Where nothing was found, the point of highest loss.

    Raises:
        ThreatError: If `threat.eps` is None (use a minimum-norm attack).

    Example:
        >>> z = pgd(model, x, y, Threat.parse("linf:8/255"), steps=10)

    Source:
        Madry et al. 2018, arXiv:1706.06083, section 2.1. Differs in keeping the best point unless told otherwise, in
        the exact projection on ball and box for l1 and l2, and in l1 steps that begin on 5 % of the coordinates and
        end on one.
    """
    length = 2.5 * threat.budget / steps if step is None else step
    plan = Plan(steps, length, passes=eot, keep=keep, early_stop=early_stop)
    goal = score(loss, targeted=targeted, num_classes=_classes(model, x))
    rng = rng or Draws(0, torch.arange(len(x)))
    if restarts == 1 or not random_start:
        start = threat.start(x, rng.at("pgd", 0)) if random_start else x
        return ascent(model, x, y, threat, goal, plan=plan, targeted=targeted, start=start, notify=notify)
    best, todo = x.clone(), torch.arange(len(x), device=x.device)
    standing = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    for restart in range(restarts):
        start = threat.start(x[todo], rng.select(todo.cpu()).at("pgd", restart))
        found = ascent(model, x[todo], y[todo], threat, goal, plan=plan, targeted=targeted, start=start, notify=notify)
        with torch.no_grad():
            z = model(found)
        hit, value = reached(z, y[todo], targeted=targeted), goal(z, y[todo])
        better = hit | (value > standing[todo])
        best[todo[better]], standing[todo[better]] = found[better], value[better]
        todo = todo[~hit]
        if len(todo) == 0:
            break
    return best


@dataclass(frozen=True, slots=True)
class Plan:
    """One ascent: how many steps, how long, and what to keep."""

    steps: int
    length: float
    momentum: float = 0.0
    passes: int = 1
    keep: Keep = "last"
    early_stop: bool = False


def ascent(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    goal: Score,
    *,
    plan: Plan,
    targeted: bool,
    start: Images,
    notify: Notify,
) -> Images:
    """One ascent from `start`. A sample's path does not depend on its batch mates; broken ones may leave the batch."""
    if threat.budget == 0 or len(x) == 0:
        return x.clone()
    out = x.clone()
    active = torch.arange(len(x), device=x.device)
    best = _Best.at(start)
    point, velocity = start, torch.zeros_like(x) if plan.momentum else None
    for t in range(plan.steps):
        notify(Event(stage="ascent", done=t, total=plan.steps))
        gradient, z, value = climb_direction(model, point, y, goal, passes=plan.passes)
        if t > 0 and plan.keep == "best":
            best.update(point, reached(z, y, targeted=targeted), value)
        if t > 0 and plan.early_stop:
            left = best.hit if plan.keep == "best" else reached(z, y, targeted=targeted)
            if bool(left.any()):
                out[active[left]] = (best.image if plan.keep == "best" else point)[left]
                stay = ~left
                active, x, y, point, gradient = active[stay], x[stay], y[stay], point[stay], gradient[stay]
                velocity = velocity[stay] if velocity is not None else None
                best = best.select(stay)
                if len(active) == 0:
                    return out
        if velocity is not None:
            size = per_image(gradient.flatten(1).abs().sum(1).clamp_min(torch.finfo(x.dtype).tiny), x)
            gradient = velocity = plan.momentum * velocity + gradient / size
        share = _spread(t, plan.steps, x[0].numel()) if threat.norm == "l1" else 0.0
        point = threat.project(x, point + threat.ascend(point, gradient, plan.length, share=share))
    if plan.keep == "best" and plan.steps > 1:
        with torch.no_grad():
            z = model(point)
        best.update(point, reached(z, y, targeted=targeted), goal(z, y))
        point = best.image
    out[active] = point
    return out


@dataclass(slots=True)
class _Best:
    """The best point of each sample so far: a broken one before an unbroken one, then the higher score."""

    image: Images
    hit: Mask
    value: Scores

    @classmethod
    def at(cls, start: Images) -> "_Best":
        n = len(start)
        hit = torch.zeros(n, dtype=torch.bool, device=start.device)
        return cls(start, hit, torch.full((n,), -torch.inf, dtype=start.dtype, device=start.device))

    def update(self, point: Images, hit: Mask, value: Scores) -> None:
        better = (hit & ~self.hit) | ((hit == self.hit) & (value > self.value))
        self.image = torch.where(per_image(better, point), point, self.image)
        self.hit, self.value = self.hit | hit, torch.where(better, value, self.value)

    def select(self, stay: Tensor) -> "_Best":
        return _Best(self.image[stay], self.hit[stay], self.value[stay])


def _spread(t: int, steps: int, dims: int) -> float:
    """Share of the coordinates that step t moves in l1: from 5 % down to a single one, geometrically."""
    first = max(1.0, _SPREAD * dims)
    return first ** (1 - t / (steps - 1)) / dims if steps > 1 else 0.0


def _classes(model: nn.Module, x: Images) -> int:
    """Number of classes, asked of the model where it says so."""
    known = getattr(model, "num_classes", None)
    if isinstance(known, int):
        return known
    with torch.no_grad():
        return model(x[:1]).shape[1]
