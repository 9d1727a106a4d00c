"""What the service answers at once, inside the web process: predictions, and one image attacked while a person waits.

Threads share the models. No thread may trace a network meanwhile: `torch.fx` exchanges the calls of every module of the
process for as long as it traces, which makes passes of other threads fail. So images are attacked on the network itself
and on no faster copy of it (`core.model.accelerated`).
"""

import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from rempart.attacks import attack_batch, attacks
from rempart.attacks.losses import mean_logits
from rempart.attacks.plan import averaged, mean_gradient
from rempart.attacks.preflight import preflight
from rempart.attacks.run import PASSES, targets, varies
from rempart.attacks.similarity import psnr, ssim
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.core.model import Classifier, blind, frozen, placed
from rempart.core.threat import NORMS, Norm, Threat
from rempart.core.types import Images, Logits
from rempart.data import files
from rempart.data.samples import in_memory
from rempart.guard import Guarded, load_guard
from rempart.models.formats import PYTHON
from rempart.models.formats.named import NAMED
from rempart.models.load import load
from rempart.preprocess import defended, described, preprocessors
from rempart.report import pictures as png
from rempart.report.schema import AS_IT_IS, AttackChoice, DefenceChoice, Reading, Strict

MANY = 20
"""Up to so many classes the probabilities of all are told, of more those of the first `TOP`."""
TOP = 5
MOST = 100_000
"""No option of an attack on one image may be larger: what takes so many steps belongs in a job."""
_MOST_BEFORE = 1000
"""The same of a defence, which no limit of time stops."""
_BATCH = 64  # images in one pass
_NOISE = 4  # images of noise that a model is looked at with
Loaded = TypeVar("Loaded", Classifier, Guarded)


# ---- what was loaded


class Cache:
    """Models and guards that were asked for of late, loaded once for all threads.

    One whose files are others by now (names, sizes, times of change) is loaded again. Two threads that ask for the same
    at a time wait for one load. Networks stay in inference mode and without gradients of their weights, so that a
    thread that freezes one and puts it back changes nothing for the others.

    Args:
        size: Models and guards kept, together.
    """

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()

    def classifier(
        self, source: str, reading: Reading = AS_IT_IS, defences: tuple[DefenceChoice, ...] = ()
    ) -> Classifier:
        """A model as an audit reads it: outputs that are no logits are mended. Its network is shared.

        Args:
            source: As `models.load` takes it.
            reading: How to read it.
            defences: In front of it, the first nearest to the image.

        Raises:
            SpecError: If a defence is unknown or an option wrong.
            ModelError: If the model cannot be loaded, or not be attacked.
        """
        chain = _chain(defences)
        described(chain)  # a wrong option is told before the model is loaded
        place = source.partition("@")[2] or source if source.startswith((PYTHON, *NAMED)) else source
        return defended(self._once((source, reading), Path(place), lambda: _read(source, reading)), chain)

    def guard(self, folder: Path) -> Guarded:
        """The guard in a folder.

        Its detectors listen to the layers of its network. So give `try_image` not its own classifier to attack, but
        `classifier(guard.source, guard.reading, guard.defences)`.

        Raises:
            ModelError: If a file is missing or damaged, or the network needs code of its own.
        """
        return self._once(folder, folder, lambda: load_guard(folder))

    def _once(self, key: Hashable, place: Path, make: Callable[[], Loaded]) -> Loaded:
        stamp = _stamp(place)
        with self._lock:
            held = self._held.get(key)
            if held is None or held.stamp != stamp:
                held = self._held[key] = _Held(stamp)
            self._held.move_to_end(key)
        try:
            with held.turn:
                if held.thing is None:
                    held.thing = make()
                return held.thing
        finally:
            with self._lock:
                if held.thing is None and self._held.get(key) is held:  # what cannot be loaded takes no room
                    del self._held[key]
                while len(self._held) > self._size:
                    self._held.popitem(last=False)


_Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(slots=True)
class _Held:
    """What was loaded, or is being loaded by the thread that has the turn."""

    stamp: _Stamp
    thing: Any = None
    turn: threading.Lock = field(default_factory=threading.Lock)


