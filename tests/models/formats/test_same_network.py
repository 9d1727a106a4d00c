"""One network in every format it can be saved in: the same logits, and the same images broken by the same attack."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rempart.attacks import attack_batch
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.models import build, load
from rempart.models.load import FILES

FAST = ("safetensors", "Hugging Face", "pt2", "onnx, by tracing", *(["keras"] if ".keras" in FILES else []))


@pytest.fixture(scope="module")
def formats() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "formats.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_formats", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(shape: Sequence[int], n: int = 24) -> torch.Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(5))


def disturbed(model: Classifier) -> Classifier:
    """In inference mode, with statistics of batch norm that are not those of the beginning and classes that vary."""
    with torch.no_grad():
        model.train()(pictures(model.shape, 64))
        model.eval()
        head = list(model.parameters())[-1]
        head -= model(pictures(model.shape)).mean(0)
    return model


@pytest.mark.parametrize("kind", ["mri-cnn", "resnet"])
def test_every_format_is_the_same_network(formats: ModuleType, kind: str, tmp_path: Path) -> None:
    check(formats, kind, tmp_path, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mri-cnn", "resnet"])
def test_the_exporter_by_torch_export(formats: ModuleType, kind: str, tmp_path: Path) -> None:
    check(formats, kind, tmp_path, ("safetensors", "Hugging Face", "onnx, by torch.export"))


def check(formats: ModuleType, kind: str, folder: Path, only: Sequence[str]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "resnet":
            model, name, options = disturbed(formats.tiny_resnet((3, 32, 32), "abc")), None, None
        else:
            name, options = kind, {"width": 4}
            moments = {"mean": [0.4], "std": [0.3]}
            model = disturbed(
                build(kind, shape=(1, 16, 16), num_classes=3, class_names="abc", options=options, **moments)
            )
    x, threat = pictures(model.shape), Threat.parse("linf:0.003" if kind == "resnet" else "linf:0.02")
    z = model(x)
    y = z.argmax(1)
    assert len(set(y.tolist())) > 1
    broken = attack_batch(model, x, y, threat, "pgd", {"steps": 10}).broken
    assert 2 < int(broken.sum()) < len(x) - 2, "a budget that tells the images apart"
    sources = formats.written(model, folder, name=name, options=options, only=only)
    assert set(sources) == {label for label in only if label != ("safetensors" if kind == "resnet" else "Hugging Face")}
    for label, source in sources.items():
        loaded = load(source)
        assert loaded.shape == model.shape, label
        torch.testing.assert_close(loaded(x), z, atol=1e-4, rtol=0, msg=label)
        assert torch.equal(attack_batch(loaded, x, y, threat, "pgd", {"steps": 10}).broken, broken), label


def test_another_network_would_be_seen(formats: ModuleType) -> None:
    """Weights that are 1 % off change the logits by more than ten times what formats may differ by."""
    model = disturbed(formats.tiny_resnet((3, 32, 32), "abc"))
    x = pictures(model.shape)
    with torch.no_grad():
        z = model(x)
        for parameter in model.parameters():
            parameter *= 1.01
        assert float((model(x) - z).abs().max()) > 1e-3
