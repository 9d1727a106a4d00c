"""The report as a page: one file that needs no host, no script and no second file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rempart.core.stats import Auroc, Difference, Mean, Rate
from rempart.report import figures, neurons
from rempart.report.compare import CLEAN, WORST, Comparison
from rempart.report.methods import Methods, Row
from rempart.report.schema import (
    ALL,
    KNOWS,
    NO_DETECTOR,
    NONE,
    AuditSpec,
    Curve,
    Explained,
    ExplainSpec,
    Illustration,
    Report,
    TrainSpec,
)
from rempart.report.text import (
    amount,
    budget_of,
    count,
    first_attack,
    in_levels,
    interval,
    judged_on,
    limits,
    notes,
    options_of,
    points,
    risk_facts,
    span,
    stamp,
    threat_of,
    training_facts,
    trend_of,
    verdict,
)

READING = (
    "Images that an attack broke. Change: adversarial minus original, enlarged for the eye by the factor told; mid "
    "grey is no change, and the scale under it tells what black and white stand for."
)
_SYMBOLS = {"passed": "✓", "repaired": "↻", "warned": "!", "failed": "✗", "skipped": "-"}


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with the numbers it was drawn from."""

    key: str
    title: str
    caption: str
    svg: Markup
    header: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]


def page(report: Report) -> str:
    """The report as one self-contained HTML document."""
    return rendered(
        "report.html",
        **contents(report),
        budget=_budget(report),
        training=list(_training(report)),
        pairs_by=first_attack(report) if isinstance(report.spec, ExplainSpec) else "",
        trend=trend_of(report.trend) if report.trend is not None else "",
        together=(NONE, KNOWS, ALL),
        no_detector=NO_DETECTOR,
    )


def rendered(template: str, **values: Any) -> str:
    """A template with its values as a document."""
    return _environment().get_template(template).render(**values)


def contents(report: Report) -> dict[str, Any]:
    """What every page about a report is made from."""
    return {
        "report": report,
        "stamp": stamp(report),
        "verdict": verdict(report),
        "limits": list(limits(report)),
        "notes": notes(report),
        "created": _moment(report.created),
        "charts": {chart.key: chart for chart in _charts(report)},
        "replay": f"rempart run report.json{' --out NEW' if report.kind == 'train' else ''}",
        "spec": report.spec.model_dump_json(indent=2),
        "risk": list(risk_facts(report)),
        "level": _level(report),
        "symbols": _SYMBOLS,
        "reading": READING + _window(report),
        "reach_of": lambda e: (report.model.high - report.model.low) / 2 / e.amplification,
        "name_of": lambda k: report.model.classes[k] if 0 <= k < len(report.model.classes) else str(k),
    }


def _training(report: Report) -> Iterator[tuple[str, str]]:
    if report.training is not None and isinstance(report.spec, TrainSpec):
        yield from training_facts(report.training, report.spec)


def compare_page(comparison: Comparison, reports: Mapping[str, Report], detected: Sequence[Report] = ()) -> str:
    """A comparison as one self-contained HTML document, followed by the detectors of other reports."""
    level = f"{100 * comparison.confidence:g}%"
    return (
        _environment()
        .get_template("compare.html")
        .render(
            comparison=comparison,
            reports=reports,
            budgets={name: _budget(report) for name, report in reports.items()},
            charts=list(_shared_charts(comparison, reports)),
            level=level,
            detected=[(report, verdict(report)) for report in detected],
            together=(NONE, KNOWS, ALL),
            no_detector=NO_DETECTOR,
        )
    )


def methods_page(methods: Methods) -> str:
    """Training runs side by side as one self-contained HTML document."""
    return (
        _environment()
        .get_template("methods.html")
        .render(
            methods=methods,
            budget=budget_of(methods),
            charts=list(_method_charts(methods)),
            level=f"{100 * methods.confidence:g}%",
        )
    )


def _method_charts(methods: Methods) -> Iterator[Chart]:
    reading = f"Bars: {100 * methods.confidence:g}% intervals. One colour and marker per method, a label "
    reading += "beside its first run."
    yield Chart(
        key="tradeoff",
        title="Clean accuracy against worst case",
        caption=f"Up and to the right is better. {reading}",
        svg=Markup(figures.tradeoff(methods)),
        header=("run", *_rate_header("clean"), *_rate_header("worst case")),
        rows=[(row.name, *_exact_rate(row.clean), *_exact_rate(row.worst)) for row in methods.rows],
    )
    counted = [(row, row.cost) for row in methods.rows if row.cost is not None and row.cost.gradients]
    if counted:
        yield Chart(
            key="cost",
            title="Worst case against the cost of training",
            caption=f"Up and to the left is better. Each step to the right multiplies the cost. {reading}",
            svg=Markup(figures.cost(methods)),
            header=("run", "gradients", *_rate_header("worst case")),
            rows=[(row.name, _whole(cost.gradients), *_exact_rate(row.worst)) for row, cost in counted],
        )


