"""The report in words: the verdict, what limits it, and tables for a terminal."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from rempart.core.stats import Difference, Mean, Rate
from rempart.core.threat import Threat
from rempart.report.compare import CLEAN, WORST, Comparison
from rempart.report.methods import Group, Methods
from rempart.report.schema import (
    ACCURACY,
    ALL,
    ANEW,
    EVERY,
    KNOWS,
    NO_DETECTOR,
    NONE,
    AnySpec,
    AttackSpec,
    Bracket,
    Certificate,
    DataCard,
    Detection,
    Effect,
    Explained,
    ExplainSpec,
    Groups,
    Held,
    Report,
    Training,
    TrainSpec,
    Trend,
)

WIDTH = 100
LAST_EPOCHS = 12
MOST_CLASSES, MOST_COLUMNS = 20, 6
"""Rows of a table by class, the worst ones, and columns of a matrix of classes, in a terminal."""
_FEW = 3
ENOUGH_PAIRS = 10
"""Of fewer images no sentence is drawn from a test of neurons."""
ENOUGH_MODELS = 5
"""Of fewer models even a perfect order happens by chance in more than one case of twenty."""


NOT_KNOWN = "[not known]"
"""In place of an interval over one run, one patient or one volume."""


def table(report: Report) -> str:
    """The report as plain text for a terminal, at most 100 columns wide."""
    behind = [f"behind {', then '.join(report.model.defences)}"] if report.model.defences else []
    lines = [report.title, *behind, stamp(report), verdict(report), *notes(report)]
    for check in (*report.preflight, *report.checks):
        if check.status in ("warned", "failed", "repaired"):
            tried = f" {check.remedy.message}" if check.remedy else ""
            lines.append(f"{check.status} {check.name}: {check.message}{tried}")
    blocks = ["\n".join(_wrap(line) for line in lines)]
    if report.certificate is not None:
        blocks.append(_grid(*_certified(report, report.certificate)))
    elif report.kind == "detect":
        blocks += [_grid(*_held(report)), _grid(*_separated(report), left=2)]
    elif report.kind == "explain":
        for model in report.explained:
            blocks += _explained_tables(model)
        if report.trend is not None:
            blocks.append(_wrap(trend_of(report.trend)))
    elif report.kind != "train" and (report.clean is not None or report.attacks):
        blocks.append(_grid(*_results(report)))
        if report.classes:
            blocks.append(_grid(*_classes(report)))
        if report.pairs:
            blocks += ["turned into (share of the images of a row that were right at first)\n" + _grid(*_pairs(report))]
        if report.risk is not None:
            blocks.append(_grid(("mean cost of an image", "value", "interval"), list(risk_facts(report))))
        if any(attack.survivors for attack in report.attacks[1:]):
            blocks.append(_wrap("> ran only on the images left standing; its accuracy is that after all before it too"))
        if any(attack.similarity for attack in report.attacks):
            blocks.append(_grid(*_similar(report)))
        blocks += [_grid(*_grouped(groups)) for groups in report.groups]
    if report.training is not None and isinstance(report.spec, TrainSpec):
        told = training_facts(report.training, report.spec)
        blocks.append("\n".join(_wrap(f"{name}: {value}") for name, value in told))
    if report.epochs:
        blocks.append(_grid(*_epochs(report)))
    return "\n\n".join(blocks) + "\n"


def compare_table(comparison: Comparison) -> str:
    """A comparison as plain text for a terminal, at most 100 columns wide."""
    level = f"{100 * comparison.confidence:g}% interval"
    first = comparison.entries[0].name
    rows: list[Sequence[str]] = []
    for measure in comparison.measures:
        for entry in comparison.entries:
            rate = entry.accuracy.get(measure)
            gap = comparison.contrast(entry.name, measure)
            accuracy = ("-", "") if rate is None else (f"{rate.value:.1%}", interval(rate))
            difference = ("", "") if gap is None else (points(gap.value), interval(gap))
            rows.append((measure, entry.name, *accuracy, *difference))
    header = ("accuracy", "model", "share", level, "to first", level)
    lines = [
        f"{comparison.n} samples; differences in percentage points to {first}, paired by sample",
        *comparison.notes,
    ]
    return "\n".join(_wrap(line) for line in lines) + "\n\n" + _grid(header, rows, left=2) + "\n"


def methods_table(methods: Methods) -> str:
    """Training runs side by side as plain text for a terminal, at most 100 columns wide."""
    level, first = f"{100 * methods.confidence:g}% interval", methods.rows[0].name
    lines = [
        f"{count(methods.n, 'test image')}; suite {methods.suite} at {budget_of(methods)}; differences to {first}, "
        "paired by image",
        *methods.notes,
    ]
    rows: list[Sequence[str]] = []
    for measure in (CLEAN, WORST):
        for row in methods.rows:
            rate, gap = row.clean if measure == CLEAN else row.worst, row.to_first.get(measure)
            difference = ("", "") if gap is None else (points(gap.value), interval(gap))
            rows.append((measure, row.name, f"{rate.value:.1%}", interval(rate), *difference))
    for row in methods.rows:
        size, gap = row.rho2, row.rho2_to_first
        told = ("-", "") if size is None else (f"{size.value:.3g}", span(size))
        rows.append(("rho_2", row.name, *told, *(("", "") if gap is None else (f"{gap.value:+.3g}", span(gap, "+")))))
    blocks = [_grid(("measure", "run", "value", level, "to first", level), rows, left=2)]
    header = ("run", "method", "seed", "gradients", "queries", "seconds", "found", "checks")
    costs = [
        (
            row.name,
            f"{row.method}, {row.model}",
            str(row.seed),
            *(
                ("-", "-", "-")
                if row.cost is None
                else (f"{row.cost.gradients:,}", f"{row.cost.queries:,}", f"{row.cost.seconds:.4g}")
            ),
            f"{row.found}/{row.attacked}",
            row.checked,
        )
        for row in methods.rows
    ]
    blocks.append(_grid(header, costs, left=2))
    if methods.groups:
        header = ("method", "runs", "clean", level, "worst case", level, "rho_2")
        blocks.append(_grid(header, [_group(group) for group in methods.groups]))
    blocks.insert(0, "\n".join(_wrap(line) for line in lines))
    return "\n\n".join(blocks) + "\n"


def budget_of(methods: Methods) -> str:
    """What the models were audited against: `linf 8/255 (0.0314)`."""
    threat = Threat.parse(methods.threat)
    return f"{threat.norm} {amount(threat)}"


def span(mean: Mean, sign: str = "") -> str:
    """The interval of a mean in its own unit: `[0.0121, 0.0125]`."""
    if mean.n == 1:
        return NOT_KNOWN
    return f"[{mean.low:{sign}.3g}, {mean.high:{sign}.3g}]"


def _group(group: Group) -> Sequence[str]:
    shares = [part for mean in (group.clean, group.worst) for part in (f"{mean.value:.1%}", interval(mean))]
    return f"{group.method}, {group.model}", str(group.runs), *shares, f"{group.rho2.value:.3g}" if group.rho2 else "-"


def stamp(report: Report) -> str:
    """Complete, with what the checks came to and which fired; or partial and what is missing."""
    if report.complete:
        fired = f": {', '.join(report.fired)}" if report.stamp != "valid" else ""
        return f"complete, {report.stamp}{fired}" if report.stamp else "complete"
    missing = f", not run: {', '.join(report.not_run)}" if report.not_run else ""
    again = "; the same command with --resume goes on" if report.kind == "train" else ""
    return f"partial: interrupted{missing}{again}"


def verdict(report: Report) -> str:
    """What was found, in a few plain sentences; never that a model is safe."""
    return _alone(report) + _found(report)


def _alone(report: Report) -> str:
    """What a report on one image says before its shares; nothing where there are more."""
    if report.kind in ("train", "detect") or report.clean is None or report.clean.n != 1:
        return ""
    plain = "One image is no statistics: shares and intervals below say nothing of other images. "
    if report.kind == "certify" or not (report.attacks or report.explained):
        return plain
    if report.clean.k == 0:
        return f"The model was wrong on the one image from the start, so that no attack had anything to do. {plain}"
    if report.explained:
        broken = report.explained[0].attacked.k == 0
    elif report.kind == "attack":
        broken = (rate := report.attacks[0].success) is not None and rate.k == 1
    else:
        broken = report.worst_case is not None and report.worst_case.k == 0
    return f"The attack {'succeeded' if broken else 'did not succeed'} on the one image. {plain}"


def _found(report: Report) -> str:
    if report.kind == "train":
        return _trained(report)
    if report.kind == "certify":
        return _smoothed(report)
    if report.kind == "detect":
        return _detected(report)
    if report.kind == "explain":
        return _explained(report)
    failed = [check for check in report.preflight if check.status == "failed"]
    if failed and not report.attacks:
        return f"The audit stopped before any attack: {failed[0].message}"
    if not report.attacks:
        clean = f" Without an attack, {share(report.clean)} are rightly classified." if report.clean else ""
        return f"No attack was finished.{clean} Nothing is known about adversarial examples."
    if report.kind == "attack":
        return _attacked(report)
    if report.worst_case is None:
        return "No worst case was computed. Read the table of attacks."
    worst, limit = report.worst_case, where(report)
    if report.stamp == "invalid":
        return (
            f"{limit[:1].upper()}{limit[1:]}, the attacks and checks left {share(worst)} rightly classified, and the "
            "checks show that the attacks failed: the true figure is lower. Read the checks before any other figure."
        )
    checked = any(attack.label == "checks" and attack.success and attack.success.k for attack in report.attacks)
    ran = "the attacks and checks run here" if checked else "the attacks run here"
    ran = ran if report.complete else "the attacks finished so far"
    doubts = {check.name: check.message for check in (*report.preflight, *report.checks) if check.status == "warned"}
    unknown = doubts.pop(ACCURACY, None)
    return (
        f"{limit[:1].upper()}{limit[1:]}, {ran} left {share(worst)} rightly classified. "
        "This is an upper bound: a stronger attack can only lower it."
        + (f" {unknown}" if unknown else "")
        + (" Some checks say that the attacks may have failed." if report.stamp == "suspicious" and doubts else "")
    )


def notes(report: Report) -> tuple[str, ...]:
    """The notes that do not stand among the checks already, and what attacks met that is not a number."""
    told = {check.message for check in (*report.preflight, *report.checks)}
    return (
        *(note for note in (*report.model.notes, *report.notes) if note not in told),
        *_without_answer(report),
        *_without_slope(report),
    )


def _without_answer(report: Report) -> Iterator[str]:
    found = [attack for attack in report.attacks if attack.undefined]
    if not found:
        return
    nearest = min(attack.undefined_distance or 0.0 for attack in found)
    threat = threat_of(report)
    yield (
        "The model gives no defined answer for some adversarial images within the threat: its logits are NaN or "
        f"infinite. Images: {', '.join(f'{attack.undefined:,} by {attack.label}' for attack in found)}; smallest "
        f"distance {'' if threat is None else f'{threat.norm} '}{nearest:.3g}. They count as broken. The answers for "
        "the original images are defined."
    )


def _without_slope(report: Report) -> Iterator[str]:
    found = [attack for attack in report.attacks if attack.singular]
    if found:
        parts = ", ".join(f"{attack.label} {attack.singular:,} of {attack.gradients:,}" for attack in found)
        yield (
            f"Some gradients held NaN or infinity (images x steps: {parts}). The attacks went on in a finite direction "
            "there, which may not be the best one: look for a square root, a logarithm or a division in the model."
        )


def limits(report: Report) -> Iterator[str]:
    """What was not tried, and what the figures do not say, one sentence each."""
    if report.not_run:
        yield f"Asked for and not run: {', '.join(report.not_run)}."
    if report.kind == "certify":
        yield from _limits_of_certificate(report)
        return
    if report.kind == "detect":
        yield from _limits_of_detection(report)
        return
    if report.kind == "explain":
        yield from _limits_of_explanation(report)
        return
    threat = threat_of(report)
    if threat is None:
        yield "Accuracies measured during training are no audit: the attack of a recipe is weak."
        return
    size = "of any size" if threat.eps is None else f"up to {amount(threat, report.data)}"
    yield (
        f"The adversary may add {threat.norm} perturbations {size}. Other norms, patches, rotations, blur, noise and "
        "changes of contrast were not tried."
    )
    if report.data.masked:
        yield "Pixels outside the masks were left as they are. An adversary who may change them too finds more."
    if any("steps" in attack.options for attack in report.attacks):
        most = {key: max(int(a.options.get(key) or 1) for a in report.attacks) for key in ("steps", "restarts")}
        yield (
            f"No attack took more than {count(most['steps'], 'step')} and {count(most['restarts'], 'restart')}; "
            "longer ones may find more."
        )
        if all(attack.gradients for attack in report.attacks):
            yield "Every attack followed gradients. A model that hides its gradients looks better here than it is."
    yield (
        "No attack was fitted to a defence. Where the model has one (cleaning of the input, randomness, a detector), "
        "an attack that knows it has to be run."
    )
    yield from _limits_of_classes(report)
    yield "No certificate was computed: nothing here bounds the accuracy under attack from below."
    yield from _without_likeness(report)
    if report.attacks and all(attack.eight_bit is None for attack in report.attacks):
        yield "Adversarial images were judged with exact pixels; rounded to an 8-bit file, some may fail."
    if report.clean is not None:
        yield (
            f"The intervals tell the chance in drawing {count(report.clean.n, 'image')} from this source. They say "
            "nothing about images from another source, device or site."
        )
        if report.groups:
            kind = report.groups[0].kind
            yield (
                f"Images of one {kind} hang together: intervals over images are too narrow. Those by {kind} are not, "
                "where there are enough of them, say 20."
            )
        for groups in report.groups:
            if groups.n == 1:
                yield (
                    f"All images are of one {groups.kind}: intervals over {groups.kind}s are not known, because one "
                    "alone does not tell how far others differ."
                )


def _without_likeness(report: Report) -> Iterator[str]:
    """Why there is no PSNR or SSIM, where there is none."""
    looks = [attack.similarity for attack in report.attacks if attack.similarity is not None]
    broken = [attack.success.k for attack in report.attacks if attack.success is not None]
    if not looks and broken and not any(broken):
        yield "There is no PSNR or SSIM: no attack turned an image that was right at first."
    elif looks and all(one.ssim is None for one in looks):
        yield "There is no SSIM: its window of 11 pixels is larger than the images."


def risk_facts(report: Report) -> Iterator[tuple[str, str, str]]:
    """What mistakes cost on average, as names, values and intervals."""
    risk = report.risk
    if risk is None:
        return
    told = [("without an attack", risk.clean), ("under attack: at least", risk.worst)]
    for name, mean in told:
        yield name, f"{mean.value:.4g}", span(mean)
    yield "if every mistake could be forced", f"{risk.ceiling:.4g}", ""


def _limits_of_classes(report: Report) -> Iterator[str]:
    if report.pairs:
        missing = len(report.model.classes) * (len(report.model.classes) - 1) - len(report.pairs)
        yield (
            "A share of images turned from one class into another is a lower bound: a stronger attack can only raise "
            "it." + (f" {count(missing, 'pair')} of classes had no attack of their own." if missing else "")
        )
    if report.risk is not None:
        aimed = "" if report.pairs else " No attack aimed at a class: with --pairs all, the cost may rise."
        yield (
            "The mean cost under attack counts, for each image, the dearest class that some attack reached: a lower "
            "bound. Images that were wrong at first were not attacked and count with the class they were given."
            f"{aimed} Its intervals draw {report.risk.drawn}s anew."
        )


def training_facts(training: Training, spec: TrainSpec) -> Iterator[tuple[str, str]]:
    """How a model was trained and at what cost, as names and values."""
    settings = {key: value for key, value in training.recipe.items() if key not in ("summary", "objective", "options")}
    options = options_of(training.recipe.get("options", {}))
    if spec.start is not None:
        yield "began with", spec.start
    yield "objective", f"{training.objective} ({options})" if options else training.objective
    told = options_of({key: value for key, value in settings.items() if value is not None})
    yield "recipe", f"{spec.recipe}: {told}"
    yield "kept", f"the weights of epoch {training.best_epoch}"
    yield "images", f"{training.train_images:,} to learn from, {training.validation_images:,} to choose the epoch by"
    sent = f"{training.gradients:,} images sent backward, {training.queries:,} forward"
    yield "cost", f"{sent}, in {training.seconds:.4g} seconds; validation sends others, which are not counted"


def options_of(options: Mapping[str, object]) -> str:
    """`beta=6, steps=10`."""
    told = {key: f"{value:g}" if isinstance(value, float) else str(value).lower() for key, value in options.items()}
    return ", ".join(f"{key}={value}" for key, value in told.items())


def judged_on(report: Report) -> str:
    """What the accuracies of the epochs were measured on: `validation`, `training` or `test` images."""
    if report.training is None:  # a report of an earlier version
        return "test"
    return "validation" if report.training.validation_images else "training"


def threat_of(report: Report) -> Threat | None:
    """The threat of an audit, an attack or a certification; None where there is none."""
    if isinstance(report.spec, TrainSpec) or report.spec.threat is None:
        return None
    model, data = report.model, report.data
    return Threat.parse(report.spec.threat, low=model.low, high=model.high, unit=data.unit, span=data.span)


def where(report: Report) -> str:
    """The threat as the place of a sentence: `at linf 8/255 (0.0314)`."""
    threat = threat_of(report)
    if threat is None:
        return ""
    if threat.eps is None:
        return f"with {threat.norm} perturbations of any size"
    return f"at {threat.norm} {amount(threat, report.data)}"


def amount(threat: Threat, data: DataCard | None = None) -> str:
    """The budget in pixel units, for linf in the box [0, 1] as levels of 255 too; first in the unit of the data."""
    if threat.eps is None:
        return "any size"
    if data is not None and (told := data.in_units(threat.eps, threat.low, threat.high)):
        return f"{told} ({threat.eps:.3g} of the box [{threat.low:g}, {threat.high:g}])"
    levels = threat.eps * 255
    plain = f"{threat.eps:.3g}"
    if in_levels(threat.norm, threat.low, threat.high) and levels and abs(levels - round(levels)) < 1e-6:
        return f"{levels:.0f}/255 ({plain})"
    return plain if (threat.low, threat.high) == (0, 1) else f"{plain} in the box [{threat.low:g}, {threat.high:g}]"


def in_levels(norm: str, low: float, high: float) -> bool:
    """Whether a budget can be told in levels of an 8-bit image."""
    return norm == "linf" and (low, high) == (0, 1)


def share(rate: Rate) -> str:
    """`46.2% [42.1, 50.3] of 500 images`."""
    return f"{rate.value:.1%} {interval(rate)} of {count(rate.n, 'image')}"


def interval(rate: Rate | Difference | Mean) -> str:
    """`[42.1, 50.3]`, in percent (of a difference: percentage points); of a mean over one alone, none is known."""
    if isinstance(rate, Mean) and rate.n == 1:
        return NOT_KNOWN
    sign = "+" if isinstance(rate, Difference) else ""
    return f"[{100 * rate.low:{sign}.1f}, {100 * rate.high:{sign}.1f}]"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def count(number: int, noun: str) -> str:
    """`1 image`, `500 images`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _trained(report: Report) -> str:
    if not report.epochs:
        return "No epoch was finished."
    training, kept = report.training, report.epochs[-1]
    state = "" if report.complete else "Training was interrupted. "
    if training is not None:
        kept = next((epoch for epoch in report.epochs if epoch.epoch == training.best_epoch), kept)
    under = "" if kept.robust_accuracy is None else f" and {kept.robust_accuracy:.1%} under a short attack"
    if training is None:
        return f"{state}After {count(kept.epoch, 'epoch')}, the accuracy is {kept.accuracy:.1%}{under}."
    test = "" if report.clean is None else f" On the test images, {share(report.clean)} are rightly classified."
    return (
        f"{state}The weights of epoch {kept.epoch} of {len(report.epochs)} were kept: {kept.accuracy:.1%} of the "
        f"{judged_on(report)} images are rightly classified{under}.{test} How it withstands attacks is for an audit "
        "to say."
    )


