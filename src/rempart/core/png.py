"""Images as PNG in text, for reports that are one file."""

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor


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
