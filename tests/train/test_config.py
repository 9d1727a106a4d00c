"""Recipes: files, overrides, and messages that name every fault."""

from typing import Any

import pytest
import torch

from rempart.core.errors import SpecError, ThreatError
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.objectives.catalogue import objectives
from rempart.train import load_recipe, recipe_names
from rempart.train.config import Settings
from rempart.train.loop import schedule


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_parses_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.summary and callable(recipe.build_objective())


def test_the_packaged_recipes_are_found():
    assert {"plain", "plain:digits", "plain:medical", "pgd-at:mnist"} <= set(recipe_names())


def test_a_family_overrides_the_recipe_it_belongs_to(tmp_path):
    base, family = load_recipe("plain"), load_recipe("plain:medical")
    assert (base.optimiser, base.flip, base.schedule) == ("adam", False, "onecycle")
    assert (family.optimiser, family.flip, family.schedule) == ("sgd", True, "onecycle")
    own = tmp_path / "own.toml"
    own.write_text('objective = "plain"\nepochs = 2\n[tiny]\nepochs = 7\n')
    assert [load_recipe(f"{own}{part}").epochs for part in ("", ":tiny")] == [2, 7]
    with pytest.raises(SpecError, match=r"a family of plain out of digits, mnist, medical, cifar10.*'medical'"):
        load_recipe("plain:medicla")


def test_options_override_recipe_and_objective_as_text():
    recipe = load_recipe("pgd-at", {"epochs": "3", "flip": "true", "threat": "l2:0.5", "step": "2/255", "steps": "4"})
    assert (recipe.epochs, recipe.flip) == (3, True)
    assert recipe.options == {"threat": "l2:0.5", "steps": 4, "step": 2 / 255}


def test_defaults_of_the_objective_are_recorded():
    assert load_recipe("plain", {"objective": "pgd-at"}).options == {"threat": "linf:8/255", "steps": 10, "step": None}


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ({}, 0.01),
        ({"steps": "40", "threat": "linf:0.3"}, 0.01),
        ({"threat": "l2:1.5"}, None),  # 40 steps of 0.01 do not get to its edge
        ({"steps": 7}, None),
        ({"threat": "l2:1.5", "step": 0.2}, 0.2),
    ],
)
def test_the_step_of_a_recipe_is_for_its_own_threat(given: dict[str, Any], step: float | None) -> None:
    assert load_recipe("trades:mnist", given).options["step"] == step


def test_all_faults_come_in_one_message():
    with pytest.raises(SpecError) as error:
        load_recipe("pgd-at", {"epocs": 3, "treat": "linf:0.1", "learning_rate": "-1"})
    for part in ("'epocs' (did you mean 'epochs'?)", "'treat' (did you mean 'threat'?)", "learning_rate='-1'"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"threat": "linf:8"}, {"threat": "linf"}, {"threat": "lmax:0.1"}],
)
def test_impossible_threats_are_refused_before_training(options):
    with pytest.raises(ThreatError):
        load_recipe("pgd-at", options)


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"batch_size": 0}, {"weight_decay": -1}, {"optimiser": "lion"}, {"schedule": "x"}, {"shift": -1}],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match=next(iter(options))):
        load_recipe("plain", options)


def test_unknown_names_are_suggested(tmp_path):
    with pytest.raises(SpecError, match="did you mean 'plain'"):
        load_recipe("plane")
    with pytest.raises(SpecError, match="did you mean 'pgd-at'"):
        load_recipe("plain", {"objective": "pgdat"})
    with pytest.raises(SpecError, match="readable recipe file"):
        load_recipe(str(tmp_path / "none.toml"))


def test_recipe_files_are_read_by_path(tmp_path):
    (tmp_path / "mine.toml").write_text('objective = "pgd-at"\nepochs = 2\nthreat = "linf:0.3"\n')
    recipe = load_recipe(str(tmp_path / "mine.toml"), {"epochs": 4})
    assert (recipe.objective, recipe.epochs, recipe.options["threat"]) == ("pgd-at", 4, "linf:0.3")
    (tmp_path / "bad.toml").write_text("epochs =")
    with pytest.raises(SpecError, match="TOML"):
        load_recipe(str(tmp_path / "bad.toml"))


def test_a_recipe_asks_for_perturbed_weights():
    """By gamma |w| |g| to first order, once the warm-up is over."""
    weight = torch.tensor([[2.0, -1.0]])
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.load_state_dict({"weight": weight})
    model = Classifier(torch.nn.Sequential(torch.nn.Flatten(), layer), shape=(1, 1, 2), num_classes=2)
    x, y, rng = torch.tensor([[[[0.2, 0.9]]]]), torch.tensor([0]), Draws(0, torch.arange(1))
    recipe = load_recipe("plain", {"awp": 0.1, "awp_warmup": 0.5})
    early, late = (recipe.build_objective()(model, x, y, rng=rng, progress=at).value.item() for at in (0.4, 0.6))
    moved = (weight + 0.1 * weight.norm() * x.flatten() / x.norm()) @ x.flatten()  # the slope of the loss is along x
    assert early == pytest.approx(torch.nn.functional.softplus(weight @ x.flatten()).item())
    assert late == pytest.approx(torch.nn.functional.softplus(moved).item())


@pytest.mark.parametrize("entry", objectives, ids=lambda entry: entry.name)
def test_no_objective_hides_a_setting(entry):
    assert not entry.params.model_fields.keys() & Settings.model_fields.keys()


@pytest.mark.parametrize(("name", "falls"), [("trades:cifar10", (75,)), ("mart:cifar10", (75, 90, 100))])
def test_published_schedules_go_down_at_the_beginning_of_the_epochs_published(name, falls):
    """The authors' codes count epochs from 1 and compare with >=."""
    recipe = load_recipe(name)
    rates = [schedule(recipe, (epoch - 0.99) / recipe.epochs) for epoch in range(1, recipe.epochs + 1)]
    assert tuple(e for e in range(2, recipe.epochs + 1) if rates[e - 1] < rates[e - 2]) == falls


def test_options_in_a_table_are_refused_and_not_taken_for_a_family(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('objective = "pgd-at"\n\n[options]\nsteps = 3\n', "utf-8")
    with pytest.raises(SpecError, match=r"no table \[options\].*same level"):
        load_recipe(str(path))


def test_a_recipe_names_its_objective_and_takes_no_options_of_another(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("epochs = 1\n", "utf-8")
    with pytest.raises(SpecError, match="an objective in the recipe"):
        load_recipe(str(path))
    with pytest.raises(SpecError, match="beta, an option of ima, trades"):
        load_recipe("plain", {"beta": 3})
    with pytest.raises(SpecError, match="pgd-at alone is for something small"):
        load_recipe("pgd-at:zzz")
