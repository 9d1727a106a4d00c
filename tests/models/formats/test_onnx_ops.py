"""Every operator against onnxruntime, on graphs of one node; gradients against finite differences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rempart.models.formats.onnx import Graph
from rempart.models.formats.onnx_ops import MAX_ELEMENTS, OPERATORS, UnsupportedError

DIGEST = torch.zeros(32, dtype=torch.uint8)
RNG = np.random.default_rng(7)


def floats(*shape: int, low: float = -2.0) -> np.ndarray:
    return RNG.uniform(low, 2, shape).astype(np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def single(
    kind: str,
    x: Sequence[int],
    *constants: np.ndarray | None,
    opset: int = 17,
    attributes: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """A graph of one operator on x (and constants), whose number of images is open."""
    names = [f"c{i}" if value is not None else "" for i, value in enumerate(constants)]
    weights = [numpy_helper.from_array(v, f"c{i}") for i, v in enumerate(constants) if v is not None]
    node = helper.make_node(kind, ["x", *names], ["y"], **(attributes or {}))
    source, result = (
        helper.make_tensor_value_info(v, TensorProto.FLOAT, s) for v, s in (("x", ["n", *x]), ("y", None))
    )
    graph = helper.make_graph([node], "g", [source], [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def both(model: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What onnxruntime gives, and what our graph does."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    net = Graph(model, "x", "y", x[:2], DIGEST)
    with torch.no_grad():
        return session.run(["y"], {"x": x})[0], net(torch.from_numpy(x)).numpy()


def case(
    kind: str, x: Sequence[int], *constants: np.ndarray | None, opset: int = 17, low: float = -2.0, **attributes: Any
) -> Any:
    told = ",".join(f"{k}={v}" for k, v in attributes.items())
    return pytest.param(kind, x, constants, opset, low, attributes, id=f"{kind}-{opset}-{len(x)}d-{told}")


CHANNEL = [floats(4), floats(4), floats(4), np.abs(floats(4)) + 0.1]
CASES = [
    *(case(kind, (3, 4)) for kind in ("Abs", "Neg", "Exp", "Relu", "Sigmoid", "Tanh", "Erf", "Softplus", "Softsign")),
    *(
        case(kind, (3, 4))
        for kind in ("Ceil", "Floor", "Round", "Sign", "Sin", "Cos", "Atan", "Identity", "Elu", "Selu")
    ),
    *(case(kind, (3, 4)) for kind in ("HardSigmoid", "LeakyRelu", "Celu", "ThresholdedRelu", "HardSwish", "Dropout")),
    *(case(kind, (3, 4), low=0.1) for kind in ("Log", "Sqrt", "Reciprocal")),
    case("Mish", (3, 4), opset=18),
    case("Elu", (3, 4), alpha=0.3),
    case("Selu", (3, 4), alpha=1.1, gamma=0.7),
    case("HardSigmoid", (3, 4), alpha=0.3, beta=0.4),
    case("LeakyRelu", (3, 4), alpha=0.2),
    case("Celu", (3, 4), alpha=0.5),
    case("Gelu", (3, 4), opset=20),
    case("Gelu", (3, 4), opset=20, approximate="tanh"),
    *(case(kind, (3, 4), floats(3, 1)) for kind in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")),
    *(case(kind, (3, 4), floats(4), floats(1)) for kind in ("Min", "Max", "Sum", "Mean")),
    case("Pow", (3, 4), np.float32(2)),
    case("Pow", (3, 4), floats(4), low=0.1),
    case("PRelu", (4, 3, 3), floats(4, 1, 1)),
    case("Clip", (3, 4), np.float32(-0.5), np.float32(0.7)),
    case("Clip", (3, 4), None, np.float32(0.7)),
    case("Clip", (3, 4), opset=6, min=-0.5, max=0.7),
    *(case(kind, (3, 4), opset=13) for kind in ("Softmax", "LogSoftmax")),
    *(case(kind, (3, 4), opset=13, axis=1) for kind in ("Softmax", "LogSoftmax")),
    *(case(kind, (3, 4), opset=11) for kind in ("Softmax", "LogSoftmax")),
    *(case(kind, (3, 4, 2), opset=11, axis=2) for kind in ("Softmax", "LogSoftmax")),
    case("LpNormalization", (4, 3), axis=1, p=2),
    case("LRN", (6, 5, 5), size=3, alpha=0.3, beta=0.6, bias=1.5),
    # convolutions in one to three dimensions
    case("Conv", (3, 9), floats(4, 3, 3), floats(4), pads=[1, 1]),
    case("Conv", (4, 8, 7), floats(6, 2, 3, 2), floats(6), group=2, strides=[2, 1], pads=[1, 0, 1, 0]),
    case("Conv", (4, 8, 7), floats(6, 4, 3, 2), pads=[0, 1, 1, 0], kernel_shape=[3, 2]),
    case("Conv", (4, 9, 9), floats(4, 1, 3, 3), group=4, dilations=[2, 3], pads=[2, 3, 2, 3]),
    *(
        case("Conv", (2, 8, 7), floats(4, 2, 3, 4), auto_pad=a, strides=[2, 2])
        for a in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    case("Conv", (2, 8, 7), floats(4, 2, 3, 3), auto_pad="SAME_UPPER"),
    case("Conv", (2, 8, 7), floats(4, 2, 2, 2), auto_pad="SAME_LOWER"),
    case("Conv", (2, 5, 6, 4), floats(3, 2, 3, 3, 3), floats(3), pads=[1] * 6),
    case("ConvTranspose", (4, 6), floats(4, 3, 3), floats(3), strides=[2]),
    case("ConvTranspose", (4, 6, 5), floats(4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    case("ConvTranspose", (4, 6, 5), floats(4, 3, 3, 3), floats(6), group=2, pads=[1, 0, 0, 1]),
    case("ConvTranspose", (2, 3, 4, 3), floats(2, 3, 2, 2, 2), strides=[2, 2, 2]),
    # pooling
    case("MaxPool", (3, 9), kernel_shape=[3], strides=[2]),
    case("MaxPool", (3, 8, 7), kernel_shape=[3, 2], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", (3, 8, 7), kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    case("MaxPool", (3, 8, 7), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("MaxPool", (3, 8, 7), kernel_shape=[2, 2], dilations=[2, 3]),
    *(
        case("MaxPool", (3, 8, 7), kernel_shape=[3, 2], strides=[2, 3], auto_pad=a)
        for a in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    case("MaxPool", (3, 4, 5, 4), kernel_shape=[2, 2, 2], strides=[2, 2, 2]),
    case("AveragePool", (3, 9), kernel_shape=[3]),
    case("AveragePool", (3, 8, 7), kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 1]),
    case("AveragePool", (3, 8, 7), kernel_shape=[3, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    case("AveragePool", (3, 8, 7), kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1]),
    case("AveragePool", (3, 8, 7), kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 1], count_include_pad=1),
    case("AveragePool", (3, 8, 7), kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("AveragePool", (3, 7, 7), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    *(case(kind, (3, *[4] * rank)) for kind in ("GlobalAveragePool", "GlobalMaxPool") for rank in (1, 2, 3)),
    # normalisation
    *(case("BatchNormalization", (4, *[3] * rank), *CHANNEL, epsilon=1e-3) for rank in (1, 2, 3)),
    case("BatchNormalization", (4,), *CHANNEL),
    case("BatchNormalization", (4, 3), *CHANNEL, opset=9),
    case("LayerNormalization", (3, 4), *CHANNEL[:2]),
    case("LayerNormalization", (3, 4), floats(3, 4), axis=1, epsilon=1e-2),
    case("InstanceNormalization", (4, 5, 5), *CHANNEL[:2], epsilon=1e-3),
    case("GroupNormalization", (4, 5, 5), floats(2), floats(2), opset=18, num_groups=2),
    case("GroupNormalization", (4, 5, 5), *CHANNEL[:2], opset=21, num_groups=2, epsilon=1e-2),
    # products
    case("Gemm", (4,), floats(4, 5), floats(5)),
    case("Gemm", (4,), floats(5, 4), floats(5), transB=1),
    case("Gemm", (4,), floats(5, 4), floats(1, 5), transB=1, alpha=0.5, beta=2.0),
    case("Gemm", (4,), floats(4, 5)),
    case("MatMul", (3, 4), floats(4, 5)),
    case("Einsum", (3, 4), floats(4, 5), equation="nij,jk->nik"),
    # reductions
    *(
        case(f"Reduce{k}", (3, 4), opset=13, axes=[1, 2], keepdims=0)
        for k in ("Mean", "Max", "Min", "L1", "L2", "Prod")
    ),
    *(
        case(f"Reduce{k}", (3, 4), whole(-1), opset=18)
        for k in ("Mean", "Max", "Min", "L2", "LogSumExp", "SumSquare", "Prod")
    ),
    case("ReduceSum", (3, 4), whole(2), keepdims=0),
    case("ReduceSum", (3, 4), noop_with_empty_axes=1),
    case("ReduceSum", (3, 4), opset=11, axes=[1]),
    case("ReduceMean", (3, 4), whole(1, 2), opset=18, keepdims=0),
    # shapes
    case("Flatten", (3, 4)),
    case("Flatten", (3, 4), axis=2),
    case("Flatten", (3, 4), axis=-1),
    case("Reshape", (3, 4), whole(0, 2, -1)),
    case("Reshape", (3, 4), whole(-1, 12)),
    case("Transpose", (3, 4), perm=[0, 2, 1]),
    case("Squeeze", (1, 4), whole(1)),
    case("Squeeze", (1, 4), opset=11, axes=[1]),
    case("Unsqueeze", (3, 4), whole(1, -1)),
    case("Unsqueeze", (3, 4), opset=11, axes=[1, 4]),
    case("Concat", (3, 4), axis=1),
    case("Slice", (5, 6), whole(1, -3), whole(4, 6), whole(1, 2)),
    case("Slice", (5, 6), whole(0), whole(2**62), whole(2), whole(2)),
    case("Slice", (5, 6), whole(-1), whole(-(2**62)), whole(1), whole(-2)),
    case("Slice", (5, 6), opset=9, starts=[1], ends=[3], axes=[2]),
    case("Gather", (5, 6), whole(2, -1), axis=1),
    case("Gather", (5, 6), np.int64(-2), axis=2),
    case("Gather", (5, 6), np.array([[0, 1], [4, 2]]), axis=1),
    case("Expand", (1, 4), whole(1, 3, 1)),
    case("Tile", (3, 4), whole(1, 2, 1)),
    case("Pad", (3, 4, 5), whole(0, 0, 1, 2, 0, 0, 0, 1)),
    case("Pad", (3, 4, 5), whole(0, 0, 1, 2, 0, 0, 0, 1), np.float32(1.5), mode="constant"),
    case("Pad", (3, 4, 5), whole(0, 0, 1, -1, 0, 0, 0, 1)),
    *(case("Pad", (3, 4, 5), whole(0, 0, 1, 2, 0, 0, 0, 1), mode=mode) for mode in ("reflect", "edge")),
    case("Pad", (3, 4), whole(1, 2), np.float32(0.5), whole(2), opset=18),
    case("Pad", (3, 4), opset=9, pads=[0, 0, 1, 0, 1, 0], value=0.3),
    case("DepthToSpace", (8, 2, 3), blocksize=2),
    case("DepthToSpace", (8, 2, 3), blocksize=2, mode="CRD"),
    case("SpaceToDepth", (2, 4, 6), blocksize=2),
    # resizing
    *(
        case("Resize", (2, 5, 4), None, np.array([1, 1, r, 1.3], np.float32), coordinate_transformation_mode=c, mode=m)
        for r in (2, 0.6)
        for m in ("nearest", "linear", "cubic")
        for c in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    ),
    *(
        case("Resize", (2, 5, 4), None, None, whole(1, 2, 7, 3), nearest_mode=m, coordinate_transformation_mode=c)
        for m in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
        for c in ("asymmetric", "half_pixel")
    ),
    case("Resize", (2, 5, 4), None, None, whole(7, 3), opset=18, axes=[2, 3], mode="linear"),
    case("Resize", (2, 5, 4), np.array([1, 1, 2, 2], np.float32), opset=10),
    case("Upsample", (2, 5, 4), np.array([1, 1, 2, 3], np.float32), opset=9),
]


@pytest.mark.parametrize(("kind", "shape", "constants", "opset", "low", "attributes"), CASES)
def test_operator(
    kind: str, shape: Sequence[int], constants: Any, opset: int, low: float, attributes: dict[str, Any]
) -> None:
    n = 1 if kind == "Resize" and len(constants) == 3 and len(constants[2]) == 4 else 3
    right, ours = both(single(kind, shape, *constants, opset=opset, attributes=attributes), floats(n, *shape, low=low))
    assert ours.dtype == right.dtype
    np.testing.assert_allclose(ours, right, rtol=1e-5, atol=2e-5)


def test_a_flaw_in_an_operator_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above tells the two normalisations of resizing apart, which agree on most pixels."""
    model = single("Resize", (2, 5, 4), None, np.array([1, 1, 2, 2], np.float32), attributes={"mode": "linear"})
    monkeypatch.setattr(
        "rempart.models.formats.onnx_ops._positions",
        lambda new, old, scale, mode: torch.arange(new, dtype=torch.float64) / scale,
    )
    right, ours = both(model, floats(3, 2, 5, 4))
    assert np.abs(right - ours).max() > 1e-2


