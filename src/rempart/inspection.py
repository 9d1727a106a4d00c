"""`rempart inspect`: what a model takes, what it is made of, what it returns, and whether it can be attacked."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from rempart.attacks.preflight import above_chance, preflight
from rempart.core.errors import DataError, ModelError
from rempart.core.model import Classifier, Normalize, blind, frozen, placed
from rempart.core.repro import seeded
from rempart.core.types import Images
from rempart.data import Data, open_data
from rempart.models import card, load
from rempart.models.formats import PYTHON
from rempart.models.formats.hugging_face import is_hugging_face
from rempart.models.formats.named import NAMED, is_timm
from rempart.models.reading import PerImage, Span
from rempart.report.schema import AS_IT_IS, Check, ModelCard, Reading, Strict

_NOISE = 16  # images
_SAMPLE, _BATCH = 100, 50  # images whose accuracy is looked at
_SHOWN = 256  # images that are checked
_DIFFERENTIATED, _SIDEWAYS = 8, 4  # images whose gradient is compared, and directions beside that of the gradient
_STEPS = (0.01, 0.003, 0.001, 0.0003, 0.0001)  # of finite differences, l2, in units of the box
_OFF_TIES = 0.01  # of the way to noise in the box


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
    """Load a model and look at it, on up to 256 images that lie evenly over a data set, or on noise.

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
            mended, checks = preflight(model, given.spread(_SHOWN))
            if data is not None:
                checks = (*checks, _accuracy(mended, _balanced(given)))
            if blind(mended) is None:
                checks = (*checks, _differences(mended, given.spread(_DIFFERENTIATED)))
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


def _differences(model: Classifier, data: Data) -> Check:
    """Compare gradients with finite differences along them and along directions drawn at random.

    A part of a network that hides its gradient hardly shows along the rest: hence the other directions. Images are
    moved off ties, where max pooling and ReLU have a kink: many backgrounds are flat or black. Steps are short, because
    the slope of a function that is rounded shows in long ones only; in float64, where the network bears it.
    """
    x = data.batch(torch.arange(len(data))).x
    model, x = _in_double(model, placed(model, x).detach())
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(x.shape, generator=generator).to(x) * (model.high - model.low) + model.low
    x = x + _OFF_TIES * (noise - x)
    mix = torch.randn(model.num_classes, generator=generator).to(x)
    aside = torch.randn((_SIDEWAYS, *model.shape), generator=generator).to(x)
    aside = aside / aside.flatten(1).norm(dim=1).view(-1, *(1 for _ in model.shape))
    with frozen(model):
        told = [_slopes(model, one, mix, aside) for one in x.split(1)]
    off = sum(not agrees for agrees, *_ in told)
    number = next((k for k, (agrees, *_) in enumerate(told) if not agrees), 0)
    evidence = {"gradient": told[number][1], "finite differences": told[number][2], "images": len(told), "off": off}
    if off > len(told) / 4:
        message = (
            f"The gradient is not that of the function, for {off} of {len(told)} images: gradient attacks will be "
            "weak, and accuracies too high."
        )
        return Check(name="finite differences", status="warned", message=message, evidence=evidence)
    message = f"The gradient agrees with finite differences, for {len(told) - off} of {len(told)} images."
    return Check(name="finite differences", status="passed", message=message, evidence=evidence)


def _in_double(model: Classifier, x: Images) -> tuple[Classifier, Images]:
    """A copy of a model and of images in float64, or both themselves where the network does not work in it."""
    try:
        double = copy.deepcopy(model).double()
        with frozen(double), torch.no_grad():
            if double(x.double()).dtype == torch.float64:
                return double, x.double()
    except Exception:  # noqa: BLE001  whatever keeps a network from being copied or run so, it can be looked at as it is
        pass
    return model, x


def _slopes(model: Classifier, x: Images, mix: Tensor, aside: Images) -> tuple[bool, float, float]:
    """Whether gradient and differences of one image agree at some step; both along the gradient, where they do best.

    Steps at which rounding hides a tenth of the slope show nothing.
    """
    x = x.detach().requires_grad_(True)
    z = model(x)
    (gradient,) = torch.autograd.grad((z @ mix).sum(), x)
    slope = float(gradient.norm())
    along = torch.cat([gradient / max(slope, 1e-30), aside])
    expected = (gradient * along).flatten(1).sum(1).double()
    rest = float(expected[1:].norm())
    rounding = 4 * torch.finfo(z.dtype).eps * float((z.detach().abs() @ mix.abs()).max())
    agree: list[bool] = []
    found: list[float] = []
    with torch.no_grad():
        for step in _STEPS:
            h = step * (model.high - model.low)
            after, before = (model(x + side * h * along).double() @ mix.double() for side in (1, -1))
            difference = (after - before) / (2 * h)
            found.append(float(difference[0]))
            gap, noise = (difference - expected).abs(), rounding / h
            if noise < 0.1 * slope:
                aside_too = noise > 0.1 * rest or float(gap[1:].norm()) <= 0.2 * rest
                agree.append(aside_too and float(gap[0]) <= 0.1 * slope)
    best = min(found, key=lambda value: abs(value - slope))
    return slope > 0 and (any(agree) or not agree), slope, best


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
