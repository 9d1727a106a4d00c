"""Models small enough to know the answer: closed-form classifiers and the images that go with them.

Every toy takes the shape of one image (channels, then one to three spatial axes), a number of classes and a seed, works
in the box [0, 1] and draws nothing from the global random state. The affine toys (`linear`, `one_logit`, `squashed`,
`probabilities`, `constant`) have a known smallest perturbation: `radius`.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rempart.core.model import Classifier
from rempart.core.threat import Norm

SHAPES = ((1, 4, 4), (3, 4, 4), (1, 3, 6), (3, 5, 2), (1, 3, 4, 5), (2, 7))
"""Channels 1, 2 and 3; square, tall and wide; a volume and a signal."""
CLASSES = (2, 3, 4, 9, 10, 100)


def images(shape: Sequence[int], n: int = 8, seed: int = 0) -> Tensor:
    """n images close to mid-grey: 0.5 + u * 0.3 / sqrt(D), u uniform in [-1, 1], D the pixels of one image.

    The spread falls with D so that the logits of the affine toys, and with them their radii, do not grow with it.
    """
    u = 2 * torch.rand((n, *shape), generator=_generator(seed + 1000)) - 1
    return 0.5 + 0.3 / math.sqrt(math.prod(shape)) * u


def labels(model: Classifier, x: Tensor) -> Tensor:
    """The classes the model itself predicts (in inference mode), so that every image starts out correct."""
    mode = model.training
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    model.train(mode)
    return y


def radii(model: Classifier, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Exact distance of each image to the boundary between its class y and each class k, shape (n, K), float64.

    (z_y - z_k) / |w_y - w_k|_dual for z = W x + b, the dual of linf, l2, l1 being l1, l2, linf; inf for k = y, inf
    where the two rows of W are the same, 0 where k leads already. Exact while the box is not active: no norm lets a
    pixel move further than the radius, and `images` leaves every pixel more room than the radius of the nearest class,
    which is asserted. Squashing and softmax change nothing: they keep the order of the logits.
    """
    weight, bias = affine(model)
    rows = torch.arange(len(x))
    z = x.double().flatten(1) @ weight.T + bias
    gap = (z[rows, y][:, None] - z).clamp_min(0)
    order = {"linf": 1, "l2": 2, "l1": math.inf}[norm]
    size = torch.linalg.vector_norm(weight[y][:, None] - weight[None], order, dim=2)
    result = torch.where(size > 0, gap / size.clamp_min(1e-300), torch.inf)
    result[rows, y] = torch.inf
    nearest, room = result.amin(1), torch.minimum(x, 1 - x).flatten(1).amin(1).double()
    assert bool((nearest.isinf() | (nearest < room)).all()), "the box is active: the radius is only a lower bound"
    return result


