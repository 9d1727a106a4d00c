"""The classifier's reading of any output, and the guards that leave a model as they found it."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

import toys
from rempart.attacks import attack_batch
from rempart.core.errors import Cancelled, ModelError, ThreatError
from rempart.core.model import (
    Classifier,
    Normalize,
    accelerated,
    check_no_hidden_write,
    check_steady,
    class_number,
    frozen,
    metered,
)
from rempart.core.repro import digest_state
from rempart.core.threat import Threat

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Function(nn.Module):
    """A network that is a plain function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# --- Classifier ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", toys.SHAPES)
def test_logits_are_the_networks(shape):
    x = toys.images(shape)
    for classes in toys.CLASSES:
        model = toys.linear(shape, classes)
        weight, bias = toys.affine(model)
        assert torch.allclose(model(x).double(), x.double().flatten(1) @ weight.T + bias, atol=1e-5)


@pytest.mark.parametrize("make", [toys.one_logit, toys.one_probability])
def test_one_output_is_two_classes(make):
    """z = (0, s): the second class has probability sigmoid(s), whether the net returns s or the probability."""
    model, x = make(), toys.images((1, 4, 4), 50)
    weight, bias = toys.affine(model)
    s = x.double().flatten(1) @ weight[1] + bias[1]
    z = model(x)
    assert z.shape == (50, 2) and not z[:, 0].any()
    assert torch.allclose(z[:, 1].double(), s, atol=1e-5)
    assert torch.allclose(z.softmax(1)[:, 1].double(), s.sigmoid(), atol=1e-6)
    assert set(toys.labels(model, x).tolist()) == {0, 1}


def test_one_output_may_be_squeezed():
    x = toys.images((1, 4, 4), 5)
    flat, column = (Classifier(Function(f), shape=(1, 4, 4), num_classes=2) for f in (_sum, lambda x: _sum(x)[:, None]))
    assert torch.equal(flat(x), column(x))
    scalar = Classifier(Function(lambda x: _sum(x).squeeze()), shape=(1, 4, 4), num_classes=2)
    assert torch.equal(scalar(x[:1]), column(x[:1]))


def test_a_single_image_may_be_squeezed():
    inner = toys.linear()
    model = Classifier(Function(lambda x: inner.net(x).squeeze()), shape=(1, 4, 4), num_classes=3)
    x = toys.images((1, 4, 4), 2)
    assert torch.equal(model(x[:1]), inner(x[:1]))


def test_maps_of_one_pixel_are_flattened():
    inner = toys.linear()
    model = Classifier(Function(lambda x: inner.net(x)[:, :, None, None]), shape=(1, 4, 4), num_classes=3)
    x = toys.images((1, 4, 4))
    assert torch.equal(model(x), inner(x))


@pytest.mark.parametrize("classes", toys.CLASSES)
def test_probabilities_become_logits(classes):
    """log softmax(z) is z up to a constant per image, so that softmax gives the probabilities back."""
    x = toys.images((1, 4, 4))
    z, expected = toys.probabilities(classes=classes)(x), toys.linear(classes=classes)(x)
    assert torch.allclose(z - z.mean(1, keepdim=True), expected - expected.mean(1, keepdim=True), atol=1e-4)


def test_saturated_probabilities_stay_finite_and_in_order():
    rows = torch.tensor([[0.0, 1.0, 0.0], [1e-40, 0.2, 0.8]])
    model = Classifier(Function(lambda x: rows), shape=(1, 1), num_classes=3, output="probabilities")
    z = model(torch.zeros(2, 1, 1))
    assert bool(z.isfinite().all()) and z.argmax(1).tolist() == [1, 2]
    ends = Classifier(
        Function(lambda x: torch.tensor([0.0, 0.5, 1.0])), shape=(1, 1), num_classes=2, output="probabilities"
    )
    odds = ends(torch.zeros(3, 1, 1))[:, 1]
    assert bool(odds.isfinite().all()) and float(odds[1]) == 0 and float(odds[2]) == -float(odds[0]) > 80


def test_an_empty_batch_has_no_logits():
    for make in (toys.linear, toys.one_logit, toys.probabilities, toys.conv):
        model = make()
        assert model(torch.zeros(0, 1, 4, 4)).shape == (0, model.num_classes)


