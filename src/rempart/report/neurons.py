"""Figures of an explanation: how much each neuron moves, and what that does to predictions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rempart.core.stats import Mean, Rate
from rempart.core.threat import Threat
from rempart.report.figures import COLOURS, INK, LINES, MAP, MARKERS, STYLE, WIDTH, element, shortened
from rempart.report.schema import Effect, Explained, Illustration, Layer

CELLS = 200  # across a heat map, whatever the number of neurons
NAME = 14  # letters of a layer
SCALE = 0.99  # the quantile of sensitivities at which a scale ends
TITLES = {
    "zero, clean": "zero in their place, clean",
    "zero, attacked": "zero in their place, attacked",
    "mean, clean": "mean in their place, clean",
    "mean, attacked": "mean in their place, attacked",
    "planted": "attacked values, clean images",
    "restored": "clean values, attacked images",
}
CHOICES = {"sensitive": ("most sensitive", COLOURS[5], "o"), "random": ("random", "#999999", "s")}
CHOICES["least"] = ("least sensitive", COLOURS[0], "^")


def sorted_curves(model: Explained, key: str) -> str:
    """Absolute and relative sensitivity of the neurons of each layer in order, the sensitive set marked in both."""

    def draw(axes: Axes, layer: Layer, values: Sequence[float]) -> None:
        order = sorted(range(len(values)), key=lambda i: -values[i])
        rank = np.arange(1, len(values) + 1)
        chosen = np.isin(order, layer.sensitive)
        axes.plot(rank, [values[i] for i in order], color=COLOURS[0], **_points(len(values)))
        for at in rank[chosen]:
            axes.axvspan(at - 0.5, at + 0.5, color=COLOURS[1], alpha=0.45, linewidth=0)
        edge: dict[str, Any] = {"markeredgecolor": INK, "markeredgewidth": 0.6}
        top = np.array([values[i] for i in order])[chosen]
        axes.plot(rank[chosen], top, linestyle="", marker="D", markersize=4, color=COLOURS[5], **edge)
        axes.set_xlim(0.5, len(values) + 0.5)
        axes.set_ylim(0, max(values) * 1.08 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))

    return _panels(
        model, key, draw, "neurons, in order", "sensitivity", "Sensitivity of the neurons of each layer in order"
    )


def histograms(model: Explained, key: str) -> str:
    """How many neurons of each layer have which sensitivity, those of the sensitive set hatched."""

    def draw(axes: Axes, layer: Layer, values: Sequence[float]) -> None:
        end = reached(values)
        bins = np.linspace(0, end, min(20, max(5, len(values) // 4)) + 1).tolist()
        values = np.minimum(values, end).tolist()
        own = [values[i] for i in layer.sensitive]
        axes.hist(values, bins=bins, color=COLOURS[4], edgecolor=INK, linewidth=0.5)
        axes.hist(own, bins=bins, color=COLOURS[5], hatch="////", edgecolor=INK, linewidth=0.5)
        axes.set_xlim(0, bins[-1])
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))

    return _panels(model, key, draw, "sensitivity", "neurons", "Histograms of the sensitivities of each layer")


def profile(models: Sequence[Explained]) -> str:
    """Mean relative and absolute sensitivity per layer of all models; hollow where the images are shared."""
    names = list(dict.fromkeys(layer.name for model in models for layer in model.layers))
    with style.context(["default", STYLE]):
        tall = 0.3 * len(names) + 0.9 + 0.21 * (len(models) + 1)
        figure = Figure(figsize=(WIDTH, max(2.2, tall)), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("relative", "absolute"), strict=True):
            for i, model in enumerate(models):
                look: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
                at = [names.index(layer.name) for layer in model.layers]
                own = [layer.overall if kind == "relative" else layer.mean_absolute for layer in model.layers]
                line = {"linestyle": LINES[i % len(LINES)], "markeredgecolor": INK, "markeredgewidth": 0.6}
                axes.plot(own, at, **look, **line, label=shortened(model.label, 36))
                lent = [getattr(layer, f"shared_{kind}") for layer in model.layers]
                shown = [(value, place) for value, place in zip(lent, at, strict=True) if value is not None]
                if shown:
                    hollow = {"linestyle": "", "markerfacecolor": "none", "markersize": 9.5, "markeredgewidth": 1.4}
                    axes.plot(*zip(*shown, strict=True), **look, **hollow)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.set_xlabel("relative to the\nactivations" if kind == "relative" else "absolute, in\nactivations")
            axes.grid(axis="x")
        axes = figure.axes[0]
        axes.set_yticks(range(len(names)), [shortened(name, NAME) for name in names])
        axes.set_ylim(len(names) - 0.6, -0.4)
        handles, labels = axes.get_legend_handles_labels()
        if any(layer.shared_relative is not None for model in models for layer in model.layers):
            hollow = axes.plot([], [], linestyle="", marker="o", color=INK, markerfacecolor="none", markersize=9.5)
            handles, labels = [*handles, *hollow], [*labels, "hollow: the images of the first model"]
        figure.legend(handles, labels, loc="outside upper left")
        return element(figure, "profile", "Mean sensitivity of each layer of each model")


def heat(models: Sequence[Explained]) -> str:
    """Relative sensitivity of all neurons: a row per layer, neurons in order, each layer stretched to one width."""
    with style.context(["default", STYLE]):
        rows = sum(len(model.layers) for model in models)
        figure = Figure(figsize=(WIDTH, 0.27 * rows + 0.42 * len(models) + 1.0), layout="constrained")
        ratios = [len(model.layers) for model in models]
        panels = figure.subplots(len(models), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
        high = reached([value for model in models for layer in model.layers for value in layer.relative])
        norm = PowerNorm(0.5, 0, high, clip=True)  # a few neurons far ahead would leave all others in the dark
        for axes, model in zip(panels, models, strict=True):
            cells = np.array([_stretched(layer.relative) for layer in model.layers])
            reach = (0, 100, len(cells) - 0.5, -0.5)
            given = {"cmap": MAP, "norm": norm, "aspect": "auto", "interpolation": "none"}
            axes.imshow(cells, extent=reach, **given)
            axes.hlines(np.arange(1, len(cells)) - 0.5, 0, 100, color="#ffffff", linewidth=1)
            axes.set_yticks(range(len(cells)), [shortened(layer.name, NAME) for layer in model.layers])
            axes.set_title(shortened(model.label, 40), loc="left", fontsize=10.5)
            axes.tick_params(axis="y", length=0)
        panels[-1].set_xlabel("neurons, the most sensitive first (%)")
        bar = figure.colorbar(ScalarMappable(norm, MAP), ax=list(panels), location="bottom", aspect=40, fraction=0.08)
        bar.set_label("relative sensitivity (colours by its square root)")
        bar.ax.xaxis.set_major_locator(MaxNLocator(3))
        return element(figure, "heat", "Relative sensitivity of the neurons of each layer")


def tests(model: Explained, key: str) -> str:
    """Accuracy after each test of each layer, for the most sensitive, random and least sensitive neurons."""
    names = list(dict.fromkeys(effect.layer for effect in model.effects))
    kinds = [kind for kind in TITLES if any(effect.test == kind for effect in model.effects)]
    with style.context(["default", STYLE]):
        deep = (len(kinds) + 1) // 2
        tall = deep * (0.42 * len(names) + 0.45) + 0.9
        figure = Figure(figsize=(WIDTH, tall), layout="constrained")
        panels = figure.subplots(deep, 2, sharex=True, sharey=True, squeeze=False).ravel()
        for panel, kind in zip(panels, kinds, strict=False):
            rows = [effect for effect in model.effects if effect.test == kind]
            _test(panel, rows, names)
            panel.set_title(TITLES[kind].replace(", ", ",\n"), fontsize=10.5)
        for panel in panels[len(kinds) :]:
            panel.axis("off")
        for panel in panels[max(0, len(kinds) - 2) : len(kinds)]:  # the lowest of each column
            panel.set_xlabel("accuracy (%)")
            panel.tick_params(labelbottom=True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, columnspacing=1)
        return element(figure, key, "Accuracy when neurons are masked or replaced, with intervals")


def landscape(picture: Illustration, threat: Threat | None) -> str:
    """The margin around an image along the sign of the gradient and random signs, the zero line drawn."""
    places = steps(picture)
    values = np.array(picture.landscape)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
        axes = figure.add_subplot()
        levels = MaxNLocator(12).tick_values(values.min(), values.max())
        filled = axes.contourf(places, places, values, levels=levels, cmap=MAP)
        axes.contour(places, places, values, levels=levels, colors="#ffffff", linewidths=0.4, alpha=0.6)
        if values.min() < 0 < values.max():
            axes.contour(places, places, values, levels=[0], colors="#ffffff", linewidths=4)
            axes.contour(places, places, values, levels=[0], colors="#000000", linewidths=1.8, linestyles="--")
            axes.plot([], [], color=INK, linestyle="--", label="margin 0: beyond it, the class is wrong")
        edge: dict[str, Any] = {"markeredgecolor": "#000000", "markeredgewidth": 1}
        axes.plot([0], [0], marker="o", markersize=7, linestyle="", color="#ffffff", label="the image", **edge)
        if threat is not None and threat.norm == "linf" and threat.eps is not None and threat.eps <= picture.reach:
            across, up = threat.eps * np.array([[0, 1, 0, -1, 0], [1, 0, -1, 0, 1]])  # |across| + |up| = eps
            axes.plot(across, up, color="#ffffff", linewidth=3)
            axes.plot(across, up, color="#000000", linestyle=":", linewidth=1.6)
            axes.plot([], [], color=INK, linestyle=":", label="the budget: steps that stay within it")
        axes.set_xlabel("step along random signs, in pixel units")
        axes.set_ylabel("step up the loss, in pixel units")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter("{x:.3g}")
        axes.set_aspect("equal")
        bar = figure.colorbar(filled, ax=axes, location="bottom", aspect=40, fraction=0.06)
        bar.set_label("margin: true logit minus best other")
        bar.ax.xaxis.set_major_locator(MaxNLocator(6))
        figure.legend(loc="outside upper left")
        return element(figure, "landscape", "Margin around the image")


def _test(axes: Axes, rows: Sequence[Effect], names: Sequence[str]) -> None:
    """One test: a row per layer, three marks each, and the accuracy before as a line."""
    for effect in rows:
        place = names.index(effect.layer)
        first = effect is rows[0]
        axes.plot([effect.before.value] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.2, linestyle=":")
        for shift, (choice, (label, colour, marker)) in zip((-0.25, 0, 0.25), CHOICES.items(), strict=True):
            rate: Rate | Mean = getattr(effect, choice)
            low, high = max(rate.low, 0), min(rate.high, 1)
            axes.errorbar(
                [rate.value],
                [place + shift],
                xerr=[[max(rate.value - low, 0)], [max(high - rate.value, 0)]],
                color=colour,
                ecolor=INK,
                elinewidth=0.8,
                marker=marker,
                markersize=5,
                markeredgecolor=INK,
                markeredgewidth=0.6,
                linestyle="",
                label=label if first else None,
            )
        if first:
            axes.plot([], [], color=INK, linewidth=1.2, linestyle=":", label="nothing done")
    axes.set_yticks(range(len(names)), [shortened(name, NAME) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlim(-0.04, 1.04)
    axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])


def _panels(
    model: Explained,
    key: str,
    draw: Callable[[Axes, Layer, Sequence[float]], None],
    xlabel: str,
    ylabel: str,
    title: str,
) -> str:
    """A row per layer, absolute on the left and relative on the right."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, 1.35 * len(model.layers) + 0.7), layout="constrained")
        panels = figure.subplots(len(model.layers), 2, squeeze=False)
        for layer, (left, right) in zip(model.layers, panels, strict=True):
            for axes, values in ((left, layer.absolute), (right, layer.relative)):
                draw(axes, layer, values)
                axes.grid(axis="y")
                axes.set_axisbelow(True)
            left.set_title(shortened(layer.name, 40), loc="left", fontsize=10.5)
            left.set_ylabel(ylabel)
        above = f"absolute, in activations\n{shortened(model.layers[0].name, 40)}"
        panels[0, 0].set_title(above, loc="left", fontsize=10.5)
        panels[0, 1].set_title("relative, no unit\n", loc="left", fontsize=10.5)
        for axes in panels[-1]:
            axes.set_xlabel(xlabel)
        return element(figure, key, title)


def _points(count: int) -> dict[str, Any]:
    return {"marker": ".", "markersize": 4} if count <= 60 else {}


def _stretched(values: Sequence[float]) -> np.ndarray:
    """The values, largest first, as `CELLS` cells of one width."""
    order = np.sort(np.array(values))[::-1]
    return order[((np.arange(CELLS) + 0.5) / CELLS * len(order)).astype(int)]


def reached(values: Sequence[float]) -> float:
    """Where a scale of sensitivities ends: neurons that hardly fire may have relative ones far beyond all others."""
    return float(np.quantile(np.array(values), SCALE)) or max(values) or 1.0


def steps(picture: Illustration) -> list[float]:
    """Places of the rows of a landscape, and of its columns, in pixel units."""
    return np.linspace(-picture.reach, picture.reach, len(picture.landscape)).tolist()


def quantiles(values: Sequence[float]) -> Iterator[float]:
    """Largest, upper decile, upper quartile, median, lower quartile, lower decile, smallest."""
    yield from map(float, np.quantile(np.array(values), (1, 0.9, 0.75, 0.5, 0.25, 0.1, 0)))
