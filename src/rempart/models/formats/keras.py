"""Keras models, run by Keras 3 on torch: read by closed lists (`keras_file`), never with code of the file's."""

import copy
import importlib
import math
import os
import re
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Normalize, Output, Untraced
from rempart.core.types import Images
from rempart.models.formats import RECIPE, within_limits
from rempart.models.formats.keras_file import check_config, read_hdf5, read_keras

KERAS = "keras"
"""Architecture of a saved folder whose network is a Keras description."""


def load_keras(path: Path) -> Classifier:
    """A whole model that Keras 2 or 3 saved, for images in [0, 1] unless `--box` says otherwise.

    The content says whether it is an archive or HDF5: a `.keras` file of TensorFlow up to 2.12 is HDF5.

    Raises:
        ModelError: If the file is damaged or exceeds a limit, needs code of its own, takes no single image of fixed
            size, or Keras is missing.
    """
    keras = _keras()
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    config, count = (read_keras if zipped else read_hdf5)(path)
    with _reported(path.name):
        with keras.device("meta"):  # a layer may claim any size: nothing is allocated before it is compared
            empty = _built(keras, config)
        claimed = sum(variable.value.numel() for variable in empty.weights)
        if claimed > count:
            raise ModelError(f"weights for all {claimed:,} parameters", got=f"{count:,} in {path.name}")
        for layer in _leaves(empty):
            for tensor in (tensor for node in layer._inbound_nodes for tensor in node.output_tensors):
                within_limits([side for side in tensor.shape if side is not None])
        with keras.device("cpu"):
            model = _built(keras, config)
            with TemporaryDirectory() as folder:
                link = Path(folder) / ("model.keras" if zipped else "model.h5")  # Keras goes by the ending
                link.symlink_to(path.resolve())
                model.load_weights(link)
        classifier = from_keras(model)
    if broken := [name for name, value in classifier.state_dict().items() if not bool(value.isfinite().all())]:
        raise ModelError("finite weights", got=f"NaN or infinity in {', '.join(broken[:4])} of {path.name}")
    return classifier


def from_keras(model: Any) -> Classifier:
    """A Keras model as a classifier that can be attacked and trained, its last softmax or sigmoid taken off.

    Layers that were frozen in it stay frozen; regularisers are not part of the loss that a training here uses.

    Args:
        model: A built Keras model on the torch backend, from one image (*s, c) or (c, *s) to K outputs.

    Raises:
        ModelError: If it takes no single image of fixed size, or computes in another type than float32.
    """
    keras = _keras()
    shape, channels_last = _image_shape(model)
    if not str(model.inputs[0].dtype).startswith("float"):  # Keras would cut pixels in [0, 1] down to 0
        hint = "rebuild it on an input of float32, with its scaling inside, and set its weights"
        raise ModelError("a Keras model of images in float32", got=f"inputs in {model.inputs[0].dtype}", hint=hint)
    if types := {str(layer.compute_dtype) for layer in _leaves(model)} - {"float32", "float64"}:
        hint = "rebuild it with the policy float32, and set its weights"
        raise ModelError("layers that compute in float32", got=", ".join(sorted(types)), hint=hint)
    units = _units(model)
    with torch.no_grad(), keras.device("cpu"):
        output, notes = _without_activation(model, units)
    net = nn.Sequential(Normalize([0.0] * shape[0], [1.0] * shape[0]), KerasNet(model, channels_last))
    return Classifier(net, shape=shape, num_classes=max(2, units), output=output, notes=notes)


def is_keras(model: object) -> bool:
    """Whether this is a Keras model; Keras is not imported to find out."""
    return KERAS in sys.modules and isinstance(model, sys.modules[KERAS].Model)


def keras_network(options: Mapping[str, Any]) -> nn.Module:
    """The network that a folder describes, with the weights of its beginning.

    Raises:
        ModelError: If the description names anything but known layers.
    """
    check_config(options.get("config"))
    keras = _keras()
    with _reported("a Keras description"), keras.device("cpu"):
        model = _built(keras, options["config"])
        return KerasNet(model, _image_shape(model)[1])


def keras_options(model: Classifier) -> dict[str, Any]:
    """What `keras_network` builds the network of a loaded model from.

    Raises:
        ModelError: If the model holds no Keras network that a description can stand for.
    """
    keras = _keras()
    nets = [module for module in model.modules() if isinstance(module, KerasNet)]
    config = keras.saving.serialize_keras_object(nets[0].hidden[0])
    check_config(config)
    return {"config": config}


