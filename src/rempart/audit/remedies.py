"""Models to attack in place of one that hides its gradients; the original still judges what is found."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from rempart.attacks.losses import lead
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Logits

_PATTERNS = 8
_STEPS, _BATCH = 200, 64


class straight_through(TorchFunctionMode):
    """A context in which rounding, sign and step functions pass gradients on; their values stay the same.

    round, floor, ceil and trunc count as the identity, sign as a hard tanh, heaviside as half of one: backward pass
    differentiable approximation (Athalye et al. 2018, arXiv:1802.00420, section 4.1). A backward pass of the model's
    own (`autograd.Function`), a script module and a cast to integers are left as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        slope = _SLOPES.get(func)
        x = args[0] if args else kwargs.get("input")
        if slope is None or "out" in kwargs or not (isinstance(x, Tensor) and x.requires_grad):
            return func(*args, **kwargs)
        if func in _IN_PLACE:
            exact = func(x.detach().clone(), *args[1:], **kwargs)
            return x.copy_(_borrow(exact, slope(x.clone())))
        return _borrow(func(*args, **kwargs), slope(x))


def _borrow(value: Tensor, slope: Tensor) -> Tensor:
    """The first tensor exactly, with the gradient of the second."""
    return value.detach() + (slope - slope.detach())


def _identity(x: Tensor) -> Tensor:
    return x * 1


def _hard_tanh(x: Tensor) -> Tensor:
    return x.clamp(-1, 1)


def _hard_step(x: Tensor) -> Tensor:
    return x.clamp(-1, 1) / 2


_SHAPES = {
    **dict.fromkeys(("round", "floor", "ceil", "trunc", "fix"), _identity),
    **dict.fromkeys(("sign", "sgn"), _hard_tanh),
    "heaviside": _hard_step,
}
_IN_PLACE = {getattr(Tensor, f"{name}_") for name in _SHAPES}
_SLOPES: dict[Any, Callable[[Tensor], Tensor]] = {
    **{getattr(torch, name): slope for name, slope in _SHAPES.items()},
    **{getattr(Tensor, name): slope for name, slope in _SHAPES.items()},
    **{getattr(Tensor, f"{name}_"): slope for name, slope in _SHAPES.items()},
    torch.special.round: _identity,
}


class _Borrowed(nn.Module):
    """The logits of one model, with the gradients of another function."""

    def __init__(self, model: Classifier, slope: nn.Module) -> None:
        super().__init__()
        self.model, self.slope = model, slope

    def forward(self, x: Images) -> Logits:
        with torch.no_grad():
            value = self.model(x)
        return _borrow(value, self.slope(x))


class _StraightThrough(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Images) -> Logits:
        with straight_through():
            return self.model(x)