def test_names_default_to_numbers():
    assert toys.linear().class_names == ("0", "1", "2")
    named = Classifier(nn.Identity(), shape=[1, 2], num_classes=2, class_names=["cat", "dog"])
    assert (named.class_names, named.shape) == (("cat", "dog"), (1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes >= 2"),
        ({"num_classes": 2, "class_names": ["a"]}, "2 class names, got 1"),
    ],
)
def test_impossible_classifiers_are_refused(options, message):
    with pytest.raises(ModelError, match=message):
        Classifier(nn.Identity(), shape=(1, 2), **options)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: torch.zeros(len(x), 4), "3 outputs per image, got 4"),
        (lambda x: torch.zeros(len(x), 1), "3 outputs per image, got 2"),
        (lambda x: torch.zeros(3, len(x)), r"one row per image, got shape \(3, 6\) for 6 images"),
        (lambda x: torch.zeros(2 * len(x), 3), r"one row per image, got shape \(12, 3\)"),
        (lambda x: torch.zeros(7), r"one row per image, got shape \(7,\)"),
        (lambda x: (torch.zeros(len(x), 3),), "one tensor, got tuple; wrap"),
        (lambda x: {"logits": torch.zeros(len(x), 3)}, "one tensor, got dict; wrap"),
    ],
)
def test_outputs_of_the_wrong_form_are_refused(output, message):
    """The shape (3, 6) for 6 images holds as many numbers as (6, 3); reading it row by row would be nonsense."""
    with pytest.raises(ModelError, match=message):
        Classifier(Function(output), shape=(1, 2), num_classes=3)(torch.zeros(6, 1, 2))


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 2, 3, 4), (3, 7)])
def test_normalize_is_per_channel(shape):
    x = toys.images(shape)
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    z = Normalize(mean, std)(x)
    for c in range(3):
        assert torch.allclose(z[:, c], (x[:, c] - mean[c]) / std[c])


@pytest.mark.parametrize(("mean", "std"), [([0.0], [0.0]), ([0.0], [-1.0]), ([0.0, 0.0], [1.0])])
def test_normalize_refuses_what_does_not_divide(mean, std):
    with pytest.raises(ModelError, match="as many positive std as mean values"):
        Normalize(mean, std)


# --- frozen ----------------------------------------------------------------------------------------------------------


def mixed() -> Classifier:
    """A net in training mode with one batch norm in inference mode, one frozen weight, one gradient and one without."""
    model = toys.conv().train()
    model.net[1].eval()
    model.net[0].weight.requires_grad_(False)
    model.net[3].weight.grad = torch.ones_like(model.net[3].weight)
    return model


def snapshot(model: nn.Module):
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [
            (name, id(p), p.requires_grad, None if p.grad is None else p.grad.tolist())
            for name, p in model.named_parameters()
        ],
        [(name, id(buffer)) for name, buffer in model.named_buffers()],
        digest_state(model.state_dict()),
    )


def test_frozen_is_inference_without_weight_gradients():
    model, x = mixed(), toys.images((1, 4, 4)).requires_grad_()
    expected = toys.conv()(x).detach()
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        z = model(x)
        z.sum().backward()
    torch.testing.assert_close(z.detach(), expected)
    assert x.grad is not None and bool(x.grad.any()), "images still get their gradient"


def test_frozen_puts_everything_back():
    model = mixed()
    before = snapshot(model)
    with frozen(model):
        model(toys.images((1, 4, 4)).requires_grad_()).sum().backward()
    assert snapshot(model) == before


def test_frozen_puts_everything_back_after_an_error():
    model = toys.raising(mixed(), 2)
    model.net.net[1].eval()
    before = snapshot(model)
    with pytest.raises(ModelError, match="planted"), frozen(model):
        for _ in range(2):
            model(toys.images((1, 4, 4)))
    assert snapshot(model) == before and model.net.calls >= 2


@pytest.mark.parametrize("in_place", [True, False])
def test_frozen_undoes_what_a_forward_pass_does_to_buffers(in_place):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))
            self.register_buffer("void", None)

        def forward(self, x):
            self.calls = self.calls.add_(1) if in_place else self.calls + 1
            return x.flatten(1) + self.calls

    model = Classifier(Counting(), shape=(1, 2), num_classes=2)
    before = snapshot(model)
    with frozen(model):
        assert model(torch.zeros(1, 1, 2)).tolist() == [[1, 1]]
        assert model(torch.zeros(1, 1, 2)).tolist() == [[2, 2]]
    assert snapshot(model) == before


def test_frozen_leaves_buffers_that_did_not_change_alone():
    """A graph that was built before still gives gradients, also where a neighbour of the same dtype changed."""

    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            for name, values in (("count", [0.0]), ("scale", [2.0, 3.0]), ("calls", [0])):
                self.register_buffer(name, torch.tensor(values))

        def forward(self, x):
            self.count += 1
            return x * self.scale

    model, x = Scaling(), torch.ones(2, requires_grad=True)
    z = model(x)
    with frozen(model):
        model(x)
        assert model.count.tolist() == [2]
    assert model.count.tolist() == [1] and model.calls.tolist() == [0]
    z.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 3]


def test_frozen_undoes_a_change_of_mode_inside():
    """An attack that calls `train()` itself does not leave its mark, nor do the running statistics it moved."""
    model = mixed()
    before = snapshot(model)
    with frozen(model):
        model.train()
        model(toys.images((1, 4, 4)))
    assert snapshot(model) == before


def test_frozen_does_not_need_eval():
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True):
            raise NotImplementedError

    model = Stubborn(2, 2)
    with frozen(model):
        assert not model.training
    assert model.training


