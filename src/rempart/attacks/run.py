"""The one place where attacks are run and judged: success, distance, queries and time are measured here."""

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from numpy.typing import ArrayLike
from pydantic import BaseModel
from torch import Tensor, nn

from rempart.attacks.catalogue import Attack, Traits, attacks
from rempart.attacks.losses import lead, mean_logits, reached, undefined
from rempart.attacks.similarity import psnr, ssim
from rempart.core import given
from rempart.core.errors import AttackError, DataError, ModelError, SpecError, ThreatError
from rempart.core.events import Event, Notify, silent
from rempart.core.foreign import contained
from rempart.core.model import (
    Classifier,
    Meter,
    accelerated,
    backward_failed,
    blind,
    check_classifier,
    class_number,
    frozen,
    metered,
    placed,
)
from rempart.core.randomness import repeated
from rempart.core.registry import Entry
from rempart.core.repro import Draws
from rempart.core.threat import NORMS, Norm, Threat, rounding, vector_norm, wider
from rempart.core.types import Images, Labels, Logits, Mask, Scores
from rempart.data import Batch, Data
from rempart.data.samples import spread

TargetRule = Callable[[Tensor, Labels], Labels]
"""From the clean logits and the labels to the classes an attack shall reach."""
V = TypeVar("V", bound="Verdict")
PASSES = 16
"""Passes whose mean logits judge an image, where the model is random."""
_SHOWN = 6  # images by which it is decided how a model is asked
NO_CLASS = -1
"""In place of a class, where logits that are NaN or infinite name none."""
_JUDGED = 512  # images judged in one forward pass: joint attacks bring all of them at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an attack did to each sample it was given, measured on the images it returned.

    Attributes:
        index: Sample numbers, shape (n).
        correct: Right on the original.
        attacked: Given to the attack: right at first and, when targeted, not of the target class already.
        found: The image is misclassified (targeted: an attacked one, as the target), at whatever distance.
        distance: Distance in the norm of the threat, float64.
        own_distance: Distance in the norm the attack worked in.
        relative: l2 norm of the perturbation over that of the original.
        success: `found`, and the image is within the threat.
        broken: Wrong at first, or misclassified, as whatever, by an image within the threat.
        margin: True logit minus the best other, on the judged image; -inf where the model names no class.
        predicted: Class of the judged image; -1 where the model names none.
        eight_bit: `broken` by the image rounded to 8 bit, where asked for.
        psnr: Peak signal-to-noise ratio of the adversarial image in dB, where asked for; NaN where there is none.
        ssim: Structural similarity of the adversarial image and the original, the same.
        norm: The norm the attack worked in.
        queries: Images sent forward by the attack, in all.
        gradients: Images sent backward by the attack, in all.
        seconds: Wall-clock time of the attack, the judging left out.
        singular: Of the images sent backward, those whose gradient held a NaN or an infinity.
    """

    index: Tensor
    correct: Mask
    attacked: Mask
    found: Mask
    distance: Scores
    own_distance: Scores
    relative: Scores
    success: Mask
    broken: Mask
    margin: Scores
    predicted: Labels
    eight_bit: Mask | None
    norm: Norm
    queries: int
    gradients: int
    seconds: float
    psnr: Scores | None = None
    ssim: Scores | None = None
    singular: int = 0

    @property
    def undefined(self) -> Mask:
        """Broken by an image within the threat for which the model names no class, because its logits are NaN."""
        return self.attacked & self.broken & (self.predicted == NO_CLASS)

    @property
    def right(self) -> Mask:
        """Still right under this attack: right at first and not misclassified within the threat."""
        return ~self.broken

    @property
    def right_after_rounding(self) -> Mask | None:
        """Still right when only adversarial images that survive 8-bit rounding count."""
        return None if self.eight_bit is None else ~self.eight_bit


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Verdict):
    """A verdict with the images it was passed on.

    Attributes:
        x_adv: The judged images. Samples that were wrong at first are returned as they came.
    """

    x_adv: Images

    @property
    def verdict(self) -> Verdict:
        """The verdict without the images, which may be large."""
        return Verdict(**{field.name: getattr(self, field.name) for field in fields(Verdict)})


@dataclass(frozen=True, slots=True)
class Prepared:
    """A frozen classifier: `search` is what attacks use, its fast copy as a rule; `judge`, the original, decides.

    A random model decides by its mean logits over `passes`: by single passes, every further attack would be one more
    chance for the noise, and the worst case would count that and not the adversary.
    """

    search: Classifier
    judge: Classifier
    meter: Meter
    passes: int


@contextmanager
def prepared(
    model: Classifier, images: Images, search: Classifier | None = None, random: bool | None = None
) -> Generator[Prepared]:
    """Freeze a classifier for attacks on such images, or on `search` in its place, and put it back as it was."""
    if any(kept.is_inference() for net in (model, search or model) for kept in (*net.parameters(), *net.buffers())):
        hint = "move load(...) out of `with torch.inference_mode()`; torch.no_grad() is fine"
        raise ModelError("a model with gradients", got="weights made in torch.inference_mode()", hint=hint)
    with frozen(model), frozen(search or model):
        fast = accelerated(model, images) if search is None else search
        passes = PASSES if (varies(model, images) if random is None else random) else 1
        with metered(fast) as meter:
            yield Prepared(fast, model, meter, passes)


def varies(model: Classifier, images: Images) -> bool:
    """Whether repeated passes over the same images differ by more than rounding."""
    return len(images) > 0 and repeated(model, placed(model, images), few=2).random


@contained("model, attack and target rule to run", SpecError)
@torch.inference_mode(mode=False)  # attacks follow gradients wherever they are called from
def attack_batch(
    model: Classifier,
    x: Images | ArrayLike,
    y: Labels | ArrayLike,
    threat: Threat | str,
    attack: str | Attack,
    options: Mapping[str, Any] | None = None,
    *,
    index: Tensor | ArrayLike | None = None,
    mask: Tensor | ArrayLike | None = None,
    target: TargetRule | str | int | None = None,
    search: Classifier | None = None,
    seed: int = 0,
    eight_bit: bool = False,
    similarity: bool = False,
    random: bool | None = None,
    notify: Notify = silent,
) -> Outcome:
    """Attack one batch of images and judge what comes back.

    Args:
        model: The classifier, in any mode; it is left as it was.
        x: Images in the model's box, floating point; whole bytes where the box is [0, 255]. A tensor or an array.
        y: True classes: whole numbers of any type, as a row, a column or one-hot rows; booleans for two classes.
        threat: What the adversary may do; text is read in the model's box.
        attack: A registered name, or a function with the same contract (it is taken to support every norm).
        options: Options of the attack.
        index: Sample numbers: the key of every random draw. Default 0 to n - 1.
        mask: Where pixels may change, boolean, broadcast over channels; the images are attacked one by one then.
        target: Makes the attack targeted: a rule, or what `targets` reads.
        search: The model attacked in place of `model`, which still judges: one with better gradients, or a surrogate.
        seed: Seed of every random draw.
        eight_bit: Also judge the images rounded to 8 bit.
        similarity: Also measure how much the adversarial images look like the originals.
        random: Whether passes over the same images differ; None: repeated passes over some of them show it.
        notify: Receives the attack's events.

    Raises:
        SpecError: If the attack or an option is unknown.
        ThreatError: If the attack cannot work in this threat.
        DataError: If images or labels do not fit the model.
        AttackError: If the attack returns something its contract forbids.
    """
    job = _job(model, threat, attack, options or {}, target, seed, eight_bit)
    job = replace(job, similarity=similarity)
    allowed(job.entry, search or model)
    x, y = check_images(model, x, y)
    with prepared(model, x[spread(len(x))[:_SHOWN]], search, random) as ready:
        return _attack(ready, job, Batch(given.numbers(index, len(x)), x, y, given.mask(mask, x)), notify)


@contained("model, attack and target rule to run", SpecError)
@torch.inference_mode(mode=False)
def attack_data(
    model: Classifier,
    data: Data,
    threat: Threat | str,
    attack: str | Attack,
    options: Mapping[str, Any] | None = None,
    *,
    batch_size: int = 64,
    target: TargetRule | str | int | None = None,
    search: Classifier | None = None,
    seed: int = 0,
    eight_bit: bool = False,
    right: bool = False,
    similarity: bool = False,
    random: bool | None = None,
    notify: Notify = silent,
) -> Outcome:
    """Attack a whole data set in batches; the result is keyed by sample and independent of the batch size.

    An attack that finds one perturbation for all images (`traits.joint`) gets them all at once.

    Takes the arguments of `attack_batch`, and `right`: the images are known to be right at first, so nobody asks again
    (untargeted). `notify` receives one event per batch with the accuracy so far, and the
    attack's own events in between.
    """
    job = _job(model, threat, attack, options or {}, target, seed, eight_bit)
    job = replace(job, right=right, similarity=similarity)
    allowed(job.entry, search or model)
    parts: list[Outcome] = []
    done, left = 0, 0

    def report(event: Event | None = None) -> None:
        values = {"accuracy": left / done} if done else {}
        if event is not None and event.total:
            values["batch"] = event.done / event.total
        note = f"{job.entry.name} {threat}"
        notify(Event(stage=job.entry.name, done=done, total=len(data), values=values, note=note))

    shown = data.batch(spread(len(data))[:_SHOWN])
    with prepared(model, check_images(model, shown.x, shown.y)[0], search, random) as ready:
        for batch in data.batches(max(1, len(data)) if job.entry.traits.joint else batch_size):
            part = _attack(ready, job, batch, report)
            parts.append(part)
            done, left = done + len(batch.y), left + int(part.right.sum())
            report()
    return join(parts)


def join(parts: Iterable[V]) -> V:
    """One verdict or outcome out of several, in their order; counts and seconds add up."""
    parts = list(parts)
    if not parts:
        raise DataError("at least one batch of images", got="none", hint="check the selection of the data")
    values: dict[str, Any] = {}
    for field in fields(parts[0]):
        column = [getattr(part, field.name) for part in parts]
        if isinstance(column[0], Tensor):
            values[field.name] = torch.cat(column)
        elif field.name in ("queries", "gradients", "seconds", "singular"):
            values[field.name] = sum(column)
    return replace(parts[0], **values)


def targets(rule: str | int, model: Classifier) -> TargetRule:
    """Read a target: `nearest` (the second most likely class), `least-likely`, or a class by name or number."""
    rule = str(rule)
    if rule == "nearest":
        return lambda z, y: z.scatter(1, y[:, None], -torch.inf).argmax(1)
    if rule == "least-likely":
        return lambda z, y: z.scatter(1, y[:, None], torch.inf).argmin(1)
    k = class_number(rule, model.class_names)
    if k is None:
        raise ThreatError(
            f"a target out of nearest, least-likely, {', '.join(model.class_names)}, or a class number", got=repr(rule)
        )
    return lambda z, y: torch.full_like(y, k)


def check_images(model: Classifier, x: Images | ArrayLike, y: Labels | ArrayLike) -> tuple[Images, Labels]:
    """Images and labels as the package works on them: floating point in the model's box, and int64.

    Raises:
        DataError: On a wrong shape, pixels that are not finite or outside the box, or labels that are not classes.
    """
    x = given.images(model, x)
    return x, given.labels(y, len(x), model.num_classes).to(x.device)


def native(entry: Entry[Attack, Traits], threat: Threat, options: Mapping[str, Any] | None = None) -> Threat:
    """The threat an attack works in: the one given, or for minimum-norm attacks a norm of theirs without budget.

    Raises:
        ThreatError: If a budgeted attack does not know the norm, there is no budget, or its options ask for steps that
            are longer than the threat is wide.
    """
    known = threat.norm in entry.traits.norms
    if entry.traits.minimum:
        return replace(threat, eps=None, norm=threat.norm if known else entry.traits.norms[0])
    if not known:
        raise ThreatError(f"a norm {entry.name} knows: {', '.join(entry.traits.norms)}", got=threat.norm)
    if threat.eps is None:
        raise ThreatError(f"a budget for {entry.name}", got=str(threat), hint=f"write {threat.norm}:8/255")
    step = (options or {}).get("step")
    if step is not None and wider(step, 2 * threat.eps):
        hint = f"steps are in pixel units: write step={threat.eps / 4:.3g}, or leave it out for the usual length"
        raise ThreatError(
            f"a step of {entry.name} of at most twice the budget, {2 * threat.eps:.3g}", got=step, hint=hint
        )
    return threat


def allowed(entry: Entry[Attack, Traits], model: Classifier) -> None:
    """Refuse an attack that climbs gradients on a model that gives none.

    Raises:
        ModelError: If it does.
    """
    if entry.traits.access == "gradients" and (reason := blind(model)):
        able = ", ".join(other.name for other in attacks if other.traits.access != "gradients")
        raise ModelError(f"a model with gradients for {entry.name}", got=f"one without ({reason})", hint=f"use {able}")


@dataclass(frozen=True, slots=True)
class _Job:
    """One validated request: the attack, its options, the threat it is judged in and the one it works in."""

    entry: Entry[Attack, Any]
    options: Mapping[str, Any]
    threat: Threat
    own: Threat
    target: TargetRule | None
    seed: int
    eight_bit: bool
    right: bool = False
    similarity: bool = False


def _job(
    model: Classifier,
    threat: Threat | str,
    attack: str | Attack,
    options: Mapping[str, Any],
    target: TargetRule | str | int | None,
    seed: int,
    eight_bit: bool,
) -> _Job:
    check_classifier(model)
    if isinstance(attack, str):
        entry = attacks[attack]
        options = entry.parse(options)
    elif not callable(attack):  # pyright: ignore[reportUnnecessaryComparison]
        raise SpecError("the name of an attack, or a function", got=repr(attack))
    else:  # nobody knows what it asks of the model
        traits = Traits(norms=NORMS, targeted=True, random=True, access="decisions")
        entry = Entry(getattr(attack, "__name__", "attack"), attack, traits, BaseModel)
    if target is not None and not entry.traits.targeted:
        raise ThreatError(f"an untargeted run of {entry.name}", got="a target", hint="use pgd or cw, which can aim")
    if isinstance(threat, str):
        threat = Threat.parse(threat, low=model.low, high=model.high)
    elif not isinstance(threat, Threat):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ThreatError("a Threat, or text such as linf:8/255", got=repr(threat))
    if max(abs(threat.low - model.low), abs(threat.high - model.high)) > rounding(model.low, model.high):
        raise ThreatError(
            f"the box of the model, [{model.low:g}, {model.high:g}]",
            got=f"[{threat.low:g}, {threat.high:g}]",
            hint="write Threat.parse(text, low=model.low, high=model.high)",
        )
    threat = replace(threat, low=model.low, high=model.high)
    rule = target if target is None or callable(target) else targets(target, model)
    return _Job(entry, options, threat, native(entry, threat), rule, given.whole(seed, "a seed"), eight_bit)


def _goal(rule: TargetRule, clean: Tensor, y: Labels) -> Labels:
    """The classes a rule aims at, held to the model's."""
    return given.labels(rule(clean, y), len(y), clean.shape[1], "target classes").to(y.device)


