"""Load a classifier from the forms Rempart knows. A pickle is never loaded: it can run any code."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rempart.core.errors import ModelError
from rempart.core.identity import identity
from rempart.core.model import Classifier, check_layers
from rempart.models.formats import FORMS, PYTHON, RECIPE
from rempart.models.formats.exported import load_exported
from rempart.models.formats.folder import load_folder, read_config
from rempart.models.formats.hugging_face import is_hugging_face, load_hugging_face
from rempart.models.formats.keras import KERAS, keras_options, load_keras
from rempart.models.formats.named import NAMED, is_timm, load_named, load_timm
from rempart.models.formats.onnx import load_onnx
from rempart.models.formats.python import load_python
from rempart.models.reading import read_as
from rempart.report.schema import AS_IT_IS, ModelCard, Reading

FILES: dict[str, Callable[[Path], Classifier]] = {
    ".h5": load_keras,
    ".hdf5": load_keras,
    ".keras": load_keras,
    ".onnx": load_onnx,
    ".pt2": load_exported,
}
"""The loader of each kind of file, by its ending in lower case."""


def load(source: str, reading: Reading = AS_IT_IS) -> Classifier:
    """Load a classifier, on the CPU and in inference mode.

    Args:
        source: A directory that `save` wrote; a Hugging Face folder of an image classifier; a `.keras`, `.h5` or
            `.hdf5` file of a whole Keras model; an `.onnx` file; a `.pt2` file that `torch.export.save` wrote, exported
            with a dynamic batch size; `timm:NAME@FILE` or `torchvision:NAME@FILE`, with weights in a safetensors file;
            or `python:package.module:factory`, a function without arguments that returns a `Classifier`, a Keras model,
            or a network with the attributes `shape` and `num_classes`. Networks take images in [0, 1], but for what
            `reading` says, to logits. Two of these run code of their author: a factory plainly, and a `.pt2` because
            torch evaluates expressions in it. Load them only from where you would install a package from.
            `python:package.module:factory@DIRECTORY` fills the factory's network with the weights trained there.
        reading: What its network takes for images in [0, 1], and the names of its outputs.

    Raises:
        ModelError: If there is nothing there, or it cannot be used; pickles are always refused.
    """
    model = read_as(_found(source), reading)
    check_layers(model)
    return model


def _found(source: str) -> Classifier:
    if source.startswith(PYTHON):
        return load_python(source)  # in whatever mode it comes: an audit reports and repairs it
    if source.startswith(NAMED):
        return load_named(source).eval()
    path = Path(source)
    if (path / "saved_model.pb").is_file():
        hint = "convert it: python -m tf2onnx.convert --saved-model FOLDER --output model.onnx"
        raise ModelError(FORMS, got=f"{source}, a SavedModel folder of TensorFlow", hint=hint)
    if path.is_dir():
        load_here = load_timm if is_timm(path) else load_hugging_face if is_hugging_face(path) else load_folder
        return load_here(path).eval()
    if not path.is_file():
        raise ModelError(FORMS, got=f"{source!r}, which does not exist")
    if (ending := path.suffix.lower()) in FILES:
        return FILES[ending](path).eval()
    _refuse_pickle(path)
    raise ModelError(FORMS, got=repr(source), hint=RECIPE)


def architecture(source: str) -> tuple[str, dict[str, Any], str]:
    """What the network of a loadable model is built from, as `save` records it: a name, its options, and its box.

    Raises:
        ModelError: If it is of a form that cannot be trained and saved.
    """
    if source.startswith(PYTHON):
        code, _, folder = source.partition("@")
        return code, {}, read_config(Path(folder)).box if folder else AS_IT_IS.box
    path = Path(source)
    if not path.exists() and not source.startswith(NAMED):
        raise ModelError(FORMS, got=f"{source!r}, which does not exist")
    if path.is_dir() and not is_hugging_face(path) and not is_timm(path):
        config = read_config(path)
        return config.architecture, config.options, config.box
    if FILES.get(path.suffix.lower()) is load_keras:
        return KERAS, keras_options(load_keras(path)), AS_IT_IS.box
    raise ModelError(
        "a directory that `rempart train` wrote or python:package.module:factory, to train it further",
        got=repr(source),
        hint="such a model is fixed in inference mode; give the network it was made of",
    )


def card(model: Classifier, source: str, defences: Sequence[str] = ()) -> ModelCard:
    """Describe a model, and the defences that stand in front of its network, for a report.

    Raises:
        ModelError: If its state holds something that has no value, such as a lazy parameter.
    """
    path = Path(source).resolve()
    name = path.stem if path.suffix.lower() in FILES else path.name
    if source.startswith(PYTHON):
        name = source.rpartition(":")[2]
    if source.startswith(NAMED):
        name = source.partition("@")[0]
    known = identity(model)
    return ModelCard(
        source=source,
        name=name,
        digest=known.weights,
        code=known.code,
        answers=known.answers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        shape=model.shape,
        classes=model.class_names,
        low=model.low,
        high=model.high,
        defences=tuple(defences),
        notes=model.notes,
    )


_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib")


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix.lower() in _PICKLES or start[:1] == b"\x80" or start == b"PK\x03\x04":
        raise ModelError(
            "a model file that cannot run code",
            got=f"{path.name}, which is a pickle or may be one, and is not opened",
            hint=f"where you trust it, store its state dict with safetensors.torch.save_file; then {RECIPE}",
        )