def test_frozen_nests():
    model = mixed()
    before = snapshot(model)
    with frozen(model):
        inside = snapshot(model)
        with frozen(model):
            pass
        assert snapshot(model) == inside
    assert snapshot(model) == before


def test_frozen_dropout_is_the_linear_model():
    model, x = toys.dropout(), toys.images((1, 4, 4))
    with frozen(model):
        assert torch.equal(model(x), toys.linear()(x))
    assert model.training and model.net[0].training


# --- metered ---------------------------------------------------------------------------------------------------------


def test_images_are_counted_forward_and_backward():
    model, x = toys.linear(), toys.images((1, 4, 4), 7)
    with frozen(model), metered(model) as meter:
        with torch.no_grad():
            model(x)
        assert (meter.queries, meter.gradients) == (7, 0)
        model(x[:3])
        assert (meter.queries, meter.gradients) == (10, 0), "no graph, no gradient"
        point = x[:5].clone().requires_grad_()
        z = model(point)
        assert (meter.queries, meter.gradients) == (15, 0)
        for k in range(3):
            torch.autograd.grad(z[:, k].sum(), point, retain_graph=True)
        assert (meter.queries, meter.gradients) == (15, 15), "one backward pass per class counts each time"
        model(x[:0])
        assert (meter.queries, meter.gradients) == (15, 15)
    model(x)
    assert (meter.queries, meter.gradients) == (15, 15), "counting ends with the block"


def test_meters_nest_and_end_after_an_error():
    model, x = toys.raising(toys.linear(), 3), toys.images((1, 4, 4), 2)
    with metered(model) as outer:
        with pytest.raises(ModelError, match="planted"), metered(model) as inner:
            for _ in range(3):
                model(x)
        model(x)
    assert (inner.queries, outer.queries) == (4, 6), "the pass that failed gave no answer and does not count"


# --- accelerated -----------------------------------------------------------------------------------------------------


def gradients(model: Classifier, x: torch.Tensor) -> torch.Tensor:
    """Gradient of each logit with respect to the images."""
    point = x.clone().requires_grad_()
    z = model(point)
    return torch.stack([torch.autograd.grad(z[:, k].sum(), point, retain_graph=True)[0] for k in range(z.shape[1])])


def same(model: Classifier, fast: Classifier, shape: tuple[int, ...]) -> bool:
    """Whether the two are the same function with the same gradients, for batches of several sizes."""
    x = toys.images(shape, 5)
    with frozen(model):
        return all(
            torch.allclose(fast(part), model(part), atol=1e-5)
            and torch.allclose(gradients(fast, part), gradients(model, part), rtol=1e-3, atol=1e-4)
            for part in (x, x[:1], x[:2])
        )


