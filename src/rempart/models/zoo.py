"""Small classifiers for any image shape and number of classes: published layouts, and one for grey medical images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Normalize
from rempart.core.registry import Registry
from rempart.models.formats.keras import KERAS, keras_network

Shape = tuple[int, ...]
Width = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Lt(1)]


models: Registry[Callable[..., nn.Module], None] = Registry(
    "model", reserved=frozenset({"shape", "num_classes"}), group="rempart.models"
)
"""`model(shape=..., num_classes=..., own options)` gives a network from normalised images to logits."""


def build(
    name: str,
    *,
    shape: Sequence[int],
    num_classes: int,
    class_names: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Classifier:
    """Build a registered network behind its normalisation; its first weights depend on the seed alone.

    Args:
        name: A name from `models`, or `keras` for the network that a Keras description in `options` stands for.
        shape: Channels, height, width.
        num_classes: K >= 2.
        class_names: One name per class.
        options: Options of the network that differ from its defaults.
        mean: Mean of each channel over the training data, in [0, 1]. Default 0.
        std: Standard deviation of each channel, positive. Default 1.
        seed: Seed of the weights; the global random state is left as it was.

    Returns:
        A classifier of images in [0, 1].

    Raises:
        ModelError: If the network cannot take images of this shape.
        SpecError: If the name or an option is unknown.
    """
    shape = tuple(shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ModelError("an image shape (channels, height, width)", got=shape)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if name == KERAS:
            net = keras_network(options or {})
        else:
            entry = models[name]
            net = entry.function(shape=shape, num_classes=num_classes, **entry.parse(options or {}))
    channels = shape[0]
    scale = Normalize([0.0] * channels if mean is None else mean, [1.0] * channels if std is None else std)
    return Classifier(nn.Sequential(scale, net), shape=shape, num_classes=num_classes, class_names=class_names)


@models.register("mlp", None)
def mlp(*, shape: Shape, num_classes: int, first: Width = 500, second: Width = 150) -> nn.Module:
    """Two hidden layers: 784-500-150-10 on MNIST.

    Source:
        The MNIST network of Yan, Guo, Zhang 2018, arXiv:1803.00404.
    """
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, num_classes),
    )


@models.register("lenet", None)
def lenet(*, shape: Shape, num_classes: int) -> nn.Module:
    """Two 5x5 convolutions without ReLU, each with max pooling, and two dense layers.

    Images under 16 pixels a side are padded by 2 before each convolution, since nothing of them would be left.

    Source:
        The MNIST LeNet of Yan, Guo, Zhang 2018, arXiv:1803.00404, after MatConvNet; equal to it on 28x28.
    """
    height, width = _sides(shape, 4)
    padding = 0 if min(height, width) >= 16 else 2
    shrink = 4 - 2 * padding

    def left(side: int) -> int:
        return ((side - shrink) // 2 - shrink) // 2

    return nn.Sequential(
        nn.Conv2d(shape[0], 20, 5, padding=padding),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5, padding=padding),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * left(height) * left(width), 500),
        nn.ReLU(),
        nn.Linear(500, num_classes),
    )


@models.register("convnet", None)
def convnet(*, shape: Shape, num_classes: int) -> nn.Module:
    """Three 5x5 convolutions with pooling, then a 4x4 and a 1x1 convolution.

    Other sizes than 32x32 are brought to the 4x4 grid of the fourth convolution by average pooling.

    Source:
        The CIFAR-10 ConvNet of Yan, Guo, Zhang 2018, arXiv:1803.00404; equal to it on 32x32.
    """
    _sides(shape, 8)
    return nn.Sequential(
        nn.Conv2d(shape[0], 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(4),
        nn.Conv2d(64, 64, 4),
        nn.ReLU(),
        nn.Conv2d(64, num_classes, 1),
        nn.Flatten(),
    )


@models.register("nin", None)
def nin(*, shape: Shape, num_classes: int, dropout: Share = 0.5) -> nn.Module:
    """Network in network: each large convolution is followed by two 1x1 convolutions.

    The last pooling is global, so other sizes than 32x32 work too.

    Source:
        Lin, Chen, Yan 2014, arXiv:1312.4400, with the pooling of Yan, Guo, Zhang 2018, arXiv:1803.00404.
    """
    _sides(shape, 4)
    return nn.Sequential(
        *_mlpconv(shape[0], 192, 160, 96, kernel=5),
        nn.MaxPool2d(2),
        nn.Dropout(dropout),
        *_mlpconv(96, 192, 192, 192, kernel=5),
        nn.AvgPool2d(2),
        nn.Dropout(dropout),
        *_mlpconv(192, 192, 192, num_classes, kernel=3)[:-1],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@models.register("resnet18", None)
def resnet18(*, shape: Shape, num_classes: int, width: Width = 64) -> nn.Module:
    """The 18-layer residual network in its form for small images: 3x3 stem, no first pooling.

    Source:
        He et al. 2016, arXiv:1512.03385, with the stem that the CIFAR literature gives it and 1x1 convolutions where
        a block changes size.
    """
    stages = [
        nn.Sequential(_Residual(width * before, width * after, stride), _Residual(width * after, width * after, 1))
        for before, after, stride in ((1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2))
    ]
    return nn.Sequential(
        _conv(shape[0], width),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )


@models.register("mri-cnn", None)
def mri_cnn(*, shape: Shape, num_classes: int, width: Width = 16) -> nn.Module:
    """Four convolutions with batch norm for grey medical images around 128x128, quick on a CPU.

    The first convolution strides, every stage halves the grid, and the last grid is averaged: 98 thousand weights
    and 16 million multiplications for an image of 128x128.
    """
    _sides(shape, 16)
    return nn.Sequential(
        _conv(shape[0], width, kernel=5, stride=2),
        nn.MaxPool2d(2),
        _conv(width, 2 * width),
        nn.MaxPool2d(2),
        _conv(2 * width, 4 * width),
        nn.MaxPool2d(2),
        _conv(4 * width, 8 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, num_classes),
    )


class _Residual(nn.Module):
    """relu(two convolutions + shortcut)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(before, after, stride=stride)
        self.second = _conv(after, after)[:2]
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else _conv(before, after, kernel=1, stride=stride)[:2]
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


def _conv(before: int, after: int, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU: side by side, so that `accelerated` can fold them."""
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


def _mlpconv(before: int, first: int, second: int, third: int, *, kernel: int) -> list[nn.Module]:
    return [
        nn.Conv2d(before, first, kernel, padding=kernel // 2),
        nn.ReLU(),
        nn.Conv2d(first, second, 1),
        nn.ReLU(),
        nn.Conv2d(second, third, 1),
        nn.ReLU(),
    ]


def _sides(shape: Shape, least: int) -> tuple[int, int]:
    _, height, width = shape
    if min(height, width) < least:
        raise ModelError(
            f"images of at least {least} pixels a side", got=f"{height}x{width}", hint="choose the model mlp"
        )
    return height, width