def _detected(report: Report) -> str:
    if not report.detection:
        return "No detector was judged before the interruption."
    blind = max(report.detection, key=lambda d: _blind(d).held.value)
    told = (
        f"{where(report)[:1].upper()}{where(report)[1:]}, under attacks that do not know the detector, the model with "
        f"{blind.label} holds {share(_blind(blind).held)}: right and accepted as they are, and right or flagged after "
        "the attack."
    )
    alone = report.worst_case
    knowing = [d for d in report.detection if _knowing(d) is not None]
    if not knowing:
        kept = "" if alone is None else f" The model alone keeps {alone.value:.1%} under the same attacks."
        return f"{told}{kept} No attacker who knows the detector was tried: this says little about its worth."
    best = max(knowing, key=lambda d: _knowing(d).held.value)  # pyright: ignore[reportOptionalMemberAccess]
    held = _knowing(best)
    assert held is not None
    told += f" Under an attacker who knows it, the best, {best.label}, holds {share(held.held)}, an upper bound"
    if alone is None:  # a report of an earlier version
        return f"{told}."
    nothing = ": no detector adds anything" if held.held.value <= alone.value else ""
    return f"{told}; the model alone keeps {alone.value:.1%}{nothing}."


def _blind(detection: Detection) -> Held:
    """Under all attacks that do not know the detector."""
    return next(held for held in detection.held if held.attack == ALL)


