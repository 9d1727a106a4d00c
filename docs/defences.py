"""The page about training methods: tables and figures made from `benchmarks/results/*.json` when the site is built.

`rendered()` puts them in place of the marks of `docs/defences.md`. Only `on_files` and `on_page_markdown`, which mkdocs
calls, know mkdocs; the tests read the others directly. Where a JSON file is missing, its table says so.
"""

import json
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from hooks import table
from matplotlib import style
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PLACES = {"mnist": "MNIST, LeNet", "mri": "Brain MRI, mri-cnn"}
OURS = {"sns, random neurons": "sns", "pgd-at + awp": "pgd-at", "gfa FIRST": "gfa", "gfa DEEP": "gfa"}  # its objective
CLAIMS = {  # method: what it is said to do, by whom, and what it is measured against
    "gfa FIRST": ("Keeps more accuracy under attack than adversarial training", "arXiv:2511.13749, abstract"),
    "gfa DEEP": ("The same, with all layers aligned", "arXiv:2511.13749, abstract"),
    "deep-defense": ("Larger perturbations needed than with adversarial training", "arXiv:1803.00404"),
    "adaptive": (
        "Several times the accuracy of plain training under FGSM, PGD and C&W",
        "a blog article, no paper found",
    ),
    "sns": ("Stabilising the sensitive neurons hardens the network", "TIP 2021, abstract"),
    "input-gradient": ("Small input gradients make attacks fail", "Ross and Doshi-Velez 2018, arXiv:1711.09404"),
    "parseval": ("Orthogonal weights bound the effect of small changes", "Cisse et al. 2017, arXiv:1704.08847"),
    "gaussian": ("Noise in training hardens against small perturbations", "Cohen et al. 2019, arXiv:1902.02918"),
    "trades": ("A better trade than adversarial training", "Zhang et al. 2019, arXiv:1901.08573"),
    "mart": ("More than TRADES by weighing misclassified images", "Wang et al. 2020, OpenReview rklOg6EFwS"),
    "alp": ("Pairing logits adds to adversarial training", "Kannan et al. 2018, arXiv:1803.06373"),
    "pgd-at + awp": ("Weight perturbation adds to adversarial training", "Wu et al. 2020, arXiv:2004.05884"),
    "free": ("As much as adversarial training at lower cost", "Shafahi et al. 2019, arXiv:1904.12843"),
    "fast": ("As much as adversarial training at lower cost", "Wong et al. 2020, arXiv:2001.03994"),
    "ima": ("Accuracy under attack at less loss of clean accuracy", "Ma and Liang 2020, arXiv:2005.09147"),
}
NETS = (("mlp", "MLP"), ("lenet", "LeNet"))
BOTH = ("reference", "parseval", "deep-defense")  # methods that are the same there and here
Series = tuple[str, tuple[str, str, str], float, list[tuple[float, float, float]]]
"""Of a figure: label; marker, filling and colour; shift within a line; value, low and high for each name."""
HERE = "(not measured yet: the command is in `benchmarks`)"


