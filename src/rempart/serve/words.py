"""The words of the pages: an English sentence is the key of its translations."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from rempart.attacks import SUITES, attacks
from rempart.detectors import detectors
from rempart.models.zoo import models
from rempart.preprocess import preprocessors
from rempart.train.config import load_recipe, recipe_names

LANGUAGES: Mapping[str, str] = {"en": "English", "fr": "Français", "zh": "中文"}
_HERE = files("rempart") / "serve"
_STRING = r'"((?:[^"\\\n]|\\.)*)"'
_IN_TEMPLATES = re.compile(rf"\b_\(\s*(?:{_STRING}|'([^'\n]*)')")
_IN_SCRIPTS = re.compile(rf"\bt\(\s*{_STRING}()")
_PLACE = re.compile(r"\{(\w+)\}")


def chosen(cookie: str | None, accepted: Iterable[str]) -> str:
    """The language to answer in: what a person chose, else the first of the browser's that is here, else English.

    Args:
        cookie: What was chosen.
        accepted: Tags such as `zh-CN`, the preferred first.
    """
    wanted = [cookie or "", *(tag.partition("-")[0].lower() for tag in accepted)]
    return next((tag for tag in wanted if tag in LANGUAGES), "en")


def translated(sentence: str, language: str, **values: Any) -> str:
    """A sentence in a language, with values for the names in braces; in English where there is no translation."""
    found = dictionary(language).get(sentence, sentence)
    return _PLACE.sub(lambda match: str(values.get(match[1], match[0])), found)


@cache
def dictionary(language: str) -> Mapping[str, str]:
    """Translations by English sentence; none for English."""
    return {} if language == "en" else json.loads((_HERE / "words" / f"{language}.json").read_text("utf-8"))


@cache
def of_scripts(language: str) -> Mapping[str, str]:
    """The translations that modules ask for."""
    keys = in_scripts() | in_catalogue()
    return {key: value for key, value in dictionary(language).items() if key in keys}


def in_templates() -> frozenset[str]:
    """Sentences that templates say."""
    return _found(_IN_TEMPLATES, "templates", ".html")


def in_scripts() -> frozenset[str]:
    """Sentences that modules say."""
    return _found(_IN_SCRIPTS, "static", ".js")


def in_catalogue() -> frozenset[str]:
    """Sentences that say what an attack, a suite, a defence, a detector, a recipe or an architecture is.

    Those of plug-ins are left out: they are shown as they are.
    """
    entries = [*attacks, *detectors, *preprocessors, *models]
    own = [entry.summary for entry in entries if entry.function.__module__.startswith("rempart.")]
    suites = [(function.__doc__ or "").split("\n")[0] for function in SUITES.values()]
    return frozenset([*own, *suites, *(load_recipe(name).summary for name in recipe_names())])


def _found(pattern: re.Pattern[str], folder: str, ending: str) -> frozenset[str]:
    texts = [path.read_text("utf-8") for path in (_HERE / folder).iterdir() if path.name.endswith(ending)]
    return frozenset(json.loads(f'"{a or b}"') for text in texts for a, b in pattern.findall(text))