@pytest.mark.parametrize("shape", toys.SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_are_folded(shape, training):
    model = toys.conv(shape).train(training)
    before = snapshot(model)
    fast = accelerated(model)
    assert fast is not model
    assert not any(isinstance(module, NORMS) for module in fast.modules()), "nothing of them is left"
    assert any(isinstance(module, NORMS) for module in model.modules())
    assert same(model, fast, shape)
    assert snapshot(model) == before
    assert not fast.training and not any(p.requires_grad for p in fast.parameters())
    assert (fast.shape, fast.num_classes, fast.low, fast.high) == (model.shape, model.num_classes, 0.0, 1.0)
    assert not {p.data_ptr() for p in fast.parameters()} & {p.data_ptr() for p in model.parameters()}


class Branching(nn.Module):
    """conv feeds a batch norm and something else (`skip`), is used twice (`shared`), or only once with one (`half`)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.first, self.second = toys.conv().net[0], toys.conv(seed=1).net[1], toys.conv(seed=2).net[1]
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        z = self.conv(x)
        if self.kind == "skip":
            z = z + self.first(z)
        if self.kind == "shared":
            z = self.first(z) + self.second(self.conv(1 - x))
        if self.kind == "half":
            z = self.first(z) + self.conv(1 - x)
        return self.head(z.mean((2, 3)))


@pytest.mark.parametrize("kind", ["skip", "shared", "half"])
def test_layers_in_several_uses_are_not_folded(kind):
    model = Classifier(Branching(kind), shape=(1, 4, 4), num_classes=3).eval()
    fast = accelerated(model)
    assert same(model, fast, (1, 4, 4))
    assert fast is not model, "the rest is still made faster"
    assert any(isinstance(module, NORMS) for module in fast.modules())


def test_a_shared_layer_with_nearly_equal_norms_is_not_folded():
    """Folding one norm into both uses would pass the check on random images; the graph must say no."""
    net = Branching("shared")
    net.second = nn.BatchNorm2d(8)
    net.first = nn.BatchNorm2d(8)
    net.second.running_mean += 1e-6
    fast = accelerated(Classifier(net, shape=(1, 4, 4), num_classes=3).eval())
    assert sum(isinstance(module, NORMS) for module in fast.modules()) == 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": (2, 3), "padding": (0, 2), "dilation": (2, 1)},
        {"stride": 3, "padding": 1, "bias": False},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_convolutions_over_images_keep_their_gradients(channels, options):
    """Every geometry against autograd's own convolution, for odd sizes, 19 images (no multiple of 8), one and none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Conv2d(channels, 5, 3, **options)
        net = nn.Sequential(first, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    model = Classifier(net, shape=(channels, 9, 11), num_classes=3).eval()
    fast = accelerated(model)
    assert fast is not model
    x = toys.images((channels, 9, 11), 19)
    for part in (x, x[:1], x[:0]):
        with frozen(model):
            assert torch.allclose(fast(part), model(part), atol=1e-6)
            assert torch.allclose(gradients(fast, part), gradients(model, part), rtol=1e-4, atol=1e-7)


def test_norms_without_running_statistics_stay():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(16, 3)
    )
    model = Classifier(net, shape=(1, 4, 4), num_classes=3).eval()
    fast = accelerated(model)
    assert same(model, fast, (1, 4, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flatten(1)[:, :3] if float(x.sum()) > 0 else x.flatten(1)[:, 3:6],
        lambda x: dropout(x.flatten(1)[:, :3], 0.5, training=True),
        lambda x: x.flatten(1)[:, :3] + torch.rand(()),
    ],
    ids=["control flow", "random", "traced as a constant"],
)
def test_what_cannot_be_traced_or_differs_comes_back_as_it_is(function):
    model = Classifier(Function(function), shape=(1, 4, 4), num_classes=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # by chance, few draws of dropout may agree
        assert accelerated(model) is model


def test_what_cannot_be_copied_comes_back_as_it_is():
    class Unique(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("one of a kind")

    model = Classifier(nn.Sequential(nn.Flatten(), Unique(16, 3)), shape=(1, 4, 4), num_classes=3)
    assert accelerated(model) is model


def test_a_large_common_offset_hides_no_difference():
    """Logits of 1e6 plus a model's own: a copy that gets the own part wrong must be noticed."""

    class Drifting(nn.Module):
        calls: ClassVar[list[int]] = []

        def forward(self, x):
            self.calls.append(1)
            return x.flatten(1)[:, :3] + 10 * len(self.calls) * torch.arange(3) + 1e6  # the same gradient each time

    model = Classifier(Drifting(), shape=(1, 4, 4), num_classes=3)
    assert accelerated(model) is model


def test_a_copy_with_other_gradients_is_noticed():
    """Tracing forgets `no_grad`: the logits 6 x agree, the gradients 1 and 6 do not."""

    class Hiding(nn.Module):
        def forward(self, x):
            x = x.flatten(1)[:, :3]
            with torch.no_grad():
                hidden = 5 * x
            return x + hidden

    model = Classifier(Hiding(), shape=(1, 4, 4), num_classes=3)
    assert accelerated(model) is model


def test_probabilities_survive():
    inner = toys.conv()
    net = nn.Sequential(inner.net, nn.Softmax(1))
    model = Classifier(net, shape=(1, 4, 4), num_classes=3, output="probabilities").eval()
    fast = accelerated(model)
    assert fast is not model and same(model, fast, (1, 4, 4))
    assert fast.output == "probabilities"


# --- what a network does to images, outputs and itself ---------------------------------------------------------------


def clamped(x):
    return toys.linear().net(x.clamp(0.45, 0.55))


def _clamps_data(x):
    x.data.clamp_(0.45, 0.55)
    return toys.linear().net(x)


def _clamps_a_view(x):
    x[:, :, :2].detach().clamp_(0.45, 0.55)
    x.flatten(1)[:, 8:].data.clamp_(0.45, 0.55)
    return toys.linear().net(x)


def _clamps_in_numpy(x):
    pixels = x.detach().numpy()
    pixels[...] = pixels.clip(0.45, 0.55)
    return toys.linear().net(x)


def _clamps_in_place(x):
    return toys.linear().net(x.clamp_(0.45, 0.55))


def _clamps_unseen(x):
    with torch.no_grad():
        x.clamp_(0.45, 0.55)
    return toys.linear().net(x)


@pytest.mark.parametrize("net", [_clamps_data, _clamps_a_view, _clamps_in_numpy, _clamps_unseen])
def test_a_write_that_autograd_does_not_see_is_refused(net):
    model, x = Classifier(Function(net), shape=(1, 4, 4), num_classes=3), toys.images((1, 4, 4), 4)
    with pytest.raises(ModelError, match="where autograd does not see it"), torch.no_grad():
        check_no_hidden_write(model, x)


def _halves_a_view(x):
    x.flatten(1)[:, 8:].mul_(0.5)
    return toys.linear().net(x)


@pytest.mark.parametrize("net", [clamped, _clamps_in_place, _halves_a_view, lambda x: toys.linear().net(x.numpy())])
def test_a_write_that_autograd_sees_is_fine(net):
    model, x = Classifier(Function(net), shape=(1, 4, 4), num_classes=3), toys.images((1, 4, 4), 4)
    with torch.no_grad():
        check_no_hidden_write(model, x)


class KeepsAndClears(nn.Module):
    """Clears, in each pass, the images of the pass before."""

    def forward(self, x):
        for old in vars(self).setdefault("kept", []):
            old.data.zero_()
        self.kept[:] = [x]
        return clamped(x)


@pytest.mark.parametrize(
    "net",
    [*map(Function, (_clamps_data, _clamps_a_view, _clamps_in_numpy, _clamps_in_place)), KeepsAndClears()],
    ids=["data", "view", "numpy", "in place", "later"],
)
def test_a_network_that_writes_into_its_images_is_lent_copies(net):
    """Images stay, logits are those of the same network without a write, and attacks keep to the originals.

    What is found is judged by that network, and never beyond what the best adversary within the threat can do.
    """
    model = Classifier(net, shape=(1, 4, 4), num_classes=3)
    plain = Classifier(Function(clamped), shape=(1, 4, 4), num_classes=3)
    x = torch.rand((40, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    kept, y = x.clone(), toys.labels(plain, x)
    assert torch.allclose(model(x), plain(x), atol=1e-6) and torch.allclose(model(x), plain(x), atol=1e-6)
    gradients(model, x)  # also of a leaf that needs a gradient
    best = torch.stack([_worst(x, y, k, 0.1) for k in range(3)], 1).amin(1)
    for name, options in (("pgd", {"steps": 10}), ("square", {"queries": 100})):
        found = attack_batch(model, x, y, Threat(norm="linf", eps=0.1), name, options)
        assert torch.equal(x, kept)
        assert bool((found.x_adv - kept).abs().amax() <= 0.1 + 1e-6)
        assert torch.equal(found.broken, plain(found.x_adv).argmax(1) != y)
        assert int(found.broken.sum()) > 0 and not (found.broken & (best > 1e-6)).any()


def _worst(x, y, k, eps):
    """Least lead of class y over class k within linf eps for a linear network behind a clamp, in closed form."""
    weight, bias = toys.affine(toys.linear())
    slope = (weight[y] - weight[k]).view_as(x)
    moved = torch.where(slope > 0, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)).double().clamp(0.45, 0.55)
    lead = (slope * moved).flatten(1).sum(1) + bias[y] - bias[k]
    return torch.where(y == k, torch.inf, lead)


def test_logits_stay_when_a_network_reuses_its_memory():
    class Reusing(nn.Module):
        def forward(self, x):
            z = vars(self).setdefault("z", torch.zeros(8, 3))
            return z.copy_(x.flatten(1)[:, :3])

    model, x = Classifier(Reusing(), shape=(1, 4, 4), num_classes=3), toys.images((1, 4, 4))
    first = model(x)
    model(1 - x)
    assert torch.equal(first, x.flatten(1)[:, :3])


def test_a_network_that_returns_its_images_gives_no_hold_of_them():
    model, x = Classifier(nn.Flatten(), shape=(1, 1, 3), num_classes=3), torch.rand(2, 1, 1, 3)
    kept = x.clone()
    model(x).zero_()
    assert torch.equal(x, kept)


class Stateful(nn.Module):
    """Changes itself in each pass; what it answers depends on it (`scale` > 0) or does not."""

    def __init__(self, what: str, scale: float) -> None:
        super().__init__()
        self.inner, self.what, self.scale = toys.linear().net, what, scale
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.what == "weights":
            self.inner[1].weight.data.mul_(1 - self.scale)
        elif self.what == "data":
            self.calls.data.add_(1)
        else:
            self.calls = self.calls + 1
        return self.inner(x) * (1 + self.scale * self.calls)


@pytest.mark.parametrize("what", ["weights", "data", "new"])
def test_a_network_whose_state_moves_its_answers_is_refused(what):
    """Each pass moves the logits by 1e-5 of themselves: too little for two passes to differ, 1 % after 1,000."""
    model, x = Classifier(Stateful(what, 1e-5), shape=(1, 4, 4), num_classes=3).eval(), toys.images((1, 4, 4))
    before = digest_state(model.state_dict())
    with pytest.raises(ModelError, match=r"earlier passes, got net\.(inner\.1\.weight|calls) changed"):
        check_steady(model, x)
    assert digest_state(model.state_dict()) == before
    check_steady(Classifier(Stateful(what, 0), shape=(1, 4, 4), num_classes=3).eval(), x)


@pytest.mark.usefixtures("untouched_rng")
def test_chance_is_not_taken_for_state():
    check_steady(
        Classifier(Function(lambda x: dropout(x.flatten(1)[:, :3], 0.5, True)), shape=(1, 4, 4), num_classes=3),
        toys.images((1, 4, 4)),
    )


# --- logits of another dtype -----------------------------------------------------------------------------------------


def _autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return toys.linear().net(x)


DTYPES = {
    "autocast": _autocast,
    "float16": lambda x: toys.linear().net(x).half(),
    "bfloat16": lambda x: toys.linear().net(x).bfloat16(),
    "float64": lambda x: toys.linear().double().net(x.double()),
}


@pytest.mark.parametrize("name", DTYPES)
def test_logits_have_the_dtype_of_the_images(name):
    """float32 in and out, with gradients, near the logits in float64 by the rounding of the network's own dtype."""
    model, x = Classifier(Function(DTYPES[name]), shape=(1, 4, 4), num_classes=3), toys.images((1, 4, 4), 40)
    exact = toys.linear().double()(x.double())
    z = model(x)
    assert z.dtype == torch.float32
    assert torch.allclose(z.double(), exact, atol={"float64": 1e-6, "float16": 2e-3}.get(name, 0.05))
    assert gradients(model, x).dtype == torch.float32
    y, threat = exact.argmax(1), Threat(norm="linf", eps=0.02)
    found = attack_batch(model, x, y, threat, "pgd", {"steps": 5})
    distance = toys.radius(toys.linear(), x, y, "linf")
    sure = (exact.topk(2).values.diff().abs()[:, 0] > 0.1) & ((distance - 0.02).abs() > 0.005)
    assert int(sure.sum()) > 10 and torch.equal(found.broken[sure], (distance < 0.02)[sure])


def test_float64_stays_float64():
    model, x = toys.linear().double(), toys.images((1, 4, 4)).double()
    assert model(x).dtype == torch.float64
    weight, bias = toys.affine(model)
    assert torch.allclose(model(x), x.flatten(1) @ weight.T + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_probabilities_of_another_dtype_become_logits(dtype):
    """A float64 softmax keeps odds of e^30, which float32 rounds to certainty; float16 keeps three digits."""
    gap = 30.0 if dtype == torch.float64 else 3.0
    z = torch.tensor([[gap, 0.0]], dtype=torch.float64)
    model = Classifier(
        Function(lambda x: z.softmax(1)[:, :1].to(dtype)), shape=(1, 2), num_classes=2, output="probabilities"
    )
    found = model(torch.zeros(1, 1, 2))
    assert found.dtype == torch.float32 and float(found[0, 1]) == pytest.approx(gap, rel=1e-2)


def test_counts_of_votes_are_logits():
    votes = torch.tensor([[3, 1, 0], [0, 0, 4]])
    z = Classifier(Function(lambda x: votes), shape=(1, 2), num_classes=3)(torch.zeros(2, 1, 2))
    assert z.dtype == torch.float32 and z.tolist() == votes.tolist()


# --- a forward pass that fails ---------------------------------------------------------------------------------------


def _asserts(x):
    assert x.shape[1] == 3


def _bright(x):
    raise ValueError("too bright\nand more")


def _deep(net, at: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Identity() for _ in range(at)], net, nn.Flatten())


class Nothing(nn.Module):
    pass


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Conv2d(3, 4, 3), r"RuntimeError in layer net\.2 \(Conv2d\): Given groups=1.*channels.*which channels"),
        (nn.Linear(7, 3), r"RuntimeError in layer net\.2 \(Linear\): mat1 and mat2"),
        (nn.Linear(4, 3, dtype=torch.float64), r"RuntimeError in layer net\.2 \(Linear\): .*dtype"),
        (Nothing(), r"NotImplementedError in layer net\.2 \(Nothing\)"),
        (nn.Bilinear(4, 4, 3), r"TypeError in layer net\.2 \(Bilinear\): .*missing 1 required"),
        (Function(_asserts), r"AssertionError in layer net\.2 \(Function\).*; run"),
        (Function(_bright), r"ValueError in layer net\.2 \(Function\): too bright; run"),
        (Function(lambda x: {}["pixel_values"]), r"KeyError in layer net\.2 \(Function\): 'pixel_values'"),
        (Function(lambda x: nn.Linear(3, 3)(x)), r"RuntimeError in a Linear inside layer net\.2 \(Function\)"),
        (Function(lambda x: next(iter(()))), r"StopIteration in layer net\.2 \(Function\)"),
    ],
)
def test_a_failing_pass_names_layer_images_and_cause(net, message):
    model = Classifier(_deep(net, 2), shape=(1, 4, 4), num_classes=3).eval()
    with pytest.raises(ModelError, match=rf"a batch of shape \(5, 1, 4, 4\), got {message}") as caught:
        model(torch.zeros(5, 1, 4, 4))
    assert caught.value.__cause__ is not None and "\n" not in str(caught.value)


class Remembers(nn.Module):
    """Adds a hundredth of what it answered before, as recurrent networks with a state do."""

    def forward(self, x):
        vars(self).setdefault("state", torch.zeros(len(x), 3)).mul_(0.01).add_(x.flatten(1)[:, :3].detach())
        return x.flatten(1)[:, :3] + self.state


@pytest.mark.parametrize(
    ("net", "first", "fails", "sizes"),
    [
        (Function(lambda x: x.reshape(16, 16)[:, :3]), 16, 5, "batches of 16:"),
        (Function(lambda x: x.reshape(1, 16)[:, :3]), 1, 5, "batches of 1:"),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False)), None, 1, "batches of 2, 3, 4"),
        (Remembers(), 8, 3, "batches of 8:"),
    ],
    ids=["sixteen", "one", "batch norm", "state"],
)
def test_a_failing_pass_names_the_batches_that_work(net, first, fails, sizes):
    model = Classifier(net, shape=(1, 4, 4), num_classes=3).eval()
    if first is not None:
        model(torch.rand(first, 1, 4, 4))
    with pytest.raises(ModelError, match=f"it runs on {sizes}"):
        model(torch.rand(fails, 1, 4, 4))


