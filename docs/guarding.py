"""The page about guarding: tables and figures made from `benchmarks/results/*.json` when the site is built.

`rendered()` replaces the marks of `guarding.md`, `figures()` draws. Only `on_files` and `on_page_markdown`, which
mkdocs calls, know mkdocs; the tests read the others directly. Where a JSON file is missing, its table says so.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hooks import table

from defences import HERE, PLACES, dots, kept, read

ATTACKS = ("fgsm", "bim", "mim", "pgd", "cw", "deepfool")
SHARES = {
    "preprocessing": {"clean": "no attack", "oblivious": "attack without it", "adaptive": "attack through it"},
    "detectors": {
        "none": "no attack",
        "all of these": "attacks without it",
        "knows the detector": "attack that knows it",
    },
}
NOTHING = {"share": float("nan"), "low": float("nan"), "high": float("nan")}  # is not drawn
LOOKS = (("o", "none", "#555555"), ("s", "none", "#E69F00"), ("o", "full", "#0072B2"))


def on_files(files: Any, *, config: Any) -> Any:
    """Add the figures to the site."""
    from mkdocs.structure.files import File

    for name, drawn in figures():
        files.append(File.generated(config, f"results/{name}.svg", content=drawn))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put tables and figures where the page asks for them."""
    return rendered(markdown) if page.file.src_uri == "guarding.md" else markdown


def rendered(markdown: str) -> str:
    """The page with its marks replaced."""
    made = {"preprocessing": preprocessing, "detectors": detectors, "attack-types": attack_types, "latency": latency}
    return re.sub(r"<!-- (preprocessing|detectors|attack-types|latency) -->", lambda found: made[found[1]](), markdown)


def rows(name: str) -> Iterator[tuple[str, Mapping[str, Any], list[dict[str, Any]]]]:
    """The rows of each setting, the best under the attacker who knows first."""
    body = read(name)
    worst = list(SHARES[name])[-1]
    for place, setting in body.get("settings", {}).items():
        found = [row for row in body["table"] if row["setting"] == place]
        if found:
            yield place, setting, sorted(found, key=lambda row: -shares(row).get(worst, {"share": -1.0})["share"])


