"""Which detectors notice attacked images, and what is left of them under an attacker who knows them?

A plainly trained network and each detector in turn, on the same test images. Detectors are fitted on training images,
thresholds are set for 5 % of a held-out part of the test split, and the rest of it judges. Attacks that do not know the
detector: fgsm, bim, mim, pgd, cw and deepfool; detectors that learn from attacks learn from all six, and are judged a
second time on each of them after they learnt from the other five. Then the attacker who knows the detector. What a
detector is worth is the share of all test images that network and detector hold together under him, beside what the
network alone holds. MNIST LeNet at linf 0.2, brain MRI at linf 4/255; areas also at two other budgets.

    python benchmarks/detectors.py [--data ../shared/data] [--runs runs/detectors] [--share 0/2] [mnist] [mri]
    python benchmarks/detectors.py --collect

Work already done is not repeated; several shares can run at the same time. `--model PLACE=FOLDER` takes a trained
network instead of training one. `--collect` writes the results JSON.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rempart.core.repro import environment
from rempart.detectors import detectors
from rempart.report import store
from rempart.report.schema import AttackChoice, Detection, DetectorChoice, DetectSpec, Report, TrainSpec
from rempart.tasks import run

RESULTS = Path(__file__).parent / "results" / "detectors.json"
BATCH = 5  # detectors of one run: the attacks are made once for all of them
SLOW: dict[str, dict[str, dict[str, Any]]] = {  # on fewer images; noise without the attacker who knows
    "mnist": {"squeezing": {"limit": 60, "steps": 20}, "noise": {"adaptive": False}},
    "mri": {"squeezing": {"limit": 20, "steps": 10}, "noise": {"adaptive": False}},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "data": "mnist:{}/mnist",
        "train": {"model": "lenet", "recipe": "plain", "options": {"epochs": 3}},
        "threat": "linf:0.2",
        "budgets": (0.1, 0.3),
        "fit_limit": 1000,
        "limit": 200,
        "steps": 100,
    },
    "mri": {
        "data": "{}/brain-mri.zip",
        "train": {"model": "mri-cnn", "recipe": "plain:medical", "options": {"epochs": 10}},
        "threat": "linf:4/255",
        "budgets": (2 / 255, 8 / 255),
        "fit_limit": 300,
        "limit": 100,
        "steps": 50,
    },
}
ATTACKS: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "bim": {"steps": 20},
    "mim": {"steps": 20},
    "pgd": {"steps": 20},
    "cw": {"steps": 100, "search_steps": 3, "initial_const": 1.0},
    "deepfool": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=list(SETTINGS), help=", ".join(SETTINGS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/detectors"))
    parser.add_argument("--share", default="0/1", help="i/n: the i-th of n parts of the work")
    parser.add_argument("--model", action="append", default=[], help="PLACE=FOLDER of a trained network; repeatable")
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args()
    if given.collect:
        collect(given.runs)
        return
    models = dict(pair.split("=", 1) for pair in given.model)
    part, parts = map(int, given.share.split("/"))
    for place in given.which:
        names = sorted(entry.name for entry in detectors if entry.name not in SLOW[place])
        batches = [names[at : at + BATCH] for at in range(0, len(names), BATCH)] + [[name] for name in SLOW[place]]
        for number, batch in list(enumerate(batches))[part::parts]:
            judge(place, number, batch, models.get(place), given.data, given.runs)


def judge(place: str, number: int, names: list[str], model: str | None, data: Path, runs: Path) -> None:
    """Evaluate some detectors, unless that is done."""
    setting, folder, fewer = SETTINGS[place], runs / place / str(number), SLOW[place].get(names[0], {})
    if read(folder) is not None:
        return
    source = setting["data"].format(data)
    plain = runs / place / "plain"
    if model is None and not (plain / "report.json").exists():
        run(TrainSpec(data=source, out=str(plain), overwrite=True, **setting["train"]))
    report = run(
        DetectSpec(
            model=model or str(plain),
            data=source,
            detectors=tuple(DetectorChoice(name=name) for name in names),
            attacks=tuple(AttackChoice(name=name, options=options) for name, options in ATTACKS.items()),
            out=str(folder),
            **{**{key: setting[key] for key in ("threat", "budgets", "fit_limit", "limit", "steps")}, **fewer},
        )
    )
    assert report is not None
    for found in report.detection:
        print(place, found.label, line(row(place, report, found)), flush=True)


def read(folder: Path) -> Report | None:
    """A finished evaluation."""
    if not (folder / "report.json").exists():
        return None
    report = store.read(folder)
    return report if report.complete else None


def row(place: str, report: Report, found: Detection) -> dict[str, Any]:
    """Everything measured of one detector on one data set."""
    assert report.clean is not None and report.worst_case is not None
    held = {entry.attack: shown(entry.held) for entry in found.held}
    return {
        "setting": place,
        "detector": found.label,
        "options": found.options,
        "learnt": list(found.learnt),
        "fitted_on": found.fitted_on,
        "calibrated_on": found.calibrated_on,
        "false_alarms": {rate: shown(share) for rate, share in found.false_alarms.items()},
        "alone": {"clean": shown(report.clean), "attacked": shown(report.worst_case)},
        "held": held,
        "evaded": None if found.evaded is None else shown(found.evaded),
        "seen": dict(attack(found.separations)),
        "unseen": dict(attack(found.left_out)),
        "kinds": list(found.kinds),
        "confusion": found.confusion,
        "seconds": round(found.seconds, 1),
        "model": report.model.digest,
    }


def attack(separations: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for found in separations:
        area = {"area": found.auroc.value, "low": found.auroc.low, "high": found.auroc.high}
        yield found.attack, {"n": found.n, **area, "caught": {r: shown(share) for r, share in found.caught.items()}}


def shown(rate: Any) -> dict[str, float]:
    return {"k": rate.k, "n": rate.n, "share": rate.value, "low": rate.low, "high": rate.high}


def told(found: Mapping[str, Any]) -> dict[str, str]:
    """A line of the page of results."""
    shares = {
        "false alarms at 5 %": found["false_alarms"]["0.05"],
        "held without attack": found["held"]["none"],
        "held, attacks that do not know it": found["held"]["all of these"],
        "held, the one that knows it": found["held"].get("knows the detector"),
        "held without a detector": found["alone"]["attacked"],
    }
    cells = {
        key: f"{share['share']:.1%} [{share['low']:.1%}, {share['high']:.1%}]" if share else "not measured"
        for key, share in shares.items()
    }
    areas = {f"area, {name}": f"{found['seen'][name]['area']:.3f}" for name in ATTACKS if name in found["seen"]}
    return areas | cells


def line(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in told(found).items())


def collect(runs: Path) -> None:
    rows: list[dict[str, Any]] = []
    for place in SETTINGS:
        for folder in sorted((runs / place).glob("[0-9]*")):
            report = read(folder)
            if report is not None:
                rows += [row(place, report, found) for found in report.detection]
    record = environment()
    body = {
        "question": "Which detectors notice attacks, and what is left of them under an attacker who knows them?",
        "command": "python benchmarks/detectors.py; python benchmarks/detectors.py --collect",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {key: record[key] for key in ("processor", "cores", "accelerator")},
        "versions": {
            key: record[key] for key in ("python", "torch", "numpy", "scikit-learn", "rempart") if key in record
        },
        "note": "One plainly trained network for each data set, the same test images in every row. Areas are under the "
        "ROC curve, against clean and noisy images; held is the share of all test images that network and detector "
        "hold together; held without a detector is under the same attacks, as far as they keep to the budget. "
        "Intervals are Wilson's.",
        "attacks": ATTACKS,
        "slow": SLOW,
        "settings": {name: {k: v for k, v in setting.items() if k != "data"} for name, setting in SETTINGS.items()},
        "results": {
            place: {found["detector"]: told(found) for found in rows if found["setting"] == place} for place in SETTINGS
        },
        "table": rows,
    }
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    for found in rows:
        print(found["setting"], found["detector"], line(found))


if __name__ == "__main__":
    main()
