"""Does adversarial training lower the sensitivity of neurons, and do sensitive neurons carry the wrong prediction?

Both claims are those of Zhang et al. 2021 (arXiv:1909.06978, abstract). The networks are those of
`benchmarks/defences.py`, trained where they are missing: all of one repeat begin with the same plain network, so that
their neurons can be compared one by one. One explain run holds all of them.

Sensitivities: on the images attacked on each network itself, and on the same ones for all, attacked on the plain
network; absolute and relative. A ratio is that of a network to the plain one of its repeat, as a geometric mean over
layers. Claim 1 is what the intervals of these ratios say.

The tests of claim 2 are those of `rempart explain`: of the most sensitive neurons, as many at random, and the least
sensitive, on images that did not choose them; and the suite `fast` on what is left without them.

Repeats: on MNIST three networks that began with other weights; on the brain MRI, of which there is one network for each
method, four disjoint parts of the test images, so that intervals there tell the chance in drawing images and not in
training. All intervals are Student's over repeats.

    python benchmarks/sensitivity.py [mnist mri] [--data DIR] [--runs DIR] [--explained DIR]
    python benchmarks/sensitivity.py --collect
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from defences import SETTINGS as TRAINED
from defences import complete, home, judge
from rempart.core.repro import environment
from rempart.core.stats import student
from rempart.explain.sensitivity import by_chance, rank_correlation
from rempart.report import store
from rempart.report.schema import EVERY, AttackChoice, Explained, ExplainSpec
from rempart.tasks import run

RESULTS = Path(__file__).parent / "results" / "sensitivity.json"
METHODS = ("plain", "pgd-at", "trades", "alp", "mixed", "sns", "sns, random neurons")
ATTACK = AttackChoice(name="pgd", options={"steps": 40})
SHARES = {0.1: "fast", 0.3: None}  # of the neurons, and the suite on what is left
SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {"threat": "linf:0.1", "repeats": 3, "part": "[::20]", "test": 100, "draws": 5},
    "mri": {"threat": "linf:4/255", "repeats": 4, "part": "[{repeat}::22]", "test": 30, "draws": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=list(SETTINGS), help=", ".join(SETTINGS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/defences"), help="Of benchmarks/defences.py")
    parser.add_argument("--explained", type=Path, default=Path("runs/sensitivity"))
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args()
    if given.collect:
        collect(given.explained)
        return
    for place in given.which:
        for repeat in range(SETTINGS[place]["repeats"]):
            for share in SHARES:
                measure(place, repeat, share, given.data, given.runs, given.explained)


def measure(place: str, repeat: int, share: float, data: Path, runs: Path, out: Path) -> None:
    """One explain run over all networks of a repeat, unless it is done."""
    setting, folder = SETTINGS[place], out / f"{place} {repeat} {share}"
    if complete(folder):
        return
    seeds = TRAINED[place]["seeds"]
    seed = seeds[repeat] if len(seeds) > 1 else seeds[0]
    for method in METHODS:
        if not complete(home(runs, place, method, setting["threat"], seed)):
            judge(place, method, setting["threat"], seed, data, runs, quick=False)
    spec = ExplainSpec(
        models=tuple(str(home(runs, place, method, setting["threat"], seed)) for method in METHODS),
        data=f"{TRAINED[place]['data'].format(data)}:test{setting['part'].format(repeat=repeat)}",
        threat=setting["threat"],
        attacks=(ATTACK,),
        suite=SHARES[share],
        share=share,
        test=setting["test"],
        draws=setting["draws"],
        seed=repeat,
        out=str(folder),
    )
    print(folder.name, flush=True)
    run(spec)


# ---- the results


def collect(explained: Path) -> None:
    record = environment()
    body: dict[str, Any] = {
        "question": "Does adversarial training lower the sensitivity of neurons, and do sensitive neurons carry the "
        "wrong prediction?",
        "command": "python benchmarks/sensitivity.py; python benchmarks/sensitivity.py --collect",
        "date": date.today().isoformat(),
        "hardware": {key: record[key] for key in ("processor", "cores", "accelerator")},
        "versions": {key: record[key] for key in ("python", "torch", "numpy", "rempart")},
        "attack": ATTACK.model_dump(),
        "settings": {},
    }
    for place, setting in SETTINGS.items():
        found = {
            share: [
                dict(zip(METHODS, store.read_explained(folder), strict=True))
                for repeat in range(setting["repeats"])
                if complete(folder := explained / f"{place} {repeat} {share}")
            ]
            for share in SHARES
        }
        body["settings"][place] = {**setting, **summary(found, trained_apart=len(TRAINED[place]["seeds"]) > 1)}
    body = json.loads(json.dumps(body), parse_float=lambda digits: round(float(digits), 5))
    RESULTS.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({place: told["methods"] for place, told in body["settings"].items()}, indent=1)[:4000])


Repeats = list[dict[str, Explained]]


def summary(found: dict[float, Repeats], *, trained_apart: bool) -> dict[str, Any]:
    """Everything of one data set."""
    main = found[min(found)]
    return {
        "done": len(main),
        "pairs": sum(repeat["plain"].pairs for repeat in main),
        "tested": sum(repeat["plain"].tested for repeat in main),
        "layers": {layer.name: len(layer.absolute) for layer in main[0]["plain"].layers},
        "methods": {method: of_method(main, method) for method in METHODS},
        "effects": [row for share, repeats in found.items() for row in tested(repeats, share)],
        "correlation": list(correlated(main, trained_apart=trained_apart)),
        "between seeds": {method: between(main, method) for method in METHODS},
    }


def of_method(repeats: Repeats, method: str) -> dict[str, Any]:
    """Accuracy, sensitivities and their ratios to the plain network of the same repeat."""

    def over(value: Callable[[dict[str, Explained]], float | None]) -> dict[str, float] | None:
        values = [value(repeat) for repeat in repeats]
        return None if None in values else interval([v for v in values if v is not None])

    own, shared = ("relative", "absolute"), ("shared_relative", "shared_absolute")
    told: dict[str, Any] = {
        "clean": over(lambda repeat: repeat[method].clean.value),
        "attacked": over(lambda repeat: repeat[method].attacked.value),
        "agreement": over(lambda repeat: mean([layer.agreement for layer in repeat[method].layers])),
        "overlap with plain": over(lambda repeat: mean([row.jaccard for row in repeat[method].overlaps])),
        "overlap by chance": over(lambda repeat: mean([row.chance for row in repeat[method].overlaps])),
    }
    for key in (*own, *shared):
        told[key] = over(lambda repeat, key=key: mean([value(layer, key) for layer in repeat[method].layers]))
        if method != "plain":
            told[f"{key} ratio"] = ratio(repeats, method, key)
            told[f"{key} ratio by layer"] = {
                layer.name: ratio(repeats, method, key, layer.name) for layer in repeats[0][method].layers
            }
    return told


def ratio(repeats: Repeats, method: str, key: str, only: str | None = None) -> dict[str, float]:
    """Sensitivity over that of the plain network: geometric mean over layers, and over repeats with Student's interval.

    On the shared images the plain network's own sensitivity is the one on them.
    """
    logs = [
        np.mean(
            [
                np.log(value(layer, key) or np.nan) - np.log(value(plain, key.removeprefix("shared_")) or np.nan)
                for layer, plain in zip(repeat[method].layers, repeat["plain"].layers, strict=True)
                if only in (None, layer.name)
            ]
        )
        for repeat in repeats
    ]
    found = interval([float(log) for log in logs])
    return {key: float(np.exp(found[key])) for key in ("mean", "low", "high")} | {"n": found["n"]}


def value(layer: Any, key: str) -> float | None:
    return getattr(layer, {"relative": "overall", "absolute": "mean_absolute"}.get(key, key))


def tested(repeats: Repeats, share: float) -> Iterator[dict[str, Any]]:
    """Each test of each method and layer over the repeats."""
    for method in METHODS if repeats else ():
        for at, first in enumerate(repeats[0][method].effects):
            rows = [repeat[method].effects[at] for repeat in repeats]
            yield {
                "method": method,
                "share": share,
                "layer": first.layer,
                "test": first.test,
                **{
                    key: interval([getattr(row, key).value for row in rows])
                    for key in ("before", "sensitive", "random", "least", "gap")
                },
            }


def correlated(repeats: Repeats, *, trained_apart: bool) -> Iterator[dict[str, Any]]:
    """Spearman's correlation of relative sensitivity and accuracy under attack over networks, layer by layer.

    With all networks, and without the plain ones: a correlation that only they make says no more than claim 1 does.
    """
    for group, methods in (("all", METHODS), ("without plain", METHODS[1:])):
        networks = [repeat[method] for repeat in repeats for method in methods]
        held = torch.tensor([network.attacked.value for network in networks])
        held = held if trained_apart else held.reshape(len(repeats), -1).mean(0)
        for at, layer in enumerate([EVERY, *(layer.name for layer in networks[0].layers)]):
            moved = [n.layers[at - 1].overall if at else n.mean_relative for n in networks]
            if not trained_apart:  # parts of the images of the same networks
                moved = np.mean(np.reshape(moved, (len(repeats), -1)), 0).tolist()
            yield {
                "networks": group,
                "n": len(moved),
                "layer": layer,
                "spearman": rank_correlation(torch.tensor(moved), held),
            }


def between(repeats: Repeats, method: str) -> dict[str, float] | None:
    """Mean overlap of the sensitive sets of the networks of different repeats, and what chance gives."""
    overlaps: list[float] = []
    chances: list[float] = []
    for i, first in enumerate(repeats):
        for second in repeats[:i]:
            for a, b in zip(first[method].layers, second[method].layers, strict=True):
                one, other = set(a.sensitive), set(b.sensitive)
                overlaps.append(len(one & other) / len(one | other))
                moving = sum(x > 0 or y > 0 for x, y in zip(a.absolute, b.absolute, strict=True))
                chances.append(by_chance(moving, len(one), len(other)))
    return {"jaccard": float(np.mean(overlaps)), "chance": float(np.mean(chances))} if overlaps else None


def interval(values: Sequence[float]) -> dict[str, float]:
    told = student(values)
    return {"mean": told.value, "low": told.low, "high": told.high, "n": len(values)}


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


if __name__ == "__main__":
    main()