def _stamp(place: Path) -> _Stamp:
    """Name, size, number and time of change of each file; empty where there is none."""
    found: list[tuple[str, int, int, int]] = []
    for part in sorted(place.rglob("*")) if place.is_dir() else [place]:
        with suppress(OSError):  # gone by now, or never there: what loads it says so
            fact = part.stat()
            found.append((str(part), fact.st_size, fact.st_ino, fact.st_mtime_ns))
    return tuple(found)


def _read(source: str, reading: Reading) -> Classifier:
    model = load(source, reading)
    x = torch.rand((_NOISE, *model.shape), generator=torch.Generator().manual_seed(0))
    x = model.low + (model.high - model.low) * x
    with frozen(model), torch.no_grad():
        labels = model(placed(model, x)).argmax(1).cpu()
    mended, _ = preflight(model, replace(in_memory("all", x, labels, model.class_names), source="noise"))
    for module in mended.modules():
        module.training = False  # one by one, because some modules refuse `eval()`
    return mended.requires_grad_(False)


def _chain(defences: Sequence[DefenceChoice]) -> list[tuple[str, dict[str, Any]]]:
    return [(choice.name, choice.options) for choice in defences]


# ---- images


@dataclass(frozen=True, slots=True)
class Uploaded:
    """Images as a model takes them.

    Attributes:
        x: In its box, shape (n, *shape).
        notes: What was done to them.
    """

    x: Images
    notes: tuple[str, ...]


def read_images(contents: Sequence[bytes], shape: tuple[int, ...], low: float, high: float) -> Uploaded:
    """Decode image files, and bring them to the size, the channels and the box of a model.

    Args:
        contents: PNG, JPEG, BMP, GIF, WEBP, TIFF or PNM, within the limits of `core.files`.
        shape: Of the images a model takes: channels (1 or 3), height, width.
        low: Smallest pixel value of the model.
        high: Largest pixel value.

    Raises:
        DataError: If there is none, or one cannot be read or exceeds a limit.
    """
    if not contents:
        raise DataError("one image or more", got="none")
    images: list[Tensor] = []
    notes: list[str] = []
    for number, content in enumerate(contents, 1):
        name = f"image {number}"
        image, size = files.decoded(name, content, shape)
        images.append(image * (high - low) + low)
        if size != (shape[2], shape[1]):
            told = f"{size[0]}x{size[1]} was resized to {shape[2]}x{shape[1]}, the size the model takes."
            notes.append(f"{name.capitalize()} of {told}")
    return Uploaded(torch.stack(images), tuple(notes))


# ---- predictions


class Predicted(Strict):
    """What a model says of one image, and a guard where one was asked.

    Attributes:
        label: The predicted class.
        name: Its name.
        confidence: Softmax of that class; it says nothing of attacks. None where it is no number.
        probabilities: Softmax by name: of all classes in their order, of more than 20 the five largest.
        verdict: Whether a guard lets the image pass; None: no guard was asked.
        score: How suspicious the image is to the guard; None also where it is no finite number.
        threshold: An image is rejected above it.
        attack: What the guard takes a rejected image for, where it names attacks.
        probability: How likely that is to it.
    """

    label: int
    name: str
    confidence: float | None
    probabilities: dict[str, float]
    verdict: Literal["accepted", "rejected"] | None = None
    score: float | None = None
    threshold: float | None = None
    attack: str | None = None
    probability: float | None = None


def predict(target: Classifier | Guarded, x: Images) -> list[Predicted]:
    """Classify images, and have a guard judge them.

    Args:
        target: From a `Cache`.
        x: Images in its box, shape (n, *shape).

    Raises:
        DataError: If a guard gets images it does not take.
        ModelError: If a classifier gives no finite logits.
    """
    if isinstance(target, Classifier):
        parts = [_told(target, _logits(target, part, 1)) for part in x.split(_BATCH)]
        return [told for part in parts for told in part]
    said = target.predict(x)
    return [
        Predicted(
            label=label,
            name=said.names[k],
            confidence=_number(said.confidence[k]),
            probabilities=_probabilities(said.softmax[k], target.classifier.class_names),
            verdict=said.verdicts[k],
            score=_number(said.scores[k]),
            threshold=said.threshold,
            attack=said.attacks[k],
            probability=said.probabilities[k],
        )
        for k, label in enumerate(said.labels.tolist())
    ]


