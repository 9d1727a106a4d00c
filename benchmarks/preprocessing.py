"""Which preprocessing defences survive an attacker who knows them?

A plainly trained network behind each defence, on the same test images: accuracy without an attack; under an oblivious
attack (pgd on the network alone, its images shown to the defended model); and under the attack that an audit makes of
the defended model (suite `fast` through the defence, by substitute gradients where it has none of its own and mean
gradients where it is random). MNIST LeNet at linf 0.1, brain MRI at linf 4/255. A defence is worth the last column; the
gap between the last two is what an evaluation that forgets it would have claimed.

    python benchmarks/preprocessing.py [--data ../shared/data] [--runs runs/preprocessing] [--share 0/2] [mnist] [mri]
    python benchmarks/preprocessing.py --collect
    python benchmarks/preprocessing.py --quick mnist --model mnist=runs/plain

Work already done is not repeated. `--model PLACE=FOLDER` takes a trained network instead of training one.
`--collect` writes the results JSON.
"""

import argparse
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rempart.attacks import attack_data
from rempart.core.repro import environment
from rempart.core.stats import Rate, wilson
from rempart.core.threat import Threat
from rempart.data import open_data
from rempart.models import load
from rempart.preprocess import defended, described, preprocessors
from rempart.report.schema import AuditSpec, DefenceChoice, TrainSpec
from rempart.tasks import run

RESULTS = Path(__file__).parent / "results" / "preprocessing.json"
OBLIVIOUS = {"steps": 40, "loss": "margin"}

SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "data": "mnist:{}/mnist",
        "train": {"model": "lenet", "recipe": "plain", "options": {"epochs": 3}},
        "threat": "linf:0.1",
        "images": 250,
    },
    "mri": {
        "data": "{}/brain-mri.zip",
        "train": {"model": "mri-cnn", "recipe": "plain:medical", "options": {"epochs": 10}},
        "threat": "linf:4/255",
        "images": 125,
    },
}

