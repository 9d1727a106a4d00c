"""Requests and the one report: what the command line, a worker, a page and a test exchange."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import numpy as np
from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rempart.core.errors import DataError
from rempart.core.identity import Identity
from rempart.core.numbers import Pixels
from rempart.core.stats import Auroc, Difference, Mean, Rate
from rempart.data import PLAIN, Data

SCHEMA_VERSION = 1
Options = dict[str, Any]


class Strict(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AttackChoice(Strict):
    """An attack by name, with the options that differ from its defaults."""

    name: str
    options: Options = Field(default_factory=dict)


class DetectorChoice(Strict):
    """A detector by name, with the options that differ from its defaults."""

    name: str
    options: Options = Field(default_factory=dict)


class DefenceChoice(Strict):
    """A preprocessing defence by name, with the options that differ from its defaults."""

    name: str
    options: Options = Field(default_factory=dict)


class Reading(Strict):
    """How to read a model, where it does not say so itself.

    Attributes:
        box: What its network takes for images in [0, 1]: `0:255`, `-1:1`, `mean=0.449,std=0.226` (or as many of each as
            there are channels, separated by commas; in units of [0, 1]), or `per-image` for (x - mean) / std of each
            image. Budgets stay in units of [0, 1].
        classes: Names of its outputs, in their order.
        outputs: Whether they are logits or probabilities; None: the network and its outputs show which.
    """

    box: str = "0:1"
    classes: tuple[str, ...] = ()
    outputs: Literal["logits", "probabilities"] | None = None


AS_IT_IS = Reading()


class AuditSpec(Strict):
    """Everything an audit depends on; `rempart run report.json` replays it.

    Attributes:
        reading: How to read the model.
        patients: A CSV table of the patient of each image.
        defences: In front of the model, the first nearest to the image; they belong to what is attacked.
        chunk: Samples worked off as a whole and stored when done; a stopped audit loses at most one attack on one.
        devices: Processes that share the chunks, each with a GPU of its own where `device` is cuda.
        pairs: Pairs of classes to try targeted attacks on: `all`, or TRUE:TARGET,TRUE:TARGET by name or number.
        costs: A CSV file of what it costs to take one class for another.
        window: Pixel values shown black and white in pictures of images; None: the ends of the model's box.
    """

    kind: Literal["audit"] = "audit"
    model: str
    reading: Reading = AS_IT_IS
    data: str
    patients: str | None = None
    threat: str
    suite: str | None = None
    attacks: tuple[AttackChoice, ...] = ()
    defences: tuple[DefenceChoice, ...] = ()
    limit: Annotated[int, Ge(1)] | None = None
    batch_size: Annotated[int, Ge(1)] = 64
    chunk: Annotated[int, Ge(1)] = 512
    seed: int = 0
    eight_bit: bool = False
    sweep: bool = True
    pairs: str | None = None
    costs: str | None = None
    window: tuple[float, float] | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    devices: Annotated[int, Ge(1)] = 1
    out: str | None = None


class AttackSpec(Strict):
    """One attack on a data set, the adversarial images kept.

    Attributes:
        reading: How to read the model.
        patients: A CSV table of the patient of each image.
        defences: In front of the model, the first nearest to the image.
    """

    kind: Literal["attack"] = "attack"
    model: str
    reading: Reading = AS_IT_IS
    data: str
    patients: str | None = None
    threat: str
    attack: AttackChoice
    defences: tuple[DefenceChoice, ...] = ()
    target: str | None = None
    limit: Annotated[int, Ge(1)] | None = None
    batch_size: Annotated[int, Ge(1)] = 64
    seed: int = 0
    eight_bit: bool = False
    out: str


LogName = Literal["tensorboard", "mlflow"]
LOGS: tuple[LogName, ...] = get_args(LogName)


class TrainSpec(Strict):
    """A training run; a run of the same spec with `resume` goes on where one was stopped.

    Attributes:
        patients: A CSV table of the patient of each image.
        model: Architecture to train from scratch.
        model_options: Options of it that differ from its defaults.
        start: A trained model to fine-tune, instead of an architecture.
        reading: How to read that model.
        options: Keys of the recipe and options of its objective that differ from it.
        devices: Processes that share each batch, each with a GPU of its own where `device` is cuda.
        log: Where the figures of each epoch go, besides log.csv.
        resume: Go on with what lies in `out`.
        overwrite: Begin anew, whatever lies in `out`.
    """

    kind: Literal["train"] = "train"
    data: str
    patients: str | None = None
    model: str | None = None
    model_options: Options = Field(default_factory=dict)
    start: str | None = None
    reading: Reading = AS_IT_IS
    recipe: str = "plain"
    options: Options = Field(default_factory=dict)
    seed: int = 0
    device: Literal["cpu", "cuda"] | None = None
    devices: Annotated[int, Ge(1)] = 1
    log: tuple[LogName, ...] = ()
    resume: bool = False
    overwrite: bool = False
    out: str


class CertifySpec(Strict):
    """A certification by randomised smoothing; with a threat, an attack on the same smoothed classifier beside it.

    Attributes:
        reading: How to read the model.
        defences: In front of the model and behind the noise, the first nearest to the image.
    """

    kind: Literal["certify"] = "certify"
    model: str
    reading: Reading = AS_IT_IS
    data: str
    sigma: Pixels
    samples: int = 10_000
    selection: int = 100
    alpha: float = 1e-3
    threat: str | None = None
    attack: AttackChoice = AttackChoice(name="pgd")
    defences: tuple[DefenceChoice, ...] = ()
    attack_draws: Annotated[int, Ge(1)] = 16
    limit: Annotated[int, Ge(1)] | None = None
    batch_size: Annotated[int, Ge(1)] = 256
    seed: int = 0
    out: str | None = None


class DetectSpec(Strict):
    """Detectors fitted on the train split, calibrated on a part of the test split, and judged on the rest of it.

    Where the data have one split, it is parted in three.

    Attributes:
        reading: How to read the model.
        detectors: Names with options.
        attacks: What the detectors that learn from attacks learn, and what all are judged by.
        defences: In front of the model, the first nearest to the image.
        threat: What the attacks may do; those for the smallest perturbation search on their own.
        budgets: Further budgets of the threat to judge by.
        fpr: False-positive rate the threshold is set for.
        fit_limit: Images to fit on.
        limit: Images to judge by.
        adaptive: Also attack each detector by an attacker who knows it.
    """

    kind: Literal["detect"] = "detect"
    model: str
    reading: Reading = AS_IT_IS
    data: str
    detectors: tuple[DetectorChoice, ...]
    attacks: tuple[AttackChoice, ...]
    defences: tuple[DefenceChoice, ...] = ()
    threat: str
    budgets: tuple[Annotated[Pixels, Gt(0)], ...] = ()
    fpr: Annotated[float, Gt(0), Lt(1)] = 0.05
    fit_limit: Annotated[int, Ge(1)] | None = None
    limit: Annotated[int, Ge(1)] | None = None
    adaptive: bool = True
    steps: Annotated[int, Ge(1)] = 100
    batch_size: Annotated[int, Ge(1)] = 64
    seed: int = 0
    out: str


class ExplainSpec(Strict):
    """How much the neurons of models change under attack, and what that does to predictions.

    Attributes:
        models: One or more; the first is illustrated, and its attacked images are shown to the others too.
        reading: How to read the models.
        data: What sensitivities are measured on; None: on `image` alone.
        image: A file to illustrate, instead of an image of `data`.
        label: The true class of `image`, by name or number; None: what the first model takes it for.
        attacks: The first makes the pairs all figures are about; the others are for the overlap of sensitive sets.
        suite: Attacks what is left, once the neurons of all layers are taken out, anew; None: that is not done.
        layers: Names of modules or patterns; none: the outputs of all blocks.
        share: Of the neurons of a layer that count as sensitive.
        limit: Images used.
        test: Images that neurons are masked and replaced on; they are not those the neurons were chosen by.
        draws: Random choices of neurons to compare with.
    """

    kind: Literal["explain"] = "explain"
    models: Annotated[tuple[str, ...], Len(1)]
    reading: Reading = AS_IT_IS
    data: str | None = None
    image: str | None = None
    label: str | None = None
    defences: tuple[DefenceChoice, ...] = ()
    threat: str
    attacks: Annotated[tuple[AttackChoice, ...], Len(1)] = (AttackChoice(name="pgd"),)
    suite: str | None = None
    layers: tuple[str, ...] = ()
    share: Annotated[float, Gt(0), Le(1)] = 0.1
    limit: Annotated[int, Ge(1)] | None = None
    test: Annotated[int, Ge(0)] = 128
    draws: Annotated[int, Ge(2)] = 5
    batch_size: Annotated[int, Ge(1)] = 64
    seed: int = 0
    out: str


AnySpec = AuditSpec | AttackSpec | TrainSpec | CertifySpec | DetectSpec | ExplainSpec
Spec = Annotated[AnySpec, Field(discriminator="kind")]


class Remedy(Strict):
    """What was tried where a check found something, and what it did.

    Attributes:
        name: The remedy.
        message: One sentence for people.
        before: Accuracy on the images checked, under the attacks of the audit.
        after: The same, when what the remedy broke counts too.
    """

    name: str
    message: str
    before: Rate
    after: Rate


ACCURACY = "clean accuracy"
"""The check of what a model does without an attack."""


class Check(Strict):
    """One check, before the attacks or after them.

    Attributes:
        name: What was checked.
        status: passed; repaired (the audit went on with a mended model); warned (read the message before the figures);
            failed (the audit stopped, or its figures are surely too high); skipped (it could not be made here).
        message: One sentence for people.
        evidence: The figures behind it.
        reading: How to read it, in one sentence.
        remedy: What was tried where the check found something.
    """

    name: str
    status: Literal["passed", "repaired", "warned", "failed", "skipped"]
    message: str
    evidence: dict[str, float] = Field(default_factory=dict)
    reading: str = ""
    remedy: Remedy | None = None


class NormStats(Strict):
    """Sizes of the smallest perturbations an attack found, over samples that were right at first.

    Medians count samples without a find as infinite; the means are over the finds alone.

    Attributes:
        norm: The norm the attack minimises.
        found: Samples for which a perturbation was found.
        n: Samples attacked.
        median: Median norm in pixel units; None where more than half were not found.
        median_low: Lower end of its 95 % interval.
        median_high: Upper end, None where it is not finite.
        mean: Mean norm over the finds.
        quartiles: 25 % and 75 % quantile over the finds.
        rho2: Mean over the finds of the l2 norm of the perturbation over that of the image.
    """

    norm: Literal["linf", "l2", "l1"]
    found: int
    n: int
    median: float | None
    median_low: float | None
    median_high: float | None
    mean: float | None
    quartiles: tuple[float, float] | None
    rho2: float | None


class Similarity(Strict):
    """How much the adversarial images of an attack look like the originals: the larger, the more.

    Attributes:
        n: Adversarial images: of samples right at first that the attack turned.
        psnr: Median peak signal-to-noise ratio in dB.
        psnr_low: 5 % quantile.
        ssim: Median structural similarity; None for images smaller than its window of 11 pixels.
        ssim_low: 5 % quantile.
    """

    n: int
    psnr: float
    psnr_low: float
    ssim: float | None
    ssim_low: float | None


class AttackResult(Strict):
    """What one attack did to every sample of the audit.

    Attributes:
        label: Unique within the report: the name, numbered where an attack runs twice.
        name: The attack.
        options: All its parameters, defaults included.
        norm: The norm it worked in.
        accuracy: Share of all samples still right under this attack, within the audit's threat.
        success: Share of the samples that were right at first and were broken; None where none was right.
        eight_bit: Share of all samples still right when the adversarial image is rounded to 8 bit.
        norms: Sizes of the perturbations, for attacks that look for the smallest.
        similarity: PSNR and SSIM of the adversarial images; None where there are none.
        survivors: Whether it ran only on samples that every attack before left standing; then `accuracy` is that after
            all of them.
        tried: Samples it was given that were right at first.
        queries: Images sent forward by the attack.
        gradients: Images sent backward by the attack.
        seconds: Wall-clock time.
        singular: Of the images sent backward, those whose gradient held a NaN or an infinity.
        undefined: Samples broken because the model names no class for the adversarial image: its logits are NaN, or
            infinite for several classes.
        undefined_distance: Smallest distance of such an image from its original, in the norm of the audit's threat.
    """

    label: str
    name: str
    options: Options
    norm: Literal["linf", "l2", "l1"]
    accuracy: Rate
    success: Rate | None
    eight_bit: Rate | None = None
    norms: NormStats | None = None
    similarity: Similarity | None = None
    survivors: bool = False
    tried: int | None = None
    queries: int
    gradients: int
    seconds: float
    singular: int = 0
    undefined: int = 0
    undefined_distance: float | None = None


class ClassAccuracy(Strict):
    """Accuracy on the images of one true class.

    Attributes:
        label: Number of the class.
        clean: Share of its images that are right without an attack.
        worst: Share of them that are right under all attacks.
    """

    label: int
    clean: Rate
    worst: Rate


class Pair(Strict):
    """How easily images of one class become another.

    Attributes:
        label: Number of the true class.
        target: Number of the other class.
        turned: Of the images of the true class that are right at first, the share that an attack turned into the other
            class within the threat: the one that aims at it, or any other of the audit.
    """

    label: int
    target: int
    turned: Rate


class Risk(Strict):
    """Mean cost of an image, by a table of what it costs to take one class for another.

    Attributes:
        costs: A row for each true class, a column for each predicted class, in the order of the model's classes.
        clean: Without an attack.
        worst: Where each image costs as much as the dearest class that some attack reached within the threat: a lower
            bound of what an adversary can reach.
        ceiling: Where each image costs as much as the dearest class of its row: no adversary can reach more.
        drawn: What the intervals draw: images, or patients with all their images.
    """

    costs: tuple[tuple[float, ...], ...]
    clean: Mean
    worst: Mean
    ceiling: float
    drawn: Literal["image", "patient"] = "image"


class Curve(Strict):
    """Accuracy against the budget.

    Attributes:
        label: How it was made, for example `pgd, eps sweep`.
        norm: The norm of the budgets.
        eps: Budgets in pixel units, increasing.
        accuracy: Accuracy at each, on the same samples.
    """

    label: str
    norm: Literal["linf", "l2", "l1"]
    eps: tuple[float, ...]
    accuracy: tuple[Rate, ...]


class Bracket(Strict):
    """Between what bounds the accuracy of a smoothed classifier lies under every perturbation within a threat.

    Attributes:
        norm: Norm of the threat.
        eps: Its budget in pixel units.
        radius: The l2 radius that covers it: eps in l2 and l1, eps times the root of the number of pixels in linf.
        lower: Share of all images certified beyond that radius.
        upper: Share of all images that the attack did not surely break.
        contradictions: Images that are certified and yet were broken: about 2 alpha of them are to be expected.
        attack: The attack, on the smoothed classifier in its soft form.
        options: All its parameters.
        draws: Noisy copies of each image in the soft form.
        votes: Draws by which each adversarial image was judged.
        queries: Images the attack sent forward through the soft form, each of which costs `draws` noisy images.
        gradients: The same, backward.
        seconds: Wall-clock time of the attack.
    """

    norm: Literal["linf", "l2", "l1"]
    eps: float
    radius: float
    lower: Rate
    upper: Rate
    contradictions: int
    attack: str
    options: Options
    draws: int
    votes: int
    queries: int
    gradients: int
    seconds: float


class Certificate(Strict):
    """What randomised smoothing certifies, about the smoothed classifier and not about the model inside.

    Attributes:
        sigma: Standard deviation of the noise in pixel units.
        samples: Draws that count.
        selection: Draws that choose the class.
        alpha: Probability with which the certificate of an image may be wrong.
        largest: The largest l2 radius that so many draws can certify.
        right: Share of all images surely given their true class by the smoothed classifier, without an attack.
        abstained: Share of all images for which the votes were too close.
        median_radius: Median over all images of the certified l2 radius, 0 where not right.
        bracket: Certificate and attack side by side, where a threat was given.
    """

    sigma: float
    samples: int
    selection: int
    alpha: float
    largest: float
    right: Rate
    abstained: Rate
    median_radius: float
    bracket: Bracket | None = None


class Example(Strict):
    """One broken sample as three PNG images (base64), with what the model said.

    Attributes:
        index: Number of the sample in its data set.
        attack: Label of the attack that made the adversarial image.
        label: True class.
        predicted: Class given to the original.
        confidence: Softmax probability of that class.
        adversarial: Class given to the adversarial image.
        adversarial_confidence: Softmax probability of that class.
        distance: Size of the perturbation in the audit's norm.
        amplification: Factor by which the perturbation is enlarged for the eye.
    """

    index: int
    attack: str
    label: int
    predicted: int
    confidence: float
    adversarial: int
    adversarial_confidence: float
    distance: float
    amplification: float
    original_png: str
    perturbation_png: str
    adversarial_png: str


class ModelCard(Strict):
    """The audited model.

    Attributes:
        digest: Of weights and defences.
        code: Digest of the user's own source code that the network runs; empty in reports that do not record it.
        answers: Its logits on fixed images; empty where they cannot be replayed, or in reports that do not record them.
        defences: What stands in front of it, with all options, the first nearest to the image.
        notes: What was done to it when it was loaded.
    """

    source: str
    name: str
    digest: str
    parameters: int
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    defences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    code: str = ""
    answers: tuple[float, ...] = ()

    @property
    def identity(self) -> Identity:
        """Which network it is."""
        return Identity(self.digest, self.code, self.answers)


class DataCard(Strict):
    """The data it was audited on.

    Attributes:
        unit: Of the intensities that pixels stand for: HU, `raw` where they have no name, 1 where they are pixels.
        span: The intensities that the ends of the model's box stand for.
        masked: Whether an adversary may change images inside masks only.
    """

    source: str
    split: str
    digest: str
    n: int
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    unit: str = PLAIN
    span: tuple[float, float] = (0.0, 1.0)
    masked: bool = False

    @classmethod
    def of(cls, data: Data) -> "DataCard":
        """The card of the data an audit or a training is measured on."""
        return cls(
            source=data.source,
            split=data.split,
            digest=data.digest,
            n=len(data),
            shape=data.shape,
            classes=data.class_names,
            unit=data.unit,
            span=data.span,
            masked=data.mask is not None,
        )

    def in_units(self, size: float, low: float, high: float) -> str:
        """The size of a perturbation in the box [low, high], in the unit of the data: `10 HU`; empty without a unit."""
        return "" if self.unit == PLAIN else f"{size / (high - low) * (self.span[1] - self.span[0]):.4g} {self.unit}"


class Samples(Strict):
    """Results keyed by sample, as strings of 0 and 1 in the order of `index`.

    Attributes:
        index: Numbers of the samples in their data set.
        labels: True classes.
        clean: 1 where the model is right on the original.
        right: For each attack label, 1 where the model is still right after it (in a cascade: and all before it).
    """

    index: tuple[int, ...]
    labels: tuple[int, ...]
    clean: str
    right: dict[str, str] = Field(default_factory=dict)

    def worst_case(self) -> np.ndarray:
        """True where the sample was right at first and no attack broke it."""
        right = unpack(self.clean)
        for row in self.right.values():
            right &= unpack(row)
        return right


class GroupAccuracy(Strict):
    """Accuracy where the images of a group belong together.

    Attributes:
        whole: Share of the groups of which every image is right.
        mean: Mean over groups of the share of their images that are right; bootstrap over groups.
        pooled: Share of all images that are right; bootstrap over groups.
    """

    whole: Rate
    mean: Mean
    pooled: Mean


class Groups(Strict):
    """Results by patient or by volume.

    Attributes:
        kind: What a group is.
        n: How many there are.
        most: Images of the largest.
        clean: Without an attack.
        worst: Under all attacks.
    """

    kind: Literal["patient", "volume"]
    n: int
    most: int
    clean: GroupAccuracy
    worst: GroupAccuracy


class Epoch(Strict):
    """One epoch of a training run; accuracies and learning rate as at its end.

    Attributes:
        epoch: Counted from 1.
        loss: Mean training loss.
        accuracy: On the validation images; without any, on the training images as they were learnt.
        seconds: Wall-clock time, validation included.
        learning_rate: Of the last step.
        balanced_accuracy: Mean over the classes of the accuracy on their validation images.
        robust_accuracy: On the validation images under a short PGD, where there is something to withstand.
        queries: Images sent forward through the network in training.
        gradients: Images sent backward.
        parts: What else the objective reported: means over the epoch.
    """

    epoch: int
    loss: float
    accuracy: float
    seconds: float
    learning_rate: float
    balanced_accuracy: float | None = None
    robust_accuracy: float | None = None
    queries: int = 0
    gradients: int = 0
    parts: dict[str, float] = Field(default_factory=dict)


class Training(Strict):
    """How a model was trained, and at what cost.

    Attributes:
        recipe: All its keys and options, defaults included.
        objective: The method.
        best_epoch: The epoch whose weights were kept.
        train_images: Images learnt from.
        validation_images: Images the epoch was chosen by.
        queries: Images sent forward through the network, those of validation not counted.
        gradients: Images sent backward; a pass that differentiates a gradient counts like any other.
        seconds: Wall-clock time of all epochs, validation included.
    """

    recipe: dict[str, Any]
    objective: str
    best_epoch: int
    train_images: int
    validation_images: int
    queries: int
    gradients: int
    seconds: float


class Separation(Strict):
    """How well the scores of a detector tell one attack's images from clean ones.

    Attributes:
        attack: The attack, with its threat.
        n: Images of it that broke the model.
        learnt: Whether the detector learnt from this attack.
        auroc: Against clean and noisy images.
        caught: Share of them that is flagged, by the false-positive rate the threshold was set for.
    """

    attack: str
    n: int
    learnt: bool
    auroc: Auroc
    caught: dict[str, Rate]


NONE, ALL, KNOWS = "none", "all of these", "knows the detector"
"""Names of what is held without an attack, under all attacks that do not know the detector, and under who does."""
NO_DETECTOR = "no detector"
"""Name of the model alone beside its detectors."""


class Held(Strict):
    """Share of all test images that model and detector hold together under an attack.

    Held is what the model gets right and the detector accepts, and what the attack either leaves right or turns into
    an image that is flagged.
    """

    attack: str
    held: Rate


class Detection(Strict):
    """What one detector is worth.

    Attributes:
        label: Unique within the report.
        detector: Its name.
        options: All its options.
        learnt: Attacks it learnt from.
        fitted_on: Clean images it was fitted on.
        calibrated_on: Clean images its threshold was set on.
        threshold: From which score on an image is flagged.
        fpr: The false-positive rate it was set for.
        false_alarms: Share of clean test images that is flagged, by the rate aimed at.
        separations: By attack.
        left_out: The same for a detector that learnt from all attacks but the one in question.
        held: With rejection: as it is, under all attacks, under the one that knows the detector if run, and by attack.
        evaded: Of the images that are right and accepted, the share that an attacker who knows the detector turns into
            one that is wrong and accepted; None where he was not run or there are none.
        kinds: What the detector tells apart, if it names attacks.
        confusion: For each attack (rows) how often each kind was named.
        seconds: Wall-clock time.
    """

    label: str
    detector: str
    options: Options
    learnt: tuple[str, ...]
    fitted_on: int
    calibrated_on: int
    threshold: float
    fpr: float
    false_alarms: dict[str, Rate]
    separations: tuple[Separation, ...]
    left_out: tuple[Separation, ...] = ()
    held: tuple[Held, ...]
    evaded: Rate | None = None
    kinds: tuple[str, ...] = ()
    confusion: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    seconds: float


Test = Literal[
    "zero, clean", "zero, attacked", "mean, clean", "mean, attacked", "restored", "planted", "zero, attacked anew"
]
"""What is done to neurons, and on which images: `zero` and `mean` put 0, or their mean over clean images, in their
place; `restored` gives attacked images the neurons of the clean ones, `planted` clean images those of the attacked.
`attacked` images were made for the whole model, those `attacked anew` for what is left of it."""
EVERY = "all layers"
ANEW = "zero, attacked anew"


class Effect(Strict):
    """Accuracy after something was done to some of the neurons of a layer.

    Attributes:
        layer: Its name, or `all layers` at once.
        test: What was done.
        share: Of the neurons of each layer.
        before: Accuracy on the same images when nothing is done.
        sensitive: When it is done to the most sensitive neurons.
        least: To the least sensitive.
        random: To as many at random: mean over draws with Student's interval, cut to [0, 1].
        gap: `sensitive` minus `random`, with a bootstrap interval over images and draws.
    """

    layer: str
    test: Test
    share: float
    before: Rate
    sensitive: Rate
    least: Rate
    random: Mean
    gap: Difference


class Overlap(Strict):
    """Shared members of two sets of most sensitive neurons, over all members.

    Attributes:
        layer: Its name.
        beside: The other attack or the other model.
        jaccard: Shared over all.
        chance: What two sets drawn at random come to.
    """

    layer: str
    beside: str
    jaccard: float
    chance: float


class Layer(Strict):
    """The neurons of a layer: one value for each, in their order.

    Attributes:
        name: Of the module.
        absolute: Sensitivity, in units of the activations: layers and models cannot be compared by it.
        relative: Sensitivity over the size of the activations.
        overall: The same of the layer: changes of all neurons together over their activations together.
        pull: First-order contribution to the adversarial class; empty where it was not measured.
        agreement: Spearman's correlation of `absolute` and |pull|.
        sensitive: Numbers of the most sensitive neurons, by `absolute`, the most sensitive first.
        shared_absolute: Mean sensitivity on the images attacked on the first model; None for that model.
        shared_relative: The same, relative.
    """

    name: str
    absolute: tuple[float, ...]
    relative: tuple[float, ...]
    overall: float
    pull: tuple[float, ...] = ()
    agreement: float | None = None
    sensitive: tuple[int, ...]
    shared_absolute: float | None = None
    shared_relative: float | None = None

    @property
    def mean_absolute(self) -> float:
        """Mean of `absolute` over neurons."""
        return float(np.mean(self.absolute))


class Explained(Strict):
    """What was found of one model.

    Attributes:
        label: Unique within the report.
        model: The model.
        clean: Accuracy.
        attacked: Accuracy under the first attack.
        pairs: Images the sensitivities are means of: those that were right at first.
        tested: Pairs that neurons were masked and replaced on.
        layers: In the order in which they were registered.
        overlaps: With other attacks, and with the first model where layers have the same names and sizes.
        effects: Of masking and replacing.
    """

    label: str
    model: ModelCard
    clean: Rate
    attacked: Rate
    pairs: int
    tested: int
    layers: tuple[Layer, ...]
    overlaps: tuple[Overlap, ...] = ()
    effects: tuple[Effect, ...] = ()

    @property
    def mean_relative(self) -> float:
        """Relative sensitivity: mean over layers."""
        return float(np.mean([layer.overall for layer in self.layers]))


class Trend(Strict):
    """Whether models whose neurons move less hold more, over three models or more.

    Attributes:
        models: How many.
        spearman: Correlation of relative sensitivity (mean over layers; each model on its own images) and accuracy
            under attack; None where one of them does not vary.
        chance: Share of the orders of the models in which it is as far from 0.
        shared: The correlation on the images attacked on the first model, of all models but that one; None where these
            are fewer than three too.
        shared_chance: As `chance`.
    """

    models: int
    spearman: float | None
    chance: float | None = None
    shared: float | None = None
    shared_chance: float | None = None


class Maps(Strict):
    """One neuron on one image, as grey PNG images (base64); black is `low`, white is `high`.

    Attributes:
        layer: Its layer.
        neuron: Its number.
        low: Smallest value of both maps.
        high: Largest value of both maps.
        reach: Largest |difference|: the white of the third image, -reach being black.
        clean_png: On the original image.
        adversarial_png: On the attacked image.
        difference_png: Attacked minus original.
    """

    layer: str
    neuron: int
    low: float
    high: float
    reach: float
    clean_png: str
    adversarial_png: str
    difference_png: str


class Illustration(Strict):
    """One image, clean and attacked, seen from inside the first model.

    Attributes:
        index: Number of the image in its data set; None for a file.
        label: True class.
        predicted: Class given to the original.
        adversarial: Class given to the attacked image.
        original_png: The image.
        adversarial_png: The attacked image.
        perturbation_png: The difference, enlarged; grey is none.
        saliency_png: |gradient of the margin| in the pixels of the original; white is the largest.
        adversarial_saliency_png: The same in those of the attacked image.
        maps: Of the most sensitive neurons.
        reach: How far the landscape reaches along its two directions, in pixel units.
        landscape: Margin (true logit minus the best other) around the image: rows along the sign of the gradient of the
            loss, columns along a random direction of signs; both axes run from -reach to reach.
    """

    index: int | None
    label: int
    predicted: int
    adversarial: int
    original_png: str
    adversarial_png: str
    perturbation_png: str
    saliency_png: str
    adversarial_saliency_png: str
    maps: tuple[Maps, ...]
    reach: float
    landscape: tuple[tuple[float, ...], ...]


class Report(Strict):
    """The result of an audit, an attack, a training run or a certification.

    Attributes:
        kind: Which.
        complete: False where the work was interrupted; every figure in it still stands.
        spec: The request; running it again gives the same figures.
        not_run: What was asked for and not finished.
        seconds: Wall-clock time.
        notes: Sentences a reader must see before the figures.
        checks: What was checked after the attacks.
        stamp: What those checks come to.
        clean: Share of all samples that the model gets right without an attack.
        worst_case: Share of all samples that it keeps right under all attacks; where detectors are judged, that of the
            model without one, under the attacks within the threat.
        groups: The same by patient and by volume, where they are known.
        classes: Both for each true class of which there are samples.
        pairs: Which class becomes which, for the pairs that were tried.
        risk: What that costs.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["audit", "attack", "train", "certify", "detect", "explain"]
    complete: bool
    spec: Spec
    created: str
    seconds: float
    environment: dict[str, str]
    model: ModelCard
    data: DataCard
    notes: tuple[str, ...] = ()
    preflight: tuple[Check, ...] = ()
    checks: tuple[Check, ...] = ()
    stamp: Literal["valid", "suspicious", "invalid"] | None = None
    clean: Rate | None = None
    attacks: tuple[AttackResult, ...] = ()
    worst_case: Rate | None = None
    classes: tuple[ClassAccuracy, ...] = ()
    pairs: tuple[Pair, ...] = ()
    risk: Risk | None = None
    certificate: Certificate | None = None
    not_run: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()
    examples: tuple[Example, ...] = ()
    samples: Samples | None = None
    groups: tuple[Groups, ...] = ()
    epochs: tuple[Epoch, ...] = ()
    training: Training | None = None
    detection: tuple[Detection, ...] = ()
    explained: tuple[Explained, ...] = ()
    trend: Trend | None = None
    illustration: Illustration | None = None

    @property
    def fired(self) -> tuple[str, ...]:
        """Names of the checks, before the attacks and after them, that warned or failed."""
        return tuple(check.name for check in (*self.preflight, *self.checks) if check.status in ("warned", "failed"))

    @property
    def title(self) -> str:
        """A short name for headings and legends."""
        if self.kind == "train":
            return f"{self.model.name}, trained on {self.data.source.partition(':')[0]}"
        if len(self.explained) > 1:
            others = len(self.explained) - 1
            return f"{self.model.name} and {others} other{'s' * (others > 1)} on {self.data.source}"
        return f"{self.model.name}{self.behind} on {self.data.source}"

    @property
    def behind(self) -> str:
        """What stands in front of the model, by name: ` behind jpeg and median`; empty where nothing does."""
        names = " and ".join(name.partition(":")[0] for name in self.model.defences)
        return f" behind {names}" if names else ""


def fault(error: ValidationError) -> str:
    """The first thing that is wrong with what was read, and where."""
    first = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))


def pack(flags: Any) -> str:
    """Booleans as a string of 0 and 1."""
    return "".join("1" if flag else "0" for flag in np.asarray(flags, dtype=bool))


def unpack(text: str) -> np.ndarray:
    """The booleans of `pack`."""
    return np.frombuffer(text.encode(), dtype=np.uint8) == ord("1")


def same_samples(reports: Mapping[str, Report]) -> Samples:
    """Check that reports can be compared pair by pair, and return the first one's samples.

    Raises:
        DataError: If a report has no samples, or they are not the same ones.
    """
    first: Samples | None = None
    digest = ""
    for name, report in reports.items():
        if report.samples is None:
            raise DataError(
                "reports with results per sample", got=f"{name}, a {report.kind} report without", hint="compare audits"
            )
        if first is None:
            first, digest = report.samples, report.data.digest
        elif report.samples.index != first.index or report.data.digest != digest:
            raise DataError(
                "reports on the same samples",
                got=f"{name} on {report.data.n} samples of {report.data.source}",
                hint="audit both models with the same --data and --limit",
            )
    assert first is not None
    return first
