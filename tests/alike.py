"""Results that must be the same but for rounding: BLAS, vector width and the number of threads decide the last bits."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

_NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?")


def differences(one: object, other: object, *, rel: float = 1e-4, at: str = "") -> Iterator[str]:
    """Where two trees of a report disagree: floats beyond `rel`, sentences but for their numbers, the rest exactly."""
    if isinstance(one, float) and isinstance(other, float):
        same = math.isclose(one, other, rel_tol=rel, abs_tol=1e-5) or (math.isnan(one) and math.isnan(other))
    elif isinstance(one, str) and isinstance(other, str):
        same = _NUMBER.sub("#", one) == _NUMBER.sub("#", other)
    elif isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return (yield from (d for key in one for d in differences(one[key], other[key], rel=rel, at=f"{at}.{key}")))
    elif isinstance(one, Sequence) and isinstance(other, Sequence) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return (yield from (d for k, (a, b) in pairs for d in differences(a, b, rel=rel, at=f"{at}[{k}]")))
    else:
        same = one == other
    if not same:
        yield f"{at}: {one} and {other}"
