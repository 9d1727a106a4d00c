import base64
import io
import re
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from rempart.core.threat import Threat
from rempart.report import neurons
from rempart.report.figures import INK
from rempart.report.schema import Report
from rempart.report.text import threat_of
from report.conftest import report_of

SVG = "{http://www.w3.org/2000/svg}"


def drawn(report: Report) -> dict[str, str]:
    """Every figure of an explanation."""
    models = report.explained
    found = {"profile": neurons.profile(models), "heat": neurons.heat(models)}
    for i, model in enumerate(models):
        found[f"sorted-{i}"] = neurons.sorted_curves(model, f"sorted-{i}")
        found[f"histogram-{i}"] = neurons.histograms(model, f"histogram-{i}")
        if model.effects:
            found[f"tests-{i}"] = neurons.tests(model, f"tests-{i}")
    if report.illustration is not None:
        found["landscape"] = neurons.landscape(report.illustration, threat_of(report))
    return found


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def marks(svg: str) -> list[tuple[float, float, str]]:
    """Places of all markers and how they look, ticks left out."""
    uses = ElementTree.fromstring(svg).iter(f"{SVG}use")
    places = [(float(u.get("x", "nan")), float(u.get("y", "nan")), u.get("style", "")) for u in uses]
    return [place for place in places if "stroke-width: 0.8" not in place[2]]


@pytest.mark.parametrize("case", ["explanation", "explanation of one", "explanation, hostile"])
def test_every_figure_is_xml_and_the_same_bytes_twice_whatever_the_users_settings(case: str):
    report = report_of(case)
    first = drawn(report)
    with mpl.rc_context({"axes.labelsize": 30, "axes.grid": True, "svg.hashsalt": None, "image.cmap": "jet"}):
        assert drawn(report) == first
    for key, svg in first.items():
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
        assert INK not in svg and "currentColor" in svg
        assert all(name.startswith(f"{key}-") for name in re.findall(r' id="([^"]+)"', svg))


def test_hostile_names_stay_text():
    found = drawn(report_of("explanation, hostile"))
    for key in ("profile", "heat", "sorted-0", "tests-0"):
        assert "<script" not in found[key]
        assert any(text.startswith("<script>alert") for text in texts(found[key]))
        assert "日本?" in texts(found[key])


def strayed(report: Report) -> Report:
    """The same with one neuron of the last layer that moves a thousand times further than its activations are large."""
    model = report.explained[0]
    *others, last = model.layers
    last = last.model_copy(update={"relative": (1000.0, *last.relative[1:])})
    return report.model_copy(update={"explained": (model.model_copy(update={"layers": (*others, last)}),)})