def _rate_header(measure: str) -> Sequence[str]:
    return (f"{measure}: right", "images", "share", "low", "high")


def _shared_charts(comparison: Comparison, reports: Mapping[str, Report]) -> Iterator[Chart]:
    yield Chart(
        key="compare",
        title="Accuracy of each model",
        caption=f"Bars: share of the {count(comparison.n, 'image')} rightly classified. Whiskers: "
        f"{100 * comparison.confidence:g}% intervals.",
        svg=Markup(figures.grouped(comparison.measures, {e.name: e.accuracy for e in comparison.entries})),
        header=("accuracy", "model", "right", "images", "share", "low", "high"),
        rows=[
            (measure, entry.name, *_exact_rate(entry.accuracy[measure]))
            for measure in comparison.measures
            for entry in comparison.entries
            if measure in entry.accuracy
        ],
    )
    first, *rest = reports.values()
    for i, (label, norm) in enumerate((curve.label, curve.norm) for curve in first.curves):
        shown = {
            name: [c for c in report.curves if (c.label, c.norm) == (label, norm)] for name, report in reports.items()
        }
        if all(shown.values()) and rest:
            levels = in_levels(norm, first.model.low, first.model.high)
            yield Chart(
                key=f"shared-{i}",
                title=f"Accuracy against the {norm} budget: {label}",
                caption="Lines: share of images rightly classified at each budget. Bands: intervals.",
                svg=Markup(figures.overlay(reports, label, f"shared-{i}")),
                header=("model", *_curve_header(levels)),
                rows=[(name, *row) for name, found in shown.items() for row in _curve_rows(found[0], levels)],
            )


def _charts(report: Report) -> Iterator[Chart]:
    if report.attacks:
        rates = [(CLEAN, report.clean), *((a.label, a.accuracy) for a in report.attacks), (WORST, report.worst_case)]
        cascade = any(attack.survivors and attack.label != "checks" for attack in report.attacks[1:])
        so_far = ", after this attack and all above it" if cascade else ""
        yield Chart(
            key="accuracy",
            title="Accuracy under each attack",
            caption=f"Bars: share of all images rightly classified{so_far}. Whiskers: {_level(report)} intervals.",
            svg=Markup(figures.accuracy(report)),
            header=("attack", "right", "images", "share", "low", "high"),
            rows=[(label, *_exact_rate(rate)) for label, rate in rates if rate is not None],
        )
    if report.pairs:
        names = report.model.classes
        yield Chart(
            key="pairs",
            title="Which class becomes which",
            caption="Rows: the true class. Columns: the class an attack turned its images into. In each cell the share "
            "of the images of the row that were right at first (n of them); lighter is more. A dash: not tried. Each "
            "share is a lower bound: a stronger attack can only raise it.",
            svg=Markup(figures.pairs(report)),
            header=("true class", "turned into", "turned", "images", "share", "low", "high"),
            rows=[(names[p.label], names[p.target], *_exact_rate(p.turned)) for p in report.pairs],
        )
    for norm in dict.fromkeys(curve.norm for curve in report.curves):
        levels = in_levels(norm, report.model.low, report.model.high)
        title, what = ("Accuracy", "rightly classified")
        if report.certificate is not None:
            title, what = "Certified accuracy", "certified"
        yield Chart(
            key=f"curves-{norm}",
            title=f"{title} against the {norm} budget",
            caption=f"Lines: share of images {what} at each budget. Bands: {_level(report)} intervals.",
            svg=Markup(figures.curves(report, norm)),
            header=("curve", *_curve_header(levels)),
            rows=[
                (curve.label, *row)
                for curve in report.curves
                if curve.norm == norm
                for row in _curve_rows(curve, levels)
            ],
        )
    yield from _neuron_charts(report)
    if report.epochs:
        yield Chart(
            key="training",
            title="Course of the training",
            caption=f"Mean loss of each epoch on the training images, and the accuracies on the {judged_on(report)} "
            f"images at its end.{_kept(report)}",
            svg=Markup(figures.training(report)),
            header=("epoch", "loss", f"{judged_on(report)} accuracy", "under attack", "learning rate", "seconds"),
            rows=[
                (
                    exact(e.epoch, f"{e.epoch}"),
                    exact(e.loss, f"{e.loss:.4g}"),
                    exact(e.accuracy, f"{e.accuracy:.1%}"),
                    exact(e.robust_accuracy, f"{e.robust_accuracy or 0:.1%}"),
                    exact(e.learning_rate, f"{e.learning_rate:.3g}"),
                    exact(e.seconds, f"{e.seconds:.1f}"),
                )
                for e in report.epochs
            ],
        )


