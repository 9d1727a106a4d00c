"""What a training run is made of: the model on its device, the optimiser, the objective and its state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rempart.core.errors import SpecError
from rempart.core.events import Event, Notify, silent
from rempart.core.model import Classifier, layout_of
from rempart.core.ranks import ALONE, Ranks
from rempart.objectives.catalogue import Objective
from rempart.report.schema import Epoch
from rempart.train.config import Recipe

_MOMENTUM = 0.9
_PRECISION: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "32": "32-true",
    "bf16": "bf16-mixed",
    "16": "16-mixed",
}


@dataclass(frozen=True, slots=True)
class Run:
    """What the parts of the loop share."""

    fabric: Fabric
    classifier: Classifier
    optimiser: Optimizer
    objective: Objective
    averaged: dict[str, Tensor]
    recipe: Recipe
    seed: int
    samples: int
    ranks: Ranks
    notify: Notify

    def tell(self, done: int, note: str, values: Mapping[str, float], measured: Epoch | None) -> None:
        """Send one event; `done` counts training images over all epochs, `measured` is the last epoch that ended."""
        known = {} if measured is None else {"clean accuracy": measured.accuracy}
        if measured is not None and measured.robust_accuracy is not None:
            known["accuracy under attack"] = measured.robust_accuracy
        total = self.samples * self.recipe.epochs
        self.notify(Event(stage="train", done=done, total=total, values={**values, **known}, note=note))

    def learnt(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, with their names in the classifier."""
        return [(name, parameter) for name, parameter in self.classifier.named_parameters() if parameter.requires_grad]

    def scaler(self) -> Any:
        """What keeps 16-bit gradients from vanishing, where there is one."""
        return getattr(self.fabric.strategy.precision, "scaler", None)


def uses_gpu(device: str | None) -> bool:
    """Whether a training on `device` runs on a GPU: where there is one, unless something else is asked for."""
    return torch.cuda.is_available() if device is None else device == "cuda"


def refuse_alone(recipe: Recipe) -> None:
    """Raise SpecError where the objective cannot be shared by several processes."""
    if recipe.build_objective().alone:
        raise SpecError(
            "one process for an objective that keeps images or margins of its own",
            got=f"several for {recipe.objective}",
            hint="leave out --devices, or choose another recipe",
        )


def setup(
    classifier: Classifier,
    recipe: Recipe,
    *,
    seed: int,
    samples: int,
    device: str | None = None,
    ranks: Ranks = ALONE,
    notify: Notify = silent,
) -> Run:
    """Choose the device, and make objective and optimiser.

    Fabric chooses the device, scales losses in half precision and steps. The model is not wrapped by it: attacks and
    regularisers take gradients of their own, which its wrapper takes for backward passes that went astray.
    """
    if ranks.world > 1:
        refuse_alone(recipe)
    objective = recipe.build_objective()
    if objective.repeats > 1 and recipe.accumulate > 1:
        raise SpecError("accumulate=1 for an objective that repeats each batch", got=recipe.accumulate)
    if samples // math.ceil(samples / recipe.batch_size) < ranks.world:
        raise SpecError(
            "at least one image of each batch per process",
            got=f"batches of {recipe.batch_size} in {ranks.world} processes",
            hint="raise batch_size, or lower --devices",
        )
    on_gpu = uses_gpu(device)
    gpu = ranks.local % max(1, torch.cuda.device_count())
    fabric = Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=[gpu] if on_gpu else 1,
        precision=_PRECISION[recipe.precision],
    )
    fabric.to_device(classifier)
    if layout_of(classifier) == torch.channels_last:  # 1.6 times faster on a CPU
        classifier.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    learnt = {name: parameter for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "sgd":
        plain = SGD(learnt.values(), rate, momentum=_MOMENTUM, nesterov=True, weight_decay=decay)
    else:
        plain = AdamW(learnt.values(), rate, weight_decay=decay)
    averaged = {name: parameter.detach().clone() for name, parameter in learnt.items()} if recipe.ema else {}
    optimiser = cast(Optimizer, fabric.setup_optimizers(plain))
    return Run(fabric, classifier, optimiser, objective, averaged, recipe, seed, samples, ranks, notify)
