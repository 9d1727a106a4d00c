"""`rempart inspect`: what a model takes, what it is made of, what it returns, and whether it can be attacked."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rempart.audit import preflight
from rempart.audit.checks import above_chance
from rempart.audit.pieces import seeded
from rempart.core.data import Data, open_data
from rempart.core.errors import DataError, ModelError
from rempart.core.model import Classifier, Normalize, blind, frozen, placed
from rempart.core.types import Images
from rempart.models import card, load
from rempart.models.formats import PYTHON
from rempart.models.formats.hugging_face import is_hugging_face
from rempart.models.formats.named import NAMED, is_timm
from rempart.models.reading import PerImage, Span
from rempart.report.schema import AS_IT_IS, Check, ModelCard, Reading, Strict

_NOISE = 16  # images
_SAMPLE, _BATCH = 100, 50  # images whose accuracy is looked at
_STEPS = (0.1, 0.03, 0.01, 0.003, 0.001)  # of finite differences, along the gradient, in units of its box


class Layer(Strict):
    """One layer without parts, in the order in which they run.

    Attributes:
        shape: Of what it puts out for one image; None where it did not run, or gives no tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int


class Prediction(Strict):
    """What the model says of one image.

    Attributes:
        image: Which one.
        name: The predicted class.
        confidence: Softmax of that class.
        label: The true class, where it is known.
    """

    image: str
    name: str
    confidence: float
    label: str | None = None


class Inspection(Strict):
    """What `rempart inspect` finds.

    Attributes:
        form: What kind of file or code the model comes from.
        normalisation: Layers before the first weights that scale images.
        problem: Why it cannot be audited; None where it can be.
    """

    form: str
    model: ModelCard
    reading: Reading
    normalisation: tuple[str, ...]
    layers: tuple[Layer, ...]
    checks: tuple[Check, ...]
    problem: str | None
    prediction: Prediction | None


def inspect_model(source: str, reading: Reading = AS_IT_IS, data: str | None = None) -> Inspection:
    """Load a model and look at it, on the first images of a data set or on noise.

    Args:
        source: As `models.load` takes it.
        reading: How to read it.
        data: Images to check it on, and to predict the first of; the accuracy is that on up to 100 of them, as many of
            each class as there are.

    Raises:
        ModelError: If the model cannot be loaded.
        DataError: If the data cannot be read or do not fit.
    """
    with seeded(0, torch.device("cpu")):  # for models that draw random numbers
        model = load(source, reading)
        given = _noise(model) if data is None else open_data(data).seen_by(model)
        first = given.batch(torch.arange(1))
        layers, normalisation = _layers(model, first.x)
        checks: tuple[Check, ...] = ()
        problem = prediction = None
        try:
            mended, checks = preflight(model, given)
            if data is not None:
                checks = (*checks, _accuracy(mended, _balanced(given)))
            if blind(mended) is None:
                checks = (*checks, _differences(mended, first.x))
            with frozen(mended), torch.no_grad():
                confidence, label = mended(placed(mended, first.x)).softmax(1).max(1)
            prediction = Prediction(
                image="noise" if data is None else f"the first image of {given.source}",
                name=model.class_names[int(label)],
                confidence=float(confidence),
                label=None if data is None else given.class_names[int(first.y)],
            )
        except DataError:
            raise
        except ModelError as error:
            problem = str(error)
    return Inspection(
        form=_form(source),
        model=card(model, source),
        reading=reading,
        normalisation=normalisation,
        layers=layers,
        checks=checks,
        problem=problem,
        prediction=prediction,
    )


