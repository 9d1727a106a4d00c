import re
from collections.abc import Callable, Sequence
from itertools import combinations
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from rempart.core.stats import Rate, wilson
from rempart.report import figures
from rempart.report.schema import Curve, Report
from report.conftest import report_of

SVG = "{http://www.w3.org/2000/svg}"


def drawn(report: Report) -> dict[str, str]:
    """Every figure that belongs to a report."""
    found = {}
    if report.attacks:
        found["accuracy"] = figures.accuracy(report)
    for norm in {curve.norm for curve in report.curves}:
        found[f"curves-{norm}"] = figures.curves(report, norm)
    if report.epochs:
        found["training"] = figures.training(report)
    if report.pairs:
        found["pairs"] = figures.pairs(report)
    return found


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("case", ["hostile", "one image", "training", "one epoch", "classes, hostile"], indirect=True)
def test_every_figure_is_xml_and_the_same_bytes_twice_whatever_the_users_settings(any_report: Report):
    first = drawn(any_report)
    with mpl.rc_context({"axes.labelsize": 30, "axes.grid": True, "svg.hashsalt": None, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert drawn(any_report) == first
        assert dict(mpl.rcParams) == before
    for svg in first.values():
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"


def test_ids_of_figures_on_one_page_differ_and_every_reference_is_met(make_report: Callable[..., Report]):
    ids = {}
    for key, svg in drawn(make_report()).items():
        ids[key] = re.findall(r' id="([^"]+)"', svg)
        assert len(set(ids[key])) == len(ids[key])
        assert all(name.startswith(f"{key}-") for name in ids[key])
        assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)} == set(ids[key])
        assert ids[key]
    for one, other in combinations(ids.values(), 2):
        assert not set(one) & set(other)


def test_ink_follows_the_page_and_nothing_lies_behind_it(make_report: Callable[..., Report]):
    for svg in drawn(make_report()).values():
        assert "currentColor" in svg
        assert figures.INK not in svg
        assert "<style" not in svg
        assert "metadata" not in svg
        assert not re.search(r"fill: #(ffffff|000000)", svg)


def test_bars_carry_each_label_and_rate_in_the_order_of_the_report(make_report: Callable[..., Report]):
    report = make_report()
    rates = [report.clean, *(a.accuracy for a in report.attacks), report.worst_case]
    found = texts(figures.accuracy(report))
    assert [t for t in found if "." in t] == [f"{r.value:.1%}" for r in rates if r]
    labels = ["clean", *(a.label for a in report.attacks), "worst case"]
    assert [t for t in found if t in labels] == labels


def test_bars_and_whiskers_are_as_long_as_the_rates(make_report: Callable[..., Report]):
    """Read the lengths back from the paths: x is affine in the share, fixed by the ticks at 0% and 100%."""
    report = make_report()
    rates = [report.clean, *(a.accuracy for a in report.attacks), report.worst_case]
    root = ElementTree.fromstring(figures.accuracy(report))
    ticks = {"".join(node.itertext()): float(node.get("x", "nan")) for node in root.iter(f"{SVG}text")}
    zero, one = ticks["0%"], ticks["100%"]
    paths = [re.findall(r"-?[\d.]+", path.get("d", "")) for path in root.iter(f"{SVG}path")]
    spans = [(min(xs), max(xs)) for p in paths if len(xs := [float(v) for v in p[::2]]) > 1]
    shares = [((low - zero) / (one - zero), (high - zero) / (one - zero)) for low, high in spans]
    for rate in rates:
        assert rate is not None
        assert any(s == pytest.approx((0, rate.value), abs=1e-3) for s in shares)
        assert any(s == pytest.approx((rate.low, rate.high), abs=1e-3) for s in shares)


def test_the_second_axis_is_there_only_where_it_means_something(make_report: Callable[..., Report]):
    report = make_report()
    assert "levels of 255" in texts(figures.curves(report, "linf"))
    assert "levels of 255" not in texts(figures.curves(report, "l2"))
    boxed = report.model_copy(update={"model": report.model.model_copy(update={"low": -1.0})})
    assert "levels of 255" not in texts(figures.curves(boxed, "linf"))


