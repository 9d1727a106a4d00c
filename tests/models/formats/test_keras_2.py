"""HDF5 files as Keras 2 wrote them, built here by hand, against the same networks in torch.

The layouts are those of files that Keras 2.12 and 2.15 wrote; forty kinds of such files gave the outputs of the Keras
that wrote them to 1e-5.
"""

import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rempart.core.errors import ModelError
from rempart.models import load
from rempart.models.formats.keras import KerasNet, keras_network, keras_options

h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")

Weights = dict[str, list[Tensor]]
DTYPE = {"trainable": True, "dtype": "float32"}
CONV = {"kernel_size": [3, 3], "strides": [1, 1], "padding": "valid", "data_format": "channels_last", "groups": 1}
NORM = {"axis": [3], "momentum": 0.99, "epsilon": 0.001, "center": True, "scale": True}


def layer(kind: str, name: str, calls: Sequence[Any] | None = None, **config: Any) -> dict[str, Any]:
    """A layer as Keras 2 described it: no module; calls as [layer, number of its call, output, arguments]."""
    described: dict[str, Any] = {"class_name": kind, "config": {"name": name, **DTYPE, **config}}
    return described if calls is None else {**described, "name": name, "inbound_nodes": calls}


def start(shape: Sequence[int], name: str = "input_1", calls: Sequence[Any] | None = None) -> dict[str, Any]:
    return layer("InputLayer", name, calls, batch_input_shape=[None, *shape], sparse=False, ragged=False)


def after(*names: str, call: int = 0, **arguments: Any) -> list[Any]:
    """One call of a layer on the outputs of others."""
    return [[[name, call, 0, arguments] for name in names]]


def operation(function: str, source: str, **arguments: Any) -> dict[str, Any]:
    kind = "SlicingOpLambda" if "slice_spec" in arguments else "TFOpLambda"
    return layer(kind, f"tf.{function}", [[source, 0, 0, arguments]], function=function)


def functional(layers: Sequence[Any], output: str, call: int = 0, name: str = "model") -> dict[str, Any]:
    ends = {"input_layers": [[layers[0]["name"], 0, 0]], "output_layers": [[output, call, 0]]}
    return {"class_name": "Functional", "config": {"name": name, "trainable": True, "layers": list(layers), **ends}}


def sequential(*layers: Any, name: str = "sequential") -> dict[str, Any]:
    return {"class_name": "Sequential", "config": {"name": name, "layers": list(layers)}}


def written(path: Path, model: Mapping[str, Any], weights: Weights, version: str = "2.12.0") -> str:
    """An HDF5 file of a whole model: the weights of a model inside are one group, trainable ones first."""
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(model)
        file.attrs["keras_version"], file.attrs["backend"] = version, "tensorflow"
        root = file.create_group("model_weights")
        layers = model["config"] if isinstance(model["config"], list) else model["config"]["layers"]
        names = [part["config"]["name"] for part in layers]
        root.attrs["layer_names"] = [name.encode() for name in names]
        for name in names:
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{i}:0".encode() for i in range(len(weights.get(name, [])))]
            for i, value in enumerate(weights.get(name, [])):
                group.create_dataset(f"{name}/{i}:0", data=value.numpy())
    return str(path)


def archived(path: Path, model: Mapping[str, Any], weights: Weights) -> str:
    """An archive as Keras 2.13 to 2.15 wrote them: the same descriptions with modules, weights by kind of layer."""

    def with_modules(part: dict[str, Any]) -> dict[str, Any]:
        kind = part["class_name"]
        module = {"Functional": "keras.src.engine.functional", "Sequential": "keras"}.get(kind, "keras.layers")
        config = part["config"]
        if "layers" in config:
            config = {**config, "layers": [with_modules(inner) for inner in config["layers"]]}
        if kind == "TFOpLambda":
            module = "keras.src.layers.core.tf_op_layer"
        registered = kind if "src" in module else None
        built = {"build_config": {"input_shape": [None, 8, 8, 3]}}
        return {**part, "module": module, "registered_name": registered, "config": config, **built}

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, values in weights.items():
            for i, value in enumerate(values):
                file.create_dataset(f"layers/{name}/vars/{i}", data=value.numpy())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "2.15.0"}))
        archive.writestr("config.json", json.dumps(with_modules(dict(model))))
        archive.writestr("model.weights.h5", content.getvalue())
    return str(path)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 2


