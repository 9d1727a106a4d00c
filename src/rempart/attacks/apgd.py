"""Auto-PGD: projected ascent with momentum that sets its own step length, and its run over targets."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import LossName, climb_direction, lead, mean_logits, reached, score, surely_reached
from rempart.core.errors import SpecError, ThreatError
from rempart.core.events import Event, Notify, silent
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, Threat, per_image
from rempart.core.types import Images, Labels, Logits, Mask, Scores

Count = Annotated[int, Ge(1)]
Share = Annotated[float, Gt(0), Le(1)]
Aims = Tensor
"""Two classes per sample, shape (n, 2): the one that decides whether it is broken, and the one a run aims at."""
_KEEP = 0.75  # weight of the new step; the rest is momentum
_SHORTER = 1.5  # l1: the step shrinks by this factor
_SPARSER = 0.95  # l1: fewer coordinates than this share of the last count means progress
_LEAST = 10  # l1: the step never falls below eps over this


@attacks.register("apgd", Traits(norms=NORMS, targeted=True, random=True))
def apgd(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Count = 100,
    restarts: Count = 1,
    loss: LossName = "ce",
    rho: Share = 0.75,
    eot: Count = 1,
    large_steps: bool = False,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Raise the loss inside the threat by projected ascent with momentum and a step length that halves by itself.

    The step begins at 2 eps (l1: eps). At fixed checkpoints it is halved, and the search goes on from the best point,
    for each sample whose loss rose too seldom or whose best loss stands still. In l1 the number of coordinates moved
    adapts too. A sample leaves the batch with its first broken iterate.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: True classes, or classes to reach if `targeted`.
        threat: Needs a budget.
        steps: Gradient evaluations per sample and restart; one further forward pass judges the last point.
        restarts: Independent starts; later ones run only on samples not yet broken.
        loss: Score to climb.
        rho: linf and l2: the step is halved where the loss rose in no more than this share of the last steps.
        eot: Passes over which logits and gradients are averaged, for randomised models.
        large_steps: l1 only: spend 30 % of the steps in the ball of 3 eps and 30 % in that of 2 eps, each time going on
            from the projection of the best point. Needs 3 steps; with fewer it does nothing.
        targeted: Move towards `y` instead of away from it.
        rng: Source of the random starts, keyed by sample.
        notify: Receives one event per step.

    Returns:
        Images like `x`, feasible for `threat`: the first broken iterate, else the one of highest loss.

    Raises:
        ThreatError: If `threat.eps` is None, or on `large_steps` in another norm than l1.
        SpecError: If dlr is asked for with too few classes.

    Source:
        Croce & Hein 2020, arXiv:2003.01690, algorithm 1; l1 after Croce & Hein 2021, arXiv:2103.01208, and their code.
        Differs in the exact projection on ball and box for l2, in counting the first rise from the start point as the
        paper does (the code compares with 0), in the log-odds as `ce`, in letting broken samples go, and in l1 steps
        that leave out coordinates at the edge of the box and can end on a single one.
    """

    def goal(z: Logits, aims: Aims) -> Scores:
        return score(loss, targeted=targeted, num_classes=z.shape[1])(z, aims[:, 0])

    plan = _Plan(steps, goal, goal, rho=rho, passes=eot, large_steps=large_steps, targeted=targeted)
    return _search(model, x, [torch.stack([y, y], 1)] * restarts, threat, plan, rng=rng, notify=notify)


