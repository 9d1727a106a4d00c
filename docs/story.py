"""The page of the MRI story: tables made from `benchmarks/results/mri_story.json` when the site is built.

`rendered()` replaces the marks of `how-to/mri.md`. Only `on_page_markdown`, which mkdocs calls, knows mkdocs. Where the
JSON file is missing, its tables say so.
"""

import re
from collections.abc import Mapping
from typing import Any

from guarding import percent
from hooks import table

from defences import HERE, read

NAMES = {"plain": "as Keras left it", "hardened": "trained further on attacked images", "defended": "behind {}"}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the tables where the page asks for them."""
    return rendered(markdown) if page.file.src_uri == "how-to/mri.md" else markdown


def rendered(markdown: str) -> str:
    """The page with its marks replaced."""
    made = {"networks": networks, "attacks": attacks, "detectors": detectors}
    body = read("mri_story")
    return re.sub(rf"<!-- ({'|'.join(made)}) -->", lambda found: made[found[1]](body) if body else HERE, markdown)


def networks(body: Mapping[str, Any]) -> str:
    """Clean accuracy and worst case of each network, and whether the checks of its audit found something."""
    lines = [
        (named(row, body), percent(row["clean"]), percent(row["worst"]), checked(row), survives(row, body))
        for row in body["table"]
    ]
    told = f"{body['threat']}, {body['table'][0]['clean']['n']} test images of `{body['data']}`."
    header = ("network", "no attack", "worst case", "checks", "holds surely more")
    return f"{told}\n\n{table(header, lines)}"


def attacks(body: Mapping[str, Any]) -> str:
    """Accuracy of each network under each attack alone."""
    header = ("network", *body["table"][0]["attacks"])
    return table(header, [(named(row, body), *map(percent, row["attacks"].values())) for row in body["table"]])


def detectors(body: Mapping[str, Any]) -> str:
    """What network and detector hold together."""
    found = body["detectors"]
    alone = found["alone"]
    lines = [
        (
            row["detector"],
            percent(row["false_alarms"]),
            *(percent(row["held"].get(key)) for key in ("none", "all of these", "knows the detector")),
        )
        for row in found["table"]
    ]
    lines.append(("no detector", "", percent(alone["clean"]), percent(alone["attacked"]), ""))
    told = (
        f"{alone['clean']['n']} other test images; fitted on {found['fitted_on']} images, thresholds set on "
        f"{found['calibrated_on']}."
    )
    header = ("detector", "false alarms", "no attack", "attacks that do not know it", "attack that knows it")
    return f"{told}\n\n{table(header, lines)}"


def named(row: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    chain = " and ".join(name.partition(":")[0] for name in body["settings"]["defences"])
    return NAMES[row["model"]].format(chain)


def checked(row: Mapping[str, Any]) -> str:
    return f"{row['stamp']}: {', '.join(row['fired'])}" if row["fired"] else row["stamp"]


def survives(row: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """Whether a network holds surely more than the plain one: intervals that do not meet, and checks that passed."""
    plain = body["table"][0]
    if row is plain:
        return ""
    if row["worst"]["low"] <= plain["worst"]["high"]:
        return "**no**"
    return "yes" if row["stamp"] == "valid" else "not known: its checks say that the figures are too high"
