"""Descriptions of networks as Keras 2 wrote them, in the words of Keras 3.

Little of it changes: a few arguments without effect on the outputs, names with a slash, the numbers of the calls of a
model inside a model, and the operations of TensorFlow between layers.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from rempart.core.errors import ModelError
from rempart.models.formats import RECIPE

MODELS = frozenset({"Sequential", "Functional", "Model"})
LAYERS = "keras.layers"


def modern(model: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The description of a model as Keras 3 writes it to its archives: each class with its module.

    Without a module Keras takes its reader of old files, which forgets axes where they are several, and takes words
    such as "dot" for functions of that name.

    Args:
        model: The class of the model and its configuration.
        version: Of the Keras that saved it. In HDF5 files of Keras 3 the modules alone are missing.

    Raises:
        ModelError: If it has an operation or an activation that Keras 3 does not have.
    """
    config: Any = model["config"]
    if isinstance(config, list):  # a Sequential before Keras 2.2.3
        config = {"name": "sequential", "layers": config}
    config = dict(config)
    if version < "3":
        config |= _translated(config)
    config["layers"] = [
        modern(part, version) if part["class_name"] in MODELS else {"module": LAYERS, "registered_name": None, **part}
        for part in config["layers"]
    ]
    kind = "Sequential" if model["class_name"] == "Sequential" else "Model"
    return {**model, "module": "keras", "class_name": kind, "registered_name": None, "config": config}


def _translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a model's configuration that Keras 2 wrote in another way."""
    layers, first = config["layers"], _first_calls(config)
    changed: dict[str, Any] = {"layers": [_layer(part, first) for part in layers]}
    if layers[0]["class_name"] != "InputLayer" and (shape := layers[0]["config"].get("batch_input_shape")):
        start = {"class_name": "InputLayer", "config": {"batch_shape": shape, "name": "input"}}
        changed["layers"] = [start, *changed["layers"]]  # a Sequential before Keras 2.4
    functional = {
        _slashless(part["config"]["name"]) for part in layers if part["class_name"] in MODELS - {"Sequential"}
    }
    for key in {"input_layers", "output_layers"} & config.keys():
        places = _rerouted(config[key], first)
        places = [*places.values()] if isinstance(places, dict) else places  # by the names of the inputs
        for place in _references(places if key == "output_layers" else None):
            place[1] += place[0] in functional  # here, and only here, Keras 3 counts from 1
        changed[key] = places[0] if len(places) == 1 else places  # one tensor, not a list of one
    return changed


def _layer(layer: Mapping[str, Any], first: Mapping[str, int]) -> dict[str, Any]:
    kind, config = layer["class_name"], layer["config"]
    layer = {key: value for key, value in layer.items() if key != "build_config"}
    if "name" in layer:
        layer["name"] = _slashless(layer["name"])
    if "inbound_nodes" in layer:
        layer["inbound_nodes"] = _rerouted(layer["inbound_nodes"], first)
    if kind in ("TFOpLambda", "SlicingOpLambda"):
        return _operation(layer)
    if "inbound_nodes" in layer:
        layer["inbound_nodes"] = [_call(call) for call in layer["inbound_nodes"]]
    if kind in MODELS:
        return layer
    options = {
        key: value for key, value in config.items() if key not in _GONE.get(kind, ()) and (value or key not in _OFF)
    }
    if shape := options.pop("batch_input_shape", None):
        options |= {"batch_shape": shape} if kind == "InputLayer" else {}
    options["name"] = _slashless(options["name"])
    if kind == "LeakyReLU" and "alpha" in options:
        options["negative_slope"] = options.pop("alpha")
    if isinstance(policy := options.get("dtype"), dict):
        options["dtype"] = policy["config"]["name"]
    if isinstance(axis := options.get("axis"), list) and len(axis) == 1:
        options["axis"] = axis[0]
    if "hard_sigmoid" in (options.get("activation"), options.get("recurrent_activation")):
        raise ModelError(
            "activations that Keras 3 computes as Keras 2 did",
            got=f"hard_sigmoid in layer {options['name']!r}, which Keras 2 computed as clip(0.2 x + 0.5, 0, 1)",
            hint=f"export the model to ONNX with the Keras that wrote it, or {RECIPE}",
        )
    for key in ("layer", "backward_layer", "activation"):  # of TimeDistributed, of Bidirectional, LeakyReLU(0.2)
        part = options.get(key)
        if isinstance(part, dict) and isinstance(part.get("config"), dict) and "name" in part["config"]:
            options[key] = {"module": LAYERS, "registered_name": None, **_layer(part, first)}
    return {**layer, "config": options}


