"""Networks by name, with packages that are not installed here: modules in their place that have the same functions."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rempart.core.errors import ModelError
from rempart.models import card, load

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def tiny(num_classes: int = 1000) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    timm: Any = ModuleType("timm")
    timm.is_model = lambda name: name == "tiny"

    def create_model(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        assert not pretrained
        net = tiny(**options)
        net.pretrained_cfg = {"input_size": (3, 12, 12), "mean": MEAN, "std": STD}  # pyright: ignore
        return net

    timm.create_model = create_model
    torchvision: Any = ModuleType("torchvision")
    steps = SimpleNamespace(crop_size=[12], mean=MEAN, std=STD)
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: steps, meta={"categories": list("abcde")}))

    def get_model(name: str, *, weights: None, **options: Any) -> nn.Module:
        return tiny(**options)

    torchvision.models = SimpleNamespace(
        list_models=lambda module: ["tiny"], get_model_weights=lambda name: weights, get_model=get_model
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)


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
