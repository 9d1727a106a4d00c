"""A few broken samples as pictures: original, enlarged perturbation, adversarial."""

import base64
import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rempart.audit.pieces import Piece, varied
from rempart.core.data import Data
from rempart.core.model import Classifier, frozen, placed
from rempart.core.threat import Threat
from rempart.core.types import Images
from rempart.report.schema import Example


def examples(model: Classifier, data: Data, pieces: Sequence[tuple[str, Piece]], threat: Threat) -> tuple[Example, ...]:
    """Up to four samples that the attack with most successes broke, of different classes where possible."""
    broken: Counter[str] = Counter()
    for label, piece in pieces:
        broken[label] += 0 if piece.verdict is None else int((piece.verdict.attacked & piece.verdict.success).sum())
    if not broken.total():
        return ()
    strongest = broken.most_common(1)[0][0]
    kept = [piece for label, piece in pieces if label == strongest]
    shown, images = torch.cat([piece.shown for piece in kept]), torch.cat([piece.images for piece in kept])
    at = (data.index[:, None] == shown).to(torch.int8).argmax(0)
    chosen = varied(torch.ones(len(at), dtype=torch.bool), data.labels[at])
    return tuple(_example(model, data, images[k], strongest, int(at[k]), threat) for k in chosen)


def _example(model: Classifier, data: Data, image: Images, label: str, at: int, threat: Threat) -> Example:
    batch = data.batch(torch.tensor([at]))
    pair = torch.cat([batch.x, image[None].to(batch.x.dtype)])
    with frozen(model), torch.no_grad():
        confidence, predicted = model(placed(model, pair)).softmax(1).max(1)
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
        distance=float(threat.distance(pair[:1], pair[1:])),
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