def shares(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The three shares of a row: without attack, under attacks that do not know of the defence, under one that does."""
    return row.get("held", row)


def named(row: Mapping[str, Any]) -> str:
    return row.get("detector") or row["defence"]


# ---- preprocessing


def preprocessing() -> str:
    """A figure and a table for each data set."""
    parts: list[str] = []
    for place, setting, found in rows("preprocessing"):
        bare = next(row for row in found if row["defence"] == "none")
        lines = [
            (
                row["defence"],
                *(percent(row[key]) for key in SHARES["preprocessing"]),
                points(row["oblivious"]["share"] - row["adaptive"]["share"]),
                survives(row, bare),
            )
            for row in found
        ]
        header = ("defence", *SHARES["preprocessing"].values(), "what forgetting it would claim", "survives")
        told = f"{setting['threat']}, {bare['clean']['n']} test images."
        parts += [*headed("preprocessing", place), told, table(header, lines)]
    return "\n\n".join(parts) or HERE


def survives(row: Mapping[str, Any], bare: Mapping[str, Any]) -> str:
    """Whether the attack through a defence leaves surely more than the attack on the network alone."""
    if row is bare:
        return ""
    if row["adaptive"]["low"] <= bare["adaptive"]["high"]:
        return "**no**"
    return "yes" if row["stamp"] == "valid" else f"perhaps; warned: {', '.join(row['fired'])}"


# ---- detectors


def detectors() -> str:
    """A figure and two tables for each data set."""
    parts: list[str] = []
    for place, setting, found in rows("detectors"):
        most = max(found, key=lambda row: row["alone"]["clean"]["n"])
        alone = most["alone"]
        told = (
            f"{setting['threat']}, {alone['clean']['n']} test images, {most['fitted_on']} to fit on and "
            f"{most['calibrated_on']} for the threshold. Without a detector the network holds "
            f"{percent(alone['attacked'])} under the attacks within the budget, {percent(alone['clean'])} without one."
        )
        held = [
            (
                row["detector"],
                percent(row["false_alarms"]["0.05"]),
                *(percent(row["held"].get(key)) for key in SHARES["detectors"]),
                worth(row),
            )
            for row in found
        ]
        header = ("detector", "false alarms", *SHARES["detectors"].values(), "adds something")
        parts += [*headed("detectors", place), told, table(header, held), "Area under the ROC curve:"]
        parts += [table(("detector", *ATTACKS), list(areas(found)))]
    return "\n\n".join(parts) or HERE


def areas(found: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    """One line per detector, and one more where it learnt from attacks: without the one in question."""
    for row in found:
        for key, more in (("seen", ""), ("unseen", ", the attack unseen")):
            if row[key]:
                yield (row["detector"] + more, *(area(row[key].get(name)) for name in ATTACKS))


def area(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else kept(f"{found['area']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")


def worth(row: Mapping[str, Any]) -> str:
    """Whether network and detector surely hold more, under the attacker who knows, than the network alone."""
    knows = row["held"].get("knows the detector")
    if knows is None:
        return "not known"
    return "yes" if knows["low"] > row["alone"]["attacked"]["high"] else "**no**"


# ---- attack types and latency


def attack_types() -> str:
    """What the classifier of attack types names each set."""
    parts: list[str] = []
    for told in read("attack_types").get("rows", []):
        for how in ("rounding", "not rounding"):
            if how not in told:
                continue
            sets = told[how]["sets"]
            kinds = list(next(iter(sets.values()))["named"])
            where = "8-bit files" if told["eight_bit"] else "images in memory"
            scores = told[how]["accuracy"]
            parts += [
                f"{where.capitalize()}, {how} before it looks: accuracy over the six classes {100 * scores:.1f} %."
            ]
            lines = [
                (name, *(str(row["named"][kind]) for kind in kinds), interval(row["flagged"]))
                for name, row in sets.items()
            ]
            parts += [table(("images of", *(f"named {kind}" for kind in kinds), "flagged"), lines)]
    return "\n\n".join(parts) or HERE


def interval(flagged: Sequence[float]) -> str:
    value, low, high = flagged
    return kept(f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")


def latency() -> str:
    """Milliseconds of one image, and how many times the bare classifier that is."""
    found = read("guard_latency").get("results", {})
    lines = [
        (name, f"{row['ms']:.2f} ms", kept(f"{row['times']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"))
        for name, row in sorted(found.items(), key=lambda pair: pair[1]["times"])
    ]
    return table(("guard", "median", "times the bare classifier"), lines) if lines else HERE


# ---- figures and Markdown


def figures() -> Iterator[tuple[str, str]]:
    for name, keys in SHARES.items():
        for place, _, found in rows(name):
            yield f"{name}-{place}", figure(found, keys)


def figure(found: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> str:
    """The three shares of each row with their intervals, as SVG."""
    series = [
        (label, look, shift, [spread(shares(row).get(key, NOTHING)) for row in found])
        for (key, label), look, shift in zip(keys.items(), LOOKS, (-0.2, 0.0, 0.2), strict=True)
    ]
    return dots([named(row) for row in found], series, 0.3)


def spread(rate: Mapping[str, Any]) -> tuple[float, float, float]:
    return rate["share"], rate["low"], rate["high"]


def headed(name: str, place: str) -> Sequence[str]:
    title = PLACES[place]
    return (f"### {title} {{ #{name}-{place} }}", f"![{title}: shares of images](results/{name}-{place}.svg)")


def percent(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return "not measured"
    return kept(f"{100 * rate['share']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]")


def points(value: float) -> str:
    return kept(f"{100 * value:+.1f} points")
