"""Write a classifier as a directory of two plain files: `config.json` and `weights.safetensors`."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rempart.core.disk import replace
from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Output
from rempart.models.reading import read_as
from rempart.models.zoo import build
from rempart.report.schema import AS_IT_IS, Reading

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
UNCHANGED = AS_IT_IS.box


class Config(BaseModel):
    """What `config.json` holds: all that is needed to build the network before its weights are read.

    Attributes:
        format_version: Version of this file.
        architecture: Name in the registry of models.
        options: Options of the architecture.
        shape: Channels, height, width.
        class_names: One name per class.
        low: Smallest pixel value.
        high: Largest pixel value.
        output: What the network returns; null where nobody said.
        box: What the network takes for images in the box, as `Reading` has it.
        training: How the weights came about; for people, not needed to load.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format_version: Literal[1] = 1
    architecture: str
    options: dict[str, Any] = Field(default_factory=dict)
    shape: tuple[int, int, int]
    class_names: tuple[str, ...] = Field(min_length=2)
    low: float
    high: float
    output: Output | None = "logits"
    box: str = UNCHANGED
    training: dict[str, Any] = Field(default_factory=dict)


def save(
    model: Classifier,
    directory: str | Path,
    *,
    name: str,
    options: Mapping[str, Any] | None = None,
    box: str = UNCHANGED,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Save a classifier that `zoo.build` or a Python factory made, so that `load` gives the same logits bit by bit.

    Each file is written under a temporary name and then renamed; other files in the directory stay.

    Args:
        model: The classifier, on any device and in any memory format.
        directory: Made where it does not exist.
        name: Architecture that `model` was built from, or `python:package.module:factory`.
        options: Options it was built with.
        box: What its network takes for images in the box, where it was read in that way.
        training: How the weights came about; must fit into JSON.

    Raises:
        ModelError: If `name` and `options` would build another network.
    """
    config = Config(
        architecture=name,
        options=dict(options or {}),
        shape=model.shape,  # pyright: ignore[reportArgumentType]  (checked by pydantic)
        class_names=model.class_names,
        low=model.low,
        high=model.high,
        output=model.output,  # pyright: ignore[reportArgumentType]
        box=box,
        training=dict(training or {}),
    )
    weights = plain(model)
    if not name.startswith("python:"):
        with torch.device("meta"):
            twin = build(name, shape=config.shape, num_classes=len(config.class_names), options=config.options)
            twin = read_as(twin, Reading(box=box))
        if wrong := differing(twin.state_dict(), weights):
            raise ModelError(f"a model built as {name} with options {config.options}", got=f"another {wrong}")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / WEIGHTS, to_bytes(weights))
    replace(folder / CONFIG, (config.model_dump_json(indent=2) + "\n").encode())


def plain(model: Classifier) -> dict[str, Tensor]:
    """The state of a model as dense tensors on the CPU, as safetensors holds them.

    Raises:
        ModelError: If its state holds anything else, such as packed weights of a quantised network.
    """
    state: dict[str, object] = model.state_dict()
    weights = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    odd = [key for key, value in weights.items() if value.layout != torch.strided or value.is_quantized]
    odd += [key for key in state if key not in weights]
    if odd:
        some = ", ".join(odd[:4]) + (" and more" if len(odd) > 4 else "")
        hint = "train and save the network in floating point, and quantise or pack it afterwards"
        raise ModelError("a network whose state is dense tensors, to be saved", got=f"others in {some}", hint=hint)
    return {key: value.detach().cpu().contiguous() for key, value in weights.items()}


def differing(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Names of the first tensors that are missing, left over or of another shape; empty where all fit."""
    names = [key for key in expected if key not in state or state[key].shape != expected[key].shape]
    names += [key for key in state if key not in expected]
    return ", ".join(names[:4]) + (" and more" if len(names) > 4 else "")


def versioned(net: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state of a network of today, with the versions of its modules: some ask for them, safetensors keeps none."""
    complete = OrderedDict(state)
    complete._metadata = getattr(net.state_dict(), "_metadata", {})  # pyright: ignore  (where torch looks for them)
    return complete