def moments(channels: int) -> list[Tensor]:
    """Gamma, beta, mean and variance of a batch normalisation, all different."""
    gamma, beta, mean, variance = torch.rand((4, channels), generator=torch.Generator().manual_seed(channels))
    return [gamma + 0.5, beta, mean, variance + 0.5]


def normed(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    gamma, beta, mean, variance = weights
    return F.batch_norm(x, mean, variance, gamma, beta, eps=1e-3)


def conv(x: Tensor, kernel: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, **options)


def flat(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(1)


def images(*shape: int) -> Tensor:
    return torch.rand((4, *shape), generator=torch.Generator().manual_seed(9))


def same(source: str, x: Tensor, expected: Tensor) -> None:
    """The logits, of the file and of what a training would save of it, and their gradient in the image."""
    model = load(source)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    (net,) = (part for part in model.modules() if isinstance(part, KerasNet))
    again = keras_network(keras_options(model))
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(x), net(x))
    (slope,) = torch.autograd.grad(model(x.requires_grad_())[:, 1].sum(), x)
    assert bool((slope.flatten(1).abs().amax(1) > 0).all())


PLAIN: Weights = {"conv": [draw(3, 3, 2, 4), draw(4)], "norm": moments(4), "head": [draw(36, 3), draw(3)]}


def plain(first: Sequence[Any]) -> list[Any]:
    """Convolution, batch normalisation, pooling, softmax: `first` is an input layer or nothing."""
    shape = {} if first else {"batch_input_shape": [None, 8, 8, 2]}
    return [
        *first,
        layer("Conv2D", "conv", filters=4, activation="relu", dilation_rate=[1, 1], **CONV, **shape),
        layer("BatchNormalization", "norm", renorm=False, virtual_batch_size=None, fused=True, **NORM),
        layer("MaxPooling2D", "pool", pool_size=[2, 2], strides=[2, 2], padding="valid", data_format="channels_last"),
        layer("SpatialDropout2D", "drop", rate=0.2, noise_shape=None, seed=None),
        layer("Flatten", "flatten", data_format="channels_last"),
        layer("Dense", "head", units=3, activation="softmax"),
    ]


def plain_logits(x: Tensor) -> Tensor:
    z = F.max_pool2d(normed(conv(x, *PLAIN["conv"]).relu(), PLAIN["norm"]), 2)
    return flat(z) @ PLAIN["head"][0] + PLAIN["head"][1]


@pytest.mark.parametrize("name", ["old.h5", "weights.best.hdf5", "OLD.H5", "model.keras", "MODEL.KERAS"])
def test_a_sequential_model_opens_whatever_its_ending(name: str, tmp_path: Path) -> None:
    same(
        written(tmp_path / name, sequential(*plain([start((8, 8, 2))])), PLAIN),
        images(2, 8, 8),
        plain_logits(images(2, 8, 8)),
    )


@pytest.mark.parametrize("version", ["2.2.4-tf", "2.1.6"])
def test_so_do_those_whose_first_layer_holds_the_shape(version: str, tmp_path: Path) -> None:
    """Before Keras 2.4 there was no input layer, before 2.2.3 no name of the model either."""
    model = sequential(*plain([]))
    if version < "2.2":
        model["config"] = model["config"]["layers"]
    same(written(tmp_path / "m.h5", model, PLAIN, version), images(2, 8, 8), plain_logits(images(2, 8, 8)))


def test_so_do_archives_of_keras_2(tmp_path: Path) -> None:
    """Keras 3 itself refuses them."""
    weights = {"conv2d": PLAIN["conv"], "batch_normalization": PLAIN["norm"], "dense": PLAIN["head"]}
    x = images(2, 8, 8)
    same(archived(tmp_path / "m.keras", sequential(*plain([start((8, 8, 2))])), weights), x, plain_logits(x))


BASE: Weights = {"base": [draw(3, 3, 3, 4), draw(4), *moments(4)], "head": [draw(4, 3), draw(3)]}


def base(frozen: bool) -> dict[str, Any]:
    inside = [
        start((8, 8, 3), "input_2", []),
        layer("Conv2D", "Conv/first", after("input_2"), filters=4, activation="linear", **CONV),
        layer("BatchNormalization", "Conv/norm", after("Conv/first"), **NORM),
        layer("ReLU", "out", after("Conv/norm"), max_value=6.0, negative_slope=0.0, threshold=0.0),
    ]
    for part in inside[1:]:
        part["config"]["trainable"] = not frozen
    return functional(inside, "out", name="base")


def base_logits(x: Tensor) -> Tensor:
    kernel, bias, *rest = BASE["base"]
    z = normed(conv(x, kernel, bias), rest).clamp(0, 6)
    return z.mean((2, 3)) @ BASE["head"][0] + BASE["head"][1]


MEANS = torch.tensor([-0.4, -0.5, -0.6])
STEPS: dict[str, tuple[list[Any], Any]] = {
    "none": ([], lambda x: x),
    "MobileNet": (
        [
            operation("math.truediv", "input_1", y=127.5, name=None),
            operation("math.subtract", "tf.math.truediv", y=1.0, name=None),
        ],
        lambda x: x / 127.5 - 1,
    ),
    "ResNet": (
        [
            operation(
                "__operators__.getitem",
                "input_1",
                slice_spec=[{"class_name": "__ellipsis__"}, {"start": None, "stop": None, "step": -1}],
            ),
            operation("nn.bias_add", "tf.__operators__.getitem", bias=MEANS.tolist(), data_format="NHWC"),
        ],
        lambda x: x.flip(1) + MEANS.view(3, 1, 1),
    ),
    "one minus": (
        [{**operation("math.subtract", ""), "inbound_nodes": [["_CONSTANT_VALUE", -1, 1.0, {"y": ["input_1", 0, 0]}]]}],
        lambda x: 1 - x,
    ),
    "sum": (
        [
            operation("math.multiply", "input_1", y=["input_1", 0, 0], name=None),
            operation("__operators__.add", "tf.math.multiply", y=["input_1", 0, 0], name=None),
        ],
        lambda x: x * x + x,
    ),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("steps", STEPS)
def test_transfer_learning_on_a_base_that_is_a_model_itself(steps: str, frozen: bool, tmp_path: Path) -> None:
    """Its construction counts as its first call, so that the second is the one in use."""
    before, step = STEPS[steps]
    last = before[-1]["name"] if before else "input_1"
    layers = [
        start((8, 8, 3), calls=[]),
        *before,
        {**base(frozen), "name": "base", "inbound_nodes": after(last, training=False)},
        layer("GlobalAveragePooling2D", "pool", after("base", call=1), data_format="channels_last", keepdims=False),
        layer("Dense", "head", after("pool"), units=3, activation="softmax"),
    ]
    x, model = images(3, 8, 8), functional(layers, "head")
    same(written(tmp_path / "m.h5", model, BASE), x, base_logits(step(x)))
    if steps in ("none", "MobileNet"):
        inside = {"conv2d": BASE["base"][:2], "batch_normalization": BASE["base"][2:]}
        weights = {f"functional/layers/{name}": values for name, values in inside.items()} | {"dense": BASE["head"]}
        same(archived(tmp_path / "m.keras", model, weights), x, base_logits(step(x)))


def test_a_base_in_front_of_a_sequential_model_and_a_model_as_its_end(tmp_path: Path) -> None:
    pool = layer("GlobalAveragePooling2D", "pool", data_format="channels_last")
    head = layer("Dense", "head", units=3, activation="softmax")
    x = images(3, 8, 8)
    same(written(tmp_path / "m.h5", sequential(base(True), pool, head), BASE), x, base_logits(x))
    called = {**head, "name": "head", "inbound_nodes": after("input_3")}
    tops = {
        "functional": functional([start((4,), "input_3", []), called], "head", name="top"),
        "sequential": sequential(start((4,), "input_3"), head, name="top"),
    }
    for name, top in tops.items():
        layers = [
            start((8, 8, 3), calls=[]),
            {**base(True), "name": "base", "inbound_nodes": after("input_1")},
            {**pool, "name": "pool", "inbound_nodes": after("base", call=1)},
            {**top, "name": "top", "inbound_nodes": after("pool")},
        ]
        weights = {"base": BASE["base"], "top": BASE["head"]}
        same(written(tmp_path / f"{name}.h5", functional(layers, "top", call=1), weights), x, base_logits(x))


def test_arguments_that_layers_no_longer_take(tmp_path: Path) -> None:
    """Depthwise, separable and transposed convolutions, an LSTM, and a dense layer for each step of a sequence."""
    depth, zeros = {"depth_multiplier": 1, "activation": "linear"}, {"class_name": "Zeros", "config": {}}
    convolutions = sequential(
        start((8, 8, 3)),
        layer("DepthwiseConv2D", "depth", **CONV, **depth),
        layer("SeparableConv2D", "pair", filters=4, **CONV, **depth, kernel_initializer=zeros),
        layer("Conv2DTranspose", "up", filters=3, **CONV, output_padding=None, activation="linear"),
        layer("GlobalAveragePooling2D", "pool", data_format="channels_last"),
    )
    weights: Weights = {
        "depth": [draw(3, 3, 3, 1), draw(3)],
        "pair": [draw(3, 3, 3, 1) + 1, draw(1, 1, 3, 4), draw(4)],
        "up": [draw(3, 3, 3, 4), draw(3) + 1],
    }
    x = images(3, 8, 8)
    z = F.conv2d(x, weights["depth"][0].permute(2, 3, 0, 1), weights["depth"][1], groups=3)
    z = F.conv2d(z, weights["pair"][0].permute(2, 3, 0, 1), groups=3)
    z = conv(z, *weights["pair"][1:])
    z = F.conv_transpose2d(z, weights["up"][0].permute(3, 2, 0, 1), weights["up"][1])
    same(written(tmp_path / "c.h5", convolutions, weights), x, z.mean((2, 3)))
    dense = layer("Dense", "each", units=4, activation="tanh")
    sequence = sequential(
        start((8, 8)),
        layer("TimeDistributed", "steps", layer=dense),
        layer("LSTM", "lstm", units=3, return_sequences=False, time_major=False, implementation=2, unroll=False),
    )
    weights = {"steps": [draw(8, 4), draw(4)], "lstm": [draw(4, 12), draw(3, 12), draw(12)]}
    lstm = torch.nn.LSTM(4, 3, batch_first=True)
    state = {
        "weight_ih_l0": weights["lstm"][0].T,
        "weight_hh_l0": weights["lstm"][1].T,
        "bias_ih_l0": weights["lstm"][2],
    }
    lstm.load_state_dict({**state, "bias_hh_l0": torch.zeros(12)})
    x = images(1, 8, 8)
    steps = (x.squeeze(1) @ weights["steps"][0] + weights["steps"][1]).tanh()
    same(written(tmp_path / "s.h5", sequence, weights), x, lstm(steps)[0][:, -1])


def test_a_layer_as_activation_and_inputs_by_name(tmp_path: Path) -> None:
    """`activation=LeakyReLU(0.2)`, and `Model({"scan": ...}, ...)`."""
    leaky = layer("LeakyReLU", "leaky_re_lu", alpha=0.2)
    layers = [
        start((8, 8, 2), calls=[]),
        layer("Conv2D", "conv", after("input_1"), filters=4, **CONV, activation=leaky),
        layer("GlobalAveragePooling2D", "pool", after("conv"), data_format="channels_last"),
        layer("Dense", "head", after("pool"), units=3, activation="linear"),
    ]
    described = functional(layers, "head")
    described["config"]["input_layers"] = {"scan": ["input_1", 0, 0]}
    weights: Weights = {"conv": [draw(3, 3, 2, 4), draw(4)], "head": [draw(4, 3), draw(3)]}
    x = images(2, 8, 8)
    pooled = F.leaky_relu(conv(x, *weights["conv"]), 0.2).mean((2, 3))
    same(written(tmp_path / "m.h5", described, weights), x, pooled @ weights["head"][0] + weights["head"][1])


def test_attention_whose_value_is_named_and_whose_words_name_functions(tmp_path: Path) -> None:
    """`score_mode` "dot" is a word, though Keras has a function of that name."""
    heads = {"num_heads": 1, "key_dim": 4, "value_dim": 4}
    heads |= {f"{name}_shape": [None, 6, 4] for name in ("query", "key", "value")}
    layers = [
        start((6, 4), calls=[]),
        layer("MultiHeadAttention", "heads", after("input_1", value=["input_1", 0, 0]), **heads),
        layer("Attention", "attention", after("heads", "input_1"), use_scale=False, score_mode="dot", dropout=0.0),
        layer("GlobalAveragePooling1D", "pool", after("attention"), data_format="channels_last"),
    ]
    names = ("query", "key", "value")
    inner = [part for i, _ in enumerate(names) for part in (draw(4, 1, 4) + i, draw(1, 4) + i)]
    out = [draw(1, 4, 4), draw(4)]
    x = images(1, 6, 4)
    q, k, v = (x.squeeze(1) @ inner[2 * i][:, 0] + inner[2 * i + 1][0] for i in range(3))
    z = F.scaled_dot_product_attention(q, k, v) @ out[0][0] + out[1]
    z = (z @ x.squeeze(1).transpose(1, 2)).softmax(-1) @ x.squeeze(1)
    same(written(tmp_path / "m.h5", functional(layers, "pool"), {"heads": [*inner, *out]}), x, z.mean(1))


@pytest.mark.parametrize("version", ["2.15.0", "3.12.0"])
def test_a_layer_with_several_axes_keeps_them(version: str, tmp_path: Path) -> None:
    """Keras itself forgets them here, and normalises along the last one."""
    shape = {"batch_input_shape": [None, 4, 4, 2]} if version < "3" else {"batch_shape": [None, 4, 4, 2]}
    model = sequential(
        layer("InputLayer", "input_1", **shape),
        layer("LayerNormalization", "norm", axis=[1, 2, 3], epsilon=1e-3, center=False, scale=False),
        layer("Flatten", "flatten", data_format="channels_last"),
        layer("Dense", "head", units=3, activation="linear"),
    )
    head, x = [draw(32, 3), draw(3)], images(2, 4, 4)
    expected = flat(F.layer_norm(x, (2, 4, 4), eps=1e-3)) @ head[0] + head[1]
    same(written(tmp_path / "m.h5", model, {"head": head}, version), x, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_functional_models_of_keras_3_open_as_h5_too(nested: bool, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    i = keras.Input((8, 8, 1))
    inner = keras.Model(i, layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(i)))
    j = keras.Input((8, 8, 1))
    model = keras.Model(j, layers.Dense(3)(layers.Flatten()(inner(j))))
    if nested:
        model = keras.Sequential([keras.Input((8, 8, 1)), layers.Rescaling(2.0), model, layers.Softmax()])
    x = images(1, 8, 8)
    expected = model(x.movedim(1, -1), training=False).detach()
    for name in ("m.keras", "m.h5"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save(tmp_path / name)
        z = load(str(tmp_path / name))(x)
        torch.testing.assert_close(z.softmax(1) if nested else z, expected, atol=1e-5, rtol=0)
    (tmp_path / "m.keras").rename(tmp_path / "disguised.h5")
    assert load(str(tmp_path / "disguised.h5")).shape == (1, 8, 8)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        ("Lambda", {"function": ["4wEA", None, None], "function_type": "lambda"}, "run no code of the file's"),
        ("Custom>Mine", {}, "run no code of the file's"),
        ("StringLookup", {"vocabulary": "/etc/passwd"}, "run no code of the file's"),
        ("TFOpLambda", {"function": "py_function"}, r"tf\.py_function between layers"),
        ("TFOpLambda", {"function": "io.read_file"}, r"tf\.io\.read_file"),
        ("Activation", {"activation": "hard_sigmoid"}, "clip"),
    ],
)
def test_what_is_planted_is_refused_however_deep(
    kind: str, config: dict[str, Any], match: str, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = layer(kind, "bad", [["input_1", 0, 0, {}]], **config)
    model = functional([start((8, 8, 3), calls=[]), bad], "bad")
    for level in range(depth):
        model["config"]["name"] = f"inner_{level}"
        inner = {**model, "name": f"inner_{level}", "inbound_nodes": after("input_1")}
        model = functional([start((8, 8, 3), calls=[]), inner], f"inner_{level}", call=1)
    with pytest.raises(ModelError, match=match):
        load(written(tmp_path / "m.h5", model, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["m.h5"]


def test_weights_alone_and_folders_of_tensorflow_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "weights.hdf5", "w") as file:
        file.create_dataset("layers/dense/vars/0", data=np.zeros((2, 2)))
    with pytest.raises(ModelError, match=r"weights alone; load them .* model.save\(FILE\)"):
        load(str(tmp_path / "weights.hdf5"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"\x08\x01")
    with pytest.raises(ModelError, match=r"SavedModel.*tf2onnx"):
        load(str(tmp_path / "saved"))


@pytest.mark.parametrize("layers", [[], [{"class_name": "TFOpLambda", "config": {"name": "a"}}], [None], {"a": 1}])
def test_descriptions_that_are_none_are_refused(layers: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": {"name": "m", "layers": layers}})
        file.attrs["keras_version"] = "2.12.0"
    with pytest.raises(ModelError, match="Keras file that is whole"):
        load(str(tmp_path / "m.h5"))
