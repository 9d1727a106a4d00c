"""What a network takes for images in [0, 1], and what its outputs are, where the model does not say so."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Normalize
from rempart.core.types import Images
from rempart.report.schema import AS_IT_IS, Reading

_NUMBER = r"[-+]?[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})")
_MOMENTS = re.compile(rf"mean=({_NUMBER}(?:,{_NUMBER})*),std=({_NUMBER}(?:,{_NUMBER})*)")
_BOXES = "0:255, -1:1, mean=0.449,std=0.226 or per-image"


class Span(nn.Module):
    """Images in [0, 1] to [low, high]."""

    low: Tensor
    width: Tensor

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("width", torch.tensor(high - low))

    def forward(self, x: Images) -> Images:
        """Stretch pixels."""
        return x * self.width + self.low


class PerImage(nn.Module):
    """(x - mean) / sqrt(variance + 1e-8) of each image on its own, over all pixels and channels."""

    def forward(self, x: Images) -> Images:
        """Standardise each image; one of a single colour becomes 0."""
        flat = x.flatten(1)
        shape = (-1,) + (1,) * (x.ndim - 1)
        scale = (flat.var(1, correction=0) + 1e-8).sqrt()
        return (x - flat.mean(1).view(shape)) / scale.view(shape)


def read_as(model: Classifier, reading: Reading) -> Classifier:
    """The classifier of images in [0, 1] whose network gets them as `reading` says; the network is shared.

    Raises:
        ModelError: If the box is none, does not fit the channels, or the model has a box of its own; if there are not
            as many different names as outputs; or if the model says that it returns something else.
    """
    if reading == AS_IT_IS:
        return model
    names = reading.classes or model.class_names
    if len(set(names)) != model.num_classes:
        raise ModelError(f"{model.num_classes} different class names", got=", ".join(names))
    told = reading.outputs
    if told and not model.notes and model.output not in (None, told) and "logits" in (told, model.output):
        hint = "leave it out, or correct output= in the code of the model"
        raise ModelError(f"--outputs {model.output}, as the model itself says", got=told, hint=hint)
    net, notes = model.net, model.notes
    if reading.box != AS_IT_IS.box:
        if (model.low, model.high) != (0, 1):
            raise ModelError("a model of images in [0, 1] for --box", got=f"one of [{model.low:g}, {model.high:g}]")
        box = _layer(reading.box, model.shape[0])
        net = nn.Sequential(box, net)
        for module in (net, box):
            module.training = model.training  # one by one: `train()` would change the network's own modes
        notes = (*notes, f"Its network gets images in [0, 1] as {reading.box}.")
    read = Classifier(
        net,
        shape=model.shape,
        num_classes=model.num_classes,
        class_names=names,
        low=model.low,
        high=model.high,
        output=model.output or told,
        notes=notes,
    )
    read.training = model.training
    return read


def _layer(box: str, channels: int) -> nn.Module:
    if box == "per-image":
        return PerImage()
    if found := _RANGE.fullmatch(box):
        low, high = map(float, found.groups())
        if low < high < math.inf:
            return Span(low, high)
    if found := _MOMENTS.fullmatch(box):
        mean, std = (_each([float(number) for number in text.split(",")], channels, box) for text in found.groups())
        if min(std) > 0:
            return Normalize(mean, std)
    raise ModelError(f"a box such as {_BOXES}", got=repr(box))


def _each(values: Sequence[float], channels: int, box: str) -> list[float]:
    """One value for each channel."""
    if len(values) not in (1, channels):
        raise ModelError(f"one value, or one for each of {channels} channels", got=repr(box))
    return [*values] * channels if len(values) == 1 else [*values]
