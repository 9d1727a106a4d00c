"""A few broken samples as pictures: original, enlarged perturbation, adversarial."""

import base64
import io
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rempart.attacks.run import Outcome
from rempart.core.data import Data
from rempart.core.model import Classifier, frozen
from rempart.core.threat import Threat
from rempart.report.schema import Example

_EXAMPLES = 4


def examples(model: Classifier, data: Data, outcomes: Mapping[str, Outcome], threat: Threat) -> tuple[Example, ...]:
    """Up to four samples that the strongest attack broke within the threat, of different classes where possible."""
    if not outcomes:
        return ()
    label, outcome = min(outcomes.items(), key=lambda item: int(item[1].right.sum()))
    broken = (outcome.attacked & outcome.success).nonzero()[:, 0].tolist()
    seen: set[int] = set()
    fresh = [at for at in broken if (y := int(data.labels[at])) not in seen and not seen.add(y)]
    chosen = [*fresh, *(at for at in broken if at not in fresh)][:_EXAMPLES]
    return tuple(_example(model, data, outcome, label, at, threat) for at in chosen)


def _example(model: Classifier, data: Data, outcome: Outcome, label: str, at: int, threat: Threat) -> Example:
    batch = data.batch(torch.tensor([at]))
    where = next(model.parameters(), batch.x)
    pair = torch.cat([batch.x, outcome.x_adv[at : at + 1]])
    with frozen(model), torch.no_grad():
        confidence, predicted = model(pair.to(where.device, where.dtype)).softmax(1).max(1)
    change = pair[1] - pair[0]
    span = threat.high - threat.low
    factor = float(span / 2 / change.abs().max().clamp_min(1e-12))
    return Example(
        index=int(batch.index[0]),
        attack=label,
        label=int(batch.y[0]),
        predicted=int(predicted[0]),
        confidence=float(confidence[0]),
        adversarial=int(predicted[1]),
        adversarial_confidence=float(confidence[1]),
        distance=float(outcome.distance[at]),
        amplification=factor,
        original_png=_png((pair[0] - threat.low) / span),
        perturbation_png=_png(0.5 + change * factor / span),
        adversarial_png=_png((pair[1] - threat.low) / span),
    )


def _png(image: Tensor) -> str:
    """An image (c, h, w) or the middle slice of a volume, as base64 PNG; in colour if it has 3 channels."""
    while image.ndim > 3:
        image = image[:, image.shape[1] // 2]
    if image.ndim == 2:
        image = image[:, None]
    pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(np.moveaxis(pixels, 0, -1) if len(pixels) == 3 else pixels[0])
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
