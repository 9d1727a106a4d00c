"""Load a classifier from the forms Rempart knows. A pickle is never loaded: it can run any code."""

import importlib
import inspect
import io
import json
import math
import os
import pickle
import sys
import traceback
import zipfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor, nn
from torch.export import ExportedProgram

from rempart.core.errors import ModelError, SpecError
from rempart.core.model import Classifier
from rempart.core.repro import digest_state
from rempart.models.save import CONFIG, WEIGHTS, Config, differing
from rempart.models.zoo import build
from rempart.report.schema import ModelCard

FORMS = "a directory that `rempart train` wrote, a .pt2 file of torch.export, or python:package.module:factory"
PYTHON = "python:"


def load(source: str) -> Classifier:
    """Load a classifier, on the CPU and in inference mode.

    Args:
        source: A directory that `save` wrote; a `.pt2` file that `torch.export.save` wrote, for images in [0, 1] and
            exported with a dynamic batch size; or `python:package.module:factory`, a function without arguments that
            returns a `Classifier`, or a network with the attributes `shape` and `num_classes` that takes images in
            [0, 1] to logits. Both of the latter run code of their author: a factory plainly, and a `.pt2` because
            torch evaluates expressions in it. Load them only from where you would install a package from.
            `python:package.module:factory@DIRECTORY` fills the factory's network with the weights trained there.

    Raises:
        ModelError: If there is nothing there, or it cannot be used; pickles are always refused.
    """
    if source.startswith(PYTHON):
        return _from_python(source)  # in whatever mode it comes: an audit reports and repairs it
    path = Path(source)
    if path.is_dir():
        return _from_directory(path).eval()
    if not path.is_file():
        raise ModelError(FORMS, got=f"{source!r}, which does not exist")
    if path.suffix == ".pt2":
        return _from_export(path).eval()
    _refuse_pickle(path)
    raise ModelError(FORMS, got=repr(source), hint=_RECIPE)


def architecture(source: str) -> tuple[str, dict[str, Any]]:
    """What the network of a loadable model is built from, as `save` records it: a name and its options.

    Raises:
        ModelError: If it is of a form that cannot be trained and saved.
    """
    if source.startswith(PYTHON):
        return source.partition("@")[0], {}
    if not Path(source).exists():
        raise ModelError(FORMS, got=f"{source!r}, which does not exist")
    if Path(source).is_dir():
        config = _config(Path(source))
        return config.architecture, config.options
    raise ModelError(
        "a directory that `rempart train` wrote or python:package.module:factory, to train it further",
        got=repr(source),
        hint="an exported program is fixed in inference mode; give the network it was made of",
    )


