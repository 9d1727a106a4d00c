"""Networks by name, with packages that are not installed here: modules in their place that have the same functions."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier
from rempart.models import card, load, save
from rempart.models.load import architecture

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def tiny(num_classes: int = 1000) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


class Headless(nn.Module):
    """As DINOv2, CLIP and others in timm: a classifier where one is asked for, ahead of other weights."""

    def __init__(self, num_classes: int = 0) -> None:
        super().__init__()
        self.head = nn.Linear(4, num_classes) if num_classes else nn.Identity()
        self.body = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.mean((2, 3))))


class Auxiliary(nn.Module):
    """As GoogLeNet and Inception of torchvision: heads for training, and channels that are scaled again."""

    def __init__(self, num_classes: int = 1000, aux_logits: bool = True, transform_input: bool = False) -> None:
        super().__init__()
        self.aux_logits, self.transform_input = aux_logits, transform_input
        if aux_logits:
            self.aux1 = nn.Linear(2, num_classes)
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)) * (2 if self.transform_input else 1))


class Versioned(nn.Module):
    """As MNASNet: it asks for the version in the metadata of its weights."""

    _version = 2

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.classifier = nn.Linear(3, num_classes)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version should be set to 2 instead of {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x.mean((2, 3)))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "tiny": tiny,
    "headless": Headless,
    "headless_unnamed": Headless,
    "auxiliary": Auxiliary,
    "versioned": Versioned,
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = ModuleType("timm")
    timm.is_model = lambda name: name in NETWORKS

    def create_model(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        assert not pretrained
        net = NETWORKS[name](**options)
        card = {"input_size": (3, 12, 12), "mean": MEAN, "std": STD}
        net.pretrained_cfg = {**card, **({"classifier": "head"} if name == "headless" else {})}  # pyright: ignore
        return net

    timm.create_model = create_model
    torchvision: Any = ModuleType("torchvision")
    steps = SimpleNamespace(crop_size=[12], mean=MEAN, std=STD)
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: steps, meta={"categories": list("abcde")}))

    def get_model(name: str, *, weights: None, **options: Any) -> nn.Module:
        return NETWORKS[name](**options)

    torchvision.models = SimpleNamespace(
        list_models=lambda module: [*NETWORKS], get_model_weights=lambda name: weights, get_model=get_model
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)


def prepared(n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and what the network gets of them."""
    x = torch.rand((n, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return x, (x - mean) / std


@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("name", ["headless", "headless_unnamed"])
def test_a_classifier_that_the_name_has_not_by_default(packages: None, name: str, classes: int, tmp_path: Path) -> None:
    net = Headless(classes)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model, (x, inside) = load(f"timm:{name}@{tmp_path / 'w.safetensors'}"), prepared()
    assert model.num_classes == classes
    torch.testing.assert_close(model(x), net(inside))


@pytest.mark.parametrize("aux", [True, False])
@pytest.mark.parametrize("classes", [3, 1000])
def test_auxiliary_heads_and_scaled_channels(packages: None, aux: bool, classes: int, tmp_path: Path) -> None:
    net = Auxiliary(classes, aux_logits=aux, transform_input=True)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model, (x, inside) = load(f"torchvision:auxiliary@{tmp_path / 'w.safetensors'}"), prepared()
    torch.testing.assert_close(model(x), net(inside))
    assert "transform_input" in model.notes[0]


@pytest.mark.parametrize("classes", [3, 1000])
def test_weights_whose_network_asks_for_their_version(packages: None, classes: int, tmp_path: Path) -> None:
    net = Versioned(classes)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model, (x, inside) = load(f"torchvision:versioned@{tmp_path / 'w.safetensors'}"), prepared()
    torch.testing.assert_close(model(x), net(inside))


def test_the_version_is_there_for_a_trained_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("versioned_factory")
    module.make = lambda: Classifier(Versioned(3), shape=(3, 12, 12), num_classes=3)
    monkeypatch.setitem(sys.modules, "versioned_factory", module)
    model = module.make().eval()
    save(model, tmp_path, name="python:versioned_factory:make")
    x, _ = prepared()
    torch.testing.assert_close(load(f"python:versioned_factory:make@{tmp_path}")(x), model(x))


def hub(folder: Path, net: nn.Module, prefix: str = "", **config: Any) -> str:
    """A folder as timm pushes it to the Hub; with a prefix, as transformers saves a network of timm."""
    folder.mkdir()
    save_file({prefix + key: value for key, value in net.state_dict().items()}, folder / "model.safetensors")
    own = {"tag": "a1_in1k", "input_size": [3, 10, 10], "mean": STD, "std": MEAN, "classifier": "4"}
    arguments = {"num_classes": 3, "in_chans": None}  # as save_for_hf writes them
    told = {"architecture": "tiny", "num_classes": 3, "model_args": arguments, "pretrained_cfg": own, **config}
    (folder / "config.json").write_text(json.dumps(told))
    return str(folder)


@pytest.mark.parametrize("wrapped", [False, True])
def test_folders_of_timm_open_with_their_own_mean_and_names(packages: None, wrapped: bool, tmp_path: Path) -> None:
    net, names = tiny(3), ["glioma", "none", "pituitary"]
    config: dict[str, Any] = {"label_names": names}
    if wrapped:
        config = {
            "model_args": None,
            "architectures": ["TimmWrapperForImageClassification"],
            "model_type": "timm_wrapper",
        }
        config["id2label"] = {"2": names[2], "0": names[0], "1": names[1]}
    model = load(hub(tmp_path / "m", net, "timm_model." if wrapped else "", **config))
    assert (model.shape, model.class_names) == ((3, 10, 10), tuple(names))
    x = torch.rand((2, 3, 10, 10), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (STD, MEAN))
    torch.testing.assert_close(model(x), net((x - mean) / std))


def test_folders_of_timm_that_ask_for_more_are_refused(packages: None, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_args but .* got checkpoint_path"):
        load(hub(tmp_path / "a", tiny(3), model_args={"checkpoint_path": "trap.pth"}))
    folder = hub(tmp_path / "b", tiny(3))
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"a folder with model\.safetensors"):
        load(folder)
    with pytest.raises(ModelError, match="a model of timm, got 'other'"):
        load(hub(tmp_path / "c", tiny(3), architecture="other"))
    with pytest.raises(ModelError, match="fixed in inference mode"):
        architecture(folder)


@pytest.mark.parametrize("package", ["timm", "torchvision"])
@pytest.mark.parametrize("classes", [5, 1000])
def test_normalisation_and_weights(packages: None, package: str, classes: int, tmp_path: Path) -> None:
    net = tiny(classes)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    source = f"{package}:tiny@{tmp_path / 'w.safetensors'}"
    model = load(source)
    x = torch.rand((2, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(model(x), net((x - mean) / std))
    assert (model.shape, model.num_classes, model.training) == ((3, 12, 12), classes, False)
    assert (model.class_names == tuple("abcde")) == (package == "torchvision" and classes == 5)
    assert card(model, source).name == f"{package}:tiny"


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_what_is_wrong_is_told(packages: None, package: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    for source in (f"{package}:tiny", f"{package}:@{file}", f"{package}:tiny@"):
        with pytest.raises(ModelError, match=rf"{package}:NAME@FILE.safetensors.*save_file"):
            load(source)
    with pytest.raises(ModelError, match="of t"):
        load(f"{package}:other@{file}")
    file.write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(ModelError, match="a safetensors file"):
        load(f"{package}:tiny@{file}")
    save_file({"0.weight": torch.zeros(4, 3, 3, 3)}, file)
    with pytest.raises(ModelError, match=r"got another 0\.bias, 4.weight, 4.bias"):
        load(f"{package}:tiny@{file}")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_missing_package_is_told(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelError, match=f"pip install {package}"):
        load(f"{package}:tiny@w.safetensors")


REAL = {
    "torchvision": ["inception_v3", "googlenet", "mnasnet0_5", "squeezenet1_1", "densenet121", "swin_t"],
    "timm": [
        *("vit_small_patch14_dinov2", "samvit_base_patch16", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
        *("convnext_atto", "efficientvit_b0", "mobilenetv3_small_050", "resnet18", "levit_128s", "tiny_vit_5m_224"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), [(package, name) for package in REAL for name in REAL[package]])
def test_logits_are_those_of_the_real_packages(package: str, name: str, tmp_path: Path) -> None:
    """As torchvision's builders and timm's `create_model` make the network for weights of three classes."""
    real = pytest.importorskip(package)
    torch.manual_seed(0)
    if package == "timm":
        net = real.create_model(name, pretrained=False, num_classes=3).eval()
        steps = SimpleNamespace(**net.pretrained_cfg)
    else:
        net = real.models.get_model(name, weights=None, num_classes=3).eval()
        steps = real.models.get_model_weights(name).DEFAULT.transforms()
        if hasattr(net, "transform_input"):
            net.transform_input = True
    save_file({key: value.clone().contiguous() for key, value in net.state_dict().items()}, tmp_path / "w.safetensors")
    model = load(f"{package}:{name}@{tmp_path / 'w.safetensors'}")
    x = torch.rand((1, *model.shape), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (steps.mean, steps.std))
    with torch.no_grad():
        expected, z = net((x - mean) / std), model(x)
    assert model.num_classes == 3
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
