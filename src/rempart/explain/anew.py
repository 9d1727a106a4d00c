"""Take neurons out and attack what is left: an attack that knows they are gone."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rempart.attacks.plan import plan
from rempart.audit.pieces import Pieces, attack_chunk
from rempart.core.events import Notify, named, silent
from rempart.core.features import Neurons, watched
from rempart.core.model import Classifier, Untraced
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Logits
from rempart.data import Data
from rempart.explain.contribution import Pairs, effect
from rempart.explain.sensitivity import Choose, top
from rempart.report.schema import ANEW, AuditSpec, Effect, ExplainSpec


def anew(
    model: Classifier,
    sigma: Neurons,
    pairs: Pairs,
    threat: Threat,
    spec: ExplainSpec,
    *,
    random: bool = False,
    notify: Notify = silent,
) -> Effect:
    """Worst case under a suite, without the most sensitive, the least sensitive or random neurons of all layers.

    Masking on images that were attacked before neurons went tells how an attack fares that does not know; this one
    does. Sensitivities should come from other images than `pairs`.

    Args:
        model: The classifier; left as it was.
        sigma: By layer, the sensitivities to choose by.
        pairs: The images to attack; what an attack made of them before does not count.
        threat: Norm, budget and box.
        spec: Its suite, share, draws, seed and batch size count.
        random: Whether the model draws random numbers: attacks then climb mean gradients.
        notify: Receives the progress of the attacks.

    Raises:
        SpecError: If the suite is unknown.

    Source:
        Our design; pruning of vulnerable neurons is that of Madaan, Shin, Hwang 2020, arXiv:1908.04355.
    """
    assert spec.suite is not None
    rng = Draws(spec.seed, torch.zeros(1, dtype=torch.int64), ("explain",))

    def left(choose: Choose, draw: int = 0) -> np.ndarray:
        chosen = {name: top(value, spec.share, choose, rng.at(name, draw)) for name, value in sigma.items()}
        told = named(f"without {choose} neurons{f' {draw + 1}' * (choose == 'random')}", notify)
        return standing(without(model, chosen), pairs, threat, spec, random=random, notify=told)

    return effect(
        list(sigma),
        ANEW,
        spec.share,
        standing(model, pairs, threat, spec, random=random, notify=named("whole", notify)),
        left("sensitive"),
        left("least"),
        np.stack([left("random", draw) for draw in range(spec.draws)]),
        seed=spec.seed,
    )


def without(model: Classifier, neurons: Mapping[str, Tensor]) -> Classifier:
    """The classifier with 0 in the place of chosen neurons; it shares its weights with `model`.

    Args:
        model: The classifier.
        neurons: By layer, the mask of those to take out, shape (neurons).
    """
    return Classifier(
        _Without(model, neurons),
        shape=model.shape,
        num_classes=model.num_classes,
        class_names=model.class_names,
        low=model.low,
        high=model.high,
    )


class _Without(Untraced):
    def __init__(self, model: Classifier, neurons: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.neurons = model, neurons

    def forward(self, x: Images) -> Logits:
        with watched(self.model, self.neurons, self._cleared):
            return self.model(x)

    def _cleared(self, layer: str, value: Tensor) -> Tensor:
        mask = self.neurons[layer].to(value.device)
        return value.masked_fill(mask.view(1, -1, *(1,) * (value.ndim - 2)), 0)


def standing(
    model: Classifier,
    pairs: Pairs,
    threat: Threat,
    spec: ExplainSpec,
    *,
    random: bool = False,
    notify: Notify = silent,
) -> np.ndarray:
    """Which images are right whatever the attacks of the suite did."""
    request = AuditSpec(
        model=spec.models[0], data="", threat=spec.threat, suite=spec.suite, seed=spec.seed, batch_size=spec.batch_size
    )
    planned, _ = plan(request, threat, model.num_classes, random=random)
    at = torch.arange(len(pairs.x))
    names = model.class_names
    data = Data("", "all", at, pairs.y.cpu(), model.shape, names, lambda numbers: pairs.x[numbers])
    done: Pieces = {}
    attack_chunk(model, data, 0, planned, threat, request, done, None, notify)
    right = torch.ones(len(at), dtype=torch.bool)
    for piece in done.values():
        if piece.verdict is not None:
            right[piece.verdict.index] &= piece.verdict.right
    return right.numpy()