# name in the table: the defences in front of the network
DEFENCES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "none": [],
    "jpeg 75": [("jpeg", {"quality": 75})],
    "jpeg 25": [("jpeg", {"quality": 25})],
    "bit-depth 3": [("bit-depth", {"bits": 3})],
    "bit-depth 1": [("bit-depth", {"bits": 1})],
    "median 2": [("median", {"size": 2})],
    "median 3": [("median", {"size": 3})],
    "bilateral": [("bilateral", {})],
    "non-local-means": [("non-local-means", {})],
    "tv": [("tv", {})],
    "resize-pad": [("resize-pad", {})],
    "pixel-deflection": [("pixel-deflection", {})],
    "gaussian-noise 0.1": [("gaussian-noise", {"sigma": 0.1})],
    "bit-depth 3, median 2": [("bit-depth", {"bits": 3}), ("median", {"size": 2})],
}
QUICK = ("none", "jpeg 75", "bit-depth 1", "median 2", "resize-pad")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=list(SETTINGS), help=", ".join(SETTINGS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/preprocessing"))
    parser.add_argument("--share", default="0/1", help="i/n: the i-th of n parts of the work")
    parser.add_argument("--model", action="append", default=[], help="PLACE=FOLDER of a trained network; repeatable")
    parser.add_argument("--quick", action="store_true", help="five defences on 10 images, to see it run")
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args()
    if given.collect:
        collect(given.runs)
        return
    models = dict(pair.split("=", 1) for pair in given.model)
    part, parts = map(int, given.share.split("/"))
    for place in given.which:
        model = models.get(place) or trained(place, given.data, given.runs)
        for name in list(QUICK if given.quick else DEFENCES)[part::parts]:
            judge(place, name, model, given.data, given.runs, quick=given.quick)


def trained(place: str, data: Path, runs: Path) -> str:
    """The plain network of a setting; the process that comes first trains it."""
    folder, setting = runs / place / "plain", SETTINGS[place]
    if not (folder / "report.json").exists():
        run(TrainSpec(data=setting["data"].format(data), overwrite=True, out=str(folder), **setting["train"]))
    return str(folder)


def judge(place: str, name: str, source: str, data: Path, runs: Path, *, quick: bool) -> None:
    """The three accuracies of one network behind one defence, unless they are there."""
    folder, setting = runs / place / name, SETTINGS[place]
    if (folder / "row.json").exists():
        return
    images, chain = 10 if quick else setting["images"], DEFENCES[name]
    origin = setting["data"].format(data)
    chosen = f"{origin}:test[::{len(open_data(origin, split='test')) // images}]"  # classes sorted by folder all occur
    report = run(
        AuditSpec(
            model=source,
            data=chosen,
            threat=setting["threat"],
            suite="fast",
            defences=tuple(DefenceChoice(name=defence, options=options) for defence, options in chain),
            batch_size=128,
            sweep=False,
            out=str(folder),
        )
    )
    assert report is not None and report.clean is not None and report.worst_case is not None
    plain = load(source)
    threat = Threat.parse(setting["threat"], low=plain.low, high=plain.high)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        oblivious = attack_data(
            defended(plain, chain),
            open_data(chosen).scaled(plain.low, plain.high),
            threat,
            "pgd",
            OBLIVIOUS,
            search=plain,
            batch_size=128,
        )
    row = {
        "setting": place,
        "defence": name,
        "chain": list(described(chain)),
        "random": any(preprocessors[defence].traits.random for defence, _ in chain),
        "threat": setting["threat"],
        "clean": shown(report.clean),
        "oblivious": shown(wilson(int(oblivious.right.sum()), len(oblivious.right))),
        "adaptive": shown(report.worst_case),
        "stamp": report.stamp,
        "fired": list(report.fired),
        "notes": list(report.notes),
        "model": report.model.digest,
        "seconds": round(report.seconds, 1),
    }
    (folder / "row.json").write_text(json.dumps(row, indent=1) + "\n")
    print(line(row), flush=True)


def shown(rate: Rate) -> dict[str, float]:
    return {"k": rate.k, "n": rate.n, "share": rate.value, "low": rate.low, "high": rate.high}


def told(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the page of results."""
    shares = {key: row[key] for key in ("clean", "oblivious", "adaptive")}
    cells = {key: f"{r['share']:.1%} [{r['low']:.1%}, {r['high']:.1%}]" for key, r in shares.items()}
    return cells | {"checks": row["stamp"]}


def line(row: Mapping[str, Any]) -> str:
    shares = (f"{row[key]['share']:7.1%}" for key in ("clean", "oblivious", "adaptive"))
    return f"{row['setting']:6} {row['defence']:24} {' '.join(shares)}  {row['stamp']}"


def collect(runs: Path) -> None:
    rows = [
        json.loads(file.read_text())
        for place in SETTINGS
        for name in DEFENCES
        if (file := runs / place / name / "row.json").exists()
    ]
    record = environment()
    body = {
        "question": "Which preprocessing defences survive an attacker who knows them?",
        "command": "python benchmarks/preprocessing.py; python benchmarks/preprocessing.py --collect",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {key: record[key] for key in ("processor", "cores", "accelerator")},
        "versions": {key: record[key] for key in ("python", "torch", "numpy", "pillow", "rempart")},
        "note": "One plainly trained network for each data set, the same test images in every row; intervals are "
        "Wilson's. Oblivious: pgd, 40 steps on the margin, on the network without the defence. Adaptive: the suite "
        "fast on the defended model, worst case of attacks and checks. Random models are judged by mean logits over "
        "16 passes.",
        "oblivious": OBLIVIOUS,
        "settings": {name: {k: v for k, v in setting.items() if k != "data"} for name, setting in SETTINGS.items()},
        "results": {
            place: {row["defence"]: told(row) for row in rows if row["setting"] == place} for place in SETTINGS
        },
        "table": rows,
    }
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    for row in rows:
        print(line(row))


if __name__ == "__main__":
    main()