@pytest.mark.parametrize(
    "error",
    [Cancelled(), ThreatError("x"), MemoryError(), torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory")],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_the_network_passes_unchanged(error):
    def run(x):
        raise error

    with pytest.raises(type(error)) as caught:
        Classifier(Function(run), shape=(1, 2), num_classes=2)(torch.zeros(1, 1, 2))
    assert caught.value is error


def _without_numbers(kind: str) -> nn.Module:
    if kind == "lazy weights":
        return nn.LazyLinear(3)
    if kind == "lazy statistics":
        return nn.LazyBatchNorm1d()
    with torch.device("meta"):
        return nn.Linear(16, 3) if kind == "meta weights" else nn.BatchNorm1d(16, affine=False)


@pytest.mark.parametrize("kind", ["lazy weights", "lazy statistics", "meta weights", "meta statistics"])
def test_weights_without_numbers_are_refused(kind):
    net = nn.Sequential(nn.Flatten(), _without_numbers(kind))
    with pytest.raises(ModelError, match=rf"hold numbers, got 1\.\w+, which is .*{kind.split()[0]}"), frozen(net):
        pass


class Members(nn.Module):
    def __init__(self, members) -> None:
        super().__init__()
        self.members = members


@pytest.mark.parametrize(
    ("members", "name"),
    [
        ([nn.Linear(2, 2)], r"members\[0\] \(Linear\)"),
        ({"a": (nn.ReLU(), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2)))}, r"members\['a'\]\[1\]\.1 \(BatchNorm1d\)"),
        ([Members([nn.Linear(2, 2)])], r"members\[0\]\.members\[0\] \(Linear\)"),
    ],
    ids=["list", "dict of tuples", "list in a list"],
)
def test_layers_with_weights_that_eval_does_not_reach_are_refused(members, name):
    with pytest.raises(ModelError, match=rf"inference mode, got {name} in training mode"), frozen(Members(members)):
        pass


