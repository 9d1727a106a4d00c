"""One image seen from inside a model: feature maps, saliency, and the landscape around it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rempart.attacks.losses import climb_direction, lead, score
from rempart.core.features import Neurons, features
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels
from rempart.report.pictures import png
from rempart.report.schema import Illustration, Maps

_MAPS = 6  # neurons whose maps are shown
_GRID = 21  # points along each direction of the landscape
_REACH = 2.0  # of the landscape, over the largest change of a pixel


def illustrate(
    model: Classifier,
    sigma: Mapping[str, Tensor],
    x: Images,
    x_adv: Images,
    y: Labels,
    threat: Threat,
    *,
    index: int | None = None,
    seed: int = 0,
) -> Illustration:
    """Picture one image and what an attack made of it.

    Args:
        model: The classifier; left as it was.
        sigma: By layer, the sensitivities to choose neurons by: of each layer with maps, its most sensitive neurons.
        x: The image, shape (1, c, *s).
        x_adv: Its counterpart.
        y: Its true class, shape (1).
        threat: Its box counts.
        index: Number of the image in its data set.
        seed: Of the random direction of the landscape.
    """
    pair, labels, span = torch.cat([x, x_adv]), torch.cat([y, y]), threat.high - threat.low
    change = x_adv - x
    with frozen(model):
        with torch.no_grad(), features(model, list(sigma)) as seen:
            predicted = model(pair).argmax(1)
        maps = {layer: value.nan_to_num(0.0, 0.0, 0.0) for layer, value in seen.items()}
        goal = score("margin", targeted=False, num_classes=model.num_classes)
        slopes = climb_direction(model, pair, labels, goal)[0].abs().amax(1, keepdim=True)
        steepest = climb_direction(model, x, y, score("ce", targeted=False, num_classes=model.num_classes))[0].sign()
        reach = _REACH * float(change.abs().max().clamp_min(1e-3 * span))
        landscape = _landscape(model, x, y, steepest, reach, threat, seed)
    saliency = [png(slope / slope.max().clamp_min(1e-12)) for slope in slopes]
    return Illustration(
        index=index,
        label=int(y[0]),
        predicted=int(predicted[0]),
        adversarial=int(predicted[1]),
        original_png=png((x[0] - threat.low) / span),
        adversarial_png=png((x_adv[0] - threat.low) / span),
        perturbation_png=png(0.5 + change[0] / (2 * change.abs().max().clamp_min(1e-12))),
        saliency_png=saliency[0],
        adversarial_saliency_png=saliency[1],
        maps=tuple(_maps(maps, sigma)),
        reach=reach,
        landscape=landscape,
    )


def _landscape(
    model: Classifier, x: Images, y: Labels, steepest: Images, reach: float, threat: Threat, seed: int
) -> tuple[tuple[float, ...], ...]:
    """Margins on a grid of steps along the sign of the gradient (rows) and random signs (columns), inside the box.

    Where the model names no class it is the lowest of the others.
    """
    random = Draws(seed, torch.zeros(1, dtype=torch.int64), ("landscape",)).sign(x)
    steps = torch.linspace(-reach, reach, _GRID).tolist()
    rows: list[Tensor] = []
    for up in steps:
        points = torch.cat([(x + up * steepest + side * random).clamp(threat.low, threat.high) for side in steps])
        with torch.no_grad():
            rows.append(lead(model(points), y.expand(len(points))))
    margins = torch.stack(rows)
    known = margins[margins.isfinite()]
    margins = margins.clamp(known.min(), known.max()) if len(known) else torch.zeros_like(margins)
    return tuple(tuple(row) for row in margins.tolist())


def _maps(seen: Mapping[str, Tensor], sigma: Neurons | Mapping[str, Tensor]) -> list[Maps]:
    """Of the layers with maps in turn, the next most sensitive neuron of each, until there are enough."""
    spatial = [layer for layer, value in seen.items() if value.ndim > 2]
    order = {layer: sigma[layer].argsort(descending=True, stable=True).tolist() for layer in spatial}
    chosen = [(layer, order[layer][rank]) for rank in range(_MAPS) for layer in spatial if rank < len(order[layer])]
    found: list[Maps] = []
    for layer, neuron in chosen[:_MAPS]:
        before, after = seen[layer][0, neuron], seen[layer][1, neuron]
        low, high = (float(value) for value in torch.stack([before, after]).aminmax())
        moved = after - before
        reach, width = float(moved.abs().max()), max(high - low, 1e-12)
        found.append(
            Maps(
                layer=layer,
                neuron=neuron,
                low=low,
                high=high,
                reach=reach,
                clean_png=png((before[None] - low) / width),
                adversarial_png=png((after[None] - low) / width),
                difference_png=png(0.5 + moved[None] / (2 * max(reach, 1e-12))),
            )
        )
    return found
