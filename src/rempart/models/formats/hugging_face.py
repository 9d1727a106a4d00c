"""Hugging Face folders of image classifiers: `config.json`, `model.safetensors`, `preprocessor_config.json`."""

import json
import math
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier, Normalize, Untraced
from rempart.models.formats import RECIPE, read_json, within_limits

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
PARTS = (CONFIG, WEIGHTS, PROCESSOR)
"""What is read of a folder."""
_FOR_IMAGES = "ForImageClassification"
_CODE = (
    *("auto_map", "custom_pipelines", "quantization_config"),
    *("transformers_weights", "model_args"),  # other files: the second goes to timm, which would load a pickle
)
_BUILT_IN = ("eager", "sdpa", None)
_FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
_TINY = 1e-4


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is one that transformers wrote, and none of ours."""
    told = read_json(folder / CONFIG)
    return "format_version" not in told and bool({"architectures", "model_type"} & told.keys())


def load_hugging_face(folder: Path) -> Classifier:
    """An image classifier that `save_pretrained` wrote, with the steps of its processor inside, in torch.

    Resizing (antialiased), centre crop, rescaling and normalisation take the place of those that Pillow and numpy do;
    that they agree is checked on one image of noise. The classifier takes images in [0, 1] of the size that the
    processor resizes to, so that nothing is resized twice; give it another `shape`, and it resizes inside. Class names
    are those of `id2label`. Nothing is downloaded and no code of the folder's is run.

    Raises:
        ModelError: If the folder holds pickled weights, asks for code of its own, lacks weights, is for another task,
            or has a processor that does more.
    """
    config = _checked(folder)
    with _offline():
        model, processor = _read(folder)
        names = [str(name) for _, name in sorted((int(k), v) for k, v in model.config.id2label.items())]
        channels = int(getattr(model.config, "num_channels", 3))
        inside, size = _steps(processor, config, channels)
        _compare(processor, inside, (channels, *size))
    net = nn.Sequential(*inside, Logits(model))
    try:
        with torch.no_grad():
            z = net.eval()(torch.zeros((1, channels, *size)))
    except (RuntimeError, ValueError) as error:
        line = str(error).split("\n")[0][:200]
        hint = f"state the size of its images in {PROCESSOR}"
        raise ModelError(f"a network for images of {size} pixels", got=f"{folder} ({line})", hint=hint) from None
    classes = max(2, z.shape[1])
    named = len(names) == classes and names != [f"LABEL_{k}" for k in range(classes)]
    return Classifier(net, shape=(channels, *size), num_classes=classes, class_names=names if named else None)


class Logits(Untraced):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits of prepared images."""
        return self.model(pixel_values=x).logits