def card(model: Classifier, source: str, defences: Sequence[str] = ()) -> ModelCard:
    """Describe a model, and the defences that stand in front of its network, for a report."""
    name = (
        source.rpartition(":")[2] if source.startswith("python:") else Path(source).resolve().name.removesuffix(".pt2")
    )
    return ModelCard(
        source=source,
        name=name,
        digest=digest_state(model.state_dict()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        shape=model.shape,
        classes=model.class_names,
        low=model.low,
        high=model.high,
        defences=tuple(defences),
    )


_RECIPE = (
    "write a function that builds the network and fills it from a safetensors file, and give python:module:function"
)
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix.lower() in _PICKLES or start[:1] == b"\x80" or start == b"PK\x03\x04":
        raise ModelError(
            "a model file that cannot run code",
            got=f"{path.name}, which is a pickle or may be one, and is not opened",
            hint=f"where you trust it, store its state dict with safetensors.torch.save_file; then {_RECIPE}",
        )


def _config(path: Path) -> Config:
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise ModelError(
                f"a directory with {CONFIG} and {WEIGHTS}", got=f"{path} without {name}", hint=f"a model is {FORMS}"
            )
    try:
        return Config.model_validate_json((path / CONFIG).read_bytes())
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ModelError(
            f"a valid {CONFIG}", got=f"{path / CONFIG} with {faults}", hint="train the model again"
        ) from None


def _from_directory(path: Path) -> Classifier:
    config = _config(path)
    if config.architecture.startswith(PYTHON):
        raise ModelError(
            "a directory whose network needs no code but Rempart's",
            got=f"{path}, whose network {config.architecture} builds",
            hint=f"where you trust that code, give {config.architecture}@{path}",
        )
    try:
        model = build(
            config.architecture,
            shape=config.shape,
            num_classes=len(config.class_names),
            class_names=config.class_names,
            options=config.options,
        )
    except SpecError as error:
        raise ModelError(f"an architecture of this version in {path / CONFIG}", got=str(error)) from None
    model.low, model.high = config.low, config.high
    model.output = config.output
    _fill(model, path / WEIGHTS)
    return model


def _fill(model: Classifier, path: Path) -> None:
    try:
        state = from_bytes(path.read_bytes())
    except SafetensorError as error:
        raise ModelError("a safetensors file", got=f"{path}, which is damaged ({error})") from None
    if wrong := differing(model.state_dict(), state):
        raise ModelError(f"the weights of the architecture in {CONFIG}", got=f"{path} with another {wrong}")
    broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise ModelError("finite weights", got=f"NaN or infinity in {', '.join(broken[:4])} of {path}")
    model.load_state_dict(state)


class _Exported(nn.Module):
    """An exported program, whose mode is fixed: `train()` and `eval()` change nothing, where torch would raise."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module()

    def train(self, mode: bool = True) -> "_Exported":
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.program(x)


def _from_export(path: Path) -> Classifier:
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


def _refuse_hidden_pickle(content: bytes, path: Path) -> None:
    """Let only archives pass in which torch would unpickle nothing but tensors."""
    refused = ModelError(
        "a .pt2 archive of torch.export without pickled objects", got=path.name, hint=f"export it again, or {_RECIPE}"
    )
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        names = [info.filename for info in archive.infolist()]
        parts = [name.partition("/") for name in names]
        known = all(inner.startswith(_RECORDS) for _, _, inner in parts)
        # torch finds records whatever their case: two that differ in it alone are refused with the doubles
        if len({root for root, _, _ in parts}) != 1 or len({name.lower() for name in names}) != len(names) or not known:
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


def _from_python(source: str) -> Classifier:
    source, at, folder = source.partition("@")
    _, _, place = source.partition(":")
    module_name, _, function = place.partition(":")
    if not module_name or not function:
        raise ModelError("python:package.module:factory", got=repr(source))
    with _current_directory_importable():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            hint = "run in the directory that holds the module, or install it"
            raise ModelError(f"an importable module {module_name}", got=error, hint=hint) from error
        except Exception as error:
            raise _user_error(f"the module {module_name} to be imported", error) from error
        factory: Any = getattr(module, function, None)
        if not callable(factory):
            found = [name for name, value in vars(module).items() if inspect.isfunction(value)]
            hint = f"its functions are {', '.join(found)}" if found else "it has no functions"
            raise ModelError(f"a function {function} in {module_name}", got=repr(factory), hint=hint)
        try:
            model = factory()
        except Exception as error:
            raise _user_error(f"{place} to build a model when called without arguments", error) from error
    classifier = _as_classifier(model, source)
    if at:
        config = _config(Path(folder))
        if config.architecture != source:
            raise ModelError(f"weights of {source}", got=f"{folder} with those of {config.architecture}")
        _fill(classifier, Path(folder) / WEIGHTS)
    return classifier


def _user_error(expected: str, error: Exception) -> ModelError:
    """What went wrong in code of the user's, with the line of theirs it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return ModelError(expected, got=f"{type(error).__name__}: {error} ({place})", hint="mend it there")


def _as_classifier(model: object, source: str) -> Classifier:
    if isinstance(model, Classifier):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError("the factory to return a Classifier or a torch module", got=type(model).__name__)
    shape, classes = getattr(model, "shape", None), getattr(model, "num_classes", None)
    if not isinstance(shape, (tuple, list, torch.Size)) or not isinstance(classes, int):
        raise ModelError(
            f"the network of {source} to have the attributes shape and num_classes",
            got=f"shape={shape!r}, num_classes={classes!r}",
            hint="set them, for example model.shape = (1, 28, 28); model.num_classes = 10; or return "
            "rempart.Classifier(model, shape=..., num_classes=...)",
        )
    return Classifier(model, shape=shape, num_classes=classes)


@contextmanager
def _current_directory_importable() -> Generator[None, None, None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
