"""The figures of a report as inline SVG: the same bytes for the same report, legible at 360 px and in print.

Text stays text. Ink is `currentColor`, so that a figure follows the light or dark page around it; data wear the
colours of Okabe and Ito (2008), and hatches, markers or line styles beside them.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from io import StringIO
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Affine2D

from rempart.core.stats import Rate
from rempart.report.compare import CLEAN, WORST
from rempart.report.labels import RINGS, Box, place
from rempart.report.methods import Methods
from rempart.report.schema import Curve, Report
from rempart.report.text import in_levels, judged_on, threat_of

WIDTH = 4.6  # inches of 72 units: drawn at its own size on a phone, half as large again elsewhere
INK = "#010203"  # replaced by currentColor
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
MARKERS = ("o", "s", "D", "^", "v", "P")
LINES = ("-", "--", "-.", ":")
MAP = "cividis"  # even in lightness: it reads the same in grey and to the colour-blind
LIGHT, DARK = "#fefefe", "#020202"  # letters on a map, which does not follow the page
TURN = 0.47  # from this part of the map on, letters are dark
ROOMY, CLOSE = 6, 14  # classes whose cells have room for two lines, and for one
ROW = {CLEAN: ("#999999", ""), WORST: ("#D55E00", "////")}
STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.7,
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "rempart",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def accuracy(report: Report) -> str:
    """Accuracy on the originals, under each attack and in the worst case, as bars with intervals."""
    rates = {
        CLEAN: report.clean,
        **{attack.label: attack.accuracy for attack in report.attacks},
        WORST: report.worst_case,
    }
    rows = {label: rate for label, rate in rates.items() if rate is not None}
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 0.34 * len(rows) + 0.75), layout="constrained")
        axes = _share_axes(figure, list(rows))
        for place, (label, rate) in enumerate(rows.items()):
            colour, hatch = ROW.get(label, (COLOURS[0], ""))
            _bar(axes, place, rate, 0.62, colour, hatch)
        return element(figure, "accuracy", "Accuracy per attack with intervals")


def grouped(measures: Sequence[str], models: Mapping[str, Mapping[str, Rate]]) -> str:
    """The accuracies of several models side by side, as groups of bars with intervals."""
    width = 0.8 / len(models)
    with style.context(["default", STYLE]):
        tall = 0.26 * len(measures) * (len(models) + 1) + 0.75 + 0.22 * len(models)
        figure = Figure(figsize=(WIDTH, tall), layout="constrained")
        axes = _share_axes(figure, measures)
        for i, (name, rates) in enumerate(models.items()):
            colour, hatch = COLOURS[i % len(COLOURS)], HATCHES[i % len(HATCHES)]
            axes.barh([0], [0], color=colour, hatch=hatch, edgecolor=INK, label=shortened(name, 36))
            for place, measure in enumerate(measures):
                if measure in rates:
                    _bar(axes, place + (i - (len(models) - 1) / 2) * width, rates[measure], 0.9 * width, colour, hatch)
        figure.legend(loc="outside upper left")
        return element(figure, "compare", "Accuracy of each model per attack with intervals")


def pairs(report: Report) -> str:
    """How many images of each class (rows) an attack turned into each other class (columns), as a map with numbers."""
    names, size = report.model.classes, len(report.model.classes)
    shares, sizes = np.full((size, size), np.nan), dict[int, int]()
    for pair in report.pairs:
        shares[pair.label, pair.target] = pair.turned.value
        sizes[pair.label] = pair.turned.n
    rows, columns = sorted(sizes), sorted({pair.target for pair in report.pairs})
    shares = shares[np.ix_(rows, columns)]
    across, tall = len(columns), len(rows)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, min(0.52, 3.3 / across) * tall + 1.9), layout="constrained")
        axes = figure.add_subplot()
        norm = Normalize(0, 1)
        axes.imshow(np.ma.masked_invalid(shares), cmap=MAP, norm=norm, aspect="auto", interpolation="none")
        axes.set_xticks(range(across), [shortened(names[k], 14) for k in columns], rotation=40, ha="left")
        axes.set_yticks(
            range(tall), [shortened(names[k], 14) + (f", n={sizes[k]}" if across > ROOMY else "") for k in rows]
        )
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=10.5 if max(across, tall) <= CLOSE else 6)
        axes.set_xlabel("turned into")
        axes.xaxis.set_label_position("top")
        axes.set_ylabel("true class")
        for edge in axes.spines.values():
            edge.set_visible(False)
        for (y, x), share in np.ndenumerate(shares):
            if np.isnan(share):
                axes.text(x, y, "·" if rows[y] == columns[x] else "-", ha="center", va="center", alpha=0.6)
            elif across <= CLOSE:
                told = f"{share:.0%}\nn={sizes[rows[y]]}" if across <= ROOMY else f"{100 * share:.0f}"
                colour = LIGHT if share < TURN else DARK
                axes.text(x, y, told, ha="center", va="center", color=colour, fontsize=9.5, linespacing=1.1)
        bar = figure.colorbar(ScalarMappable(norm, MAP), ax=axes, location="bottom", aspect=40, fraction=0.08)
        bar.set_label("share of the images that were right at first")
        bar.ax.xaxis.set_major_formatter(PercentFormatter(1))
        return element(figure, "pairs", "Share of the images of each class that an attack turned into each other class")


def curves(report: Report, norm: str) -> str:
    """Accuracy against the budget in one norm, with bands for the intervals."""
    return _curves([(curve.label, curve) for curve in report.curves if curve.norm == norm], report, f"curves-{norm}")


def overlay(reports: Mapping[str, Report], label: str, key: str) -> str:
    """The curve of one label from several reports in one figure."""
    shown = [(name, curve) for name, report in reports.items() for curve in report.curves if curve.label == label]
    return _curves(shown, next(iter(reports.values())), key)


def training(report: Report) -> str:
    """Loss and accuracies against the epoch."""
    epochs = [e.epoch for e in report.epochs]
    attacked = [(e.epoch, e.robust_accuracy) for e in report.epochs if e.robust_accuracy is not None]
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        loss, right = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
        loss.plot(epochs, [e.loss for e in report.epochs], color=INK, **_mark(0, len(epochs)))
        loss.set_ylabel("training loss")
        right.plot(
            epochs,
            [e.accuracy for e in report.epochs],
            color=COLOURS[0],
            label="without attack",
            **_mark(0, len(epochs)),
        )
        if attacked:
            place, value = zip(*attacked, strict=True)
            right.plot(place, value, color=COLOURS[5], label="under a short attack", **_mark(1, len(attacked)))
        if report.training is not None:
            kept = {"color": INK, "linewidth": 1, "linestyle": (0, (1, 2))}
            loss.axvline(report.training.best_epoch, **kept)
            right.axvline(report.training.best_epoch, **kept, label=f"weights kept: epoch {report.training.best_epoch}")
        if attacked or report.training is not None:
            figure.legend(loc="outside upper left", handles=right.get_legend_handles_labels()[0])
        _share(right.yaxis, right.set_ylim)
        right.set_ylabel(f"{judged_on(report)} accuracy")
        right.set_xlabel("epoch")
        right.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        for axes in (loss, right):
            axes.grid(axis="y")
        figure.align_ylabels()
        return element(figure, "training", "Loss and accuracy per epoch")


def tradeoff(methods: Methods) -> str:
    """Clean accuracy against the worst case of each run, with intervals."""
    runs = {row.name: (row.clean.value, row.clean, row.worst) for row in methods.rows}
    return _scatter(methods, runs, "tradeoff", "Clean accuracy against worst case of each run, with intervals")


def cost(methods: Methods) -> str:
    """Worst case of each run against the images it sent backward in training, with intervals."""
    runs = {
        row.name: (float(row.cost.gradients), None, row.worst)
        for row in methods.rows
        if row.cost is not None and row.cost.gradients
    }
    return _scatter(methods, runs, "cost", "Worst case of each run against its cost, with intervals")


def _scatter(methods: Methods, runs: Mapping[str, tuple[float, Rate | None, Rate]], key: str, title: str) -> str:
    """Runs as points: one colour and marker per method, a label beside the first run of each."""
    kinds = {row.name: (row.method, row.model) for row in methods.rows if row.name in runs}
    order = list(dict.fromkeys((row.method, row.model) for row in methods.rows))
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for name, (x, across, rate) in runs.items():
            i = order.index(kinds[name])
            reach = None if across is None else [[x - across.low], [across.high - x]]
            height = [[rate.value - rate.low], [rate.high - rate.value]]
            axes.errorbar(
                [x], [rate.value], yerr=height, xerr=reach, fmt="none", ecolor=INK, elinewidth=0.9, alpha=0.45
            )
            axes.plot(
                [x],
                [rate.value],
                color=COLOURS[(i + i // len(MARKERS)) % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=7,
                markeredgecolor=INK,
                markeredgewidth=0.7,
                zorder=3,
            )
        axes.margins(0.12)
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_ylabel("worst case accuracy")
        _percent(axes.yaxis)
        if all(across is None for _, across, _ in runs.values()):
            _logarithmic(axes, [x for x, _, _ in runs.values()])
            axes.set_xlabel("images sent backward in training (log)")
        else:
            _percent(axes.xaxis)
            axes.set_xlabel("clean accuracy")
        first = {kind: name for name, kind in reversed(kinds.items())}
        _label(figure, axes, {name: shortened(name, 24) for name in runs if name in first.values()}, runs)
        return element(figure, key, title)


def _percent(axis: Axis) -> None:
    """Ticks over the part of [0, 1] that is shown, without decimals where they are whole percents."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    axis.set_major_formatter(PercentFormatter(1, decimals=0 if high - low > 0.07 else None))


