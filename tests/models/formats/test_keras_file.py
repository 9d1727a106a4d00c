"""Planted Keras files: each is refused, nothing in it runs, and nothing is written."""

import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rempart.core.errors import ModelError
from rempart.models import load

h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")
layers = keras.layers

CANARY = "canary"


class Trap:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (CANARY, "w")


def plain() -> Any:
    return keras.Sequential([keras.Input((4, 4, 1)), layers.Flatten(name="flat"), layers.Dense(3, name="head")])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain().save(folder / "model.keras")
        plain().save(folder / "model.h5")
    return folder


@pytest.fixture(autouse=True)
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with one below, where files are planted; what is written to either is found."""
    inner = tmp_path / "inner"
    shutil.copytree(good, inner)
    monkeypatch.chdir(inner)
    return inner


def refused(name: str, match: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("..").rglob("*")}
    with pytest.raises(ModelError, match=match):
        load(name)
    assert {path: path.stat().st_mtime_ns for path in Path("..").rglob("*")} == before
    assert not Path(CANARY).exists()


def rewrite(change: Callable[[dict[str, Any]], None], name: str = "model.keras") -> None:
    """Change the description of the network in a `.keras` archive."""
    with zipfile.ZipFile(name) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    config = json.loads(members["config.json"])
    change(config)
    with zipfile.ZipFile(name, "w") as archive:
        for member, content in (members | {"config.json": json.dumps(config).encode()}).items():
            archive.writestr(member, content)


def rewrite_h5(change: Callable[[dict[str, Any]], None]) -> None:
    with h5py.File("model.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        change(config)
        file.attrs["model_config"] = json.dumps(config)


def layer(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(found for found in config["config"]["layers"] if found["config"]["name"] == name)


def test_the_files_as_they_were_saved_load() -> None:
    for name in ("model.keras", "model.h5"):
        assert load(name).shape == (1, 4, 4)
    rewrite(lambda config: None)
    assert load("model.keras").num_classes == 3


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_lambda_layer_is_refused_and_not_run(ending: str) -> None:
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), layers.Lambda(lambda x: (open("canary", "w").close(), x)[1]), layers.Flatten()]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(f"lambda.{ending}")
    Path(CANARY).unlink()  # made when the model was
    refused(f"lambda.{ending}", "run no code of the file's, got 'Lambda'")


@pytest.mark.parametrize(
    "change",
    [
        {"module": "os", "class_name": "system"},
        {"module": "os", "class_name": "Dense"},
        {"module": "keras.utils", "class_name": "get_file", "registered_name": None},
        {"module": "keras.src.utils.torch_utils", "class_name": "TorchModuleWrapper"},
        {"class_name": "TFSMLayer"},
        {"class_name": "StringLookup"},
        {"module": None, "registered_name": "Custom>Mine", "class_name": "Mine"},
        {"registered_name": "Custom>Mine"},
        {"class_name": ["Dense"]},
        {"module": "keras.src.ops.core", "class_name": "Map"},
        {"module": "keras.src.ops.numpy.evil", "class_name": "Anything"},
        {"class_name": "function", "module": "builtins", "config": "eval", "registered_name": "function"},
    ],
)
def test_classes_and_functions_from_elsewhere_are_refused(change: dict[str, Any]) -> None:
    rewrite(lambda config: layer(config, "head").update(change))
    refused("model.keras", "run no code of the file's")


@pytest.mark.parametrize("key", ["activation", "kernel_initializer", "bias_constraint"])
def test_so_are_those_hidden_in_an_option_of_a_layer(key: str) -> None:
    trap = {"class_name": "__lambda__", "module": "builtins", "config": {"value": ["4wAA", None, None]}}
    rewrite(lambda config: layer(config, "head")["config"].update({key: trap}))
    refused("model.keras", "__lambda__")
    rewrite_h5(lambda config: layer(config, "head")["config"].update({key: trap}))
    refused("model.h5", "__lambda__")


def test_custom_losses_are_left_out_because_nothing_here_needs_them() -> None:
    rewrite(lambda config: config.update(compile_config={"loss": {"class_name": "Own", "module": "os", "config": {}}}))
    assert load("model.keras").num_classes == 3


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/evil.txt", "assets/vocabulary.txt", "model.weights.npz", "a/../../evil.txt"]
)
def test_entries_that_no_network_needs_are_refused_and_not_unpacked(name: str) -> None:
    with zipfile.ZipFile("model.keras", "a") as archive:
        archive.writestr(name, "evil")
    refused("model.keras", "entry that no network of images needs")


def test_two_descriptions_in_one_archive_are_refused() -> None:
    with warnings.catch_warnings(), zipfile.ZipFile("model.keras", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("config.json", "{}")
    refused("model.keras", "4 entries")


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_pickle_in_disguise_is_never_opened(ending: str) -> None:
    Path(f"trap.{ending}").write_bytes(pickle.dumps(Trap()))
    refused(f"trap.{ending}", "Keras file that is whole")


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(ending: str, share: float) -> None:
    path = Path(f"model.{ending}")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path.name, "Keras file that is whole")


def test_an_archive_of_zeros_is_refused_before_it_is_unpacked() -> None:
    with zipfile.ZipFile("model.keras") as archive:
        members = {name: archive.read(name) for name in ("metadata.json", "config.json")}
    with zipfile.ZipFile("model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        with archive.open("model.weights.h5", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(2**20))
    refused("model.keras", "MAX_RATIO")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_entries_that_are_compressed_are_refused(method: int) -> None:
    """Whatever size an entry claims, `zipfile` inflates much more than that at once: 1.4 KB were 1.5 GB."""
    with zipfile.ZipFile("model.keras") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile("model.keras", "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused("model.keras", "compressed entries")


def test_arrays_that_claim_more_than_the_file_holds_are_refused() -> None:
    with h5py.File("model.h5", "r+") as file:
        file.create_dataset("huge", (2**34,), chunks=(2**20,), dtype="f4")  # nothing of it is written
    refused("model.h5", "MAX_RATIO")


def test_layers_that_claim_more_weights_than_there_are_are_refused_before_they_are_made() -> None:
    rewrite(lambda config: layer(config, "head")["config"].update(units=10**11))
    refused("model.keras", "weights for all")


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_images_that_fit_no_memory_are_refused_before_one_is_made(ending: str) -> None:
    model = keras.Sequential([keras.Input((60_000, 60_000, 1)), layers.GlobalAveragePooling2D(), layers.Dense(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(f"model.{ending}")
    refused(f"model.{ending}", "MAX_VOXELS")


@pytest.mark.parametrize("where", ["alone", "inside another model"])
def test_layers_that_fit_no_memory_are_refused_before_they_run(where: str) -> None:
    """The network is run to take off its softmax."""
    many = [keras.Input((4, 4, 1)), layers.Flatten(), layers.RepeatVector(2**40), layers.GlobalAveragePooling1D()]
    model = keras.Sequential(many)
    if where != "alone":
        model = keras.Sequential([keras.Input((4, 4, 1)), model, layers.Softmax()])
    model.save("model.keras")
    refused("model.keras", "MAX_VOXELS")


def test_links_to_other_files_and_strings_among_the_weights_are_refused(place: Path) -> None:
    with h5py.File("model.h5", "r+") as file:
        file["stolen"] = h5py.ExternalLink(str(place / "other.h5"), "/x")
    refused("model.h5", "link to another place")
    with h5py.File("model.h5", "r+") as file:
        del file["stolen"]
        file["model_weights"]["soft"] = h5py.SoftLink("/model_weights")
    refused("model.h5", "link to another place")
    with h5py.File("model.h5", "r+") as file:
        del file["model_weights"]["soft"]
        file.create_dataset("outside", (4,), "f4", external=[(str(place / "other"), 0, 16)])
    refused("model.h5", "no plain array")
    with h5py.File("model.h5", "r+") as file:
        del file["outside"]
        file["text"] = "words"
    refused("model.h5", "no plain array")


def test_weights_alone_and_other_descriptions_are_refused() -> None:
    with h5py.File("model.h5", "r+") as file:
        del file.attrs["model_config"]
    refused("model.h5", "weights alone")
    rewrite(lambda config: (config.clear(), config.update(class_name="Dense", config={}))[0])
    refused("model.keras", "Sequential or Functional")


def test_a_description_nested_without_end_is_refused() -> None:
    with zipfile.ZipFile("model.keras") as archive:
        weights = archive.read("model.weights.h5")
    with zipfile.ZipFile("model.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", '{"class_name": "Sequential", "config": ' + "[" * 10**5 + "]" * 10**5 + "}")
        archive.writestr("model.weights.h5", weights)
    refused("model.keras", "Keras file that is whole")


def test_weights_that_are_no_numbers_are_refused() -> None:
    with h5py.File("model.h5", "r+") as file:
        file["model_weights"]["head"].visititems(
            lambda name, item: item.__setitem__(..., float("nan")) if isinstance(item, h5py.Dataset) else None
        )
    refused("model.h5", "finite weights")
