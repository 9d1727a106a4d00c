"""A deployment for tests: an application on a fresh data directory, and things to bring to it."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from rempart.core.model import Classifier
from rempart.models.save import save
from rempart.models.zoo import build

SHAPE, CLASSES, OPTIONS = (1, 8, 8), ("cat", "dog", "hare"), {"first": 12, "second": 6}


def network(seed: int = 0) -> Classifier:
    """A small network with weights by chance."""
    return build("mlp", shape=SHAPE, num_classes=3, class_names=CLASSES, options=OPTIONS, seed=seed).eval()


def model_zip(folder: Path, seed: int = 0) -> bytes:
    """The network as a zip of the folder that `save` writes."""
    save(network(seed), folder, name="mlp", options=OPTIONS)
    return zipped({path.name: path.read_bytes() for path in folder.iterdir()})


def zipped(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def pixels(number: int) -> np.ndarray:
    """Image `number` of the data set: uint8, 8x8."""
    return np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(number)).save(stream, format="PNG")
    return stream.getvalue()


def data_zip() -> bytes:
    """Five images a class, one split."""
    return zipped({f"{name}/{5 * k + i}.png": picture(5 * k + i) for k, name in enumerate(CLASSES) for i in range(5)})