def _neuron_charts(report: Report) -> Iterator[Chart]:
    models = report.explained
    if models:
        yield Chart(
            key="profile",
            title="Mean sensitivity of each layer",
            caption="Layers in the order in which the network registers them, the first on top. Relative: how far "
            "neurons move, over the size of their "
            "activations; layers and models can be compared by it. Absolute: in units of the activations of the layer, "
            "which differ from model to model. Filled: each model on the images attacked on itself.",
            svg=Markup(neurons.profile(models)),
            header=("model", "layer", "relative", "absolute", "shared, relative", "shared, absolute"),
            rows=[
                (
                    model.label,
                    layer.name,
                    _number(layer.overall),
                    _number(layer.mean_absolute),
                    _number(layer.shared_relative),
                    _number(layer.shared_absolute),
                )
                for model in models
                for layer in model.layers
            ],
        )
        yield Chart(
            key="heat",
            title="Relative sensitivity of every neuron",
            caption="A row per layer, its neurons from the most sensitive (left) to the least, stretched to one width. "
            "Lighter: the neuron moves further. One scale for all models, drawn by the square root; it ends at the "
            "99th percentile of all neurons, and those beyond have its last colour, because neurons that hardly fire "
            "can move by many times their size. A row that is light only at its left end has few neurons that move "
            "much.",
            svg=Markup(neurons.heat(models)),
            header=("model", "layer", "neurons", *_QUANTILES),
            rows=[
                (model.label, layer.name, _whole(len(layer.relative)), *map(_number, neurons.quantiles(layer.relative)))
                for model in models
                for layer in model.layers
            ],
        )
    for i, model in enumerate(models):
        yield Chart(
            key=f"sorted-{i}",
            title=f"Neurons in order: {model.label}",
            caption="Each neuron of a layer, the most sensitive first, by the absolute measure (left) and by the "
            "relative one (right). Shaded, with diamonds: the set that counts as sensitive, chosen by the absolute "
            "measure. Where it does not stand first on the right, the two measures name different neurons.",
            svg=Markup(neurons.sorted_curves(model, f"sorted-{i}")),
            header=("layer", "measure", "neurons", *_QUANTILES),
            rows=_spread(model),
        )
        yield Chart(
            key=f"histogram-{i}",
            title=f"How many neurons move how far: {model.label}",
            caption="Bars: neurons of the layer with that absolute (left) and relative (right) sensitivity. Hatched: "
            "those of the sensitive set. Each axis ends at the 99th percentile of its neurons; those beyond are "
            "counted in the last bar.",
            svg=Markup(neurons.histograms(model, f"histogram-{i}")),
            header=("layer", "measure", "neurons", "mean"),
            rows=[
                row
                for layer in model.layers
                for row in (
                    (layer.name, "absolute", _whole(len(layer.absolute)), _number(layer.mean_absolute)),
                    (layer.name, "relative", _whole(len(layer.relative)), _number(layer.overall)),
                )
            ],
        )
        if model.effects:
            yield Chart(
                key=f"tests-{i}",
                title=f"Masking and replacing neurons: {model.label}",
                caption=f"Accuracy on {count(model.tested, 'pair')} after something was done to the sensitive share of "
                f"the neurons of a layer. Whiskers: {_level(report)} intervals, for random neurons over the draws. "
                "If sensitive neurons carried the wrong prediction, the circle would lie right of the square on "
                "attacked images, and left of it where attacked values are put into clean ones.",
                svg=Markup(neurons.tests(model, f"tests-{i}")),
                header=("layer", "test", "before", *_ENDS[0], *_ENDS[1], *_ENDS[2]),
                rows=[
                    (
                        effect.layer,
                        effect.test,
                        _share(effect.before),
                        *(
                            exact(value, f"{value:.1%}")
                            for rate in (effect.sensitive, effect.random, effect.least)
                            for value in (rate.value, rate.low, rate.high)
                        ),
                    )
                    for effect in model.effects
                ],
            )
    if report.illustration is not None:
        yield _landscape(report, report.illustration)