class _Smoothed(nn.Module):
    """Mean logits over shifted copies of the images: the same shifts for every image."""

    shifts: Tensor

    def __init__(self, model: Classifier, shifts: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("shifts", shifts)

    def forward(self, x: Images) -> Logits:
        total = self.model((x + self.shifts[0]).clamp(self.model.low, self.model.high))
        for shift in self.shifts[1:]:
            total = total + self.model((x + shift).clamp(self.model.low, self.model.high))
        return total / len(self.shifts)


class _Rescaled(nn.Module):
    """The logits in float64, divided by their usual margin."""

    def __init__(self, model: Classifier, scale: float) -> None:
        super().__init__()
        self.model, self.scale = _in_double(model), scale

    def forward(self, x: Images) -> Logits:
        return (_precise(self.model, x) / self.scale).to(x.dtype)


def _in_double(model: Classifier) -> Classifier:
    """A copy in float64, or the model itself where it cannot be copied."""
    try:
        return copy.deepcopy(model).double()
    except Exception:  # noqa: BLE001  whatever keeps a network from being copied, it can be attacked as it is
        return model


def _precise(model: Classifier, x: Images) -> Logits:
    where = next(model.parameters(), None)
    return model(x.double() if where is None else x.to(where.dtype)).double()


def through_rounding(model: Classifier) -> Classifier:
    """The model with gradients passed straight through rounding, sign and step functions."""
    return _like(model, _StraightThrough(model))


def smoothed(model: Classifier, threat: Threat, *, seed: int = 0) -> Classifier:
    """The model with gradients averaged over shifts of the images, as long as the budget at most."""
    where = next(model.parameters(), torch.zeros(()))
    like = torch.zeros((_PATTERNS, *model.shape), device=where.device, dtype=where.dtype)
    dims = math.prod(model.shape)
    width = {"linf": threat.budget, "l2": threat.budget * math.sqrt(3 / dims), "l1": 2 * threat.budget / dims}
    shifts = Draws(seed, torch.arange(_PATTERNS), ("smoothed",)).uniform(like, -1, 1) * width[threat.norm]
    sizes = torch.linspace(0.25, 1, _PATTERNS, device=where.device, dtype=where.dtype)
    shifts = shifts * sizes.view(-1, *(1,) * len(model.shape))
    return _like(model, _Borrowed(model, _Smoothed(model, shifts)))


def rescaled(model: Classifier, scale: float) -> Classifier:
    """The model in float64, with its logits divided by `scale`."""
    return _like(model, _Rescaled(model, max(scale, 1e-30)))


def borrowed(model: Classifier, surrogate: Classifier) -> Classifier:
    """The model with the gradients of another one."""
    return _like(model, _Borrowed(model, surrogate))


def surrogate(model: Classifier, x: Images, *, width: float, seed: int = 0, batch_size: int = 64) -> Classifier:
    """Train a small convolutional network, in seconds, to answer like the model on images and noisy copies of them.

    Args:
        model: Frozen classifier; only its logits are asked for.
        x: Images in the box, on the model's device.
        width: Largest noise per pixel.
        seed: Seed of weights, order and noise.
        batch_size: Images per pass of the model.

    Source:
        Papernot et al. 2017, arXiv:1602.02697, with noise in place of Jacobian steps.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _small(model.shape, model.num_classes)
    student = _like(model, net.to(device=x.device, dtype=x.dtype))
    with torch.no_grad():
        margin = _logits(model, x, batch_size).topk(2, dim=1).values
        scale = 4 / float((margin[:, 0] - margin[:, 1]).median().clamp_min(1e-12))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(_STEPS):
        some = torch.randint(len(x), (_BATCH,), generator=generator).to(x.device)
        noise = (2 * torch.rand((_BATCH, *model.shape), generator=generator) - 1).to(x)
        sizes = torch.rand((_BATCH, *(1,) * len(model.shape)), generator=generator).to(x)
        image = (x[some] + width * sizes * noise).clamp(model.low, model.high)
        with torch.no_grad():
            answer = (_logits(model, image, batch_size) * scale).softmax(1)
        with torch.enable_grad():
            loss = cross_entropy(student(image), answer)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    return student.eval().requires_grad_(False)


def agreement(model: Classifier, student: Classifier, x: Images, *, batch_size: int = 64) -> float:
    """Share of the images on which both give the same class."""
    with torch.no_grad():
        return float(
            (_logits(model, x, batch_size).argmax(1) == _logits(student, x, batch_size).argmax(1)).double().mean()
        )


def usual_margin(model: Classifier, x: Images, *, batch_size: int = 64) -> float:
    """Median distance of the largest logit from the second."""
    with torch.no_grad():
        z = _logits(model, x, batch_size)
    return float(lead(z, z.argmax(1)).median())


def _logits(model: Classifier, x: Images, batch_size: int) -> Logits:
    return torch.cat([model(part) for part in x.split(batch_size)])


def _small(shape: tuple[int, ...], classes: int) -> nn.Module:
    axes = len(shape) - 1
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1]
    stride = max(1, math.ceil(max(shape[1:]) / 16))
    size = tuple(min(n, 6) for n in shape[1:])
    return nn.Sequential(
        *(conv(shape[0], 16, stride + 2, stride=stride, padding=1 + stride // 2), nn.ReLU()),
        *(conv(16, 32, 3, padding=1), nn.ReLU(), pool(size), nn.Flatten()),
        *(nn.Linear(32 * math.prod(size), 64), nn.ReLU(), nn.Linear(64, classes)),
    )


def _like(model: Classifier, net: nn.Module) -> Classifier:
    return Classifier(
        net,
        shape=model.shape,
        num_classes=model.num_classes,
        class_names=model.class_names,
        low=model.low,
        high=model.high,
    )
