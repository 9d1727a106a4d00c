"""The place of `rempart.data` and its modules before version 0.2: importable here for one version more."""

import sys
from importlib import import_module
from pkgutil import iter_modules

import rempart.data
from rempart.data import *  # noqa: F403

for _module in iter_modules(rempart.data.__path__):  # the same modules, so that a class has one identity
    sys.modules[f"{__name__}.{_module.name}"] = import_module(f"rempart.data.{_module.name}")
