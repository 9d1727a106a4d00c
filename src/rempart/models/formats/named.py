"""Networks by their name in timm or torchvision, with weights out of a safetensors file."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Normalize
from rempart.models.save import differing

NAMED = ("timm:", "torchvision:")


def load_named(source: str) -> Classifier:
    """`timm:NAME@FILE` or `torchvision:NAME@FILE`: the network of that name with the weights in FILE.

    Size, mean and standard deviation are those the package gives for the name; the number of classes is that of the
    weights. Nothing is downloaded.

    Raises:
        ModelError: If the package is missing, does not know the name, or the weights are others.
    """
    package, _, rest = source.partition(":")
    name, _, file = rest.partition("@")
    if not name or not file:
        hint = "store the weights once: safetensors.torch.save_file(model.state_dict(), FILE)"
        raise ModelError(f"{package}:NAME@FILE.safetensors", got=repr(source), hint=hint)
    make, card = (_timm if package == "timm" else _torchvision)(_package(package), name)
    try:
        state = from_bytes(Path(file).read_bytes())
    except (OSError, SafetensorError) as error:
        raise ModelError("a safetensors file", got=f"{file} ({error})") from None
    net = _filled(make, state, source)
    mean, std = card["mean"], card["std"]
    classes = len(state[list(net.state_dict())[-1]])
    names = card.get("names")
    return Classifier(
        nn.Sequential(Normalize(mean, std), net),
        shape=card["shape"],
        num_classes=max(2, classes),
        class_names=names if names and len(names) == classes else None,
    )


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ModelError(f"the package {name}", got=error, hint=f"install it: pip install {name}") from None


def _timm(timm: Any, name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    if not timm.is_model(name):
        raise ModelError("a model of timm", got=repr(name), hint="timm.list_models() names them")
    card = timm.create_model(name, pretrained=False).pretrained_cfg
    shape = tuple(card["input_size"])
    return lambda **options: timm.create_model(name, pretrained=False, **options), {**card, "shape": shape}


def _torchvision(torchvision: Any, name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ModelError("a classifier of torchvision", got=repr(name), hint="torchvision.models.list_models()")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    steps = weights.transforms()
    (side,) = steps.crop_size
    card = {"mean": steps.mean, "std": steps.std, "shape": (3, side, side), "names": weights.meta.get("categories")}
    return lambda **options: torchvision.models.get_model(name, weights=None, **options), card


def _filled(make: Callable[..., nn.Module], state: Mapping[str, Tensor], source: str) -> nn.Module:
    """The network with as many outputs as the weights of its last layer have."""
    net = make()
    last = list(net.state_dict())[-1]
    if last in state and len(state[last]) != len(net.state_dict()[last]):
        net = make(num_classes=len(state[last]))
    if wrong := differing(net.state_dict(), state):
        raise ModelError(f"the weights of {source.partition('@')[0]}", got=f"another {wrong}")
    net.load_state_dict(state)
    return net