def on_files(files: Any, *, config: Any) -> Any:
    """Add the figures to the site."""
    from mkdocs.structure.files import File

    for name, rows in by_threat(read("defences")).items():
        files.append(File.generated(config, f"results/{name}.svg", content=figure(rows)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put tables and figures where the page asks for them."""
    return rendered(markdown) if page.file.src_uri == "defences.md" else markdown


def rendered(markdown: str) -> str:
    """The page with its marks replaced."""
    made = {"claims": claims, "tables": tables, "deep-defense": published, "speed": speed, "size": size}
    return re.sub(r"<!-- (claims|tables|deep-defense|speed|size) -->", lambda found: made[found[1]](), markdown)


def read(name: str) -> dict[str, Any]:
    """A result; empty where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


# ---- all methods at equal cost


def by_threat(body: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each setting and threat, the best worst case first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in body.get("table", []):
        name = re.sub(r"[^a-z0-9.]+", "-", f"defences-{row['setting']}-{row['threat']}")
        found.setdefault(name, []).append(row)
    return {name: sorted(rows, key=lambda row: -row["worst"]["mean"]) for name, rows in found.items()}


def tables() -> str:
    """A figure and a table for each setting and threat."""
    body = read("defences")
    parts: list[str] = []
    for name, rows in by_threat(body).items():
        setting = body["settings"][rows[0]["setting"]]
        seeds, n = max(row["worst"]["seeds"] for row in rows), setting["test"]
        title = f"{PLACES[rows[0]['setting']]}, {rows[0]['threat']}"
        told = f"{seeds} network{'s' * (seeds > 1)} of each method, {n} test images."
        parts += [f"### {title} {{ #{name} }}", told, f"![{title}: accuracy of each method](results/{name}.svg)"]
        parts += [grid(rows)]
    return "\n\n".join(parts) or HERE


def grid(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per method."""
    header = ("method", "clean", "worst case", "minus plain", "minus pgd-at", "gradients", "seconds", "checks")
    lines = [
        (
            linked(row["method"]),
            percent(row["clean"]),
            percent(row["worst"]),
            points(row.get("to plain")),
            points(row.get("to pgd-at")),
            f"{row['gradients']:,}",
            f"{row['seconds']:.0f}",
            ", ".join(f"{stamp}{f' ({count})' * (len(row['stamps']) > 1)}" for stamp, count in row["stamps"].items()),
        )
        for row in rows
    ]
    return table(header, lines)


def linked(method: str) -> str:
    return f"[{method}](reference/recipes.md#objective-{OURS.get(method, method)})"


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Clean accuracy (rings) and worst case (dots) of each method with their intervals, as SVG."""
    series = [
        ("clean", ("o", "none", "#555555"), 0.0, [spread(row["clean"]) for row in rows]),
        ("worst case", ("o", "full", "#0072B2"), 0.0, [spread(row["worst"]) for row in rows]),
    ]
    return dots([row["method"] for row in rows], series, 0.26)


def spread(rate: Mapping[str, Any]) -> tuple[float, float, float]:
    return rate["mean"], rate["low"], rate["high"]


def dots(names: Sequence[str], series: Sequence[Series], height: float) -> str:
    """Shares with their intervals, a line of `height` inches for each name, as SVG."""
    with style.context({"svg.hashsalt": "rempart", "svg.fonttype": "none", "font.size": 10}):
        drawn = Figure(figsize=(6.4, 0.9 + height * len(names)), layout="constrained")
        axes = drawn.add_subplot()
        for label, (marker, fill, colour), shift, rates in series:
            axes.errorbar(
                [value for value, _, _ in rates],
                [place + shift for place in range(len(names))],
                xerr=[[value - low for value, low, _ in rates], [high - value for value, _, high in rates]],
                fmt=marker,
                fillstyle=fill,
                color=colour,
                elinewidth=1.2,
                markersize=5,
                label=label,
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        drawn.legend(loc="outside upper right", ncols=len(series), frameon=False)
        buffer = StringIO()
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


# ---- claims


def claims() -> str:
    """What is claimed for each method beside what was measured, threat by threat."""
    body = read("defences")
    places = by_threat(body)
    if not places:
        return HERE
    names = [
        f"[{PLACES[rows[0]['setting']].split(',')[0]} {rows[0]['threat']}](#{name})" for name, rows in places.items()
    ]
    lines: list[list[str]] = []
    for method, (claim, source) in CLAIMS.items():
        found = [next((row for row in rows if row["method"] == method), None) for rows in places.values()]
        if any(found):
            lines.append([linked(method), claim, source, *(verdict(row) for row in found)])
    return table(("method", "claim", "source", *names), lines)


def verdict(row: Mapping[str, Any] | None) -> str:
    """What an interval allows to say about the worst case of a method, by the rule that stands on the page."""
    if row is None:
        return "did not finish"
    plain, trained, random = (row.get(f"to {name}") for name in ("plain", "pgd-at", "sns, random neurons"))
    if row["worst"]["mean"] > 0 and any(stamp != "valid" for stamp in row["stamps"]):
        return "**not to be trusted**: " + ", ".join(
            sorted({check for seed in row["seeds"] for check in seed["fired"]})
        )
    if plain is None or trained is None:
        return "not compared"
    told = "no difference to plain" if sign(plain) == 0 else "below plain" if sign(plain) < 0 else "above plain"
    if sign(plain) > 0:
        told += {1: ", **above pgd-at**", 0: ", no difference to pgd-at", -1: ", below pgd-at"}[sign(trained)]
    if row["method"] == "sns" and random:
        told += "; " + {1: "above", 0: "no difference to", -1: "below"}[sign(random)] + " random neurons"
    return told


def sign(gap: Mapping[str, Any]) -> int:
    """1 or -1 where the interval of a difference leaves out zero, else 0."""
    return int(gap["low"] > 0) - int(gap["high"] < 0)


# ---- Deep Defense beside its paper, cost and size


def published() -> str:
    """Our figures beside the published ones, for each network and space."""
    parts: list[str] = []
    for net, name, file in ((*pair, f"deep_defense_{pair[0]}{kind}") for kind in ("", "_unit") for pair in NETS):
        body = read(file)
        for key, told in body.get("results", {}).items():
            space = key.split()[0]
            shown = {"published": "pixels as published", "unit": "pixels of [0, 1]"}[space]
            parts += [f"### {name}, {shown} {{ #deep-defense-{net}-{space} }}"]
            lines = [ours(method, row) for method, row in told["methods"].items()]
            if space == "published":
                told_there = body["published"][net]
                lines += [theirs(method, row) for method, row in told_there.items()]
                lines += [apart(method, told["methods"][method], told_there[method]) for method in BOTH]
            header = ("method", "accuracy", "rho_2", "of the reference's", "0.2 eps_ref", "0.5 eps_ref", "eps_ref")
            parts += [table(header, lines)]
            exact = [(method, *under(row, "exact fgs")) for method, row in told["methods"].items()]
            parts += ["FGS without rounding:", table(("method", *header[-3:]), exact)]
            parts += [
                "\n".join(f"- {asked}: {'yes' if answer else '**no**'}" for asked, answer in told["acceptance"].items())
            ]
        if body:
            sizes = body["settings"]
            parts += [
                f"{body['n']:,} test images, {len(body['seeds'])} seeds, {sizes['epochs']} epochs of "
                f"{sizes['train_images']:,} images after a reference of {sizes['reference_epochs']} epochs of 55,000."
            ]
    return "\n\n".join(parts) or HERE


def ours(method: str, row: Mapping[str, Any]) -> Sequence[str]:
    cells = [percent(row["accuracy"], 2), plus_minus(row["rho_2"], 4), plus_minus(row["rho_2 ratio"], 2)]
    return (method, *cells, *under(row, "fgs"))


def under(row: Mapping[str, Any], kind: str) -> Sequence[str]:
    return [percent(row[f"{kind} {share}"]) for share in (0.2, 0.5, 1.0)]


def apart(method: str, row: Mapping[str, Any], there: Sequence[float]) -> Sequence[str]:
    """Ours minus theirs, in percentage points but for rho_2."""
    accuracy, rho, *fgs = there
    shares = [100 * row[f"fgs {share}"]["mean"] - value for share, value in zip((0.2, 0.5, 1.0), fgs, strict=True)]
    ours = (f"{100 * row['accuracy']['mean'] - accuracy:+.2f}", f"{row['rho_2']['mean'] - rho:+.4f}")
    return (f"{method}, ours minus published", *ours, "", *(f"{value:+.1f}" for value in shares))


def theirs(method: str, row: Sequence[float]) -> Sequence[str]:
    accuracy, rho, *fgs = row
    return (f"{method}, published", f"{accuracy} %", f"{rho}", "", *(f"{value} %" for value in fgs))


def speed() -> str:
    """Seconds of an epoch of Deep Defense, and of adversarial training around its bare passes."""
    body, loop = read("deep_defense_speed"), read("training_loop")
    lines: list[Sequence[str]] = []
    for net, told in body.get("results", {}).items():
        for name in ("plain loop", "cross-entropy"):
            row = told[name]
            spread = f"{row['ratio_median']:.2f} [{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
            lines += [(f"deep-defense, {net}", name, spread)]
    for net, told in loop.get("results", {}).items():
        row, bare = told["rempart"], "the same passes in a bare loop"
        spread = f"{1 / row['ratio_median']:.2f} [{1 / row['ratio_max']:.2f}, {1 / row['ratio_min']:.2f}]"
        lines += [(f"pgd-at, {net}", bare, spread)]
    return table(("method", "beside", "its time over ours, median [least, greatest]"), lines) if lines else HERE


def size() -> str:
    """Peak memory of a training."""
    body = read("training_size")
    nets = body.get("results", {})
    if not nets:
        return HERE
    methods = list(dict.fromkeys(method for told in nets.values() for method in told))
    lines = [
        (method, *(f"{told[method]['peak MiB']:,} MiB" if method in told else "" for told in nets.values()))
        for method in methods
    ]
    return table(("method", *(f"{net}, batches of {body['n']}" for net in nets)), lines)


# ---- Markdown


def percent(rate: Mapping[str, Any], digits: int = 1) -> str:
    value = f"{100 * rate['mean']:.{digits}f} %"
    low, high = max(0.0, rate.get("low", rate["mean"])), min(1.0, rate.get("high", rate["mean"]))
    return kept(f"{value} [{100 * low:.{digits}f}, {100 * high:.{digits}f}]")


def plus_minus(value: Mapping[str, Any], digits: int) -> str:
    told = f"{value['mean']:.{digits}f}"
    return kept(f"{told} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]") if "low" in value else told


def points(gap: Mapping[str, Any] | None) -> str:
    return "" if gap is None else kept(f"{100 * gap['value']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]")


def kept(words: str) -> str:
    return words.replace(" ", "\N{NO-BREAK SPACE}")
