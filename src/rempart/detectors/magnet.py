"""MagNet: how badly auto-encoders that know clean images alone restore an image, and how that changes its class."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional as F

from rempart.core.model import Classifier
from rempart.core.model import placed as on_model
from rempart.core.repro import Draws
from rempart.core.types import Images, Logits, Scores
from rempart.detectors.catalogue import Detector, Learning, State, detectors
from rempart.detectors.combine import held_out
from rempart.detectors.networks import convolutions, convolve, descend, placed

TEMPERATURES = (10.0, 40.0)
_DECAY = 1e-9
_BATCH = 32
_QUANTILE = 0.95


@detectors.register("magnet", None)
def magnet(
    *,
    width: Annotated[int, Ge(1)] = 8,
    noise: Annotated[float, Ge(0)] = 0.1,
    epochs: Annotated[int, Ge(1)] = 30,
    learning_rate: Annotated[float, Gt(0)] = 3e-3,
) -> Detector:
    """Compare an image with what auto-encoders trained on clean images make of it.

    Four measures: the mean of |x - A(x)|^2 for an auto-encoder A that halves the grid in the middle, the mean of
    |x - B(x)| for one, B, that does not, and the Jensen-Shannon divergence between softmax(f(x) / T) and
    softmax(f(A(x)) / T) for T = 10 and 40. Each is divided by its 95 % quantile on clean images set aside from the
    training of A and B (every fifth one); the score is the largest of the four.

    Args:
        width: Maps in the hidden layers of the auto-encoders.
        noise: Standard deviation of the normal noise that they learn to remove, in the width of the box.
        epochs: Passes over the clean images.
        learning_rate: First step length of Adam.

    Source:
        Meng & Chen 2017, arXiv:1705.09064, sections 4.2 and 5.2. Differs in: one threshold on the largest scaled
        measure, where the paper has one for each at a quantile of 0.001 or more and flags if any is passed; hidden
        layers of 8 maps and ReLU and an output without sigmoid, cut to the box, where the paper has 3 maps and
        sigmoids, so that 30 epochs instead of 100 suffice; all four measures on every kind of image, where the paper
        takes the errors on MNIST and the divergences on CIFAR-10. There is no reformer. An attacker who knows the
        auto-encoders gets past it (Carlini & Wagner 2017, arXiv:1711.08478).
    """

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        generator = torch.Generator().manual_seed(rng.seed % 2**63)
        x = ((learning.x - model.low) / (model.high - model.low)).float().cpu()
        aside = held_out(rng) if len(x) >= 4 else torch.ones(len(x), dtype=torch.bool)
        known = x[~aside] if len(x) >= 4 else x
        channels, axes = x.shape[1], x.ndim - 2
        state: State = {}
        for prefix, layers in (("pooled", 3), ("plain", 2)):
            widths = (channels, *[width] * layers, channels)
            first = convolutions(widths=widths, axes=axes, prefix=prefix, generator=generator)

            def loss(weights: State, rows: Tensor, prefix: str = prefix) -> Tensor:
                clean = known[rows]
                disturbed = (clean + noise * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
                return (_restored(weights, disturbed, prefix) - clean).square().mean()

            state |= descend(
                first,
                loss,
                len(known),
                epochs=epochs,
                generator=generator,
                batch_size=_BATCH,
                learning_rate=learning_rate,
                decay=_DECAY,
            )
        with torch.no_grad():
            seen = torch.cat([measures(model, part, state).cpu() for part in learning.x[aside].split(64)])
        return {**state, "unit": torch.quantile(seen.float(), _QUANTILE, dim=0).clamp_min(1e-12)}

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        seen = measures(model, x, state)
        return (seen / state["unit"].to(seen)).amax(1)

    return Detector(fit=fit, score=score)


def measures(model: Classifier, x: Images, state: State) -> Tensor:
    """The four measures that the score is the largest of, shape (n, 4)."""
    x = on_model(model, x)
    state = placed(state, x)
    unit = (x - model.low) / (model.high - model.low)
    pooled, plain = (_restored(state, unit, prefix).clamp(0, 1) for prefix in ("pooled", "plain"))
    errors = [(unit - pooled).square().flatten(1).mean(1), (unit - plain).abs().flatten(1).mean(1)]
    before, after = model(x), model(pooled * (model.high - model.low) + model.low)
    return torch.stack([*errors, *(divergence(before / t, after / t) for t in TEMPERATURES)], 1)


def divergence(first: Logits, second: Logits) -> Scores:
    """Jensen-Shannon divergence of two softmax distributions, in nats: 0 where they are the same, at most log 2."""
    p, q = first.log_softmax(1), second.log_softmax(1)
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0)).to(p)
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1)


def _restored(state: State, x: Images, prefix: str) -> Images:
    """What an auto-encoder makes of images in [0, 1]; `pooled` halves the grid before its second convolution."""
    h, size = convolve(state, x, prefix, 0).relu(), list(x.shape[2:])
    if prefix == "pooled":
        h = F.interpolate(h, size=[max(1, side // 2) for side in size], mode="area")
        h = convolve(state, h, prefix, 1).relu()
        h = F.interpolate(h, size=size, mode="nearest")
        h = convolve(state, h, prefix, 2).relu()
        return convolve(state, h, prefix, 3)
    h = convolve(state, h, prefix, 1).relu()
    return convolve(state, h, prefix, 2)