def radius(model: Classifier, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
    """Exact smallest perturbation that changes the class, shape (n): the least of `radii`.

    The images of another class are the union of the half-spaces z_k >= z_y, so their distance is the least of the
    distances to each. For K > 2 and a given target it is only a lower bound.
    """
    return radii(model, x, y, norm).amin(1)


def affine(model: Classifier) -> tuple[Tensor, Tensor]:
    """W (K, D) and b (K) of an affine toy in float64; one logit s counts as the two logits (0, s)."""
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    if len(weight) == 1:
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    return weight, bias


def linear(shape: Sequence[int] = (1, 4, 4), classes: int = 3, seed: int = 0) -> Classifier:
    """z = W x + b with W standard normal and b = e - W 0.5, e normal of size 0.1: near a tie at mid-grey."""
    return Classifier(_affine(shape, classes, seed), shape=shape, num_classes=classes)


def one_logit(shape: Sequence[int] = (1, 4, 4), seed: int = 0) -> Classifier:
    """A binary net with a single output s = w x + b, which the classifier reads as z = (0, s)."""
    return Classifier(_affine(shape, 1, seed), shape=shape, num_classes=2)


def squashed(shape: Sequence[int] = (1, 4, 4), classes: int = 3, seed: int = 0) -> Classifier:
    """z = tanh(W x + b): curved, with the decisions and therefore the radii of `linear` with the same seed."""
    net = nn.Sequential(*_affine(shape, classes, seed), nn.Tanh())
    return Classifier(net, shape=shape, num_classes=classes)


def probabilities(shape: Sequence[int] = (1, 4, 4), classes: int = 3, seed: int = 0) -> Classifier:
    """p = softmax(W x + b), declared as probabilities: z = log p, the logits of `linear` up to a constant per image."""
    net = nn.Sequential(*_affine(shape, classes, seed), nn.Softmax(1))
    return Classifier(net, shape=shape, num_classes=classes, output="probabilities")


def one_probability(shape: Sequence[int] = (1, 4, 4), seed: int = 0) -> Classifier:
    """p = sigmoid(w x + b), declared as probabilities: z = (0, log p - log(1 - p)) = (0, w x + b)."""
    net = nn.Sequential(*_affine(shape, 1, seed), nn.Sigmoid())
    return Classifier(net, shape=shape, num_classes=2, output="probabilities")


def constant(shape: Sequence[int] = (1, 4, 4), classes: int = 3) -> Classifier:
    """z = (0, -1, ..., -(K - 1)) whatever the image: always class 0, gradient 0 everywhere, radius infinite."""
    net = _affine(shape, classes, 0)
    layer = net[1]
    with torch.no_grad():
        layer.weight.zero_()  # pyright: ignore
        layer.bias.copy_(-torch.arange(classes))  # pyright: ignore
    return Classifier(net, shape=shape, num_classes=classes)


def plateau() -> Classifier:
    """z = (0, relu(sum of (x - 0.5) - 0.2) - 0.05) on four pixels: class 0, and no gradient at mid-grey."""
    first, second = _layer(4, 1), _layer(1, 1)
    with torch.no_grad():
        for layer, weight, bias in ((first, 1, -2.2), (second, 1, -0.05)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    return Classifier(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second), shape=(1, 2, 2), num_classes=2)


def smooth(shape: Sequence[int] = (1, 4, 4), classes: int = 3, seed: int = 0, hidden: int = 16) -> Classifier:
    """z = A tanh(B (x - 0.5) * 2) with A and B normal (B of size 1/sqrt(D) * 2): smooth, no gradient is zero."""
    generator, dims = _generator(seed), math.prod(shape)
    first, second = _layer(dims, hidden), _layer(hidden, classes)
    with torch.no_grad():
        first.weight.copy_(4 * torch.randn((hidden, dims), generator=generator) / math.sqrt(dims))
        first.bias.copy_(-0.5 * first.weight.sum(1))
        second.weight.copy_(torch.randn((classes, hidden), generator=generator))
        second.bias.zero_()
    return Classifier(nn.Sequential(nn.Flatten(), first, nn.Tanh(), second), shape=shape, num_classes=classes)


def conv(shape: Sequence[int] = (1, 4, 4), classes: int = 3, seed: int = 0, width: int = 8) -> Classifier:
    """Conv 3 - batch norm - ReLU, twice, the mean over space, then a linear layer; for 1, 2 and 3 spatial axes.

    The running means and variances are those of `images` disturbed at random, the scales and shifts random too, so that
    a batch norm left in training mode, forgotten or folded wrongly changes the logits. The last bias makes all logits 0
    at mid-grey, so that the classes of `images` vary. In inference mode.
    """
    axes = len(shape) - 1
    make_conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    make_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for channels in (shape[0], width):
            layers += [make_conv(channels, width, 3, padding=1), make_norm(width), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Flatten(2), _SpaceMean(), nn.Linear(width, classes))
        norms = [layer for layer in layers if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias, 0.0, 0.3)
            norm.momentum = 1.0
        with torch.no_grad():
            net.train()(images(shape, 64, seed))
            for norm in norms:
                norm.running_mean += 0.5 * norm.running_var.sqrt() * torch.randn(width)  # pyright: ignore
                norm.running_var *= 0.5 + 1.5 * torch.rand(width)  # pyright: ignore
                norm.momentum = 0.1
            net[-1].bias -= net.eval()(torch.full((1, *shape), 0.5))[0]
    return Classifier(net, shape=shape, num_classes=classes).eval()


def two_layers() -> nn.Sequential:
    """relu of the maps x and 1.5 - x of two pixels; relu of the sum of all four less 3, and of twice the first; z = 0.

    By hand: (1, 2) has the maps (1, 2), (0.5, 0) and the dense outputs 0.5, 2; (0, 1) has (0, 1), (1.5, 0.5) and 0, 0.
    """
    first, second, last = nn.utils.skip_init(nn.Conv2d, 1, 2, 1), _layer(4, 2), _layer(2, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        first.bias.copy_(torch.tensor([0.0, 1.5]))  # pyright: ignore
        second.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]]))
        second.bias.copy_(torch.tensor([-3.0, 0.0]))
        for parameter in last.parameters():
            parameter.zero_()
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), second, nn.ReLU(), last)