def test_hidden_layers_are_frozen_where_nothing_is_lost():
    """Those without weights are put into inference mode; a list of layers that torch knows hides nothing."""
    model = Members([nn.Dropout(0.5), {"act": nn.ReLU()}])
    model.layer = nn.Linear(2, 2)
    model.order = [model.layer]
    with frozen(model):
        assert not model.members[0].training and not model.layer.training
    assert model.members[0].training and model.layer.training
    model = Members([nn.Linear(2, 2).eval()])
    with frozen(model):
        assert not model.members[0].training
    model = Members([nn.BatchNorm1d(2)])  # hidden, but its weights are registered elsewhere
    model.weights = nn.ParameterList(model.members[0].parameters())
    for name, buffer in model.members[0].named_buffers():
        model.register_buffer(name, buffer)
    with frozen(model):
        assert not model.members[0].training


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.float8_e4m3fn, torch.uint16, torch.bool, torch.float64])
def test_frozen_puts_back_buffers_of_any_dtype(dtype):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("odd", torch.tensor([0.0, 1.0, 0.0]).to(dtype))
            self.register_buffer("undefined", torch.full((3,), torch.nan))

        def forward(self, x):
            self.odd.copy_(torch.ones(3).to(dtype))
            self.undefined.fill_(0)
            return x

    net = Holding()
    with frozen(net):
        net(torch.zeros(1))
    assert net.odd.to(torch.complex64).real.tolist() == [0, 1, 0] and bool(net.undefined.isnan().all())