def _logits(model: Classifier, x: Images, passes: int) -> Logits:
    """As the judge of attacks sees them: mean logits, laid out in memory in the same way."""
    x = placed(model, x)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    with frozen(model):
        z = mean_logits(model, x, passes).cpu()
    if not bool(z.isfinite().all()):
        raise ModelError("finite logits", got="NaN or infinity", hint="check weights and input range")
    return z


def _told(model: Classifier, z: Logits) -> list[Predicted]:
    softmax = z.double().softmax(1)
    labels = z.argmax(1).tolist()
    return [
        Predicted(
            label=label,
            name=model.class_names[label],
            confidence=float(row[label]),
            probabilities=_probabilities(row, model.class_names),
        )
        for label, row in zip(labels, softmax, strict=True)
    ]


def _probabilities(row: Tensor, names: Sequence[str]) -> dict[str, float]:
    """By name, with the number of the class where several have the same name."""
    shown = list(range(len(names))) if len(names) <= MANY else row.topk(TOP).indices.tolist()
    times = Counter(names)
    keys = [names[k] if times[names[k]] == 1 else f"{names[k]} ({k})" for k in shown]
    return {key: p for key, k in zip(keys, shown, strict=True) if math.isfinite(p := float(row[k]))}


def _number(value: Tensor | float) -> float | None:
    return number if math.isfinite(number := float(value)) else None


# ---- one image attacked


class Answers(Strict):
    """What is said of an image before and after an attack."""

    original: Predicted
    adversarial: Predicted


class Distances(Strict):
    """How far the adversarial image is from the original.

    Attributes:
        linf: Largest change of a pixel, in units of the box.
        levels: The same in 255ths of the box.
        l2: Euclidean distance.
        l1: Sum of the changes.
    """

    linf: float
    levels: float
    l2: float
    l1: float


class Trial(Strict):
    """One image attacked.

    Attributes:
        attack: With the options it ran with, where they are not its defaults.
        threat: Norm and budget.
        eps: The budget, in units of the box; None: the attack looked for the smallest perturbation.
        label: The class that counts as true.
        target: The class the attack aimed at.
        attacked: Whether there was anything to do: the image was taken for `label`, and not for `target` already.
        success: The attack made an image within the threat that the model takes for another class, or for `target`.
        found: The same at whatever distance.
        distances: Of the two images.
        psnr: Peak signal-to-noise ratio in dB; None where the images are the same.
        ssim: Structural similarity; None for images smaller than its window of 11 pixels.
        queries: Images sent forward by the attack.
        gradients: Images sent backward by the attack.
        seconds: Time of the attack.
        amplification: Factor by which the pictured perturbation is enlarged.
        original_png: The original as base64 PNG.
        perturbation_png: The perturbation around mid-grey.
        adversarial_png: The adversarial image, rounded to 8 bits.
        predicted: By the attacked model.
        behind: By the same model behind each single defence, by the name of the defence with its options. The attack
            did not know the defence; one that does gets past more of them.
        guarded: By a guard, which the attack did not know either.
        notes: What a reader should know, in sentences.
    """

    attack: AttackChoice
    threat: str
    eps: float | None
    label: int
    target: int | None
    attacked: bool
    success: bool
    found: bool
    distances: Distances
    psnr: float | None
    ssim: float | None
    queries: int
    gradients: int
    seconds: float
    amplification: float
    original_png: str
    perturbation_png: str
    adversarial_png: str
    predicted: Answers
    behind: dict[str, Answers]
    guarded: Answers | None
    notes: tuple[str, ...]


