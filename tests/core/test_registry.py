"""The schema comes from the signature; every fault in a request is named, with the nearest right word."""

import importlib.metadata
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Lt

from rempart.core.errors import SpecError
from rempart.core.numbers import Pixels, read_number
from rempart.core.registry import Registry, bounds_of, suggestion


def climb(
    model: object,
    x: object,
    *,
    steps: Annotated[int, Ge(1)] = 40,
    step: Pixels | None = None,
    momentum: Annotated[float, Ge(0), Lt(2)] = 1.0,
    loss: Literal["ce", "margin"] = "ce",
    keep_best: bool = True,
    rng: object = None,
) -> None:
    """Climb the hill.

    Not shown.
    """


@pytest.fixture
def registry() -> Registry[Any, str]:
    registry: Registry[Any, str] = Registry("attack", reserved=frozenset({"rng"}))
    registry.register("climb", "traits")(climb)
    return registry


def test_entries_know_their_function(registry):
    entry = registry["climb"]
    assert (entry.name, entry.function, entry.traits, entry.summary) == ("climb", climb, "traits", "Climb the hill.")
    assert [e.name for e in registry] == ["climb"] and len(registry) == 1
    assert "climb" in registry and "other" not in registry


def test_the_schema_is_the_keyword_only_signature(registry):
    """Positional and reserved parameters are not options; defaults come from the signature."""
    assert registry["climb"].parse({}) == {
        "steps": 40,
        "step": None,
        "momentum": 1.0,
        "loss": "ce",
        "keep_best": True,
    }
    properties = registry["climb"].params.model_json_schema()["properties"]
    assert properties["steps"] == {"default": 40, "minimum": 1, "title": "Steps", "type": "integer"}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"steps": "7"}, {"steps": 7}),
        ({"step": "8/255"}, {"step": 8 / 255}),
        ({"step": " 8 / 255 "}, {"step": 8 / 255}),
        ({"step": "0.25"}, {"step": 0.25}),
        ({"step": 0.25}, {"step": 0.25}),
        ({"step": "none"}, {"step": None}),
        ({"keep_best": "false"}, {"keep_best": False}),
        ({"loss": "margin", "momentum": "1e-3"}, {"loss": "margin", "momentum": 1e-3}),
    ],
)
def test_strings_of_the_command_line_are_read(registry, given, read):
    assert registry["climb"].parse(given) == registry["climb"].parse({}) | read


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stpes": 3}, ["unknown option 'stpes'", "did you mean 'steps'?"]),
        ({"zzz": 3}, ["unknown option 'zzz'", "it takes steps, step, momentum, loss, keep_best"]),
        ({"rng": 3}, ["unknown option 'rng'"]),
        ({"model": 3}, ["unknown option 'model'"]),
        ({"steps": 0}, ["steps=0", "greater than or equal to 1"]),
        ({"steps": "2.5"}, ["steps='2.5'"]),
        ({"steps": "none"}, ["steps=None"]),
        ({"momentum": 2.0}, ["momentum=2.0", "less than 2"]),
        ({"momentum": "nan"}, ["momentum='nan'"]),
        ({"step": "inf"}, ["step=", "finite"]),
        ({"step": "1/0"}, ["step='1/0'"]),
        ({"step": "eight"}, ["step='eight'"]),
        ({"loss": "xent"}, ["loss='xent'", "'ce' or 'margin'"]),
        ({"stpes": 3, "steps": -1}, ["unknown option 'stpes'", "steps=-1"]),
    ],
)
def test_every_fault_is_named(registry, given, words):
    with pytest.raises(SpecError) as error:
        registry["climb"].parse(given)
    assert all(word in str(error.value) for word in ["options of 'climb'", *words])


def test_required_options_are_asked_for():
    registry: Registry[Any, None] = Registry("attack")

    @registry.register("must", None)
    def must(*, steps: int) -> None: ...  # pyright: ignore[reportUnusedFunction]

    with pytest.raises(SpecError, match="got no steps; it takes steps"):
        registry["must"].parse({})
    assert registry["must"].summary == ""


def test_bad_defaults_are_noticed_in_the_first_parse():
    registry: Registry[Any, None] = Registry("attack")

    @registry.register("bad", None)
    def bad(*, steps: Annotated[int, Ge(1)] = 0) -> None: ...  # pyright: ignore[reportUnusedFunction]

    with pytest.raises(SpecError, match="steps=0"):
        registry["bad"].parse({})


def test_a_name_is_taken_once(registry):
    with pytest.raises(SpecError, match="a free attack name, got 'climb'"):
        registry.register("climb", "other")(climb)
    assert registry["climb"].traits == "traits"


def test_unknown_names_get_the_nearest(registry):
    with pytest.raises(SpecError, match="attack out of climb, got 'clim'; did you mean 'climb'"):
        registry["clim"]
    with pytest.raises(SpecError) as error:
        registry["zzz"]
    assert str(error.value).endswith("got 'zzz'")


def test_entry_points_join_once_and_only_when_needed(monkeypatch):
    registry: Registry[Any, str] = Registry("attack", group="rempart.toys")
    loads: list[str] = []

    class Point:
        value = "toys:join"

        def load(self) -> None:
            loads.append("plugin")
            registry.register("plugin", "")(climb)
            assert "plugin" in registry, "a plug-in may look at the registry while it joins"

    def points(*, group: str) -> list[Point]:
        assert group == "rempart.toys"
        return [Point()]

    monkeypatch.setattr("rempart.core.registry.entry_points", points)
    registry.register("own", "")(climb)
    assert loads == []
    for look in (lambda: registry["plugin"], lambda: list(registry), lambda: len(registry), lambda: "x" in registry):
        look()
    assert loads == ["plugin"] and len(registry) == 2


def test_the_real_entry_points_are_those_of_the_group(monkeypatch):
    asked: list[str] = []
    real = importlib.metadata.entry_points
    monkeypatch.setattr("rempart.core.registry.entry_points", lambda *, group: asked.append(group) or real(group=group))
    assert len(Registry("attack", group="rempart.nobody")) == 0
    assert len(Registry("attack")) == 0
    assert asked == ["rempart.nobody"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("steps", "int, >= 1"),
        ("step", "float | none"),
        ("momentum", "float, >= 0, < 2"),
        ("loss", "'ce' | 'margin'"),
        ("keep_best", "bool"),
    ],
)
def test_bounds_in_words(registry, name, words):
    assert bounds_of(registry["climb"].params.model_fields[name]) == words


def test_suggestion():
    assert suggestion("stpes", ["steps", "loss"]) == " (did you mean 'steps'?)"
    assert suggestion("zzz", ["steps", "loss"]) == ""


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("-1/2", -0.5), ("3", 3.0), ("1/0", "1/0"), ("a/2", "a/2"), (None, None)]
)
def test_read_number(text, value):
    assert read_number(text) == value
