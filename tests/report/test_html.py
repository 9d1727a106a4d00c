import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser

import numpy as np
import pytest

from rempart.core.stats import Rate
from rempart.report.compare import compare, compare_html
from rempart.report.html import _gap, page
from rempart.report.schema import ALL, KNOWS, Report
from rempart.report.text import stamp, verdict
from report.conftest import TUMOURS, page_of, report_of

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """A document as lists of tags, attributes, texts, and the numbers of the table under each figure."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.figures: dict[str, list[list[str]]] = {}
        self.figure = ""
        self.value = False
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        given = dict(attrs)
        if tag == "figure":
            self.figure = str(given["id"])
            self.figures[self.figure] = []
        if tag == "tr" and self.figure:
            self.figures[self.figure].append([])
        if tag == "data" and self.figure:
            self.figures[self.figure][-1].append(str(given["value"]))
        self.value = tag == "data"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "figure":
            self.figure = ""

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        cell = bool(self.open) and self.open[-1] in ("td", "th")
        if cell and self.figure and data.strip() and not self.value:
            self.figures[self.figure][-1].append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def exact(rate: Rate) -> list[str]:
    return [repr(v) for v in (rate.k, rate.n, rate.value, rate.low, rate.high)]


def assert_sound(source: str) -> Page:
    """Well-formed, self-contained, without script or foreign host, ids unique, references met."""
    found = Page(source)
    assert not found.open
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(found.tags)
    for tag, key, value in found.attributes:
        assert not key.startswith("on"), (tag, key)
        if key == "xmlns":  # names the language, is never fetched
            assert value == "http://www.w3.org/2000/svg"
            continue
        assert "//" not in value or key in ("alt", "aria-label", "content") or value.startswith("data:"), (
            tag,
            key,
            value,
        )
        if key in ("src", "href"):
            assert value.startswith("data:image/png;base64," if key == "src" or tag == "image" else "#")
    assert not re.search(r"@import|url\((?!#)", source)
    ids = [value for _, key, value in found.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {v[1:] for tag, key, v in found.attributes if key == "href" and tag != "image"} <= set(ids)
    policy = next(v for tag, key, v in found.attributes if tag == "meta" and key == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert all(any(t == "img" and k == "alt" and v for t, k, v in found.attributes) for t in found.tags if t == "img")
    assert found.tags.count("svg") == found.tags.count("figure") == len(found.figures)
    return found


def test_every_page_is_sound_and_states_verdict_and_state(any_report: Report, any_page: str):
    found = assert_sound(any_page)
    assert " ".join(verdict(any_report).split()) in found.text
    assert stamp(any_report) in found.text
    assert not re.search(r"\brobust\b", verdict(any_report))


def test_every_figure_has_a_table_with_exactly_the_numbers_of_the_report(any_report: Report, any_page: str):
    found = Page(any_page).figures
    expected: dict[str, list[list[str]]] = {}
    if any_report.attacks:
        assert any_report.clean is not None
        rates = [("clean", any_report.clean), *((a.label, a.accuracy) for a in any_report.attacks)]
        rates += [("worst case", any_report.worst_case)] if any_report.worst_case else []
        expected["figure-accuracy"] = [[label, *exact(rate)] for label, rate in rates]
    for curve in any_report.curves:
        for eps, rate in zip(curve.eps, curve.accuracy, strict=True):
            scaled = [repr(eps * 255)] if curve.norm == "linf" else []
            row = [curve.label, repr(eps), *scaled, *exact(rate)]
            expected.setdefault(f"figure-curves-{curve.norm}", []).append(row)
    if any_report.epochs:
        expected["figure-training"] = [
            [
                *(repr(v) for v in (e.epoch, e.loss, e.accuracy)),
                "-" if e.robust_accuracy is None else repr(e.robust_accuracy),
                *(repr(v) for v in (e.learning_rate, e.seconds)),
            ]
            for e in any_report.epochs
        ]
    names = any_report.model.classes
    for pair in any_report.pairs:
        row = [names[pair.label], names[pair.target], *exact(pair.turned)]
        expected.setdefault("figure-pairs", []).append(row)
    expected |= neurons_told(any_report)
    assert {key: rows[1:] for key, rows in found.items()} == expected


def neurons_told(report: Report) -> dict[str, list[list[str]]]:
    """The rows under the figures of an explanation, by a second way to them."""
    rows: dict[str, list[list[str]]] = {}

    def spread(values: Sequence[float]) -> list[str]:
        return [repr(float(np.percentile(values, at))) for at in (100, 90, 75, 50, 25, 10, 0)]

    for i, model in enumerate(report.explained):
        for layer in model.layers:
            n, means = len(layer.absolute), (layer.overall, np.mean(layer.absolute).item())
            lent = (layer.shared_relative, layer.shared_absolute)
            told = [repr(mean) for mean in means] + ["-" if v is None else repr(v) for v in lent]
            name = [layer.name] if layer.name.strip() else []
            rows.setdefault("figure-profile", []).append([model.label, *name, *told])
            rows.setdefault("figure-heat", []).append([model.label, *name, repr(n), *spread(layer.relative)])
            for kind, value in (("absolute", means[1]), ("relative", means[0])):
                rows.setdefault(f"figure-sorted-{i}", []).append([*name, kind, repr(n), *spread(getattr(layer, kind))])
                told = [*name, kind, repr(n), repr(value)]
                rows.setdefault(f"figure-histogram-{i}", []).append(told)
        for effect in model.effects:
            told = [repr(v) for r in (effect.sensitive, effect.random, effect.least) for v in (r.value, r.low, r.high)]
            row = [effect.layer, effect.test, repr(effect.before.value), *told]
            rows.setdefault(f"figure-tests-{i}", []).append(row)
    if report.illustration is not None:
        picture = report.illustration
        steps = np.linspace(-picture.reach, picture.reach, len(picture.landscape)).tolist()
        table = zip(steps, picture.landscape, strict=True)
        rows["figure-landscape"] = [[repr(step), *map(repr, row)] for step, row in table]
    return rows


def test_an_explanation_shows_the_means_of_the_layers_its_pictures_and_what_they_span():
    report = report_of("explanation")
    found = assert_sound(page_of("explanation"))
    picture = report.illustration
    assert picture is not None
    shown = [value.partition(",")[2] for tag, key, value in found.attributes if tag == "img" and key == "src"]
    maps = [png for m in picture.maps for png in (m.clean_png, m.adversarial_png, m.difference_png)]
    named = ("original_png", "adversarial_png", "perturbation_png", "saliency_png", "adversarial_saliency_png")
    assert shown == [*(getattr(picture, name) for name in named), *maps]
    assert re.search(r"values -1.25 to 2.5 , difference ± 0.375", found.text)
    values = [value for tag, key, value in found.attributes if tag == "data" and key == "value"]
    for model in report.explained:
        for layer in model.layers:
            assert repr(layer.overall) in values
        for effect in model.effects:
            assert repr(effect.gap.value) in values
        assert all(repr(row.jaccard) in values for row in model.overlaps)
    assert "image-rendering: pixelated" in page_of("explanation")


def test_nothing_is_drawn_of_an_explanation_that_is_not_there():
    assert not Page(page_of("no explanation")).figures
    found = Page(page_of("explanation of one"))
    assert set(found.figures) == {f"figure-{key}" for key in ("profile", "heat", "sorted-0", "histogram-0")}
    assert "img" not in found.tags and "Shared: on" not in found.text
    assert "Masking and replacing" not in found.text


def test_hostile_names_are_shown_and_do_nothing(make_report: Callable[..., Report]):
    classes = (HOSTILE, '"><img src=x onerror=alert(1)>')
    report = make_report(classes=classes, name=HOSTILE, notes=(HOSTILE,), not_run=(HOSTILE,), complete=False)
    environment = {HOSTILE: HOSTILE}
    report = report.model_copy(update={"environment": environment, "created": HOSTILE})
    bad = report.examples[0].model_copy(update={"original_png": '"><script>'})
    source = page(report.model_copy(update={"examples": (bad, *report.examples[1:])}))
    assert "<script" not in source
    assert "<img src=x" not in source
    found = Page(source)
    assert "script" not in found.tags
    assert found.text.count(HOSTILE) >= 6
    assert any(key == "alt" and classes[1] in value for _, key, value in found.attributes)


def test_the_page_says_what_a_reviewer_looks_for(make_report: Callable[..., Report]):
    report = make_report()
    text = Page(page(report)).text
    order = [
        report.title,
        "complete",
        "the attacks run here left",
        report.notes[0],
        "Checks before the attacks",
        "Accuracy under attack",
        "Smallest perturbations",
        "Accuracy against the budget",
        "Examples",
        "What was not tried",
        "Running it again",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    for words in ("rempart run report.json", report.model.digest, report.data.digest, "torch", "meningioma, 87.3%"):
        assert words in text
    assert all(check.message in text and check.status in text for check in report.preflight)


def test_the_page_of_detectors_carries_every_rate_and_every_count():
    report, source = report_of("detection"), page_of("detection")
    for detection in report.detection:
        assert detection.evaded is not None
        rates = [detection.false_alarms["0.1"], detection.evaded, *(row.held for row in detection.held)]
        for row in detection.separations:
            rates += row.caught.values()
            assert f"{row.auroc.value:.3f}" in source
        assert [rate for rate in rates if f'<data value="{rate.value}">' not in source] == []
        assert all(f"{row.auroc.value:.3f}<" in source for row in detection.left_out)
    kinds = source[source.index('id="kinds-') :]
    assert re.findall(r'<data value="(\d+)">', kinds)[:9] == ["400", "50", "25", "9", "80", "11", "1", "2", "98"]
    assert "got through" in source and 'id="kinds-2"' not in source
    assert report.clean is not None and report.worst_case is not None
    section = source[source.index('id="detection"') : source.index('id="separation"')]
    first, second = (re.findall(r'<th scope="col">(.*?)</th>', table) for table in section.split("<h3>"))
    assert first == ["detector", "none", KNOWS, ALL, "false alarms", "got through"]
    assert second == ["detector", "fgsm", "pgd", "fgsm at 0.1"]
    (alone,) = re.findall(r'<th scope="row">no detector</th>(.*?)</tr>', section)
    cells = [re.findall(r'<data value="(.*?)">', cell) for cell in alone.split("</td>")[:-1]]
    assert cells == [[repr(report.clean.value)], [], [repr(report.worst_case.value)], [], []]
    without = page_of("detection without who knows")
    assert re.findall(r'<th scope="row">lid</th><td>.*?</td><td>(.*?)</td>', without)[0] == "-"


def test_a_note_that_repeats_a_check_stands_once(make_report: Callable[..., Report]):
    report = make_report(attacks=False)
    message = report.preflight[2].message
    assert Page(page(report.model_copy(update={"notes": (message,)}))).text.count(message) == 1


@pytest.mark.parametrize(("found", "shown"), [(1.0, "0.4123"), (0.2, "not reached"), (0.0, "not reached")])
def test_a_median_that_was_not_reached_is_no_number(make_report: Callable[..., Report], found: float, shown: str):
    report = make_report(minimum_found=found).model_copy(update={"curves": ()})
    text = Page(page(report)).text
    assert shown in text[text.index("Smallest perturbations") : text.index("Examples")]
    assert "None" not in text
    assert "nan" not in text.split()


def test_the_page_of_a_comparison_is_sound_and_carries_its_numbers(make_report: Callable[..., Report]):
    reports = {"plain": make_report(seed=1), HOSTILE: make_report(seed=2, strength=0.3)}
    comparison = compare(reports)
    source = compare_html(comparison, reports)
    found = assert_sound(source)
    assert "<script" not in source
    rows = found.figures["figure-compare"][1:]
    assert rows == [
        [measure, entry.name, *exact(entry.accuracy[measure])]
        for measure in comparison.measures
        for entry in comparison.entries
    ]
    shared = [row for key, rows in found.figures.items() if key.startswith("figure-shared") for row in rows[1:]]
    assert len(shared) == sum(len(curve.eps) for report in reports.values() for curve in report.curves)
    values = {value for tag, key, value in found.attributes if tag == "data" and key == "value"}
    assert {repr(c.difference.value) for c in comparison.contrasts} <= values


def test_classes_costs_and_the_scale_of_a_change_are_told():
    report = report_of("classes")
    found = assert_sound(page_of("classes"))
    assert report.risk is not None
    for told in report.classes:
        rates = [f"{rate.value:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" for rate in (told.clean, told.worst)]
        assert f"{TUMOURS[told.label]} {told.clean.n} {rates[0]} {rates[1]}" in found.text
    for name, mean in (("without an attack", report.risk.clean), ("under attack: at least", report.risk.worst)):
        assert f"{name} {mean.value:.4g} [{mean.low:.3g}, {mean.high:.3g}]" in found.text
    assert f"if every mistake could be forced {report.risk.ceiling:.4g}" in found.text
    assert "taken for pituitary" in found.text and "pituitary 1.5 1 0.5 0" in found.text
    assert "± 0.05" in found.text, "half the box, ten times enlarged"
    assert "window [0.1, 0.9]" in found.text


def test_the_gap_of_a_test_of_neurons_stands_where_a_narrow_screen_begins():
    """390 pixels hold the layer, the test and one number; the others are a scroll away."""
    found = re.search(r'<table class="dense tests">.*?</table>', page(report_of("explanation")), re.S)
    assert found is not None
    heads = re.findall(r"<th scope=\"col\"[^>]*>([^<]+)<", found[0])
    assert heads[1:4] == ["test", "gap", "before"]
    first = report_of("explanation").explained[0].effects[0]
    row = re.findall(r"<tr><th scope=\"row\">.*?</tr>", found[0], re.S)[0]
    assert re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)[1].startswith(str(_gap(first.gap)))
