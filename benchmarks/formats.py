"""Is one network the same network in every format that it can be saved in?

Question: one network saved as a folder of Rempart, `.pt2`, `.onnx` (by both exporters of torch), `.keras` and a Hugging
Face folder: largest difference of its logits, and for how many images the worst case of an audit differs, in which
format.

How: two networks. mri-cnn, as --model gives it, in all formats but the last; and a tiny ResNet of transformers,
trained here for a few epochs, in all but the first. Every file is loaded by `rempart.load` and audited by the suite
`fast` on the same images with the same seed; the first format of each network is what the others are compared with.
Keras files hold the same weights in layers of Keras, channels last, with a softmax at the end.

    python benchmarks/formats.py [--data ../shared/data/brain-mri.zip@128@grey] [--model runs/mri] [--limit 300]
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import torch
from torch import Tensor, nn

import rempart
from rempart.core.model import Classifier, Normalize
from rempart.core.repro import environment
from rempart.data import Data, open_data
from rempart.models import build, load, save
from rempart.models.save import Config
from rempart.report.schema import AuditSpec

RESULT = Path(__file__).parent / "results" / "formats.json"
TARGET = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/brain-mri.zip@128@grey")
    parser.add_argument("--model", help="a trained mri-cnn in a folder; trained here for two epochs without")
    parser.add_argument("--threat", default="linf:1/255")
    parser.add_argument("--limit", type=int, default=300, help="test images")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of the tiny ResNet")
    parser.add_argument("--quick", action="store_true", help="a few digits and a few seconds: does it run?")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick:
        given.data, given.limit, given.epochs, given.threat = "digits", 20, 1, "linf:0.05"

    train, test = open_data(f"{given.data}:train").load(), open_data(f"{given.data}:test").head(given.limit).load()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        own, name, options = own_network(given.model, train)
        sources = written(own, Path(folder) / "own", name=name, options=options)
        results[name] = compared(sources, test, given)
        resnet = tiny_resnet(train.shape, train.class_names)
        fit(resnet, train, given.epochs)
        results["ResNet of transformers"] = compared(written(resnet, Path(folder) / "resnet"), test, given)
    record = {
        "question": "largest difference of logits, and images whose worst case differs, between formats of one network",
        "command": shlex.join(["python", "benchmarks/formats.py", *sys.argv[1:]]),
        "target": TARGET,
        "threat": given.threat,
        "data": test.source,
        "hardware": environment(),
        "date": date.today().isoformat(),
        "n": len(test),
        "seed": 0,
        "results": results,
    }
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def own_network(folder: str | None, data: Data) -> tuple[Classifier, str, dict[str, Any]]:
    """The trained network, or one trained here, with the name and options that it is built from."""
    if folder:
        config = Config.model_validate_json((Path(folder) / "config.json").read_bytes())
        return load(folder), config.architecture, config.options
    name = "mri-cnn" if min(data.shape[1:]) >= 16 else "lenet"
    model = build(name, shape=data.shape, num_classes=data.num_classes, class_names=data.class_names)
    fit(model, data, 2)
    return model, name, {}


def tiny_resnet(shape: Sequence[int], class_names: Sequence[str]) -> Classifier:
    """A ResNet of transformers with basic blocks, normalised to [-1, 1], from images of this shape."""
    from transformers import ResNetConfig, ResNetForImageClassification

    from rempart.models.formats.hugging_face import Logits

    names = dict(enumerate(class_names))
    config = ResNetConfig(
        num_channels=shape[0], embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
        id2label=names, label2id={name: k for k, name in names.items()},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ResNetForImageClassification(config)
    half = [0.5] * shape[0]
    steps = nn.Sequential(Normalize(half, half), Logits(net))
    return Classifier(steps, shape=shape, num_classes=len(names), class_names=class_names)


def fit(model: Classifier, data: Data, epochs: int) -> None:
    """Plain training with Adam; leaves the model in inference mode."""
    generator, optimiser = torch.Generator().manual_seed(0), torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(data), generator=generator).split(64):
            batch = data.batch(part)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(batch.x), batch.y).backward()
            optimiser.step()
    model.eval()


# ---- one network, every format


def written(
    model: Classifier,
    folder: Path,
    *,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, str]:
    """Save a network in every format it can be saved in (or some), and say where; the first is the original's own."""
    folder.mkdir(parents=True, exist_ok=True)
    example = torch.rand((2, *model.shape), generator=torch.Generator().manual_seed(0))
    formats: dict[str, Callable[[], Path]] = {}
    if name is not None:
        formats["safetensors"] = lambda: as_folder(model, folder / "ours", name, options)
    else:
        formats["Hugging Face"] = lambda: as_hugging_face(model, folder / "theirs")
    formats |= {
        "pt2": lambda: as_exported(model, folder / "net.pt2", example),
        "onnx, by tracing": lambda: as_onnx(model, folder / "traced.onnx", example, dynamo=False),
        "onnx, by torch.export": lambda: as_onnx(model, folder / "exported.onnx", example, dynamo=True),
        "keras": lambda: as_keras(model, folder / "net.keras"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn of what is to come in torch
        return {label: str(make()) for label, make in formats.items() if only is None or label in only}


def as_folder(model: Classifier, path: Path, name: str, options: Mapping[str, Any] | None) -> Path:
    """A folder of ours."""
    save(model, path, name=name, options=options)
    return path


def as_exported(model: Classifier, path: Path, example: Tensor) -> Path:
    """A program of torch.export for any number of images."""
    torch.export.save(torch.export.export(model.net, (example,), dynamic_shapes=({0: torch.export.Dim("n")},)), path)
    return path


def as_onnx(model: Classifier, path: Path, example: Tensor, *, dynamo: bool) -> Path:
    """A file of ONNX for any number of images, by one of the two exporters of torch."""
    more: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim("n")},)}
    if not dynamo:
        more = {"dynamic_axes": {"x": {0: "n"}, "y": {0: "n"}}, "opset_version": 17}
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(
        model.net, (example,), str(path), dynamo=dynamo, external_data=False, verbose=False, **names, **more
    )
    return path


