"""Checks before any attack: what would make every figure after it meaningless."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rempart.attacks.losses import climb_direction, lead, score
from rempart.attacks.recognition import Seen, look, recognised
from rempart.attacks.run import PASSES, check_images
from rempart.core.errors import DataError, ModelError, RempartError
from rempart.core.model import (
    Classifier,
    blind,
    check_classifier,
    check_layers,
    check_no_hidden_write,
    check_steady,
    frozen,
    metered,
    placed,
)
from rempart.core.names import respelt, some
from rempart.core.randomness import Repeats, alike, repeated
from rempart.core.repro import seeded
from rempart.core.stats import wilson
from rempart.core.types import Images, Labels, Logits
from rempart.data import Data, files
from rempart.data.samples import spread
from rempart.report.schema import ACCURACY, Check

_SAMPLES = 64
_FEW = 8  # images that are shown to the network again and again
_REPEATS = 64  # passes over images alone and in batches, where the draws of a network depend on the batch
_STRANGE = 8.0  # standard errors between their means that chance does not explain
_DETERMINISM = "determinism"
_SATURATED = 16.6
"""From this margin on 1 - softmax is 0 in float32, and with it half of the gradient of cross-entropy."""


def preflight(model: Classifier, data: Data) -> tuple[Classifier, tuple[Check, ...]]:
    """Check model and data; return the model to audit, mended where that is possible.

    All images are shown to the network once: their pixels, and what it returns for them. What costs more is checked on
    up to 64 that lie evenly over the data. Each check passes, is repaired with a visible note, warns, or stops the
    audit.

    Raises:
        DataError: If the data do not fit the model.
        ModelError: If outputs are not finite, could be logits as well as probabilities, depend on batch mates, or give
            no input gradient (but for a network that is known to run elsewhere, `core.model.blind`: a warning says so).
    """
    check_classifier(model)
    check_layers(model)
    checks = [_classes(model, data), *_files(data)]
    batch = data.batch(spread(len(data))[:_SAMPLES])  # so does every beginning of it
    where = next(model.parameters(), batch.x)
    dtype = placed(model, batch.x).dtype
    if dtype not in (torch.float32, torch.float64):
        hint = "call model.float() first: budgets of a few levels drown in the rounding of half precision"
        raise ModelError("weights in float32 or float64", got=str(dtype), hint=hint)
    with frozen(model):
        seen = look(model, data, lambda batch: check_images(model, batch.x, batch.y))
    checks += [_range(model, batch.x, seen), _mode(model)]
    x, y = placed(model, batch.x), batch.y.to(where.device)
    with frozen(model):
        mended, message = recognised(model, x, seen)
    checks.append(Check(name="logits", status="passed" if mended is model else "repaired", message=message))
    check_steady(mended, x[:2])
    with frozen(mended), torch.no_grad():
        check_no_hidden_write(mended, x)
        repeats = repeated(mended, x, few=_FEW)
        checks += [_determinism(mended, x, repeats), _independence(mended, x, random=repeats.random), _scale(mended(x))]
    with frozen(mended):
        checks.append(_gradients(mended, x, y))
    return mended, tuple(checks)


def is_random(checks: Iterable[Check]) -> bool:
    """Whether these checks of `preflight` found that two passes over the same images differ."""
    return any(check.name == _DETERMINISM and check.status == "warned" for check in checks)


def above_chance(true: np.ndarray, predicted: np.ndarray, classes: Sequence[str]) -> Check:
    """Whether a model knows the images it is judged on: else a wrong scale, order of classes or data stands behind it.

    It warns where the interval of the accuracy reaches down to one in the number of classes, or where images of several
    classes are all taken for one.

    Args:
        true: Class of each image, int64, shape (n), n >= 1.
        predicted: What the model takes each for without an attack.
        classes: Their names.
    """
    clean, chance = wilson(int((predicted == true).sum()), len(true)), 1 / len(classes)
    evidence = {"accuracy": clean.value, "low": clean.low, "high": clean.high, "chance": chance, "n": clean.n}
    told = f"The accuracy without an attack is {clean}, where chance is {chance:.1%}"
    constant = len(np.unique(predicted)) == 1 < len(np.unique(true))
    if constant:
        told += f", and every image is taken for {classes[predicted[0]]}"
    elif clean.low <= chance:
        told += ": it is not surely above it"
    asked = "Are pixels scaled as in training (--box), classes in the order of the outputs (--classes), and are these "
    asked += "images of the kind the model was made for?"
    few = " Or are these too few to tell?" if clean.low <= chance < clean.value else ""
    warned = constant or clean.low <= chance
    return Check(
        name=ACCURACY,
        status="warned" if warned else "passed",
        message=f"{told}. {asked}{few}" if warned else f"{told}.",
        evidence=evidence,
        reading="What attacks do to a model that does not know the images says nothing.",
    )


def _classes(model: Classifier, data: Data) -> Check:
    """How the classes of the data were matched with those of the model; by a number or a guess, never silently."""
    own, k = data.source_names or data.class_names, model.num_classes
    found = data.matched(model.class_names)
    if data.source_names is None and found.numbers != tuple(range(k)):
        raise DataError(
            f"classes in the model's order: {some(model.class_names)}",
            got=some(own),
            hint="the labels would be read as other classes: give data.seen_by(model)",
        )
    status: Literal["passed", "repaired", "warned"] = "passed"
    message = f"{k} classes in model and data."
    if found.how == "different names":
        status, message = "warned", "Model and data name their classes differently; they were matched by number."
    elif found.how == "numbers in text order":
        status = "warned"
        message = (
            f"The model brings no class names, and those of the data are numbers: they were matched in text order "
            f"({some(own)}), as ImageFolder and flow_from_directory number folders. If the outputs stand in the order "
            "of the numbers, name them in that order with --classes."
        )
    elif found.how == "encoding":
        names = some(tuple(model.class_names[number] for number in found.numbers))
        status, message = "repaired", f"The class names of the data are not in UTF-8: read as {names}, by the model's."
    elif found.how == "spelling":
        told = [f"{name} is {other}" for name, other in respelt(own, model.class_names, found.numbers).items()]
        status, message = "repaired", f"Model and data spell class names differently; matched: {some(told)}."
    elif len(own) < k:
        message = f"The data are of {len(own)} of the model's {k} classes ({some(own)}), matched by {found.how}."
    elif found.numbers != tuple(range(k)):
        status, message = "repaired", f"The data have their classes in another order ({some(own)}): matched by name."
    elif tuple(model.class_names) != tuple(own) and found.how != "name":
        message += f" The data call them {some(own)}, in the order of the outputs."
    if found.how == "number" and len(own) > 3 and data.labels.unique().tolist() == list(range(1, len(own))):
        status, message = "warned", f"{message} Class 0 alone does not occur: are the labels counted from 1?"
    return Check(name="classes", status=status, message=message, evidence={"classes": k})


def _files(data: Data) -> tuple[Check, ...]:
    """What the data set holds and was not read, such as images in formats that are not known; several formats."""
    if data.notes:
        return tuple(Check(name="files", status="warned", message=note) for note in data.notes)
    names = data.read.names if isinstance(data.read, files.Files) else ()
    endings = Counter(files.ending(name) for name in names)
    if len(endings) < 2:
        return ()
    message = f"The images are files of several endings: {files.counted(endings)}."
    return (Check(name="files", status="passed", message=message),)


def _range(model: Classifier, x: Images, seen: Seen) -> Check:
    evidence = {"lowest": seen.darkest, "highest": seen.brightest}
    if seen.brightest - seen.darkest < (model.high - model.low) / 50:
        message = "The pixels use less than 2 % of the box: were they divided by 255 twice?"
        return Check(name="pixel range", status="warned", message=message, evidence=evidence)
    kind, span = str(x.dtype).removeprefix("torch."), f"[{seen.darkest:.3g}, {seen.brightest:.3g}]"
    message = f"{kind} pixels in {span}, inside the box."
    return Check(name="pixel range", status="passed", message=message, evidence=evidence)


def _mode(model: Classifier) -> Check:
    training = sum(module.training for module in model.modules())
    if training:
        message = f"The model came in train mode ({training} modules); it was audited in inference mode."
        return Check(name="inference mode", status="repaired", message=message, evidence={"modules": training})
    return Check(name="inference mode", status="passed", message="The model is in inference mode.")


# ---- randomness and batch mates


def _determinism(model: Classifier, x: Images, repeats: Repeats) -> Check:
    evidence = {"largest difference": repeats.gap, "passes": float(repeats.passes)}
    if repeats.random:
        replayed = _replays(model, x[:_FEW])
        message = (
            "Passes over the same images differ: the model is randomised. "
            f"One gradient is one draw, and images are judged by their mean logits over {PASSES} passes; "
            "attacks need mean gradients (option eot)."
        )
        if not replayed:
            message += (
                " Passes differ also where the random numbers of torch, numpy and Python start alike: the model draws "
                "from somewhere else, and this run cannot be repeated exactly."
            )
        evidence["replayed"] = float(replayed)
        return Check(name=_DETERMINISM, status="warned", message=message, evidence=evidence)
    message = f"{repeats.passes} passes over the same images agree."
    if repeats.draws:
        message += (
            " The model draws random numbers all the same: a difference that comes in one pass of a hundred would go "
            f"unseen here with a chance of {0.99 ** (repeats.passes - 1):.0%}."
        )
    return Check(name=_DETERMINISM, status="passed", message=message, evidence=evidence)


def _replays(model: Classifier, x: Images) -> bool:
    """Whether passes that start from the same random state agree."""
    first = _from_same_state(model, x)
    return all(alike(first, _from_same_state(model, x)) for _ in range(31))


def _from_same_state(model: Classifier, x: Images) -> Logits:
    with seeded(0, x.device):
        return model(x)


def _independence(model: Classifier, x: Images, *, random: bool) -> Check:
    """Compare samples alone and in another order with the same in a batch, all from the same random state.

    Draws may depend on the size of a batch: of a model that is random, means are then compared, beyond what chance
    explains.
    """
    at = sorted({0, len(x) // 3, 2 * len(x) // 3, len(x) - 1})
    whole = _from_same_state(model, x)
    alone = torch.cat([_from_same_state(model, x[k : k + 1]) for k in at])
    turned = (_from_same_state(model, x.flip(0)).flip(0) - whole).abs().max()
    gap = float(torch.maximum((alone - whole[at]).abs().max(), turned))
    slack = 1e-3 * max(1.0, float(whole.abs().max()))
    if gap > slack and not (random and _by_chance(model, x[:_FEW], slack)):
        raise ModelError(
            "logits that do not depend on the other images of the batch",
            got=f"a difference of {gap:.3g}",
            hint="put batch norm into inference mode, or remove the layer that mixes samples; dynamic quantisation "
            "does so too (it scales a batch by its largest value): audit the network in floating point",
        )
    message = "A sample alone and in a batch gets the same logits."
    if gap > slack:
        message = f"A sample alone and in a batch gets the same logits on average, over {_REPEATS} passes each."
    return Check(name="batch independence", status="passed", message=message, evidence={"largest difference": gap})


def _by_chance(model: Classifier, x: Images, slack: float) -> bool:
    """Whether images alone, in a batch and in another order have the same mean logits, as far as chance allows."""
    ways = (lambda: model(x), lambda: model(x.flip(0)).flip(0), lambda: torch.cat([model(one) for one in x.split(1)]))
    means, variances = zip(*(_moments(torch.stack([way() for _ in range(_REPEATS)])) for way in ways), strict=True)
    for mean, variance in zip(means[1:], variances[1:], strict=True):
        error = ((variances[0] + variance) / _REPEATS).sqrt()
        if bool(((mean - means[0]).abs() > slack + _STRANGE * error).any()):
            return False
    return True


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.double().mean(0), z.double().var(0)


def _scale(z: Logits) -> Check:
    margin = z.amax(1) - z.topk(2, dim=1).values[:, 1]
    saturated = float((margin > _SATURATED).double().mean())
    resolution = float(z.abs().max()) * torch.finfo(z.dtype).eps
    evidence = {"median margin": float(margin.median()), "saturated share": saturated, "resolution": resolution}
    if resolution > 0.01 * float(margin.median()):
        message = (
            "The logits are so large beside their differences that rounding decides: "
            "accuracies are those of the rounded model, and gradients are coarse."
        )
        return Check(name="logit scale", status="warned", message=message, evidence=evidence)
    if saturated:
        message = (
            f"Softmax saturates in float32 for {saturated:.0%} of the samples: attacks on plain cross-entropy would "
            "see zero gradients and call the model safe. The losses used here do not saturate."
        )
        return Check(name="logit scale", status="passed", message=message, evidence=evidence)
    return Check(name="logit scale", status="passed", message="Softmax does not saturate.", evidence=evidence)


def _gradients(model: Classifier, x: Images, y: Labels) -> Check:
    if reason := blind(model):
        message = (
            f"The model gives no gradients ({reason}). Only attacks that need none can be run: with gradients an "
            "adversary does better, so that accuracies under attack are too high."
        )
        return Check(name="gradients", status="warned", message=message)
    goal = score("ce", targeted=False, num_classes=model.num_classes)
    try:
        climb_direction(model, x[:1], y[:1], goal)  # attacks drop images as they fall: batches come in every size
        with metered(model) as meter:
            gradient, z, _ = climb_direction(model, x, y, goal)
    except RempartError:
        raise
    except Exception as error:  # noqa: BLE001  a backward pass may be written in Python, and raise anything
        raise ModelError(
            "a model that gives input gradients",
            got=str(error).split("\n")[0],
            hint="remove no_grad, detach and rounding from its forward pass; in place of a quantised network, audit "
            "the one in floating point that it was made from",
        ) from None
    right = lead(z, y) > 0
    zero = float(((gradient.flatten(1) == 0).all(1) & right).double().sum() / right.double().sum().clamp_min(1))
    evidence = {"zero share": zero, "mean l1 norm": float(gradient.flatten(1).double().abs().sum(1).mean())}
    singular = int(meter.singular)
    if singular:
        evidence["singular"] = singular
        message = (
            f"The input gradient of {singular} of {len(x)} samples holds NaN or infinity: look for a square root or a "
            "logarithm at 0 in the model. Attacks move such pixels in a finite direction, which may be a poor one."
        )
        return Check(name="gradients", status="warned", message=message, evidence=evidence)
    if zero > 0:
        message = (
            f"{zero:.0%} of the rightly classified samples give an input gradient of zero: gradient attacks cannot "
            "move them, and their accuracies are too high."
        )
        return Check(name="gradients", status="warned", message=message, evidence=evidence)
    return Check(name="gradients", status="passed", message="Every sample gives an input gradient.", evidence=evidence)
