"""How dense training images lie around an image, and how sure the network is without some of its neurons."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels, Scores
from rempart.detectors.activations import activations, by_class, chosen, collected, distances, enough
from rempart.detectors.catalogue import Detector, Learning, State, detectors
from rempart.detectors.combine import Combine, combined, held_out, weighed

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PROBE = 1000  # held-out images that choose the bandwidth


@detectors.register("kernel-density", None)
def kernel_density(
    *,
    bandwidth: Annotated[float, Gt(0)] | None = None,
    passes: Annotated[int, Ge(2)] | None = 50,
    combine: Combine = "sum",
) -> Detector:
    """The density of the predicted class around an image, with the uncertainty under dropout where there is any.

    Density: minus the logarithm of a Gaussian kernel estimate from the training images of the predicted class, on what
    the last layer is fed with. Uncertainty: the variance of each probability over passes with dropout at work, mean
    over the classes; measured in networks with modules of dropout alone. The score is the sum of both z-scores, or
    their log-odds by logistic regression. The masks of an image are fixed by seed and sample number.

    Args:
        bandwidth: Standard deviation of the kernel. None takes the likeliest one for held-out images; the authors have
            1.2 for MNIST, 0.26 for CIFAR-10 and 1 for SVHN, with their networks.
        passes: Passes with dropout; none leaves uncertainty out.
        combine: `logistic` learns from attacks.

    Raises:
        DataError: When fitted, if a class has fewer than two images.

    Source:
        Feinman, Curtin, Shintre, Gardner 2017, arXiv:1703.00410, and the authors' code: kernel, classes, 50 passes,
        logistic regression of z-scores. Ours differs: a sum of z-scores where no attack is given; the bandwidth is
        chosen out of 21 between a tenth and ten times the median distance to the nearest neighbour; a fourth of the
        images is set aside for it and for the weights.
    """

    def measures(model: Classifier, x: Images, state: State, rng: Draws) -> Tensor:
        (f,), predicted = activations(model, x, chosen(model, "last"))
        columns = [-log_density(f, predicted, state["references"], state["labels"], float(state["bandwidth"]))]
        if passes is not None and dropouts(model):
            columns.append(uncertainty(model, x, passes, rng))
        return torch.stack(columns, 1)

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        held = held_out(rng)
        y = learning.y[~held]
        enough(model, y, 2)
        names = chosen(model, "last")
        (f,) = collected(model, learning.x[~held], names)
        state = {"references": f, "labels": y.to(f.device)}
        if bandwidth is None:
            (probe,) = collected(model, learning.x[held][:_PROBE], names)
            truth = learning.y[held][:_PROBE].to(f.device)
            state["bandwidth"] = _likeliest(probe, truth, f, state["labels"])
        else:
            state["bandwidth"] = torch.tensor(bandwidth, dtype=torch.float64)
        weights = weighed(model, lambda x, draws: measures(model, x, state, draws), learning, held, combine, rng=rng)
        return {**state, **weights}

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        return combined(measures(model, x, state, rng), state)

    return Detector(fit=fit, score=score, learns_attacks=combine == "logistic", random=passes is not None)


def log_density(f: Tensor, classes: Labels, references: Tensor, labels: Labels, h: float) -> Tensor:
    """Logarithm of the kernel estimate from the references of a row's class."""
    constant = f.shape[1] * math.log(h * math.sqrt(2 * math.pi))

    def of_class(c: int, rows: Tensor) -> Tensor:
        own = references[labels == c]
        exponents = -distances(f[rows], own).square() / (2 * h**2)
        return exponents.logsumexp(1) - math.log(len(own)) - constant

    return by_class(classes, of_class)


def uncertainty(model: Classifier, x: Images, passes: int, rng: Draws) -> Scores:
    """Variance of the probabilities over passes with dropout, mean over the classes."""
    found: list[Tensor] = []
    for i in range(passes):
        with dropping(model, rng.at("dropout", i)):
            found.append(model(x).double().softmax(1))
    return torch.stack(found).var(0, correction=0).mean(1)


def dropouts(model: nn.Module) -> dict[str, float]:
    """Modules of dropout that drop some of their inputs but not all, and their chance to."""
    return {name: m.p for name, m in model.named_modules() if isinstance(m, _DROPOUTS) and 0 < m.p < 1}


@contextmanager
def dropping(model: nn.Module, rng: Draws) -> Generator[None]:
    """Let the modules of dropout work in inference mode, with masks from `rng`; whole feature maps where they do so."""

    def hook(name: str, p: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            whole = not isinstance(module, nn.Dropout)
            like = output[(slice(None), slice(None), *[slice(1)] * (output.ndim - 2))] if whole else output
            return output * (rng.at(name).uniform(like) >= p) / (1 - p)

        return drop

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook(name, p)) for name, p in dropouts(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _likeliest(probe: Tensor, truth: Labels, references: Tensor, labels: Labels) -> Tensor:
    """The bandwidth under which held-out images of the same classes are likeliest."""
    nearest = by_class(truth, lambda c, rows: distances(probe[rows], references[labels == c]).amin(1))
    grid = float(nearest.median().clamp_min(1e-6)) * torch.logspace(-1, 1, 21, dtype=torch.float64)
    likelihoods = [log_density(probe, truth, references, labels, float(h)).mean() for h in grid]
    return grid[int(torch.stack(likelihoods).argmax())]
