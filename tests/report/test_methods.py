"""Training runs side by side, against figures worked out here from the results per image."""

import re
from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from rempart.core.errors import DataError
from rempart.core.threat import Threat
from rempart.report import figures
from rempart.report.html import methods_page
from rempart.report.methods import Trained, compare_methods, hardened_against
from rempart.report.schema import Check, TrainSpec
from rempart.report.text import WIDTH, methods_table
from report.test_html import Page, assert_sound, exact
from report.test_text import columns

SVG = "{http://www.w3.org/2000/svg}"
Make = Callable[..., Trained]


@pytest.fixture
def runs(make_trained: Make) -> dict[str, Trained]:
    return {
        "plain": make_trained("plain", 0.9, gradients=40_000),
        "trades": make_trained("trades", 0.4, seed=1, gradients=500_000),
        "trades again": make_trained("trades", 0.5, seed=2, gradients=520_000),
    }


def test_rows_hold_what_was_measured_and_what_it_cost(runs: dict[str, Trained]):
    methods = compare_methods(runs)
    assert [row.name for row in methods.rows] == list(runs)
    assert (methods.n, methods.threat, methods.data) == (500, "linf:8/255", "brain-mri:test")
    for row, run in zip(methods.rows, runs.values(), strict=True):
        assert (row.clean, row.worst, row.cost) == (run.audit.clean, run.audit.worst_case, run.training.training)
        assert (row.model, row.checked) == ("mri-cnn", "valid")
        assert row.rho2 is not None
        assert row.rho2.value == pytest.approx(run.sizes.mean())  # images wrong at first count 0
        reach = 1.96 * run.sizes.std() / np.sqrt(500)
        assert (row.rho2.low, row.rho2.high) == pytest.approx(
            (run.sizes.mean() - reach, run.sizes.mean() + reach), 0.01
        )


def test_differences_to_the_first_are_paired_by_image(runs: dict[str, Trained]):
    first, second, _ = compare_methods(runs).rows
    assert first.to_first == {} and first.rho2_to_first is None
    one, other = (runs[name].audit.samples for name in ("plain", "trades"))
    assert one is not None and other is not None
    gap = other.worst_case().astype(int) - one.worst_case()
    assert second.to_first["worst case"].value == pytest.approx(gap.mean())
    assert set(second.to_first) == {"clean", "worst case"}
    sizes = runs["trades"].sizes - runs["plain"].sizes
    assert second.rho2_to_first is not None
    assert second.rho2_to_first.value == pytest.approx(sizes.mean())
    interval = stats.ttest_1samp(sizes, 0).confidence_interval()
    assert (second.rho2_to_first.low, second.rho2_to_first.high) == pytest.approx((interval.low, interval.high))


def test_images_without_a_find_are_left_out_of_rho_2_and_the_reader_is_told(make_trained: Make):
    whole, part = make_trained("plain", 0.5), make_trained("trades", 0.5, found=0.7)
    methods = compare_methods({"a": whole, "b": part})
    known = np.isfinite(part.sizes)
    row = methods.rows[1]
    assert row.rho2 is not None and row.rho2_to_first is not None
    assert 300 < known.sum() == row.rho2.n == row.rho2_to_first.n < 400
    assert row.rho2.value == pytest.approx(part.sizes[known].mean())
    assert row.rho2_to_first.value == pytest.approx((part.sizes - whole.sizes)[known].mean())
    assert row.found == round(0.7 * row.attacked)
    assert [note for note in methods.notes if note.startswith("ρ₂ of b leaves out 141 of 469 images")]


def test_seeds_of_one_method_are_averaged(runs: dict[str, Trained]):
    methods = compare_methods(runs)
    (group,) = methods.groups
    assert (group.method, group.model, group.runs) == ("trades", "mri-cnn", 2)
    worst = [row.worst.value for row in methods.rows[1:]]
    assert group.worst.value == pytest.approx(np.mean(worst))
    reach = 12.706 * abs(worst[0] - worst[1]) / 2  # t at one degree of freedom; the standard error of two values
    assert group.worst.high == pytest.approx(min(1, np.mean(worst) + reach), abs=1e-4)
    assert group.worst.low >= 0 and group.clean.high <= 1
    assert group.gradients is not None and group.gradients.value == 510_000
    same = {"a": runs["trades"], "b": runs["trades"]}
    assert compare_methods(same).groups == (), "two runs of one seed are no sample of trainings"


