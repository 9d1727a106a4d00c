"""Checks before any attack: what would make every figure after it meaningless."""

import copy

import torch
from torch import Tensor, nn

from rempart.attacks.losses import climb_direction, lead, score
from rempart.attacks.run import check_images
from rempart.core.data import Data
from rempart.core.errors import DataError, ModelError
from rempart.core.model import Classifier, frozen
from rempart.core.types import Images, Labels, Logits
from rempart.report.schema import Check

_SAMPLES = 64
_SATURATED = 16.6
"""From this margin on 1 - softmax is 0 in float32, and with it half of the gradient of cross-entropy."""


def preflight(model: Classifier, data: Data) -> tuple[Classifier, tuple[Check, ...]]:
    """Check model and data on up to 64 samples; return the model to audit, mended where that is possible.

    Each check passes, is repaired with a visible note, warns, or stops the audit.

    Raises:
        DataError: If the data do not fit the model.
        ModelError: If outputs are not finite, depend on batch mates, or give no input gradient.
    """
    checks = [_classes(model, data)]
    batch = next(iter(data.head(_SAMPLES).batches(_SAMPLES)))
    where = next(model.parameters(), batch.x)
    x, y = batch.x.to(where.device), batch.y.to(where.device)
    check_images(model, x, y)
    checks += [_range(model, x), _mode(model)]
    with frozen(model):
        with torch.no_grad():
            raw = model.net(x)
        _finite(raw)
        mended, check = _outputs(model, raw, x, y)
        checks.append(check)
    with frozen(mended), torch.no_grad():
        z = mended(x)
        checks += [_determinism(mended, x, z), _independence(mended, x, z), _scale(z)]
    with frozen(mended):
        checks.append(_gradients(mended, x, y))
    return mended, tuple(checks)


def _classes(model: Classifier, data: Data) -> Check:
    if model.num_classes != data.num_classes:
        raise DataError(
            f"data with the model's {model.num_classes} classes ({', '.join(model.class_names[:6])})",
            got=f"{data.num_classes} ({', '.join(data.class_names[:6])})",
            hint="choose the data the model was trained for",
        )
    named = [names != tuple(map(str, range(len(names)))) for names in (model.class_names, data.class_names)]
    if all(named) and model.class_names != data.class_names:
        if set(model.class_names) == set(data.class_names):
            raise DataError(
                f"classes in the model's order: {', '.join(model.class_names)}",
                got=", ".join(data.class_names),
                hint="the labels would be read as other classes",
            )
        return Check(
            name="classes",
            status="warned",
            message="Model and data name their classes differently; they were matched by number.",
            evidence={"classes": model.num_classes},
        )
    return Check(
        name="classes",
        status="passed",
        message=f"{model.num_classes} classes in model and data.",
        evidence={"classes": model.num_classes},
    )


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


def _outputs(model: Classifier, raw: Tensor, x: Images, y: Labels) -> tuple[Classifier, Check]:
    """Find probabilities where logits should be, and turn them back into logits."""
    flat = raw.reshape(len(x), -1)
    if model.output == "probabilities":
        return model, Check(name="logits", status="passed", message="The network is declared to return probabilities.")
    if not _looks_like_probabilities(flat, y):
        return model, Check(name="logits", status="passed", message="The outputs are logits, not probabilities.")
    stripped = _without_last_activation(model, x, flat)
    if stripped is not None:
        message = "The network returned probabilities; its last activation was taken off, so that attacks see logits."
        return stripped, Check(name="logits", status="repaired", message=message)
    mended = copy.copy(model)
    mended.output = "probabilities"
    message = "The network returned probabilities; their logarithms are used. Where they saturate, gradients are lost."
    return mended, Check(name="logits", status="repaired", message=message)


def _looks_like_probabilities(flat: Tensor, y: Labels) -> bool:
    if bool(((flat < 0) | (flat > 1)).any()):
        return False
    if flat.shape[1] > 1:
        return bool(((flat.sum(1) - 1).abs() < 1e-3).all())
    # one output between 0 and 1: a probability if 0.5 splits the classes better than 0, the threshold of a logit
    return bool(((flat[:, 0] > 0.5) == (y == 1)).sum() >= ((flat[:, 0] > 0) == (y == 1)).sum())


def _without_last_activation(model: Classifier, x: Images, flat: Tensor) -> Classifier | None:
    """The model with its last softmax or sigmoid taken off, if that reproduces the probabilities."""
    kind = nn.Softmax if flat.shape[1] > 1 else nn.Sigmoid
    names = [name for name, module in model.net.named_modules() if isinstance(module, kind)]
    if not names:
        return None
    mended = copy.deepcopy(model)
    if names[-1]:
        mended.net.set_submodule(names[-1], nn.Identity())
    else:
        mended.net = nn.Identity()
    with torch.no_grad():
        z = mended.net(x).reshape(len(x), -1)
    again = z.softmax(1) if z.shape[1] > 1 else z.sigmoid()
    return mended if torch.allclose(again, flat, atol=1e-5) else None


def _determinism(model: Classifier, x: Images, z: Logits) -> Check:
    gap = float((model(x) - z).abs().max())
    evidence = {"largest difference": gap}
    if gap > 1e-4 * max(1.0, float(z.abs().max())):
        message = (
            "Two passes over the same images differ: the model is randomised. "
            "One gradient is one draw; the accuracies here are too high."
        )
        return Check(name="determinism", status="warned", message=message, evidence=evidence)
    message = "Two passes over the same images agree."
    return Check(name="determinism", status="passed", message=message, evidence=evidence)


def _independence(model: Classifier, x: Images, z: Logits) -> Check:
    """Compare a sample alone with the same sample in a batch, unless the model is random anyway."""
    noise = float((model(x) - z).abs().max())
    gap = float((model(x[:1]) - z[:1]).abs().max())
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
    goal = score("ce", targeted=False, num_classes=model.num_classes)
    try:
        gradient, z, _ = climb_direction(model, x, y, goal)
    except RuntimeError as error:
        raise ModelError(
            "a model that gives input gradients",
            got=str(error).split("\n")[0],
            hint="remove no_grad, detach and rounding from its forward pass",
        ) from None
    if not bool(torch.isfinite(gradient).all()):
        raise ModelError("finite input gradients", got="NaN or infinity", hint="look for sqrt or log at 0 in the model")
    right = lead(z, y) > 0
    zero = float(((gradient.flatten(1) == 0).all(1) & right).double().sum() / right.double().sum().clamp_min(1))
    evidence = {"zero share": zero, "mean l1 norm": float(gradient.flatten(1).abs().sum(1).mean())}
    if zero > 0:
        message = (
            f"{zero:.0%} of the rightly classified samples give an input gradient of zero: gradient attacks cannot "
            "move them, and their accuracies are too high."
        )
        return Check(name="gradients", status="warned", message=message, evidence=evidence)
    return Check(name="gradients", status="passed", message="Every sample gives an input gradient.", evidence=evidence)