def _attack(ready: Prepared, job: _Job, batch: Batch, notify: Notify) -> Outcome:
    index, x, y = batch.index, batch.x, batch.y
    threat, own, targeted = job.threat, job.own, job.target is not None
    x, y = check_images(ready.judge, x, y)
    x = placed(ready.judge, x)
    y = y.to(x.device)
    x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
    correct, goal = torch.ones_like(y, dtype=torch.bool), y
    if not job.right or job.target is not None:
        clean = _finite(_logits(ready, x), index)
        correct = clean.argmax(1) == y
        goal = y if job.target is None else _goal(job.target, clean, y)
    attacked = correct & (goal != y) if targeted else correct
    found = x.clone()
    before, started = copy(ready.meter), time.perf_counter()
    if bool(attacked.any()):
        some = attacked.nonzero()[:, 0]
        chosen = x[some], goal[some], index[some.cpu()]
        if batch.mask is None:
            found[some] = _searched(ready.search, job, *chosen, notify)
        else:
            found[some] = _inside(ready.search, job, *chosen, batch.mask[some.cpu()], notify)
    spent, seconds = ready.meter.since(before), time.perf_counter() - started
    rounded = None
    with frozen(ready.judge):  # once more: an attack might have changed the mode of the model itself
        z = _logits(ready, found)
        if job.eight_bit:
            stored = threat.quantise(x, found)
            wrong = reached(_logits(ready, stored), y, targeted=False)
            rounded = ~correct | (wrong & _holds_rounded(threat, x, stored))
    hit = attacked & reached(z, goal, targeted=targeted)
    if not targeted:
        hit = hit | ~correct
    looks = _similarity(threat, x, found, attacked & hit) if job.similarity else {}
    within = threat.holds(x, found)
    broken = ~correct | (within & reached(z, y, targeted=False))
    return Outcome(
        index=index,
        x_adv=found.cpu(),
        correct=correct.cpu(),
        attacked=attacked.cpu(),
        found=hit.cpu(),
        distance=threat.distance(x, found).cpu(),
        own_distance=own.distance(x, found).cpu(),
        relative=_relative(x, found).cpu(),
        success=(hit & within).cpu(),
        broken=broken.cpu(),
        margin=lead(z, y).cpu(),
        predicted=z.argmax(1).masked_fill(undefined(z), NO_CLASS).cpu(),
        eight_bit=None if rounded is None else rounded.cpu(),
        norm=own.norm,
        queries=spent.queries,
        gradients=spent.gradients,
        seconds=seconds,
        singular=int(spent.singular),
        **looks,
    )


