"""The images a detector is fitted and judged on: clean ones, noisy ones that count as clean, and broken ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rempart.attacks.catalogue import Attack
from rempart.attacks.run import attack_data
from rempart.core.errors import DataError
from rempart.core.events import Notify, named, silent
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels, Mask
from rempart.data import Data
from rempart.detectors.catalogue import Learning

_HALVINGS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Crafting:
    """How images are attacked.

    Attributes:
        attack: A registered name.
        threat: What its images are judged in: with a budget, or for attacks that look for the smallest perturbation
            their own norm without one.
        options: Options of the attack.
    """

    attack: str
    threat: Threat
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


def split(data: Data, shares: Sequence[float], *, seed: int = 0) -> list[Data]:
    """Part the images at random, class by class, before anything is made of them: no image lies in two parts.

    Which part an image goes to depends on the seed, its number and the other images of its class. Where patients are
    known, each goes to one part with all images, drawn among the patients whose image of the lowest number is of one
    class. Otherwise slices of one patient, and always copies of one image under two numbers, may be parted.

    Args:
        data: The images.
        shares: Of each part, positive, at most 1 together; what is left over goes to none.
        seed: Of the choice.

    Returns:
        The parts, each in the order of `data`. Sizes are within one image, or patient, per class of the shares.

    Raises:
        DataError: If the shares are wrong or a part is empty.
    """
    if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise DataError("positive shares of at most 1 together", got=list(shares))
    order = Draws(seed, data.index, ("split",)).uniform(torch.zeros((len(data), 1), dtype=torch.float64))[:, 0]
    cuts = [0.0, *torch.tensor(shares, dtype=torch.float64).cumsum(0).tolist()]
    who = data.patients or range(len(data))
    first: dict[object, int] = {}  # the image that stands for a patient, or for itself
    for position in data.index.argsort().tolist():
        first.setdefault(who[position], position)
    heads, head = torch.tensor(list(first.values())), torch.tensor([first[name] for name in who])
    chosen: list[list[Tensor]] = [[] for _ in shares]
    for label in data.labels.unique():
        members = heads[data.labels[heads] == label]
        members = members[order[members].argsort()]
        at = [round(cut * len(members)) for cut in cuts]
        for number, part in enumerate(chosen):
            part.append(members[at[number] : at[number + 1]])
    positions = [torch.isin(head, torch.cat(part)).nonzero()[:, 0] for part in chosen]
    if not all(map(len, positions)):
        raise DataError(f"images for {len(shares)} parts", got=f"{len(data)} images", hint="give more images")
    return [data.take(part) for part in positions]


def gather(
    model: Classifier,
    data: Data,
    crafts: Mapping[str, Crafting],
    *,
    noise: Threat | None = None,
    eight_bit: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    notify: Notify = silent,
) -> Learning:
    """Make the sets a detector is fitted or judged on, all of images that the model classifies rightly.

    Attacks and noise run in `attacks.run`, which alone decides what counts: of an attack only the images that broke
    the model within its threat are kept. An image that noise breaks gets new noise of half the size until it holds
    (after 20 times, none), so that there is a noisy image beside each clean one.

    Args:
        model: The classifier.
        data: Images that neither classifier nor detector was trained on, where figures shall mean anything.
        crafts: The attacks, by the names they get.
        noise: Budget of the noise, uniform in its ball; None: no noisy images.
        eight_bit: All images as a file of 256 levels would store them; what is no longer broken then is left out.
        seed: Of noise and attacks.
        batch_size: Images at a time; it changes nothing but rounding.
        notify: Receives the events of the attacks.

    Raises:
        DataError: If the model classifies no image rightly, or the images do not fit it.
        ThreatError: If an attack cannot work in its threat.

    Source:
        The three sets are those of Feinman et al. 2017, arXiv:1703.00410, and Lee et al. 2018, arXiv:1807.03888, where
        noisy images that the model gets wrong are left out.
    """
    judge = _Judge(model, seed, batch_size, eight_bit, notify)
    nothing = Threat(norm="linf", eps=0.0, low=model.low, high=model.high)
    x, wrong = judge(data, nothing, _unchanged, "clean")
    at = (~wrong).nonzero()[:, 0]
    if len(at) == 0:
        raise DataError("images that the model classifies rightly", got=f"none of {len(data)}")
    right = _held(data.take(at), x[at])
    noisy = None if noise is None else _disturbed(judge, right, x[at], noise)
    attacked: dict[str, tuple[Tensor, Images]] = {}
    for name, craft in crafts.items():
        images, wrong = judge(right, craft.threat, craft.attack, name, craft.options)
        attacked[name] = (wrong.nonzero()[:, 0], images[wrong])
    return Learning(x=x[at], y=right.labels, index=right.index, noisy=noisy, attacked=attacked)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Attacks images; gives them as they are kept, and which of them the model gets wrong within the threat.

    An image for which the model names no class is none of these: nobody takes it for another class.
    """

    model: Classifier
    seed: int
    batch_size: int
    eight_bit: bool
    notify: Notify

    def __call__(
        self, data: Data, threat: Threat, attack: str | Attack, name: str, options: Mapping[str, Any] | None = None
    ) -> tuple[Images, Mask]:
        found = attack_data(
            self.model,
            data,
            threat,
            attack,
            options,
            batch_size=self.batch_size,
            seed=self.seed,
            eight_bit=self.eight_bit,
            notify=named(name, self.notify),
        )
        if found.eight_bit is None:
            return found.x_adv, found.broken & ~found.undefined
        stored = threat.quantise(data.read(data.index).to(found.x_adv), found.x_adv)
        return stored, found.eight_bit & ~found.undefined


def _disturbed(judge: _Judge, data: Data, x: Images, noise: Threat) -> Images:
    noisy, todo = x.clone(), torch.arange(len(x))
    for halving in range(_HALVINGS):
        smaller = replace(noise, eps=noise.budget / 2**halving)
        images, wrong = judge(data.take(todo), smaller, _noise, "noise")
        noisy[todo[~wrong]], todo = images[~wrong], todo[wrong]
        if len(todo) == 0:
            break
    return noisy


def _held(data: Data, x: Images) -> Data:
    """The same data with these images, which need not be read again."""
    rows = torch.zeros(int(data.index.max()) + 1, dtype=torch.int64)
    rows[data.index] = torch.arange(len(data))
    return replace(data, read=lambda numbers: x[rows[numbers]], stamps=None)


def _unchanged(model: nn.Module, x: Images, y: Labels, threat: Threat, **_: Any) -> Images:
    return x.clone()


def _noise(model: nn.Module, x: Images, y: Labels, threat: Threat, *, rng: Draws, **_: Any) -> Images:
    return threat.start(x, rng.at(threat.budget))
