"""Names for the tensors that travel through the package, with their shapes."""

from typing import Annotated, Any

from jaxtyping import Bool, Float, Int
from pydantic import BeforeValidator
from torch import Tensor

Images = Float[Tensor, "n c *s"]
"""Pixels in the model's box, batch first, one or more channels, any number of spatial axes."""
Labels = Int[Tensor, " n"]
Logits = Float[Tensor, "n k"]
Scores = Float[Tensor, " n"]
Mask = Bool[Tensor, " n"]


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
