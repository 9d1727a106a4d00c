"""`rempart inspect` on models whose answers are known."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from rempart.cli import app
from rempart.core.model import Classifier
from rempart.data import Data, open_data
from rempart.data.samples import in_memory
from rempart.inspection import _balanced, _differences, described, inspect_model
from rempart.models import build, load, save
from rempart.report.schema import Reading

CODE = """
import torch
from torch import nn
from rempart import Classifier


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, slope):
        return slope.sign()


class Wrong(nn.Module):
    def forward(self, x):
        return Sign.apply(x)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach()


def net(first, last):
    torch.manual_seed(0)
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(64, 10), last)
    return Classifier(model, shape=(1, 8, 8), num_classes=10).eval()


def wrong():
    return net(Wrong(), nn.Identity())


def detached():
    return net(Detached(), nn.Identity())


def probable():
    return net(nn.Identity(), nn.Softmax(1))
"""


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lenet")
    model = build("lenet", shape=(1, 16, 16), num_classes=4, class_names=("a", "b", "c", "d"), mean=[0.4], std=[0.2])
    save(model, folder, name="lenet")
    return str(folder)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inspected.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def test_shapes_and_parameters_of_each_layer_are_counted(lenet: str) -> None:
    found = inspect_model(lenet)
    rows = [(layer.kind, layer.shape, layer.parameters) for layer in found.layers]
    assert rows == [
        ("Normalize", (1, 16, 16), 0),
        ("Conv2d", (20, 12, 12), 20 * 26),
        ("MaxPool2d", (20, 6, 6), 0),
        ("Conv2d", (50, 2, 2), 50 * (20 * 25 + 1)),
        ("MaxPool2d", (50, 1, 1), 0),
        ("Flatten", (50,), 0),
        ("Linear", (500,), 500 * 51),
        ("ReLU", (500,), 0),
        ("Linear", (4,), 4 * 501),
    ]
    assert found.model.parameters == sum(layer.parameters for layer in found.layers)
    assert found.normalisation == ("mean 0.4, std 0.2",)
    assert found.problem is None and all(check.status in ("passed", "warned") for check in found.checks)
    slopes = next(check for check in found.checks if check.name == "finite differences")
    assert slopes.status == "passed"
    assert slopes.evidence["gradient"] == pytest.approx(slopes.evidence["finite differences"], rel=0.05)


def test_the_prediction_is_that_of_the_first_image(code: None) -> None:
    found = inspect_model("python:inspected:probable", Reading(classes=tuple("qwertyuiop")), "digits:test")
    batch = open_data("digits:test").batch(torch.arange(1))
    with torch.no_grad():
        probabilities = load("python:inspected:probable").net(batch.x)[0]
    assert found.prediction is not None
    assert found.prediction.name == "qwertyuiop"[int(probabilities.argmax())]
    assert found.prediction.confidence == pytest.approx(float(probabilities.max()), abs=1e-6)
    assert found.prediction.label == str(int(batch.y))
    logits = next(check for check in found.checks if check.name == "logits")
    assert logits.status == "repaired" and "taken off" in logits.message


def test_a_gradient_that_is_not_that_of_the_function_is_found(code: None) -> None:
    found = inspect_model("python:inspected:wrong")
    assert next(check for check in found.checks if check.name == "finite differences").status == "warned"


def test_a_model_without_gradients_is_described_all_the_same(code: None) -> None:
    found = inspect_model("python:inspected:detached")
    assert found.problem is not None and "input gradients" in found.problem
    assert "failed" in described(found) and [layer.kind for layer in found.layers][2] == "Linear"


def test_the_command_prints_text_and_json(lenet: str) -> None:
    text = CliRunner().invoke(app, ["inspect", lenet, "--box", "0:255", "--classes", "w,x,y,z"])
    assert text.exit_code == 0, text.output
    assert "4: w, x, y, z" in text.output and "[0, 1] to [0, 255]; mean 0.4, std 0.2" in text.output
    told = CliRunner().invoke(app, ["inspect", lenet, "--json"])
    assert json.loads(told.output)["model"]["classes"] == ["a", "b", "c", "d"]


def test_keras_layers_have_their_own_names_and_kinds(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Rescaling(0.5, offset=-1.0),
            layers.Conv2D(4, 3, name="stem"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", name="head"),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "model.keras")
    found = inspect_model(str(tmp_path / "model.keras"))
    rows = [(layer.name, layer.kind, layer.shape, layer.parameters) for layer in found.layers]
    assert rows == [
        ("net.0", "Normalize", (3, 8, 8), 0),
        ("net.1.rescaling", "Rescaling", (3, 8, 8), 0),
        ("net.1.stem", "Conv2D", (4, 6, 6), 4 * 28),
        ("net.1.global_average_pooling2d", "GlobalAveragePooling2D", (4,), 0),
        ("net.1.head", "Dense", (3,), 15),
    ]
    assert found.normalisation == ("a Rescaling layer, scale 0.5, offset -1.0",)
    assert found.form == ".keras file" and "softmax of its last layer was taken off" in described(found)
    assert found.problem is None


FOREIGN = """
import torch
from torch import nn
from rempart import Classifier
from rempart.data import open_data