def _knowing(detection: Detection) -> Held | None:
    return next((held for held in detection.held if held.attack == KNOWS), None)


def _held(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    """What model and detector hold together, and the model alone."""
    rows: list[Sequence[str]] = []
    if report.clean is not None and report.worst_case is not None:
        clean, kept = (f"{rate.value:.1%} {interval(rate)}" for rate in (report.clean, report.worst_case))
        rows.append((NO_DETECTOR, clean, "", kept, ""))
    for detection in report.detection:
        alarm = detection.false_alarms.get(f"{detection.fpr:g}")
        knowing = _knowing(detection)
        rows.append(
            (
                detection.label,
                *(
                    "-" if rate is None else f"{rate.value:.1%} {interval(rate)}"
                    for rate in (detection.held[0].held, knowing and knowing.held, _blind(detection).held, alarm)
                ),
            )
        )
    return ("detector", NONE, KNOWS, ALL, "false alarms"), rows


def _separated(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    rows: list[Sequence[str]] = []
    for detection in report.detection:
        for row in detection.separations:
            caught = [row.caught.get(rate) for rate in ("0.01", "0.05")]
            rows.append(
                (
                    detection.label,
                    row.attack + (" (learnt)" if row.learnt else ""),
                    str(row.n),
                    f"{row.auroc.value:.3f} [{row.auroc.low:.3f}, {row.auroc.high:.3f}]",
                    *("-" if rate is None else f"{rate.value:.1%} {interval(rate)}" for rate in caught),
                )
            )
    return ("detector", "attack", "n", "area under curve", "caught at 1%", "caught at 5%"), rows


def _limits_of_detection(report: Report) -> Iterator[str]:
    if report.not_run:
        yield f"Asked for and not run: {', '.join(report.not_run)}."
    yield (
        "Areas and shares caught are about images of the attacks named, which do not know the detector. They are no "
        "measure of safety: an attacker who knows the detector is another matter, and stands in its own column."
    )
    yield (
        "That attacker is one program with a limited number of steps; a stronger one can only hold less. It works "
        "within the threat; attacks for the smallest perturbation do not, and their images may be larger."
    )
    yield (
        "Thresholds hold for images from the source they were set on, if the model was trained on none of these. On "
        "images from another source, device or site false alarms may be many more than asked for."
    )
    yield "Images that the model gets wrong without an attack count as not held, whether they are flagged or not."


def decisive(model: Explained) -> Effect | None:
    """The test of the claim that sensitive neurons carry the wrong prediction: clean values put back in all layers.

    None where that was not done, or not yet.
    """
    names = [layer.name for layer in model.layers]
    whole = EVERY if len(names) > 1 else names[0]
    return next((e for e in model.effects if (e.layer, e.test) == (whole, "restored")), None)


def trend_of(trend: Trend) -> str:
    """The trend over models in a sentence, with what chance would do."""
    if trend.spearman is None:
        return f"Over the {trend.models} models, sensitivity or accuracy under attack does not vary: there is no trend."
    told = (
        f"Over the {trend.models} models, Spearman's correlation of relative sensitivity and accuracy under attack is "
        f"{trend.spearman:+.2f}{_by_chance(trend.chance)}."
    )
    if trend.shared is None:
        return told
    return (
        f"{told} On the images attacked on the first, without it, it is {trend.shared:+.2f}"
        f"{_by_chance(trend.shared_chance)}."
    )


def _by_chance(share: float | None) -> str:
    return "" if share is None else f", and as far from 0 in {share:.2g} of all orders of the models"


def _explained(report: Report) -> str:
    if not report.explained:
        return "No model was explained before the interruption."
    first, *others = report.explained
    place = where(report)
    told = (
        f"{place[:1].upper()}{place[1:]}, {first_attack(report)} left {share(first.attacked)} rightly classified by "
        f"{first.label} and moved its neurons by {first.mean_relative:.3g} of the size of their activations (relative "
        "sensitivity, mean over layers)."
    )
    effect = decisive(first)
    if effect is None:
        told += " No neurons were masked or replaced in all layers."
    else:
        layer = effect.layer if effect.layer == EVERY else f"the layer {effect.layer}"
        told += (
            f" With the clean values of the most sensitive {100 * effect.share:.3g}% of the neurons of {layer} put "
            f"back, {effect.sensitive.value:.1%} of {count(effect.sensitive.n, 'attacked image')} are right; of as "
            f"many at random, {effect.random.value:.1%}: {points(effect.gap.value)} points {interval(effect.gap)}. "
            f"{_read(effect)}"
        )
    told += "".join(_anew(effect, report.spec) for effect in first.effects if effect.test == ANEW)
    beside = [
        f"{model.label}: {model.attacked.value:.1%} left, moved by {model.mean_relative:.3g}"
        + (f", {points(found.gap.value)} points {interval(found.gap)}" if (found := decisive(model)) else "")
        for model in others
    ]
    return f"{told} For others: {'; '.join(beside[:_FEW])}{'; ...' * (len(beside) > _FEW)}." if beside else told


def _anew(effect: Effect, spec: AnySpec | None) -> str:
    """What attacks leave of a model whose sensitive neurons are gone."""
    assert isinstance(spec, ExplainSpec)
    return (
        f" Without them, the suite {spec.suite} leaves {effect.sensitive.value:.1%} of "
        f"{count(effect.sensitive.n, 'image')} right; without as many at random {effect.random.value:.1%} "
        f"({points(effect.gap.value)} points {interval(effect.gap)}), of the whole model {effect.before.value:.1%}."
    )


def _read(effect: Effect) -> str:
    if effect.gap.n < ENOUGH_PAIRS:
        return f"Fewer than {ENOUGH_PAIRS} images show nothing either way."
    if effect.gap.low > 0:
        return "Here the sensitive neurons carry more of the wrong prediction than random ones."
    if effect.gap.high < 0:
        return "Here the sensitive neurons carry less of the wrong prediction than random ones."
    return "That does not show that sensitive neurons carry more of the wrong prediction than random ones."


def first_attack(report: Report) -> str:
    """The attack that made the pairs."""
    assert isinstance(report.spec, ExplainSpec)
    choice = report.spec.attacks[0]
    return f"{choice.name} ({options_of(choice.options)})" if choice.options else choice.name


def _limits_of_explanation(report: Report) -> Iterator[str]:
    yield (
        "A lower sensitivity is no evidence of anything where activations shrank. Absolute sensitivities cannot be "
        "compared between layers or models; relative ones can, but accuracy under attack does not follow from them."
    )
    yield f"All pairs were made by {first_attack(report)} {where(report)}; a stronger attack may move other neurons."
    tested = {model.tested for model in report.explained if model.effects}
    if tested:
        images = count(min(tested), "image") if len(tested) == 1 else f"{min(tested)} to {count(max(tested), 'image')}"
        yield (
            f"The tests are on {images} per model, other ones than the neurons were chosen by. Intervals of so many "
            "are wide, and none is corrected for the number of tests: of twenty, one may leave zero out by chance."
        )
        yield (
            "Neurons that never move are left out, of the random ones and the least sensitive too. The set that counts "
            "as sensitive in tables and figures is that of all pairs, the set tested that of the half that chooses. "
            "Attacked anew, the whole model has the advantage that all images tested are ones it gets right."
        )
        yield (
            "Masking shows the network activations it never saw: what counts is the difference to as many neurons at "
            "random, not the loss as such."
        )
    if len(report.explained) > 1:
        yield f"Shared images were made to fool {report.explained[0].label}; they need not fool the others."
        few = len(report.explained)
        if few < ENOUGH_MODELS:
            yield (
                f"Correlation over models with fewer than {ENOUGH_MODELS} models says nothing, and these are {few}. "
                "Models that differ in training differ in more than sensitivity."
            )
        else:
            yield "Models that differ in training differ in more than sensitivity: a correlation names no cause."
    if any(check.name.startswith("determinism") and check.status == "warned" for check in report.preflight):
        yield (
            "A model draws random numbers: what its draws move counts as movement too, and each image is judged by one "
            "pass."
        )
    if isinstance(report.spec, ExplainSpec) and report.spec.image is not None and report.spec.label is None:
        yield "The true class of the image file was not given: it counts as what the first model takes it for."
    if report.illustration is not None:
        yield (
            "The pictures show one image, of the data one that the attack broke where there is any. Saliency is the "
            "slope at one point, and no reason for a prediction."
        )
    if report.clean is not None:
        yield (
            f"The intervals tell the chance in drawing {count(report.clean.n, 'image')} from this source. They say "
            "nothing about images from another source, device or site."
        )


def _explained_tables(model: Explained) -> Iterator[str]:
    yield "\n".join(
        _wrap(line)
        for line in (
            f"{model.label}: {model.clean.value:.1%} right, {model.attacked.value:.1%} under attack",
            f"sensitivities: means over {count(model.pairs, 'pair')}; neurons masked and replaced on {model.tested} of "
            "these, chosen by others",
        )
    )
    lent = any(layer.shared_relative is not None for layer in model.layers)
    header = ["layer", "neurons", "absolute", "relative", *["shared abs.", "shared rel."] * lent, "agreement"]
    rows = [
        [
            layer.name,
            str(len(layer.absolute)),
            f"{layer.mean_absolute:.3g}",
            f"{layer.overall:.3g}",
            *[_optional(layer.shared_absolute, ".3g"), _optional(layer.shared_relative, ".3g")] * lent,
            _optional(layer.agreement, "+.2f"),
        ]
        for layer in model.layers
    ]
    yield _grid(header, rows)
    if model.effects:
        header = ("layer", "test", "before", "most sensitive", "random", "least", "most - random")
        yield _grid(header, [_effect(effect) for effect in model.effects], left=2)
    if model.overlaps:
        pairs = [(o.layer, o.beside, f"{o.jaccard:.2f}", f"{o.chance:.2f}") for o in model.overlaps]
        yield _grid(("layer", "shared with", "jaccard", "by chance"), pairs, left=2)


def _effect(effect: Effect) -> Sequence[str]:
    shares = [effect.before, effect.sensitive, effect.random, effect.least]
    gap = f"{points(effect.gap.value)} {interval(effect.gap)}"
    return effect.layer, effect.test, *(f"{rate.value:.1%}" for rate in shares), gap


def _optional(value: float | None, told: str) -> str:
    return "-" if value is None else format(value, told)


def _bracket(bracket: Bracket) -> str:
    return (
        "under every perturbation within it, the accuracy of the smoothed model lies between "
        f"{share(bracket.lower)}, which are certified, and {share(bracket.upper)}, which {bracket.attack} did not "
        "break."
    )


def _smoothed(report: Report) -> str:
    certificate = report.certificate
    if certificate is None:
        return "No image was certified before the interruption. Nothing is known about the smoothed model."
    told = (
        f"Smoothed with Gaussian noise of sigma {certificate.sigma:.4g}, the model certifiably gives "
        f"{share(certificate.right)} their true class; the median certified l2 radius is "
        f"{certificate.median_radius:.3g}."
    )
    if certificate.bracket is None:
        return told
    place = where(report)
    return f"{told} {place[:1].upper()}{place[1:]}, {_bracket(certificate.bracket)}"


def _limits_of_certificate(report: Report) -> Iterator[str]:
    certificate = report.certificate
    yield (
        "Everything here is about the smoothed model, which answers by vote over noise. Nothing is certified about the "
        "model inside it, used without noise."
    )
    if certificate is None:
        return
    yield (
        f"Each certificate is wrong with a probability of at most {certificate.alpha:g}, each image taken alone. It "
        "holds for exact arithmetic: rounding in the forward pass is not covered."
    )
    yield (
        f"With {count(certificate.samples, 'draw')} no radius above {certificate.largest:.3g} can be certified. A "
        "certified radius is a lower bound: the smoothed model may hold further out."
    )
    yield "The noise is not cut to the box: the model inside sees pixels outside it, as the theorem requires."
    bracket = certificate.bracket
    if bracket is None:
        yield "No threat was given, so that no attack bounds the accuracy of the smoothed model from above."
    else:
        if bracket.norm != "l2":
            why = (
                "the root of the number of pixels times eps"
                if bracket.norm == "linf"
                else "as no vector is longer in l2"
            )
            yield (
                f"The threat is in {bracket.norm}: it was certified by the l2 radius {bracket.radius:.3g} that covers "
                f"it ({why})."
            )
        yield (
            f"The attack followed the mean over {count(bracket.draws, 'draw')} of noise, and each of its images was "
            f"judged by {count(bracket.votes, 'other draw')}; images where the vote was too close count as not broken."
        )
        if bracket.contradictions:
            yield (
                f"Certified and yet broken: {count(bracket.contradictions, 'image')}. About "
                f"{2 * certificate.alpha * certificate.right.n:.2g} are to be expected; many more would be a bug."
            )
    yield (
        f"The intervals tell the chance in drawing {count(certificate.right.n, 'image')} from this source. They say "
        "nothing about images from another source, device or site."
    )


def _certified(report: Report, certificate: Certificate) -> tuple[Sequence[str], list[Sequence[str]]]:
    rates = [
        ("model alone, without noise", report.clean),
        ("smoothed", certificate.right),
        ("smoothed, abstained", certificate.abstained),
    ]
    l2 = next((curve for curve in report.curves if curve.norm == "l2"), None)
    if l2 is not None:
        points = zip(l2.eps, l2.accuracy, strict=True)
        rates += [
            (f"certified at l2 {eps:.3g}", rate) for eps, rate in points if eps and _round(2 * eps / certificate.sigma)
        ]
    if certificate.bracket is not None:
        place = where(report)
        rates += [
            (f"lower bound {place}", certificate.bracket.lower),
            (f"upper bound {place}", certificate.bracket.upper),
        ]
    told = [(name, rate) for name, rate in rates if rate is not None]
    header = ("accuracy", "share", f"{100 * certificate.right.confidence:g}% interval")
    return header, [(name, f"{rate.value:.1%}", interval(rate)) for name, rate in told]


def _round(value: float) -> bool:
    return abs(value - round(value)) < 1e-9


def _attacked(report: Report) -> str:
    result = report.attacks[0]
    if result.success is None:
        return "No image was rightly classified at first, so that there was nothing to attack."
    aimed = isinstance(report.spec, AttackSpec) and report.spec.target is not None
    rate = result.success
    told = f"{rate.value:.1%} {interval(rate)} of the {count(rate.n, 'image')}"
    if aimed:
        return (
            f"{result.label} {where(report)} moved to the target {told} that were rightly classified at first and not "
            "of the target class."
        )
    return f"{result.label} {where(report)} broke {told} that were rightly classified at first."


def _results(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    rounded = any(attack.eight_bit for attack in report.attacks)
    sizes = any(attack.norms for attack in report.attacks)
    rates = [rate for rate in (report.clean, *(attack.accuracy for attack in report.attacks)) if rate is not None]
    header = ["attack", "norm", "accuracy", f"{100 * rates[0].confidence:g}% interval", "broken"]
    header += ["8-bit"] * rounded + ["median"] * sizes + ["queries", "seconds"]
    rows: list[Sequence[str]] = []

    def whole(name: str, rate: Rate | None) -> None:
        if rate is not None:
            rows.append([name, "", f"{rate.value:.1%}", interval(rate), *[""] * (len(header) - 4)])

    whole("clean", report.clean)
    for at, attack in enumerate(report.attacks):
        label = f"> {attack.label}" if attack.survivors and at else attack.label
        row = [label, attack.norm, f"{attack.accuracy.value:.1%}", interval(attack.accuracy)]
        row.append("-" if attack.success is None else f"{attack.success.value:.1%}")
        row += ["-" if attack.eight_bit is None else f"{attack.eight_bit.value:.1%}"] * rounded
        if sizes:
            median = attack.norms and attack.norms.median
            row.append(f"{median:.3g}" if median is not None else "inf" if attack.norms else "-")
        rows.append([*row, f"{attack.queries:,}", f"{attack.seconds:.1f}"])
    whole("worst case", report.worst_case)
    return header, rows


def _grouped(groups: Groups) -> tuple[Sequence[str], list[Sequence[str]]]:
    """By patient or volume: those without a wrong image, the mean share, and all images with an interval over them."""
    rows: list[Sequence[str]] = []
    for name, found in (("clean", groups.clean), ("worst case", groups.worst)):
        rates = (found.whole, found.mean, found.pooled)
        rows.append((name, *(part for rate in rates for part in (f"{rate.value:.1%}", interval(rate)))))
    header = (
        f"{count(groups.n, groups.kind)}",
        "all right",
        "interval",
        "mean share",
        "interval",
        "images",
        "interval",
    )
    return header, rows


def _similar(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    """What adversarial images look like: medians, and the quantile that one in twenty lies below."""
    rows: list[Sequence[str]] = []
    for attack in report.attacks:
        if (looks := attack.similarity) is not None:
            of = ("-", "-") if looks.ssim is None else (f"{looks.ssim:.4f}", f"{looks.ssim_low or 0:.4f}")
            rows.append((attack.label, str(looks.n), f"{looks.psnr:.1f}", f"{looks.psnr_low:.1f}", *of))
    return ("adversarial images of", "n", "PSNR, dB", "5%", "SSIM", "5%"), rows


def _classes(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    level = f"{100 * report.classes[0].clean.confidence:g}% interval"
    rows: list[Sequence[str]] = [
        (
            report.model.classes[found.label],
            f"{found.clean.n:,}",
            *(part for rate in (found.clean, found.worst) for part in (f"{rate.value:.1%}", interval(rate))),
        )
        for found in sorted(report.classes, key=lambda found: found.worst.value)[:MOST_CLASSES]
    ]
    return ("true class", "images", "clean", level, "worst case", level), rows


def _pairs(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The matrix where it fits, else the pairs of the largest shares."""
    names = report.model.classes
    shares = {(pair.label, pair.target): pair.turned for pair in report.pairs}
    rows, columns = (sorted(set(numbers)) for numbers in zip(*shares, strict=True))
    if len(columns) > MOST_COLUMNS:
        worst = sorted(shares.items(), key=lambda item: -item[1].value)[:MOST_CLASSES]
        told: list[Sequence[str]] = [
            (names[a], names[b], f"{rate.k}", f"{rate.n}", f"{rate.value:.1%}", interval(rate))
            for (a, b), rate in worst
        ]
        return ("true class", "into", "turned", "of", "share", "interval"), told
    table: list[Sequence[str]] = []
    for a in rows:
        found = [shares.get((a, b)) for b in columns]
        n = next(rate.n for rate in found if rate is not None)
        table.append((names[a], str(n), *("-" if rate is None else f"{rate.value:.1%}" for rate in found)))
    return ("true class", "n", *(_cut(names[b], 10) for b in columns)), table


def _epochs(report: Report) -> tuple[Sequence[str], list[Sequence[str]]]:
    best = None if report.training is None else report.training.best_epoch
    header = ("epoch", "loss", judged_on(report), "under attack", "learning rate", "seconds")
    rows: list[Sequence[str]] = [
        (
            f"* {e.epoch}" if e.epoch == best else str(e.epoch),
            f"{e.loss:.4g}",
            f"{e.accuracy:.1%}",
            "-" if e.robust_accuracy is None else f"{e.robust_accuracy:.1%}",
            f"{e.learning_rate:.3g}",
            f"{e.seconds:.1f}",
        )
        for e in report.epochs[-LAST_EPOCHS:]
    ]
    return header, rows


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns under their headers, the first `left` of them flush left and cut where the whole would be too wide."""
    cells = [[_plain(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(range(left), key=lambda i: widths[i])
        widths[widest] -= 1
    lines: list[str] = []
    for row in cells:
        parts = [
            _cut(c, w).ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrap(text: str) -> str:
    return textwrap.fill(_plain(text), WIDTH, subsequent_indent="  ")


def _plain(text: str) -> str:
    """Names come from users: nothing that a terminal would act on."""
    return "".join(c if c.isprintable() else "?" for c in text)
