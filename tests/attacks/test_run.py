"""The runner: what it refuses, what it hands to attacks, and how it judges; attacks here are one-liners."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import toys
from audit.planted import Function
from rempart.attacks import attack_batch, attack_data, attacks
from rempart.attacks.run import check_images, join, native, targets
from rempart.core.errors import AttackError, DataError, ModelError, RempartError, SpecError, ThreatError
from rempart.core.events import Event
from rempart.core.model import Classifier
from rempart.core.threat import Norm, Threat
from rempart.data import Data

LEVEL = 1 / 255


def batch(model: Classifier, n: int = 6) -> tuple[Tensor, Tensor]:
    x = toys.images(model.shape, n)
    return x, toys.labels(model, x)


def steps_on_one_pixel(boundary: float) -> Classifier:
    """Images of 1 x 2 x 2; class 1 where the first pixel is above `boundary`, the rest does not count."""
    model = toys.one_logit((1, 2, 2))
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        layer.bias.fill_(-boundary)
    return model


def moving_the_first_pixel(by: float) -> Any:
    """An attack that adds `by` to the first pixel."""

    def attack(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **_: Any) -> Tensor:
        z = x.clone()
        z.flatten(1)[:, 0] += by
        return z

    return attack


# ---- contracts


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (lambda x: x + 0.2, "to stay inside linf:0.1"),
        (lambda x: torch.where(x == x.flatten(1).amax(), x + 0.1001, x), "to stay inside linf:0.1"),
        (lambda x: x * torch.nan, "finite"),
        (lambda x: x + torch.inf, "finite"),
        (lambda x: x.double(), "detached images like its input"),
        (lambda x: x.half(), "detached images like its input"),
        (lambda x: x[:-1], "detached images like its input"),
        (lambda x: x.flatten(1), "detached images like its input"),
        (lambda x: x.clone().requires_grad_(), "detached images like its input"),
        (lambda x: torch.zeros_like(x), "to stay inside linf:0.1"),
        (lambda x: None, r"to return images like its input, .*got NoneType"),
        (lambda x: x.numpy(), r"to return images like its input, .*got ndarray"),
    ],
)
def test_an_attack_that_breaks_its_contract_is_refused(result: Any, says: str) -> None:
    def careless(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **_: Any) -> Tensor:
        return result(x)

    model = toys.linear()
    with pytest.raises(AttackError, match=f"careless {says}|careless to .*{says}"):
        attack_batch(model, *batch(model), Threat(norm="linf", eps=0.1), careless)


def test_an_attack_that_leaves_the_box_is_refused() -> None:
    model = toys.linear()
    x = torch.full((2, *model.shape), 0.99)
    with pytest.raises(AttackError, match="stay inside"):
        attack_batch(model, x, toys.labels(model, x), Threat(norm="linf", eps=0.1), lambda m, x, *_, **__: x + 0.05)


def test_an_attack_gets_what_its_contract_promises() -> None:
    """The samples that are right, a frozen model, the goal, draws keyed by sample number, and its options as given."""
    seen: dict[str, Any] = {}

    def curious(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **given: Any) -> Tensor:
        training = any(module.training for module in model.modules())
        wanted = any(parameter.requires_grad for parameter in model.parameters())
        seen.update(given, x=x.clone(), y=y, threat=threat, training=training, wanted=wanted)
        return x.clone()

    model = toys.conv().train()
    x, y = batch(model)
    wrong = torch.tensor([True, False, False, True, False, False])
    y = torch.where(wrong, (y + 1) % 3, y)
    threat, index = Threat(norm="l1", eps=1.0), torch.tensor([10, 11, 12, 13, 14, 15])
    attack_batch(model, x, y, threat, curious, {"colour": "red"}, index=index, seed=7)
    assert torch.equal(seen["x"], x[~wrong]) and torch.equal(seen["y"], y[~wrong])
    assert (seen["threat"], seen["targeted"], seen["colour"]) == (threat, False, "red")
    assert not seen["training"] and not seen["wanted"]
    assert seen["rng"].seed == 7 and seen["rng"].index.tolist() == [11, 12, 14, 15]


# ---- judging


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_is_measured_is_true(norm: Norm) -> None:
    """Every column of the outcome against its definition, computed here by hand on the returned images."""
    model = toys.linear()
    x, y = batch(model, 12)
    y = torch.where(torch.arange(12) % 4 == 0, (y + 1) % 3, y)
    threat = Threat(norm=norm, eps=1.2 * float(toys.radius(model, x, toys.labels(model, x), norm).median()))
    outcome = attack_batch(model, x, y, threat, "pgd", {"steps": 5}, index=torch.arange(12) + 100)
    weight, bias = toys.affine(model)
    z = outcome.x_adv.double().flatten(1) @ weight.T + bias
    delta = (outcome.x_adv.double() - x.double()).flatten(1).abs()
    distance = {"linf": delta.amax(1), "l2": delta.square().sum(1).sqrt(), "l1": delta.sum(1)}[norm]
    others = z.clone()
    others[torch.arange(12), y] = -torch.inf
    torch.testing.assert_close(outcome.distance, distance)
    torch.testing.assert_close(outcome.own_distance, distance)
    torch.testing.assert_close(outcome.margin.double(), z[torch.arange(12), y] - others.amax(1), rtol=0, atol=1e-5)
    assert torch.equal(outcome.predicted, z.argmax(1))
    assert outcome.index.tolist() == list(range(100, 112))
    assert outcome.correct.tolist() == [i % 4 != 0 for i in range(12)]
    assert torch.equal(outcome.success, z.argmax(1) != y) and torch.equal(outcome.success, outcome.found)
    assert torch.equal(outcome.right, z.argmax(1) == y) and 0 < int(outcome.right.sum()) < 9
    assert outcome.norm == norm and outcome.eight_bit is None and outcome.right_after_rounding is None


def test_a_minimum_norm_attack_is_judged_by_the_budget_of_the_threat() -> None:
    """deepfool knows no l1: it works in l2, unbounded, and its l1 distance decides."""
    model = toys.linear()
    x, y, radius = toys.equidistant(model, "l2")
    free = attack_batch(model, x, y, Threat(norm="l1"), "deepfool")
    assert bool(free.success.all()) and free.norm == "l2"
    torch.testing.assert_close(free.own_distance, torch.full((6,), radius).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(free.distance, (free.x_adv - x).double().flatten(1).abs().sum(1))
    eps = float(free.distance.median())
    bounded = attack_batch(model, x, y, Threat(norm="l1", eps=eps), "deepfool")
    assert torch.equal(bounded.x_adv, free.x_adv) and bool(bounded.found.all())
    assert bounded.success.tolist() == [d <= eps * (1 + 1e-6) for d in free.distance.tolist()]
    assert 0 < int(bounded.success.sum()) < 6


def test_only_the_returned_image_counts() -> None:
    """An attack that passes a broken image on its way, and returns another one, has broken nothing."""

    def wanders(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, **_: Any) -> Tensor:
        assert int(model(x + 0.1).argmax(1)[0]) == 1
        return x - 0.1

    model = steps_on_one_pixel(0.5)
    x, y = torch.full((1, 1, 2, 2), 0.45), torch.tensor([0])
    outcome = attack_batch(model, x, y, Threat(norm="linf", eps=0.1), wanders)
    assert outcome.attacked.tolist() == [True] and outcome.success.tolist() == [False]


def test_the_meter_counts_the_attack_and_not_the_judge() -> None:
    """The same figures on a copy (a convnet is folded) and on the model itself (one that cannot be copied)."""
    for model in (toys.conv(), toys.opaque(toys.conv()), toys.linear()):
        x, y = batch(model)
        for name, options, queries, gradients in (
            ("fgsm", {}, 1, 1),
            ("bim", {"steps": 4}, 5, 4),
            ("pgd", {"steps": 3, "keep": "last"}, 3, 3),
            ("pgd", {"steps": 1}, 1, 1),
            ("cw", {"steps": 10, "search_steps": 2, "abort_early": False}, 22, 22),
            ("ead", {"steps": 10, "search_steps": 2, "abort_early": False}, 40, 20),
        ):
            outcome = attack_batch(model, x, y, Threat(norm="l1" if name == "ead" else "l2", eps=0.01), name, options)
            assert (outcome.queries, outcome.gradients) == (6 * queries, 6 * gradients), name


def test_the_model_decides_the_dtype() -> None:
    model = toys.linear().double()
    x = toys.images(model.shape)
    outcome = attack_batch(model, x, toys.labels(model, x.double()), Threat(norm="linf", eps=0.01), "fgsm")
    assert outcome.x_adv.dtype == torch.float64
    assert float((outcome.x_adv - x.double()).abs().max()) == pytest.approx(0.01, abs=1e-12)


def test_no_images_give_an_empty_outcome() -> None:
    model = toys.linear()
    x, y = batch(model)
    outcome = attack_batch(model, x[:0], y[:0], Threat(norm="linf", eps=0.1), "pgd")
    assert outcome.x_adv.shape == (0, *model.shape) and len(outcome.success) == outcome.queries == 0


# ---- eight bit


@pytest.mark.parametrize(
    ("boundary", "moved", "stored_breaks"),
    [
        (0.3, 0.4, False),  # rounds back to the original
        (0.3, 0.6, False),  # one level is further than 0.6: stored as the original
        (1.3, 1.4, False),  # rounds down to one level
        (2.2, 2.9, False),  # three levels would break but are further than 2.9: stored as two
        (0.9, 1.4, True),  # one level is enough
        (2.2, 3.0, True),
    ],
)
def test_eight_bit_counts_what_survives_a_file(boundary: float, moved: float, stored_breaks: bool) -> None:
    """Original on level 100, class boundary and perturbation in levels above it, eps the size of the perturbation.

    `quantise` stores a pixel on the nearest level, unless that is further from the original than it was.
    """
    model = steps_on_one_pixel((100 + boundary) * LEVEL)
    x, y = torch.full((1, 1, 2, 2), 100 * LEVEL), torch.tensor([0])
    threat = Threat(norm="linf", eps=moved * LEVEL)
    outcome = attack_batch(model, x, y, threat, moving_the_first_pixel(moved * LEVEL), eight_bit=True)
    assert outcome.success.tolist() == [True]
    assert outcome.eight_bit is not None and outcome.right_after_rounding is not None
    assert outcome.eight_bit.tolist() == [stored_breaks]
    assert outcome.right_after_rounding.tolist() == [not stored_breaks]


def test_eight_bit_with_an_original_between_two_levels() -> None:
    """The original itself is moved by up to half a level when it is stored: that much is no sin of the attack."""
    model = steps_on_one_pixel(101.2 * LEVEL)
    x, y = torch.full((1, 1, 2, 2), 100.4 * LEVEL), torch.tensor([0])
    threat = Threat(norm="linf", eps=1.6 * LEVEL)
    outcome = attack_batch(model, x, y, threat, moving_the_first_pixel(1.6 * LEVEL), eight_bit=True)
    assert outcome.eight_bit is not None and outcome.eight_bit.tolist() == [True]  # level 102, exactly


def test_eight_bit_counts_the_wrong_as_broken() -> None:
    model = steps_on_one_pixel(0.5)
    x, y = torch.full((2, 1, 2, 2), 100 * LEVEL), torch.tensor([0, 1])
    outcome = attack_batch(model, x, y, Threat(norm="linf", eps=0.01), "fgsm", eight_bit=True)
    assert outcome.eight_bit is not None and outcome.eight_bit.tolist() == [False, True]


# ---- targets


def test_target_rules_by_hand() -> None:
    model = Classifier(nn.Identity(), shape=(1, 2, 2), num_classes=4, class_names=("cat", "dog", "2", "owl"))
    z = torch.tensor([[4.0, 3.0, 1.0, 0.0], [0.0, 1.0, 5.0, 6.0], [2.0, 9.0, -1.0, 1.0]])
    y = torch.tensor([0, 0, 2])  # right; wrong; wrong, and the least likely
    assert targets("nearest", model)(z, y).tolist() == [1, 3, 1]
    assert targets("least-likely", model)(z, y).tolist() == [3, 1, 3]
    assert targets("dog", model)(z, y).tolist() == [1, 1, 1]
    assert targets("3", model)(z, y).tolist() == [3, 3, 3]
    assert targets("2", model)(z, y).tolist() == [2, 2, 2]  # a name before a number
    assert targets("nearest", model)(z, y).dtype == torch.int64
    for unknown in ("bird", "4", "-1", ""):
        with pytest.raises(ThreatError, match="least-likely"):
            targets(unknown, model)


# ---- refusals


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda x, y: (x[:, :, :3], y), "images of shape"),
        (lambda x, y: ((255 * x).byte(), y), "divide 8-bit images by 255"),
        (lambda x, y: (255 * x, y), "pixels in the model's box"),
        (lambda x, y: (x - 0.6, y), "do not normalise"),
        (lambda x, y: (x * torch.nan, y), "finite pixels"),
        (lambda x, y: (x + torch.inf, y), "finite pixels"),
        (lambda x, y: (x, y[:-1]), "one label per image"),
        (lambda x, y: (x, y + 3), "labels in 0..2"),
        (lambda x, y: (x, y - 3), "labels in 0..2"),
    ],
)
def test_images_that_do_not_fit_are_refused(spoil: Any, says: str) -> None:
    model = toys.linear()
    x, y = spoil(*batch(model))
    with pytest.raises(DataError, match=says):
        check_images(model, x, y)
    with pytest.raises(DataError, match=says):
        attack_batch(model, x, y, Threat(norm="linf", eps=0.1), "fgsm")


def test_images_that_fit_are_taken() -> None:
    model = toys.linear()
    x, y = batch(model)
    check_images(model, x, y)
    check_images(model, x[:0], y[:0])
    check_images(model, torch.where(x > 0.5, 1 + 5e-7, -5e-7), y)  # the rounding of a loader


@pytest.mark.parametrize(
    ("threat", "attack", "options", "error", "says"),
    [
        (Threat(norm="linf", eps=0.1), "pdg", {}, SpecError, "did you mean 'pgd'"),
        (Threat(norm="linf", eps=0.1), "pgd", {"step_size": 1}, SpecError, "unknown option 'step_size'"),
        (Threat(norm="linf", eps=0.1), "pgd", {"steps": 0}, SpecError, "steps=0"),
        (Threat(norm="linf", eps=0.1), "pgd", [("steps", 3)], SpecError, "options of 'pgd' by name, got list"),
        (Threat(norm="linf"), "pgd", {}, ThreatError, "a budget for pgd"),
        (Threat(norm="linf", eps=0.1, low=-1.0), "pgd", {}, ThreatError, "the box of the model"),
        (Threat(norm="linf", eps=0.1), "pgd", {"loss": "dlr"}, SpecError, "at least 3 classes"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(
    threat: Threat, attack: str, options: dict[str, Any], error: type[RempartError], says: str
) -> None:
    model = toys.linear(classes=2)
    with pytest.raises(error, match=says):
        attack_batch(model, *batch(model), threat, attack, options)


def test_what_callers_from_python_get_wrong_is_told() -> None:
    model = toys.linear()
    x, y = batch(model)
    same = [attack_batch(model, x, y, "linf:0.1", "pgd", seed=seed).x_adv for seed in (7, np.int64(7), torch.tensor(7))]
    assert all(torch.equal(same[0], other) for other in same), "a whole number is one, whoever made it"
    for seed in ("7", 7.0, None):
        with pytest.raises(DataError, match="a seed that is a whole number"):
            attack_batch(model, x, y, "linf:0.1", "pgd", seed=seed)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match=r"a Classifier, got Sequential; wrap a network: rempart.Classifier\("):
        attack_batch(model.net, x, y, "linf:0.1", "pgd")  # pyright: ignore[reportArgumentType]


class _Views(nn.Module):
    """Flattens its maps by `view`, as the first networks of many do: that fails on images laid out channels-last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))  # a first weight of another dtype
        self.maps, self.out = nn.Conv2d(channels, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.float() * self.out(torch.relu(self.maps(x)).view(len(x), -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_flattens_by_view_is_attacked_and_judged(channels: int) -> None:
    torch.manual_seed(0)
    model = Classifier(_Views(channels), shape=(channels, 8, 8), num_classes=3).eval()
    x = toys.images(model.shape, 8)
    y = toys.labels(model, x)
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
        for attack in ("pgd", "square"):
            found = attack_batch(model, laid_out, y, "linf:0.3", attack)
            assert torch.equal(model(found.x_adv.contiguous()).argmax(1) != y, found.broken) and found.broken.any()


def test_what_is_no_attack_or_no_image_is_told() -> None:
    model = toys.linear()
    with pytest.raises(SpecError, match="the name of an attack, or a function, got None"):
        attack_batch(model, *batch(model), "linf:0.1", None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="channels and one to three spatial axes"):
        Classifier(nn.Linear(64, 10), shape=(64,), num_classes=10)


class _OfFour(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].view(4, -1) + gradients[0]


@pytest.mark.parametrize("attack", ["pgd", "apgd", "fab", "deepfool", "cw"])
def test_a_backward_pass_that_fails_for_some_batches_is_told_with_its_line(attack: str) -> None:
    plain = toys.linear()
    net = nn.Sequential(plain.net, Function(_OfFour.apply))
    model = Classifier(net, shape=plain.shape, num_classes=plain.num_classes)
    x, y = batch(plain)
    threat = "l2:1" if attack in ("cw", "deepfool") else "linf:0.1"
    with pytest.raises(ModelError, match=r"gradients for batches of every size, got RuntimeError in test_run.py, line"):
        attack_batch(model, x[:3], y[:3], threat, attack)


def test_native_threats() -> None:
    box = {"low": -1.0, "high": 1.0}
    threat = Threat(norm="l1", eps=3.0, **box)
    assert native(attacks["pgd"], threat) == threat
    assert native(attacks["ead"], threat) == Threat(norm="l1", **box)
    assert native(attacks["cw"], threat) == native(attacks["deepfool"], threat) == Threat(norm="l2", **box)
    assert native(attacks["deepfool"], Threat(norm="linf", eps=0.5)) == Threat(norm="linf")


def test_steps_longer_than_the_threat_is_wide_are_refused() -> None:
    threat = Threat(norm="linf", eps=0.1)
    for name, options in (("pgd", {"step": 3}), ("mim", {"step": 0.21}), ("universal", {"step": "1"})):
        told = r"at most twice the budget, 0\.2, got .*; steps are in pixel units: write step=0\.025"
        with pytest.raises(ThreatError, match=told):
            native(attacks[name], threat, attacks[name].parse(options))
    for name, options in (("pgd", {"step": "1/5"}), ("pgd", {}), ("fmn", {"step": 3.0}), ("deepfool", {})):
        native(attacks[name], threat, attacks[name].parse(options))


def test_steps_and_boxes_leave_room_for_rounding() -> None:
    """3 * 0.2 is more than 2 * 0.3 in floating point, and 0.1 + 0.2 more than 0.3."""
    native(attacks["pgd"], Threat(norm="linf", eps=0.3), attacks["pgd"].parse({"step": 3 * 0.2}))
    model = Classifier(toys.linear().net, shape=(1, 4, 4), num_classes=3, low=-0.3, high=0.1 + 0.2)
    x = toys.images(model.shape) * 0.6 - 0.3
    attack_batch(model, x, toys.labels(model, x), Threat(norm="linf", eps=0.6, low=-0.3, high=0.3), "fgsm")


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1024.0, 3071.0), (0.0, 1e-3)])
def test_eight_bit_files_of_any_box(low: float, high: float) -> None:
    """An image on a level, moved by exactly eight levels, is stored as it is: it breaks before and after rounding."""
    level = (high - low) / 255
    start, boundary = low + 247 * level, low + 254.5 * level
    model = steps_on_one_pixel(boundary)
    model.low, model.high = low, high
    x, y = torch.full((1, 1, 2, 2), start), torch.tensor([0])
    threat = Threat(norm="l2", eps=8 * level, low=low, high=high)
    outcome = attack_batch(model, x, y, threat, moving_the_first_pixel(8 * level), eight_bit=True)
    assert outcome.success.tolist() == [True]
    assert outcome.eight_bit is not None and outcome.eight_bit.tolist() == [True]