@pytest.mark.parametrize(("left", "last"), [(0, 0.25), (1, 1.0)])
def test_a_figure_ends_where_nothing_is_left(make_report: Callable[..., Report], left: int, last: float):
    """The l2 axis reaches the first budget with nothing right, and the end where something always is."""
    report = make_report()
    shares = [wilson(k, 100) for k in (95, 40, 0, 0)]
    shares[2:] = [wilson(left, 100)] * 2
    curve = Curve(label="sweep", norm="l2", eps=(0.0, 0.1, 0.25, 1.0), accuracy=tuple(shares))
    root = ElementTree.fromstring(figures.curves(report.model_copy(update={"curves": (curve,)}), "l2"))
    at = {"".join(node.itertext()): float(node.get("x", "nan")) for node in root.iter(f"{SVG}text")}
    ticks = sorted((float(text), x) for text, x in at.items() if re.fullmatch(r"[\d.]+", text))
    (low, left_x), (high, right_x) = ticks[0], ticks[-1]
    width = float(root.get("width", "").removesuffix("pt"))
    edge = low + (width - 5 - left_x) / (right_x - left_x) * (high - low)  # the axis ends near the right margin
    assert edge == pytest.approx(1.05 * last, rel=0.05)


def test_a_training_of_one_epoch_still_shows_its_points(make_training: Callable[..., Report]):
    root = ElementTree.fromstring(figures.training(make_training(1)))
    assert sum(1 for _ in root.iter(f"{SVG}use")) >= 2 + 2  # loss and accuracy, beside ticks and legend


def test_hostile_names_stay_text(make_report: Callable[..., Report]):
    clean = make_report().clean
    assert clean is not None
    rates = {"clean": clean}
    svg = figures.grouped(["clean"], {"<b>$\\frac{$</b>\x00\x1b": rates, "日本": rates})
    assert {"<b>$\\frac{$</b>??", "日本"} <= set(texts(svg))


def test_a_training_marks_the_epoch_whose_weights_were_kept(make_training: Callable[..., Report]):
    """The dotted lines stand at the place of epoch 24 on an axis fixed by its ticks."""
    root = ElementTree.fromstring(figures.training(make_training(30)))
    told = ["".join(node.itertext()).strip() for node in root.iter(f"{SVG}text")]
    assert {"validation accuracy", "training loss", "under a short attack", "weights kept: epoch 24"} <= set(told)
    at = {"".join(node.itertext()): float(node.get("x", "nan")) for node in root.iter(f"{SVG}text")}
    ticks = {int(text): x for text, x in at.items() if re.fullmatch(r"\d+", text) and int(text) >= 4}
    first, last = min(ticks), max(ticks)
    expected = ticks[first] + (24 - first) * (ticks[last] - ticks[first]) / (last - first)
    dotted = [path.get("d", "") for path in root.iter(f"{SVG}path") if "stroke-dasharray: 1," in path.get("style", "")]
    places = [[float(v) for v in re.findall(r"-?[\d.]+", d)[::2]] for d in dotted]
    assert sum(place == pytest.approx([expected] * 2, abs=0.5) for place in places) == 2


@pytest.mark.parametrize("case", ["classes", "a few pairs"])
def test_the_cells_of_a_matrix_stand_in_their_row_and_column_and_can_be_read(case: str):
    """Places read back from the svg: the number of each pair under the name of its target, beside its true class."""
    report = report_of(case)
    svg = figures.pairs(report)
    root = ElementTree.fromstring(svg)
    cells = {pair: f"{rate.value:.0%}" for pair, rate in shares(report).items()}
    lines = [("".join(t.itertext()).strip(), t) for t in root.iter(f"{SVG}text")]
    numbers = [text for text, _ in lines if re.fullmatch(r"\d+%", text)]
    assert numbers[: len(cells)] == list(cells.values()) or set(cells.values()) <= set(numbers)
    sizes = [text for text, _ in lines if text.startswith("n=")]
    assert sizes == [f"n={pair.turned.n}" for pair in report.pairs]
    dashes = [text for text, _ in lines if text == "-"]
    rows, columns = {p.label for p in report.pairs}, {p.target for p in report.pairs}
    assert len(dashes) == len(rows) * len(columns) - len(report.pairs) - len(rows & columns)


def test_letters_of_a_matrix_stand_out_in_grey():
    """At least 4.4 to 1 in lightness alone, as WCAG 2 counts it; on middle grey nothing has more than 4.58."""
    for share in np.linspace(0, 1, 101):
        light = luminance(mpl.colormaps[figures.MAP](share)[:3])
        letters = luminance(to_rgb(figures.LIGHT if share < figures.TURN else figures.DARK))
        high, low = max(light, letters) + 0.05, min(light, letters) + 0.05
        assert high / low > 4.4, share


def luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def shares(report: Report) -> dict[tuple[int, int], Rate]:
    return {(pair.label, pair.target): pair.turned for pair in report.pairs}
