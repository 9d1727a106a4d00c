"""Augmentation against slicing by hand, and keyed by sample."""

import torch

from rempart.core.repro import Draws
from rempart.train.augment import augment

X = torch.rand(40, 2, 5, 7, generator=torch.Generator().manual_seed(0))
RNG = Draws(3, torch.arange(40))


def moved(image, down, right):
    """The image moved, black coming in."""
    out = torch.zeros_like(image)
    height, width = image.shape[1:]
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                out[:, i, j] = image[:, i - down, j - right]
    return out


def test_nothing_asked_nothing_done():
    assert augment(X, flip=False, shift=0, rng=RNG) is X


def test_flips_mirror_about_half_of_the_images():
    z = augment(X, flip=True, shift=0, rng=RNG)
    same, mirrored = [sum(torch.equal(a, b) for a, b in zip(z, w, strict=True)) for w in (X, X.flip(3))]
    assert same + mirrored == 40 and 10 <= mirrored <= 30


def test_shifts_move_each_image_by_its_own_amount():
    z = augment(X, flip=False, shift=2, rng=RNG)
    moves = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    found = [[move for move in moves if torch.equal(z[n], moved(X[n], *move))] for n in range(40)]
    assert all(len(ways) == 1 for ways in found)
    assert {i for ((i, _),) in found} == {j for ((_, j),) in found} == {-2, -1, 0, 1, 2}


def test_a_sample_does_not_depend_on_its_batch_mates(untouched_rng):
    part = torch.tensor([7, 31, 2])
    whole = augment(X, flip=True, shift=2, rng=RNG)
    assert torch.equal(whole[part], augment(X[part], flip=True, shift=2, rng=RNG.select(part)))
    assert not torch.equal(whole, augment(X, flip=True, shift=2, rng=RNG.at("epoch", 2)))


def test_what_comes_in_is_black_in_the_box_of_the_model():
    z = augment(X * 2 - 1, flip=True, shift=2, rng=RNG, black=-1.0)
    assert torch.allclose(z, augment(X, flip=True, shift=2, rng=RNG) * 2 - 1)
