"""The place of `rempart.data` before version 0.2: it is importable here for one version more."""

from rempart.data import *  # noqa: F403
