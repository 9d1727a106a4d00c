"""Captured activations against networks run by hand, and sensitivity against numbers worked out on paper."""

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

import toys
from rempart.core.errors import DataError, ModelError
from rempart.core.features import Moved, blocks, change, features, hidden, moved, penultimate, sensitivity
from rempart.models import build

GENERATOR = torch.Generator().manual_seed(0)
BLOCKS = {  # name: shape, outputs of the blocks, outputs behind the pooling, last layer, all within `net.1`
    "mlp": ((1, 8, 8), "2 4", "2 4", "5"),
    "lenet": ((1, 16, 16), "1 3 6", "1 3 6", "7"),
    "convnet": ((3, 8, 8), "2 4 7 11", "2 5 9 11", "12"),
    "nin": ((3, 8, 8), "1 3 5 9 11 13 17 19", "1 3 6 9 11 14 17 19", "20"),
    "mri-cnn": ((1, 16, 16), "0.2 2.2 4.2 6.2", "1 3 5 7", "9"),
    "resnet18": (
        (1, 8, 8),
        "0.2 " + " ".join(f"{i}.{j}.{part}" for i in (1, 2, 3, 4) for j in (0, 1) for part in ("first.2", "relu")),
        "0.2 " + " ".join(f"{i}.{j}.{part}" for i in (1, 2, 3, 4) for j in (0, 1) for part in ("first.2", "relu")),
        "7",
    ),
}
BLOCKS["resnet18"] = (*BLOCKS["resnet18"][:2], BLOCKS["resnet18"][2].removesuffix("4.1.relu") + "5", "7")


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_the_zoo_are_found(name):
    shape, plain, pooled, head = BLOCKS[name]
    model = build(name, shape=shape, num_classes=3, options={"width": 2} if name in ("resnet18", "mri-cnn") else {})
    assert blocks(model) == [f"net.1.{part}" for part in plain.split()]
    assert blocks(model, pooled=True) == [f"net.1.{part}" for part in pooled.split()]
    assert penultimate(model) == f"net.1.{head}:input"
    order = []
    for layer in blocks(model):
        model.get_submodule(layer).register_forward_hook(lambda *_, layer=layer: order.append(layer))
    model.eval()(torch.rand(2, *shape, generator=GENERATOR))
    assert list(dict.fromkeys(order)) == blocks(model)  # they run in this order


class Functional(nn.Module):
    """conv - batch norm - relu - pool - dense - relu - dense, with relu as a function."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.MaxPool2d(2)
        self.hidden, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.conv(x)), inplace=True))
        return self.head(F.relu(self.hidden(x.flatten(1))))


def test_activations_called_as_functions_leave_the_last_modules_with_parameters():
    assert blocks(Functional()) == blocks(Functional(), pooled=True) == ["norm", "hidden"]
    assert penultimate(Functional()) == "head:input"


def test_a_network_of_one_layer_has_no_blocks_and_one_without_weights_no_last_layer():
    assert blocks(toys.linear()) == [] and penultimate(toys.linear()) == "net.1:input"
    with pytest.raises(ModelError, match="layers with weights"):
        penultimate(nn.Sequential(nn.Flatten(), nn.ReLU()))


def test_captured_values_are_those_of_the_layers_run_one_by_one():
    model = build("lenet", shape=(1, 16, 16), num_classes=3, mean=[0.3], std=[0.5])
    x = torch.rand(4, 1, 16, 16, generator=GENERATOR)
    with features(model, [*blocks(model), penultimate(model)]) as seen:
        z = model(x)
    assert torch.equal(z, model(x))
    point, expected = (x - 0.3) / 0.5, {}
    for number, layer in enumerate(model.net[1]):
        expected[f"net.1.{number}:input"] = point
        point = expected[f"net.1.{number}"] = layer(point)
    assert all(torch.allclose(seen[name], expected[name], atol=1e-6) for name in seen) and len(seen) == 4


def test_the_graph_goes_on_from_what_is_captured():
    """dz_k / d(input of the last layer) is row k of its weight; through a ReLU, where its input is positive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    with features(model, ["0", "1", "2:input"]) as seen:
        z = model(torch.rand(5, 3, generator=GENERATOR))
    slopes = torch.autograd.grad(z[:, 1].sum(), list(seen.values()), create_graph=True)
    row = model[2].weight[1].expand(5, 4)
    assert torch.equal(slopes[1], row) and torch.equal(slopes[2], row)
    assert torch.equal(slopes[0], row * (seen["0"] > 0))
    slopes[1].sum().backward()  # and on into the weights
    assert torch.equal(model[2].weight.grad, torch.tensor([[0.0] * 4, [5.0] * 4]))


