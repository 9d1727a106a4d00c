"""What Python callers give: one verdict for every form that means the same, and words for every other."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toys
from rempart import Classifier, Data, Threat, attack_batch, attack_data
from rempart.attacks.run import check_images
from rempart.audit import audit
from rempart.certify import certify, predict
from rempart.core import given
from rempart.core.errors import DataError, ModelError, ThreatError
from rempart.data import open_data
from rempart.data.samples import in_memory
from rempart.detectors.catalogue import Learning
from rempart.detectors.fitted import fit
from rempart.report.schema import AttackChoice, AuditSpec, ModelCard

MODEL = toys.linear()
X = toys.images(MODEL.shape, 9)
EPS = float(toys.radius(MODEL, X, toys.labels(MODEL, X), "linf").median()) * 1.01
LINF = Threat(norm="linf", eps=EPS)
Y = torch.where(torch.arange(9) % 4 == 0, (toys.labels(MODEL, X) + 1) % 3, toys.labels(MODEL, X))
ONE_HOT = nn.functional.one_hot(Y, 3)
WANTED = attack_batch(MODEL, X, Y, LINF, "pgd", {"steps": 3}).right.tolist()

LABELS: dict[str, Any] = {
    **{str(t): Y.to(t) for t in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64)},
    **{str(t): Y.to(t) for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)},
    **{kind: Y.numpy().astype(kind) for kind in ("u1", "i4", "<f4", ">i8", ">f4", "u8", "longdouble")},
    "list": Y.tolist(),
    "tuple of tensors": tuple(Y),
    "column": Y[:, None],
    "column of floats": Y[:, None].double().numpy(),
    "one-hot": ONE_HOT,
    "one-hot floats": ONE_HOT.float(),
    "one-hot booleans": ONE_HOT.bool().numpy(),
    "a graph": Y.float().requires_grad_(),
    "read only": np.broadcast_to(Y.numpy(), (9,)),
    "backwards": Y.flip(0).numpy()[::-1],
    "every other": Y.repeat_interleave(2)[::2],
}


class Tagged(Tensor):
    """As the image and label tensors of other libraries."""


with torch.inference_mode():
    INFERENCE = X.clone(), Y.clone()


def images(x: Tensor = X) -> dict[str, Any]:
    frozen_array = x.numpy().copy()
    frozen_array.flags.writeable = False
    wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]))
    wide[..., ::2] = x
    return {
        "array": x.numpy(),
        "float64": x.double(),
        "big-endian": x.numpy().astype(">f4"),
        "a graph": x.clone().requires_grad_(),
        "a parameter": nn.Parameter(x.clone()),
        "inference": INFERENCE[0],
        "read only": frozen_array,
        "backwards": x.flip(0, 3).numpy()[::-1, :, :, ::-1],
        "strides": wide[..., ::2],
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "fortran": np.asfortranarray(x.numpy()),
        "subclass": x.as_subclass(Tagged),
        "list of tensors": list(x),
        "nested lists": x.tolist(),
    }


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_that_mean_the_same_give_the_same_verdicts(labels: Any) -> None:
    before = str(labels)
    outcome = attack_batch(MODEL, X, labels, LINF, "pgd", {"steps": 3})
    assert outcome.right.tolist() == WANTED and 0 < sum(WANTED) < 9
    data = Data("toy", "test", torch.arange(9), labels, MODEL.shape, MODEL.class_names, X.__getitem__)
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == Y.tolist()
    assert attack_data(MODEL, data, LINF, "pgd", {"steps": 3}, batch_size=4).right.tolist() == WANTED
    assert str(labels) == before, "what came was changed"


@pytest.mark.parametrize("name", images())
def test_images_that_mean_the_same_give_the_same_verdicts(name: str) -> None:
    x = images()[name]
    outcome = attack_batch(MODEL, x, Y, LINF, "pgd", {"steps": 3})
    assert outcome.right.tolist() == WANTED
    assert type(outcome.x_adv) is Tensor and not outcome.x_adv.requires_grad and not outcome.x_adv.is_inference()
    data = in_memory("test", x, Y, MODEL.class_names)
    assert attack_data(MODEL, data, LINF, "pgd", {"steps": 3}).right.tolist() == WANTED
    assert certify(MODEL, data, sigma=0.1, samples=20, selection=5, alpha=0.1).label.tolist() == Y.tolist()
    assert torch.equal(predict(MODEL, x, sigma=0.1, samples=30), predict(MODEL, X, sigma=0.1, samples=30))


def test_half_precision_is_widened_and_expanded_images_are_not_written_into() -> None:
    half = attack_batch(MODEL, X.half(), Y, LINF, "pgd", {"steps": 3})
    same = attack_batch(MODEL, X.half().float(), Y, LINF, "pgd", {"steps": 3})
    assert half.x_adv.dtype == torch.float32 and half.right.tolist() == same.right.tolist()
    one = X[1:2].clone()
    attack_batch(MODEL, one.expand(9, *X.shape[1:]), Y[1:2].expand(9), LINF, "square", {"queries": 20})
    assert torch.equal(one, X[1:2])


def test_booleans_are_the_labels_of_two_classes() -> None:
    model = toys.linear(classes=2)
    y = toys.labels(model, X)
    wanted = attack_batch(model, X, y, LINF, "fgsm").right.tolist()
    for labels in (y.bool(), y.bool().numpy(), y.bool().tolist(), y.bool()[:, None]):
        assert attack_batch(model, X, labels, LINF, "fgsm").right.tolist() == wanted


def test_bytes_are_pixels_where_the_box_is_that_of_bytes() -> None:
    inner = toys.linear()
    model = Classifier(nn.Sequential(Shrink(), inner.net), shape=inner.shape, num_classes=3, high=255.0)
    levels = (X * 255).round()
    threat = Threat(norm="linf", eps=12.0, high=255.0)
    y = toys.labels(model, levels)
    wanted = attack_batch(model, levels, y, threat, "pgd", {"steps": 3}).right.tolist()
    for x in (levels.byte(), levels.byte().numpy(), levels.int()):
        assert attack_batch(model, x, y, threat, "pgd", {"steps": 3}).right.tolist() == wanted
    with pytest.raises(DataError, match=r"torch.uint8; divide 8-bit images by 255"):
        attack_batch(MODEL, levels.byte().numpy(), Y, LINF, "pgd")
    with pytest.raises(DataError, match=r"got \[\d+, \d+\]; divide 8-bit images by 255"):
        attack_batch(MODEL, levels, Y, LINF, "pgd")


class Shrink(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 255


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Y + 0.5, r"labels as whole numbers, got .*\.5 in float32 of shape \(9,\)"),
        (torch.full((9,), torch.nan), "whole numbers, got nan in float32"),
        (torch.full((9,), 1e30), "whole numbers, got 1e.30"),
        (Y - 1, r"labels in 0\.\.2.*got -1\.\."),
        (Y.to(torch.int8) + 1, r"labels in 0\.\.2, the model's classes, got 1\.\.3; subtract 1"),
        (Y + 7, "check that model and data belong together"),
        (Y[:8], "one label per image.*8 labels for 9 images"),
        (Y[None], r"one label per image.*int64 of shape \(1, 9\)"),
        (torch.full((9, 3), 1 / 3), "whole numbers"),
        (torch.ones(9, 3), r"rows with a single 1, got float32 of shape \(9, 3\)"),
        (2 * ONE_HOT, "rows with a single 1"),
        (nn.functional.one_hot(Y, 4), r"one label per image.*shape \(9, 4\)"),
        (Y.bool(), r"numbers of 3 classes, got bool of shape \(9,\)"),
        (Y.to(torch.complex64), "real numbers.*complex64"),
        (Y.to_sparse(), "dense tensor.*sparse"),
        (Y.to("meta"), "dense tensor.*meta"),
        (np.array(list("catdogcow")), "labels as a tensor or an array of numbers, got an array of <U1"),
        (["cat"] * 9, "array of numbers, got list"),
        (Y.numpy().astype(object), "array of object"),
        (np.ma.masked_equal(Y.numpy(), 1), "array of int64"),
        ([[0, 1], [2]], "array of numbers, got list"),
        (None, "array of numbers, got NoneType"),
        (np.full(9, 2**63, "u8"), r"below 2\*\*63"),
    ],
)
def test_labels_that_mean_nothing_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        attack_batch(MODEL, X, labels, LINF, "pgd")
    assert error.value.exit_code == 2
    with pytest.raises(DataError):
        Data("toy", "test", torch.arange(9), labels, MODEL.shape, MODEL.class_names, X.__getitem__)


def test_a_type_too_narrow_for_the_classes_is_refused() -> None:
    """bfloat16 holds whole numbers to 256, float16 to 2048."""
    for dtype, most in ((torch.bfloat16, 256), (torch.float16, 2048)):
        assert given.labels(torch.tensor([most], dtype=dtype), 1, most + 1).tolist() == [most]
        with pytest.raises(DataError, match="holds every number"):
            given.labels(torch.tensor([most], dtype=dtype), 1, most + 2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.permute(0, 2, 3, 1), r"channels first: np.moveaxis\(images, -1, -3\)"),
        (X[0], r"add the axis of images: images\[None\]"),
        (X[:, 0], r"add the axis of channels: images\[:, None\]"),
        (torch.tensor(0.5), "images of shape"),
        (X.long(), "floating-point pixels, got torch.int64"),
        (X.bool(), "floating-point pixels, got torch.bool"),
        (X.to(torch.complex64), "real numbers"),
        (X.to("meta"), "dense"),
        ([X[0], X[0, :, :2]], r"images of one shape, got \(1, 2, 4\) and \(1, 4, 4\)"),
        (np.full(X.shape, "a"), "images as a tensor or an array of numbers"),
        (None, "images as a tensor or an array"),
        (X.double() * torch.nan, "finite pixels"),
    ],
)
def test_images_that_mean_nothing_are_refused(x: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        attack_batch(MODEL, x, Y, LINF, "pgd")
    with pytest.raises(DataError):
        predict(MODEL, x, sigma=0.1)


def test_what_a_data_set_reads_is_checked_before_the_model_sees_it() -> None:
    data = Data("toy", "test", torch.arange(9), Y, MODEL.shape, MODEL.class_names, lambda k: X[k, :, :3])
    with pytest.raises(DataError, match="images of shape"):
        attack_data(MODEL, data, LINF, "pgd")


def test_sample_numbers() -> None:
    def attacked(index: Any) -> Any:
        return attack_batch(MODEL, X, Y, LINF, "square", {"queries": 20}, index=index)

    numbers = torch.arange(9) * 3
    wanted = attacked(numbers).x_adv
    for same in (numbers.int(), numbers.numpy().astype("u2"), numbers.tolist(), numbers.float()):
        assert torch.equal(attacked(same).x_adv, wanted)
    twice = attack_batch(MODEL, X[[1, 1]], Y[[1, 1]], LINF, "square", {"queries": 20}, index=[4, 4]).x_adv
    torch.testing.assert_close(twice[0], twice[1])  # one sample number, one draw
    for wrong in (numbers[:8], [*numbers.tolist(), 1], numbers + 0.5, numbers.bool(), numbers[:, None], "abc"):
        with pytest.raises(DataError, match=r"index|sample numbers"):
            attacked(wrong)


def test_masks() -> None:
    mask = torch.zeros(9, 1, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    wanted = attack_batch(MODEL, X, Y, LINF, "fgsm", mask=mask).x_adv
    assert torch.equal(wanted[:, :, 2:], X[:, :, 2:]) and not torch.equal(wanted, X)
    for same in (mask.numpy(), mask.byte(), mask.float(), mask[:1], mask.long().tolist()):
        assert torch.equal(attack_batch(MODEL, X, Y, LINF, "fgsm", mask=same).x_adv, wanted)
    for wrong, says in (
        (mask[:8], "a mask of shape"),
        (mask[:, 0], r"mask\[:, None\]"),
        (mask[..., :3], "a mask of shape"),
        (mask.byte() * 255, "write mask > 0"),
        (mask + 0.5, "a mask of 0 and 1"),
    ):
        with pytest.raises(DataError, match=says):
            attack_batch(MODEL, X, Y, LINF, "fgsm", mask=wrong)


def test_threats_and_targets_as_text() -> None:
    wanted = attack_batch(MODEL, X, Y, LINF, "pgd", {"steps": 3}, target=lambda z, y: torch.full_like(y, 2))
    for target in (2, "2", np.int64(2), lambda z, y: torch.full((len(y),), 2.0), lambda z, y: [2] * len(y)):
        outcome = attack_batch(MODEL, X, Y, f"linf:{EPS}", "pgd", {"steps": 3}, target=target)
        assert outcome.success.tolist() == wanted.success.tolist()
    for threat in (0.05, None, ("linf", 0.05)):
        with pytest.raises(ThreatError, match="a Threat, or text such as linf:8/255"):
            attack_batch(MODEL, X, Y, threat, "pgd")  # type: ignore[arg-type]
    for target in (3, -1, "bird"):
        with pytest.raises(ThreatError, match="class number"):
            attack_batch(MODEL, X, Y, LINF, "pgd", target=target)
    for rule in (lambda z, y: y + 1, lambda z, y: y[:3], lambda z, y: y + 0.5):
        with pytest.raises(DataError, match="target classes"):
            attack_batch(MODEL, X, Y, LINF, "pgd", target=rule)


@pytest.mark.parametrize("name", ["pgd", "deepfool", "mim"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_attacks_work_where_gradients_are_off(name: str, without: Any) -> None:
    expected = attack_batch(MODEL, X, Y, LINF, name)
    with without():
        outcome = attack_batch(MODEL, X.clone(), Y.clone(), LINF, name)
        data = in_memory("test", X.clone(), Y.clone(), MODEL.class_names)
        whole = attack_data(MODEL, data, LINF, name)
        assert not outcome.x_adv.is_inference()
    assert outcome.right.tolist() == whole.right.tolist() == expected.right.tolist()


def test_a_whole_audit_works_where_gradients_are_off() -> None:
    spec = AuditSpec(model="", data="", threat="linf:0.1", attacks=(AttackChoice(name="fgsm"),), sweep=False)
    model, data = toys.linear((1, 8, 8), 10), open_data("digits:test[:8]")
    card = ModelCard(source="", name="", digest="", parameters=0, shape=model.shape, classes=model.class_names)
    with torch.inference_mode():
        result = audit(model, data, spec, card=card)
    assert result is not None and result.error is None and result.report.complete


def test_detectors_take_arrays_and_refuse_bytes() -> None:
    seen = Learning(x=X.double().numpy(), y=Y.numpy(), index=list(range(9)))  # type: ignore[arg-type]
    found = fit("max-softmax", {}, MODEL, seen)
    wanted = found.score(X, torch.arange(9))
    torch.testing.assert_close(found.score(X.numpy(), range(9)), wanted)  # type: ignore[arg-type]
    for wrong in ((X * 255).byte(), X.numpy()[:, 0], X.long()):
        with pytest.raises(DataError):
            found.score(wrong, torch.arange(9))  # type: ignore[arg-type]


def test_weights_made_in_inference_mode_are_refused_in_words() -> None:
    with torch.inference_mode():
        model = toys.linear()
    with pytest.raises(ModelError, match="inference_mode"):
        attack_batch(model, X, Y, LINF, "pgd")


def test_no_images_are_taken_in_any_form() -> None:
    for x, y in ((X[:0].numpy(), []), (X[:0].double(), Y[:0].float()), (X[:0], ONE_HOT[:0])):
        assert len(attack_batch(MODEL, x, y, LINF, "pgd").right) == 0


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1024.0, 3071.0), (0.0, 1e-3), (-3.0, -1.0), (0.5, 0.7)])
def test_the_edge_of_the_box_leaves_room_for_float32(low: float, high: float) -> None:
    """One step of float32 beyond the box is rounding, a thousandth of the box is not."""
    model = Classifier(MODEL.net, shape=MODEL.shape, num_classes=3, low=low, high=high)
    x = torch.full((2, *MODEL.shape), high)
    x[1] = low
    beyond = x.clone()
    beyond[0] = x[0].nextafter(torch.tensor(torch.inf))
    beyond[1] = x[1].nextafter(torch.tensor(-torch.inf))
    check_images(model, beyond, [0, 1])  # type: ignore[arg-type]
    wide = (high - low) / 1000
    for far in (x + wide, x - wide):
        with pytest.raises(DataError, match="pixels in the model's box"):
            check_images(model, far, [0, 1])  # type: ignore[arg-type]
