"""Pruned networks against those whose activations are masked while they run, and the command on a saved model."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from rempart import tasks
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.core.features import blocks, features, watched
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.explain import doubts, prune, prune_model, top
from rempart.models import build, load, save
from rempart.report import store
from rempart.report.schema import AttackChoice, AuditSpec, ExplainSpec
from test_cli import rempart

NETWORKS = {
    "lenet": ((1, 16, 16), {}),  # a pooling ends the block, there is no activation
    "convnet": ((3, 8, 8), {}),
    "mlp": ((1, 8, 8), {}),
    "mri-cnn": ((1, 16, 16), {"width": 4}),
    "resnet18": ((1, 8, 8), {"width": 4}),
}


WIDTHS = {"first": 24, "second": 24}


def network(name):
    """A network whose batch norms have statistics, scales and shifts of their own."""
    shape, options = NETWORKS[name]
    model = build(name, shape=shape, num_classes=3, options=options)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.2, 1, generator=generator)
    return model.eval()


def masks(model, layers, x):
    with features(model, layers) as seen, frozen(model):
        model(x)
    widths = {layer: seen[layer].shape[1] for layer in layers}
    return {layer: torch.arange(width) % 3 == 1 for layer, width in widths.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_is_the_one_with_masked_activations(name):
    model = network(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.rand(5, *model.shape, generator=torch.Generator().manual_seed(1))
    layers = [layer for layer in blocks(model) if not layer.endswith("relu")]
    neurons = masks(model, layers, x)

    def put(layer, value):
        return value * (~neurons[layer]).view(1, -1, *(1,) * (value.ndim - 2))

    with torch.no_grad():
        with watched(model, layers, put):
            expected = model(x)
        pruned = prune(model, neurons)
        assert torch.allclose(pruned(x), expected, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(model(x), expected, atol=1e-4)
        with features(pruned, layers) as seen:
            pruned(x)
    assert all(not seen[layer][:, mask].any() and seen[layer][:, ~mask].any() for layer, mask in neurons.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert pruned.state_dict().keys() == before.keys()


@pytest.mark.parametrize(("activation", "fine"), [(nn.ReLU(), True), (nn.Tanh(), True), (nn.Sigmoid(), False)])
def test_an_activation_that_is_not_0_at_0_is_refused(activation, fine):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), activation, nn.Linear(6, 2))
    model = Classifier(net, shape=(1, 2, 2), num_classes=2)
    neurons = {"net.2": torch.arange(6) == 2}
    if fine:
        assert not prune(model, neurons).net[1].weight[2].any()
        return
    with pytest.raises(ModelError, match=r"neurons of net.2 that give 0 .* got up to 0.5"):
        prune(model, neurons)


def test_residual_sums_inputs_and_what_goes_around_are_refused():
    model = network("resnet18")
    for layer in (layer for layer in blocks(model)[1:] if layer.endswith("relu")):
        with pytest.raises(ModelError, match="give 0 without weights"):
            prune(model, {layer: torch.ones(8 * model.net[1][0][0].out_channels).bool()[: width(model, layer)]})
    with pytest.raises(ModelError, match="behind a layer with weights"):
        prune(network("lenet"), {"net.1.7:input": torch.ones(500).bool()})
    with pytest.raises(ModelError, match="behind a layer with weights"):
        prune(network("lenet"), {"net.0": torch.ones(1).bool()})
    with pytest.raises(ModelError, match=r"20 neurons in net\.1\.1.*got 3"):
        prune(network("lenet"), {"net.1.1": torch.ones(3).bool()})


class Around(nn.Module):
    """The layer in front of the activation is also seen directly by the last one."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.head = nn.Linear(4, 3), nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x):
        value = self.first(x.flatten(1))
        return self.head(torch.cat([value, self.relu(value)], 1))


def test_a_layer_that_something_goes_around_is_refused():
    torch.manual_seed(0)
    model = Classifier(Around(), shape=(1, 2, 2), num_classes=2)
    with pytest.raises(ModelError, match="nothing goes around"):
        prune(model, {"net.relu": torch.tensor([True, False, True])})


def width(model, layer):
    with features(model, [layer]) as seen, torch.no_grad():
        model(torch.rand(1, *model.shape))
    return seen[layer].shape[1]


# ---- the command


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """A small network fitted to the digits, and an explain run on it and another."""
    folder = tmp_path_factory.mktemp("prune")
    for seed in (0, 1):
        model = build("mlp", shape=(1, 8, 8), num_classes=10, options=WIDTHS, seed=seed)
        fit(model)
        save(model, folder / f"m{seed}", name="mlp", options=WIDTHS)
    spec = ExplainSpec(
        models=(str(folder / "m0"), str(folder / "m1")),
        data="digits:train[:40]",
        threat="linf:0.05",
        attacks=(AttackChoice(name="fgsm"),),
        test=4,
        draws=2,
        out=str(folder / "run"),
    )
    tasks.run(spec)
    return folder


def fit(model):
    from rempart.data import open_data

    data = open_data("digits:train[:400]")
    x, y = data.read(data.index), data.labels
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    model.eval()


