"""Hugging Face folders: the logits that transformers gives for the same image file, or a refusal."""

import json
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from rempart.core.errors import ModelError
from rempart.core.model import accelerated, frozen
from rempart.models import build, load, save
from rempart.models.formats.hugging_face import Frame, is_hugging_face

NAMES = {0: "glioma", 1: "none", 2: "pituitary"}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    logging.disable_progress_bar()


def vit(**more: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, id2label=NAMES, **more))


def resnet(**more: Any) -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, id2label=NAMES, **more))


def convnext() -> nn.Module:
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, id2label=NAMES)
    )


def written(folder: Path, make: Callable[[], nn.Module] = vit, processor: Any = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.running_mean, -0.2, 0.2)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)
    model.eval().save_pretrained(folder)
    (processor or ViTImageProcessorPil(size={"height": 32, "width": 32})).save_pretrained(folder)
    return model


def pictures(shape: Sequence[int], n: int = 3, seed: int = 0) -> torch.Tensor:
    """8-bit images, smooth at first and with noise on them."""
    rng = torch.Generator().manual_seed(seed)
    waves = torch.nn.functional.interpolate(
        torch.rand((n, shape[0], 5, 5), generator=rng), list(shape[1:]), mode="bicubic"
    )
    return (255 * (waves + 0.1 * torch.randn((n, *shape), generator=rng)).clamp(0, 1)).round().to(torch.uint8)


def theirs(model: nn.Module, processor: Any, images: torch.Tensor) -> torch.Tensor:
    arrays = [image.movedim(0, -1).numpy() for image in images]
    with torch.no_grad():
        return model(**processor(images=arrays, return_tensors="pt", input_data_format="channels_last")).logits


PROCESSORS = {
    "vit": (vit, ViTImageProcessorPil(size={"height": 32, "width": 32}), (3, 32, 32)),
    "crop": (
        vit,
        ViTImageProcessorPil(size={"height": 36, "width": 40}, do_center_crop=True, crop_size=32),
        (3, 36, 40),
    ),
    "shortest": (
        resnet,
        ViTImageProcessorPil(size={"shortest_edge": 36}, do_center_crop=True, crop_size={"height": 32, "width": 30}),
        (3, 36, 36),
    ),
    "convnext": (convnext, ConvNextImageProcessorPil(size={"shortest_edge": 28}, crop_pct=0.875), (3, 32, 32)),
    "whole": (convnext, ConvNextImageProcessorPil(size={"shortest_edge": 384}), (3, 384, 384)),
    "mean": (
        resnet,
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
        (3, 32, 32),
    ),
    "unscaled": (resnet, ViTImageProcessorPil(size={"height": 8, "width": 8}, do_rescale=False), (3, 8, 8)),
    "plain": (resnet, ViTImageProcessorPil(size={"height": 8, "width": 8}, do_normalize=False), (3, 8, 8)),
    "as they come": (vit, ViTImageProcessorPil(do_resize=False), (3, 32, 32)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    make, processor, shape = PROCESSORS[name]
    model = written(tmp_path / "m", make, processor)
    loaded = load(str(tmp_path / "m"))
    assert (loaded.shape, loaded.class_names, loaded.training) == (shape, tuple(NAMES.values()), False)
    images = pictures(shape, 2)
    torch.testing.assert_close(loaded(images / 255), theirs(model, processor, images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("resample", "levels"), [(0, 0.0), (2, 1.001), (3, 4.001)])
@pytest.mark.parametrize("size", [(50, 40), (20, 31), (32, 64)])
def test_images_of_another_size_are_resized_inside(
    tmp_path: Path, size: tuple[int, int], resample: int, levels: float
) -> None:
    """Pillow rounds to 8 bit after each axis: the bilinear images differ by one level, the bicubic ones by four."""
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=resample, do_normalize=False)
    model = written(tmp_path / "m", vit, processor)
    loaded, images = load(str(tmp_path / "m")), pictures((3, *size))
    arrays = [image.movedim(0, -1).numpy() for image in images]
    right = processor(images=arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    gap = (loaded.net[0](images / 255) - right).abs()
    assert float(gap.max()) * 255 <= levels
    assert float(gap.mean()) * 255 <= 0.5
    torch.testing.assert_close(loaded(images / 255), theirs(model, processor, images), atol=5e-3, rtol=0)


def test_resizing_that_does_not_smooth_would_be_seen() -> None:
    images = pictures((3, 64, 64))
    plain = torch.nn.functional.interpolate(images / 255, [32, 32], mode="bilinear", align_corners=False)
    assert float((Frame((32, 32), None, 2)(images / 255) - plain).abs().max()) * 255 > 10


def test_gradients_flow_through_all_of_it(tmp_path: Path) -> None:
    written(tmp_path / "m", resnet, PROCESSORS["shortest"][1])
    model = load(str(tmp_path / "m")).double()
    x = (0.1 + 0.8 * pictures((3, 40, 44), 1).double() / 255).requires_grad_(True)  # away from black and white
    with frozen(model):
        z = model(x)[0, 1]
        (slope,) = torch.autograd.grad(z, x)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
        step = 1e-6
        difference = (model(x + step * direction)[0, 1] - model(x - step * direction)[0, 1]) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), difference, atol=0, rtol=1e-4)


def test_the_faster_copy_is_used(tmp_path: Path) -> None:
    written(tmp_path / "m", resnet)
    model = load(str(tmp_path / "m"))
    with frozen(model):
        assert accelerated(model) is not model


def test_classes_without_names_are_numbers(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, num_labels=3
    )
    written(tmp_path / "m", lambda: ViTForImageClassification(config))
    assert load(str(tmp_path / "m")).class_names == ("0", "1", "2")


def test_one_channel(tmp_path: Path) -> None:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.2], image_std=[0.4])
    model = written(tmp_path / "m", lambda: vit(num_channels=1), processor)
    images = pictures((1, 32, 32), 2)
    torch.testing.assert_close(
        load(str(tmp_path / "m"))(images / 255), theirs(model, processor, images), atol=1e-5, rtol=1e-4
    )