def dropout(shape: Sequence[int] = (1, 4, 4), classes: int = 3, seed: int = 0) -> Classifier:
    """`linear` behind dropout with p = 0.5, left in training mode: deterministic, and `linear`, only when frozen."""
    net = nn.Sequential(nn.Dropout(0.5), *_affine(shape, classes, seed))
    return Classifier(net, shape=shape, num_classes=classes).train()


def raising(model: Classifier, on_call: int) -> Classifier:
    """The same net, which raises RuntimeError("planted") on the given forward call; the first call is number 1."""
    return _around(model, _Raising(model.net, on_call))


def equidistant(model: Classifier, norm: Norm, n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """n images in the dtype of an affine toy, their classes, and their common radius in `norm`.

    All K logits tie at some point m (the one nearest to mid-grey is taken; K - 1 <= D), so that moving an image towards
    m scales its gaps and its radius by the same factor and leaves its class alone.
    """
    weight, bias = affine(model)
    slopes, offsets = weight[1:] - weight[0], bias[1:] - bias[0]
    middle = torch.full((weight.shape[1],), 0.5).double()
    tie = (middle - torch.linalg.pinv(slopes) @ (slopes @ middle + offsets)).view(model.shape)
    x = images(model.shape, 4 * n, seed).to(weight.dtype)
    y = (x.flatten(1) @ weight.T + bias).argmax(1)
    far = radius(model, x, y, norm).argsort(descending=True)[:n]
    x, y = x[far], y[far]
    size = radius(model, x, y, norm)
    x = (tie + (x - tie) * (size[-1] / size).view(-1, *(1,) * (x.ndim - 1))).to(next(model.parameters()).dtype)
    return x, y, float(radius(model, x, y, norm).mean())


def rescaled(model: Classifier, factor: float = 1.0, shift: float = 0.0) -> Classifier:
    """An affine toy with the logits factor * z + shift: the same decisions and radii, rounding apart."""
    model = copy.deepcopy(model)
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight.mul_(factor)
        layer.bias.mul_(factor).add_(shift)
    return model


def opaque(model: Classifier) -> Classifier:
    """The same function with the same net, which cannot be traced, so that attacks search on it and on no copy."""
    return _around(model, _Opaque(model.net))


def samplewise(model: Classifier) -> Classifier:
    """The same function, images one by one: same bits of logits and gradients whatever the batch. Opaque too."""
    return _around(model, _Samplewise(model.net))


class _SpaceMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


class _Raising(nn.Module):
    def __init__(self, net: nn.Module, on_call: int) -> None:
        super().__init__()
        self.net, self.on_call, self.calls = net, on_call, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.on_call:
            raise RuntimeError("planted")
        return self.net(x)


class _Opaque(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        assert bool(x.isfinite().all())  # a decision on values, which torch.fx cannot follow
        return self.net(x)


class _Samplewise(_Opaque):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(one) for one in x.split(1)]) if bool(x.isfinite().all()) else x


def _around(model: Classifier, net: nn.Module) -> Classifier:
    output: Any = model.output  # torch reads attributes as `str`
    return Classifier(net, shape=model.shape, num_classes=model.num_classes, output=output).train(model.training)


def _affine(shape: Sequence[int], outputs: int, seed: int) -> nn.Sequential:
    dims, generator = math.prod(shape), _generator(seed)
    layer = _layer(dims, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn((outputs, dims), generator=generator))
        layer.bias.copy_(0.1 * torch.randn((outputs,), generator=generator) - 0.5 * layer.weight.sum(1))
    return nn.Sequential(nn.Flatten(), layer)


def _layer(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose first weights are not drawn from the global random state."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs)  # pyright: ignore[reportReturnType]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