@pytest.mark.parametrize("model", [0, 1])
def test_a_saved_model_is_pruned_by_its_own_sensitivities(explained, tmp_path, model):
    source = explained / f"m{model}"
    told = store.read_explained(explained / "run")[model]
    found = prune_model(str(source), explained / "run", tmp_path / "out", share=0.25, layers=["*.4"])
    (layer,) = (layer for layer in told.layers if layer.name.endswith(".4"))
    expected = torch.tensor(layer.absolute).argsort(descending=True)[:6].tolist()
    assert found == {layer.name: sorted(expected)}
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(24).index_fill(0, torch.tensor(expected), 1)
    with torch.no_grad(), watched(original := load(str(source)), [layer.name], lambda _, value: value * (1 - mask)):
        wanted = original(x)
    with torch.no_grad():
        assert torch.allclose(load(str(tmp_path / "out"))(x), wanted, atol=1e-6)
    record = json.loads((tmp_path / "out" / "config.json").read_text())["training"]["pruned"]
    assert record["neurons"] == found and record["choose"] == "sensitive"


def test_of_models_with_the_same_weights_and_other_code_each_keeps_its_own(explained, tmp_path):
    """Two that differ in their answers alone are told apart; one of neither is refused."""
    report = store.read(explained / "run")
    first = report.explained[0]
    known = first.model
    fake = first.model_copy(
        update={
            "model": known.model_copy(update={"answers": tuple(-a for a in known.answers)}),
            "layers": tuple(layer.model_copy(update={"absolute": layer.absolute[::-1]}) for layer in first.layers),
        }
    )
    source = str(explained / "m0")
    store.write(report.model_copy(update={"explained": (fake, first)}), tmp_path / "both")
    store.write(report.model_copy(update={"explained": (fake,)}), tmp_path / "neither")
    given = {"share": 0.25, "layers": ["*.4"]}
    right = prune_model(source, explained / "run", tmp_path / "a", **given)
    assert prune_model(source, tmp_path / "both", tmp_path / "b", **given) == right
    with pytest.raises(ModelError, match="the same weights, but other answers"):
        prune_model(source, tmp_path / "neither", tmp_path / "c", **given)
    old = known.model_copy(update={"answers": (), "code": ""})
    store.write(report.model_copy(update={"explained": (first.model_copy(update={"model": old}),)}), tmp_path / "old")
    assert prune_model(source, tmp_path / "old", tmp_path / "d", **given) == right


def test_random_and_least_neurons_are_chosen_as_said(explained, tmp_path):
    told = store.read_explained(explained / "run")[0]
    given = {"share": 0.25, "layers": [told.layers[0].name]}
    rng = Draws(3, torch.zeros(1, dtype=torch.int64), ("prune",)).at(told.layers[0].name)
    for choose in ("random", "least"):
        found = prune_model(str(explained / "m0"), explained / "run", tmp_path / choose, choose=choose, seed=3, **given)
        expected = top(torch.tensor(told.layers[0].absolute), 0.25, choose, rng).nonzero()[:, 0].tolist()
        assert list(found.values()) == [expected]


def test_the_command_says_what_went_and_an_audit_what_is_left(explained, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("prune", explained / "m0", explained / "run", "--share", "0.5", "--out", out)
    status, told, faults = rempart(*arguments, capsys=capsys)
    assert (status, faults) == (0, "")
    assert told.count("12 neurons taken out") == 2 and told.strip().endswith(str(out))
    choice = (AttackChoice(name="fgsm"),)
    given = {"data": "digits:test[:50]", "threat": "linf:0.05", "attacks": choice, "sweep": False}
    whole, pruned = (tasks.run(AuditSpec(model=str(model), **given)) for model in (explained / "m0", out))
    assert whole is not None and pruned is not None and whole.clean is not None and pruned.clean is not None
    assert pruned.clean.k < whole.clean.k and pruned.worst_case is not None


def test_another_model_a_wrong_share_and_a_taken_folder_are_refused(explained, tmp_path):
    run, out = explained / "run", tmp_path / "out"
    other = build("mlp", shape=(1, 8, 8), num_classes=10, options=WIDTHS, seed=5)
    save(other, tmp_path / "other", name="mlp", options=WIDTHS)
    with pytest.raises(ModelError, match="which has other weights"):
        prune_model(str(tmp_path / "other"), run, out)
    for share in (0.0, 1.0, 1.1):
        with pytest.raises(SpecError, match="share"):
            prune_model(str(explained / "m0"), run, out, share=share)
    with pytest.raises(SpecError, match="name of a layer"):
        prune_model(str(explained / "m0"), run, out, layers=["conv*"])
    with pytest.raises(SpecError, match="folder without"):
        prune_model(str(explained / "m0"), run, explained / "m1")
    with pytest.raises(DataError, match="No such file"):
        prune_model(str(explained / "m0"), tmp_path / "nothing", out)
    with pytest.raises(ModelError):
        prune_model(str(toys.__file__), run, out)
    assert not out.exists()


def test_an_interrupted_run_and_one_on_test_images_are_told(explained, tmp_path, capsys):
    report = store.read(explained / "run")
    seen = report.data.model_copy(update={"split": "test"})
    stopped = report.model_copy(update={"data": seen, "complete": False, "not_run": ("8 of 40 images",)})
    store.write(stopped, tmp_path)
    words = ("The run was interrupted (not run: 8 of 40 images)", "Test images chose the neurons")
    for number, (run, told) in enumerate(((explained / "run", False), (tmp_path, True))):
        out = tmp_path / f"out{number}"
        status, said, _ = rempart("prune", explained / "m0", run, "--out", out, capsys=capsys)
        assert status == 0 and [one in said for one in words] == [told, told]
        record = json.loads((out / "config.json").read_text())["training"]["pruned"]
        assert record["doubts"] == list(doubts(run)) and len(doubts(run)) == 2 * told
