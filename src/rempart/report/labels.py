"""Where the labels of a scatter go: beside their points, on top of nothing."""

from collections.abc import Iterator, Sequence
from math import cos, pi, sin

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""
RINGS = (6.0, 13.0, 22.0, 34.0, 48.0, 64.0)
"""Gaps between a point and its label, tried in this order."""
_DIRECTIONS = tuple(k * pi / 8 for k in (0, 8, 4, 12, 2, 6, 14, 10, 1, 7, 15, 9, 3, 5, 13, 11))


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    frame: Box,
) -> list[Box]:
    """Give each label the nearest place inside the frame that is free, or the one that covers least.

    Args:
        points: What the labels belong to, in the order in which they choose.
        sizes: Width and height of each label, in the unit of the points.
        obstacles: What a label should not cover, as boxes.
        frame: What a label should not leave.

    Returns:
        One box per label.
    """
    taken = list(obstacles)
    placed: list[Box] = []
    for point, size in zip(points, sizes, strict=True):
        best = min(_places(point, size), key=lambda box: _cost(box, taken, frame))  # the first of equals
        placed.append(best)
        taken.append(best)
    return placed


def _places(point: tuple[float, float], size: tuple[float, float]) -> Iterator[Box]:
    """Places around a point, near ones first, to the right and to the left before above and below."""
    (x, y), (width, height) = point, size
    for gap in RINGS:
        for angle in _DIRECTIONS:
            across, up = cos(angle), sin(angle)
            left = x + gap * across - width * (1 - across) / 2
            bottom = y + gap * up - height * (1 - up) / 2
            yield left, bottom, left + width, bottom + height


def _cost(box: Box, taken: Sequence[Box], frame: Box) -> float:
    """The area that lies on something or outside the frame, each counted as often as it happens."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    covered = sum(_shared(box, other) for other in taken) + 2 * (area - _shared(box, frame))
    return round(covered, 6)  # equals stay equals, so that the first of them wins


def _shared(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