def try_image(
    model: Classifier,
    x: Images,
    *,
    threat: str,
    attack: AttackChoice,
    label: int | None = None,
    target: str | None = None,
    defences: tuple[DefenceChoice, ...] = (),
    guard: Guarded | None = None,
    seed: int = 0,
    seconds: float = 10.0,
    notes: Sequence[str] = (),
) -> Trial:
    """Attack one image, and ask the model, the model behind defences and a guard about what comes back.

    Args:
        model: From a `Cache`; no guard's own.
        x: The image in its box, shape (1, *shape).
        threat: Such as `linf:4/255`.
        attack: A registered one, with options; a random model is attacked by mean gradients unless they say otherwise.
        label: The true class; None: what the model takes the image for.
        target: Makes the attack targeted: nearest, least-likely, or a class by name or number.
        defences: Each is tried alone, in front of the model.
        guard: Of a model of the same images.
        seed: Of what the attack draws at random. What a random model draws is new each time.
        seconds: Limit of the attack, asked for before each pass through the model.
        notes: Said of the image already, such as those of `read_images`.

    Raises:
        SpecError: If a name or an option is wrong, an option is larger than `MOST`, or the time is over.
        ThreatError: If the attack cannot work in this threat.
        DataError: If image or label do not fit the model, or the guard is of other images.
        ModelError: If the attack needs gradients and the model gives none, or logits are not finite.
    """
    allowance = Threat.parse(threat, low=model.low, high=model.high)
    entry, aim = attacks[attack.name], None if target is None else targets(target, model)
    _refuse(model, x, entry.name, entry.parse(attack.options), guard)
    for choice in defences:
        _refuse_long(preprocessors[choice.name].parse(choice.options), _MOST_BEFORE)
    protected = {described([part])[0]: (part[0], defended(model, [part])) for part in _chain(defences)}
    with frozen(model):
        random = varies(model, x)
    passes = PASSES if random else 1
    mean = mean_gradient(entry.name, attack.options) if random else {}
    attack = AttackChoice(name=attack.name, options={**attack.options, **mean})

    z = _logits(model, x, passes)
    original = _told(model, z)[0]
    y = torch.tensor([original.label if label is None else label])
    search = _watched(model, attack, seconds)
    outcome = attack_batch(
        model, x, y, allowance, attack.name, attack.options, target=aim, search=search, seed=seed, random=random
    )
    if bool(outcome.undefined[0]):
        raise ModelError(
            "an answer within the threat",
            got=f"NaN or infinity at {allowance.norm} {float(outcome.distance[0]):.3g}",
            hint="the attack succeeded: guard the model's logarithms, roots and divisions",
        )
    z_adv = _logits(model, outcome.x_adv, passes)
    goal = None if aim is None else int(aim(z, y)[0])
    shown = png.pair(x[0].cpu(), outcome.x_adv[0], model.low, model.high)
    attacked = bool(outcome.attacked[0])
    adversarial = _told(model, z_adv)[0]
    trial = Trial(
        attack=attack,
        threat=str(allowance),
        eps=allowance.eps,
        label=int(y[0]),
        target=goal,
        attacked=attacked,
        success=attacked and bool(outcome.success[0]),
        found=attacked and bool(outcome.found[0]),
        distances=_distances(allowance, x.cpu(), outcome.x_adv),
        psnr=_number(psnr(x.cpu(), outcome.x_adv, model.high - model.low)),
        ssim=_number(ssim(x.cpu(), outcome.x_adv, model.high - model.low)),
        queries=outcome.queries,
        gradients=outcome.gradients,
        seconds=outcome.seconds,
        amplification=shown.amplification,
        original_png=shown.original,
        perturbation_png=shown.perturbation,
        adversarial_png=shown.adversarial,
        predicted=Answers(original=original, adversarial=adversarial),
        behind={
            text: _asked(behind, x, outcome.x_adv, PASSES if random or preprocessors[name].traits.random else 1)
            for text, (name, behind) in protected.items()
        },
        guarded=None if guard is None else _judged(guard, x, outcome.x_adv),
        notes=(),
    )
    said = _notes(model, trial, guessed=label is None, random=random, averaging=bool(mean))
    return trial.model_copy(update={"notes": (*notes, *said)})


def _refuse(model: Classifier, x: Images, name: str, options: dict[str, Any], guard: Guarded | None) -> None:
    """What would be told too late, or not at all."""
    if tuple(x.shape) != (1, *model.shape):
        raise DataError(f"one image, a batch of shape {(1, *model.shape)}", got=tuple(x.shape))
    if attacks[name].traits.joint:
        raise SpecError("an attack on one image", got=f"{name}, which is one on many at once", hint="use pgd")
    _refuse_long(options, MOST)
    if guard is not None:
        seen = guard.classifier
        ours, its = ((m.shape, m.low, m.high) for m in (model, seen))
        if ours != its:
            raise DataError(f"a guard of images of shape {model.shape} in [{model.low:g}, {model.high:g}]", got=its)


def _refuse_long(options: dict[str, Any], most: int) -> None:
    for key, value in options.items():
        if isinstance(value, int | float) and value > most:
            raise SpecError(f"options up to {most:,} on one image", got=f"{key}={value}", hint="run it as a job")