def as_hugging_face(model: Classifier, path: Path) -> Path:
    """A folder of transformers, with a processor that normalises as the network does."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    normalize, logits = model.net
    mean, std = (values.tolist() for values in (normalize.mean, normalize.std))
    height, width = model.shape[1:]
    logits.model.save_pretrained(path)
    ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=mean, image_std=std).save_pretrained(path)
    return path


def as_keras(model: Classifier, path: Path) -> Path:
    """A file of Keras: the same layers, channels last, with the same weights and a softmax at the end."""
    import keras

    source = keras.Input((*model.shape[1:], model.shape[0]))
    twin = keras.Model(source, _in_keras(model.net, source))
    twin.layers[-1].activation = keras.activations.softmax
    twin.save(path)
    return path


def _in_keras(net: nn.Module, x: Any) -> Any:
    """Lay the layers of a network of torch behind x, in Keras."""
    import keras
    from keras import layers

    def plain(values: Tensor) -> np.ndarray:
        return values.detach().cpu().numpy()

    match net:
        case Normalize():
            return layers.Normalization(mean=plain(net.mean), variance=plain(net.std) ** 2)(x)
        case nn.Conv2d():
            if any(net.padding):
                x = layers.ZeroPadding2D(net.padding)(x)
            layer = layers.Conv2D(net.out_channels, net.kernel_size, net.stride, use_bias=net.bias is not None)
            y = layer(x)
            weights = [plain(net.weight.permute(2, 3, 1, 0))]
            layer.set_weights(weights if net.bias is None else [*weights, plain(net.bias)])
            return y
        case nn.BatchNorm2d():
            layer = layers.BatchNormalization(epsilon=net.eps)
            y = layer(x)
            layer.set_weights([plain(v) for v in (net.weight, net.bias, net.running_mean, net.running_var)])
            return y
        case nn.MaxPool2d():
            sides = net.padding if isinstance(net.padding, int) else net.padding[0]
            x = layers.ZeroPadding2D(sides)(x) if sides else x  # behind ReLU, where 0 is the least
            return layers.MaxPooling2D(net.kernel_size, net.stride)(x)
        case nn.Linear():
            layer = layers.Dense(net.out_features)
            y = layer(x)
            layer.set_weights([plain(net.weight.T), plain(net.bias)])
            return y
        case nn.AdaptiveAvgPool2d():
            return layers.GlobalAveragePooling2D(keepdims=True)(x)
        case nn.Flatten():
            return layers.Flatten()(layers.Permute((3, 1, 2))(x))  # in the order of channels first
        case nn.ReLU():
            return layers.ReLU()(x)
        case nn.Identity() | nn.Dropout():
            return x
        case _ if hasattr(net, "shortcut") and hasattr(net, "activation"):  # a basic block of transformers
            return layers.ReLU()(keras.layers.Add()([_in_keras(net.layer, x), _in_keras(net.shortcut, x)]))
        case _:
            for part in net.children():
                x = _in_keras(part, x)
            return x


# ---- measuring


def compared(sources: Mapping[str, str], data: Data, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every format against the first: logits, and the worst case image by image."""
    rows: dict[str, dict[str, float]] = {}
    first: tuple[Tensor, np.ndarray, np.ndarray] | None = None
    for label, source in sources.items():
        started = time.perf_counter()
        model = load(source)
        loaded = time.perf_counter() - started
        with torch.no_grad():
            z = torch.cat([model(batch.x) for batch in data.batches(64)])
        part = f"[:{len(data)}]"
        spec = AuditSpec(model=source, data=f"{given.data}:test{part}", threat=given.threat, suite="fast", sweep=False)
        started = time.perf_counter()
        report = rempart.run(spec)
        assert report is not None and report.samples is not None and report.clean is not None
        worst = report.samples.worst_case()
        clean = (z.argmax(1) == data.labels).numpy()
        first = first or (z, worst, clean)
        rows[label] = {
            "load_seconds": loaded,
            "audit_seconds": time.perf_counter() - started,
            "largest_difference_of_logits": float((z - first[0]).abs().max()),
            "largest_logit": float(first[0].abs().max()),
            "clean_accuracy": report.clean.value,
            "worst_case_accuracy": float(worst.mean()),
            "images_whose_class_differs": int((clean != first[2]).sum()),
            "images_whose_worst_case_differs": int((worst != first[1]).sum()),
        }
    return rows


if __name__ == "__main__":
    main()