def test_options_on_top_of_a_recipe_make_another_method(runs: dict[str, Trained]):
    run = runs["trades again"]
    spec = run.training.spec.model_copy(update={"options": {"beta": "3"}})
    other = Trained(run.training.model_copy(update={"spec": spec}), run.audit, run.minimum, run.sizes)
    methods = compare_methods({"a": runs["trades"], "b": other})
    assert [row.method for row in methods.rows] == ["trades", "trades (beta=3)"]
    assert methods.groups == ()


def test_a_fine_tuned_model_is_named_by_what_it_began_as(runs: dict[str, Trained]):
    run = runs["trades"]
    spec = run.training.spec.model_copy(update={"model": None, "start": "runs/plain"})
    other = Trained(run.training.model_copy(update={"spec": spec}), run.audit, run.minimum, run.sizes)
    methods = compare_methods({"a": run, "b": other})
    assert methods.notes == (
        "Some runs began with a trained model (b with runs/plain): what that one cost is not counted.",
    )
    assert methods.rows[1].model == "from runs/plain"


def test_what_does_not_compare_is_refused_or_told(runs: dict[str, Trained]):
    first, second, _ = runs.values()
    data = second.training.data.model_copy(update={"digest": "another"})
    elsewhere = Trained(second.training.model_copy(update={"data": data}), second.audit, second.minimum, second.sizes)
    with pytest.raises(DataError, match="same data"):
        compare_methods({"a": first, "b": elsewhere})
    assert isinstance(second.training.spec, TrainSpec) and second.training.training is not None
    recipe = {**second.training.training.recipe, "validation_threat": "l2:0.5"}
    cost = second.training.training.model_copy(update={"recipe": recipe, "train_images": 900})
    changes = {
        "spec": second.training.spec.model_copy(update={"model": "resnet18"}),
        "training": cost,
        "complete": False,
        "environment": {"processor": "other"},
        "model": second.training.model.model_copy(update={"parameters": 77}),
    }
    failed = Check(name="zero gradients", status="failed", message="Gradients are zero.")
    doubtful = second.audit.model_copy(update={"stamp": "invalid", "checks": (failed,)})
    suspicious = second.minimum.model_copy(update={"stamp": "suspicious", "checks": (failed,)})
    other = Trained(second.training.model_copy(update=changes), doubtful, suspicious, second.sizes)
    told = compare_methods({"a": first, "b": other}).notes
    for words in (
        "The figures of b are invalid (zero gradients)",
        "The sizes behind ρ₂ of b are suspicious (zero gradients).",
        "The training of b did not finish",
        "b was hardened against l2:0.5 and audited at linf:0.0313725.",
        "differ in the number of parameters, too (",
        "different numbers of images (a: 4,500, b: 900)",
        "different machines (a: unknown / unknown / unknown, b: other / unknown / unknown)",
    ):
        assert any(words in note for note in told), words
    assert len(told) == 7
    assert compare_methods({"a": first, "b": second}).notes == ()


def test_a_recipe_measures_itself_by_its_validation_threat_first(runs: dict[str, Trained]):
    training = runs["plain"].training
    assert hardened_against(training) == Threat(norm="linf", eps=8 / 255)
    assert training.training is not None
    for recipe, threat in (
        ({"validation_threat": "l2:0.5", "options": {"threat": "linf:0.1"}}, Threat(norm="l2", eps=0.5)),
        ({"validation_threat": None, "options": {"threat": "linf:0.1"}}, Threat(norm="linf", eps=0.1)),
        ({"validation_threat": None, "options": {}}, None),
    ):
        own = training.training.model_copy(update={"recipe": recipe})
        assert hardened_against(training.model_copy(update={"training": own})) == threat
    assert hardened_against(training.model_copy(update={"training": None})) is None


