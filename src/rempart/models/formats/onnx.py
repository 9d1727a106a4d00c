"""ONNX files, as torch modules with gradients; what cannot be converted answers through onnxruntime, without them."""

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.model import BlackBox, Classifier, Untraced
from rempart.models.formats import within_limits
from rempart.models.formats.onnx_ops import OPERATORS, Operator, UnsupportedError, layer

MAX_BYTES = 2**31 - 1
"""Size of a file with its external data: what a protobuf holds."""
TOLERANCE = 1e-4
"""Largest difference from onnxruntime, relative to the largest output (or to 1, where that is less).

A network that magnifies rounding may differ by eight times what one step of rounding in its images changes, up to a
hundred times this: the two add in another order, which differs between processors too.
"""

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
_FLOATS = {1: np.float32, 11: np.float64}
_CHANNELS = (1, 3, 4)
_ARITHMETIC = {"Add": "plus", "Sub": "minus", "Mul": "times", "Div": "over"}
_NAMES = ("class_names", "classes", "names", "labels")
_NUMBERED = re.compile(r"([0-9]+)\s*:\s*(.+)")
_FAILURES = (
    *(UnsupportedError, RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError),
    *(OverflowError, NotImplementedError),
)

Run = Callable[[np.ndarray], np.ndarray]


def load_onnx(path: Path) -> Classifier:
    """A network in an `.onnx` file, from images in [0, 1] to logits, probabilities or sigmoids.

    Its operators are turned into torch, one module each, and the outputs compared with those of onnxruntime on seeded
    noise, in [0, 1] and in [0, 255], in two batches of other sizes. Where an operator is unknown or the outputs differ
    by more than `TOLERANCE`, the network stays in onnxruntime, and `core.model.blind` tells so: it gives no gradients.

    A softmax or sigmoid at the end is taken off, and `notes` say so. Images come channels first; the network is given
    them channels last, without an axis for channels, or flat, where its input asks for it. A file for a fixed number of
    images at a time is made to take any number, or else fed in such batches. Class names are read from the metadata, if
    they are there as `class_names`, `classes`, `names` or `labels`: a list or a dictionary by number, as JSON or as
    Python writes them, or words with commas between.

    Raises:
        ModelError: If it is no such file; if it has several inputs or outputs, operators of other makers (whose code
            would have to be loaded), data outside its folder, or is larger than `MAX_BYTES`.
    """
    proto = _read(path)
    source = _input(proto)
    batch, shape = _image(source)
    kind = _FLOATS[source.type.tensor_type.elem_type]
    image, front, told = _arranged(proto.graph, source.name, shape)
    answers = _session(proto, batch, path)
    activation = _without_activation(proto)
    probes = _probes(shape, kind)
    expected = [_answer(answers, probe, path) for probe in probes]
    if any(not np.isfinite(z).all() for z in expected):
        raise ModelError("finite outputs", got=f"NaN or infinity out of {path.name} on noise")
    network = _network(proto, batch, source.name, activation, probes, expected, path)
    classes = max(2, math.prod(expected[0].shape[1:]))
    name = "softmax" if isinstance(activation, nn.Softmax) else "sigmoid"
    off = () if activation is None else (f"The {name} at its end was taken off, so that attacks see logits.",)
    return Classifier(
        nn.Sequential(*front, network),
        shape=image,
        num_classes=classes,
        class_names=_class_names(proto, classes),
        output=None if activation is None else "logits",
        notes=(*told, *off),
    )


class ChannelsLast(nn.Module):
    """Channels from the first axis of an image to the last."""

    def forward(self, x: Tensor) -> Tensor:
        """Move the axis."""
        return x.movedim(1, -1)


