"""Checkpoints: all that the next epoch of a training depends on, in one safetensors file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rempart.core.disk import replace
from rempart.core.errors import DataError
from rempart.models.save import plain, versioned
from rempart.report.schema import Epoch
from rempart.train.setup import Run

State = Mapping[str, Tensor]
"""All tensors that training goes on from, by name: weights, their running mean, optimiser and objective."""


def snapshot(run: Run) -> dict[str, Tensor]:
    """Copies of all tensors that the next epoch depends on, on the CPU."""
    state = {f"model/{name}": tensor for name, tensor in plain(run.classifier).items()}
    state |= {f"averaged/{name}": tensor for name, tensor in run.averaged.items()}
    state |= {f"objective/{name}": tensor for name, tensor in run.objective.state.items()}
    for number, slots in run.optimiser.state_dict()["state"].items():
        state |= {f"optimiser/{number}/{slot}": tensor for slot, tensor in slots.items() if tensor is not None}
    if (scaler := run.scaler()) is not None:
        state |= {f"scaler/{name}": torch.tensor(value) for name, value in scaler.state_dict().items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def restore(run: Run, state: State) -> None:
    """Put a snapshot back. Raises KeyError or RuntimeError where it is one of another run."""
    groups: dict[str, dict[str, Tensor]] = {
        key: {} for key in ("model", "averaged", "objective", "optimiser", "scaler")
    }
    for name, tensor in state.items():
        kind, _, rest = name.partition("/")
        groups[kind][rest] = tensor
    run.classifier.load_state_dict(versioned(run.classifier, groups["model"]))
    for name, tensor in run.averaged.items():
        tensor.copy_(groups["averaged"][name])
    run.objective.state.update({name: tensor.to(run.fabric.device) for name, tensor in groups["objective"].items()})
    whole = run.optimiser.state_dict()
    parameters = [p for group in run.optimiser.param_groups for p in group["params"]]
    for name, tensor in groups["optimiser"].items():
        number, _, slot = name.partition("/")
        like = parameters[int(number)]
        laid_out = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
        whole["state"].setdefault(int(number), {})[slot] = laid_out
    run.optimiser.load_state_dict(whole)
    if (scaler := run.scaler()) is not None and groups["scaler"]:
        scaler.load_state_dict({name: tensor.item() for name, tensor in groups["scaler"].items()})


def write(path: Path, epochs: Sequence[Epoch], state: State, of: str) -> None:
    """Write a checkpoint whole or not at all; `of` says what it is one of."""
    head = {"epochs": json.dumps([epoch.model_dump() for epoch in epochs]), "of": of}
    replace(path, save(dict(state), metadata=head))


def read(path: Path) -> tuple[list[Epoch], dict[str, Tensor], str]:
    """The epochs finished, the state after the last of them, and what it is one of.

    Raises:
        DataError: If the file is damaged or no checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            head = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        return [Epoch.model_validate(epoch) for epoch in json.loads(head["epochs"])], state, head["of"]
    except (SafetensorError, KeyError, ValueError) as error:
        hint = "begin anew with --overwrite"
        raise DataError("a checkpoint of rempart train", got=f"{path}, which is damaged ({error})", hint=hint) from None