class Frame(Untraced):
    """Resize and cut out the middle, as a processor does.

    Args:
        size: Height and width to resize to, or one length for the shorter side.
        crop: Height and width to cut out; None leaves the image whole.
        resample: Filter, by its number in Pillow.
    """

    def __init__(self, size: Sequence[int] | int | None, crop: Sequence[int] | None, resample: int) -> None:
        super().__init__()
        self.size, self.crop, self.resample = size, crop, resample

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1], of the new size."""
        height, width = x.shape[2:]
        size = self.size
        if isinstance(size, int):
            short = min(height, width)
            size = [size if side == short else int(size * side / short) for side in (height, width)]
        if size is not None and (height, width) != tuple(size):
            mode = _FILTERS.get(self.resample)
            if mode is None:
                hint = f"give it images of {tuple(size)}"
                raise ModelError("nearest, bilinear or bicubic resizing", got=f"filter {self.resample}", hint=hint)
            if mode == "nearest-exact":
                x = F.interpolate(x, list(size), mode=mode)
            else:  # Pillow resizes axis by axis, and cuts off what bicubic weights bring beyond black and white
                for part in ((height, size[1]), tuple(size)):
                    x = F.interpolate(x, part, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
        if self.crop is not None:
            top, left = ((side - cut) // 2 for side, cut in zip(x.shape[2:], self.crop, strict=True))
            height, width = self.crop
            x = F.pad(
                x, [max(0, -left), max(0, width - x.shape[3] + left), max(0, -top), max(0, height - x.shape[2] + top)]
            )
            x = x[:, :, max(0, top) : max(0, top) + height, max(0, left) : max(0, left) + width]
        return x


def _checked(folder: Path) -> dict[str, Any]:
    """The configuration, where nothing in the folder asks for code or a pickle."""
    config = read_json(folder / CONFIG)
    names = config.get("architectures") or []
    if not (names or config.get("model_type")) or (names and not any(_FOR_IMAGES in str(name) for name in names)):
        raise ModelError(
            f"a model ...{_FOR_IMAGES}", got=f"{', '.join(map(str, names)) or 'none'} in {folder / CONFIG}"
        )
    for name in (CONFIG, PROCESSOR):
        if asked := sorted(_asked(read_json(folder / name))):
            raise ModelError(
                "a model of transformers itself, that asks for no other code or file",
                got=f"{', '.join(asked)} in {folder / name}",
                hint=f"where you trust that code, {RECIPE}",
            )
    if (folder / "adapter_config.json").exists():
        hint = "merge it into the model (merge_and_unload) and save that"
        raise ModelError("a whole model", got=f"an adapter of one in {folder}", hint=hint)
    if not (folder / WEIGHTS).is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack"))
        got = f"{folder} without" + (f", but with {', '.join(pickled)}, which is not opened" if pickled else "")
        hint = "where you trust it, load it in Python and save it anew: model.save_pretrained(FOLDER)"
        raise ModelError(f"a folder with {WEIGHTS} in one piece", got=got, hint=hint)
    if not (folder / PROCESSOR).is_file():
        hint = "save it beside the model: processor.save_pretrained(FOLDER)"
        raise ModelError(
            f"a folder with {PROCESSOR}, that says how images are prepared", got=f"{folder} without", hint=hint
        )
    return config


def _asked(told: Any) -> set[str]:
    """Keys, at any depth, by which transformers runs code of the folder's, fetches some (attention) or opens files."""
    asked: set[str] = set()
    waiting = [told]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        if isinstance(part, dict):
            waiting += part.values()
            asked |= {key for key in _CODE if part.get(key)}  # null, or empty, asks for nothing
            asked |= {key for key, value in part.items() if key.endswith("_implementation") and value not in _BUILT_IN}
    return asked


