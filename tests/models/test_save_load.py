"""Models survive the disk bit by bit, and nothing that can run code is opened."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rempart.core.errors import ModelError
from rempart.core.model import Classifier
from rempart.core.repro import digest_state
from rempart.models import build, card, load, save

SHAPE = (1, 16, 16)


def images(n=5):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    made = build("mri-cnn", shape=SHAPE, num_classes=3, class_names="abc", options={"width": 4}, mean=[0.4], std=[0.3])
    made(images(64))  # moves the statistics of batch norm away from 0 and 1
    return made.eval()


@pytest.fixture
def folder(model, tmp_path):
    save(model, tmp_path / "model", name="mri-cnn", options={"width": 4}, training={"seed": 3})
    return tmp_path / "model"


# --- directories -----------------------------------------------------------------------------------------------------


def test_logits_are_the_same_bit_by_bit(model, folder):
    loaded = load(str(folder))
    assert torch.equal(loaded(images()), model(images()))
    assert not loaded.training
    assert (loaded.shape, loaded.class_names, loaded.low, loaded.high) == (SHAPE, ("a", "b", "c"), 0.0, 1.0)


def test_memory_format_does_not_reach_the_file(model, folder, tmp_path):
    model.to(memory_format=torch.channels_last)
    save(model, tmp_path / "other", name="mri-cnn", options={"width": 4}, training={"seed": 3})
    assert (tmp_path / "other/weights.safetensors").read_bytes() == (folder / "weights.safetensors").read_bytes()


def test_box_and_output_are_kept(folder, tmp_path):
    model = load(str(folder))
    model.low, model.high, model.output = -1.0, 3.0, "probabilities"
    save(model, tmp_path / "b", name="mri-cnn", options={"width": 4})
    back = load(str(tmp_path / "b"))
    assert (back.low, back.high, back.output) == (-1.0, 3.0, "probabilities")


def test_the_directory_holds_plain_files_and_others_stay(model, folder):
    (folder / "report.json").write_text("{}")
    save(model, folder, name="mri-cnn", options={"width": 4})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "report.json", "weights.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["format_version"], config["architecture"], config["options"]) == (1, "mri-cnn", {"width": 4})
    assert load_file(folder / "weights.safetensors").keys() == model.state_dict().keys()


def test_a_failed_write_leaves_the_old_model(model, folder, monkeypatch):
    before = load(str(folder)).state_dict()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(OSError, match="disk full"):
        save(model, folder, name="mri-cnn", options={"width": 4})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights.safetensors"]
    after = load(str(folder)).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_cannot_be_built_again_is_refused(model, tmp_path):
    with pytest.raises(ModelError, match="built as mri-cnn with options"):
        save(model, tmp_path / "x", name="mri-cnn", options={"width": 5})
    assert not (tmp_path / "x").exists()


def spoil_nan(folder):
    state = load_file(folder / "weights.safetensors")
    state["net.1.9.bias"][1] = float("nan")
    save_file(state, folder / "weights.safetensors")


def spoil_shape(folder):
    state = load_file(folder / "weights.safetensors")
    state["net.1.9.bias"] = torch.zeros(7)
    save_file(state, folder / "weights.safetensors")


def spoil_missing(folder):
    state = load_file(folder / "weights.safetensors")
    del state["net.1.9.bias"]
    save_file(state, folder / "weights.safetensors")


def spoil_extra(folder):
    save_file(load_file(folder / "weights.safetensors") | {"extra": torch.zeros(1)}, folder / "weights.safetensors")


def edit(**changes):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"rubbish"), "damaged"),
        (lambda folder: os.truncate(folder / "weights.safetensors", 2000), "damaged"),
        (lambda folder: (folder / "weights.safetensors").unlink(), "without weights.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "without config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (spoil_nan, "NaN or infinity in net.1.9.bias"),
        (spoil_shape, "net.1.9.bias"),
        (spoil_missing, "net.1.9.bias"),
        (spoil_extra, "extra"),
        (edit(architecture=None), "architecture"),
        (edit(shape=None), "shape"),
        (edit(format_version=2), "format_version"),
        (edit(architecture="resnet81"), "resnet18"),
        (edit(options={"depth": 3}), "depth"),
        (edit(shape=[1, -16, 16]), "shape"),
        (edit(class_names=["a"]), "class_names"),
        (edit(surprise=1), "surprise"),
    ],
)
def test_damage_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load(str(folder))


# --- pickles ---------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, canary) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.pkl", "m.bin", "m.txt", "m", "m.pt2", "m.safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch", "old torch"])
def test_pickles_are_never_opened(tmp_path, name, form):
    canary, path = tmp_path / "canary", tmp_path / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(canary)))
    else:
        torch.save({"w": Bomb(canary)}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ModelError, match=r"python:|pickle"):
        load(str(path))
    assert not canary.exists()


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary"))).close()
    assert (tmp_path / "canary").exists()


def test_a_pickle_inside_a_model_directory_is_ignored(model, folder, tmp_path):
    (folder / "weights.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    assert torch.equal(load(str(folder))(images()), model(images()))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("source", ["nowhere", "nowhere.pt2", "python:json", "python:", "python::f", ""])
def test_unknown_sources_name_the_forms(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"python:package.module:factory"):
        load(source)


# --- torch.export ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    net = build("mri-cnn", shape=SHAPE, num_classes=3, options={"width": 4}, mean=[0.4], std=[0.3]).eval().net
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    program = torch.export.export(net, (images(2),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, path)
    return net, path


def test_exported_programs_give_equal_logits_and_gradients(exported):
    net, path = exported
    loaded = load(str(path))
    assert (loaded.shape, loaded.num_classes, loaded.training) == (SHAPE, 3, False)
    for n in (1, 5):
        x, z = images(n).requires_grad_(), images(n).requires_grad_()
        assert torch.allclose(loaded(x), net(z), atol=1e-6)
        loaded(x).square().sum().backward()
        net(z).square().sum().backward()
        assert torch.allclose(x.grad, z.grad, atol=1e-6) and bool(x.grad.abs().sum() > 0)
    assert loaded.train().eval() is loaded


def test_a_fixed_batch_size_is_refused_with_the_remedy(exported, tmp_path):
    torch.export.save(torch.export.export(exported[0], (images(2),)), tmp_path / "static.pt2")
    with pytest.raises(ModelError, match=r"2 images at a time.*torch.export.Dim"):
        load(str(tmp_path / "static.pt2"))


def rewrite(path, target, change):
    """Copy an archive, passing every record through `change(name, content)`."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, change(name, source.read(name)))