def test_a_model_without_finite_logits_is_refused_by_sample_number() -> None:
    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1)[:, 0], (x.flatten(1)[:, 1] - 0.25).sqrt()], 1)

    model = Classifier(Fragile(), shape=(1, 2, 2), num_classes=2)
    x = torch.full((3, 1, 2, 2), 0.5)
    x[1] = 0.1
    with pytest.raises(ModelError, match="sample 21"):
        attack_batch(
            model, x, torch.zeros(3).long(), Threat(norm="linf", eps=0.01), "fgsm", index=torch.tensor([20, 21, 22])
        )


# ---- data sets


def test_attack_data_reports_each_batch_and_keeps_the_numbers() -> None:
    model = toys.linear()
    x, y = batch(model, 10)
    y[0] = (y[0] + 1) % 3
    data = Data("toy", "test", torch.arange(10), y, model.shape, model.class_names, lambda index: x[index])
    data = data.take(torch.tensor([9, 2, 4, 0, 7, 5, 1]))
    threat = Threat(norm="l2", eps=1.2 * float(toys.radius(model, x, toys.labels(model, x), "l2").median()))
    events: list[Event] = []
    outcome = attack_data(model, data, threat, "bim", {"steps": 4}, batch_size=3, notify=events.append)
    assert outcome.index.tolist() == [9, 2, 4, 0, 7, 5, 1]
    assert {event.stage for event in events} == {"bim"} and {event.total for event in events} == {7}
    after = {event.done: event.values["accuracy"] for event in events if "batch" not in event.values}
    assert after == {n: pytest.approx(float(outcome.right[:n].double().mean())) for n in (3, 6, 7)}
    assert 0 < int(outcome.right.sum()) < 6
    whole = attack_batch(model, x[data.index], y[data.index], threat, "bim", {"steps": 4}, index=data.index)
    torch.testing.assert_close(outcome.x_adv, whole.x_adv)
    assert torch.equal(outcome.success, whole.success)
    assert (outcome.queries, outcome.gradients) == (whole.queries, whole.gradients)


def test_join_needs_a_part() -> None:
    with pytest.raises(DataError, match="at least one batch"):
        join([])


def test_a_targeted_attack_breaks_where_the_class_changes_at_all() -> None:
    model = toys.linear(classes=4)
    x = toys.images(model.shape, 20)
    y = toys.labels(model, x)
    threat = Threat(norm="linf", eps=3 * float(toys.radius(model, x, y, "linf").median()))
    outcome = attack_batch(model, x, y, threat, "pgd", target=targets("least-likely", model))
    wrong = model(outcome.x_adv).argmax(1) != y
    assert torch.equal(outcome.right, ~wrong)
    assert bool((outcome.broken | ~outcome.success).all()) and int(outcome.success.sum()) < int(wrong.sum())
