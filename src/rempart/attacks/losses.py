"""What an attack climbs: per-sample scores of logits that grow as the attack nears its goal."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from rempart.core.errors import SpecError
from rempart.core.model import plainly_finite
from rempart.core.threat import per_image
from rempart.core.types import Images, Labels, Logits, Mask, Scores

LossName = Literal["ce", "margin", "dlr"]
Score = Callable[[Logits, Labels], Scores]
_ROUNDING = 1e-5


def score(name: LossName, *, targeted: bool, num_classes: int) -> Score:
    """The score an attack maximises.

    ce: logsumexp of the other logits minus the true one, whose softplus is the cross-entropy (targeted: the negative,
        for the target). A growing function of it has the same steepest direction for every norm and the same best
        point, but the gradient of cross-entropy itself underflows for confident models (from a margin of 17 on in
        float32), which makes attacks on scaled logits fail silently.
    margin: best other logit minus the true one (targeted: target logit minus the best other); positive = reached.
    dlr: the margin over the spread of the leading logits, so that it does not depend on their scale
        (Croce & Hein 2020, arXiv:2003.01690, equations 6 and 7).

    Raises:
        SpecError: If dlr is asked for with fewer than 3 classes (4 when targeted), where it is undefined.
    """
    least = 4 if targeted else 3
    if name == "dlr" and num_classes < least:
        raise SpecError(
            f"at least {least} classes for the {'targeted ' if targeted else ''}dlr loss",
            got=num_classes,
            hint="use loss=margin",
        )
    return {
        ("ce", False): lambda z, y: -_log_odds(z, y),
        ("ce", True): _log_odds,
        ("margin", False): lambda z, y: -_gap(z, y),
        ("margin", True): _gap,
        ("dlr", False): _dlr,
        ("dlr", True): _dlr_targeted,
    }[name, targeted]


def lead(z: Logits, y: Labels) -> Scores:
    """Logit of class y minus the best of the others; -inf where the two cannot be compared.

    Logits that are NaN, or infinite for two classes at once, name no class, and so not y.
    """
    gap = _gap(z, y)
    return gap.masked_fill(gap.isnan(), -torch.inf)


def undefined(z: Logits) -> Mask:
    """Rows of logits that name no class: one is NaN, or the largest is infinite and not alone."""
    first, second = z.topk(2, dim=1).values.unbind(1)  # NaN counts as the largest
    return first.isnan() | (first.isinf() & (first == second))


def reached(z: Logits, y: Labels, *, targeted: bool) -> Mask:
    """Whether the prediction is what the attack wants: the target, or anything but the label.

    No class at all (`undefined`) is anything but the label, and no target.
    """
    hit = z.argmax(1) == y
    if not plainly_finite(z):
        hit = hit & (_gap(z, y) >= 0)
    return hit if targeted else ~hit


def surely_reached(z: Logits, y: Labels, *, targeted: bool) -> Mask:
    """`reached` by more than rounding, so that another order of summation comes to the same verdict.

    For attacks that end on the boundary: they search on a faster copy of the model that is judged.
    """
    return (lead(z, y) if targeted else -lead(z, y)) > rounding(z)


def rounding(z: Logits) -> Scores:
    """How far two logits of a row may lie apart by rounding alone."""
    high, low = z.amax(1), z.amin(1)
    slack = _ROUNDING * (high - low) + 4 * torch.finfo(z.dtype).eps * torch.maximum(high.abs(), low.abs())
    return slack.nan_to_num(0.0, 0.0, 0.0)  # between infinity and a number there is no rounding


def climb_direction(
    model: nn.Module, x: Images, y: Labels, goal: Score, *, passes: int = 1
) -> tuple[Images, Logits, Scores]:
    """Gradient of the summed score with respect to the images, with the logits and scores of the same pass.

    The scores are summed, not averaged, so a sample's gradient does not depend on its batch mates. For a randomised
    model the three are means over several `passes` (expectation over transformation, Athalye et al. 2018,
    arXiv:1802.00420, section 4.2). The gradient is finite (`finite`); a score that is NaN wins no comparison.
    """
    gradient, z, value = _climb_once(model, x, y, goal)
    for _ in range(passes - 1):
        again = _climb_once(model, x, y, goal)
        gradient, z, value = gradient + again[0], z + again[1], value + again[2]
    return (gradient, z, value) if passes == 1 else (gradient / passes, z / passes, value / passes)


def mean_logits(model: nn.Module, x: Images, passes: int) -> Logits:
    """Mean logits over several passes, for a model that is random; no gradient is kept."""
    with torch.no_grad():
        return model(x) if passes == 1 else torch.stack([model(x) for _ in range(passes)]).mean(0)


def _climb_once(model: nn.Module, x: Images, y: Labels, goal: Score) -> tuple[Images, Logits, Scores]:
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        z = model(x)
        value = goal(z, y)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    box = getattr(model, "low", -torch.inf), getattr(model, "high", torch.inf)
    return finite(gradient, x.detach(), *box, value.detach()), z.detach(), value.detach()


def finite(
    slope: Images, x: Images, low: float = -torch.inf, high: float = torch.inf, value: Scores | None = None
) -> Images:
    """A gradient at `x` as a direction of finite numbers, pixel by pixel; one that is finite is returned as it is.

    A pixel of infinite slope, such as one under a root at 0, moves as much as the one of largest finite slope in its
    image: more, and nothing else would move in l2. It stays where that would leave the box, which is where an attack
    drove it. A NaN says nothing about its pixel, which stays. An image of which no pixel would move (the standard
    deviation of a constant image has such a gradient) moves at random, and away from the walls of the box, to a point
    that has a gradient. So does an image whose score, the `value`, is NaN, whatever autograd makes of that.
    """
    if plainly_finite(slope) and (value is None or plainly_finite(value)):
        return slope
    axes = tuple(range(1, slope.ndim))
    if value is not None:
        slope = slope + per_image(torch.where(value.isnan(), value, 0.0), slope)
    odd = ~slope.isfinite()
    kept = slope.masked_fill(odd, 0.0)
    largest = kept.abs().amax(axes, keepdim=True)
    steep = slope.sign() * torch.where(largest > 0, largest, 1.0)
    free = slope.isinf() & torch.where(slope > 0, x < high, x > low)
    kept = torch.where(free, steep, kept)
    lost = odd.any(axes, keepdim=True) & (kept == 0).all(axes, keepdim=True)
    noise = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(0))
    anywhere = 2 * noise.to(device=x.device, dtype=x.dtype, non_blocking=True) - 1  # a GPU goes on
    anywhere = torch.where(x <= low, anywhere.abs(), torch.where(x >= high, -anywhere.abs(), anywhere))
    return torch.where(lost, anywhere, kept)


def _gap(z: Logits, y: Labels) -> Scores:
    own = z.gather(1, y[:, None])[:, 0]
    return own - z.scatter(1, y[:, None], -torch.inf).amax(1)


def _log_odds(z: Logits, y: Labels) -> Scores:
    own = z.gather(1, y[:, None])[:, 0]
    return own - z.scatter(1, y[:, None], -torch.inf).logsumexp(1)


def _dlr(z: Logits, y: Labels) -> Scores:
    ordered = z.sort(dim=1, descending=True).values
    return -_gap(z, y) / (ordered[:, 0] - ordered[:, 2]).clamp_min(torch.finfo(z.dtype).tiny)


def _dlr_targeted(z: Logits, t: Labels) -> Scores:
    """The targeted form with the best other class in the numerator: positive once the target leads."""
    ordered = z.sort(dim=1, descending=True).values
    spread: Tensor = ordered[:, 0] - 0.5 * (ordered[:, 2] + ordered[:, 3])
    return _gap(z, t) / spread.clamp_min(torch.finfo(z.dtype).tiny)