class InBatches(Untraced):
    """A network for a fixed number of images at a time, fed with as many; the last batch is filled up."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor) -> Tensor:
        """All images, batch by batch."""
        filled = torch.cat([x, x[-1:].expand(-len(x) % self.size, *x.shape[1:])])
        return torch.cat([self.net(part) for part in filled.split(self.size)])[: len(x)]


class Runtime(BlackBox):
    """A network that runs in onnxruntime."""

    content: Tensor

    def __init__(self, run: Run, dtype: Any, digest: Tensor, reason: str) -> None:
        super().__init__(reason)
        self.run, self.dtype = run, dtype
        self.register_buffer("content", digest)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runtime":
        return Runtime(self.run, self.dtype, self.content.clone(), self.reason)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, without a graph."""
        return torch.from_numpy(self.run(x.detach().cpu().numpy().astype(self.dtype))).to(x)


# ---- reading: nothing outside the folder, nothing of other makers


def _read(path: Path) -> Any:
    """The model of a file with its external data inside."""
    onnx = _package("onnx")
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"at most {MAX_BYTES:,} bytes (MAX_BYTES)", got=f"{path.stat().st_size:,} in {path.name}")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
        if any(node.domain not in _DOMAINS for node in _nodes(proto)):
            proto = _package("onnx.inliner").inline_local_functions(proto)
    except Exception as error:  # noqa: BLE001  protobuf has errors of several kinds
        raise _damaged(path, error) from None
    if other := sorted({f"{node.domain}.{node.op_type}" for node in _nodes(proto) if node.domain not in _DOMAINS}):
        raise ModelError(
            "operators of the ONNX standard",
            got=f"{', '.join(other[:4])} in {path.name}",
            hint="export it again without optimisation by a runtime; code for such operators is never loaded",
        )
    if proto.graph.sparse_initializer:
        raise ModelError("dense weights", got=f"sparse ones in {path.name}", hint="export it again without sparsity")
    _take_in(proto, path)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # noqa: BLE001
        raise _damaged(path, error) from None
    return proto


def _damaged(path: Path, error: Exception) -> ModelError:
    line = (str(error).strip() or "unreadable").split("\n")[0][:200]
    return ModelError("an ONNX model", got=f"{path.name} ({type(error).__name__}: {line})", hint="export it again")


