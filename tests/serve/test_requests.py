"""From what a client asks for to a spec: ids become places in the store, and nothing else names a file."""

import io
from typing import get_args

import pytest
from pydantic import ValidationError

from rempart.core.errors import SpecError
from rempart.models.save import CONFIG, WEIGHTS
from rempart.report.schema import Reading
from rempart.serve.errors import Missing
from rempart.serve.jobs import KINDS, Jobs, Kind
from rempart.serve.requests import REQUESTS, SPECS, data_of, model_of, resolved
from rempart.serve.settings import Settings, prepared
from rempart.serve.store import Store

THREAT = "linf:8/255"


@pytest.fixture
def parts(tmp_path):
    settings = prepared(Settings(folder=tmp_path / "data"))
    store, jobs = Store(settings.folder, lambda *_: {}, 1000), Jobs.of(settings)
    yield store, jobs
    jobs.table.destroy()


@pytest.fixture
def model(parts):
    return parts[0].add("model", "net.onnx", io.BytesIO(b"x"), Reading(box="0:255")).id


def ask(parts, **asked):
    return resolved(REQUESTS[asked["kind"]].model_validate(asked), *parts)


def trained(parts, *names, ended=True):
    """A training job that left these files."""
    jobs = parts[1]
    id = jobs.submit({}, ask(parts, kind="train", data="digits"), user="u", key=None)[0].id
    (jobs.folder(id) / "run").mkdir(exist_ok=True)
    for name in names:
        (jobs.folder(id) / "run" / name).touch()
    if ended:
        jobs.cancel(id)
    return id


def test_every_kind_of_job_can_be_asked_for():
    assert (*REQUESTS,) == (*SPECS,) and {*REQUESTS} == {*KINDS} == {*get_args(Kind)}
    assert [spec.model_fields["kind"].default for spec in SPECS.values()] == list(SPECS)


def test_ids_become_places_relative_to_the_data_directory(parts, model):
    store, _ = parts
    data = store.add("data", "scans.zip", io.BytesIO(b"x")).id
    spec = ask(parts, kind="audit", model=model, data=f"{data}@64@grey:test[:20]", threat=THREAT, suite="fast")
    assert (spec.model, spec.data) == (f"models/{model}/net.onnx", f"data/{data}/scans.zip@64@grey:test[:20]")
    assert spec.reading.box == "0:255"  # as it was said at its upload
    assert (store.folder / spec.model).exists()
    assert ask(parts, kind="attack", model=model, data="digits:test", threat=THREAT, attack={"name": "pgd"}).out
    explained = ask(parts, kind="explain", models=[model], data="digits", threat=THREAT, attacks=[{"name": "fgsm"}])
    assert explained.models == (f"models/{model}/net.onnx",) and explained.reading.box == "0:255"


def test_a_training_that_is_done_is_a_model(parts):
    unfinished, done = trained(parts), trained(parts, CONFIG, WEIGHTS)
    running = trained(parts, CONFIG, WEIGHTS, ended=False)
    assert model_of(done, *parts) == (f"jobs/{done}/run", {})
    for id in (unfinished, running, "0" * 32):
        with pytest.raises(Missing):
            model_of(id, *parts)
    spec = ask(parts, kind="train", data="digits", start=done)
    assert (spec.start, spec.model) == (f"jobs/{done}/run", None)


@pytest.mark.parametrize(
    "text",
    [
        "mnist:/etc",
        "cifar10:/etc/passwd",
        "/etc/passwd",
        "../digits",
        "python:os:system",
        "0123456789abcdef/../x",
        "0123456789abcdef@window=/etc",
        "digits\n",
        "digits[:5]x",
        "DIGITS",
        "",
    ],
)
def test_data_are_named_by_an_id_and_nothing_else(parts, text):
    with pytest.raises(SpecError, match="the id of a data set"):
        data_of(text, parts[0])


def test_data_that_are_not_here_are_missing(parts):
    with pytest.raises(Missing):
        data_of("0123456789abcdef:test", parts[0])
    assert data_of("digits@16:train[::3]", parts[0]) == "digits@16:train[::3]"


@pytest.mark.parametrize("name", ["/etc/passwd", "python:os:getcwd", "../../jobs.sqlite", "0" * 15, "x.onnx", ""])
def test_a_model_is_named_by_an_id_and_nothing_else(parts, name):
    with pytest.raises((Missing, ValidationError)):
        ask(parts, kind="audit", model=name, data="digits", threat=THREAT, suite="fast")
    with pytest.raises((Missing, ValidationError)):
        ask(parts, kind="train", data="digits", start=name)
    with pytest.raises(Missing):
        model_of(name, *parts)


@pytest.mark.parametrize("kind", list(REQUESTS))
@pytest.mark.parametrize(
    "field", ["out", "device", "devices", "reading", "patients", "costs", "log", "resume", "image"]
)
def test_no_field_that_names_a_file_or_the_machine_is_a_clients(kind, field):
    assert field not in REQUESTS[kind].model_fields
    with pytest.raises(ValidationError, match=r"(?s)Extra inputs"):
        REQUESTS[kind].model_validate({"kind": kind, field: "x"})


@pytest.mark.parametrize("recipe", ["/tmp/recipe.toml", "plain.toml", "../plain", "trades:x.toml"])
def test_a_recipe_comes_with_rempart(parts, recipe):
    with pytest.raises((SpecError, ValidationError), match="recipe"):
        ask(parts, kind="train", data="digits", recipe=recipe)


def test_an_architecture_comes_with_rempart(parts):
    with pytest.raises(SpecError, match="lenet"):
        ask(parts, kind="train", data="digits", model="python:os:getcwd")
    assert ask(parts, kind="train", data="digits").model == "lenet"


@pytest.mark.parametrize("neurons", ["/etc", "../..", 5, ["/etc"], {"a": 1}])
def test_neurons_are_those_of_a_job(parts, neurons):
    with pytest.raises((Missing, SpecError, ValidationError)):
        ask(parts, kind="train", data="digits", recipe="sns", options={"neurons": neurons})


def test_a_value_out_of_range_is_told_as_a_fault_of_the_request(parts, model):
    with pytest.raises((SpecError, ValidationError), match="batch_size"):
        ask(parts, kind="audit", model=model, data="digits", threat=THREAT, suite="fast", batch_size=0)
