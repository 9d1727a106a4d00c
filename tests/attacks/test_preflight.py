"""Preflight: each planted fault is found by its own check, repaired, warned about, or stops the audit."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import toys
from audit.planted import Function
from rempart.attacks import attack_batch
from rempart.attacks.preflight import preflight
from rempart.core.errors import DataError, ModelError
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.report.schema import Check

SHAPE = (1, 4, 4)


def data_of(x: Tensor, y: Tensor, classes: int, names: tuple[str, ...] | None = None) -> Data:
    return Data(
        source="toy",
        split="test",
        index=torch.arange(len(x)),
        labels=y,
        shape=tuple(x.shape[1:]),
        class_names=names or tuple(str(k) for k in range(classes)),
        read=lambda numbers: x[numbers],
    )


def given(model: Classifier, n: int = 24) -> Data:
    x = toys.images(model.shape, n)
    return data_of(x, toys.labels(model, x), model.num_classes)


def wrapped(model: Classifier, change: nn.Module) -> Classifier:
    """The classifier with one more module behind its network."""
    return Classifier(nn.Sequential(model.net, change), shape=model.shape, num_classes=model.num_classes)


def find(checks: tuple[Check, ...], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_a_sound_model_passes_every_check_and_comes_back_itself() -> None:
    model = toys.conv(SHAPE).eval()
    mended, checks = preflight(model, given(model))
    assert mended is model
    assert {check.status for check in checks} == {"passed"}
    assert [check.name for check in checks] == [
        "classes",
        "pixel range",
        "inference mode",
        "logits",
        "determinism",
        "batch independence",
        "logit scale",
        "gradients",
    ]


def test_train_mode_is_repaired_and_the_verdict_is_that_of_inference_mode() -> None:
    model = toys.dropout(SHAPE)
    data = given(model)
    mended, checks = preflight(model, data)
    assert find(checks, "inference mode").status == "repaired"
    assert any(module.training for module in model.modules()), "the model is left as it was"
    x, y = data.batch(torch.arange(len(data))).x, data.labels
    threat = Threat(norm="linf", eps=float(toys.radius(model, x, y, "linf").median()))
    evaluated = attack_batch(copy.deepcopy(model).eval(), x, y, threat, "pgd")
    assert torch.equal(attack_batch(mended, x, y, threat, "pgd").success, evaluated.success)


@pytest.mark.parametrize("activation", ["module", "function"])
def test_softmax_is_undone_and_leaves_the_verdict_of_the_logits(activation: str) -> None:
    plain = toys.linear(SHAPE, 4)
    last = nn.Softmax(1) if activation == "module" else Function(lambda z: z.softmax(1))
    data = given(plain)
    mended, checks = preflight(wrapped(plain, last), data)
    assert find(checks, "logits").status == "repaired"
    x, y = data.batch(torch.arange(len(data))).x, data.labels
    gap = mended(x) - plain(x)
    assert torch.allclose(gap, gap[:, :1].expand_as(gap), atol=1e-4), "logits up to a constant per image"
    if activation == "module":
        assert torch.allclose(mended(x), plain(x)), "the activation itself was taken off"
    threat = Threat(norm="linf", eps=float(toys.radius(plain, x, y, "linf").median()))
    assert torch.equal(
        attack_batch(mended, x, y, threat, "pgd").success, attack_batch(plain, x, y, threat, "pgd").success
    )


@pytest.mark.parametrize("last", [nn.Sigmoid(), Function(torch.sigmoid)])
def test_a_single_sigmoid_output_is_read_as_a_probability(last: nn.Module) -> None:
    plain = toys.one_logit(SHAPE)
    data = given(plain)
    mended, checks = preflight(wrapped(plain, last), data)
    assert find(checks, "logits").status == "repaired"
    x = data.batch(torch.arange(len(data))).x
    assert torch.allclose(mended(x), plain(x), atol=1e-4)


def test_one_logit_is_not_taken_for_a_probability() -> None:
    model = toys.one_logit(SHAPE)
    _, checks = preflight(model, given(model))
    assert find(checks, "logits").status == "passed"


def test_a_random_model_is_warned_about() -> None:
    plain = toys.linear(SHAPE)
    noisy = wrapped(plain, Function(lambda z: z + torch.randn_like(z)))
    check = find(preflight(noisy, given(plain))[1], "determinism")
    assert check.status == "warned"
    assert check.evidence["largest difference"] > 0.1


def test_logits_that_depend_on_batch_mates_stop_the_audit() -> None:
    plain = toys.linear(SHAPE)
    coupled = wrapped(plain, Function(lambda z: z - z.mean(0)))
    with pytest.raises(ModelError, match="do not depend on the other images"):
        preflight(coupled, given(plain))


def test_nan_weights_stop_the_audit() -> None:
    model = toys.linear(SHAPE)
    data = given(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    with pytest.raises(ModelError, match="finite outputs"):
        preflight(model, data)


def test_saturated_logits_are_named_and_do_not_change_the_verdict() -> None:
    plain = toys.linear(SHAPE, 2)
    scaled = wrapped(plain, Function(lambda z: z * 1e5))
    data = given(plain)
    check = find(preflight(scaled, data)[1], "logit scale")
    assert check.evidence["saturated share"] > 0.5
    assert "Softmax saturates" in check.message
    x, y = data.batch(torch.arange(len(data))).x, data.labels
    threat = Threat(norm="linf", eps=float(toys.radius(plain, x, y, "linf").median()))
    assert torch.equal(
        attack_batch(scaled, x, y, threat, "pgd").success, attack_batch(plain, x, y, threat, "pgd").success
    )


def test_logits_drowned_in_an_offset_are_warned_about() -> None:
    plain = toys.linear(SHAPE)
    check = find(preflight(wrapped(plain, Function(lambda z: z + 1e6)), given(plain))[1], "logit scale")
    assert check.status == "warned"
    assert check.evidence["resolution"] > 0.01


def test_a_quantiser_is_found_by_its_zero_gradients() -> None:
    plain = toys.linear(SHAPE)
    rounded = Classifier(
        nn.Sequential(Function(lambda x: (x * 255).round() / 255), plain.net), shape=SHAPE, num_classes=3
    )
    check = find(preflight(rounded, given(rounded))[1], "gradients")
    assert check.status == "warned"
    assert check.evidence["zero share"] == 1.0


def test_a_model_without_gradient_stops_the_audit() -> None:
    plain = toys.linear(SHAPE)
    with pytest.raises(ModelError, match="input gradients"):
        preflight(wrapped(plain, Function(lambda z: z.detach())), given(plain))


@pytest.mark.parametrize("error", [ValueError, NotImplementedError, KeyError])
def test_a_backward_pass_that_fails_stops_the_audit(error: type[Exception]) -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z: Tensor) -> Tensor:
            return z.clone()

        @staticmethod
        def backward(ctx, *gradients: Tensor) -> Tensor:
            raise error("no way back")

    plain = toys.linear(SHAPE)
    with pytest.raises(ModelError, match=r"gives input gradients, got .*no way back"):
        preflight(wrapped(plain, Function(Failing.apply)), given(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            Function(lambda z: z.reshape(24, 3)),
            r"batch of shape \(\d+, 1, 4, 4\), got RuntimeError .*it runs on batches of 24",
        ),
        (Function(lambda z: z.repeat(10, 1)), r"one row per image, got shape \(240, 3\) for 24 images"),
        (Function(lambda z: z.sum()), r"one row per image, got shape \(\) for 24 images"),
        (nn.LazyLinear(3), r"hold numbers, got net\.1\.weight, which is lazy"),
    ],
    ids=["fixed batch", "crops", "a sum", "lazy"],
)
def test_a_network_that_cannot_answer_image_by_image_stops_the_audit(change: nn.Module, message: str) -> None:
    plain = toys.linear(SHAPE)
    with pytest.raises(ModelError, match=message):
        preflight(wrapped(plain, change), given(plain))


def test_a_network_that_drifts_stops_the_audit_and_a_counter_does_not() -> None:
    """1e-5 of a logit in each pass: two passes agree, the hundred thousand of an audit do not."""

    class Counting(nn.Module):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = weight
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, z: Tensor) -> Tensor:
            self.calls += 1
            return z + self.weight * self.calls

    plain = toys.linear(SHAPE)
    with pytest.raises(ModelError, match=r"earlier passes, got net\.1\.calls changed"):
        preflight(wrapped(plain, Counting(1e-5)), given(plain))
    assert preflight(wrapped(plain, Counting(0)), given(plain))[1][-1].status == "passed"


def test_classes_must_fit_in_number_and_order() -> None:
    model = toys.linear(SHAPE, 3)
    x = toys.images(SHAPE, 6)
    y = toys.labels(model, x)
    with pytest.raises(DataError, match=r"model's 3 classes .*got 4"):
        preflight(model, data_of(x, y, 4))
    model.class_names = ("cat", "dog", "fox")
    with pytest.raises(DataError, match="classes in the model's order"):
        preflight(model, data_of(x, y, 3, ("dog", "cat", "fox")))
    _, checks = preflight(model, data_of(x, y, 3, ("Katze", "Hund", "Fuchs")))
    assert find(checks, "classes").status == "warned"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, "pixels in the model's box"),
        (lambda x: torch.where(x == x.max(), torch.nan, x), "finite pixels"),
        (lambda x: x[:, :, :3], "images of shape"),
    ],
)
def test_pixels_that_cannot_be_audited_are_refused(change, message: str) -> None:
    model = toys.linear(SHAPE)
    data = given(model)
    x = change(data.batch(torch.arange(len(data))).x)
    with pytest.raises(DataError, match=message):
        preflight(model, data_of(x, data.labels, 3))


def test_labels_out_of_range_are_refused() -> None:
    model = toys.linear(SHAPE, 3)
    data = given(model)
    with pytest.raises(DataError, match=r"labels in 0\.\.2"):
        preflight(model, data_of(data.batch(torch.arange(24)).x, data.labels + 3, 3))


def test_pixels_divided_twice_are_warned_about() -> None:
    model = toys.conv(SHAPE)
    x = toys.images(SHAPE, 8) / 255
    check = find(preflight(model, data_of(x, toys.labels(model, x), 3))[1], "pixel range")
    assert check.status == "warned"
    assert "twice" in check.message


def test_a_sigmoid_per_class_is_undone() -> None:
    plain = toys.linear(SHAPE, 4)
    data = given(plain)
    for last in (nn.Sigmoid(), Function(torch.sigmoid)):
        mended, checks = preflight(wrapped(plain, last), data)
        assert find(checks, "logits").status == "repaired"
        x = data.batch(torch.arange(len(data))).x
        assert torch.allclose(mended(x), plain(x), atol=1e-3)


def test_sigmoid_outputs_are_recognised_whatever_the_labels() -> None:
    plain = toys.one_logit(SHAPE)
    x = toys.images(SHAPE, 24)
    for y in (torch.ones(24, dtype=torch.long), torch.zeros(24, dtype=torch.long)):
        _, checks = preflight(wrapped(plain, nn.Sigmoid()), data_of(x, y, 2))
        assert find(checks, "logits").status == "repaired"


def test_declared_probabilities_are_checked_and_stripped() -> None:
    plain = toys.linear(SHAPE, 3)
    data = given(plain)
    lying = Classifier(plain.net, shape=SHAPE, num_classes=3, output="probabilities")
    with pytest.raises(ModelError, match="as the model was declared to return"):
        preflight(lying, data)
    honest = Classifier(nn.Sequential(plain.net, nn.Softmax(1)), shape=SHAPE, num_classes=3, output="probabilities")
    mended, checks = preflight(honest, data)
    assert find(checks, "logits").status == "repaired" and "taken off" in find(checks, "logits").message
    x = data.batch(torch.arange(len(data))).x
    assert torch.equal(mended(x), plain(x)), "the logits themselves, not logarithms"


def test_a_sample_mixed_with_its_neighbour_stops_the_audit() -> None:
    plain = toys.linear(SHAPE)
    with pytest.raises(ModelError, match="do not depend on the other images"):
        preflight(
            wrapped(plain, Function(lambda z: z + z.roll(1, 0) * (torch.arange(len(z)) > 0)[:, None])), given(plain)
        )


def test_half_precision_is_refused() -> None:
    plain = toys.linear(SHAPE)
    data = given(plain)
    with pytest.raises(ModelError, match=r"float32 or float64.*model\.float\(\)"):
        preflight(plain.half(), data)


class Rounded(torch.autograd.Function):
    """A quantiser with a straight-through gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return (x * 255).round() / 255

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Rejecting(nn.Module):
    """Quantises images; answers the same for noise, which is all that a check on noise would see."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        noise = (x.flatten(1).std(1) > 0.2)[:, None]
        z = self.net(Rounded.apply(x))
        return torch.where(noise, torch.zeros_like(z), z)


def test_a_backward_pass_of_its_own_is_kept_where_noise_does_not_show_it() -> None:
    plain = toys.linear(SHAPE, 2)
    model = Classifier(Rejecting(plain.net), shape=SHAPE, num_classes=2)
    data = given(model)
    x, y = data.batch(torch.arange(len(data))).x, data.labels
    threat = Threat(norm="linf", eps=2 * float(toys.radius(plain, x, y, "linf").max()) + 0.01)
    assert bool(attack_batch(model, x, y, threat, "pgd").success.all())


def test_names_of_one_side_alone_are_told_in_the_order_of_the_outputs():
    model = toys.linear()
    x = toys.images(model.shape, 6)
    y = toys.labels(model, x)
    named = Data("t", "test", torch.arange(6), y, model.shape, ("eight", "five", "zero"), lambda numbers: x[numbers])
    _, checks = preflight(model, named)
    (told,) = (check for check in checks if check.name == "classes")
    assert (
        told.status == "passed" and "The data call them eight, five, zero, in the order of the outputs." in told.message
    )
    _, checks = preflight(model, dataclasses.replace(named, class_names=model.class_names))
    assert next(check for check in checks if check.name == "classes").message == "3 classes in model and data."