@contextmanager
def _offline() -> Generator[None]:
    """No network and no bars on the screen, for as long as files are read."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from huggingface_hub import constants
        from transformers.utils import logging
    except ImportError as error:
        hint = "install it: pip install 'rempart[hugging-face]'"
        raise ModelError("the package transformers, to read its models", got=error, hint=hint) from None
    finally:
        os.environ.pop("HF_HUB_OFFLINE")
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before
    offline, level = constants.HF_HUB_OFFLINE, logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read(folder: Path) -> tuple[Any, Any]:
    """The model and its processor; a key that is null counts as absent, unless transformers has a meaning for it."""
    from safetensors import safe_open
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with TemporaryDirectory() as made:
            room = Path(made)
            (room / WEIGHTS).symlink_to((folder / WEIGHTS).resolve())
            (room / PROCESSOR).write_text(json.dumps(_without_nulls(read_json(folder / PROCESSOR))))
            with safe_open(folder / WEIGHTS, "pt") as weights:
                held = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
            told, heads = read_json(folder / CONFIG), [held[key][0] for key in held if key.startswith("classifier.")]
            if heads and not (told.get("id2label") or told.get("num_labels")):
                told = {**told, "id2label": None, "num_labels": heads[-1]}
            empty = _empty(told, room)
            expected = {key: tuple(value.shape) for key, value in empty.state_dict().items()}
            if other := [key for key in held if held[key] != expected.get(key, held[key])]:
                raise ModelError(
                    f"weights of the shapes that {CONFIG} asks for",
                    got=f"{other[-1]} of shape {held[other[-1]]} instead of {expected[other[-1]]}",
                    hint=f"save both again; {CONFIG} gives the number of classes by id2label or num_labels",
                )
            claimed = sum(parameter.numel() for parameter in empty.parameters())
            if claimed > (numbers := sum(map(math.prod, held.values()))):
                raise ModelError(
                    f"all weights in {WEIGHTS}, {claimed:,} numbers", got=f"{numbers:,}", hint="save it again"
                )
            model, found = AutoModelForImageClassification.from_pretrained(
                str(room),
                use_safetensors=True,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
                **here,
            )
            processor = AutoImageProcessor.from_pretrained(str(room), **here)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  transformers raises whatever its parts raise
        line = (str(error).strip() or "unreadable").split("\n")[0][:300]
        raise ModelError(
            "an image classifier that transformers can read", got=f"{folder} ({type(error).__name__}: {line})"
        ) from None
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"all weights in {WEIGHTS}", got=f"none for {', '.join(missing[:4])}", hint="save it again")
    return model, processor


def _empty(told: dict[str, Any], room: Path) -> Any:
    """The network of a configuration without memory for its weights: it may claim any size. It is left in `room`."""
    from transformers import AutoConfig, AutoModelForImageClassification

    for attempt in (told, _without_nulls(told)):
        (room / CONFIG).write_text(json.dumps(attempt))
        try:
            config = AutoConfig.from_pretrained(str(room), local_files_only=True, trust_remote_code=False)
            with torch.device("meta"):
                return AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        except Exception:
            if attempt is not told:
                raise
    raise AssertionError


def _without_nulls(told: Any) -> Any:
    """A description without the keys that are null; steps that are switched by null are off, as in transformers."""
    if not isinstance(told, dict):
        return told
    return {key: _without_nulls(value) for key, value in told.items() if value is not None or key.startswith("do_")}


def _steps(processor: Any, config: Mapping[str, Any], channels: int) -> tuple[tuple[nn.Module, ...], tuple[int, int]]:
    """The processor as modules, and the size of images that it does not resize."""
    size, crop = (_sides(getattr(processor, name, None)) for name in ("size", "crop_size"))
    size = size if processor.do_resize else None
    crop = crop if getattr(processor, "do_center_crop", None) else None
    share = getattr(processor, "crop_pct", None)
    if isinstance(size, int) and share:  # ConvNeXt: a margin is cut off below 384 pixels
        size, crop = (int(size / share), (size, size)) if size < 384 else ((size, size), crop)
    if isinstance(crop, int):
        crop = crop, crop
    whole = size or crop or _sides(config.get("image_size"))
    if whole is None:
        raise ModelError("a size of images", got=f"none in {PROCESSOR} and {CONFIG}")
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255
    mean, std = [0.0] * channels, [1.0] * channels
    if processor.do_normalize:
        mean, std = (
            [v] * channels if isinstance(v, (int, float)) else list(v)
            for v in (processor.image_mean, processor.image_std)
        )
    if len(mean) != channels:
        raise ModelError(f"a mean for each of {channels} channels", got=mean)
    normalize = Normalize([m / scale for m in mean], [s / scale for s in std])
    frame = Frame(size, crop, int(getattr(processor, "resample", None) or 0))
    height, width = (whole, whole) if isinstance(whole, int) else whole
    within_limits((channels, height, width))
    return (frame, normalize), (height, width)


def _sides(size: Any) -> tuple[int, int] | int | None:
    """Height and width, or the shorter side alone."""
    if isinstance(size, (int, type(None))):
        return size
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    told = dict(size)
    if told.get("height") and told.get("width"):
        return int(told["height"]), int(told["width"])
    return int(told["shortest_edge"]) if told.get("shortest_edge") else None


def _compare(processor: Any, inside: Sequence[nn.Module], shape: Sequence[int]) -> None:
    """Hold our steps to the processor's on one image of noise, which neither resizes."""
    image = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = nn.Sequential(*inside)(image[None] / 255)
    try:
        theirs = processor(images=image.movedim(0, -1).numpy(), return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ]
    except Exception as error:  # noqa: BLE001
        raise ModelError(
            f"a processor for images of shape {tuple(shape)}", got=f"{type(error).__name__}: {error}"
        ) from None
    gap = float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
    if not gap <= _TINY * max(1.0, float(theirs.abs().max())):
        raise ModelError(
            "a processor that resizes, crops, rescales and normalises, and no more",
            got=f"{type(processor).__name__}, whose images differ by {gap:.2g}",
            hint=f"take its steps into the network: {RECIPE}",
        )