@pytest.mark.parametrize("place", ["weight", "constant", "example"])
def test_a_pickle_hidden_in_an_exported_program_is_found(exported, tmp_path, place):
    canary, target = tmp_path / "canary", tmp_path / "bad.pt2"
    buffer = io.BytesIO()
    torch.save((Bomb(canary),), buffer)

    def change(name, content):
        if place == "example" and name.endswith("sample_inputs/model.pt"):
            return buffer.getvalue()
        if place == "weight" and name.endswith("weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        if place == "weight" and name.endswith("/weight_0"):
            return buffer.getvalue()
        if place == "constant" and name.endswith("constants_config.json"):
            entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
            return json.dumps({"config": {"x": entry}})
        return content

    rewrite(exported[1], target, change)
    with pytest.raises(ModelError, match="without pickled objects"):
        load(str(target))
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("spelling", [str, str.upper])
def test_two_records_of_one_name_are_refused(exported, tmp_path, spelling):
    """Two readers of one archive may choose different ones, and torch does not tell capitals from small letters."""
    target = tmp_path / "twice.pt2"
    rewrite(exported[1], target, lambda _, content: content)
    with zipfile.ZipFile(target, "a") as archive:
        root, _, name = next(name for name in archive.namelist() if "weights_config" in name).partition(
            "/data/weights/"
        )
        archive.writestr(f"{root}/data/weights/{spelling(name)}", b'{"config": {}}')
    with pytest.raises(ModelError, match="without pickled objects"):
        load(str(target))


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_records_are_refused(exported, tmp_path, method):
    """`zipfile` inflates more than a record claims to hold; torch never compresses."""
    with zipfile.ZipFile(exported[1]) as source, zipfile.ZipFile(tmp_path / "bad.pt2", "w", method) as copy:
        for name in source.namelist():
            copy.writestr(name, source.read(name))
    with pytest.raises(ModelError, match="without pickled objects"):
        load(str(tmp_path / "bad.pt2"))


def test_a_rewritten_archive_still_loads(exported, tmp_path):
    """The refusals above are not about the rewriting."""
    rewrite(exported[1], tmp_path / "same.pt2", lambda _, content: content)
    assert torch.equal(load(str(tmp_path / "same.pt2"))(images()), load(str(exported[1]))(images()))


def test_rubbish_named_pt2_is_refused(tmp_path):
    (tmp_path / "x.pt2").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match=r"\.pt2"):
        load(str(tmp_path / "x.pt2"))


