"""Networks by their name in timm or torchvision, with weights out of a safetensors file."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Normalize
from rempart.models.formats import RECIPE, read_json
from rempart.models.save import differing, versioned

NAMED = ("timm:", "torchvision:")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_OPTIONS = frozenset({"num_classes", "in_chans", "global_pool", "img_size", "drop_rate", "drop_path_rate"})
"""Options of a network of timm that open no other file and run no code."""
_SCALED = "Its channels are scaled again inside (transform_input), as torchvision does for its own weights."
_WRAPPED = "timm_model."
"""What transformers puts before the names of weights of timm."""


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
    return _classifier(make, card, Path(file), f"{package}:{name}")


def is_timm(folder: Path) -> bool:
    """Whether a folder is one that timm wrote for the Hugging Face Hub, or transformers around a network of timm."""
    config = read_json(folder / CONFIG)
    wrapped = config.get("model_type") in (None, "timm_wrapper")
    return isinstance(config.get("architecture"), str) and wrapped and "format_version" not in config


def load_timm(folder: Path) -> Classifier:
    """A folder that `timm.models.save_for_hf` or `push_to_hf_hub` wrote: `config.json` and `model.safetensors`.

    Size, mean, standard deviation and class names are those of the folder; timm builds the network.

    Raises:
        ModelError: If timm is missing or does not know the network, or the folder asks timm for more than its name.
    """
    config = read_json(folder / CONFIG)
    name, own = config["architecture"], config.get("pretrained_cfg") or {}
    options = {key: value for key, value in (config.get("model_args") or {}).items() if value is not None}
    if asked := sorted(options.keys() - _OPTIONS):
        hint = f"where you trust them, {RECIPE}"
        raise ModelError(
            f"no model_args but {', '.join(sorted(_OPTIONS))}", got=f"{', '.join(asked)} in {folder}", hint=hint
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"a folder with {WEIGHTS}", got=f"{folder} without", hint="timm.models.save_for_hf writes it")
    make, card = _timm(_package("timm"), name)
    card |= {key: own[key] for key in ("mean", "std", "classifier") if own.get(key)}
    card["shape"] = (options.get("in_chans", card["shape"][0]), *(own.get("input_size") or card["shape"])[1:])
    card["names"] = _labels({**config, "pretrained_cfg": own})
    if len(card["mean"]) != card["shape"][0]:
        raise ModelError(f"a mean for each of {card['shape'][0]} channels", got=f"{card['mean']} in {folder / CONFIG}")
    options.pop("num_classes", None)  # that of the weights
    return _classifier(partial(make, **options), card, folder / WEIGHTS, f"timm:{name}")


def _classifier(make: Callable[..., nn.Module], card: Mapping[str, Any], file: Path, title: str) -> Classifier:
    try:
        state = {key.removeprefix(_WRAPPED): value for key, value in from_bytes(file.read_bytes()).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError("a safetensors file", got=f"{file} ({error})") from None
    net, classes = _filled(make, card, state, title)
    names = card.get("names")
    return Classifier(
        nn.Sequential(Normalize(card["mean"], card["std"]), net),
        shape=card["shape"],
        num_classes=max(2, classes),
        class_names=names if names and len(names) == classes else None,
        notes=(_SCALED,) if getattr(net, "transform_input", False) else (),
    )


def _labels(config: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes in their order; none where transformers made them up."""
    numbered = config.get("id2label") or {}
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names")
    if not names and all(map(str.isdecimal, numbered)):
        names = [str(numbered[key]) for key in sorted(numbered, key=int)]
    return names if names and names != [f"LABEL_{k}" for k in range(len(names))] else None


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
        raise ModelError(
            "a classifier of torchvision",
            got=repr(name),
            hint="torchvision.models.list_models(module=torchvision.models) names them",
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    steps = weights.transforms()
    (side,) = steps.crop_size
    card = {"mean": steps.mean, "std": steps.std, "shape": (3, side, side), "names": weights.meta.get("categories")}
    return lambda **options: torchvision.models.get_model(name, weights=None, **options), card


def _filled(
    make: Callable[..., nn.Module], card: Mapping[str, Any], state: dict[str, Tensor], title: str
) -> tuple[nn.Module, int]:
    """The network with as many outputs as the weights of its classifier have, and their number."""
    net: Any = make()
    options: dict[str, Any] = {}
    if hasattr(net, "aux_logits"):  # heads for training alone, which torchvision takes off some of its weights
        options["aux_logits"] = any(key.lower().startswith("aux") for key in state)
    named = card.get("classifier") or ()
    heads = [
        f"{name}.{part}" for name in ((named,) if isinstance(named, str) else named) for part in ("bias", "weight")
    ]
    new = [key for key in state if key not in net.state_dict()]  # a network without a classifier by default
    head = next((k for k in [*heads, *new[-1:], list(net.state_dict())[-1]] if k in state and state[k].ndim), None)
    classes = len(state[head]) if head else 0
    if options or (head and (head not in net.state_dict() or len(net.state_dict()[head]) != classes)):
        net = make(**options, **({"num_classes": classes} if head else {}))
    if hasattr(net, "transform_input"):  # as torchvision builds these for its weights, and for fine-tuning them
        net.transform_input = True
    if wrong := differing(net.state_dict(), state):
        hint = "" if head else "save the network together with its classifier"
        raise ModelError(f"the weights of {title}", got=f"another {wrong}", hint=hint)
    net.load_state_dict(versioned(net, state))
    return net, classes