@pytest.mark.filterwarnings("ignore:(Sparse CSR|torch.quantize_per_tensor)")
@pytest.mark.parametrize("kind", ["sparse", "csr", "quantised"])
def test_frozen_puts_back_buffers_that_are_no_dense_tensors(kind):
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("dense", torch.ones(2))
            self.register_buffer("other", made())

        def forward(self, x):
            self.dense += 1
            self.other = torch.zeros(2) if kind == "quantised" else self.other.mul_(2)
            return x

    def made():
        if kind == "quantised":
            return torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)
        return torch.eye(2).to_sparse() if kind == "sparse" else torch.eye(2).to_sparse_csr()

    model = Holding()
    with frozen(model):
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert model.dense.tolist() == [1, 1] and model.other.layout == made().layout
    values = model.other.dequantize() if kind == "quantised" else model.other.to_dense()
    assert torch.equal(values, made().dequantize() if kind == "quantised" else torch.eye(2))


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize(
    ("output", "classes"),
    [
        (lambda x: torch.zeros(2 * len(x), 1), 2),
        (lambda x: torch.zeros(3, len(x)), 3),
        (lambda x: torch.zeros(10 * len(x), 3), 3),
        (lambda x: torch.zeros(10 * len(x), 3, 1, 1), 3),
        (lambda x: torch.zeros(5 * len(x)), 2),
        (lambda x: torch.zeros(0, 3), 3),
    ],
    ids=["column", "turned", "crops", "crops of maps", "flat crops", "none"],
)
def test_several_rows_for_an_image_are_refused_for_one_image_too(output, classes, n):
    with pytest.raises(ModelError, match=f"one row per image, got shape .* for {n} images"):
        Classifier(Function(output), shape=(1, 2), num_classes=classes)(torch.zeros(n, 1, 2))


