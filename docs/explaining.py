"""The page about sensitive neurons: tables and figures made from `benchmarks/results/sensitivity.json`.

`rendered()` replaces the marks of `explaining.md`, `figures()` draws. Only `on_files` and `on_page_markdown`, which
mkdocs calls, know mkdocs; the tests read the others directly. Where the JSON file is missing, its tables say so.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hooks import table

from defences import HERE, PLACES, dots, kept, percent, read, sign

Interval = Mapping[str, float]
EVERY = "all layers"
RATIOS = {
    "relative ratio": "relative, own",
    "shared_relative ratio": "relative, shared",
    "absolute ratio": "absolute, own",
    "shared_absolute ratio": "absolute, shared",
}
TESTS = {"restored": ("restored", 1), "planted": ("planted", -1), "anew": ("zero, attacked anew", 0)}
LOOKS = {
    "before": ("nothing done", ("|", "none", "#555555")),
    "random": ("random neurons restored", ("s", "none", "#E69F00")),
    "sensitive": ("sensitive neurons restored", ("o", "full", "#0072B2")),
}


def on_files(files: Any, *, config: Any) -> Any:
    """Add the figures to the site."""
    from mkdocs.structure.files import File

    for name, drawn in figures():
        files.append(File.generated(config, f"results/{name}.svg", content=drawn))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put tables and figures where the page asks for them."""
    return rendered(markdown) if page.file.src_uri == "explaining.md" else markdown


def rendered(markdown: str) -> str:
    """The page with its marks replaced."""
    made = {"lower": lower, "carry": carry, "which": which, "correlation": correlation}
    return re.sub(r"<!-- (lower|carry|which|correlation) -->", lambda found: made[found[1]](), markdown)


def places() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, found in read("sensitivity").get("settings", {}).items():
        if found["done"]:
            yield place, found


# ---- claim 1


def lower() -> str:
    """For each data set an answer, and the ratios of each method to the plain network."""
    parts: list[str] = []
    for place, found in places():
        trained = {name: row for name, row in found["methods"].items() if "relative ratio" in row}
        lines = [
            (name, in_words(row), percent(row["attacked"]), *(times(row[key]) for key in RATIOS))
            for name, row in trained.items()
        ]
        plain = found["methods"]["plain"]
        lines.append(("plain", "", percent(plain["attacked"]), *("1" for _ in RATIOS)))
        told = f"{found['threat']}, {found['done']} repeats, {found['pairs']} pairs of the plain networks."
        header = ("network", "lower", "accuracy under pgd", *RATIOS.values())
        parts += [headed("lower", place), f"{told} {answer_lower(trained)}", table(header, lines)]
    return "\n\n".join(parts) or HERE


def in_words(row: Mapping[str, Any]) -> str:
    """On which images relative sensitivity is surely lower."""
    own, shared = (is_lower(row[key]) for key in ("relative ratio", "shared_relative ratio"))
    return {(True, True): "yes", (True, False): "own images only", (False, True): "shared images only"}.get(
        (own, shared), "**not shown**"
    )


def is_lower(found: Interval) -> bool:
    return found["high"] < 1


def answer_lower(trained: Mapping[str, Mapping[str, Any]]) -> str:
    counts = [
        f"{sum(is_lower(row[key]) for row in trained.values())} of {len(trained)} methods {where}"
        for key, where in (("relative ratio", "on own images"), ("shared_relative ratio", "on shared ones"))
    ]
    higher = [name for name, row in trained.items() if row["relative ratio"]["low"] > 1]
    more = f" Surely higher on own images: {', '.join(higher)}." if higher else ""
    return f"Relative sensitivity is surely lower than that of the plain network for {counts[0]} and {counts[1]}.{more}"


# ---- claim 2


def carry() -> str:
    """For each data set an answer, a figure, and the tests of all layers at once."""
    parts: list[str] = []
    for place, found in places():
        parts += [headed("carry", place), answer_carry(found), f"![Restored](results/sensitivity-{place}.svg)"]
        for share in sorted({row["share"] for row in found["effects"]}):
            rows = {(r["method"], r["test"]): r for r in found["effects"] if at(r, share)}
            kinds = [kind for kind, (test, _) in TESTS.items() if any(key[1] == test for key in rows)]
            lines = [
                (name, *(cell for kind in kinds for cell in told_of(rows[name, TESTS[kind][0]])))
                for name in found["methods"]
            ]
            columns = {"restored": "restored", "planted": "planted", "anew": "attacked anew"}
            header = ("network", *(f"{columns[kind]}{part}" for kind in kinds for part in (": random", ", gap")))
            parts += [f"The {100 * share:.3g} % most sensitive neurons of all layers:", table(header, lines)]
    return "\n\n".join(parts) or HERE