def test_which_folders_are_theirs(tmp_path: Path) -> None:
    written(tmp_path / "theirs")
    ours = build("mri-cnn", shape=(1, 16, 16), num_classes=2, class_names="ab", options={"width": 4})
    save(ours, tmp_path / "ours", name="mri-cnn", options={"width": 4})
    assert is_hugging_face(tmp_path / "theirs") and not is_hugging_face(tmp_path / "ours")
    for content in ("[]", "not json", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        assert not is_hugging_face(tmp_path)


# ---- refusals


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["REMPART_BOMB"],)


@pytest.fixture
def bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that exists as soon as something planted has run."""
    monkeypatch.setenv("REMPART_BOMB", str(tmp_path / "exploded"))
    return tmp_path / "exploded"


def test_pickled_weights_are_refused(tmp_path: Path, bomb: Path) -> None:
    written(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    (tmp_path / "m/pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ModelError, match=r"pytorch_model.bin, which is not opened.*save_pretrained"):
        load(str(tmp_path / "m"))
    assert not bomb.exists()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_of_the_folder_is_refused(tmp_path: Path, bomb: Path, file: str) -> None:
    written(tmp_path / "m")
    (tmp_path / "m/evil.py").write_text("import os; os.mkdir(os.environ['REMPART_BOMB'])\n")
    classes = {"AutoConfig": "evil.C", "AutoModelForImageClassification": "evil.M", "AutoImageProcessor": "evil.P"}
    change(tmp_path / "m" / file, auto_map=classes)
    with pytest.raises(ModelError, match="auto_map"):
        load(str(tmp_path / "m"))
    assert not bomb.exists() and "evil" not in sys.modules


@pytest.mark.parametrize(
    "asked",
    [
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"vision_config": [{"inner": {"attn_implementation": "evil/kernel"}}]},
    ],
    ids=str,
)
def test_compiled_code_from_elsewhere_is_not_asked_for(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Transformers fetches kernels that a configuration names, even where another implementation is asked for."""
    written(tmp_path / "m")
    change(tmp_path / "m/config.json", **asked)
    with pytest.raises(ModelError, match="attn_implementation"):
        load(str(tmp_path / "m"))
    change(tmp_path / "m/config.json", **dict.fromkeys(asked, "sdpa"))
    assert load(str(tmp_path / "m")).num_classes == 3


@pytest.mark.parametrize(
    "nulls",
    [
        ["model_args", "quantization_config", "auto_map"],
        ["architectures", "transformers_weights", "_attn_implementation"],
        ["id2label", "label2id", "num_labels"],
        ["num_channels", "problem_type"],
    ],
)
def test_keys_that_are_null_say_nothing(nulls: list[str], tmp_path: Path) -> None:
    model = written(tmp_path / "m")
    change(tmp_path / "m" / "config.json", **dict.fromkeys(nulls))
    change(tmp_path / "m" / "config.json", auto_map={})
    loaded, x = load(str(tmp_path / "m")), pictures((3, 32, 32))
    expected = theirs(model, ViTImageProcessorPil(size={"height": 32, "width": 32}), x)
    torch.testing.assert_close(loaded(x / 255), expected, atol=1e-4, rtol=0)
    assert loaded.class_names == (("0", "1", "2") if "id2label" in nulls else tuple(NAMES.values()))