@pytest.mark.parametrize("n", [0, 2, 3])
def test_one_number_for_a_batch_is_refused(n):
    model = Classifier(Function(lambda x: x.sum()), shape=(1, 2), num_classes=2)
    with pytest.raises(ModelError, match=rf"one row per image, got shape \(\) for {n} images"):
        model(torch.zeros(n, 1, 2))


def test_a_squeezed_image_gets_one_verdict():
    inner = toys.linear()
    model = Classifier(Function(lambda x: inner.net(x).squeeze()), shape=(1, 4, 4), num_classes=3)
    x = toys.images((1, 4, 4), 5)
    y, threat = toys.labels(inner, x), Threat(norm="linf", eps=0.05)
    for k in range(5):
        found = attack_batch(model, x[k : k + 1], y[k : k + 1], threat, "pgd", {"steps": 5})
        assert found.broken.tolist() == (toys.radius(inner, x, y, "linf") < 0.05)[k : k + 1].tolist()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (lambda z: z.to_sparse(), "sparse_coo"),
        (lambda z: torch.complex(z, z), "complex64"),
        (lambda z: torch.quantize_per_tensor(z, 0.1, 0, torch.qint8), "qint8"),
    ],
    ids=["sparse", "complex", "quantised"],
)
def test_outputs_that_are_no_plain_numbers_are_refused(output, kind):
    model = Classifier(Function(lambda x: output(torch.zeros(len(x), 3))), shape=(1, 2), num_classes=3)
    with pytest.raises(ModelError, match=rf"plain tensor of real numbers, got .*{kind}"):
        model(torch.zeros(2, 1, 2))


# --- the toys, because every later suite trusts them -----------------------------------------------------------------


@pytest.mark.usefixtures("untouched_rng")
@pytest.mark.parametrize("shape", toys.SHAPES)
def test_toys_are_made_from_their_seed_alone(shape):
    for make in (toys.linear, toys.squashed, toys.probabilities, toys.smooth, toys.conv, toys.dropout):
        one, two, other = make(shape, 4, 3), make(shape, 4, 3), make(shape, 4, 4)
        assert digest_state(one.state_dict()) == digest_state(two.state_dict()) != digest_state(other.state_dict())
        x = toys.images(shape, 64)
        labels = toys.labels(one, x)
        assert len(labels.unique()) >= 2, "images of several classes"
        assert one.training == (make is toys.dropout or one.training)
        if make is not toys.dropout:
            assert bool(gradients(one.eval(), x[:2]).flatten(2).any(2).all()), "no gradient is zero"
    assert not torch.equal(toys.images(shape, seed=0), toys.images(shape, seed=1))


def test_the_constant_toy_has_a_gradient_of_zero():
    model, x = toys.constant(classes=4), toys.images((1, 4, 4))
    assert torch.equal(model(x), torch.tensor([[0.0, -1.0, -2.0, -3.0]]).expand(8, 4))
    assert not gradients(model, x).any()
    assert bool(toys.radius(model, x, toys.labels(model, x), "l2").isinf().all())


def test_training_mode_changes_the_toys_that_have_one():
    x = toys.images((1, 4, 4))
    for model in (toys.conv(), toys.dropout()):
        with torch.random.fork_rng():
            assert not torch.allclose(model.train()(x), model.eval()(x), atol=1e-3)


def test_a_box_that_is_active_is_noticed():
    model = toys.linear()
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(AssertionError, match="the box is active"):
        toys.radius(model, x, model(x).argmax(1), "l1")


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).sum(1)


@pytest.mark.parametrize(
    ("text", "number"), [("cat", 0), ("1", 2), ("0", 0), ("2", 2), ("dog", None), ("3", None), ("", None)]
)
def test_a_class_is_named_or_numbered_and_the_name_wins(text, number):
    assert class_number(text, ("cat", "owl", "1")) == number