def test_operations_in_place_do_not_reach_what_is_captured():
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.rand(3, 1, 4, 4, generator=GENERATOR)
    with features(model, ["norm"]) as seen:
        z = model(x)
    before = model.norm(model.conv(x))
    assert bool((before < 0).any()) and torch.equal(seen["norm"], before) and torch.equal(z, model(x))
    relu, x = nn.ReLU(inplace=True), torch.tensor([[-1.0, 1.0]])
    with features(nn.Sequential(relu), ["0:input"]) as seen:
        z = relu(x)
    assert torch.equal(seen["0:input"], torch.tensor([[-1.0, 1.0]])) and torch.equal(z, torch.tensor([[0.0, 1.0]]))


def test_of_several_passes_and_calls_the_last_counts():
    layer = nn.Linear(2, 2)
    with features(nn.Sequential(layer, layer), ["0"]) as seen:
        once = layer(torch.ones(1, 2))
        z = nn.Sequential(layer, layer)(torch.ones(1, 2))
    assert torch.equal(seen["0"], z) and not torch.equal(seen["0"], once)


def test_nothing_is_left_behind_also_after_an_error():
    model = build("mlp", shape=(1, 2, 2), num_classes=3)
    with pytest.raises(RuntimeError, match="planted"), features(model, [*blocks(model), penultimate(model)]):
        raise RuntimeError("planted")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("layer", ["net.1.22", "net.1.2:output", "conv"])
def test_unknown_layers_are_refused(layer):
    model = build("mlp", shape=(1, 2, 2), num_classes=3)
    with pytest.raises(ModelError, match="the name of a layer"), features(model, ["net.1.2", layer]):
        pass
    assert not any(m._forward_hooks for m in model.modules())


def test_a_layer_that_gives_no_tensor_is_refused():
    model = nn.Sequential(nn.LSTM(2, 2))
    with pytest.raises(ModelError, match="one tensor"), features(model, ["0"]):
        model(torch.ones(1, 1, 2))


def test_names_are_the_same_under_a_wrapper():
    model = build("mlp", shape=(1, 2, 2), num_classes=3)
    wrapped, x = Fabric(accelerator="cpu", devices=1).setup_module(model), torch.rand(2, 1, 2, 2, generator=GENERATOR)
    assert (blocks(wrapped), penultimate(wrapped)) == (blocks(model), penultimate(model))
    with features(wrapped, blocks(model)) as seen, features(model, blocks(model)) as also:
        wrapped(x)
    assert seen.keys() == also.keys() and all(torch.equal(seen[name], also[name]) for name in seen)
    own = nn.Module()  # a network that has a part named so
    own.module, own.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)
    assert blocks(own) == ["module.1"]


# ---- sensitivity


X = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).view(2, 1, 1, 2)
X_ADV = torch.tensor([[2.0, 0.0], [0.5, 1.0]]).view(2, 1, 1, 2)
# first image: maps (1, 2), (0.5, 0) -> (2, 0), (0, 1.5), means of the change 1.5 and 1
# second: maps (0, 1), (1.5, 0.5) -> (0.5, 1), (1, 0.5), means of the change 0.25 and 0.25
# dense, first: relu(3.5 - 3), 2 -> relu(3.5 - 3), 4; second: relu(3 - 3), 0 -> relu(3 - 3), 1
SIGMA = {"1": [0.875, 0.625], "4": [0.0, 1.5]}


def as_lists(sigma):
    return {layer: pytest.approx(values.tolist(), abs=1e-6) for layer, values in sigma.items()}


def test_sensitivity_is_that_worked_out_by_hand():
    net = toys.two_layers().train()
    sigma = sensitivity(net, [(X, X_ADV)], blocks(net))
    assert as_lists(sigma) == SIGMA
    assert as_lists(sensitivity(net, [(X, X_ADV)] * 3, blocks(net))) == SIGMA
    assert all(values.dtype == torch.float64 and not values.requires_grad for values in sigma.values())