def _searched(model: Classifier, job: _Job, x: Images, goal: Labels, index: Tensor, notify: Notify) -> Images:
    """What the attack returns for images that are all to be attacked, held to its contract."""
    rng, targeted = Draws(job.seed, index, (job.entry.name,)), job.target is not None
    try:
        result = job.entry.function(model, x, goal, job.own, targeted=targeted, rng=rng, notify=notify, **job.options)
    except Exception as error:
        if failed := backward_failed(error):
            raise failed from error
        raise
    _check_contract(job, x, result)
    return result


class _Inside(nn.Module):
    """One image seen through its mask: outside it, a model is shown the original, whatever the attack proposes."""

    def __init__(self, model: Classifier, x: Images, mask: Tensor) -> None:
        super().__init__()
        self.model, self.x, self.mask = model, x, mask

    def forward(self, z: Images) -> Tensor:
        return self.model(torch.where(self.mask, z, self.x))


def _inside(
    model: Classifier, job: _Job, x: Images, goal: Labels, index: Tensor, mask: Tensor, notify: Notify
) -> Images:
    """The same with perturbations inside masks only, one image after the other, so that each attack keeps to its mask.

    An attack asks about images in any number and order; of one image alone it is known which mask they belong to.
    """
    if job.entry.traits.joint:
        hint = "choose an attack that works image by image, or data without masks"
        raise ThreatError("an attack that can be kept inside masks", got=job.entry.name, hint=hint)
    rows: list[Images] = []
    for k in range(len(x)):
        one, within = x[k : k + 1], mask[k : k + 1].to(x.device)
        seen = Classifier(
            _Inside(model, one, within),
            shape=model.shape,
            num_classes=model.num_classes,
            class_names=model.class_names,
            low=model.low,
            high=model.high,
        )
        found = _searched(seen, job, one, goal[k : k + 1], index[k : k + 1], notify)
        rows.append(torch.where(within, found, one))
    return torch.cat(rows)