class KerasNet(Untraced):
    """Images, channels first, in; what the Keras model returns, out.

    Its layers are the submodules, with their weights as parameters and buffers, and activations channels first: what
    watches or saves them sees a network of torch.

    Attributes:
        hidden: The Keras model, in a tuple: as a submodule it would register every weight again.
    """

    def __init__(self, model: Any, channels_last: bool) -> None:
        super().__init__()
        self.hidden = (model,)
        self.channels_last = channels_last
        self.flat = len(model.input_shape) == 3  # grey images without an axis of channels
        generators: dict[int, Any] = {}
        for layer in _leaves(model):
            last = getattr(layer, "data_format", "channels_last" if channels_last else "") == "channels_last"
            self.add_module(self._name(layer), _Layer(layer, last))
            weights = {id(variable) for variable in layer.weights}
            generators |= {id(variable): variable for variable in layer.variables if id(variable) not in weights}
        self.generators = tuple(generators.values())
        self._draw_from(None)

    def forward(self, x: Images) -> Tensor:
        """Run the layers, as in training where this module is in train mode; dropout then draws from torch's state."""
        (model,) = self.hidden
        if self.training:
            self._draw_from(torch.default_generator)
        x = x.squeeze(1) if self.flat else x.movedim(1, -1) if self.channels_last else x
        with sys.modules[KERAS].device(str(x.device)):
            return model(x, training=self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KerasNet":
        keras = sys.modules[KERAS]
        state = self.state_dict()
        with keras.device(str(next(iter(state.values()), torch.zeros(())).device)):
            twin = KerasNet(keras.models.clone_model(self.hidden[0]), self.channels_last)
        twin.load_state_dict(state)
        for ours, copied in zip(self.modules(), twin.modules(), strict=True):
            copied.training = ours.training
        for ours, copied in zip(self.parameters(), twin.parameters(), strict=True):
            copied.requires_grad_(ours.requires_grad)
        memo[id(self)] = twin
        return twin

    def _name(self, layer: Any) -> str:
        """The layer's name; where Keras made it, numbered within the model, as Keras numbers all of the process."""
        name = layer.name.replace(".", "_")
        own = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", type(layer).__name__)
        own = re.sub("([a-z])([A-Z])", r"\1_\2", own).lower()
        if re.fullmatch(rf"{own}(_[0-9]+)?", name):
            before = sum(getattr(module, "kind", "") == type(layer).__name__ for module in self.children())
            name = f"{own}_{before}" if before else own
        while hasattr(self, name):
            name += "_"
        return name

    def _draw_from(self, generator: torch.Generator | None) -> None:
        """Set the states that layers draw random numbers by: Keras begins with random ones."""
        for number, variable in enumerate(self.generators):
            seed = number if generator is None else int(torch.randint(2**31 - 1, (), generator=generator))
            variable.assign([seed, 0])


class _Layer(nn.Module):
    """One Keras layer: it stays where it is in its model, and is called by way of this module where hooks listen."""

    def __init__(self, layer: Any, channels_last: bool) -> None:
        super().__init__()
        self.call: Any = layer.call
        self.channels_last, self.kind = channels_last, type(layer).__name__
        self.scaling = ""
        if self.kind in ("Rescaling", "Normalization"):
            given = {key: value for key, value in layer.get_config().items() if key in _SCALES and value is not None}
            self.scaling = ", ".join([f"a {self.kind} layer", *(f"{key} {value}" for key, value in given.items())])
        frozen, layer.trainable = not layer.trainable, True
        learnt = {id(variable) for variable in layer.trainable_variables}
        layer.trainable = not frozen
        names = [variable.path.removeprefix(f"{layer.path}/").replace(".", "_") for variable in layer.weights]
        self.statistics: dict[str, Any] = {}
        for name, variable in zip(names, layer.weights, strict=True):
            if id(variable) in learnt:
                self.register_parameter(name, variable.value)
            else:
                self.statistics[name] = variable
                self.register_buffer(name, variable.value.data)
        self._join()
        object.__setattr__(layer, "call", self.between)

    def between(self, *inputs: Any, **options: Any) -> Any:
        """What the Keras layer calls instead of its own function."""
        if not self._forward_hooks and not self._forward_pre_hooks:
            return self.call(*inputs, **options)
        return self._last(self(*map(self._first, inputs), **options))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The layer, with channels first."""
        return self._first(self.call(*map(self._last, inputs), **options))

    def _first(self, x: Any) -> Any:
        return x.movedim(-1, 1) if self.channels_last and isinstance(x, Tensor) and x.ndim > 2 else x

    def _last(self, x: Any) -> Any:
        return x.movedim(1, -1) if self.channels_last and isinstance(x, Tensor) and x.ndim > 2 else x

    def _apply(self, fn: Any, recurse: bool = True) -> "_Layer":
        super()._apply(fn, recurse)  # which replaces buffers, as when they move to another device
        self._join()
        return self

    def _join(self) -> None:
        for name, variable in self.statistics.items():
            variable._value = getattr(self, name)


_SCALES = ("scale", "offset", "mean", "variance")


def _leaves(model: Any) -> Iterator[Any]:
    """The layers of a model, those of models inside it too, each once."""
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        layer = waiting.pop(0)
        if _is_graph(layer):
            waiting = [*layer.layers, *waiting]
        elif id(layer) not in seen and type(layer).__name__ != "InputLayer":
            seen.add(id(layer))
            yield layer


def _image_shape(model: Any) -> tuple[tuple[int, ...], bool]:
    """The shape of one image, channels first, and whether the model has them last."""
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        came = f"{len(model.inputs)} in and {len(model.outputs)} out"
        raise ModelError("a Keras model from one input to one output", got=came, hint=RECIPE)
    shape = tuple(model.inputs[0].shape[1:])
    if not 2 <= len(shape) <= 4 or None in shape:
        hint = "rebuild it on keras.Input of the shape of one image, and set its weights"
        raise ModelError("a Keras model of images of a fixed size", got=f"inputs of shape {shape}", hint=hint)
    within_limits(shape)
    if len(shape) == 2:
        return (1, *shape), False
    formats = [layer.data_format for layer in _leaves(model) if getattr(layer, "data_format", None)]
    last = not formats or formats[0] == "channels_last"
    return ((shape[-1], *shape[:-1]) if last else shape), last


def _units(model: Any) -> int:
    shape = tuple(model.outputs[0].shape[1:])
    if None in shape:
        raise ModelError("a Keras model with a fixed number of outputs", got=shape, hint=RECIPE)
    return math.prod(shape)


def _without_activation(model: Any, units: int) -> tuple[Output | None, tuple[str, ...]]:
    """Take a softmax or sigmoid off the last layer, where that gives the same probabilities; tell what was done."""
    activations = sys.modules[KERAS].activations
    layer = _head(model)
    activation = getattr(layer, "activation", None)
    soft = activation is activations.softmax or type(layer).__name__ == "Softmax"
    if not soft and activation is not activations.sigmoid and type(layer).__name__ != "Sigmoid":
        weighted = activation is activations.linear and hasattr(layer, "kernel")
        return "logits" if weighted else None, ()  # an average of softmaxes may come last, for example
    name = "softmax" if soft else "sigmoid"
    if activation is not None:
        x = torch.rand((4, *model.inputs[0].shape[1:]), generator=torch.Generator().manual_seed(0))
        expected = model(x, training=False)
        layer.activation = activations.linear
        z = model(x, training=False)
        if torch.allclose(z.softmax(-1) if soft else z.sigmoid(), expected, atol=1e-6):
            return "logits", (f"The {name} of its last layer was taken off, so that attacks see logits.",)
        layer.activation = activation
    output: Output = "probabilities" if soft or units == 1 else "sigmoids"
    return output, (f"Its {name} could not be taken off; logarithms of its outputs are used.",)


def _head(model: Any) -> Any:
    """What gives the output of a model, of the last model inside it where there are some."""
    while _is_graph(model):
        model = model.outputs[0]._keras_history.operation
    return model


def _is_graph(layer: Any) -> bool:
    """Whether this is a Sequential or Functional model, not one that runs a function of its author's."""
    return isinstance(layer, sys.modules[KERAS].Model) and hasattr(layer, "outputs")


def _built(keras: Any, config: Mapping[str, Any]) -> Any:
    return keras.saving.deserialize_keras_object(copy.deepcopy(config), safe_mode=True)


def _keras() -> Any:
    if KERAS not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"
    try:
        keras = importlib.import_module(KERAS)
    except ImportError as error:
        raise ModelError("Keras 3 for this model", got=error, hint="pip install 'rempart[keras]'") from None
    if keras.config.backend() != "torch":
        hint = "set KERAS_BACKEND=torch, or load the model before keras is imported"
        raise ModelError("Keras on its torch backend", got=keras.config.backend(), hint=hint)
    return keras


@contextmanager
def _reported(name: str) -> Generator[None]:
    """Whatever Keras raises where a description and weights do not go together, as one error."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  every layer has errors of its own
        line = str(error).strip().split("\n")[0][:200]
        raise ModelError("a model that Keras 3 can build", got=f"{name} ({type(error).__name__}: {line})") from None
