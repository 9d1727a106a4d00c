"""How far the activations of an image lie from those of every class, in units of their spread."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from rempart.core.model import Classifier
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels, Scores
from rempart.detectors.activations import Layers, activations, chosen, collected, enough
from rempart.detectors.catalogue import Detector, Learning, State, detectors
from rempart.detectors.combine import Combine, combined, held_out, weighed


@detectors.register("mahalanobis", None)
def mahalanobis(*, layers: Layers = "all", nu: Annotated[Pixels, Ge(0)] = 0.0, combine: Combine = "sum") -> Detector:
    """The Mahalanobis distance of the activations to the nearest class, over several layers.

    Of a layer: d = min over c of (f - mu_c)^T P (f - mu_c) / 2, with f the activations (feature maps by their mean
    over space), mu_c the mean of class c and P the inverse of one covariance for all classes. Before a layer is read,
    the image may be moved to where it looks more ordinary: x - nu sign(gradient of d). The score is the sum of
    z-scores of all layers, or their log-odds by logistic regression.

    Args:
        layers: The outputs of all blocks and what the last layer is fed with, or the latter alone.
        nu: Length of that move in pixel units; costs one pass per layer. The attacker's gradient takes it as constant.
        combine: `logistic` learns from attacks.

    Raises:
        DataError: When fitted, if a class has no image.

    Source:
        Lee, Lee, Lee, Shin 2018, arXiv:1807.03888, and the authors' code. Ours differs: three fourths of the images
        give means and covariance, the rest the weights of the layers; z-scores where no attack is given; the logistic
        regression has no cross-validation; the covariance gets a ridge of 1e-6 times its mean variance; nu is 0 unless
        set, where the authors choose among 0 and 0.0005 to 0.01 by the AUROC on attacks.
    """

    def measures(model: Classifier, x: Images, state: State) -> Tensor:
        names = chosen(model, layers)

        def of(images: Images) -> list[Scores]:
            found, _ = activations(model, images, names)
            return [_distance(f, state[f"whiten.{i}"], state[f"means.{i}"]) for i, f in enumerate(found)]

        if nu == 0:
            return torch.stack(of(x), 1)
        start = x.detach().requires_grad_()
        with torch.enable_grad():
            first = of(start)
            slopes = [torch.autograd.grad(d.sum(), start, retain_graph=True)[0] for d in first]
        return torch.stack([of(x - nu * slope.sign())[i] for i, slope in enumerate(slopes)], 1)

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        held = held_out(rng)
        y = learning.y[~held]
        enough(model, y, 1)
        state: State = {}
        for i, f in enumerate(collected(model, learning.x[~held], chosen(model, layers))):
            state[f"whiten.{i}"], state[f"means.{i}"] = _gaussians(f, y.to(f.device), model.num_classes)
        weights = weighed(model, lambda x, _: measures(model, x, state), learning, held, combine, rng=rng)
        return {**state, **weights}

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        return combined(measures(model, x, state), state)

    return Detector(fit=fit, score=score, learns_attacks=combine == "logistic")


def _gaussians(f: Tensor, y: Labels, classes: int) -> tuple[Tensor, Tensor]:
    """W with W^T W the precision, and the class means times W."""
    means = torch.stack([f[y == c].mean(0) for c in range(classes)])
    centred = f - means[y]
    covariance = centred.T @ centred / len(f)
    ridge = (1e-6 * covariance.trace() / len(covariance)).clamp_min(1e-12)
    root = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance)).to(f))
    whiten = torch.linalg.inv(root).contiguous()  # products round by how a matrix lies in memory
    return whiten, means @ whiten.T


def _distance(f: Tensor, whiten: Tensor, means: Tensor) -> Scores:
    return ((f @ whiten.T)[:, None] - means).square().sum(2).amin(1) / 2
