"""Training under Gaussian noise, which randomised smoothing needs."""

from typing import Annotated

from annotated_types import Ge
from torch import nn

from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Objective, objectives
from rempart.objectives.plain import cross_entropy


@objectives.register("gaussian", None)
def gaussian(*, sigma: Annotated[Pixels, Ge(0)] = 0.25) -> Objective:
    """Minimise the cross-entropy under Gaussian noise, for a model that is certified by smoothing.

    Noisy pixels leave the box, and nothing cuts them: the noise is that of `rempart certify`, where the same sigma is
    then used.

    Args:
        sigma: Standard deviation of the noise in pixel units, drawn anew for each image and epoch; 0 is `plain`.

    Source:
        Cohen et al. 2019, arXiv:1902.02918, section 3.3. No difference in the loss; the recipes have schedules of
        their own.
    """

    def craft(model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float) -> Images:
        return x + sigma * rng.at("gaussian").normal(x)

    return Objective(loss=cross_entropy, craft=craft)