COMPARED = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]


@pytest.mark.parametrize("kind", COMPARED)
def test_comparisons_and_where(kind: str) -> None:
    before = [helper.make_node(kind, ["x", "c0"], ["b"]), helper.make_node("Not", ["b"], ["nb"])]
    before += [helper.make_node(op, ["b", "nb"], [op]) for op in ("And", "Or", "Xor")]
    before += [helper.make_node("Cast", [op], [f"f{op}"], to=1) for op in ("And", "Or", "Xor")]
    before += [
        helper.make_node("Sum", ["fAnd", "fOr", "fXor"], ["s"]),
        helper.make_node("Where", ["b", "s", "c1"], ["w"]),
    ]
    x = np.round(floats(3, 4, 4))
    right, ours = both(_chain(before, np.round(floats(4)), floats(4)), x)
    np.testing.assert_array_equal(ours, right)


def _chain(nodes: Sequence[Any], *constants: np.ndarray, opset: int = 17) -> onnx.ModelProto:
    """Nodes that end in w, and an identity from there."""
    weights = [numpy_helper.from_array(v, f"c{i}") for i, v in enumerate(constants)]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 4])
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [source],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_shapes_computed_from_the_images() -> None:
    """What exporters write for x.view(len(x), -1): the shape taken apart and put together again, in integers."""
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Unsqueeze", ["n", "axis"], ["n1"]),
        node("Size", ["x"], ["size"]),
        node("Div", ["size", "n"], ["rest"]),
        node("Mod", ["rest", "larger"], ["rest1"]),
        node("Unsqueeze", ["rest1", "axis"], ["rest2"]),
        node("Concat", ["n1", "rest2"], ["to"], axis=0),
        node("Reshape", ["x", "to"], ["flat"]),
        node("ConstantOfShape", ["to"], ["ones"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])),
        node("Range", ["zero", "large", "step"], ["r"]),
        node("Cast", ["r"], ["rf"], to=TensorProto.FLOAT),
        node("Add", ["flat", "ones"], ["a"]),
        node("Add", ["a", "rf"], ["b"]),
        node("CastLike", ["b", "x"], ["w"]),
    ]
    model = _chain(nodes)
    for name, value in {"zero": 0, "large": 16, "step": 1, "larger": 17, "axis": [0]}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    right, ours = both(model, floats(5, 4, 4))
    np.testing.assert_allclose(ours, right, atol=1e-6)


