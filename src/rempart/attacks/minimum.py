"""Attacks that look for the smallest perturbation by stepping to the nearest linearised boundary."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from rempart.attacks.catalogue import Traits, attacks
from rempart.attacks.losses import finite, surely_reached
from rempart.core.errors import ThreatError
from rempart.core.events import Event, Notify, silent
from rempart.core.repro import Draws
from rempart.core.threat import Norm, Threat, dual, per_image, unit, vector_norm
from rempart.core.types import Images, Labels, Logits, Scores


@attacks.register("deepfool", Traits(norms=("l2", "linf"), targeted=False, minimum=True))
def deepfool(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    steps: Annotated[int, Ge(1)] = 50,
    overshoot: Annotated[float, Ge(0)] = 0.02,
    candidates: Annotated[int, Ge(2)] = 10,
    refine: Annotated[int, Ge(0)] = 8,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Step to the nearest boundary of the linearised model until the prediction changes.

    Args:
        model: Frozen classifier.
        x: Images in the box.
        y: Classes to leave.
        threat: Gives the norm (l2 or linf) and the box; a budget is ignored.
        steps: Largest number of linearisations.
        overshoot: Each step is longer than to the linearised boundary by this share.
        candidates: Classes considered, the own one included: those of highest logit at `x`.
        refine: Halvings of a bisection from the point found back towards the original; 0 for the paper's result.
        targeted: Not supported.
        rng: Not used: the attack draws nothing.
        notify: Receives one event per step.

    Returns:
        Images like `x` in the box: a point past the boundary, or where none was found the last point tried.

    Raises:
        ThreatError: If `targeted`.

    Source:
        Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, algorithms 1 and 2; linf from section 3.3. Differs in cutting
        each iterate to the box, in overshooting at each step instead of once at the end (it finds smaller perturbations
        on curved boundaries), and in the bisection. It is no lower bound: other attacks find smaller perturbations.
    """
    if targeted:
        raise ThreatError("an untargeted run of deepfool", got="targeted=True", hint="use pgd or cw, which can aim")
    with torch.no_grad():
        z = model(x)
    others = z.scatter(1, y[:, None], -torch.inf).topk(min(candidates, z.shape[1]) - 1, dim=1).indices
    out, active, point = x.clone(), torch.arange(len(x), device=x.device), x
    for t in range(steps):
        notify(Event(stage="linearisation", done=t, total=steps))
        gaps, slopes = _linearise(model, point, y, others, threat)
        past = (1e-6 + 1e-4 * threat.distance(x, point)).to(x.dtype)
        step = _nearest(gaps, slopes, threat.norm, past).view_as(x)
        point = (point + (1 + overshoot) * step).clamp(threat.low, threat.high)
        with torch.no_grad():
            broken = surely_reached(model(point), y, targeted=False)
        out[active] = point
        if refine and bool(broken.any()):
            out[active[broken]] = bisect(model, x[broken], point[broken], y[broken], refine)
        stay = ~broken
        active, x, y, others, point = active[stay], x[stay], y[stay], others[stay], point[stay]
        if len(active) == 0:
            break
    return out


def _linearise(model: nn.Module, point: Images, y: Labels, others: Tensor, threat: Threat) -> tuple[Logits, Tensor]:
    """Gaps z_k - z_y and their gradients, shapes (n, c) and (n, c, D), for the candidate classes k."""
    point = point.detach().requires_grad_(True)
    with torch.enable_grad():
        z = model(point)
        gaps = z.gather(1, others) - z.gather(1, y[:, None])
        last = gaps.shape[1] - 1
        slopes = [torch.autograd.grad(gaps[:, k].sum(), point, retain_graph=k < last)[0] for k in range(last + 1)]
    point = point.detach()
    return gaps.detach(), torch.stack([finite(slope, point, threat.low, threat.high).flatten(1) for slope in slopes], 1)


def _nearest(gaps: Logits, slopes: Tensor, norm: Norm, past: Scores) -> Tensor:
    """The step to `past` the nearest of the linearised boundaries, shape (n, D); zero where no gradient flows.

    Past it, not on it, where float32 cannot tell, and where each step cut to the box would only halve the gap.
    """
    scale = unit(slopes)
    slopes, gaps = slopes / scale, gaps / scale[..., 0]
    size = vector_norm(slopes.flatten(0, 1), dual(norm)).view(slopes.shape[:2])
    distance = torch.where(size > 0, gaps.abs() / size, torch.inf)
    rows, best = torch.arange(len(gaps), device=gaps.device), distance.argmin(1)
    length = torch.where(distance[rows, best].isfinite(), distance[rows, best], 0.0)[:, None]
    length = length + past[:, None] * (length > 0)
    slope = slopes[rows, best]
    return length * (slope.sign() if norm == "linf" else slope / size[rows, best][:, None].clamp_min(1e-30))


def bisect(model: nn.Module, x: Images, broken: Images, y: Labels, halvings: int) -> Images:
    """Walk back towards the originals as far as the images stay broken by more than rounding."""
    near, far = torch.zeros(len(x), dtype=x.dtype, device=x.device), torch.ones(len(x), dtype=x.dtype, device=x.device)
    for _ in range(halvings):
        middle = (near + far) / 2
        with torch.no_grad():
            hit = surely_reached(model(x + per_image(middle, x) * (broken - x)), y, targeted=False)
        near, far = torch.where(hit, near, middle), torch.where(hit, middle, far)
    return x + per_image(far, x) * (broken - x)