def test_measuring_leaves_the_model_as_it_was():
    model, x = Functional().train(), torch.rand(3, 1, 4, 4, generator=GENERATOR)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sigma = sensitivity(model, [(x, x.flip(3))], ["hidden"])["hidden"]
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(sigma, sensitivity(model.eval(), [(x, x.flip(3))], ["hidden"])["hidden"])  # in inference mode


def test_change_of_maps_and_of_dense_outputs():
    before, after = torch.zeros(1, 2, 2, 2), torch.tensor([[[[1.0, -1], [0, 2]], [[0, 0], [0, -4]]]])
    assert torch.equal(change(before, after), torch.tensor([[1.0, 1.0]]))
    assert torch.equal(change(before[:, :, 0, 0], after[:, :, 0, 1]), torch.tensor([[1.0, 0.0]]))


def pairs(n=7):
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_batch_size_does_not_matter(size):
    model = build("lenet", shape=(1, 8, 8), num_classes=3)
    x, x_adv = pairs()
    whole = sensitivity(model, [(x, x_adv)], blocks(model))
    parts = sensitivity(model, zip(x.split(size), x_adv.split(size), strict=True), blocks(model))
    assert all(torch.allclose(whole[layer], parts[layer], rtol=1e-5) for layer in whole) and len(whole) == 3


def test_identical_pairs_have_none_and_scaling_and_permuting_a_layer_carry_over():
    model = build("lenet", shape=(1, 8, 8), num_classes=3)
    x, x_adv = pairs()
    layer, first, second = "net.1.1", model.net[1][0], model.net[1][2]
    assert not sensitivity(model, [(x, x)], [layer])[layer].any()
    sigma = sensitivity(model, [(x, x_adv)], blocks(model))
    order = torch.randperm(20, generator=GENERATOR)
    with torch.no_grad():
        for parameter in (first.weight, first.bias):
            parameter.copy_(3 * parameter[order])
        second.weight.copy_(second.weight[:, order] / 3)
    moved = sensitivity(model, [(x, x_adv)], blocks(model))
    assert torch.allclose(moved[layer], 3 * sigma[layer][order], rtol=1e-5)
    assert torch.allclose(moved["net.1.3"], sigma["net.1.3"], rtol=1e-4)


# ---- sums over pairs


def test_relative_sensitivity_is_that_worked_out_by_hand():
    """Clean means of the maps: (1.5 + 0.5) / 2 and (0.25 + 1) / 2; of the dense outputs (0.5 + 0) / 2 and 2 / 2."""
    net = toys.two_layers()
    sums = moved(net, [(X[:1], X_ADV[:1]), (X[1:], X_ADV[1:])], blocks(net))
    assert as_lists({layer: found.relative for layer, found in sums.items()}) == {"1": [0.875, 1.0], "4": [0.0, 1.5]}
    assert as_lists({layer: found.absolute for layer, found in sums.items()}) == SIGMA
    assert {found.pairs for found in sums.values()} == {2}


def test_relative_sensitivity_is_0_where_nothing_moves_and_1_where_only_the_counterpart_wakes_a_neuron():
    x, x_adv = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 3, 2, 3]])
    found = moved(nn.Sequential(nn.Linear(4, 4)), [(x, x_adv)], ["0:input"])["0:input"]
    assert found.relative.tolist() == [0, 1, 0, 0.5] and found.absolute.tolist() == [0, 3, 0, 1]


def test_a_scale_of_a_layer_scales_the_absolute_and_not_the_relative_sensitivity():
    model = build("lenet", shape=(1, 8, 8), num_classes=3)
    x, x_adv = pairs()
    before = moved(model, [(x, x_adv)], ["net.1.1"])["net.1.1"]
    with torch.no_grad():
        for parameter in model.net[1][0].parameters():
            parameter.mul_(3)
    after = moved(model, [(x, x_adv)], ["net.1.1"])["net.1.1"]
    assert torch.allclose(after.absolute, 3 * before.absolute) and torch.allclose(after.relative, before.relative)
    assert bool((before.relative > 0).any())