def _check_contract(job: _Job, x: Images, result: object) -> None:
    """Hold an attack to its contract: same kind of tensor, finite, inside the threat (the box, for minimum norms)."""
    name = job.entry.name
    if not isinstance(result, Tensor):
        raise AttackError(f"{name} to return images like its input, {tuple(x.shape)}", got=type(result).__name__)
    if result.shape != x.shape or result.dtype != x.dtype or result.device != x.device or result.requires_grad:
        raise AttackError(
            f"{name} to return detached images like its input, {tuple(x.shape)} {x.dtype} on {x.device}",
            got=f"{tuple(result.shape)} {result.dtype} on {result.device}",
        )
    if not bool(torch.isfinite(result).all()):
        raise AttackError(f"{name} to return finite pixels", got="NaN or infinity")
    if not bool(job.own.holds(x, result).all()):
        size = float(job.own.distance(x, result).max())
        span = f"distances up to {size:g}, pixels in [{float(result.min()):g}, {float(result.max()):g}]"
        raise AttackError(f"{name} to stay inside {job.own} and the box", got=span)


def _similarity(threat: Threat, x: Images, found: Images, chosen: Mask) -> dict[str, Scores]:
    """PSNR and SSIM of the adversarial images among these; NaN for the others."""
    originals, images, span = x[chosen].cpu(), found[chosen].cpu(), threat.high - threat.low
    table: dict[str, Scores] = {}
    for name, values in (("psnr", psnr(originals, images, span)), ("ssim", ssim(originals, images, span))):
        table[name] = torch.full((len(x),), torch.nan, dtype=torch.float64)
        table[name][chosen.cpu()] = values
    return table