def _watched(model: Classifier, attack: AttackChoice, seconds: float) -> Classifier:
    """The same network as a classifier of this call's own, which refuses to go on once the time is over.

    What is hooked to it concerns no other thread. The events of an attack would not do: it may send any number of
    images through the model from one to the next.
    """
    end = time.perf_counter() + seconds

    def check(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if time.perf_counter() > end:
            options = "".join(f", {key}={value}" for key, value in attack.options.items())
            raise SpecError(
                f"an attack on one image within {seconds:g} s",
                got=f"{attack.name}{options}, which was not done by then",
                hint="take fewer steps, queries or restarts, a quicker attack such as fgsm, or run it as a job",
            )

    view = Classifier(
        model.net,
        shape=model.shape,
        num_classes=model.num_classes,
        class_names=model.class_names,
        low=model.low,
        high=model.high,
        output=model.output,
        notes=model.notes,
    )
    view.register_forward_pre_hook(check)
    return view


def _asked(model: Classifier, x: Images, x_adv: Images, passes: int) -> Answers:
    original, adversarial = (_told(model, _logits(model, one, passes))[0] for one in (x, x_adv))
    return Answers(original=original, adversarial=adversarial)


def _judged(guard: Guarded, x: Images, x_adv: Images) -> Answers:
    original, adversarial = predict(guard, torch.cat([x.cpu(), x_adv]))
    return Answers(original=original, adversarial=adversarial)


def _distances(threat: Threat, x: Images, x_adv: Images) -> Distances:
    linf, l2, l1 = (float(replace(threat, norm=norm, eps=None).distance(x, x_adv)) for norm in NORMS)
    return Distances(linf=linf, levels=255 * linf / (threat.high - threat.low), l2=l2, l1=l1)


def _notes(model: Classifier, trial: Trial, *, guessed: bool, random: bool, averaging: bool) -> list[str]:
    name, taken = model.class_names[trial.label], trial.predicted.original.name
    notes: list[str] = []
    if guessed:
        notes.append(f"No class was given: what the model takes the image for, {name}, counts as the true one.")
    if trial.label != trial.predicted.original.label:
        notes.append(f"The model takes the image for {taken}, not {name}: it is wrong already, nothing was changed.")
    elif trial.target == trial.label:
        notes.append(f"The image is {name}, the class aimed at: nothing was changed.")
    elif not trial.attacked:
        notes.append("The passes of the random model disagree on the image as it is: nothing was changed.")
    if trial.found and not trial.success:
        notes.append(f"The image that was found is further from the original than {trial.threat} allows.")
    if reason := blind(model):
        notes.append(f"The model gives no gradients ({reason}): with them an adversary does better.")
    notes += averaged([trial.attack.name] if averaging else [])
    if random:
        notes.append(f"The model is random: it was judged by its mean logits over {PASSES} passes, new ones each time.")
    if trial.behind:
        notes.append("The attack did not know the defences: one that does gets past more of them.")
    if trial.guarded is not None:
        notes.append("The attack did not know the guard.")
    return notes


# ---- what can be tried


class AttackForm(Strict):
    """An attack that can be tried on one image.

    Attributes:
        name: Its name.
        summary: What it does, in a sentence.
        norms: Those it works in, its own first.
        access: What it asks of the model: gradients, scores or decisions.
        targeted: Whether it can aim at a class.
        minimum: Whether it looks for the smallest perturbation, and needs no budget.
        options: Their JSON schema, with defaults and bounds.
    """

    name: str
    summary: str
    norms: tuple[Norm, ...]
    access: Literal["gradients", "scores", "decisions"]
    targeted: bool
    minimum: bool
    options: dict[str, Any]


def attack_choices(model: Classifier | None = None, norm: Norm | None = None) -> tuple[AttackForm, ...]:
    """The attacks that can be tried on one image.

    Args:
        model: Leave out those that need gradients where it gives none.
        norm: Leave out those that work in others.
    """
    sighted = model is None or blind(model) is None
    return tuple(
        AttackForm(
            name=entry.name,
            summary=entry.summary,
            norms=entry.traits.norms,
            access=entry.traits.access,
            targeted=entry.traits.targeted,
            minimum=entry.traits.minimum,
            options=entry.params.model_json_schema(),
        )
        for entry in attacks
        if not entry.traits.joint
        and (sighted or entry.traits.access != "gradients")
        and (norm is None or norm in entry.traits.norms)
    )
