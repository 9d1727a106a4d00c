"""ONNX files: the logits and gradients of the network they came from, or a refusal, or answers without gradients."""

import copy
import json
import os
import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import rempart
import rempart.models.formats.onnx as module
from rempart.attacks import attack_batch
from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Normalize, accelerated, blind, frozen
from rempart.core.threat import Threat
from rempart.data import open_data
from rempart.inspection import inspect_model
from rempart.models import card, load
from rempart.models.formats.onnx import InBatches, Runtime
from rempart.report.schema import AttackChoice, AuditSpec

SHAPE = (1, 8, 8)


def images(n: int = 5, shape: Sequence[int] = SHAPE) -> torch.Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network()


def network(classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3)]
        made = nn.Sequential(*body, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
        made(images(64))  # moves the statistics of batch norm away from 0 and 1
    return made.eval()


def export(net: nn.Module, path: Path, *, opset: int = 17, batch: int | None = None, **more: Any) -> Path:
    axes = {} if batch else {"x": {0: "n"}, "y": {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(), (images(batch or 2),), str(path), dynamo=False, input_names=["x"], output_names=["y"],
            dynamic_axes=axes, opset_version=opset, **more,
        )  # fmt: skip
    return path


def gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_(True)
    with frozen(model):
        z = model(x)
        (slope,) = torch.autograd.grad((z * torch.linspace(-1, 2, z.shape[1])).sum(), x)
    return slope


def edited(path: Path, change: Any) -> Path:
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, path)
    return path


# ---- the same network


@pytest.mark.parametrize("opset", range(13, 21))
def test_logits_and_gradients_are_those_of_the_network(net: nn.Module, tmp_path: Path, opset: int) -> None:
    model = load(str(export(net, tmp_path / "net.onnx", opset=opset)))
    assert (model.shape, model.num_classes, model.output, blind(model)) == (SHAPE, 4, None, None)
    assert not model.training
    torch.testing.assert_close(model(images()), net(images()), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient(model, images()), gradient(net, images()), atol=1e-6, rtol=1e-4)


def test_batch_norm_that_was_not_folded_is_folded_for_attacks(net: nn.Module, tmp_path: Path) -> None:
    path = export(net, tmp_path / "net.onnx", training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    model = load(str(path))
    fast = accelerated(model, images())
    assert "BatchNormalization" in kinds
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    torch.testing.assert_close(fast(images()), net(images()), atol=1e-6, rtol=1e-4)
    told = card(model, str(path))
    assert (told.name, told.parameters) == ("net", sum(p.numel() for p in net.parameters()))


@pytest.mark.slow
def test_the_exporter_by_torch_export(net: nn.Module, tmp_path: Path) -> None:
    path, shapes = tmp_path / "net.onnx", ({0: torch.export.Dim("n")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (images(2),), str(path), dynamo=True, external_data=True, dynamic_shapes=shapes)
    assert (tmp_path / "net.onnx.data").exists()
    model = load(str(path))
    assert blind(model) is None
    torch.testing.assert_close(model(images()), net(images()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("last", "outputs"), [(nn.Softmax(1), 4), (nn.Sigmoid(), 1), (nn.Sigmoid(), 4)], ids=str)
def test_an_activation_at_the_end_is_taken_off_and_told(last: nn.Module, outputs: int, tmp_path: Path) -> None:
    raw = network(outputs)
    path = export(nn.Sequential(raw, last), tmp_path / "net.onnx")
    model = load(str(path))
    name = type(last).__name__.lower()
    assert (model.output, model.notes) == (
        "logits",
        (f"The {name} at its end was taken off, so that attacks see logits.",),
    )
    z = raw(images())
    z = torch.cat([torch.zeros_like(z), z], 1) if outputs == 1 else z
    torch.testing.assert_close(model(images()), z, atol=1e-6, rtol=1e-5)
    assert load(str(export(raw, path))).notes == ()


def test_a_softmax_that_is_not_the_last_step_stays(tmp_path: Path) -> None:
    raw = network()
    model = load(str(export(nn.Sequential(raw, nn.Softmax(1), nn.Linear(4, 3)), tmp_path / "net.onnx")))
    assert model.notes == () and model.num_classes == 3


def test_a_softmax_over_the_images_of_a_batch_is_not_taken_off(tmp_path: Path) -> None:
    """It is no step of one image: the audit finds that an image's answer depends on those beside it."""
    proto = dense(["n", *SHAPE])
    proto.graph.node[1].output[0] = "z"
    proto.graph.node.append(helper.make_node("Softmax", ["z"], ["y"], axis=0))
    path = written(proto, tmp_path / "net.onnx")
    w = torch.from_numpy(numpy_helper.to_array(proto.graph.initializer[0]).copy())
    model = load(path)
    assert model.notes == ()
    torch.testing.assert_close(model.net(images()), (images().flatten(1) @ w).softmax(0))
    assert "do not depend on the other images" in str(inspect_model(path).problem)


def simple(
    nodes: Sequence[Any], shape: Sequence[int | str], weights: dict[str, np.ndarray], **more: Any
) -> onnx.ModelProto:
    kind = more.get("kind", TensorProto.FLOAT)
    source = helper.make_tensor_value_info("x", kind, shape)
    result = helper.make_tensor_value_info("y", kind, [shape[0], more.get("classes", 3)])
    held = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [source], [result], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def dense(shape: Sequence[int | str], classes: int = 3, seed: int = 0) -> onnx.ModelProto:
    """Flatten, Gemm: logits W x."""
    size = int(np.prod([int(s) for s in shape[1:]]))
    w = np.random.default_rng(seed).normal(size=(size, classes)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"])]
    return simple(nodes, shape, {"w": w}, classes=classes)


def written(proto: onnx.ModelProto, path: Path) -> str:
    onnx.save(proto, path)
    return str(path)


@pytest.mark.parametrize("first", ["transpose", "scale"])
def test_inputs_with_channels_last(first: str, tmp_path: Path) -> None:
    """Two pixels high, five wide: as TensorFlow writes them; images are given channels first all the same."""
    rng = np.random.default_rng(0)
    w, v = rng.normal(size=(4, 3, 2, 2)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"], auto_pad="SAME_UPPER"),
        helper.make_node("Transpose", ["c"], ["back"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", ["back"], ["p"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    if first == "transpose":
        nodes = nodes[1:]
        nodes[0].input[0] = "x"
    model = load(written(simple(nodes, ["n", 2, 5, 3], {"w": w, "v": v, "s": np.float32([0.5])}), tmp_path / "a.onnx"))
    assert model.shape == (3, 2, 5)
    x = images(4, (3, 2, 5))
    scaled = x if first == "transpose" else 0.5 * x
    maps = torch.conv2d(torch.nn.functional.pad(scaled, (0, 1, 0, 1)), torch.from_numpy(w))
    torch.testing.assert_close(model(x), maps.mean((2, 3)) @ torch.from_numpy(v))


def test_a_transpose_tells_channels_last_where_the_sizes_do_not(tmp_path: Path) -> None:
    proto = dense(["n", 3, 4, 3])
    proto.graph.node.insert(0, helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]))
    proto.graph.node[1].input[0] = "t"
    assert load(written(proto, tmp_path / "a.onnx")).shape == (3, 3, 4)
    assert load(written(dense(["n", 3, 4, 3]), tmp_path / "b.onnx")).shape == (3, 4, 3)


class _Fixed(nn.Module):
    """Reshapes to as many images as it was exported for."""

    def __init__(self, net: nn.Module, n: int) -> None:
        super().__init__()
        self.net, self.n = net, n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.reshape(self.n, 2, 4, 8).reshape(self.n, *SHAPE))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_number_of_images_is_opened(net: nn.Module, tmp_path: Path, batch: int) -> None:
    path = export(_Fixed(net, batch), tmp_path / "net.onnx", batch=batch)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch
    model = load(str(path))
    assert blind(model) is None and not any(isinstance(m, InBatches) for m in model.modules())
    torch.testing.assert_close(model(images()), net(images()), atol=1e-6, rtol=1e-5)


def test_a_number_of_images_that_cannot_be_opened_is_kept(net: nn.Module, tmp_path: Path) -> None:
    """Channels of zeros are put beside four images: no other number fits them."""
    w = np.random.default_rng(0).normal(size=(8 * 8 * 2, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Concat", ["x", "zeros"], ["two"], axis=1),
        helper.make_node("Flatten", ["two"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["y"]),
    ]
    proto = simple(nodes, [4, *SHAPE], {"w": w, "zeros": np.zeros((4, *SHAPE), np.float32)})
    model = load(written(proto, tmp_path / "a.onnx"))
    assert blind(model) is None and any(isinstance(m, InBatches) for m in model.modules())
    for n in (1, 4, 6):
        expected = images(n).flatten(1) @ torch.from_numpy(w[:64])
        torch.testing.assert_close(model(images(n)), expected)
        torch.testing.assert_close(
            gradient(model, images(n))[0].flatten(), torch.from_numpy(w[:64]) @ torch.linspace(-1, 2, 3)
        )


@pytest.mark.parametrize("key", ["class_names", "names", "labels"])
def test_class_names_out_of_the_metadata(key: str, tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    helper.set_model_props(proto, {key: json.dumps(["a", "b", "c"]), "classes": "x, y"})
    assert load(written(proto, tmp_path / "a.onnx")).class_names == ("a", "b", "c")
    helper.set_model_props(proto, {key: "a, b ,c"})
    assert load(written(proto, tmp_path / "a.onnx")).class_names == ("a", "b", "c")
    helper.set_model_props(proto, {key: "{0: a, 1: b, 2: c}"})
    assert load(written(proto, tmp_path / "a.onnx")).class_names == ("a", "b", "c")
    helper.set_model_props(proto, {key: "a, b"})
    assert load(written(proto, tmp_path / "a.onnx")).class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    "text",
    [
        "{0: 'zebra', 1: \"bird's, nest\", 2: 'melon'}",  # as Ultralytics writes them
        "{2: 'melon', 0: 'zebra', 1: \"bird's, nest\"}",
        '{"2": "melon", "0": "zebra", "1": "bird\'s, nest"}',
        '{"melon": 2, "zebra": 0, "bird\'s, nest": 1}',  # from names to numbers
        "['zebra', \"bird's, nest\", 'melon']",
        "('zebra', \"bird's, nest\", 'melon')",
        "zebra\nbird's, nest\nmelon\n",
        "0: zebra\n1: bird's, nest\n2: melon\n",  # as YAML has them
        "- zebra\n- bird's, nest\n- melon",
    ],
)
@pytest.mark.parametrize("key", ["names", "Classes"])
def test_class_names_as_dictionaries_and_lists_of_python_and_json(key: str, text: str, tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    helper.set_model_props(proto, {"task": "classify", key: text})
    assert load(written(proto, tmp_path / "a.onnx")).class_names == ("zebra", "bird's, nest", "melon")


@pytest.mark.parametrize(
    "text",
    [
        "{0: 'a', 1: 'b'}",
        "{0: 'a', 1: 'b', 3: 'c'}",
        "['a', 'b', None]",
        "a, a, b",
        "[" * 9999,
        "{'a', 'b', 'c'}",  # a set has no order
        "['a', b, c",
        "0: a, 1: b, 3: c",
        "[open('x', 'w'), 1, 2]",
    ],
)
def test_other_names_are_left_and_nothing_is_computed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    proto = dense(["n", *SHAPE])
    helper.set_model_props(proto, {"names": text})
    assert load(written(proto, tmp_path / "a.onnx")).class_names == ("0", "1", "2")
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("pixels", "shape"), [(64, (1, 8, 8)), (75, (3, 5, 5)), (10, (1, 1, 10)), (784, (1, 28, 28)), (3072, (3, 32, 32))]
)
@pytest.mark.parametrize("batch", ["n", 1])
def test_flat_pixels_are_those_of_a_square_image(
    pixels: int, shape: tuple[int, ...], batch: int | str, tmp_path: Path
) -> None:
    """Three colours where only they make squares: no number is both a square and three times one."""
    w = np.random.default_rng(0).standard_normal((pixels, 3), np.float32)
    proto = simple([helper.make_node("MatMul", ["x", "w"], ["y"])], [batch, pixels], {"w": w})
    model = load(written(proto, tmp_path / "a.onnx"))
    assert model.shape == shape
    assert f"input of {pixels} values is an image of {'x'.join(map(str, shape))}" in model.notes[0]
    x = images(4, shape)
    torch.testing.assert_close(model(x), x.flatten(1) @ torch.from_numpy(w))
    assert torch.allclose(gradient(model, x)[0].flatten(), torch.from_numpy(w) @ torch.linspace(-1, 2, 3), atol=1e-5)


@pytest.mark.parametrize(("side", "shape"), [((6, 5), (1, 6, 5)), ((1, 9), (1, 9)), ((9, 3), (3, 9))])
def test_two_axes_without_one_for_channels_are_a_grey_image(
    side: tuple[int, int], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """With an axis of one, three or four it is a signal with such channels."""
    w = np.random.default_rng(0).standard_normal((side[0] * side[1], 3), np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    model = load(written(simple(nodes, ["n", *side], {"w": w}), tmp_path / "a.onnx"))
    assert model.shape == shape
    x = images(4, shape)
    inside = x.movedim(1, -1) if shape == (3, 9) else x
    torch.testing.assert_close(model(x), inside.flatten(1) @ torch.from_numpy(w))


def test_the_digest_knows_the_graph_and_not_only_the_weights(tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    one = card(load(written(proto, tmp_path / "a.onnx")), "a.onnx")
    proto.graph.node[0].op_type = "Reshape"
    proto.graph.node[0].input.append("to")
    proto.graph.initializer.append(numpy_helper.from_array(np.array([-1, 64]), "to"))
    other = card(load(written(proto, tmp_path / "a.onnx")), "a.onnx")
    assert one.digest != other.digest and one.parameters == other.parameters


def test_weights_in_double_precision(tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(64, 3))
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    model = load(written(simple(nodes, ["n", *SHAPE], {"w": w}, kind=TensorProto.DOUBLE), tmp_path / "a.onnx"))
    x = images().double()
    torch.testing.assert_close(model(x), x.flatten(1) @ torch.from_numpy(w))


# ---- without gradients


def shrunk(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With an operator that onnxruntime knows and we do not, which changes nothing: Shrink by 0."""
    proto.graph.node[0].input[0] = "same"
    proto.graph.node.insert(0, helper.make_node("Shrink", ["x"], ["same"], bias=0.0, lambd=0.0))
    return proto


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A linear classifier of the digits by least squares, in a file that cannot be converted."""
    data = open_data("digits:train")
    x = np.concatenate([data.read(data.index).flatten(1).numpy(), np.ones((len(data), 1))], 1)
    w = np.linalg.lstsq(x, np.eye(10)[data.labels], rcond=None)[0].astype(np.float32)
    proto = shrunk(dense(["n", *SHAPE], 10))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(20 * w[:64], "w"))
    proto.graph.initializer.append(numpy_helper.from_array(20 * w[64], "b"))
    proto.graph.node[-1].input.append("b")
    return written(proto, tmp_path_factory.mktemp("solved") / "digits.onnx")


def test_an_unknown_operator_leaves_the_network_in_onnxruntime(tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    w = torch.from_numpy(numpy_helper.to_array(proto.graph.initializer[0]).copy())
    model = load(written(shrunk(proto), tmp_path / "a.onnx"))
    assert "Shrink" in str(blind(model))
    z = copy.deepcopy(model)(images().requires_grad_(True))
    assert not z.requires_grad
    torch.testing.assert_close(z, images().flatten(1) @ w)
    assert (
        card(model, "a.onnx").digest
        != card(load(written(shrunk(dense(["n", *SHAPE], seed=1)), tmp_path / "b.onnx")), "").digest
    )


def test_a_conversion_that_gives_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("ReduceMean", ["e"], ["m"], axes=[1, 2], keepdims=0),
    ]
    path = written(
        simple(
            [*nodes, helper.make_node("MatMul", ["m", "w"], ["y"])],
            ["n", *SHAPE],
            {"w": np.ones((8, 3), np.float32) / 9},
        ),
        tmp_path / "a.onnx",
    )
    scaled = edited(Path(path), lambda p: p.graph.node.insert(0, helper.make_node("Tanh", ["x"], ["t"])))
    edited(scaled, lambda p: p.graph.node[1].input.__setitem__(0, "t"))
    assert blind(load(path)) is None
    monkeypatch.setattr(module, "OPERATORS", {**module.OPERATORS, "Exp": lambda x: torch.exp(x) * 1.001})
    assert "differ from those of onnxruntime by 0.001" in str(blind(load(path)))


def test_rounding_that_a_network_magnifies_is_no_difference() -> None:
    """The sine of a sum near 17,000, in float32 and in float64, which differ by more than `TOLERANCE`."""
    probe = 255 * np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)

    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(2 * x.flatten(1).sum(1, keepdim=True))

    total = 2 * probe.astype(np.float64).reshape(5, -1).sum(1, keepdims=True)
    assert np.abs(Sine()(torch.from_numpy(probe)).numpy() - np.sin(total)).max() > module.TOLERANCE
    assert module._difference(Sine(), None, [probe], [np.sin(total)]) == ""
    for wrong in (np.cos(total), np.sin(total) + 0.02, np.full_like(total, np.nan)):
        assert "differ from" in module._difference(Sine(), None, [probe], [wrong])


def test_an_audit_without_gradients_says_so(solved: str) -> None:
    report = rempart.run(AuditSpec(model=solved, data="digits[:20]", threat="linf:0.3", chunk=20))
    assert report.clean is not None and report.clean.value >= 0.9
    assert [attack.label for attack in report.attacks] == ["square", "hopskipjump"]
    assert report.worst_case is not None and report.worst_case.value <= 0.1
    (told,) = [check for check in report.preflight if check.name == "gradients"]
    assert told.status == "warned" and "Shrink" in told.message
    assert report.stamp == "suspicious"
    assert any("stand in for the suite fast" in note for note in report.notes)
    assert not any("sweep" in curve.label for curve in report.curves)
    status = {check.name: check.status for check in report.checks}
    assert status["randomness"] == "passed" and status["zero gradients"] == status["large budgets"] == "skipped"


def test_an_inspection_without_gradients_says_so(solved: str) -> None:
    found = inspect_model(solved, data="digits[:4]")
    status = {check.name: check.status for check in found.checks}
    assert found.problem is None and status["gradients"] == "warned" and "finite differences" not in status


def test_an_inspection_finds_the_normalisation(tmp_path: Path) -> None:
    model = nn.Sequential(Normalize([0.25], [0.5]), network())
    found = inspect_model(str(export(model, tmp_path / "net.onnx")))
    assert found.normalisation == ("minus 0.25", "over 0.5")
    assert [layer.kind for layer in found.layers[:3]] == ["Sub", "Div", "Conv2d"]


def test_attacks_that_climb_gradients_are_refused(solved: str) -> None:
    choice = (AttackChoice(name="square", options={"queries": 5}), AttackChoice(name="pgd"))
    with pytest.raises(ModelError, match=r"gradients for pgd.*Shrink.*use hopskipjump, square"):
        rempart.run(AuditSpec(model=solved, data="digits[:8]", threat="linf:0.1", attacks=choice))
    model, data = load(solved), open_data("digits[:8]")
    with pytest.raises(ModelError, match="gradients for fgsm"):
        attack_batch(model, data.read(data.index), data.labels, Threat.parse("linf:0.1"), "fgsm")
    twin = load(solved)
    twin.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    found = attack_batch(model, data.read(data.index), data.labels, Threat.parse("linf:0.3"), "fgsm", search=twin)
    assert found.gradients, "a surrogate with gradients may be climbed"


# ---- refusals


def refused(proto: onnx.ModelProto, path: Path, match: str) -> None:
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=match):
        load(str(path))


def test_several_inputs_or_outputs(tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    proto.graph.output.append(helper.make_tensor_value_info("f", TensorProto.FLOAT, ["n", 64]))
    refused(proto, tmp_path / "a.onnx", r"one input and one output, got inputs x; outputs y, f")
    proto = dense(["n", *SHAPE])
    proto.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", 3]))
    refused(proto, tmp_path / "a.onnx", r"inputs x, other")


def test_weights_that_are_listed_as_inputs_are_none(tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 3]))
    assert load(written(proto, tmp_path / "a.onnx")).num_classes == 3


def test_inputs_that_are_no_images(tmp_path: Path) -> None:
    for shape in (["n", "pixels"], ["n", 1, "h", "w"], ["n", 1, 2, 2, 2, 2]):
        proto = simple([helper.make_node("Flatten", ["x"], ["y"])], shape, {})
        refused(proto, tmp_path / "a.onnx", "of a fixed size")
    proto = simple([helper.make_node("Flatten", ["x"], ["y"])], ["n", *SHAPE], {}, kind=TensorProto.UINT8)
    refused(proto, tmp_path / "a.onnx", "an input in float32 or float64, got uint8 for x")


def test_images_that_fit_no_memory(tmp_path: Path) -> None:
    pool = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), helper.make_node("Flatten", ["p"], ["y"])]
    for shape in (["n", 3, 60_000, 60_000], [10**9, 3, 8, 8]):
        refused(simple(pool, shape, {}), tmp_path / "a.onnx", "MAX_VOXELS")


def test_operators_of_other_makers(tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    proto.graph.node[0].domain = "evil.ops"
    proto.opset_import.append(helper.make_opsetid("evil.ops", 1))
    refused(proto, tmp_path / "a.onnx", r"operators of the ONNX standard, got evil.ops.Flatten")


def test_operators_of_other_makers_inside_a_branch(tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    inner = helper.make_node("Flatten", ["x"], ["f1"], domain="com.microsoft")
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("f1", 1, None)])
    proto.graph.node[0].CopyFrom(helper.make_node("If", ["yes"], ["f"], then_branch=branch, else_branch=branch))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    refused(proto, tmp_path / "a.onnx", "com.microsoft.Flatten")


def test_functions_of_the_model_itself_are_taken_in(tmp_path: Path) -> None:
    proto = dense(["n", *SHAPE])
    body = [helper.make_node("Flatten", ["a"], ["b"])]
    opsets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("mine", "Flat", ["a"], ["b"], body, opsets))
    proto.graph.node[0].CopyFrom(helper.make_node("Flat", ["x"], ["f"], domain="mine"))
    proto.opset_import.append(helper.make_opsetid("mine", 1))
    model = load(written(proto, tmp_path / "a.onnx"))
    w = torch.from_numpy(numpy_helper.to_array(proto.graph.initializer[0]).copy())
    torch.testing.assert_close(model(images()), images().flatten(1) @ w)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["REMPART_BOMB"],)


def test_files_that_are_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMPART_BOMB", str(tmp_path / "exploded"))
    whole = dense(["n", *SHAPE]).SerializeToString()
    for number, content in enumerate([pickle.dumps(_Bomb()), whole[: len(whole) // 2], b"", b"\x00" * 100, whole[:7]]):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(content)
        with pytest.raises(ModelError, match="an ONNX model"):
            load(str(path))
    assert not (tmp_path / "exploded").exists()


def external(path: Path, location: str, *, offset: int = 0, length: int | None = None) -> onnx.ModelProto:
    """The dense network with its weights in another file."""
    proto = dense(["n", *SHAPE])
    tensor = proto.graph.initializer[0]
    length = len(tensor.raw_data) if length is None else length
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return proto


def test_external_data_inside_the_folder(tmp_path: Path) -> None:
    w = numpy_helper.to_array(dense(["n", *SHAPE]).graph.initializer[0])
    (tmp_path / "weights.data").write_bytes(b"12345" + w.tobytes())
    external(tmp_path / "a.onnx", "weights.data", offset=5)
    model = load(str(tmp_path / "a.onnx"))
    torch.testing.assert_close(model(images()), images().flatten(1) @ torch.from_numpy(w.copy()))


@pytest.mark.parametrize(
    "where", ["../weights.data", "inner/../../weights.data", "absolute", "link", "linked/weights.data", ""]
)
def test_external_data_outside_the_folder(tmp_path: Path, where: str) -> None:
    (tmp_path / "weights.data").write_bytes(numpy_helper.to_array(dense(["n", *SHAPE]).graph.initializer[0]).tobytes())
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "weights.data")
    (folder / "linked").symlink_to(tmp_path)
    external(folder / "a.onnx", str(tmp_path / "weights.data") if where == "absolute" else where)
    with pytest.raises(ModelError, match="inside the model's folder"):
        load(str(folder / "a.onnx"))


def test_external_data_of_a_constant_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.data").write_bytes(numpy_helper.to_array(dense(["n", *SHAPE]).graph.initializer[0]).tobytes())
    proto = external(tmp_path / "model" / "a.onnx", "../weights.data")
    constant = helper.make_node("Constant", [], ["w"], value=proto.graph.initializer[0])
    proto.graph.node.insert(0, constant)
    del proto.graph.initializer[:]
    (tmp_path / "model" / "a.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="inside the model's folder"):
        load(str(tmp_path / "model" / "a.onnx"))


@pytest.mark.parametrize("inside", ["constant", "branch"])
def test_external_data_of_sparse_weights(inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would look for them in the working directory, wherever the model lies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(np.ones(2, np.float32).tobytes())
    (tmp_path / "model").mkdir()
    values = TensorProto(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "secret", "offset": "0", "length": "8"}.items():
        values.external_data.add(key=key, value=value)
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 1]), "at"), [64, 3])
    if inside == "constant":
        nodes = [helper.make_node("Constant", [], ["w"], sparse_value=sparse)]
    else:
        out = helper.make_tensor_value_info("v", TensorProto.FLOAT, None)
        branch = helper.make_graph([helper.make_node("Identity", ["w"], ["v"])], "b", [], [out])
        branch.sparse_initializer.append(sparse)
        nodes = [helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch)]
    nodes += [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    proto = simple(nodes, ["n", *SHAPE], {"yes": np.array(True)})
    (tmp_path / "model" / "a.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="inside the model's folder"):
        load(str(tmp_path / "model" / "a.onnx"))


@pytest.mark.parametrize(("offset", "length"), [(0, 769), (1, 768), (-1, 768), (0, -5), (0, 2**40)])
def test_external_data_that_are_not_there(tmp_path: Path, offset: int, length: int) -> None:
    (tmp_path / "weights.data").write_bytes(bytes(768))
    external(tmp_path / "a.onnx", "weights.data", offset=offset, length=length)
    with pytest.raises(ModelError, match="external data that are there"):
        load(str(tmp_path / "a.onnx"))


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(dense(["n", *SHAPE]), tmp_path / "a.onnx")
    monkeypatch.setattr("rempart.models.formats.onnx.MAX_BYTES", 500)
    with pytest.raises(ModelError, match="at most 500 bytes"):
        load(path)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_told(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(dense(["n", *SHAPE]), tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=r"pip install 'rempart\[onnx\]'"):
        load(path)


def test_what_runs_in_onnxruntime_has_the_limits_of_its_file(tmp_path: Path) -> None:
    """A file for two images at a time that stays in onnxruntime takes any number all the same."""
    proto = shrunk(dense([2, *SHAPE]))
    w = torch.from_numpy(numpy_helper.to_array(proto.graph.initializer[0]).copy())
    model = load(written(proto, tmp_path / "a.onnx"))
    assert isinstance(next(m for m in model.modules() if isinstance(m, Runtime)), Runtime)
    torch.testing.assert_close(model(images(5)), images(5).flatten(1) @ w)
    assert isinstance(accelerated(model, images()), Classifier)
    assert onnxruntime.InferenceSession(str(tmp_path / "a.onnx")).get_inputs()[0].shape[0] == 2
