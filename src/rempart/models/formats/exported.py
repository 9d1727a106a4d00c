"""A `.pt2` file of torch.export: opened only where torch would unpickle nothing but tensors."""

import io
import json
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rempart.core.errors import ModelError
from rempart.core.model import Classifier
from rempart.models.formats import RECIPE


def load_exported(path: Path) -> Classifier:
    """A program for images in [0, 1], exported with a dynamic batch size; torch evaluates expressions in the file.

    Raises:
        ModelError: If the archive holds pickled objects, or no such program.
    """
    content = path.read_bytes()
    _refuse_hidden_pickle(content, path)
    try:
        program = torch.export.load(io.BytesIO(content))
    except (RuntimeError, AssertionError, KeyError, ValueError, TypeError, AttributeError) as error:
        line = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            "a program of this version of torch.export", got=f"{path.name} ({type(error).__name__}: {line})"
        ) from error
    shapes: dict[str, Any] = {
        node.name: node.meta["val"].shape for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)
    }
    inputs = [shapes.get(str(name)) for name in program.graph_signature.user_inputs]
    outputs = [shapes.get(str(name)) for name in program.graph_signature.user_outputs]
    if len(inputs) != 1 or len(outputs) != 1 or not inputs[0] or not outputs[0]:
        raise ModelError("a program from one tensor to one tensor", got=f"{len(inputs)} in and {len(outputs)} out")
    batch, *shape = inputs[0]
    if isinstance(batch, int):
        raise ModelError(
            "a program for any batch size",
            got=f"one for {batch} images at a time",
            hint='export it with dynamic_shapes=({0: torch.export.Dim("n")},) and an example of 2 images',
        )
    if not shape or not all(isinstance(side, int) for side in (*shape, *outputs[0][1:])):
        raise ModelError("a fixed image size and number of classes", got=shape, hint="leave only the batch size open")
    return Classifier(_Exported(program), shape=shape, num_classes=max(2, math.prod(outputs[0][1:])))


class _Exported(nn.Module):
    """An exported program, whose mode is fixed: `train()` and `eval()` change nothing, where torch would raise."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module()

    def train(self, mode: bool = True) -> "_Exported":
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.program(x)


def _refuse_hidden_pickle(content: bytes, path: Path) -> None:
    """Let only archives pass in which torch would unpickle nothing but tensors."""
    refused = ModelError(
        "a .pt2 archive of torch.export without pickled objects", got=path.name, hint=f"export it again, or {RECIPE}"
    )
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        names = [info.filename for info in archive.infolist()]
        parts = [name.partition("/") for name in names]
        known = all(inner.startswith(_RECORDS) for _, _, inner in parts)
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())  # as torch writes them
        # torch finds records whatever their case: two that differ in it alone are refused with the doubles
        if len({root for root, _, _ in parts}) != 1 or len({name.lower() for name in names}) != len(names) or not known:
            raise refused
        if not stored:
            raise refused
        for name in names:
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(name))["config"].values()
                if any(
                    entry["use_pickle"] or not entry["path_name"].startswith(("weight_", "tensor_"))
                    for entry in entries
                ):
                    raise refused
            elif "/data/sample_inputs/" in name and (examples := archive.read(name)):
                torch.load(io.BytesIO(examples), weights_only=True)
            elif name.endswith((".pt", ".pkl")):
                raise refused
    except (
        *(zipfile.BadZipFile, pickle.UnpicklingError, EOFError, RuntimeError),
        *(KeyError, TypeError, AttributeError, ValueError),
    ):
        raise refused from None


_RECORDS = (
    "models/",
    "data/weights/",
    "data/constants/",
    "data/sample_inputs/",
    "extra/",
    "archive_format",
    "archive_version",
    "byteorder",
    ".data/",
)
