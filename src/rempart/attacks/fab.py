"""FAB: steps to the linearised boundary that stay near the original, for the smallest perturbation in each norm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import climb_direction, finite, lead, surely_reached
from rempart.core.errors import ThreatError
from rempart.core.events import Event, Notify, silent
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, Norm, Threat, dual, per_image, unit
from rempart.core.types import Images, Labels, Logits, Mask, Scores

Steps = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
Within = Annotated[Pixels, Gt(0)]
_PAST = 3e-4
Plane = Callable[[nn.Module, Images, Labels, Labels], tuple[Logits, Scores, Images]]
"""From model, points, classes to leave and to reach: logits, gap f of a linearised boundary, and its gradient w.

The boundary is where f + w . (v - point) = 0; f > 0 beyond it.
"""


@attacks.register("fab", Traits(norms=NORMS, targeted=True, minimum=True, random=True))
def fab(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Steps = 100,
    restarts: Annotated[int, Ge(1)] = 1,
    alpha_max: Share = 0.1,
    eta: Annotated[float, Ge(1)] = 1.05,
    beta: Annotated[float, Gt(0), Le(1)] = 0.9,
    refine: Annotated[int, Ge(0)] = 3,
    within: Within | None = None,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Step past the nearest linearised boundary, biased towards the original, and keep the nearest point that counts.

    Each step projects the current point and the original on the hyperplane, exactly and inside the box, and goes to a
    mean of the two projections that leans the more on the original the nearer the current point is to it.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: Classes to leave, or classes to reach if `targeted`.
        threat: Gives the norm and the box; a budget only bounds the length of the random starts.
        steps: Linearisations per sample and restart: a forward pass, and a backward pass for each other class (one in
            all if `targeted`). One further forward pass judges the last point.
        restarts: Starts; the first is the original, later ones lie half as far away as what was found so far, or as
            the budget (or `within`) where that is less.
        alpha_max: Largest weight of the projection of the original.
        eta: Steps are this many times as long as to the hyperplane.
        beta: A point that counts is pulled back to this share of its perturbation before the next step.
        refine: Secant steps at the end, between the point found and that share of its perturbation.
        within: Stop a sample once a perturbation of at most this size is found, in the norm of the threat and pixel
            units of the box. Default: search for the smallest.
        targeted: Move towards `y`: to the hyperplane between `y` and whichever other class leads.
        rng: Source of the random starts, keyed by sample.
        notify: Receives one event per step.

    Returns:
        Images like `x` in the box: the nearest point found, or where none was found the last point tried.

    Source:
        Croce & Hein 2020, arXiv:1907.02044, algorithm 1. Differs in taking the hyperplane at the point that was judged,
        before it is pulled back (one forward pass per step instead of two), and in aiming a little past
        the hyperplane. The targeted form is ours; the paper's is `fab-t`.
    """
    plan = _Plan(steps, restarts, alpha_max, eta, beta, refine, within)
    plane = _into if targeted else _nearest(threat)
    return _search(model, x, y, threat, plan, plane, y[:, None], targeted=targeted, rng=rng, notify=notify)