@attacks.register("apgd-t", Traits(norms=NORMS, targeted=False, random=True))
def apgd_targeted(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Count = 100,
    targets: Count = 9,
    restarts: Count = 1,
    loss: Literal["dlr", "margin"] = "dlr",
    rho: Share = 0.75,
    eot: Count = 1,
    large_steps: bool = False,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Run `apgd` towards each of the likeliest wrong classes in turn; a sample is broken by whatever wrong class.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: Classes to leave.
        threat: Needs a budget.
        steps: Gradient evaluations per sample, target and restart; one further forward pass judges the last point.
        targets: Wrong classes aimed at, those of highest logit at `x` first; all of them if there are fewer.
        restarts: Independent starts for each target.
        loss: dlr: (z_t - z_y) / (z_1 - (z_3 + z_4) / 2), logits in falling order; margin: z_t - z_y.
        rho: linf and l2: the step is halved where the loss rose in no more than this share of the last steps.
        eot: Passes over which logits and gradients are averaged, for randomised models.
        large_steps: As in `apgd`.
        targeted: Not supported: the attack chooses its targets itself.
        rng: Source of the random starts, keyed by sample.
        notify: Receives one event per step.

    Returns:
        Images like `x`, feasible for `threat`: the first broken iterate, else that of least margin among the points of
        highest loss of all runs.

    Raises:
        ThreatError: If `targeted`, if `threat.eps` is None, or on `large_steps` in another norm than l1.
        SpecError: If dlr is asked for with fewer than 4 classes.

    Source:
        Croce & Hein 2020, arXiv:2003.01690, section 4.3 and equation 7. Differs as `apgd` does, and in ranking the
        classes once, on the logits of `x`.
    """
    if targeted:
        raise ThreatError("an untargeted run of apgd-t", got="targeted=True", hint="use apgd, which can aim")
    if threat.budget == 0 or len(x) == 0:
        return x.clone()
    z = mean_logits(model, x, eot)
    if loss == "dlr" and z.shape[1] < 4:
        raise SpecError("at least 4 classes for the targeted dlr loss", got=z.shape[1], hint="use loss=margin")
    others = z.scatter(1, y[:, None], -torch.inf).topk(min(targets, z.shape[1] - 1), dim=1).indices
    runs = [torch.stack([y, t], 1) for t in others.unbind(1) for _ in range(restarts)]
    goal = _dlr if loss == "dlr" else _gap
    plan = _Plan(steps, goal, lambda z, aims: -lead(z, aims[:, 0]), rho=rho, passes=eot, large_steps=large_steps)
    return _search(model, x, runs, threat, plan, rng=rng, notify=notify)


def _gap(z: Logits, aims: Aims) -> Scores:
    own, aimed = z.gather(1, aims).unbind(1)
    return aimed - own


def _dlr(z: Logits, aims: Aims) -> Scores:
    """Equation 7; with the own class, not the best other, in the numerator, unlike `losses.score`."""
    first, _, third, fourth = z.topk(4, dim=1).values.unbind(1)
    return _gap(z, aims) / (first - 0.5 * (third + fourth)).clamp_min(torch.finfo(z.dtype).tiny)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the ascents of an attack go: what they climb, and by what score their results are compared."""

    steps: int
    goal: Callable[[Logits, Aims], Scores]
    rank: Callable[[Logits, Aims], Scores]
    rho: float
    passes: int
    large_steps: bool
    targeted: bool = False

    def broken(self, z: Logits, aims: Aims) -> Mask:
        """`surely_reached`, asked only where it may be true."""
        hit = reached(z, aims[:, 0], targeted=self.targeted)
        return surely_reached(z, aims[:, 0], targeted=self.targeted) if bool(hit.any()) else hit

    def stages(self, threat: Threat) -> list[tuple[Threat, int]]:
        """The balls to search one after the other, with the steps to spend in each."""
        if self.large_steps and threat.norm != "l1":
            raise ThreatError("the norm l1 for large_steps", got=threat.norm, hint="leave large_steps out")
        part = math.ceil(0.3 * self.steps)
        if not self.large_steps or self.steps < 3:
            return [(threat, self.steps)]
        wide = [(replace(threat, eps=factor * threat.budget), part) for factor in (3, 2)]
        return [*wide, (threat, self.steps - 2 * part)]


def _search(
    model: nn.Module,
    x: Images,
    runs: Iterable[Aims],
    threat: Threat,
    plan: _Plan,
    *,
    rng: Draws | None,
    notify: Notify,
) -> Images:
    """One ascent after the other, each on the samples that are not broken yet."""
    stages = plan.stages(threat)
    if threat.budget == 0 or len(x) == 0:
        return x.clone()
    rng = rng or Draws(0, torch.arange(len(x)))
    best, todo = x.clone(), torch.arange(len(x), device=x.device)
    standing = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    for run, aims in enumerate(runs):
        original, aims, draws = x[todo], aims[todo], rng.select(todo.cpu()).at("run", run)
        point = _start(original, stages[0][0], draws)
        for ball, steps in stages[:-1]:
            path = _Path.at(original, aims, ball.project(original, point), ball, dense=False)
            point, _, _ = _ascend(model, path, ball, plan, steps, leave=False, notify=notify)
        path = _Path.at(original, aims, threat.project(original, point), threat, dense=len(stages) == 1)
        point, hit, z = _ascend(model, path, threat, plan, stages[-1][1], leave=True, notify=notify)
        value = plan.rank(z, aims)
        better = hit | (value > standing[todo])
        best[todo[better]], standing[todo[better]] = point[better], value[better]
        todo = todo[~hit]
        if len(todo) == 0:
            break
    return best


def _start(x: Images, threat: Threat, rng: Draws) -> Images:
    """A random point on the surface of the ball; in l1, the point of the ball nearest to Gaussian noise."""
    if threat.norm == "linf":
        noise = rng.uniform(x, -1, 1).flatten(1)
        noise = noise / noise.abs().amax(1, keepdim=True) * threat.budget
    else:
        noise = rng.normal(x).flatten(1)
        if threat.norm == "l2":
            noise = noise / noise.norm(dim=1, keepdim=True).clamp_min(1e-12) * threat.budget
    return threat.project(x, x + noise.view_as(x))


@dataclass(slots=True)
class _Path:
    """Where the ascent of each sample stands; one row per sample in every tensor.

    Attributes:
        x: The originals.
        aims: See `Aims`.
        point: The iterate the next step starts from.
        before: The iterate before it.
        gradient: Ascent direction at `point`.
        value: Loss of the last iterate.
        best: Iterate of highest loss; its gradient, logits and loss follow.
        length: Step length.
        rises: How often the loss rose since the last checkpoint.
        halved: Whether the step was halved at the last checkpoint.
        checked: Best loss at the last checkpoint.
        moved: l1: coordinates in which the best point differed from the original at the last checkpoint.
        count: l1: coordinates a step moves.
        most: l1: the largest count, or more.
    """

    x: Images
    aims: Aims
    point: Images
    before: Images
    gradient: Images
    value: Scores
    best: Images
    best_gradient: Images
    best_logits: Logits
    best_value: Scores
    length: Tensor
    rises: Tensor
    halved: Mask
    checked: Scores
    moved: Tensor
    count: Tensor
    most: int

    @classmethod
    def at(cls, x: Images, aims: Aims, start: Images, threat: Threat, *, dense: bool) -> "_Path":
        """The beginning: nothing evaluated yet, so that the first point recorded is the best."""
        n, dims = len(x), x[0].numel()
        rows = torch.zeros(n, dtype=x.dtype, device=x.device)
        lowest, length = rows - torch.inf, threat.budget * (1 if threat.norm == "l1" else 2)
        moved = torch.full_like(rows, dims, dtype=torch.long) if dense else _moved(x, start)
        count: Tensor = torch.full_like(moved, math.ceil(dims / 5)) if dense else _count(moved)
        return cls(
            x=x,
            aims=aims,
            point=start,
            before=start,
            gradient=start,
            value=rows + torch.inf,  # so that the first point is no rise
            best=start,
            best_gradient=start,
            best_logits=rows[:, None],
            best_value=lowest,
            length=rows + length,
            rises=torch.zeros_like(moved),
            halved=torch.ones_like(moved, dtype=torch.bool),
            checked=lowest,
            moved=moved,
            count=count,
            most=int(count.max()),
        )

    def select(self, stay: Mask) -> "_Path":
        """The paths of a part of the samples."""
        rows: dict[str, Any] = {f.name: getattr(self, f.name)[stay] for f in fields(self) if f.name != "most"}
        return replace(self, **rows)

    def advance(self, threat: Threat, *, momentum: bool) -> None:
        """One step along the gradient and back into the threat."""
        length = self.length[:, None]
        if threat.norm == "l1":
            after = threat.project(self.x, self.point + self._sparse_step(length, threat))
        else:
            after = threat.project(self.x, self.point + threat.ascend(self.point, self.gradient, length))
            if momentum:
                after = torch.lerp(self.point, after, _KEEP).add_(self.point - self.before, alpha=1 - _KEEP)
                after = threat.project(self.x, after)
        self.before, self.point = self.point, after

    def record(self, gradient: Images, z: Logits, value: Scores) -> None:
        """What was seen at `point`."""
        self.gradient = gradient
        self.rises = self.rises + (value > self.value)
        self.value = value
        better = value > self.best_value
        image = per_image(better, self.x)
        self.best = torch.where(image, self.point, self.best)
        self.best_gradient = torch.where(image, gradient, self.best_gradient)
        self.best_logits = torch.where(better[:, None], z, self.best_logits)
        self.best_value = torch.where(better, value, self.best_value)

    def check(self, few: float) -> None:
        """Halve the step where the loss rose no more than `few` times, or was not helped by the last full window."""
        stalled = (self.rises <= few) | (~self.halved & (self.best_value <= self.checked))
        self.length = torch.where(stalled, self.length / 2, self.length)
        self._return(stalled)
        self.halved, self.checked, self.rises = stalled, self.best_value, torch.zeros_like(self.rises)

    def check_sparsity(self, eps: float) -> None:
        """l1: move fewer coordinates as the best point gets sparser; shorten the step once it does no longer."""
        moved = _moved(self.x, self.best)
        sparser = moved < _SPARSER * self.moved
        self.length = torch.where(sparser, eps, (self.length / _SHORTER).clamp_min(eps / _LEAST))
        self._return(sparser)
        self.moved, self.count = moved, _count(moved)
        self.most = int(self.count.max())

    def _return(self, back: Mask) -> None:
        """To the best point."""
        image = per_image(back, self.x)
        self.point = torch.where(image, self.best, self.point)
        self.gradient = torch.where(image, self.best_gradient, self.gradient)

    def _sparse_step(self, length: Tensor, threat: Threat) -> Images:
        """The same step in each of the `count` coordinates of largest gradient, of those the box lets move."""
        flat, point = self.gradient.flatten(1), self.point.flatten(1)
        free = torch.where(flat > 0, point < threat.high, point > threat.low)
        size = torch.where(free, flat.abs(), 0.0)
        least = size.topk(self.most, dim=1).values.gather(1, self.count[:, None] - 1)
        step = flat.sign() * ((size >= least) & free)
        return (step * (length / step.abs().sum(1, keepdim=True).clamp_min(1))).view_as(self.x)


def _ascend(
    model: nn.Module, path: _Path, threat: Threat, plan: _Plan, steps: int, *, leave: bool, notify: Notify
) -> tuple[Images, Mask, Logits]:
    """One ascent: per sample the first broken iterate or else the one of highest loss, whether broken, and its logits.

    Without `leave` broken iterates are passed by: those in a larger ball do not count.
    """
    found, active = path.x.clone(), torch.arange(len(path.x), device=path.x.device)
    hit, logits = torch.zeros_like(active, dtype=torch.bool), torch.zeros(())
    sparse = threat.norm == "l1"
    window = due = max(int((0.04 if sparse else 0.22) * steps), 1)
    for t in range(steps + 1):
        if t < steps:
            notify(Event(stage="ascent", done=t, total=steps))
            gradient, z, value = climb_direction(model, path.point, path.aims, plan.goal, passes=plan.passes)
        else:  # nobody steps on from the last point
            gradient, (z, value) = path.gradient, _look(model, path.point, path.aims, plan)
        path.record(gradient, z, value)
        logits = z.clone() if t == 0 else logits
        broken = plan.broken(z, path.aims)
        if leave and bool(broken.any()):
            gone = active[broken]
            found[gone], logits[gone], hit[gone] = path.point[broken], z[broken], True
            active, path = active[~broken], path.select(~broken)
            if len(active) == 0:
                return found, hit, logits
        if t == due and sparse:
            path.check_sparsity(threat.budget)
            due += window
        elif t == due:
            path.check(plan.rho * window)
            window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
            due += window
        if t < steps:
            path.advance(threat, momentum=t > 0)
    found[active], logits[active] = path.best, path.best_logits
    return found, hit, logits


def _look(model: nn.Module, x: Images, aims: Aims, plan: _Plan) -> tuple[Logits, Scores]:
    """Logits and scores alone, averaged as in `climb_direction`."""
    with torch.no_grad():
        seen = [model(x) for _ in range(plan.passes)]
        return torch.stack(seen).mean(0), torch.stack([plan.goal(z, aims) for z in seen]).mean(0)


def _moved(x: Images, z: Images) -> Tensor:
    """How many coordinates differ, what rounding left of a projected one not counted."""
    size = (z - x).flatten(1).abs()
    return (size > 1e-6 * size.amax(1, keepdim=True)).sum(1)


def _count(moved: Tensor) -> Tensor:
    """Coordinates the next l1 steps move: two thirds of those, at least one.

    Rounded down: rounded up, as in the code of the paper, two would never become one.
    """
    return (2 * moved // 3).clamp_min(1)