def described(found: Inspection) -> str:
    """An inspection as plain text."""
    model = found.model
    names = ", ".join(model.classes[:10]) + (", ..." if len(model.classes) > 10 else "")
    facts = {
        "model": f"{model.name} ({found.form})",
        "images": f"{'x'.join(map(str, model.shape))}, pixels in [{model.low:g}, {model.high:g}]",
        "box": found.reading.box,
        "classes": f"{len(model.classes)}: {names}",
        "parameters": f"{model.parameters:,}",
        "digest": model.digest,
        "normalisation": "; ".join(found.normalisation) or "none found",
    }
    lines = [f"{name:<14} {value}" for name, value in facts.items()]
    lines += [f"{'loading':<14} {note}" for note in model.notes]
    rows = [("layer", "kind", "output", "parameters")]
    rows += [
        (layer.name, layer.kind, "x".join(map(str, layer.shape or ())) or "-", f"{layer.parameters:,}")
        for layer in found.layers
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines += ["", *(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows)]
    lines += ["", *(f"{check.status:<8} {check.name}: {check.message}" for check in found.checks)]
    if found.problem is not None:
        lines.append(f"{'failed':<8} {found.problem}")
    if (told := found.prediction) is not None:
        true = "" if told.label is None else f", and is {told.label}"
        lines += ["", f"{told.image} is taken for {told.name} ({told.confidence:.1%}){true}"]
    return "\n".join(lines)


def _noise(model: Classifier) -> Data:
    """Uniform noise in the box of a model, labelled as the model sees it."""
    x = torch.rand((_NOISE, *model.shape), generator=torch.Generator().manual_seed(0))
    x = model.low + (model.high - model.low) * x
    with frozen(model), torch.no_grad():
        labels = model(placed(model, x)).argmax(1).cpu()
    return Data("noise", "all", torch.arange(_NOISE), labels, model.shape, model.class_names, lambda index: x[index])


def _balanced(data: Data) -> Data:
    """Up to 100 images drawn from all, one class after the other, so that each has as many while it lasts."""
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    labels = data.labels[drawn]
    turn = torch.zeros_like(labels)
    for label in labels.unique():
        turn[labels == label] = torch.arange(int((labels == label).sum()))
    return data.take(drawn[turn.argsort(stable=True)[:_SAMPLE]])


def _accuracy(model: Classifier, data: Data) -> Check:
    with frozen(model), torch.no_grad():
        predicted = torch.cat([model(placed(model, batch.x)).argmax(1).cpu() for batch in data.batches(_BATCH)])
    return above_chance(data.labels.numpy(), predicted.numpy(), model.class_names)


def _layers(model: Classifier, x: Images) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """Layers as they run, and those before the first weights that scale images."""
    leaves = {module: name for name, module in model.named_modules() if not list(module.children())}
    shapes: dict[nn.Module, tuple[int, ...] | None] = {}

    def see(module: nn.Module, _: object, output: object) -> None:
        shapes.setdefault(module, tuple(output.shape[1:]) if isinstance(output, Tensor) else None)

    handles = [module.register_forward_hook(see) for module in leaves]
    try:
        with frozen(model), torch.no_grad():
            model(placed(model, x))
    finally:
        for handle in handles:
            handle.remove()
    order = [*shapes, *(module for module in leaves if module not in shapes)]
    layers = tuple(
        Layer(
            name=leaves[module],
            kind=str(getattr(module, "kind", type(module).__name__)),
            shape=shapes.get(module),
            parameters=sum(parameter.numel() for parameter in module.parameters()),
        )
        for module in order
    )
    return layers, tuple(_scalings(order))


def _scalings(order: list[nn.Module]) -> Iterator[str]:
    for module in order:
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            return
        if isinstance(module, Normalize) and not (bool((module.mean == 0).all()) and bool((module.std == 1).all())):
            yield f"mean {_numbers(module.mean)}, std {_numbers(module.std)}"
        elif isinstance(module, Span):
            yield f"[0, 1] to [{float(module.low):g}, {float(module.low + module.width):g}]"
        elif isinstance(module, PerImage):
            yield "each image by its own mean and standard deviation"
        elif scaling := getattr(module, "scaling", ""):
            yield scaling


def _numbers(values: Tensor) -> str:
    return "/".join(f"{value:.4g}" for value in values.tolist())


def _differences(model: Classifier, x: Images) -> Check:
    """Compare the gradient of one image with finite differences along it, for the step where both agree best."""
    x = placed(model, x).detach()
    mix = torch.randn(model.num_classes, generator=torch.Generator().manual_seed(0)).to(x)
    with frozen(model):
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad((model(x) @ mix).sum(), x)
        slope = float(gradient.norm())
        direction = gradient / max(slope, 1e-30)
        found: list[float] = []
        with torch.no_grad():
            for step in _STEPS:
                h = step * (model.high - model.low)
                found.append(float(((model(x + h * direction) - model(x - h * direction)) @ mix).sum() / (2 * h)))
    best = min(found, key=lambda value: abs(value - slope))
    evidence = {"gradient": slope, "finite differences": best}
    if slope == 0 or abs(best - slope) > 0.1 * slope:
        message = "The gradient is not that of the function: gradient attacks will be weak, and accuracies too high."
        return Check(name="finite differences", status="warned", message=message, evidence=evidence)
    message = "The gradient agrees with finite differences along it."
    return Check(name="finite differences", status="passed", message=message, evidence=evidence)


def _form(source: str) -> str:
    if source.startswith(PYTHON):
        return "Python function" + (" with trained weights" if "@" in source else "")
    if source.startswith(NAMED):
        return f"network of {source.partition(':')[0]}"
    if is_timm(Path(source)):
        return "folder of timm"
    if is_hugging_face(Path(source)):
        return "Hugging Face folder"
    return "folder" if Path(source).is_dir() else f"{Path(source).suffix.lower()} file"