def _slashless(name: str) -> str:
    """A name without the slashes that Keras 3 does not take."""
    return name.replace("/", "_")


def _references(value: Any) -> Iterator[list[Any]]:
    """Every reference to a tensor, [layer, number of its call, number of the output, ...], wherever it stands."""
    if isinstance(value, list) and len(value) >= 3 and isinstance(value[0], str) and value[0] != _CONSTANT:
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _references(inner)


def _first_calls(config: Mapping[str, Any]) -> dict[str, int]:
    """The number of the first call of each model inside: 1 where Keras 2 counted its construction; Keras 3 has 0."""
    models = {part["config"]["name"] for part in config["layers"] if part["class_name"] in MODELS}
    first: dict[str, int] = {}
    for name, number, *_ in _references(
        [config.get("output_layers"), [p.get("inbound_nodes") for p in config["layers"]]]
    ):
        if name in models:
            first[name] = min(number, first.get(name, number))
    return first


def _rerouted(calls: Any, first: Mapping[str, int]) -> Any:
    """The calls of a layer, or the outputs of a model, with the names and numbers of Keras 3."""
    calls = copy.deepcopy(calls)
    for reference in _references(calls):
        reference[:2] = _slashless(reference[0]), reference[1] - first.get(reference[0], 0)
    return calls


def _call(call: list[Any]) -> Any:
    """The call of a layer; where a tensor is given by its name, as `value` of an attention, in the form of Keras 3."""
    given = call[0][3] if call and isinstance(call[0], list) and len(call[0]) > 3 else {}
    if not any(True for _ in _references(given)):
        return call
    first = [_argument(part) for part in call]
    return {
        "args": first if len(first) == 1 else [first],
        "kwargs": {key: _argument(value) if isinstance(value, list) else value for key, value in given.items()},
    }


def _operation(layer: Mapping[str, Any]) -> dict[str, Any]:
    """An operation of TensorFlow between layers, as an operation of Keras."""
    function, calls, options = layer["config"]["function"], [], {}
    if function not in _OPERATIONS:
        raise _unknown(function)
    kind, others, names = _OPERATIONS[function]
    for node in layer["inbound_nodes"]:
        several = isinstance(node[0], list)
        given = {key: value for key, value in (node[0] if several else node)[3].items() if value is not None}
        if function == _SLICE:
            given = {"axis": _flipped(given["slice_spec"])}
        given = {key: value for key, value in given.items() if (key, value) not in _PLAIN and key != "name"}
        if given.keys() - {*others, *names} or not given.keys() >= {*others}:
            raise _unknown(function)
        first = [_argument(part) for part in node] if several else _argument(node[:3])
        calls.append({"args": [first, *(_argument(given[key]) for key in others)], "kwargs": {}})
        options = {names[key]: value for key, value in given.items() if key in names}
    module, _, name = kind.rpartition(".")
    return {
        "module": module or "keras.src.ops.numpy",
        "class_name": name,
        "config": {"name": layer["name"], **options},
        "registered_name": name,
        "name": layer["name"],
        "inbound_nodes": calls,
    }


def _argument(value: Any) -> Any:
    """A reference to a tensor, a number or an array of numbers, as Keras 3 writes it."""
    if isinstance(value, list) and value and value[0] == _CONSTANT:
        value = value[2]
    if isinstance(value, list) and value and isinstance(value[0], str):
        return {
            "class_name": "__keras_tensor__",
            "config": {"shape": [], "dtype": "float32", "keras_history": value[:3]},
        }
    if isinstance(value, list):
        return {"class_name": "__numpy__", "config": {"value": value, "dtype": "float32"}}
    return value