def _relative(x: Images, found: Images) -> Scores:
    change, size = (vector_norm(t.double().flatten(1), "l2") for t in (found.double() - x.double(), x))
    return change / size.clamp_min(1e-12)


def _holds_rounded(threat: Threat, x: Images, stored: Images) -> Mask:
    """Within the threat, where no pixel counts for less than the half level that any 8-bit file costs."""
    if threat.eps is None:
        return threat.holds(x, stored)
    level = (threat.high - threat.low) / 255
    nearest = threat.quantise(x, x)
    slack = threat.distance(x, nearest) if threat.norm != "linf" else torch.full((len(x),), level / 2, device=x.device)
    return threat.distance(x, stored) <= threat.eps + slack + threat.slack(x.flatten(1).shape[1])


def _logits(ready: Prepared, x: Images) -> Logits:
    with torch.no_grad():
        return torch.cat([mean_logits(ready.judge, part, ready.passes) for part in x.split(_JUDGED)])


def _finite(z: Logits, index: Tensor) -> Logits:
    """Logits of originals, of which each must have some: an image that was changed may have none, as a find."""
    if not bool(torch.isfinite(z).all()):
        bad = index[(~torch.isfinite(z)).any(1).nonzero()[0, 0].cpu()]
        raise ModelError(
            "finite logits", got=f"NaN or infinity for sample {int(bad)}", hint="check weights and input range"
        )
    return z
