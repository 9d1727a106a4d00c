"""Checks before any attack: what would make every figure after it meaningless."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rempart.attacks.losses import climb_direction, lead, score
from rempart.attacks.run import PASSES, check_images
from rempart.core.data import Data
from rempart.core.errors import DataError, ModelError
from rempart.core.model import Classifier, Output, blind, frozen, metered
from rempart.core.types import Images, Labels, Logits
from rempart.report.schema import Check

_SAMPLES = 64
_DETERMINISM = "determinism"
_SATURATED = 16.6
"""From this margin on 1 - softmax is 0 in float32, and with it half of the gradient of cross-entropy."""


def preflight(model: Classifier, data: Data) -> tuple[Classifier, tuple[Check, ...]]:
    """Check model and data on up to 64 samples; return the model to audit, mended where that is possible.

    Each check passes, is repaired with a visible note, warns, or stops the audit.

    Raises:
        DataError: If the data do not fit the model.
        ModelError: If outputs are not finite, depend on batch mates, or give no input gradient (but for a network that
            is known to run elsewhere, `core.model.blind`: a warning says so).
    """
    checks = [_classes(model, data)]
    batch = next(iter(data.head(_SAMPLES).batches(_SAMPLES)))
    where = next(model.parameters(), batch.x)
    if where.is_floating_point() and where.dtype not in (torch.float32, torch.float64):
        hint = "call model.float() first: budgets of a few levels drown in the rounding of half precision"
        raise ModelError("weights in float32 or float64", got=str(where.dtype), hint=hint)
    x, y = batch.x.to(where.device, where.dtype if where.is_floating_point() else None), batch.y.to(where.device)
    check_images(model, x, y)
    checks += [_range(model, x), _mode(model)]
    with frozen(model):
        with torch.no_grad():
            raw = model.net(x)
        _finite(raw)
        mended, check = _outputs(model, raw, x)
        checks.append(check)
    with frozen(mended), torch.no_grad():
        z = mended(x)
        checks += [_determinism(mended, x, z), _independence(mended, x, z), _scale(z)]
    with frozen(mended):
        checks.append(_gradients(mended, x, y))
    return mended, tuple(checks)


def is_random(checks: Iterable[Check]) -> bool:
    """Whether these checks of `preflight` found that two passes over the same images differ."""
    return any(check.name == _DETERMINISM and check.status == "warned" for check in checks)


def _classes(model: Classifier, data: Data) -> Check:
    if model.num_classes != data.num_classes:
        raise DataError(
            f"data with the model's {model.num_classes} classes ({_some(model.class_names)})",
            got=f"{data.num_classes} ({_some(data.class_names)})",
            hint="choose the data the model was trained for",
        )
    named = [names != tuple(map(str, range(len(names)))) for names in (model.class_names, data.class_names)]
    if all(named) and model.class_names != data.class_names:
        if set(model.class_names) == set(data.class_names):
            raise DataError(
                f"classes in the model's order: {', '.join(model.class_names)}",
                got=", ".join(data.class_names),
                hint="the labels would be read as other classes: give data.named(model.class_names)",
            )
        return Check(
            name="classes",
            status="warned",
            message="Model and data name their classes differently; they were matched by number.",
            evidence={"classes": model.num_classes},
        )
    if data.source_names is not None:
        message = f"The data have their classes in another order ({_some(data.source_names)}): matched by name."
        return Check(name="classes", status="repaired", message=message, evidence={"classes": model.num_classes})
    message = f"{model.num_classes} classes in model and data."
    if model.class_names != data.class_names:
        message += f" The data call them {_some(data.class_names)}, in the order of the outputs."
    return Check(
        name="classes",
        status="passed",
        message=message,
        evidence={"classes": model.num_classes},
    )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _range(model: Classifier, x: Images) -> Check:
    low, high = float(x.min()), float(x.max())
    evidence = {"lowest": low, "highest": high}
    if high - low < (model.high - model.low) / 50:
        message = "The pixels use less than 2 % of the box: were they divided by 255 twice?"
        return Check(name="pixel range", status="warned", message=message, evidence=evidence)
    message = f"{str(x.dtype).removeprefix('torch.')} pixels in [{low:.3g}, {high:.3g}], inside the box."
    return Check(name="pixel range", status="passed", message=message, evidence=evidence)


def _mode(model: Classifier) -> Check:
    training = sum(module.training for module in model.modules())
    if training:
        message = f"The model came in train mode ({training} modules); it was audited in inference mode."
        return Check(name="inference mode", status="repaired", message=message, evidence={"modules": training})
    return Check(name="inference mode", status="passed", message="The model is in inference mode.")


def _finite(raw: object) -> None:
    if not isinstance(raw, Tensor):
        raise ModelError(
            "the network to return one tensor", got=type(raw).__name__, hint="wrap it in a module that does"
        )
    if not bool(torch.isfinite(raw).all()):
        share = float((~torch.isfinite(raw)).double().mean())
        raise ModelError(
            "finite outputs", got=f"{share:.1%} NaN or infinite", hint="check the weights and the input range"
        )


def _outputs(model: Classifier, raw: Tensor, x: Images) -> tuple[Classifier, Check]:
    """Find probabilities where logits should be, and turn them back into logits."""
    flat = raw.reshape(len(x), -1)
    kind: Output = _kind(flat)
    if model.output != "logits" and kind not in (model.output, "probabilities"):
        raise ModelError(
            f"{model.output}, as the model was declared to return",
            got=f"outputs in [{float(flat.min()):.3g}, {float(flat.max()):.3g}]",
            hint="declare output='logits', or nothing",
        )
    if kind == "logits":
        return model, Check(name="logits", status="passed", message="The outputs are logits, not probabilities.")
    kind = kind if model.output == "logits" else model.output
    stripped = _without_last_activation(model, x, flat, kind)
    if stripped is not None:
        message = f"The network returned {kind}; its last activation was taken off, so that attacks see logits."
        return stripped, Check(name="logits", status="repaired", message=message)
    mended = copy.copy(model)
    mended.output = kind
    message = f"The network returned {kind}; their logarithms are used. Where they saturate, gradients are lost."
    return mended, Check(name="logits", status="repaired", message=message)


def _kind(flat: Tensor) -> Output:
    """What outputs between 0 and 1 must be: probabilities if they sum to 1 or stand alone, else sigmoids."""
    if bool(((flat < 0) | (flat > 1)).any()) or bool((flat == flat[:1]).all()):
        return "logits"
    alone = flat.shape[1] == 1
    return "probabilities" if alone or bool(((flat.sum(1) - 1).abs() < 1e-3).all()) else "sigmoids"


def _without_last_activation(model: Classifier, x: Images, flat: Tensor, kind: Output) -> Classifier | None:
    """The model with its last softmax or sigmoid taken off, if that reproduces the outputs."""
    single = flat.shape[1] == 1 or kind == "sigmoids"
    names = [n for n, module in model.net.named_modules() if isinstance(module, nn.Sigmoid if single else nn.Softmax)]
    if not names:
        return None
    mended = copy.deepcopy(model)
    mended.output = "logits"
    if names[-1]:
        mended.net.set_submodule(names[-1], nn.Identity())
    else:
        mended.net = nn.Identity()
    with torch.no_grad():
        z = mended.net(x).reshape(len(x), -1)
    again = z.sigmoid() if single else z.softmax(1)
    return mended if torch.allclose(again, flat, atol=1e-5) else None


def _determinism(model: Classifier, x: Images, z: Logits) -> Check:
    gap = float((model(x) - z).abs().max())
    evidence = {"largest difference": gap}
    if gap > 1e-4 * max(1.0, float(z.abs().max())):
        message = (
            "Two passes over the same images differ: the model is randomised. "
            f"One gradient is one draw, and images are judged by their mean logits over {PASSES} passes; "
            "attacks need mean gradients (option eot)."
        )
        return Check(name=_DETERMINISM, status="warned", message=message, evidence=evidence)
    message = "Two passes over the same images agree."
    return Check(name=_DETERMINISM, status="passed", message=message, evidence=evidence)


def _independence(model: Classifier, x: Images, z: Logits) -> Check:
    """Compare samples alone and in another order with the same in a batch, beyond what randomness explains."""
    noise = float((model(x) - z).abs().max())
    alone = torch.cat([model(x[:1]), model(x[-1:])])
    turned = (model(x.flip(0)).flip(0) - z).abs().max()
    gap = float(torch.maximum((alone - z[[0, -1]]).abs().max(), turned))
    if gap > 1e-3 * max(1.0, float(z.abs().max())) + 3 * noise:
        raise ModelError(
            "logits that do not depend on the other images of the batch",
            got=f"a difference of {gap:.3g}",
            hint="put batch norm into inference mode, or remove the layer that mixes samples",
        )
    message = "A sample alone and in a batch gets the same logits."
    return Check(name="batch independence", status="passed", message=message, evidence={"largest difference": gap})


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
        with metered(model) as meter:
            gradient, z, _ = climb_direction(model, x, y, goal)
    except RuntimeError as error:
        raise ModelError(
            "a model that gives input gradients",
            got=str(error).split("\n")[0],
            hint="remove no_grad, detach and rounding from its forward pass",
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