# --- python ----------------------------------------------------------------------------------------------------------

FACTORIES = """
import torch
from rempart.core.model import Classifier

def net():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))

def good():
    return Classifier(net(), shape=(1, 2, 2), num_classes=3)

def module():
    made = net()
    made.shape, made.num_classes = (1, 2, 2), 3
    return made

number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories_of_test.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return "python:factories_of_test:"


@pytest.mark.parametrize("name", ["good", "module"])
def test_factories_in_the_current_directory(factories, name):
    model = load(factories + name)
    assert isinstance(model, Classifier) and (model.shape, model.num_classes) == ((1, 2, 2), 3)
    assert model(torch.zeros(2, 1, 2, 2)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net", "attributes shape and num_classes.*model.shape ="),
        ("missing", "a function missing"),
        ("number", "a function number"),
    ],
)
def test_wrong_factories_say_what_to_do(factories, name, message):
    with pytest.raises(ModelError, match=message):
        load(factories + name)


def test_missing_modules_are_named():
    with pytest.raises(ModelError, match="no_such_module_anywhere"):
        load("python:no_such_module_anywhere:f")


# --- card ------------------------------------------------------------------------------------------------------------


def test_the_card_describes_the_model(model, folder):
    made = card(load(str(folder)), str(folder))
    assert (made.source, made.name, made.shape, made.classes) == (str(folder), "model", SHAPE, ("a", "b", "c"))
    assert made.digest == digest_state(model.state_dict())
    assert made.parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).add_(1e-6)
    assert made.digest != card(model, str(folder)).digest


def test_exported_and_python_models_have_names(exported, factories):
    assert card(load(str(exported[1])), str(exported[1])).name == "net"
    assert card(load(factories + "good"), factories + "good").name == "good"


def test_classifiers_of_modules_are_modules(factories):
    assert isinstance(load(factories + "module").net, nn.Sequential)


class Extra(nn.Module):
    def get_extra_state(self) -> object:
        return {"scale": 2}

    def set_extra_state(self, state: object) -> None: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def _quantised() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def _sparse() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    net.register_buffer("kept", torch.eye(3).to_sparse())
    return net


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [_quantised, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Extra()), _sparse])
def test_a_state_of_other_things_than_tensors_has_a_card_and_is_not_saved(make, tmp_path):
    model, twin = (Classifier(make(), shape=(1, 8, 8), num_classes=10) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    assert card(model, "python:a:b").digest == card(twin, "python:a:b").digest
    with pytest.raises(ModelError, match="a network whose state is dense tensors"):
        save(model, tmp_path / "out", name="python:a:b")


def test_a_card_of_weights_without_values_says_what_to_do() -> None:
    with torch.device("meta"):
        empty = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for net, words in ((nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "initialised"), (empty, "meta device")):
        with pytest.raises(ModelError, match=words):
            card(Classifier(net, shape=(1, 8, 8), num_classes=10), "python:a:b")