@pytest.mark.parametrize("outlier", [False, True])
def test_the_heat_map_holds_the_sensitivities_in_order(make_explanation: Callable[..., Report], outlier: bool):
    """Read the colours back: the lightness of a cell rises with the sensitivity, from left to right it falls."""
    report = make_explanation(("one",), {"small": 4, "large": 150})
    report = strayed(report) if outlier else report
    layers = report.explained[0].layers
    images = [node for node in ElementTree.fromstring(neurons.heat(report.explained)).iter(f"{SVG}image")]
    data = images[0].get("href", "").partition(",")[2]
    grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), dtype=float)
    rows, columns = grey.shape
    assert (rows, columns) == (2, neurons.CELLS) or columns >= neurons.CELLS
    top = np.quantile([value for layer in layers for value in layer.relative], 0.99)
    assert top < 10 and (max(layers[1].relative) == 1000) == outlier
    for row, layer in zip((rows // 4, rows - 1 - rows // 4), layers, strict=True):
        order = sorted(layer.relative, reverse=True)
        own = grey[row]
        assert (np.diff(own) <= 1).all(), "no cell is lighter than the one left of it"
        middles = [int((k + 0.5) * columns / len(order)) for k in range(len(order))]
        colours = mpl.colormaps[neurons.MAP](np.sqrt(np.minimum(order, top) / top))[:, :3] * 255
        expected = colours @ (0.299, 0.587, 0.114)
        assert own[middles] == pytest.approx(expected, abs=3)


def test_the_map_reads_the_same_in_grey():
    colours = mpl.colormaps[neurons.MAP](np.linspace(0, 1, 50))[:, :3]
    assert (np.diff(colours @ (0.299, 0.587, 0.114)) > 0).all()


def test_marks_of_a_test_stand_at_the_accuracies(make_explanation: Callable[..., Report]):
    """Places are affine in the accuracy, fixed by the ticks at 0 and 100."""
    report = make_explanation(("one",))
    model = report.explained[0]
    svg = neurons.tests(model, "t")
    root = ElementTree.fromstring(svg)
    ticks = [(t, float(n.get("x", "nan"))) for n in root.iter(f"{SVG}text") if (t := "".join(n.itertext())) in "0100"]
    left, right = sorted(x for t, x in ticks if t == "0"), sorted(x for t, x in ticks if t == "100")
    assert len(left) == len(right) == 2, "a scale under each column"
    places = [x for x, _, style in marks(svg)]
    for column, tests in enumerate((("zero, clean", "mean, clean", "planted"), ("zero, attacked", "restored"))):
        for effect in (e for e in model.effects if e.test in tests):
            for rate in (effect.sensitive, effect.random, effect.least):
                expected = left[column] + rate.value * (right[column] - left[column])
                assert any(abs(place - expected) < 0.3 for place in places), (effect.layer, effect.test)


def test_tests_are_told_apart_by_their_marks_and_not_by_colour_alone(make_explanation: Callable[..., Report]):
    svg = neurons.tests(make_explanation().explained[0], "t")
    assert {"most sensitive", "random", "least sensitive", "nothing done", "accuracy (%)"} <= set(texts(svg))
    assert {title.split(",")[0] for title in neurons.TITLES.values()} <= {t.rstrip(",") for t in texts(svg)}
    assert len({marker for _, _, marker in neurons.CHOICES.values()}) == 3


def test_shared_images_are_hollow_and_named_only_where_there_are_any(make_explanation: Callable[..., Report]):
    several = neurons.profile(make_explanation(("a", "b")).explained)
    alone = neurons.profile(make_explanation(("a",)).explained)
    hollow = "hollow: the images of the first model"
    assert hollow in texts(several) and hollow not in texts(alone)
    assert sum("fill-opacity: 0" in style for _, _, style in marks(several)) == 2 * 2 + 1, (
        "two layers, two panels, legend"
    )


def test_the_sensitive_set_is_marked_in_both_orders(make_explanation: Callable[..., Report]):
    model = make_explanation(("one",), {"block": 80}).explained[0]
    svg = neurons.sorted_curves(model, "s")
    assert sum("#d55e00" in style for _, _, style in marks(svg)) == 2 * len(model.layers[0].sensitive) == 16


def test_histograms_end_at_the_99th_percentile_and_count_every_neuron(
    make_explanation: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
):
    model = strayed(make_explanation(("one",), {"block": 150})).explained[0]
    counted: list[tuple[int, float]] = []
    plain = Axes.hist

    def hist(axes: Axes, values: list[float], bins: list[float], **look: object) -> object:
        found = plain(axes, values, bins=bins, **look)  # type: ignore[arg-type]
        counted.append((int(np.sum(found[0])), bins[-1]))
        return found

    monkeypatch.setattr(Axes, "hist", hist)
    neurons.histograms(model, "h")
    layer = model.layers[0]
    ends = [np.quantile(values, 0.99) for values in (layer.absolute, layer.relative)]
    sizes = [150, len(layer.sensitive)] * 2
    assert [n for n, _ in counted] == sizes
    assert [end for _, end in counted] == pytest.approx([ends[0], ends[0], ends[1], ends[1]])
    assert neurons.reached([0.0] * 200 + [3.0]) == 3.0 and neurons.reached([0.0]) == 1.0


def test_a_landscape_has_units_and_draws_the_zero_line_and_the_budget_where_they_are():
    report = report_of("explanation")
    picture = report.illustration
    assert picture is not None
    zero, within = "margin 0: beyond it, the class is wrong", "the budget: steps that stay within it"
    found = texts(neurons.landscape(picture, threat_of(report)))
    assert {zero, within, "margin: true logit minus best other"} <= set(found)
    assert sum("in pixel units" in text for text in found) == 2
    flat = picture.model_copy(update={"landscape": ((1.0, 2.0), (3.0, 4.0))})
    assert zero not in texts(neurons.landscape(flat, None)) and within not in texts(neurons.landscape(flat, None))
    for threat in (Threat(norm="l2", eps=0.03), Threat(norm="linf", eps=0.1)):
        assert within not in texts(neurons.landscape(picture, threat)), "no diamond, or out of sight"


def test_the_numbers_are_quantiles_of_all_neurons():
    assert list(neurons.quantiles([4.0, 0.0, 1.0, 3.0, 2.0])) == pytest.approx([4, 3.6, 3, 2, 1, 0.4, 0])
