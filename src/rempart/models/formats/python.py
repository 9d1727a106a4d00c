"""A network that a function builds, with weights from a folder where one is named: code, and run as such."""

import importlib
import inspect
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rempart.core.errors import ModelError
from rempart.core.foreign import contained, place, undisturbed
from rempart.core.identity import built_by
from rempart.core.model import Classifier
from rempart.models.formats.folder import fill, read_config
from rempart.models.formats.keras import from_keras, is_keras
from rempart.models.reading import read_as
from rempart.models.save import WEIGHTS
from rempart.report.schema import Reading


def load_python(source: str) -> Classifier:
    """What the factory of `python:package.module:factory` returns, filled from DIRECTORY where `@DIRECTORY` follows.

    Raises:
        ModelError: If there is no such function, it fails, or it returns nothing that classifies.
    """
    source, at, folder = source.partition("@")
    _, _, named = source.partition(":")
    module_name, _, function = named.partition(":")
    if not module_name or not function:
        raise ModelError("python:package.module:factory", got=repr(source))
    with undisturbed(), _current_directory_importable():
        try:
            with contained(f"the module {module_name} to be imported"):
                module = importlib.import_module(module_name)
        except ImportError as error:
            hint = "run in the directory that holds the module, or install it"
            raise ModelError(f"an importable module {module_name}", got=error, hint=hint) from error
        except Exception as error:
            raise _user_error(f"the module {module_name} to be imported", error) from error
        factory: Any = getattr(module, function, None)
        if not callable(factory):
            found = [name for name, value in vars(module).items() if inspect.isfunction(value)]
            hint = f"its functions are {', '.join(found)}" if found else "it has no functions"
            raise ModelError(f"a function {function} in {module_name}", got=repr(factory), hint=hint)
        try:
            with contained(f"{named} to build a model"):
                model = factory()
        except Exception as error:
            raise _user_error(f"{named} to build a model when called without arguments", error) from error
    classifier = _as_classifier(model, source)
    built_by(classifier.net, module_name)
    if at:
        config = read_config(Path(folder))
        if config.architecture != source:
            raise ModelError(f"weights of {source}", got=f"{folder} with those of {config.architecture}")
        classifier.output = config.output or classifier.output
        classifier = read_as(classifier, Reading(box=config.box, classes=config.class_names))
        fill(classifier, Path(folder) / WEIGHTS)
    return classifier


def _user_error(expected: str, error: Exception) -> ModelError:
    """What went wrong in code of the user's, with the line of theirs it came from."""
    if isinstance(error, ModelError) and not isinstance(error.__cause__, Exception | None):  # `contained` has said it
        return error
    return ModelError(expected, got=f"{type(error).__name__}: {error} ({place(error)})", hint="mend it there")


def _as_classifier(model: object, source: str) -> Classifier:
    if isinstance(model, Classifier):
        return model
    if is_keras(model):
        return from_keras(model)
    if not isinstance(model, nn.Module):
        came = type(model).__name__
        raise ModelError("the factory to return a Classifier, a torch module or a Keras model", got=came)
    shape, classes = getattr(model, "shape", None), getattr(model, "num_classes", None)
    if not isinstance(shape, (tuple, list, torch.Size)) or not isinstance(classes, int):
        raise ModelError(
            f"the network of {source} to have the attributes shape and num_classes",
            got=f"shape={shape!r}, num_classes={classes!r}",
            hint="set them, for example model.shape = (1, 28, 28); model.num_classes = 10; or return "
            "rempart.Classifier(model, shape=..., num_classes=...)",
        )
    return Classifier(model, shape=shape, num_classes=classes)


@contextmanager
def _current_directory_importable() -> Generator[None, None, None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have taken it out
            sys.path.remove(here)
