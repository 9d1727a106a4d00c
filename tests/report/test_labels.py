from itertools import combinations

import numpy as np
import pytest

from rempart.report.labels import Box, place

FRAME = (0.0, 0.0, 300.0, 250.0)


def shared(one: Box, other: Box) -> float:
    """Area of the intersection, by counting the corners of a fine grid."""
    width = np.clip(min(one[2], other[2]) - max(one[0], other[0]), 0, None)
    return float(width * np.clip(min(one[3], other[3]) - max(one[1], other[1]), 0, None))


@pytest.mark.parametrize("seed", range(5))
def test_labels_cover_nothing_and_stay_inside(seed: int):
    points = [tuple(p) for p in np.random.default_rng(seed).uniform((60, 30), (240, 220), size=(9, 2))]
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    boxes = place(points, [(50.0, 12.0)] * 9, marks, FRAME)
    for one, other in combinations(boxes, 2):
        assert shared(one, other) == 0
    assert all(shared(box, mark) == 0 for box in boxes for mark in marks)
    for left, bottom, right, top in boxes:
        assert left >= 0 and bottom >= 0 and right <= 300 and top <= 250
        assert (right - left, top - bottom) == pytest.approx((50, 12))


def test_a_label_alone_stands_right_of_its_point_and_left_at_the_right_edge():
    assert place([(100, 100)], [(40, 10)], [], FRAME) == [pytest.approx((106, 95, 146, 105))]
    assert place([(290, 100)], [(40, 10)], [], FRAME) == [pytest.approx((244, 95, 284, 105))]


def test_labels_of_one_point_keep_apart():
    boxes = place([(150, 120)] * 8, [(50, 12)] * 8, [(146, 116, 154, 124)], FRAME)
    assert all(shared(one, other) == 0 for one, other in combinations(boxes, 2))


def test_where_there_is_no_room_the_label_covers_least():
    wall = [(-1000.0, -1000.0, 1000.0, 1000.0), (106.0, -1000.0, 1000.0, 1000.0)]
    assert place([(100, 100)], [(40, 10)], wall, (-1000, -1000, 1000, 1000)) == [pytest.approx((54, 95, 94, 105))]
