"""Images as PNG in text, for reports that are one file."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """An image, what an attack added and what came of it, as base64 PNG.

    Attributes:
        original: The image.
        perturbation: The difference around mid-grey, enlarged until the largest change is black or white.
        adversarial: The other image.
        amplification: Factor by which the perturbation is enlarged.
    """

    original: str
    perturbation: str
    adversarial: str
    amplification: float


def pair(x: Tensor, z: Tensor, low: float, high: float, window: tuple[float, float] | None = None) -> Pair:
    """Picture an image (c, *s) and its adversarial counterpart in the box [low, high].

    Images are shown with the ends of the `window` as black and white: those of the box, where none is given.
    """
    change, span = z - x, high - low
    black, white = window or (low, high)
    peak = change.abs().max()
    factor = float(span / 2 / peak) if peak > 0 else 1.0
    return Pair(
        original=png((x - black) / (white - black)),
        perturbation=png(0.5 + change * factor / span),
        adversarial=png((z - black) / (white - black)),
        amplification=factor,
    )


def png(image: Tensor) -> str:
    """An image (c, h, w) of values in [0, 1], or the middle slice of a volume, as base64 PNG; 3 channels are colour."""
    while image.ndim > 3:
        image = image[:, image.shape[1] // 2]
    if image.ndim == 2:
        image = image[:, None]
    pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(np.moveaxis(pixels, 0, -1) if len(pixels) == 3 else pixels[0])
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
