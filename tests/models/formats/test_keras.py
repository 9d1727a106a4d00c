"""Keras models against the same networks written in torch."""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.features import blocks, features, penultimate
from rempart.core.model import Classifier, accelerated, frozen
from rempart.core.repro import digest_state
from rempart.models import load
from rempart.models.formats.keras import from_keras, keras_options
from rempart.models.load import card
from rempart.report.schema import Reading, TrainSpec
from rempart.tasks import run

pytest.importorskip("h5py")
keras = pytest.importorskip("keras")
layers = keras.layers

K, SIDE = 3, 10


def small(*head: Any, classes: int = K) -> Any:
    """Convolution, batch norm with statistics of its own, pooling, dropout, dense."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 2)),
            layers.Rescaling(2.0, offset=-1.0),
            layers.Conv2D(5, 3, padding="same", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.Activation("relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.4, seed=3),  # with a seed Keras draws from a state of its own
            layers.Flatten(),
            *(head or (layers.Dense(classes, activation="softmax", name="head"),)),
        ]
    )
    generator = torch.Generator().manual_seed(1)
    for variable in model.get_layer("norm").weights:
        variable.assign(torch.rand(variable.shape, generator=generator) + 0.5)
    return model


def values(layer: Any) -> list[Tensor]:
    return [variable.value.detach().clone() for variable in layer.weights]


def twin(model: Any) -> nn.Sequential:
    """The same network in torch, up to the logits."""
    conv, norm, head = (model.get_layer(name) for name in ("conv", "norm", "head"))
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5, eps=1e-3, momentum=0.01), nn.ReLU(), nn.MaxPool2d(2)
    )
    dense = nn.Linear(5 * 25, K)
    with torch.no_grad():
        net[0].weight.copy_(values(conv)[0].permute(3, 2, 0, 1))
        net[0].bias.copy_(values(conv)[1])
        for ours, theirs in zip(
            (net[1].weight, net[1].bias, net[1].running_mean, net[1].running_var), values(norm), strict=True
        ):
            ours.copy_(theirs)
        kernel = values(head)[0].view(5, 5, 5, K)  # flattened with the channels last
        dense.weight.copy_(kernel.permute(3, 2, 0, 1).flatten(1))
        dense.bias.copy_(values(head)[1])
    return nn.Sequential(net, nn.Flatten(), dense).eval()


def saved(model: Any, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(path)
    return str(path)


def images(n: int = 6, channels: int = 2) -> Tensor:
    return torch.rand((n, channels, SIDE, SIDE), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def original() -> Any:
    return small()


@pytest.fixture(scope="module")
def files(original: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("keras")
    original.compile("adam", "sparse_categorical_crossentropy")
    original.fit(images().movedim(1, -1).numpy(), torch.arange(6).numpy() % K, verbose=0)
    return {ending: saved(original, folder / f"model.{ending}") for ending in ("keras", "h5")}


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_logits_and_gradients_are_those_of_the_same_network_in_torch(ending: str, original: Any, files: Any) -> None:
    model, net = load(files[ending]), twin(original)
    assert (model.shape, model.num_classes, model.output) == ((2, SIDE, SIDE), K, "logits")
    x = images().requires_grad_()
    z, expected = model(x), net(2 * x - 1)
    assert torch.allclose(z, expected, atol=1e-5)
    mix = torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    (slope,) = torch.autograd.grad((z * mix).sum(), x)
    (wanted,) = torch.autograd.grad((expected * mix).sum(), x)
    assert torch.allclose(slope, wanted, atol=1e-5)
    direction = slope / slope.norm()
    with torch.no_grad():
        rise = ((model(x + 1e-3 * direction) - model(x - 1e-3 * direction)) * mix).sum() / 2e-3
    assert float(rise) == pytest.approx(float(slope.norm()), rel=2e-2)


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_the_softmax_is_taken_off_and_the_report_says_so(ending: str, original: Any, files: Any) -> None:
    model = load(files[ending])
    with torch.no_grad():
        probabilities = original(images().movedim(1, -1), training=False)
        assert torch.allclose(model(images()).softmax(1), probabilities, atol=1e-6)
    assert "softmax of its last layer was taken off" in card(model, files[ending]).notes[0]


def test_a_saturated_softmax_keeps_its_gradient() -> None:
    model = small()
    kernel = model.get_layer("head").kernel
    kernel.assign(1e4 * kernel.value)
    x = images().requires_grad_()
    assert bool((model(x.movedim(1, -1), training=False).amax(1) == 1).all())
    z = from_keras(model).eval()(x)
    (slope,) = torch.autograd.grad(z[:, 0].sum(), x)
    assert bool((slope.flatten(1).abs().amax(1) > 0).all())


def nested() -> Any:
    return keras.Sequential([layers.Dense(4), layers.Dense(K, activation="softmax")])


@pytest.mark.parametrize(
    ("head", "output", "classes"),
    [
        (lambda: [layers.Dense(K)], "logits", K),
        (lambda: [layers.Dense(K), layers.Activation("softmax")], "logits", K),
        (lambda: [nested()], "logits", K),
        (lambda: [layers.Dense(K), layers.Softmax()], "probabilities", K),
        (lambda: [layers.Dense(1, activation="sigmoid")], "logits", 2),
        (lambda: [layers.Dense(K, activation="sigmoid")], "logits", K),
        (lambda: [layers.Dense(K, activation="tanh")], None, K),
    ],
)
def test_whatever_the_last_layer_is_the_classifier_gives_logits(head: Any, output: str | None, classes: int) -> None:
    model = small(*head())
    with torch.no_grad():
        returned = model(images().movedim(1, -1), training=False)
    classifier = from_keras(model).eval()
    assert (classifier.output, classifier.num_classes) == (output, classes)
    with torch.no_grad():
        z = classifier(images())
    if classes == 2:
        assert torch.allclose(z.softmax(1)[:, 1:], returned, atol=1e-6) and bool((z[:, 0] == 0).all())
        return
    sums = bool(((returned.sum(1) - 1).abs() < 1e-5).all())
    inside = bool(((returned > 0) & (returned < 1)).all())
    again = z.softmax(1) if sums else z.sigmoid() if inside else z
    assert torch.allclose(again, returned, atol=1e-5)


def test_an_operation_that_shares_its_layer_keeps_its_softmax() -> None:
    entry = keras.Input((SIDE, SIDE, 2))
    dense = layers.Dense(8, activation="softmax")
    model = keras.Model(entry, dense(dense(layers.Dense(8)(layers.Flatten()(entry)))))
    with torch.no_grad():
        returned = model(images().movedim(1, -1), training=False)
        classifier = from_keras(model).eval()
        assert classifier.output == "probabilities"
        assert torch.allclose(classifier(images()).softmax(1), returned, atol=1e-6)


def test_images_come_in_with_channels_first_however_the_model_has_them() -> None:
    x = images()
    first = keras.Sequential(
        [
            keras.Input((2, SIDE, SIDE)),
            layers.Conv2D(3, 3, data_format="channels_first"),
            layers.GlobalAveragePooling2D(data_format="channels_first"),
        ]
    )
    model = from_keras(first).eval()
    assert model.shape == (2, SIDE, SIDE)
    kernel, bias = values(first.layers[0])
    expected = nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias).mean((2, 3))
    assert torch.allclose(model(x), expected, atol=1e-5)
    grey = keras.Sequential([keras.Input((SIDE, SIDE)), layers.Flatten(), layers.Dense(K)])
    model = from_keras(grey).eval()
    assert model.shape == (1, SIDE, SIDE)
    kernel, bias = values(grey.layers[-1])
    assert torch.allclose(model(x[:, :1]), x[:, 0].flatten(1) @ kernel + bias, atol=1e-5)
    volume = keras.Sequential([keras.Input((4, 5, 6, 2)), layers.Conv3D(2, 2), layers.GlobalMaxPooling3D()])
    v = torch.rand((2, 2, 4, 5, 6), generator=torch.Generator().manual_seed(0))
    model = from_keras(volume).eval()
    kernel, bias = values(volume.layers[0])
    expected = nn.functional.conv3d(v, kernel.permute(4, 3, 0, 1, 2), bias).amax((2, 3, 4))
    assert model.shape == (2, 4, 5, 6) and torch.allclose(model(v), expected, atol=1e-5)


def test_copies_guards_and_the_faster_form_give_the_same_logits(files: Any) -> None:
    model, x = load(files["keras"]), images()
    state = digest_state(model.state_dict())
    with torch.no_grad():
        expected = model(x)
    other = copy.deepcopy(model)
    fast = accelerated(model, x)
    with frozen(model), torch.no_grad():
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(model(x), expected)
        assert torch.equal(other(x), expected)
        assert torch.allclose(fast(x), expected, atol=1e-5)
    assert digest_state(model.state_dict()) == state
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
        assert torch.equal(model(x), expected) and not torch.allclose(other(x), expected)


def test_the_digest_covers_every_weight_and_is_the_same_for_every_load(original: Any, files: Any) -> None:
    model = load(files["keras"])
    state = model.state_dict()
    digest = digest_state(state)
    assert digest == digest_state(load(files["keras"]).state_dict()) == digest_state(load(files["h5"]).state_dict())
    assert sum(state[name].numel() for name in state if name.startswith("net.1")) == original.count_params()
    for name in [name for name in state if name.startswith("net.1")]:
        with torch.no_grad():
            state[name].view(-1)[0] += 1
        assert digest_state(model.state_dict()) != digest, name
        with torch.no_grad():
            state[name].view(-1)[0] -= 1


def test_layers_are_seen_with_channels_first(original: Any, files: Any) -> None:
    model, x = load(files["keras"]), images()
    wanted = [*blocks(model), penultimate(model)]
    assert wanted == ["net.1.norm", "net.1.head:input"]
    with torch.no_grad(), features(model, wanted) as seen:
        z = model(x)
    net = twin(original)
    normed = net[0][1](net[0][0](2 * x - 1))
    assert torch.allclose(seen["net.1.norm"], normed, atol=1e-5)
    flat = net[0][3](net[0][2](normed)).movedim(1, -1).flatten(1)
    assert torch.allclose(seen["net.1.head:input"], flat, atol=1e-5)
    assert torch.allclose(z, net(2 * x - 1), atol=1e-5)


def test_in_training_batch_norm_uses_the_batch_and_dropout_draws_from_torch(files: Any) -> None:
    model, x = load(files["keras"]), images()
    model.double().float()  # puts other tensors in the place of the buffers, as a move to a GPU does
    mean = model.get_buffer("net.1.norm.moving_mean").clone()
    model.train()
    torch.manual_seed(0)
    first = model(x)
    batch = nn.functional.conv2d(
        2 * x - 1, model.get_parameter("net.1.conv.kernel").permute(3, 2, 0, 1), padding=1
    ) + model.get_parameter("net.1.conv.bias").view(1, -1, 1, 1)
    moved = model.get_buffer("net.1.norm.moving_mean")
    assert torch.allclose(moved, 0.99 * mean + 0.01 * batch.mean((0, 2, 3)), atol=1e-5)
    second = model(x)
    torch.manual_seed(0)
    again = model(x)
    assert torch.equal(first, again) and not torch.allclose(first, second)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


def digits(*, box: float = 1.0) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(1 / box),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.1),
            layers.Flatten(),
            layers.Dense(10, activation="softmax"),
        ]
    )


def test_a_keras_file_is_hardened_and_saved_as_a_folder_that_needs_no_code(tmp_path: Path) -> None:
    start = saved(digits(box=255.0), tmp_path / "start.keras")
    options = {"epochs": 1, "learning_rate": 0.05, "steps": 2}
    names = tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    reading = Reading(box="0:255", classes=names)
    out = str(tmp_path / "hard")
    report = run(TrainSpec(data="digits", start=start, reading=reading, recipe="pgd-at", options=options, out=out))
    assert report is not None and report.clean is not None and report.clean.k / report.clean.n > 0.4
    before, after = load(start, reading), load(out)
    assert after.class_names == names and after.shape == (1, 8, 8)
    assert card(after, out).digest == report.model.digest
    for name, value in before.state_dict().items():
        if "norm.moving" in name or "kernel" in name:
            assert not torch.equal(value, after.state_dict()[name]), name
    again = run(TrainSpec(data="digits", start=out, recipe="plain", options={"epochs": 1}, out=f"{out}2"))
    assert again is not None and load(f"{out}2").class_names == names
    assert keras_options(after)["config"]["class_name"] == "Sequential"


def test_a_factory_may_return_a_keras_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import os\nos.environ['KERAS_BACKEND'] = 'torch'\nimport keras\n\n\ndef net():\n"
        "    keras.utils.set_random_seed(0)\n    layers = keras.layers\n"
        "    ends = layers.Flatten(), layers.Dense(10, activation='softmax')\n"
        "    return keras.Sequential([keras.Input((8, 8, 1)), *ends])\n"
    )
    Path("kerasfactory.py").write_text(code)
    model = load("python:kerasfactory:net")
    assert isinstance(model, Classifier) and model.shape == (1, 8, 8) and model.output == "logits"
    spec = TrainSpec(data="digits", start="python:kerasfactory:net", options={"epochs": 1}, out="out")
    report = run(spec)
    assert report is not None
    assert digest_state(load("python:kerasfactory:net@out").state_dict()) == report.model.digest


def test_what_is_no_classifier_of_images_of_one_size_is_refused() -> None:
    for model, message in (
        (keras.Sequential([keras.Input((None, None, 3)), layers.GlobalAveragePooling2D()]), "fixed size"),
        (keras.Sequential([keras.Input((100,)), layers.Dense(3)]), "fixed size"),
        (keras.Sequential([keras.Input((4, 4, 1)), layers.Flatten(), layers.Dense(3, dtype="float16")]), "float32"),
        (keras.Sequential([keras.Input((4, 4, 1), dtype="uint8"), layers.Flatten(), layers.Dense(3)]), "in uint8"),
    ):
        with pytest.raises(ModelError, match=message):
            from_keras(model)
    one, two = keras.Input((4, 4, 1)), keras.Input((4, 4, 1))
    with pytest.raises(ModelError, match="one input"):
        from_keras(keras.Model([one, two], layers.Flatten()(layers.Add()([one, two]))))


def test_another_backend_is_an_error_that_says_what_to_set(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ModelError, match="torch backend, got jax; set KERAS_BACKEND"):
        load(files["keras"])


def test_without_keras_the_error_names_the_extra(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ModelError, match=r"pip install 'rempart\[keras\]'"):
        load(files["keras"])
