"""Numbers as people write them: 8/255 and 0.03."""

from typing import Annotated, Any

from pydantic import BeforeValidator


def read_number(value: Any) -> Any:
    """Read `8/255` as a number; leave anything else to the caller's own validation."""
    if isinstance(value, str):
        top, slash, bottom = value.partition("/")
        try:
            return float(top) / float(bottom) if slash else float(top)
        except (ValueError, ZeroDivisionError):
            return value
    return value


Pixels = Annotated[float, BeforeValidator(read_number)]
"""A length in pixel units of the box; fractions such as `2/255` are read."""