def _package(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        hint = "install them: pip install 'rempart[onnx]'"
        raise ModelError("the packages onnx and onnxruntime, to read .onnx files", got=error, hint=hint) from None


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its operators (branches and loops)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _graphs(inner)


def _nodes(proto: Any) -> Iterator[Any]:
    for graph in _graphs(proto.graph):
        yield from graph.node


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message, wherever it stands: in weights dense or sparse, branches, functions."""
    if hasattr(message, "external_data"):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Sequence) else [value]:
                yield from _tensors(inner)


def _take_in(proto: Any, path: Path) -> None:
    """Read external data out of the folder of the file, and from nowhere else."""
    folder, total = path.parent.resolve(), proto.ByteSize()
    for tensor in _tensors(proto):
        if not tensor.external_data and tensor.data_location == tensor.DEFAULT:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        location = Path(told.get("location", ""))
        place = (folder / location).resolve()
        if location.is_absolute() or ".." in location.parts or not place.is_relative_to(folder) or not place.is_file():
            raise ModelError(
                "external data in a file inside the model's folder", got=f"{str(location)!r} in {path.name}"
            )
        size = place.stat().st_size
        try:
            offset = int(told.get("offset", 0))
            length = int(told.get("length", size - offset))
        except ValueError:
            raise ModelError("numbers that say where external data lie", got=told) from None
        total += length
        if offset < 0 or length < 0 or offset + length > size or total > MAX_BYTES:
            got = f"bytes {offset:,} to {offset + length:,} of {size:,} in {place.name}"
            raise ModelError(f"external data that are there, at most {MAX_BYTES:,} bytes (MAX_BYTES)", got=got)
        with place.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        tensor.ClearField("external_data")
        tensor.data_location = tensor.DEFAULT


def _input(proto: Any) -> Any:
    """The one input beside the weights, where there is one output."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs, outputs = [v for v in proto.graph.input if v.name not in weights], list(proto.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        names = [", ".join(v.name for v in values) or "none" for values in (inputs, outputs)]
        raise ModelError("a network with one input and one output", got=f"inputs {names[0]}; outputs {names[1]}")
    kind = inputs[0].type.tensor_type.elem_type
    if kind not in _FLOATS:
        name = _package("onnx").TensorProto.DataType.Name(kind).lower()
        hint = "export the network with such an input, and with its scaling inside"
        raise ModelError("an input in float32 or float64", got=f"{name} for {inputs[0].name}", hint=hint)
    return inputs[0]


def _image(source: Any) -> tuple[int | None, tuple[int, ...]]:
    """The number of images at a time (None: any) and the shape of one, as the graph has it."""
    dims = [d.dim_value if d.dim_value > 0 else None for d in source.type.tensor_type.shape.dim]
    if not 2 <= len(dims) <= 5 or None in dims[1:]:
        raise ModelError(
            "an input of images of a fixed size: channels and one to three spatial axes, or all pixels flat",
            got=f"{source.name} of shape {tuple('any' if d is None else d for d in dims)}",
            hint="leave only the number of images open: python -m onnxruntime.tools.make_dynamic_shape_fixed",
        )
    shape = tuple(d for d in dims[1:] if d is not None)
    within_limits((dims[0] or 1, *shape))
    return dims[0], shape


def _arranged(
    graph: Any, name: str, shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[nn.Module, ...], tuple[str, ...]]:
    """The shape of an image, channels first, what brings it to the network's own shape, and what is to be said of it.

    Flat pixels are those of a square image where their number allows it, grey or in three colours, one colour after
    the other; a number of their own is one row. Two axes without one for channels are a grey image.
    """
    if len(shape) == 1:
        (pixels,) = shape
        grey, colour = math.isqrt(pixels), math.isqrt(pixels // 3)
        image = (
            (1, grey, grey) if grey**2 == pixels else (3, colour, colour) if 3 * colour**2 == pixels else (1, 1, pixels)
        )
        told = f"Its input of {pixels} values is an image of {'x'.join(map(str, image))}, row by row"
        return image, (nn.Flatten(),), (f"{told}{', one colour after the other' if image[0] == 3 else ''}.",)
    if len(shape) == 2 and not {*shape} & {*_CHANNELS}:
        return (1, *shape), (nn.Flatten(1, 2),), ()
    if _is_channels_last(graph, name, shape):
        return (shape[-1], *shape[:-1]), (ChannelsLast(),), ()
    return tuple(shape), (), ()


def _is_channels_last(graph: Any, name: str, shape: Sequence[int]) -> bool:
    """Whether the first thing that happens is that channels come first; else whether only the last axis can be them."""
    users = [node for node in graph.node if name in node.input]
    forward = [0, len(shape), *range(1, len(shape))]
    if users and all(u.op_type == "Transpose" and list(_attributes(u).get("perm", ())) == forward for u in users):
        return True
    return shape[-1] in _CHANNELS and shape[0] not in _CHANNELS


def _class_names(proto: Any, classes: int) -> tuple[str, ...] | None:
    told = {entry.key.lower(): entry.value for entry in proto.metadata_props}
    for key in _NAMES:
        names = _names(told.get(key, ""))
        if len(names) == classes == len(set(names)) and all(names):
            return names
    return None


def _names(text: str) -> tuple[str, ...]:
    """Names out of a list or a dictionary by number, as JSON or as Python writes them, or of words between commas."""
    told: Any = None
    for read in (json.loads, ast.literal_eval):  # literals alone: nothing is computed
        try:
            told = read(text)
            break
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    if isinstance(told, dict):
        if all(isinstance(number, int) for number in told.values()):  # from names to numbers
            told = {number: name for name, number in told.items()}
        numbered = {str(number): name for number, name in told.items()}
        told = [numbered.get(str(number)) for number in range(len(numbered))]
    elif not isinstance(told, (list, tuple)):
        told = _words(text.strip())
    return tuple(str(name).strip() if isinstance(name, (str, int)) else "" for name in told)


def _words(text: str) -> list[str]:
    """Words between commas or in lines of their own, numbered or not; none where brackets say that it is no such list.

    Numbers are those of YAML and of dictionaries without quotation marks: `0: cat, 1: dog`.
    """
    inner = text[1:-1] if text[:1] + text[-1:] == "{}" else text
    lines = [line.strip() for line in (inner.splitlines() if "\n" in inner else inner.split(","))]
    numbered = {match[1]: match[2] for line in lines if (match := _NUMBERED.fullmatch(line))}
    if len(numbered) == len(lines):
        return [numbered.get(str(number), "") for number in range(len(lines))]
    return [] if text[:1] in ("{", "[") else [line.removeprefix("- ") for line in lines]


def _without_activation(proto: Any) -> nn.Module | None:
    """Cut off a softmax or sigmoid at the end of the graph, and give it back."""
    by_output = {name: node for node in proto.graph.node for name in node.output}
    result = proto.graph.output[0]
    node = by_output.get(result.name)
    while node is not None and node.op_type == "Identity":
        node = by_output.get(node.input[0])
    rank = len(result.type.tensor_type.shape.dim)
    if node is None or node.op_type not in ("Softmax", "Sigmoid") or rank != 2 or node.input[0] not in by_output:
        return None
    if _attributes(node).get("axis", 1) not in (1, -1):  # a softmax over the images of a batch
        return None
    result.name = node.input[0]
    return nn.Softmax(1) if node.op_type == "Softmax" else nn.Sigmoid()


# ---- onnxruntime: what the outputs must be


def _session(proto: Any, batch: int | None, path: Path) -> Run:
    """The outputs of onnxruntime for any number of images, `batch` at a time where the file says so."""
    ort = _package("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  onnxruntime has errors of several kinds
        raise _damaged(path, error) from None
    name = session.get_inputs()[0].name

    def run(x: np.ndarray) -> np.ndarray:
        size = batch or max(1, len(x))
        filled = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])
        parts = [session.run(None, {name: filled[i : i + size]})[0] for i in range(0, len(filled), size)]
        return np.concatenate(parts)[: len(x)]

    return run


def _answer(run: Run, x: np.ndarray, path: Path) -> np.ndarray:
    try:
        z = run(x)
    except Exception as error:  # noqa: BLE001
        raise _damaged(path, error) from None
    if z.dtype.kind != "f" or z.ndim < 2 or len(z) != len(x):
        raise ModelError("outputs of one row per image", got=f"{z.dtype} of shape {z.shape} for {len(x)} images")
    return z


def _probes(shape: Sequence[int], kind: Any) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((2, *shape)).astype(kind), (255 * rng.random((3, *shape))).astype(kind)


# ---- conversion


def _network(
    proto: Any,
    batch: int | None,
    source: str,
    activation: nn.Module | None,
    probes: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    path: Path,
) -> nn.Module:
    """The first that gives the outputs of onnxruntime: for any number of images, for a fixed number, onnxruntime."""
    digest = torch.tensor(list(sha256(proto.SerializeToString(deterministic=True)).digest()), dtype=torch.uint8)
    result = proto.graph.output[0].name
    reason = ""
    for size in (None,) if batch is None else (None, batch):
        try:
            example = np.resize(probes[0], (size or 2, *probes[0].shape[1:]))
            graph = proto if size else _any_number(proto, batch)
            network: nn.Module = Graph(graph, source, result, example, digest)
            network = network if size is None else InBatches(network, size)
        except _FAILURES as error:
            reason = _told(error)
            continue
        if not (reason := _difference(network, activation, probes, expected)):
            return network.eval()
    return Runtime(_session(proto, batch, path), probes[0].dtype, digest, reason)


def _told(error: Exception) -> str:
    line = str(error).strip().split("\n")[0][:200]
    return line if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {line}"


def _difference(
    network: nn.Module, activation: nn.Module | None, probes: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> str:
    """How the outputs differ from those of onnxruntime; empty where they agree."""
    net = network if activation is None else nn.Sequential(network, activation)
    for probe, right in zip(probes, expected, strict=True):
        x, step = torch.from_numpy(probe), float(np.finfo(probe.dtype).eps)
        scale = max(1.0, float(np.abs(right).max()))
        try:
            with torch.no_grad():
                z = net(x)
                if z.shape != right.shape:
                    return f"outputs of shape {tuple(z.shape)} where onnxruntime gives {right.shape}"
                gap = float(np.abs(z.numpy() - right).max()) / scale
                if gap <= TOLERANCE:
                    continue
                rounding = max(float((net(x * (1 + sign * step)) - z).abs().max()) for sign in (-1, 1)) / scale
        except _FAILURES as error:
            return _told(error)
        if not gap <= min(8 * rounding, 100 * TOLERANCE):
            return f"converted to torch its outputs differ from those of onnxruntime by {gap:.2g} of the largest"
    return ""


def _any_number(proto: Any, batch: int | None) -> Any:
    """The same graph where reshaping to a fixed number of images leaves their number open instead."""
    if batch is None:
        return proto
    opened = type(proto)()
    opened.CopyFrom(proto)
    constants = {tensor.name: tensor for tensor in opened.graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in opened.graph.node if n.op_type == "Constant" and n.attribute}
    numpy_helper = _package("onnx.numpy_helper")
    for number, node in enumerate(opened.graph.node):
        told = constants.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        if told is None:
            continue
        shape = numpy_helper.to_array(told).copy()
        if shape.size and shape[0] == batch:
            shape[0] = 0 if -1 in shape[1:] else -1
            node.input[1] = f"shape of {number}"
            opened.graph.initializer.append(numpy_helper.from_array(shape, node.input[1]))
    return opened


def _attributes(node: Any) -> dict[str, Any]:
    helper = _package("onnx.helper")
    return {attribute.name: _value(helper.get_attribute_value(attribute)) for attribute in node.attribute}


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "dims"):
        return _tensor(value)
    if hasattr(value, "node"):
        raise UnsupportedError("an operator with a graph of its own (a branch or a loop)")
    return value


def _tensor(proto: Any) -> Tensor:
    return torch.from_numpy(np.array(_package("onnx.numpy_helper").to_array(proto)))


class Operation(Untraced):
    """One operator with its constants: weights as parameters, other floating numbers as buffers, integers as they are.

    Attributes:
        kind: Its name.
        scaling: What it does to pixels, in words, where it is arithmetic with a few constants.
    """

    def __init__(
        self, kind: str, function: Operator, inputs: Sequence[Tensor | bool | None], attributes: Mapping[str, Any]
    ) -> None:
        """Prepare it; `inputs` are constants, None where left out, True where they come with each call."""
        super().__init__()
        self.kind, self.function, self.attributes, self.scaling = kind, function, dict(attributes), ""
        self.inputs: list[Tensor | bool | str | None] = list(inputs)
        for i, value in enumerate(inputs):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            self.inputs[i] = f"input_{i}"
            if value.numel() == 1 or kind in ("Sub", "Div"):  # biases are added, weights multiplied
                self.register_buffer(f"input_{i}", value)
            else:
                self.register_parameter(f"input_{i}", nn.Parameter(value, requires_grad=True))
            if kind in _ARITHMETIC and i == 1 and value.numel() <= max(_CHANNELS):
                self.scaling = f"{_ARITHMETIC[kind]} {'/'.join(f'{v:.4g}' for v in value.flatten().tolist())}"

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Apply it."""
        given = iter(values)
        inputs = [
            next(given) if value is True else getattr(self, value) if isinstance(value, str) else value
            for value in self.inputs
        ]
        return self.function(*inputs, **self.attributes)


class Graph(nn.Module):
    """An ONNX graph: its operators as modules, in their order. Building it runs it once, on an example."""

    content: Tensor

    def __init__(self, proto: Any, source: str, result: str, example: np.ndarray, digest: Tensor) -> None:
        super().__init__()
        self.register_buffer("content", digest)
        self.source, self.result = source, result
        self.plan: list[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = []
        opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
        needed = _needed(proto.graph.node, result)
        constants: dict[str, Tensor] = {t.name: _tensor(t) for t in proto.graph.initializer if t.name in needed}
        values = {source: torch.from_numpy(example)}
        for number, node in enumerate(proto.graph.node):
            if not needed.intersection(node.output):
                continue
            kind, attributes = node.op_type, _attributes(node)
            outputs = tuple(node.output)
            if kind == "Constant":
                constants[outputs[0]] = _constant(attributes)
                continue
            if kind not in OPERATORS or node.domain not in ("", "ai.onnx"):
                raise UnsupportedError(f"the operator {kind} has no counterpart in torch here")
            moving = tuple(name for name in node.input if name in values)
            fixed = [True if n in values else constants[n] if n else None for n in node.input]
            with torch.no_grad():
                module = None
                if len(moving) == 1 and fixed[0] is True and all(v is not None for v in fixed):
                    module = layer(kind, values[moving[0]], fixed[1:], attributes)  # pyright: ignore
                if module is None:
                    function = OPERATORS[kind]
                    asked = _asked(function)
                    extra = {"opset": opset} if "opset" in asked else {}
                    extra |= {"outputs": len(outputs)} if "outputs" in asked else {}
                    module = Operation(kind, function, fixed, attributes | extra)
                got = module(*(values[name] for name in moving))
            got = got if isinstance(got, tuple) else (got,)
            if len(got) < len(outputs) and needed.intersection(outputs[len(got) :]):
                raise UnsupportedError(f"the operator {kind} with more than one output")
            if moving:
                name = f"{kind}_{number}"
                self.add_module(name, module)
                self.plan.append((name, moving, outputs, ()))
                values |= zip(outputs, got, strict=False)
            else:
                constants |= zip(outputs, got, strict=False)
        if result not in values:
            raise UnsupportedError("the output does not depend on the image")
        last: dict[str, int] = {name: i for i, (_, moving, _, _) in enumerate(self.plan) for name in moving}
        self.plan = [
            (name, moving, outputs, tuple({v for v in moving if last[v] == i and v != result}))
            for i, (name, moving, outputs, _) in enumerate(self.plan)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Run operator by operator; what nobody needs any more is let go."""
        values = {self.source: x}
        for name, inputs, outputs, done in self.plan:
            got = getattr(self, name)(*(values[value] for value in inputs))
            if len(outputs) == 1:
                values[outputs[0]] = got[0] if isinstance(got, tuple) else got
            else:
                values |= zip(outputs, got if isinstance(got, tuple) else (got,), strict=False)
            for value in done:
                del values[value]
        return values[self.result]


def _asked(function: Operator) -> Sequence[str]:
    """The names of a function's arguments; none for those of torch, which have no signature."""
    try:
        return tuple(signature(function).parameters)
    except ValueError:
        return ()


def _needed(nodes: Sequence[Any], result: str) -> set[str]:
    """The values on which the result depends."""
    needed = {result}
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
    return needed


def _constant(attributes: Mapping[str, Any]) -> Tensor:
    (name, value), *_ = attributes.items()
    if name == "value":
        return value
    if name in ("value_int", "value_ints"):
        return torch.tensor(value, dtype=torch.int64)
    if name in ("value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.float32)
    raise UnsupportedError(f"a constant given as {name}")
