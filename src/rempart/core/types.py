"""Names for the tensors that travel through the package, with their shapes."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Images = Float[Tensor, "n c *s"]
"""Pixels in the model's box, batch first, one or more channels, any number of spatial axes."""
Labels = Int[Tensor, " n"]
Logits = Float[Tensor, "n k"]
Scores = Float[Tensor, " n"]
Mask = Bool[Tensor, " n"]