@pytest.mark.parametrize(
    ("opset", "attributes", "sizes"),
    [
        (17, {"axis": 1}, whole(1, 3)),
        (11, {"axis": 1, "split": [1, 3]}, None),
        (18, {"axis": 1, "num_outputs": 2}, None),
    ],
)
def test_split(opset: int, attributes: dict[str, Any], sizes: np.ndarray | None) -> None:
    inputs = ["x"] if sizes is None else ["x", "c0"]
    nodes = [
        helper.make_node("Split", inputs, ["a", "b"], **attributes),
        helper.make_node("Concat", ["b", "a"], ["w"], axis=1),
    ]
    right, ours = both(_chain(nodes, *([] if sizes is None else [sizes]), opset=opset), floats(3, 4, 4))
    np.testing.assert_array_equal(ours, right)


def test_argmax_and_gather_elements() -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["top"], axis=1),
        helper.make_node("ArgMin", ["x"], ["low"], axis=1),
        helper.make_node("GatherElements", ["x", "top"], ["a"], axis=1),
        helper.make_node("GatherElements", ["x", "low"], ["b"], axis=1),
        helper.make_node("Sub", ["a", "b"], ["w"]),
    ]
    right, ours = both(_chain(nodes), floats(3, 4, 4))
    np.testing.assert_array_equal(ours, right)
    assert (ours > 0).all()