class Nearest(nn.Module):
    '''The digit with the nearest mean, from nine to zero, of grey levels from 0 to 255.'''

    def __init__(self):
        super().__init__()
        data = open_data("digits:train").load()
        batch = data.batch(torch.arange(len(data)))
        means = torch.stack([batch.x[batch.y == k].mean(0).flatten() for k in range(9, -1, -1)])
        self.register_buffer("means", means)

    def forward(self, levels):
        return (levels / 255).flatten(1) @ self.means.T - self.means.square().sum(1) / 2


def classifier():
    return Classifier(Nearest(), shape=(1, 8, 8), num_classes=10).eval()
"""


def test_a_wrong_box_or_order_of_classes_shows_in_the_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nearest.py").write_text(FOREIGN)
    turned = tuple("9876543210")
    right, box, order = (
        inspect_model("python:nearest:classifier", reading, "digits:test")
        for reading in (Reading(box="0:255", classes=turned), Reading(classes=turned), Reading(box="0:255"))
    )
    known, narrow, mixed = (
        next(check for check in found.checks if check.name == "clean accuracy") for found in (right, box, order)
    )
    assert [known.status, narrow.status, mixed.status] == ["passed", "warned", "warned"]
    x, labels = (data := open_data("digits:test").load()).batch(torch.arange(len(data))).x, data.labels
    with torch.no_grad():
        truth = (9 - load("python:nearest:classifier", Reading(box="0:255"))(x).argmax(1) == labels).double().mean()
    assert known.evidence["n"] == 100 and abs(known.evidence["accuracy"] - float(truth)) < 0.1
    assert mixed.evidence["chance"] == 0.1 and mixed.evidence["accuracy"] < 0.1
    assert "every image is taken for" in narrow.message and narrow.evidence["accuracy"] == 0.1, "ten of each class"
    for found in (box, order):
        assert "warned   clean accuracy" in described(found) and "--box" in described(found)
    assert "clean accuracy" not in [check.name for check in inspect_model("python:nearest:classifier").checks]


def test_the_sample_holds_as_many_images_of_each_class_while_they_last() -> None:
    labels = torch.tensor([0] * 500 + [1] * 70 + [2] * 20)
    data = Data("", "all", torch.arange(590) + 7, labels, (1, 1, 1), tuple("abc"), lambda index: index)  # type: ignore
    some = _balanced(data)
    assert some.labels.bincount().tolist() == [40, 40, 20]
    assert len(some.index.unique()) == 100 and torch.equal(labels[some.index - 7], some.labels)
    assert int(some.index.max()) > 577 and int(some.index[some.labels == 0].max()) > 300, "drawn from all of them"
    many = Data("", "all", torch.arange(500), torch.arange(500), (1, 1, 1), tuple(map(str, range(500))), data.read)
    assert len(_balanced(many).labels.unique()) == 100


class Through(torch.autograd.Function):
    """Rounded to the levels of 8 bit, with the gradient of what is not."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x * 255).round() / 255

    @staticmethod
    def backward(ctx: object, *slopes: Tensor) -> Tensor:
        return slopes[0]


class Hidden(nn.Module):
    """A sum of two networks, of which one passes no gradient back."""

    def __init__(self, seen: nn.Module, unseen: nn.Module) -> None:
        super().__init__()
        self.seen, self.unseen = seen, unseen

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x) + self.unseen(x.detach())


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Through.apply(x)  # type: ignore[return-value]


def pooled(side: int) -> nn.Sequential:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * (side // 4) ** 2, 10))


@pytest.mark.parametrize("side", [8, 28])
@pytest.mark.parametrize("ground", [0.0, 0.5, 1.0, None])
def test_ties_of_flat_images_do_not_make_a_gradient_wrong_and_wrong_ones_are_found(
    side: int, ground: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(10, 1, side, side, generator=generator)
    if ground is not None:
        x = torch.full_like(x, ground)
        x[:5, :, side // 3 : side // 2, side // 3 :] = 200 / 255
    data = in_memory("all", x, torch.zeros(10, dtype=torch.int64), tuple("0123456789"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        right, other = pooled(side), pooled(side)
    found = [
        _differences(Classifier(net, shape=(1, side, side), num_classes=10).eval(), data).status
        for net in (right, nn.Sequential(right, nn.Sigmoid()), nn.Sequential(Rounds(), right), Hidden(right, other))
    ]
    assert found == ["passed", "passed", "warned", "warned"]