def at(row: Mapping[str, Any], share: float) -> bool:
    return row["layer"] == EVERY and row["share"] == share


def told_of(row: Mapping[str, Any]) -> Sequence[str]:
    """Accuracy before and with random neurons, and how many points the sensitive ones differ."""
    before, random = (f"{100 * row[key]['mean']:.1f}" for key in ("before", "random"))
    return kept(f"{before} → {random} %"), points(row["gap"])


def answer_carry(found: Mapping[str, Any]) -> str:
    """How often each claim holds, for the sets chosen by default and all layers at once, and layer by layer."""
    share = min(row["share"] for row in found["effects"])
    sentences: list[str] = []
    for kind, (test, side) in TESTS.items():
        rows = [row for row in found["effects"] if row["test"] == test and row["share"] == share]
        whole = [sign(row["gap"]) for row in rows if row["layer"] == EVERY]
        layers = [sign(row["gap"]) for row in rows if row["layer"] != EVERY]
        if kind == "anew":
            up, down = whole.count(1), whole.count(-1)
            sentences.append(
                f"Attacked anew, what is left without them holds surely more than without random ones for {up}, and "
                f"surely less for {down}, of {len(whole)} networks."
            )
        else:
            sentences.append(
                f"{kind.capitalize()}: the gap lies surely on the side of the claim for {whole.count(side)} of "
                f"{len(whole)} networks with all layers at once, surely on the other for {whole.count(-side)}; layer "
                f"by layer for {layers.count(side)} and {layers.count(-side)} of {len(layers)}."
            )
    sizes = f"{found['threat']}, {found['tested']} test pairs of the plain networks over {found['done']} repeats."
    return " ".join([sizes, *sentences])


# ---- which neurons, and the correlation


def which() -> str:
    parts: list[str] = []
    for place, found in places():
        seeds = found["between seeds"]
        lines = [
            (
                name,
                number(row["overlap with plain"]),
                number(row["overlap by chance"]),
                "" if place == "mri" or seeds[name] is None else f"{seeds[name]['jaccard']:.2f}",
                number(row["agreement"]),
            )
            for name, row in found["methods"].items()
        ]
        header = ("network", "overlap with plain", "by chance", "between repeats", "agreement")
        parts += [headed("which", place), table(header, lines)]
    return "\n\n".join(parts) or HERE


def correlation() -> str:
    parts: list[str] = []
    for place, found in places():
        rows = found["correlation"]
        groups = list(dict.fromkeys((row["networks"], row["n"]) for row in rows))
        lines = [
            (layer, *(signed(row["spearman"]) for group, _ in groups for row in rows if is_row(row, layer, group)))
            for layer in dict.fromkeys(row["layer"] for row in rows)
        ]
        header = ("layer", *(f"{group} ({n} networks)" for group, n in groups))
        parts += [headed("correlation", place), table(header, lines)]
    return "\n\n".join(parts) or HERE


def is_row(row: Mapping[str, Any], layer: str, group: str) -> bool:
    return row["layer"] == layer and row["networks"] == group


# ---- figures and Markdown


def figures() -> Iterator[tuple[str, str]]:
    for place, found in places():
        share = min(row["share"] for row in found["effects"])
        rows = [row for row in found["effects"] if row["test"] == "restored" and at(row, share)]
        series = [
            (label, look, shift, [cut(row[key]) for row in rows])
            for (key, (label, look)), shift in zip(LOOKS.items(), (-0.2, 0.0, 0.2), strict=True)
        ]
        yield f"sensitivity-{place}", dots([row["method"] for row in rows], series, 0.4)


def cut(found: Interval) -> tuple[float, float, float]:
    """A share and its interval, which Student's may carry beyond 0 and 1."""
    return found["mean"], max(found["low"], 0.0), min(found["high"], 1.0)


def headed(name: str, place: str) -> str:
    return f"### {PLACES[place]} {{ #{name}-{place} }}"


def times(found: Interval) -> str:
    return kept(f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")


def points(found: Interval) -> str:
    told = f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return kept(f"**{told}**" if sign(found) else told)


def number(found: Interval | None) -> str:
    return "" if found is None else f"{found['mean']:.2f}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"