@attacks.register("fab-t", Traits(norms=NORMS, targeted=False, minimum=True, random=True))
def fab_targeted(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Steps = 100,
    targets: Annotated[int, Ge(1)] = 9,
    restarts: Annotated[int, Ge(1)] = 1,
    alpha_max: Share = 0.1,
    eta: Annotated[float, Ge(1)] = 1.05,
    beta: Annotated[float, Gt(0), Le(1)] = 0.9,
    refine: Annotated[int, Ge(0)] = 3,
    within: Within | None = None,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """FAB towards one class after another, those of highest logit at `x` first; any misclassification counts.

    One backward pass per step, whatever the number of classes. As part of a suite give `within` the budget: then a
    sample leaves as soon as it is broken.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: Classes to leave.
        threat: Gives the norm and the box; a budget only bounds the length of the random starts.
        steps: Linearisations per sample, class and restart: a forward and a backward pass each. One further forward
            pass judges the last point.
        targets: Classes tried, at most all others.
        restarts: Starts for each class, as in `fab`.
        alpha_max: Largest weight of the projection of the original.
        eta: Steps are this many times as long as to the hyperplane.
        beta: A point that counts is pulled back to this share of its perturbation before the next step.
        refine: Secant steps at the end, between the point found and that share of its perturbation.
        within: Stop a sample once a perturbation of at most this size is found, in the norm of the threat and pixel
            units of the box. Default: search for the smallest.
        targeted: Not supported: the classes are chosen by rank.
        rng: Source of the random starts, keyed by sample.
        notify: Receives one event per step.

    Returns:
        Images like `x` in the box: the nearest point found, or where none was found the last point tried.

    Raises:
        ThreatError: If `targeted`.

    Source:
        Croce & Hein 2020, arXiv:1907.02044, as used in AutoAttack (arXiv:2003.01690, section 5). Differs as `fab` does.
    """
    if targeted:
        raise ThreatError("an untargeted run of fab-t", got="targeted=True", hint="use fab, which can aim")
    with torch.no_grad():
        z = model(x)
    ranked = z.scatter(1, y[:, None], -torch.inf).topk(min(targets, z.shape[1] - 1), dim=1).indices
    plan = _Plan(steps, restarts, alpha_max, eta, beta, refine, within)
    return _search(model, x, y, threat, plan, _towards, ranked, targeted=False, rng=rng, notify=notify)


@dataclass(frozen=True, slots=True)
class _Plan:
    """The options that both attacks share."""

    steps: int
    restarts: int
    alpha_max: float
    eta: float
    beta: float
    refine: int
    within: float | None


def _search(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    plan: _Plan,
    plane: Plane,
    aims: Tensor,
    *,
    targeted: bool,
    rng: Draws | None,
    notify: Notify,
) -> Images:
    """All runs, one for each column of `aims` and restart, then the final search; samples leave once done."""
    rng = rng or Draws(0, torch.arange(len(x)))
    best, size = x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    todo = torch.arange(len(x), device=x.device)
    runs = [(column, restart) for column in range(aims.shape[1]) for restart in range(plan.restarts)]
    for number, (column, restart) in enumerate(runs):
        if len(todo) == 0:
            return best

        def tell(t: int, before: int = number * plan.steps) -> None:
            notify(Event(stage="projection", done=before + t, total=len(runs) * plan.steps))

        start = x[todo]
        if restart:
            draws = rng.select(todo.cpu()).at("fab", column, restart)
            start = _random_start(start, best[todo], threat, plan.within, draws)
        found, length = _run(
            model, x[todo], y[todo], aims[todo, column], start, threat, plan, plane, targeted=targeted, tell=tell
        )
        nearer = (length < size[todo]) | size[todo].isinf()
        best[todo[nearer]], size[todo[nearer]] = found[nearer], length[nearer]
        if plan.within is not None:
            todo = todo[size[todo] > plan.within]
    left = todo[size[todo].isfinite()]
    if len(left) and plan.refine:
        best[left] = _pull_back(model, x[left], best[left], y[left], plan, targeted=targeted)
    return best


def _run(
    model: nn.Module,
    x: Images,
    y: Labels,
    aim: Labels,
    start: Images,
    threat: Threat,
    plan: _Plan,
    plane: Plane,
    *,
    targeted: bool,
    tell: Callable[[int], None],
) -> tuple[Images, Scores]:
    """One descent from `start`: the nearest point found and its distance, or the last point and infinity."""
    out, size = start.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    active, point = torch.arange(len(x), device=x.device), start
    for t in range(plan.steps):
        tell(t)
        z, gap, slope = plane(model, point, y, aim)
        gap, hit = (gap - _past(z)).nan_to_num(0.0, 0.0, 0.0), surely_reached(z, y, targeted=targeted)
        _keep(out, size, active[hit], point[hit], x[hit], threat.norm)
        if plan.within is not None:
            stay = size[active] > plan.within
            if not bool(stay.all()):
                active, x, y, aim, point = active[stay], x[stay], y[stay], aim[stay], point[stay]
                hit, gap, slope = hit[stay], gap[stay], slope[stay]
                if len(active) == 0:
                    return out, size
        point = _step(x, point, hit, gap, slope, threat, plan)
    with torch.no_grad():
        hit = surely_reached(model(point), y, targeted=targeted)
    _keep(out, size, active[hit], point[hit], x[hit], threat.norm)
    lost = size[active].isinf()
    out[active[lost]] = point[lost]
    return out, size


def _keep(out: Images, size: Scores, rows: Tensor, found: Images, x: Images, norm: Norm) -> None:
    """Write those of `found` that are nearer than what `rows` of `out` hold."""
    length = _length((found - x).flatten(1), norm)
    nearer = length < size[rows]
    out[rows[nearer]], size[rows[nearer]] = found[nearer], length[nearer]


def _past(z: Logits, share: float = _PAST) -> Scores:
    """How far past the boundary to aim: by more than what `surely_reached` asks for.

    Where walls of the box take the overshoot away, as they do in l1, steps would creep up to the boundary for ever.
    """
    return share * (z.amax(1) - z.amin(1)) + 8 * torch.finfo(z.dtype).eps * z.abs().amax(1)


def _step(x: Images, point: Images, hit: Mask, gap: Scores, slope: Images, threat: Threat, plan: _Plan) -> Images:
    """The next point: pull back those that count, project them and the originals, overshoot, and mix."""
    n = len(x)
    origin, here, slope = x.flatten(1), point.flatten(1), slope.flatten(1)
    peak = slope.abs().amax(1, keepdim=True)  # first, because the squares of a tiny gradient vanish in float32
    peak = torch.where(peak > 0, peak, 1.0)
    slope, gap = slope / peak, gap[:, None] / peak
    base = torch.lerp(here, origin, (1 - plan.beta) * hit.to(x.dtype)[:, None])
    both, slopes = torch.cat([base, origin]), torch.cat([slope, slope])
    gaps = torch.cat([gap, gap]) + (slopes * (both - torch.cat([here, here]))).sum(1, keepdim=True)
    moves = project_on_plane(both, slopes, gaps, threat)
    near, far = _length(moves, threat.norm).clamp_min(1e-8)[:, None].split(n)
    alpha = (near / (near + far)).clamp_max(plan.alpha_max)
    ends = torch.add(both, moves, alpha=plan.eta)
    return torch.lerp(ends[:n], ends[n:], alpha).clamp_(threat.low, threat.high).view_as(x)


def project_on_plane(point: Tensor, slope: Tensor, gap: Tensor, threat: Threat) -> Tensor:
    """The smallest moves, in the norm of the threat, that carry points to hyperplanes without leaving the box.

    Args:
        point: Points in the box, shape (n, D).
        slope: Gradients w with a largest entry of 1 in size, or zero; shape (n, D).
        gap: Value f at the point, shape (n, 1): the hyperplane is f + w . move = 0.
        threat: Gives the norm and the box.

    Returns:
        Moves, shape (n, D). Where the hyperplane misses the box, the move to the corner nearest to it along w.
    """
    toward = slope * -gap.sign()
    way = toward.sign()
    middle, half = (threat.high + threat.low) / 2, (threat.high - threat.low) / 2
    room = (way * half).add_(middle).sub_(point).mul_(way).clamp_min_(0)  # to the wall; none where w is zero
    toward.abs_()
    if threat.norm == "l1":
        return _fill(toward, room, gap.abs()).mul_(way)
    if threat.norm == "linf":
        return _water_level(room, toward, gap.abs()).mul_(way)
    knee = room / toward.clamp_min(1e-30)
    return _water_level(knee, toward.square(), gap.abs()).mul_(toward).mul_(way)


def _water_level(knee: Tensor, weight: Tensor, reach: Tensor) -> Tensor:
    """min(t, knee) for the least t at which sum(weight * min(t, knee)) is `reach`; `knee` where none is.

    The sum is piecewise linear and concave in t, so that Newton's method from the left climbs without overshooting and
    ends on the right piece. Arithmetic instead of masks: on a CPU, those cost several times as much.
    """
    buffer = torch.empty_like(knee)
    level, value = torch.zeros_like(reach), torch.zeros_like(reach)
    slope = torch.gt(knee, 0, out=buffer).mul_(weight).sum(1, keepdim=True)
    slack = 4 * torch.finfo(knee.dtype).eps
    for _ in range(knee.shape[1] + 1):
        grown = torch.where(slope > 0, level + (reach - value) / slope, torch.inf).maximum(level)
        done = grown <= level * (1 + slack)
        if bool(done.all()):
            break
        level = torch.where(done, level, grown)
        value = torch.minimum(knee, level, out=buffer).mul_(weight).sum(1, keepdim=True)
        slope = torch.gt(knee, level, out=buffer).mul_(weight).sum(1, keepdim=True)
    return torch.minimum(knee, level, out=buffer)


def _fill(weight: Tensor, room: Tensor, reach: Tensor) -> Tensor:
    """Fill coordinates up to their room, those of largest weight first, until sum(weight * part) is `reach`."""
    few = max(1, weight.shape[1] // 16)
    part, short = _fill_first(weight, room, reach, few)
    if bool(short.any()):
        part[short] = _fill_first(weight[short], room[short], reach[short], weight.shape[1])[0]
    return part


def _fill_first(weight: Tensor, room: Tensor, reach: Tensor, few: int) -> tuple[Tensor, Tensor]:
    top, order = (weight * room.sign()).topk(few, dim=1)
    room = room.gather(1, order)
    gain = top * room
    total = gain.cumsum(1)
    part = ((reach - (total - gain)) / top.clamp_min(1e-30)).clamp_min(0).minimum(room)
    return torch.zeros_like(weight).scatter_(1, order, part), total[:, -1] < reach[:, 0]


def _length(flat: Tensor, norm: Norm) -> Scores:
    """The norm of each row; several times faster on a CPU than `vector_norm` in linf and l1."""
    if norm == "l2":
        return torch.linalg.vector_norm(flat, 2, dim=1)
    return flat.abs().amax(1) if norm == "linf" else flat.abs().sum(1)


def _random_start(x: Images, best: Images, threat: Threat, within: float | None, rng: Draws) -> Images:
    """Half the distance of what was found, or tried last, in a random direction; never more than half a budget."""
    noise = (rng.uniform(x, -1, 1) if threat.norm == "linf" else rng.normal(x)).flatten(1)
    length = _length((best - x).flatten(1), threat.norm)
    for bound in (threat.eps, within):
        length = length if bound is None else length.clamp_max(bound)
    noise = noise * (0.5 * length / _length(noise, threat.norm).clamp_min(1e-12))[:, None]
    return (x + noise.view_as(x)).clamp(threat.low, threat.high)


def _pull_back(model: nn.Module, x: Images, found: Images, y: Labels, plan: _Plan, *, targeted: bool) -> Images:
    """The final search: secant steps between `beta` of the perturbation and all of it, kept where they count."""

    def judge(share: Scores) -> tuple[Mask, Scores]:
        with torch.no_grad():
            z = model(torch.lerp(x, found, per_image(share, x)))
        return surely_reached(z, y, targeted=targeted), (lead(z, y) if targeted else -lead(z, y)) - _past(z, _PAST / 20)

    far = torch.ones(len(x), dtype=x.dtype, device=x.device)
    near = far * plan.beta
    low, high = judge(near)[1], judge(far)[1]
    for _ in range(plan.refine):
        back = (high / (high - low).clamp_min(torch.finfo(x.dtype).tiny)).nan_to_num(0.5)  # NaN: no answer at both ends
        share = far - (far - near) * back.clamp(0, 1)
        hit, value = judge(share)
        near, low = torch.where(hit, near, share), torch.where(hit, low, value)
        far, high = torch.where(hit, share, far), torch.where(hit, value, high)
    return torch.lerp(x, found, per_image(far, x))


def _towards(model: nn.Module, point: Images, y: Labels, aim: Labels) -> tuple[Logits, Scores, Images]:
    """The boundary between the class to leave and the one aimed at."""
    pair = torch.stack([y, aim], 1)

    def gain(z: Logits, _: Labels) -> Scores:
        own, other = z.gather(1, pair).unbind(1)
        return other - own

    slope, z, gap = climb_direction(model, point, y, gain)
    return z, gap, slope


def _into(model: nn.Module, point: Images, y: Labels, aim: Labels) -> tuple[Logits, Scores, Images]:
    """The boundary between the class to reach and whichever other one leads."""
    slope, z, gap = climb_direction(model, point, y, lead)
    return z, gap, slope


def _nearest(threat: Threat) -> Plane:
    """The nearest of the boundaries between the class to leave and each other one, a backward pass each."""

    def plane(model: nn.Module, point: Images, y: Labels, aim: Labels) -> tuple[Logits, Scores, Images]:
        point = point.detach().requires_grad_(True)
        with torch.enable_grad():
            z = model(point)
            own = z.gather(1, y[:, None])
            last = z.shape[1] - 2
            others = torch.arange(last + 1, device=y.device).expand(len(y), -1)
            gaps = z.gather(1, others + (others >= y[:, None])) - own
            slope = torch.zeros_like(point)
            gap, distance = gaps[:, 0].detach().clone(), torch.full_like(gaps[:, 0], torch.inf).detach()
            for k in range(last + 1):
                (slope_k,) = torch.autograd.grad(gaps[:, k].sum(), point, retain_graph=k < last)
                slope_k = finite(slope_k, point.detach(), threat.low, threat.high)
                scale = unit(slope_k.flatten(1))
                size = _length(slope_k.flatten(1) / scale, dual(threat.norm))
                # infinite or NaN, and never the nearest, without slope
                distance_k = gaps[:, k].detach().abs() / scale[:, 0] / size
                nearer = distance_k < distance
                slope[nearer], gap[nearer] = slope_k[nearer], gaps[nearer, k].detach()
                distance[nearer] = distance_k[nearer]
        return z.detach(), gap, slope

    return plane