def _logarithmic(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    axes.set_xscale("log")
    room = max(1.6, (high / low) ** 0.12)
    axes.set_xlim(low / room, high * room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(
    figure: Figure,
    axes: Axes,
    labels: Mapping[str, str],
    runs: Mapping[str, tuple[float, Rate | None, Rate]],
) -> None:
    """Write each label where it covers neither a label nor a point nor an interval, with a line to a point far off."""
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    scale = 72 / figure.dpi

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y)) * scale
        return float(across), float(up)

    obstacles: list[Box] = []
    for x, across, rate in runs.values():
        centre = at(x, rate.value)
        obstacles.append((centre[0] - 4, centre[1] - 4, centre[0] + 4, centre[1] + 4))
        obstacles.append((centre[0] - 2, at(x, rate.low)[1], centre[0] + 2, at(x, rate.high)[1]))
        if across is not None:
            obstacles.append(
                (at(across.low, rate.value)[0], centre[1] - 2, at(across.high, rate.value)[0], centre[1] + 2)
            )
    left, bottom, right, top = axes.get_window_extent().transformed(Affine2D().scale(scale)).extents
    points = {name: at(runs[name][0], runs[name][2].value) for name in labels}
    texts = [axes.text(0, 0, label, fontsize=9.5) for label in labels.values()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    sizes = [(1.1 * box.width * scale, box.height * scale) for box in boxes]  # the reader's font may be wider
    for text in texts:
        text.remove()
    places = place(list(points.values()), sizes, obstacles, (left, bottom, right, top))
    for (name, label), (left, bottom, right, top) in zip(labels.items(), places, strict=True):
        x, y = points[name]
        far = max(left - x, x - right, bottom - y, y - top) > RINGS[1]
        axes.annotate(
            label,
            (runs[name][0], runs[name][2].value),
            ((left + right) / 2 - x, (bottom + top) / 2 - y),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9.5,
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": INK, "shrinkA": 1, "shrinkB": 5} if far else None,
        ).set_in_layout(False)


def _curves(shown: Sequence[tuple[str, Curve]], report: Report, key: str) -> str:
    threat, norm = threat_of(report), shown[0][1].norm
    budget = threat.eps if threat is not None and threat.norm == norm else None
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 3.3 + 0.22 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, curve) in enumerate(shown):
            colour = COLOURS[i % len(COLOURS)]
            low, high = [rate.low for rate in curve.accuracy], [rate.high for rate in curve.accuracy]
            axes.fill_between(curve.eps, low, high, color=colour, alpha=0.2, linewidth=0)
            values = [rate.value for rate in curve.accuracy]
            axes.plot(curve.eps, values, color=colour, label=shortened(name, 36), **_mark(i, len(values)))
        if budget is not None:
            axes.axvline(
                budget,
                color=INK,
                linewidth=1,
                linestyle=(0, (1, 2)),
                label=f"budget of the {'attack' if report.kind == 'certify' else 'audit'}",
            )
        end = max(budget or 0.0, *(_end(curve) for _, curve in shown)) or 1.0
        axes.set_xlim(-0.03 * end, 1.05 * end)
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.set_xlabel(f"{norm} budget eps in pixel units")
        if in_levels(norm, report.model.low, report.model.high):
            levels = axes.secondary_xaxis("top", functions=(partial(np.multiply, 255), partial(np.multiply, 1 / 255)))
            levels.set_xlabel("levels of 255")
            levels.xaxis.set_major_locator(MaxNLocator(6))
            levels.xaxis.set_major_formatter("{x:.3g}")
        _share(axes.yaxis, axes.set_ylim)
        axes.set_ylabel("accuracy")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left")
        return element(figure, key, f"Accuracy against the {norm} budget with intervals")


