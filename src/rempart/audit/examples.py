"""A few broken samples as pictures: original, enlarged perturbation, adversarial."""

from collections import Counter
from collections.abc import Sequence

import torch

from rempart.audit.pieces import Piece, varied
from rempart.core.model import Classifier, frozen, placed
from rempart.core.threat import Threat
from rempart.core.types import Images
from rempart.data import Data
from rempart.report.pictures import pair
from rempart.report.schema import Example


def examples(
    model: Classifier,
    data: Data,
    pieces: Sequence[tuple[str, Piece]],
    threat: Threat,
    window: tuple[float, float] | None = None,
) -> tuple[Example, ...]:
    """Up to four samples that the attack with most successes broke, of different classes where possible.

    Images are shown with the ends of the `window` as black and white: those of the box, where none is given.
    """
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
    return tuple(_example(model, data, images[k], strongest, int(at[k]), threat, window) for k in chosen)


def _example(
    model: Classifier,
    data: Data,
    image: Images,
    label: str,
    at: int,
    threat: Threat,
    window: tuple[float, float] | None,
) -> Example:
    batch = data.batch(torch.tensor([at]))
    both = torch.cat([batch.x, image[None].to(batch.x.dtype)])
    with frozen(model), torch.no_grad():
        confidence, predicted = model(placed(model, both)).softmax(1).max(1)
    shown = pair(both[0], both[1], threat.low, threat.high, window)
    return Example(
        index=int(batch.index[0]),
        attack=label,
        label=int(batch.y[0]),
        predicted=int(predicted[0]),
        confidence=float(confidence[0]),
        adversarial=int(predicted[1]),
        adversarial_confidence=float(confidence[1]),
        distance=float(threat.distance(both[:1], both[1:])),
        amplification=shown.amplification,
        original_png=shown.original,
        perturbation_png=shown.perturbation,
        adversarial_png=shown.adversarial,
    )
