"""A folder that `rempart train` wrote: JSON against a closed schema, and safetensors; nothing is executed."""

from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes

from rempart.core.errors import ModelError, SpecError
from rempart.core.model import Classifier
from rempart.models.formats import FORMS, PYTHON
from rempart.models.reading import read_as
from rempart.models.save import CONFIG, WEIGHTS, Config, differing, versioned
from rempart.models.zoo import build
from rempart.report.schema import Reading


def load_folder(path: Path) -> Classifier:
    """A model that `save` wrote.

    Raises:
        ModelError: If a file is missing, damaged or of another architecture, or the network needs foreign code.
    """
    config = read_config(path)
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
    model = read_as(model, Reading(box=config.box))
    fill(model, path / WEIGHTS)
    return model


def read_config(path: Path) -> Config:
    """What `save` wrote beside the weights.

    Raises:
        ModelError: If the folder holds no model, or its description is not valid.
    """
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


def fill(model: Classifier, path: Path) -> None:
    """Put the weights of a safetensors file into a model.

    Raises:
        ModelError: If the file is damaged, its weights are not finite, or they belong to another network.
    """
    try:
        state = from_bytes(path.read_bytes())
    except SafetensorError as error:
        raise ModelError("a safetensors file", got=f"{path}, which is damaged ({error})") from None
    if wrong := differing(model.state_dict(), state):
        raise ModelError(f"the weights of the architecture in {CONFIG}", got=f"{path} with another {wrong}")
    broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise ModelError("finite weights", got=f"NaN or infinity in {', '.join(broken[:4])} of {path}")
    model.load_state_dict(versioned(model, state))