def _flipped(spec: list[Any]) -> int:
    """The axis that a slice turns round, as in x[..., ::-1]: it does nothing else."""
    *before, last = spec
    whole = {"start": None, "stop": None, "step": None}
    if last != {**whole, "step": -1} or any(part not in (whole, _ELLIPSIS) for part in before):
        raise _unknown(_SLICE)
    return -1 if _ELLIPSIS in before else len(before)


def _unknown(function: str) -> ModelError:
    return ModelError(
        "operations of TensorFlow that Keras 3 has too",
        got=f"tf.{function} between layers",
        hint=f"export the model to ONNX with the Keras that wrote it, or {RECIPE}",
    )


_CONSTANT, _SLICE, _ELLIPSIS = "_CONSTANT_VALUE", "__operators__.getitem", {"class_name": "__ellipsis__"}
_PLAIN = (("data_format", "NHWC"), ("dtype", "float32"))
_KERNEL = frozenset({"groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"})
_GONE = {
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D", "SeparableConv1D", "SeparableConv2D"), _KERNEL),
    **{f"Conv{n}DTranspose": {"groups"} for n in (1, 2, 3)},
    **{f"SpatialDropout{n}D": {"noise_shape", "trainable"} for n in (1, 2, 3)},
    "MultiHeadAttention": {"query_shape", "key_shape", "value_shape"},
    "BatchNormalization": {"renorm", "renorm_clipping", "renorm_momentum", "virtual_batch_size", "fused", "adjustment"},
}
"""Arguments without effect on the outputs that a layer no longer takes."""
_OFF = frozenset({"time_major", "ragged"})
"""Arguments that no layer takes any more, and that had no effect where they were off."""

_Operator = tuple[str, tuple[str, ...], dict[str, str]]
_REDUCED = {"axis": "axis", "keepdims": "keepdims"}
_OPERATIONS: dict[str, _Operator] = {
    _SLICE: ("Flip", (), {"axis": "axis"}),
    "__operators__.add": ("Add", ("y",), {}),
    "math.add": ("Add", ("y",), {}),
    "nn.bias_add": ("Add", ("bias",), {}),
    "math.subtract": ("Subtract", ("y",), {}),
    "math.multiply": ("Multiply", ("y",), {}),
    "math.truediv": ("TrueDivide", ("y",), {}),
    "math.divide": ("TrueDivide", ("y",), {}),
    "math.pow": ("Power", ("y",), {}),
    "math.maximum": ("Maximum", ("y",), {}),
    "math.minimum": ("Minimum", ("y",), {}),
    "math.negative": ("Negative", (), {}),
    "math.abs": ("Absolute", (), {}),
    "math.square": ("Square", (), {}),
    "math.sqrt": ("Sqrt", (), {}),
    "math.exp": ("Exp", (), {}),
    "math.tanh": ("Tanh", (), {}),
    "math.sigmoid": ("keras.src.ops.nn.Sigmoid", (), {}),
    "nn.relu": ("keras.src.ops.nn.Relu", (), {}),
    "nn.relu6": ("keras.src.ops.nn.Relu6", (), {}),
    "nn.silu": ("keras.src.ops.nn.Silu", (), {}),
    "nn.softmax": ("keras.src.ops.nn.Softmax", (), {"axis": "axis"}),
    "math.reduce_mean": ("Mean", (), _REDUCED),
    "math.reduce_max": ("Max", (), _REDUCED),
    "math.reduce_min": ("Min", (), _REDUCED),
    "math.reduce_sum": ("Sum", (), _REDUCED),
    "concat": ("Concatenate", (), {"axis": "axis"}),
    "cast": ("keras.layers.Identity", (), {}),
}
"""By the function of TensorFlow: the operation of Keras, its further inputs, and its options by their names there."""
