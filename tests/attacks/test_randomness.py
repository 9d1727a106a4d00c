"""Models that draw random numbers: found for every seed, never refused for them, and replayed where they can be."""

import os
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toys
from rempart.attacks.preflight import is_random, preflight
from rempart.attacks.run import varies
from rempart.core.errors import ModelError
from rempart.core.model import Classifier, frozen
from rempart.core.repro import seeded
from rempart.data.samples import in_memory

SHAPE = (1, 4, 4)
OWN = torch.Generator().manual_seed(0)
COINS = {
    "torch": lambda: int(torch.randint(2, ())),
    "numpy": lambda: int(np.random.randint(2)),
    "python": lambda: random.randrange(2),
    "own generator": lambda: int(torch.randint(2, (), generator=OWN)),
    "system": lambda: os.urandom(1)[0] % 2,
}
REPLAYED = ("torch", "numpy", "python")


class Picks(nn.Module):
    """One of two members, by a throw for all images."""

    def __init__(self, throw) -> None:
        super().__init__()
        self.members = nn.ModuleList(toys.linear(SHAPE, seed=seed).net for seed in (0, 1))
        self.throw = throw

    def forward(self, x: Tensor) -> Tensor:
        return self.members[self.throw()](x)


class EachItsOwn(Picks):
    """One of two members for each image."""

    def forward(self, x: Tensor) -> Tensor:
        first = torch.rand(len(x), 1) < self.throw
        return torch.where(first, self.members[0](x), self.members[1](x))


def classifier(net: nn.Module) -> Classifier:
    return Classifier(net, shape=SHAPE, num_classes=3)


def data(n: int = 24):
    return in_memory("all", toys.images(SHAPE, n), torch.arange(n) % 3, ("0", "1", "2"))


@pytest.mark.parametrize("source", COINS)
def test_a_model_that_throws_a_coin_is_random_for_every_seed(source: str) -> None:
    model, images = classifier(Picks(COINS[source])), data()
    for seed in range(24):
        with seeded(seed, torch.device("cpu")):
            _, checks = preflight(model, images)
            with frozen(model):
                assert varies(model, images.batch(torch.arange(6)).x)
        assert is_random(checks)
        check = next(check for check in checks if check.name == "determinism")
        assert check.evidence["replayed"] == (source in REPLAYED)
        assert ("cannot be repeated exactly" in check.message) == (source not in REPLAYED)


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_draws_of_each_image_are_no_effect_of_the_batch(share: float) -> None:
    model = classifier(EachItsOwn(share))
    for seed in range(8):
        with seeded(seed, torch.device("cpu")):
            assert is_random(preflight(model, data())[1])


def test_an_event_in_one_pass_of_twenty_is_found() -> None:
    """Missed with a chance of 0.95^255 < 3e-6, because the model is seen to draw and asked 256 times."""
    model = classifier(Picks(lambda: int(torch.rand(()) < 0.05)))
    for seed in range(8):
        with seeded(seed, torch.device("cpu")):
            assert is_random(preflight(model, data())[1])


RARE = np.random.default_rng(1)


class Holder:
    """An object with a generator, as networks keep one for their noise."""

    def __init__(self) -> None:
        self.coin = random.Random(3)

    def throw(self) -> int:
        return int(self.coin.random() < 0.05)


def _closed_over():
    coin = torch.Generator().manual_seed(5)
    return lambda: int(torch.rand((), generator=coin) < 0.05)


ELSEWHERE = {
    "of its file": lambda: int(RARE.random() < 0.05),
    "closed over": _closed_over(),
    "of an object": Holder().throw,
    "made each time": lambda: int(np.random.default_rng().random() < 0.05),
    "system": lambda: int(random.SystemRandom().random() < 0.05),
    "bytes of the system": lambda: int(os.urandom(1)[0] < 13),
}


@pytest.mark.parametrize("source", ELSEWHERE)
def test_rare_draws_from_elsewhere_are_found_as_those_of_global_generators(source: str) -> None:
    """Each of 8 runs finds them but for a chance of 3e-6; by 32 passes all 8 would find them once in 24 times."""
    for _ in range(8):
        assert is_random(preflight(classifier(Picks(ELSEWHERE[source])), data())[1])


class Bright(Picks):
    """One of two members for bright images, by a throw for all of them; the first for dark images."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1, keepdim=True) > 0.6
        return torch.where(bright & bool(self.throw()), self.members[1](x), self.members[0](x))


def test_whether_draws_on_the_last_of_sorted_images_can_be_replayed_is_seen() -> None:
    x = torch.cat([0.5 * toys.images(SHAPE, 240), toys.images(SHAPE, 60) * 0.5 + 0.5])
    images = in_memory("all", x, torch.arange(300) // 100, ("0", "1", "2"))
    for source in ("system", "torch"):
        _, checks = preflight(classifier(Bright(COINS[source])), images)
        check = next(check for check in checks if check.name == "determinism")
        assert check.status == "warned" and check.evidence["replayed"] == (source == "torch")


def test_draws_that_change_nothing_do_not_make_a_model_random() -> None:
    model = classifier(Picks(lambda: 0 * int(torch.randint(2, ()))))
    check = next(check for check in preflight(model, data())[1] if check.name == "determinism")
    assert check.status == "passed" and "draws random numbers all the same" in check.message
    check = next(check for check in preflight(toys.conv(SHAPE), data())[1] if check.name == "determinism")
    assert check.status == "passed" and "draws" not in check.message and check.evidence["passes"] >= 32


class Mixes(Picks):
    """Noise, and the mean over the batch taken off."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.members[0](x)
        return z - z.mean(0) + 0.01 * torch.randn_like(z)


def test_a_random_model_that_mixes_a_batch_is_refused_all_the_same() -> None:
    with pytest.raises(ModelError, match="do not depend on the other images"):
        preflight(classifier(Mixes(None)), data())


def test_seeds_replay_torch_numpy_and_python_and_leave_them_as_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw(), draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = draw()
    with seeded(5, torch.device("cpu")):
        inside = draw()
    with seeded(5, torch.device("cpu")):
        assert draw() == inside
    assert (first, draw()) == expected and inside not in expected