_ENDS = [(name, "low", "high") for name in ("most sensitive", "random", "least sensitive")]
_QUANTILES = ("largest", "90%", "75%", "median", "25%", "10%", "smallest")


def _spread(model: Explained) -> Sequence[Sequence[str | Markup]]:
    return [
        (layer.name, measure, _whole(len(values)), *map(_number, neurons.quantiles(values)))
        for layer in model.layers
        for measure, values in (("absolute", layer.absolute), ("relative", layer.relative))
    ]


def _landscape(report: Report, picture: Illustration) -> Chart:
    steps = neurons.steps(picture)
    return Chart(
        key="landscape",
        title="The margin around the image",
        caption="A slice through the space of images: upwards along the sign of the gradient of the loss, sideways "
        "along random signs. Light: the true class is ahead; beyond the dashed line another class is. Images outside "
        "the box are cut to it. A line close to the image above it and far from it at its sides is what an adversarial "
        "direction looks like; one slice shows no other direction.",
        svg=Markup(neurons.landscape(picture, threat_of(report))),
        header=("up the loss", *(f"{step:.3g} sideways" for step in steps)),
        rows=[
            (exact(step, f"{step:.3g}"), *map(_number, row)) for step, row in zip(steps, picture.landscape, strict=True)
        ],
    )


def _kept(report: Report) -> str:
    if report.training is None:
        return ""
    return f" Dotted: epoch {report.training.best_epoch}, whose weights were kept."


def exact(value: float | None, told: str) -> Markup:
    """A number as people read it, with the whole of it for programs."""
    return Markup("-") if value is None else Markup('<data value="{}">{}</data>').format(repr(value), told)


def _curve_header(levels: bool) -> Sequence[str]:
    return ("eps", *(("eps x 255",) if levels else ()), "right", "images", "share", "low", "high")


def _curve_rows(curve: Curve, levels: bool) -> Iterator[Sequence[Markup]]:
    for eps, rate in zip(curve.eps, curve.accuracy, strict=True):
        scaled = (exact(eps * 255, f"{eps * 255:.4g}"),) if levels else ()
        yield exact(eps, f"{eps:.4g}"), *scaled, *_exact_rate(rate)


def _budget(report: Report) -> str:
    threat = threat_of(report)
    return "" if threat is None else f"{threat.norm} {amount(threat, report.data)}"


def _window(report: Report) -> str:
    window = report.spec.window if isinstance(report.spec, AuditSpec) else None
    return "" if window is None else f" Originals and adversarial images: window [{window[0]:g}, {window[1]:g}]."


def _moment(created: str) -> str:
    try:
        return datetime.fromisoformat(created).strftime("%Y-%m-%d %H:%M %Z")
    except ValueError:
        return created


def _exact_rate(rate: Rate) -> Sequence[Markup]:
    shares = [exact(value, f"{value:.2%}") for value in (rate.value, rate.low, rate.high)]
    return _whole(rate.k), _whole(rate.n), *shares


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rempart.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        area=_area,
        checked=_checked,
        gap=_gap,
        interval=interval,
        mean=_mean,
        number=_number,
        options=options_of,
        rate=_rate,
        share=_share,
        whole=_whole,
    )
    return environment


def _checked(row: Row) -> str:
    return {"valid": "passed", "suspicious": "warned", "invalid": "failed"}.get(row.checked, "skipped")


def _area(area: Auroc) -> Markup:
    told = exact(area.value, f"{area.value:.3f}")
    return Markup('{} <span class="interval">[{:.3f}, {:.3f}]</span>').format(told, area.low, area.high)


def _gap(gap: Difference) -> Markup:
    return Markup('{} <span class="interval">{}</span>').format(exact(gap.value, points(gap.value)), interval(gap))


def _mean(mean: Mean, sign: str = "") -> Markup:
    told = exact(mean.value, f"{mean.value:{sign}.3g}")
    return Markup('{} <span class="interval">{}</span>').format(told, span(mean, sign))


def _number(value: float | None, digits: int = 3) -> Markup:
    return exact(value, f"{value or 0:.{digits}g}")


def _rate(rate: Rate | Mean) -> Markup:
    return Markup('{} <span class="interval">{}</span>').format(_share(rate), interval(rate))


def _share(rate: Rate | Mean) -> Markup:
    return exact(rate.value, f"{rate.value:.1%}")


def _whole(value: int) -> Markup:
    return exact(value, f"{value:,}")


def _level(report: Report) -> str:
    rates = [
        rate for rate in (report.clean, report.worst_case, *(a.accuracy for a in report.attacks)) if rate is not None
    ]
    return f"{100 * rates[0].confidence:g}%" if rates else "95%"
