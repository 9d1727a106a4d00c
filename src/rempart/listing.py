"""`rempart list`: names, summaries, options with defaults and bounds, straight from the registries."""

import inspect
from collections.abc import Iterable
from typing import Any

from rempart.attacks import SUITES, attacks
from rempart.attacks.suites import suite
from rempart.core.errors import SpecError
from rempart.core.registry import Entry, bounds_of, suggestion
from rempart.core.threat import Threat
from rempart.detectors import Detector, detectors
from rempart.models.zoo import models
from rempart.preprocess import Traits, preprocessors
from rempart.train.config import load_recipe, recipe_names

_DATA = (
    ("digits", "1,797 scans of 8x8 digits, embedded (scikit-learn)"),
    ("mnist:DIR", "IDX files, gzipped or not"),
    ("cifar10:PATH", "the same as FOLDER or FILE.zip"),
    (
        "FOLDER or FILE.zip",
        "train/CLASS/*.png and test/CLASS/*.png, read in place; @64 resizes, @grey or @rgb converts",
    ),
    ("  of DICOM files", "the same with .dcm; @window=40:400 (centre:width), own or full; default: the first file's"),
    ("  of NIfTI files", "the same with .nii or .nii.gz: volumes, or @slice=axial:40, @slice=coronal:::4; @window"),
    ("FILE.npz", "MedMNIST style: {train,val,test}_{images,labels}"),
    ("FILE.csv", "columns path and label, optionally split and patient; paths inside its folder, files of any kind"),
    ("FILE.parquet or FOLDER", "image bytes and labels as Hugging Face has them; @image=COLUMN, @label=COLUMN"),
    ("FOLDER", "what datasets.save_to_disk wrote"),
    ("... :train | :val | :test", "choose a split; [:500], [100:200], [::10] choose samples"),
)


def describe(what: str) -> str:
    """The list as text.

    Raises:
        SpecError: If there is no such list.
    """
    lists = {
        "attacks": lambda: _entries(attacks, lambda e: f"{', '.join(e.traits.norms)}" + _traits(e)),
        "detectors": lambda: _entries(detectors, lambda e: detector_traits(e.function())),
        "models": lambda: _entries(models, lambda _: ""),
        "preprocessors": lambda: _entries(preprocessors, lambda e: _nature(e.traits)),
        "suites": lambda: "\n".join(_suite(name) for name in SUITES),
        "recipes": lambda: "\n".join(f"{name:<24} {load_recipe(name).summary}" for name in recipe_names()),
        "data": lambda: "\n".join(f"{form:<22} {meaning}" for form, meaning in _DATA),
    }
    if what not in lists:
        raise SpecError(f"a list out of {', '.join(lists)}", got=repr(what), hint=suggestion(what, lists).strip(" ()"))
    return lists[what]()


def _entries(registry: Iterable[Entry[Any, Any]], extra: Any) -> str:
    lines: list[str] = []
    for entry in registry:
        note = extra(entry)
        lines.append(f"{entry.name:<12} {entry.summary}" + (f" [{note}]" if note else ""))
        for key, field in entry.params.model_fields.items():
            lines.append(f"    -o {key}={field.default}  ({bounds_of(field)})")
    return "\n".join(lines)


def _traits(entry: Entry[Any, Any]) -> str:
    return "".join(
        f"; {word}"
        for word, flag in (("targeted", entry.traits.targeted), ("minimum norm", entry.traits.minimum))
        if flag
    )


def detector_traits(detector: Detector) -> str:
    """What an attacker must know of a detector, with its default options."""
    words = ["with a gradient" if detector.differentiable else "without a gradient"]
    words += ["random"] * detector.random
    words += ["learns from attacks" if detector.learns_attacks else "learns from clean images"]
    words += ["names the attack"] * (detector.name is not None)
    return "; ".join(words)


def _nature(traits: Traits) -> str:
    """What an attacker meets."""
    slope = "its own gradient" if traits.differentiable else "a substitute gradient"
    return f"{'random; ' if traits.random else ''}{slope}"


def _suite(name: str) -> str:
    """What a suite runs in linf on ten classes; other norms and fewer classes change options."""
    chosen = suite(name, Threat(norm="linf", eps=0.1), 10)
    calls = ", ".join(_call(*member) for member in chosen.members)
    return f"{name:<9} {inspect.getdoc(SUITES[name])}\n    {'in turn, on survivors: ' if chosen.cascade else ''}{calls}"


def _call(name: str, options: dict[str, Any]) -> str:
    return name + (f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")
