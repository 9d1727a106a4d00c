"""The networks against the published layouts, by shapes and parameter counts worked out by hand."""

import pytest
import torch
from torch import nn

from rempart.core.errors import ModelError, SpecError
from rempart.core.model import Normalize, accelerated, frozen
from rempart.models import build, models

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def sizes(model, shape):
    """Output shapes of all convolution, pooling and linear layers, in the order they run."""
    seen = []
    kinds = (nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(
                lambda module, _, out: seen.append((type(module).__name__, tuple(out.shape[1:])))
            )
    with torch.no_grad():
        model(torch.zeros(2, *shape))
    return seen


LAYOUTS = {
    "mlp": ((1, 28, 28), [("Linear", (500,)), ("Linear", (150,)), ("Linear", (10,))]),
    "lenet": (
        (1, 28, 28),
        [
            ("Conv2d", (20, 24, 24)),
            ("MaxPool2d", (20, 12, 12)),
            ("Conv2d", (50, 8, 8)),
            ("MaxPool2d", (50, 4, 4)),
            ("Linear", (500,)),
            ("Linear", (10,)),
        ],
    ),
    "convnet": (
        (3, 32, 32),
        [
            ("Conv2d", (32, 32, 32)),
            ("MaxPool2d", (32, 16, 16)),
            ("Conv2d", (32, 16, 16)),
            ("AvgPool2d", (32, 8, 8)),
            ("Conv2d", (64, 8, 8)),
            ("AvgPool2d", (64, 4, 4)),
            ("AdaptiveAvgPool2d", (64, 4, 4)),
            ("Conv2d", (64, 1, 1)),
            ("Conv2d", (10, 1, 1)),
        ],
    ),
    "nin": (
        (3, 32, 32),
        [
            ("Conv2d", (192, 32, 32)),
            ("Conv2d", (160, 32, 32)),
            ("Conv2d", (96, 32, 32)),
            ("MaxPool2d", (96, 16, 16)),
            ("Conv2d", (192, 16, 16)),
            ("Conv2d", (192, 16, 16)),
            ("Conv2d", (192, 16, 16)),
            ("AvgPool2d", (192, 8, 8)),
            ("Conv2d", (192, 8, 8)),
            ("Conv2d", (192, 8, 8)),
            ("Conv2d", (10, 8, 8)),
            ("AdaptiveAvgPool2d", (10, 1, 1)),
        ],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_have_the_published_sizes(name):
    shape, expected = LAYOUTS[name]
    assert sizes(build(name, shape=shape, num_classes=10), shape) == expected


def test_relus_stand_where_the_papers_have_them():
    kinds = {
        name: [type(m).__name__ for m in build(name, shape=s, num_classes=10).net[1]]
        for name, (s, _) in LAYOUTS.items()
    }
    assert kinds["lenet"] == ["Conv2d", "MaxPool2d", "Conv2d", "MaxPool2d", "Flatten", "Linear", "ReLU", "Linear"]
    assert kinds["convnet"][:6] == ["Conv2d", "MaxPool2d", "ReLU", "Conv2d", "ReLU", "AvgPool2d"]
    assert kinds["nin"][-4:] == ["ReLU", "Conv2d", "AdaptiveAvgPool2d", "Flatten"]  # no ReLU after the last


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        ("mlp", (1, 28, 28), 10, 784 * 500 + 500 + 500 * 150 + 150 + 1510),  # 469,160
        ("lenet", (1, 28, 28), 10, 431_080),  # 520 + 25,050 + 400,500 + 5,010
        ("convnet", (3, 32, 32), 10, 2_432 + 25_632 + 51_264 + 65_600 + 650),
        ("nin", (3, 32, 32), 10, 966_986),  # 14,592 + 30,880 + 15,456 + 460,992 + 3 * 37,056 + 331,968 + 1,930
        ("resnet18", (3, 32, 32), 10, 11_173_962),  # as in the CIFAR literature
        ("mri-cnn", (1, 128, 128), 4, 432 + 4_672 + 18_560 + 73_984 + 516),
    ],
)
def test_parameters_are_as_counted_by_hand(name, shape, classes, count):
    assert sum(p.numel() for p in build(name, shape=shape, num_classes=classes).parameters()) == count


def test_resnet_halves_three_times():
    seen = sizes(build("resnet18", shape=(3, 32, 32), num_classes=10, options={"width": 4}), (3, 32, 32))
    convs = [size for kind, size in seen if kind == "Conv2d"]
    assert len(convs) == 17 + 3  # the 17 of the name, and three shortcuts
    assert convs[0] == (4, 32, 32) and convs[-1] == (32, 4, 4)


@pytest.mark.parametrize("entry", models, ids=lambda entry: entry.name)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 17, 40), (2, 64, 33)])
@pytest.mark.parametrize("classes", [2, 7])
def test_any_shape_and_number_of_classes(entry, shape, classes):
    small = {"width": 4} if "width" in entry.params.model_fields else {}
    model = build(entry.name, shape=shape, num_classes=classes, options=small).eval()
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    z = model(x)
    assert z.shape == (3, classes)
    z.square().sum().backward()
    assert bool((x.grad.flatten(1).abs().sum(1) > 0).all())  # every image reaches the logits


@pytest.mark.parametrize("name", ["mlp", "lenet", "convnet"])
def test_eight_by_eight_digits_fit(name):
    assert build(name, shape=(1, 8, 8), num_classes=10)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(("name", "shape"), [("lenet", (1, 3, 9)), ("mri-cnn", (1, 8, 8)), ("mlp", (28, 28))])
def test_too_small_images_are_refused(name, shape):
    with pytest.raises(ModelError, match="expected"):
        build(name, shape=shape, num_classes=2)


def test_unknown_options_are_refused():
    with pytest.raises(SpecError, match="did you mean 'width'"):
        build("resnet18", shape=(3, 32, 32), num_classes=10, options={"widht": 3})


def test_weights_depend_on_the_seed_alone(untouched_rng):
    first, again, other = (
        build("lenet", shape=(1, 28, 28), num_classes=10, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["net.1.0.weight"], other["net.1.0.weight"])


def test_normalisation_is_inside():
    model = build("mlp", shape=(2, 4, 4), num_classes=3, mean=[0.25, 0.5], std=[0.5, 2.0])
    x = torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    by_hand = (x - torch.tensor([0.25, 0.5]).view(2, 1, 1)) / torch.tensor([0.5, 2.0]).view(2, 1, 1)
    assert isinstance(model.net[0], Normalize)
    torch.testing.assert_close(model(x), model.net[1](by_hand))


@pytest.mark.parametrize(("name", "options"), [("resnet18", {"width": 8}), ("mri-cnn", {"width": 4})])
def test_batch_norms_are_really_folded(name, options):
    model = build(name, shape=(1, 32, 32), num_classes=4, options=options, mean=[0.3], std=[0.2])
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():  # statistics that make folding visible
        if isinstance(module, NORMS):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    x = torch.rand(4, 1, 32, 32, generator=generator)
    with frozen(model):
        fast = accelerated(model)
        assert not any(isinstance(module, NORMS) for module in fast.modules())
        assert torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-4)