def test_every_operator_is_tested() -> None:
    chained = {"ArgMax", "ArgMin", "GatherElements", "Split", "Shape", "Size", "Mod", "ConstantOfShape", "Range"}
    chained |= {"Cast", "CastLike", "And", "Or", "Not", "Xor", "Where", *COMPARED}
    tested = chained | {parameters.values[0] for parameters in CASES}
    assert set(OPERATORS) - tested == {"Swish"}, "of opset 24, which onnxruntime does not run yet"


@pytest.mark.parametrize(
    ("kind", "shape", "constants", "attributes"),
    [
        ("Resize", (2, 5, 4), (None, np.array([1, 1, 2, 1.3], np.float32)), {"mode": "cubic"}),
        ("Conv", (2, 6, 6), (floats(3, 2, 3, 3),), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("AveragePool", (2, 6, 6), (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
        ("BatchNormalization", (4, 3, 3), CHANNEL, {}),
        ("InstanceNormalization", (4, 3, 3), CHANNEL[:2], {}),
        ("Gemm", (4,), (floats(5, 4), floats(5)), {"transB": 1}),
        ("HardSigmoid", (3, 4), (), {"alpha": 0.1}),
        ("Selu", (3, 4), (), {}),
        ("LpNormalization", (4, 3), (), {"axis": 1}),
    ],
)
def test_gradients_are_finite_differences(
    kind: str, shape: Sequence[int], constants: Any, attributes: dict[str, Any]
) -> None:
    model = single(kind, shape, *constants, attributes=attributes)
    net = Graph(model, "x", "y", floats(2, *shape), DIGEST).double().requires_grad_(False)
    x = torch.from_numpy(floats(2, *shape)).double().requires_grad_(True)
    assert torch.autograd.gradcheck(net, (x,))


def test_layers_are_modules_that_the_rest_knows() -> None:
    kinds = {
        "Conv": ((2, 6, 6), (floats(3, 2, 3, 3),), {}, nn.Conv2d),
        "BatchNormalization": ((4, 3, 3), tuple(CHANNEL), {}, nn.BatchNorm2d),
        "Relu": ((4,), (), {}, nn.ReLU),
        "MaxPool": ((2, 6), (), {"kernel_shape": [2]}, nn.MaxPool1d),
        "Gemm": ((4,), (floats(4, 5),), {}, nn.Linear),
        "GlobalAveragePool": ((2, 4, 4, 4), (), {}, nn.AdaptiveAvgPool3d),
    }
    for kind, (shape, constants, attributes, expected) in kinds.items():
        net = Graph(single(kind, shape, *constants, attributes=attributes), "x", "y", floats(2, *shape), DIGEST)
        assert [type(module) for module in net.children()] == [expected]


@pytest.mark.parametrize(
    ("kind", "constants", "attributes", "what"),
    [
        ("Det", (), {}, "no counterpart"),
        ("Cast", (), {"to": 12}, "type 12"),
        ("Expand", (whole(2**26, 2, 4, 4),), {}, f"more than {MAX_ELEMENTS:,}"),
        ("Tile", (whole(1, 2**20, 2**20),), {}, f"more than {MAX_ELEMENTS:,}"),
        ("Pad", (whole(0, 0, 0, 0, 2**20, 2**20),), {}, f"more than {MAX_ELEMENTS:,}"),
        ("Resize", (None, np.array([1, 1e5, 1e5], np.float32)), {}, f"more than {MAX_ELEMENTS:,}"),
    ],
)
def test_what_is_not_there_is_told(kind: str, constants: Any, attributes: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        Graph(single(kind, (4, 4), *constants, attributes=attributes), "x", "y", floats(2, 4, 4), DIGEST)
