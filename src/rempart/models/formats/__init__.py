"""One file per form that a model can come in: each has a `load_*` function from its place to a `Classifier`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rempart.core.errors import ModelError
from rempart.data.files import MAX_VOXELS

FORMS = (
    "a directory that `rempart train` wrote, a Hugging Face folder, a .keras, .h5 or .hdf5 file of Keras, an "
    ".onnx file, a .pt2 file of torch.export, timm:NAME@FILE, torchvision:NAME@FILE, or python:package.module:factory"
)
PYTHON = "python:"
RECIPE = (
    "write a function that builds the network and fills it from a safetensors file, and give python:module:function"
)


def within_limits(shape: Sequence[int]) -> None:
    """Refuse a file that claims images, or outputs of a layer, too large to be held, before the network is run.

    Raises:
        ModelError: If it does.
    """
    if math.prod(shape) > MAX_VOXELS:
        expected = f"images, and outputs of layers, of at most {MAX_VOXELS:,} values (MAX_VOXELS)"
        raise ModelError(expected, got="x".join(map(str, shape)))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}