@pytest.mark.parametrize(
    "told",
    [
        {"auto_map": None, "processor_class": None},
        {"image_mean": None, "image_std": None},
        {"rescale_factor": None, "crop_size": None, "do_center_crop": None},
        {"resample": None},
        {"size": {"height": 32, "width": 32, "shortest_edge": None}},
        {"size": 32},
    ],
)
def test_so_it_is_in_the_processor(told: dict[str, Any], tmp_path: Path) -> None:
    """What is null has the value that transformers gives it where it is left out."""
    model = written(tmp_path / "m")
    change(tmp_path / "m" / "preprocessor_config.json", **told)
    x = pictures((3, 32, 32))
    expected = theirs(model, ViTImageProcessorPil(size={"height": 32, "width": 32}), x)
    torch.testing.assert_close(load(str(tmp_path / "m"))(x / 255), expected, atol=1e-4, rtol=0)


def test_a_step_that_is_null_is_off_as_in_transformers(tmp_path: Path) -> None:
    model = written(tmp_path / "m")
    change(tmp_path / "m" / "preprocessor_config.json", do_normalize=None)
    x = pictures((3, 32, 32))
    with torch.no_grad():
        expected = model(pixel_values=x / 255).logits
    torch.testing.assert_close(load(str(tmp_path / "m"))(x / 255), expected, atol=1e-4, rtol=0)


def test_a_size_that_does_not_fit_the_network_is_told(tmp_path: Path) -> None:
    written(tmp_path / "m")
    change(tmp_path / "m" / "preprocessor_config.json", size=None)
    with pytest.raises(ModelError, match=r"images of \(224, 224\) pixels.*preprocessor_config.json"):
        load(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("file", "values", "match"),
    [
        ("config.json", {"architectures": ["ViTForMaskedImageModeling"]}, "a model ...ForImageClassification"),
        ("config.json", {"quantization_config": {"quant_method": "evil"}}, "quantization_config"),
        (
            "config.json",
            {"transformers_weights": "other.safetensors"},
            "code or file, got transformers_weights",
        ),
        ("config.json", {"model_args": {"checkpoint_path": "trap.pth"}}, "code or file, got model_args"),
        ("config.json", {"num_hidden_layers": 2}, "all weights in model.safetensors"),
        ("config.json", {"hidden_size": 12}, "weights of the shapes that config.json asks for"),
        ("config.json", {"model_type": "nothing"}, "that transformers can read"),
        ("config.json", {"intermediate_size": 2**50}, "all weights in model.safetensors"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "a mean for each of 3 channels"),
        ("preprocessor_config.json", {"size": {"height": 60_000, "width": 60_000}}, "MAX_VOXELS"),
    ],
)
def test_what_cannot_be_used_is_told(tmp_path: Path, file: str, values: dict[str, Any], match: str) -> None:
    written(tmp_path / "m")
    change(tmp_path / "m" / file, **values)
    with pytest.raises(ModelError, match=match):
        load(str(tmp_path / "m"))


def test_a_processor_that_does_more_is_told(tmp_path: Path) -> None:
    processor = EfficientNetImageProcessorPil(size={"height": 32, "width": 32}, rescale_offset=True)
    written(tmp_path / "m", vit, processor)
    with pytest.raises(ModelError, match=r"and no more, got EfficientNet\w+, whose images differ by"):
        load(str(tmp_path / "m"))


@pytest.mark.parametrize(("name", "match"), [("preprocessor_config.json", "says how images are prepared")])
def test_missing_files(tmp_path: Path, name: str, match: str) -> None:
    written(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    with pytest.raises(ModelError, match=match):
        load(str(tmp_path / "m"))


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "m")
    (tmp_path / "m/adapter_config.json").write_text('{"base_model_name_or_path": "../elsewhere"}')
    with pytest.raises(ModelError, match="an adapter"):
        load(str(tmp_path / "m"))


def test_damaged_weights(tmp_path: Path) -> None:
    written(tmp_path / "m")
    content = (tmp_path / "m/model.safetensors").read_bytes()
    (tmp_path / "m/model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="that transformers can read"):
        load(str(tmp_path / "m"))


def test_the_world_outside_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen: list[bool] = []
    read = AutoImageProcessor.from_pretrained
    monkeypatch.setattr(
        AutoImageProcessor, "from_pretrained", lambda *a, **k: seen.append(constants.HF_HUB_OFFLINE) or read(*a, **k)
    )
    written(tmp_path / "m")
    load(str(tmp_path / "m"))
    assert seen == [True] and not constants.HF_HUB_OFFLINE and "HF_HUB_OFFLINE" not in os.environ
    assert logging.is_progress_bar_enabled() is False, "as the test left it"


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(ModelError, match=r"pip install 'rempart\[hugging-face\]'"):
        load(str(tmp_path / "m"))