def test_the_table_of_a_terminal_holds_the_figures(runs: dict[str, Trained]):
    methods = compare_methods(runs)
    text = methods_table(methods)
    assert max(map(len, text.splitlines())) <= WIDTH
    blocks = text.strip().split("\n\n")
    assert len(blocks) == 4
    rows = columns(blocks[1])
    assert [(row["measure"], row["run"]) for row in rows] == [
        (measure, name) for measure in ("clean", "worst case", "rho_2") for name in runs
    ]
    assert [row["value"] for row in rows[3:6]] == [f"{row.worst.value:.1%}" for row in methods.rows]
    assert rows[4]["to first"] == f"{100 * methods.rows[1].to_first['worst case'].value:+.1f}"
    costs = columns(blocks[2])
    assert [row["gradients"] for row in costs] == ["40,000", "500,000", "520,000"]
    assert [row["found"] for row in costs] == [f"{row.found}/{row.attacked}" for row in methods.rows]
    assert columns(blocks[3])[0]["runs"] == "2"


def test_the_page_is_sound_and_carries_every_figure(runs: dict[str, Trained]):
    hostile = runs["trades"].training.spec.model_copy(update={"recipe": "<script>alert(1)"})
    old = runs["trades"].training.model_copy(update={"training": None, "spec": hostile})
    run = runs["trades"]
    methods = compare_methods({**runs, "<script>alert('x')</script>": Trained(old, run.audit, run.minimum, run.sizes)})
    source = methods_page(methods)
    found = assert_sound(source)
    assert "<script" not in source
    rows = found.figures["figure-tradeoff"][1:]
    assert rows == [[row.name, *exact(row.clean), *exact(row.worst)] for row in methods.rows]
    counted = [row for row in methods.rows if row.cost]
    assert found.figures["figure-cost"][1:] == [
        [row.name, repr(row.cost.gradients), *exact(row.worst)] for row in counted if row.cost
    ]
    assert len(counted) == 3
    values = {value for tag, key, value in found.attributes if tag == "data" and key == "value"}
    for row in methods.rows:
        assert row.rho2 is not None and repr(row.rho2.value) in values
        assert {repr(gap.value) for gap in row.to_first.values()} <= values
    assert all(note in Page(source).text for note in methods.notes)


def test_points_lie_where_the_rates_are_and_labels_name_each_method_once(runs: dict[str, Trained]):
    """Read places back: markers are drawn as <use> at a point, and both axes are affine between two of their ticks."""
    methods = compare_methods(runs)
    root = ElementTree.fromstring(figures.cost(methods))
    texts = {"".join(node.itertext()).strip(): node for node in root.iter(f"{SVG}text")}
    assert "plain" in texts and "trades" in texts and "trades again" not in texts
    places = {(float(use.get("x", "nan")), float(use.get("y", "nan"))) for use in root.iter(f"{SVG}use")}
    across = {name: float(node.get("x", "nan")) for name, node in texts.items()}
    scale = {10**5: "100k", 2 * 10**5: "200k"}
    low, high = sorted(scale)
    unit = (across[scale[high]] - across[scale[low]]) / np.log(high / low)
    ups = {name: use for name, use in texts.items() if re.fullmatch(r"\d+%", name)}
    one, *_, two = ups
    y = {name: float(ups[name].get("y", "nan")) for name in (one, two)}
    slope = (y[two] - y[one]) / (int(two[:-1]) - int(one[:-1]))
    drawn = []
    for row in methods.rows:
        assert row.cost is not None
        x = across[scale[low]] + unit * np.log(row.cost.gradients / low)
        height = y[one] + slope * (100 * row.worst.value - int(one[:-1]))
        drawn.append(min(np.hypot(px - x, py - height) for px, py in places))
    assert max(drawn) < 5  # the text of a tick stands a few units below its line


def test_names_too_many_for_the_colours_still_differ(make_trained: Make):
    runs = {f"m{i}": make_trained(f"m{i}", 0.3 + 0.05 * i, seed=i, gradients=10_000 * 2**i) for i in range(8)}
    svg = figures.tradeoff(compare_methods(runs))
    assert svg == figures.tradeoff(compare_methods(runs))
    texts = ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert set(runs) <= set(texts)
    assert len(set(re.findall(r'<use href="#(tradeoff-[^"]+)"', svg))) >= 6