def test_a_relu_in_place_behind_a_layer_does_not_matter():
    torch.manual_seed(0)
    dense, x, x_adv = nn.Linear(6, 8), torch.randn(5, 6, generator=GENERATOR), torch.randn(5, 6, generator=GENERATOR)
    found = moved(nn.Sequential(dense, nn.ReLU(inplace=True)), [(x, x_adv)], ["0"])["0"]
    with torch.no_grad():
        assert torch.allclose(found.absolute, (dense(x) - dense(x_adv)).abs().mean(0).double(), atol=1e-6)
        assert torch.allclose(found.clean, dense(x).abs().sum(0).double(), atol=1e-5)


def test_an_attack_that_makes_the_pairs_is_not_counted():
    model, (x, x_adv) = build("lenet", shape=(1, 8, 8), num_classes=3), pairs()

    def attacked():
        for part in zip(x.split(3), x_adv.split(3), strict=True):
            model(torch.rand(50, 1, 8, 8, generator=GENERATOR))  # as an attack does, of a size that would not even fit
            assert all(p.requires_grad for p in model.parameters())
            yield part
            model(x)

    expected = moved(model, [(x, x_adv)], blocks(model))
    for layer, found in moved(model, attacked(), blocks(model)).items():
        assert found.pairs == 7 and torch.allclose(found.absolute, expected[layer].absolute, rtol=1e-5)


def test_large_batches_are_parted():
    seen = []
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    x, x_adv = torch.rand(2, 150, 2, generator=GENERATOR)
    found = moved(model, [(x, x_adv)], ["0"])["0"]
    assert seen == [128, 128, 44] and found.pairs == 150
    assert torch.allclose(found.change, (model(x) - model(x_adv)).detach().abs().sum(0).double(), atol=1e-4)


class Twice(nn.Module):
    """One ReLU behind two layers of different width, as residual networks have it."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.second, self.head = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.relu(self.second(self.relu(self.first(x)))))


def test_of_a_layer_that_runs_twice_in_a_pass_the_last_time_counts():
    torch.manual_seed(0)
    model, (x, x_adv) = Twice(), torch.randn(2, 6, 3, generator=GENERATOR)
    found = moved(model, [(x, x_adv)], ["relu"])["relu"]
    with features(model, ["relu"]) as seen:
        model(x)
        before = seen["relu"]
        model(x_adv)
    assert found.pairs == 6 and torch.allclose(found.change, (before - seen["relu"]).abs().sum(0).double(), atol=1e-5)


def test_the_whole_layer_is_not_decided_by_neurons_that_hardly_ever_fire():
    sums = Moved(change=torch.tensor([1.0, 1.0, 0.5]), clean=torch.tensor([5.0, 4.999999, 1e-6]), pairs=10)
    assert sums.overall == pytest.approx(0.25) and float(sums.relative.mean()) > 1e5
    woken, dead = Moved(torch.tensor([1.0]), torch.zeros(1), 1), Moved(torch.zeros(1), torch.zeros(1), 1)
    assert (woken.overall, dead.overall) == (1, 0)


def test_a_network_that_multiplies_its_images_is_refused():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            views = torch.cat([x, x.flip(3)])
            return self.second(self.first(views.flatten(1))).view(2, len(x), 2).mean(0)

    x = torch.rand(6, 1, 2, 2)
    with pytest.raises(ModelError, match="24 of first for 12"):
        moved(Views().eval(), [(x, x)], ["first"])


def test_a_layer_that_runs_for_some_batches_alone_counts_their_pairs():
    class Bright(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            z = x.flatten(1)
            return self.second(self.first(z)) if float(x.mean()) > 0.5 else z[:, :2]

    torch.manual_seed(0)
    model = Bright().eval()
    bright, dark = (torch.rand(6, 1, 2, 2) / 2 + shift for shift in (0.5, 0.0))
    both = moved(model, [(bright, bright - 0.01), (dark, dark + 0.01)], ["first"])["first"]
    alone = moved(model, [(bright, bright - 0.01)], ["first"])["first"]
    assert both.pairs == alone.pairs == 6 and torch.equal(both.absolute, alone.absolute)


def test_no_pairs_and_layers_that_do_not_run_are_refused():
    model = build("mlp", shape=(1, 2, 2), num_classes=3)
    with pytest.raises(DataError, match="one pair"):
        moved(model, [], ["net.1.2"])
    model.idle = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="idle"):
        moved(model, [(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2))], ["net.1.2", "idle"])


def test_modules_before_the_logits_are_named_in_order():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2)), nn.Softmax(1))
    assert hidden(model) == ["0", "0.0", "0.1"]