def _end(curve: Curve) -> float:
    """The budget from which on nothing is left: a figure that went on would squeeze what there is to see."""
    gone = (eps for eps, rate in zip(curve.eps, curve.accuracy, strict=True) if rate.k == 0)
    return next(gone, curve.eps[-1])


def _share_axes(figure: Figure, names: Sequence[str]) -> Axes:
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), [shortened(name, 22) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("share of images rightly classified")
    _share(axes.xaxis, axes.set_xlim)
    axes.set_xlim(0, 1)
    return axes


def _bar(axes: Axes, place: float, rate: Rate, height: float, colour: str, hatch: str) -> None:
    axes.barh([place], [rate.value], height, color=colour, hatch=hatch, edgecolor=INK, linewidth=0.7)
    reach = [[rate.value - rate.low], [rate.high - rate.value]]
    size = min(4.0, 8 * height)
    axes.errorbar([rate.value], [place], xerr=reach, fmt="none", ecolor=INK, elinewidth=1.4, capsize=size)
    axes.text(1.03, place, f"{rate.value:.1%}", transform=axes.get_yaxis_transform(), va="center")


def _share(axis: Axis, limits: Callable[[float, float], object]) -> None:
    limits(-0.02, 1.02)
    axis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axis.set_major_formatter("{x:.0%}")


def _mark(i: int, points: int) -> dict[str, Any]:
    every = max(1, points // 12)
    edge = {"markeredgecolor": INK, "markeredgewidth": 0.6}
    return {"marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % len(LINES)], "markevery": every, **edge}


def shortened(text: str, length: int) -> str:
    """A name as it fits into a figure, without what cannot be printed."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def element(figure: Figure, key: str, title: str) -> str:
    """The figure as an element to put into a page: named for screen readers, its ids prefixed by `key`."""
    buffer = StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the reader's browser has other fonts
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # its rule for * would reach the whole page
    text = text.replace("xlink:href=", "href=").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    names = {a or b for a, b in used}

    def rename(found: re.Match[str]) -> str:
        return f' id="{key}-{found[1]}"' if found[1] in names else ""

    text = re.sub(r' id="([^"]*)"', rename, text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", text)
    head = f'<svg role="img" aria-label="{escape(title)}" stroke-linejoin="round"'
    return text.replace("<svg", head, 1).replace(INK, "currentColor").strip()
