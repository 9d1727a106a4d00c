"""Adversarial weight perturbation: take the loss where small changes of the weights make it larger."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rempart.core.repro import Draws
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Loss, Objective


def awp(objective: Objective, gamma: float, warmup: float = 0.0) -> Objective:
    """The same objective with its loss and gradient taken at perturbed weights w + gamma * |w| * g / |g|.

    g is the gradient of the loss at w, taken for each tensor of more than one dimension by itself; biases and the
    scales of batch norm stay as they are. The step of the optimiser then starts from w. Images are crafted once, with
    the weights as they are. Both evaluations see the same draws, those of dropout included; only the second, whose
    parts are reported, updates the statistics of batch norm.

    Nothing is written into the model: the perturbed weights take the place of its parameters for the time of the
    loss, which therefore must not change their `requires_grad`. With several processes, each perturbs by the gradient
    of its own share of the batch.

    Args:
        objective: What to wrap; anything whose loss depends on the weights, losses of gradients included.
        gamma: Length of the perturbation as a share of |w|; 0 gives the objective itself. 0.01 was published for
            adversarial training, 0.005 for TRADES.
        warmup: Share of the training, in [0, 1], before the weights are perturbed.

    Source:
        Wu et al. 2020, arXiv:2004.05884, and the authors' code. Differs in applying
        weight decay to w, not to the perturbed weights, and in choosing tensors by their dimensions alone, not also by
        name.
    """
    if gamma == 0:
        return objective

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        def inner(model: nn.Module) -> Loss:
            return objective.loss(model, x, x_adv, y, rng=rng, progress=progress)

        slots = _slots(model, nn.Module.named_parameters)
        weights = {slot: w for slot, w in slots.items() if w.requires_grad and w.ndim > 1}
        if progress < warmup or not weights:
            return inner(model)
        buffers = {slot: buffer.clone() for slot, buffer in _slots(model, nn.Module.named_buffers).items()}
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            value = _with(model, buffers, inner).value
            slopes = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
        moved = {
            slot: w + _along(w.detach(), slope, gamma) for (slot, w), slope in zip(weights.items(), slopes, strict=True)
        }
        return _with(model, moved, inner)

    return replace(objective, loss=loss)


def _along(w: Tensor, slope: Tensor, gamma: float) -> Tensor:
    return gamma * w.norm() / (slope.norm() + 1e-20) * slope


def _slots(model: nn.Module, named: Callable[..., Iterable[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    """Every place of `_Inner` that holds a tensor, once: models may share tensors, wrappers name modules twice."""
    return {
        f"{path}.{name}": tensor
        for path, module in model.named_modules(prefix="model")
        for name, tensor in named(module, recurse=False, remove_duplicate=False)
    }


def _with(model: nn.Module, tensors: dict[str, Tensor], inner: Callable[[nn.Module], Loss]) -> Loss:
    """`inner` of the model with these tensors in the places named."""
    return functional_call(_Inner(model, inner), tensors, (), tie_weights=False)


class _Inner(nn.Module):
    """What `functional_call` needs: a module whose forward pass is the loss."""

    def __init__(self, model: nn.Module, inner: Callable[[nn.Module], Loss]) -> None:
        super().__init__()
        self.model, self.inner = model, inner

    def forward(self) -> Loss:
        return self.inner(self.model)
