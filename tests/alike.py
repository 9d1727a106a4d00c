"""Results that must be the same but for rounding: BLAS, vector width and the number of threads decide the last bits."""

import math
import re
from collections.abc import Mapping, Sequence

_NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")


def alike(one: object, other: object, *, rel: float = 1e-4) -> bool:
    """Whether two trees of a report agree: floats to `rel`, sentences but for their numbers, all else exactly."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=rel, abs_tol=1e-6) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, str) and isinstance(other, str):
        return _NUMBER.sub("#", one) == _NUMBER.sub("#", other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(alike(one[key], other[key], rel=rel) for key in one)
    if isinstance(one, Sequence) and isinstance(other, Sequence):
        return len(one) == len(other) and all(alike(a, b, rel=rel) for a, b in zip(one, other, strict=True))
    return one == other
