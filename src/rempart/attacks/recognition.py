"""Whether a network returns logits or probabilities: what was stated, else its last operations and all its outputs."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Output, placed
from rempart.core.outputs import ending, tracked
from rempart.core.types import Images
from rempart.data import Batch, Data

_BATCH = 64
_NOISE = 8  # images
_SLACK = 1e-6  # of outputs that are shares, by rounding


@dataclass(slots=True)
class Seen:
    """What one pass over all images showed.

    Attributes:
        images: How many there were.
        darkest: Smallest pixel.
        brightest: Largest pixel.
        width: Outputs per image.
        lowest: Smallest output.
        highest: Largest output.
        unequal: How far the outputs of an image are from a sum of 1, at most.
    """

    images: int = 0
    darkest: float = float("inf")
    brightest: float = -float("inf")
    width: int = 1
    lowest: float = float("inf")
    highest: float = -float("inf")
    unequal: float = 0.0

    @property
    def shares(self) -> bool:
        """Whether every output lies in [0, 1]."""
        return self.lowest >= -_SLACK and self.highest <= 1 + _SLACK

    @property
    def add_up(self) -> bool:
        """Whether the outputs of every image are shares of 1."""
        return self.shares and self.width > 1 and self.unequal < 1e-3

    def add(self, outputs: Tensor) -> None:
        """Take in more outputs, one row per image."""
        if len(outputs):
            self.width = outputs.shape[1]
            self.lowest = min(self.lowest, float(outputs.min()))
            self.highest = max(self.highest, float(outputs.max()))
            self.unequal = max(self.unequal, float((outputs.sum(1) - 1).abs().max()))


def look(model: Classifier, data: Data, check: Callable[[Batch], object] = lambda batch: None) -> Seen:
    """Show all images to the network of a frozen classifier once, each batch after it was checked.

    Raises:
        ModelError: If the outputs of any image are not finite.
    """
    seen, bad = Seen(images=len(data)), list[int]()
    for batch in data.batches(_BATCH):
        check(batch)
        low, high = batch.x.aminmax()
        seen.darkest, seen.brightest = min(seen.darkest, float(low)), max(seen.brightest, float(high))
        outputs = _raw(model, placed(model, batch.x))
        finite = torch.isfinite(outputs).all(1)
        bad += batch.index[~finite.cpu()].tolist()
        seen.add(outputs[finite])
    if bad:
        raise ModelError(
            "finite outputs",
            got=f"NaN or infinity for {len(bad)} of {len(data)} clean images, the first of them sample {bad[0]}",
            hint="check the weights, the input range and that image",
        )
    return seen


@torch.no_grad()
def _raw(model: Classifier, x: Images) -> Tensor:
    """What the network returns, in float64: sums of many outputs are compared with 1."""
    return model.raw(x).double()


def recognised(model: Classifier, x: Images, seen: Seen) -> tuple[Classifier, str]:
    """Find probabilities where logits should be, and read them as the logits they were made of.

    Args:
        model: A frozen classifier. What it states about its outputs holds.
        x: Some of the images, in its device and dtype.
        seen: What all images showed.

    Returns:
        The classifier itself where it returns logits, else one with the same network that reads it as it is; and a
        sentence about it.

    Raises:
        ModelError: If the outputs could be logits as well as probabilities, or are not what was stated.
    """
    stated = model.output
    if stated not in (None, "logits") and not seen.shares:
        raise ModelError(
            f"{stated}, as the model was declared to return",
            got=f"outputs in [{seen.lowest:.3g}, {seen.highest:.3g}]",
            hint="declare logits instead (--outputs logits, or output='logits' in Python), or nothing",
        )
    kind = _kind(model, x, seen) if stated is None else stated
    if kind == "probabilities" and seen.width > 1 and not seen.add_up and ending(model.net, x[:2]) != "softmax":
        kind = "sigmoids"
    told = "" if stated is None else ", as was stated"
    if kind == "logits":
        return model, f"The outputs are logits, not probabilities{told}."
    mended = copy.copy(model)
    mended.output = kind
    with torch.no_grad(), tracked(len(x)) as found:
        raw = mended.raw(x)
    if found.logits(raw, len(x)) is not None:
        how = "its last activation was taken off, so that attacks see logits."
    else:
        how = "their logarithms are used. Where they saturate, gradients are lost."
    return mended, f"The network returned {kind}{told}; {how}"


def _kind(model: Classifier, x: Images, seen: Seen) -> Output:
    """What outputs are that nobody has named; numbers outside [0, 1], for whatever image, are no probabilities.

    Raises:
        ModelError: If they lie in [0, 1] for all images and noise, and neither their sum nor the network shows why.
    """
    if not seen.shares:
        return "logits"
    for probe in _probes(model, x):
        outputs = _raw(model, probe)
        seen.add(outputs[torch.isfinite(outputs).all(1)])
    if not seen.shares:
        return "logits"
    last = ending(model.net, x[:2])
    if seen.add_up or last == "softmax":
        return "probabilities"
    if last in ("sigmoid", "bounded"):
        return "probabilities" if seen.width == 1 else "sigmoids"
    if last == "linear":
        return "logits"
    number = "one output" if seen.width == 1 else f"{seen.width} outputs"
    raise ModelError(
        "outputs that can be recognised as logits or as probabilities",
        got=f"{number} in [{seen.lowest:.3g}, {seen.highest:.3g}] for all {seen.images} images and for noise, from a "
        "network whose last operation does not show which",
        hint="state it: --outputs logits or --outputs probabilities (in Python, output= of Classifier)",
    )


def _probes(model: Classifier, x: Images) -> Iterator[Images]:
    """Images turned into their negatives, noise, black and white: logits will leave [0, 1] somewhere."""
    yield model.low + model.high - x
    noise = torch.rand((_NOISE, *model.shape), generator=torch.Generator().manual_seed(0)).to(x)
    flat = torch.tensor([0.0, 1.0]).to(x).view(-1, *(1 for _ in model.shape)).expand(-1, *model.shape)
    yield model.low + (model.high - model.low) * torch.cat([noise, flat])
