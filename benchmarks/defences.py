"""Which training methods leave a network harder to break, at equal cost, under attacks that do not depend on them?

Every objective begins with the same plainly trained network and gets the same number of gradient evaluations, the same
optimiser and the same images set aside to choose the epoch by. Each result is judged by `rempart audit` with the suite
`fast`, whose checks look for hidden gradients, on the same test images. MNIST LeNet at linf 0.1, linf 0.3 and l2 1.5,
three seeds; brain MRI at linf 4/255, one seed. For linf 0.3 every method goes on with its own network for linf 0.1,
with a second budget: from the plain network adversarial training does not get off the ground within it.

    python benchmarks/defences.py [--data ../shared/data] [--runs runs/defences] [--share 0/2] [mnist] [mri]
    python benchmarks/defences.py --collect

Work already done is not repeated; several shares can run at the same time. `--collect` writes the results JSON.
"""

import argparse
import itertools
import json
import math
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rempart.core.errors import TrainError
from rempart.core.repro import environment
from rempart.core.stats import student
from rempart.core.threat import Threat
from rempart.data import open_data
from rempart.models import load
from rempart.objectives.catalogue import objectives
from rempart.report import store
from rempart.report.compare import WORST, compare
from rempart.report.schema import AuditSpec, Report, TrainSpec
from rempart.tasks import run
from rempart.train import load_recipe, train

RESULTS = Path(__file__).parent / "results" / "defences.json"
EPOCHS = 3
CALIBRATION = 128  # images of the short run that counts a method's gradient evaluations per image
MIXED = 1280  # the same for adaptive, which draws an attack for each batch
PROBE = 1000  # images that sns measures its neurons on, by default
COMMON = {"batch_size": 64, "optimiser": "adam", "schedule": "onecycle", "weight_decay": 1e-3}

SETTINGS: dict[str, dict[str, Any]] = {
    "mnist": {
        "data": "mnist:{}/mnist",
        "model": "lenet",
        "family": "mnist",
        "start": {"recipe": "plain", "options": {"epochs": 3}},
        "threats": ("linf:0.1", "linf:0.3", "l2:1.5"),
        "before": {"linf:0.3": "linf:0.1"},  # whose network a training goes on with
        "seeds": (0, 1, 2),
        "budget": {"linf:0.1": 80_000, "linf:0.3": 178_500, "l2:1.5": 80_000},
        "test": 250,
        "common": {"learning_rate": 2e-3, "flip": False, "shift": 0, "validation_images": 500},
    },
    "mri": {
        "data": "{}/brain-mri.zip",
        "model": "mri-cnn",
        "family": "medical",
        "start": {"recipe": "plain:medical", "options": {"epochs": 10}},
        "threats": ("linf:4/255",),
        "before": {},
        "seeds": (0,),
        "budget": {"linf:4/255": 24_000},
        "test": 125,
        "common": {"learning_rate": 1e-3, "flip": True, "shift": 4, "validation_images": 200},
    },
}

# name in the table: recipe, options that differ from it; {eps} is the budget of the threat
AGAINST_A_THREAT: dict[str, tuple[str, dict[str, Any]]] = {
    "pgd-at": ("pgd-at", {"steps": 7}),
    "mixed": ("mixed", {"steps": 7}),
    "fast": ("fast", {"collapse": "none"}),
    "free": ("free", {"replays": 4}),
    "trades": ("trades", {"steps": 7, "beta": 6.0}),
    "mart": ("mart", {"steps": 7}),
    "alp": ("alp", {"steps": 7}),
    "pgd-at + awp": ("awp", {"steps": 7}),
    "ima": ("ima", {"steps": 10, "delta": "{eps}/2"}),
    "adaptive": ("adaptive", {"steps": 7, "eps_0": "{eps}/2", "alpha": "{alpha}"}),
    "sns": ("sns", {"steps": 7}),
    "sns, random neurons": ("sns", {"steps": 7, "choose": "random"}),
}
WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "gaussian": ("gaussian", {}),
    "parseval": ("parseval", {}),
    "input-gradient": ("input-gradient", {}),
    "gfa FIRST": ("gfa", {}),
    "gfa DEEP": ("gfa", {"layers": "deep", "task": "ce", "penalty": "neg", "weight": 0.3}),
    "deep-defense": ("deep-defense", {}),
}

AGAINST = ("plain", "pgd-at", "sns, random neurons")  # what each method is set against


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=list(SETTINGS), help=", ".join(SETTINGS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/defences"))
    parser.add_argument("--share", default="0/1", help="i/n: the i-th of n parts of the work")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the budget on 40 images, to see it run")
    parser.add_argument("--collect", action="store_true")
    given = parser.parse_args()
    if given.collect:
        collect(given.runs)
        return
    part, parts = map(int, given.share.split("/"))
    groups = [(place, seed) for place in given.which for seed in SETTINGS[place]["seeds"]]
    for place, seed in groups[part::parts]:  # what shares a network to begin with is one process's
        for method, threat in itertools.product((*WITHOUT, *AGAINST_A_THREAT), SETTINGS[place]["threats"]):
            judge(place, method, threat, seed, given.data, given.runs, quick=given.quick)


def learned_for(place: str, method: str, threat: str) -> str:
    """The threat a network was trained for: methods that know none are not trained anew for each."""
    first = SETTINGS[place]["threats"][0]
    return threat if method in AGAINST_A_THREAT or threat in SETTINGS[place]["before"] else first


def home(runs: Path, place: str, method: str, threat: str, seed: int) -> Path:
    return runs / place / f"{method} {named(learned_for(place, method, threat))} {seed}"


def named(threat: str) -> str:
    return threat.replace("/", "_").replace(":", "-")


def judge(place: str, method: str, threat: str, seed: int, data: Path, runs: Path, *, quick: bool) -> None:
    """Train one network, unless that is done, and audit it within a threat."""
    setting = SETTINGS[place]
    folder = home(runs, place, method, threat, seed)
    source = setting["data"].format(data)
    if not (folder / "failed.txt").exists() and not complete(folder):
        against = learned_for(place, method, threat)
        before = setting["before"].get(against)
        start = home(runs, place, method, before, seed) if before else beginning(place, seed, data, runs)
        if not (start / "config.json").exists():
            return  # what it goes on with failed
        budget = setting["budget"][against] // (20 if quick else 1)
        recipe, options = chosen(place, method, against, start, source, budget)
        limit = options.pop("images")
        spec = TrainSpec(
            data=f"{source}[{limit}]",
            start=str(start),
            recipe=recipe,
            options=options,
            seed=seed,
            overwrite=True,
            out=str(folder),
        )
        print(f"{folder.name}: {limit} images", flush=True)
        try:
            run(spec)
        except TrainError as error:
            print(f"  {error}", flush=True)
            if not (folder / "config.json").exists():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "failed.txt").write_text(str(error))
    audit = folder / f"audit {named(threat)}"
    if not complete(folder) or complete(audit):
        return
    test = 40 if quick else setting["test"]
    report = run(
        AuditSpec(
            model=str(folder),
            data=f"{source}:test[{slice_of(source, test)}]",
            threat=threat,
            suite="fast",
            batch_size=256,
            sweep=False,
            out=str(audit),
        )
    )
    assert report is not None and report.worst_case is not None and report.clean is not None
    print(
        f"  {threat}: clean {report.clean.value:.1%}, worst {report.worst_case.value:.1%}, {report.stamp}", flush=True
    )


def slice_of(source: str, n: int) -> str:
    """Every k-th test image, so that classes sorted by folder all occur."""
    return f"::{len(open_data(source, split='test')) // n}"


def complete(folder: Path) -> bool:
    return (folder / "report.json").exists()


def beginning(place: str, seed: int, data: Path, runs: Path) -> Path:
    """The plainly trained network that all methods of a seed begin with."""
    setting = SETTINGS[place]
    folder = runs / place / f"start {seed}"
    if not complete(folder):
        run(
            TrainSpec(
                data=setting["data"].format(data),
                model=setting["model"],
                seed=seed,
                overwrite=True,
                out=str(folder),
                **setting["start"],
            )
        )
    return folder


def chosen(place: str, method: str, threat: str, start: Path, source: str, budget: int) -> tuple[str, dict[str, Any]]:
    """Recipe and options of a method, with as many images as its gradient evaluations leave room for."""
    setting = SETTINGS[place]
    recipe, own = {**AGAINST_A_THREAT, **WITHOUT}[method]
    eps = Threat.parse(threat).budget
    options: dict[str, Any] = {**COMMON, **setting["common"], "epochs": EPOCHS, "validation_threat": threat}
    if method in WITHOUT:
        options["validation_threat"] = setting["threats"][0]
    if method in AGAINST_A_THREAT:
        options["threat"] = threat
    for key, value in own.items():
        options[key] = value
        if value == "{eps}/2":
            options[key] = eps / 2
        elif value == "{alpha}":
            options[key] = 1.0  # set below, when the number of steps is known
    learn = open_data(source, split="train")
    few = MIXED if recipe == "adaptive" else CALIBRATION
    part = learn.take(torch.arange(0, len(learn), max(1, len(learn) // few))[:few]).load()
    once = {key: value for key, value in options.items() if key != "alpha"}
    name = f"{recipe}:{setting['family']}"
    counted = load_recipe(name, {**once, "epochs": 1, "validation_images": 0})
    epochs = train(part, None, load(str(start)), counted)
    each = epochs[-1].gradients / len(part)
    fixed = 0
    if recipe == "sns":  # its probe of so many images costs the same for every epoch, however many are learnt from
        fixed, each = options["steps"] * PROBE, each - options["steps"]
    images = round((budget / EPOCHS - fixed) / each)
    images = min(len(learn), images + min(setting["common"]["validation_images"], math.ceil(images / 9)))
    step = max(1, len(learn) // images)
    options["images"] = f"0:{images * step}:{step}"
    if "alpha" in options:
        options["alpha"] = eps / max(1, EPOCHS * images // options["batch_size"])
    return name, options


# ---- the results


def collect(runs: Path) -> None:
    table: list[dict[str, Any]] = []
    for place, setting in SETTINGS.items():
        for threat in setting["threats"]:
            audits = {name: audited(runs, place, name, threat) for name in (*WITHOUT, *AGAINST_A_THREAT)}
            for method, reports in audits.items():
                if reports:
                    rows = [measured(runs, place, method, threat, seed, report) for seed, report in reports.items()]
                    gaps = {f"to {other}": gap(reports, audits[other]) for other in AGAINST if other != method}
                    table.append(summary(place, threat, method, rows) | gaps)
    record = environment()
    body = {
        "question": "Which training methods leave a network harder to break, at equal cost, under strong attacks?",
        "command": "python benchmarks/defences.py; python benchmarks/defences.py --collect",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {key: record[key] for key in ("processor", "cores", "accelerator")},
        "versions": {key: record[key] for key in ("python", "torch", "numpy", "rempart")},
        "settings": {
            name: {key: value for key, value in setting.items() if key != "data"} for name, setting in SETTINGS.items()
        },
        "common": {**COMMON, "epochs": EPOCHS},
        "methods": {
            name: {"recipe": recipe, "options": own} for name, (recipe, own) in {**WITHOUT, **AGAINST_A_THREAT}.items()
        },
        "objectives": sorted(entry.name for entry in objectives),
        "note": "Fine-tuning from one plain network per seed, a small budget: what a method is worth when trained for "
        "longer may differ. Hyper-parameters are those of the packaged recipes and not tuned. Intervals over three "
        "seeds are Student's; those of one network are Wilson's, and of differences paired bootstrap over the images. "
        "Seconds were taken with two trainings running at a time.",
        "table": table,
    }
    RESULTS.write_text(json.dumps(body, indent=1) + "\n")
    for row in table:
        print(
            f"{row['setting']:6}{row['threat']:12}{row['method']:22}",
            *(f"{row[k]['mean']:7.1%}" for k in ("clean", "worst")),
            row["stamps"],
        )


def audited(runs: Path, place: str, method: str, threat: str) -> dict[int, Report]:
    """The audits of a method within a threat, by seed."""
    folders = {
        seed: home(runs, place, method, threat, seed) / f"audit {named(threat)}" for seed in SETTINGS[place]["seeds"]
    }
    return {seed: store.read(folder) for seed, folder in folders.items() if complete(folder)}


def measured(runs: Path, place: str, method: str, threat: str, seed: int, report: Report) -> dict[str, Any]:
    trained = store.read(home(runs, place, method, threat, seed))
    assert trained.training is not None
    return {
        "seed": seed,
        "complete": trained.complete,
        "clean": rate(report, "clean"),
        "worst": rate(report, "worst_case"),
        "stamp": report.stamp,
        "fired": list(report.fired),
        "images": trained.training.train_images,
        "best_epoch": trained.training.best_epoch,
        "gradients": trained.training.gradients,
        "queries": trained.training.queries,
        "seconds": trained.training.seconds,
    }


def gap(ours: dict[int, Report], theirs: dict[int, Report]) -> dict[str, Any] | None:
    """Worst case of a method minus that of another from the same networks.

    Over several seeds Student's interval of the differences; of one seed, paired bootstrap over the test images.
    """
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return None
    found = [compare({"theirs": theirs[seed], "ours": ours[seed]}).contrast("ours", WORST) for seed in both]
    gaps = [one for one in found if one is not None]
    told = student([one.value for one in gaps]) if len(gaps) > 1 else gaps[0]
    return {"value": told.value, "low": told.low, "high": told.high, "seeds": len(gaps)}


def rate(report: Report, name: str) -> dict[str, float]:
    value = getattr(report, name)
    return {"k": value.k, "n": value.n, "low": value.low, "high": value.high}


def summary(place: str, threat: str, method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    stamps = [row["stamp"] for row in rows]
    return {
        "setting": place,
        "threat": threat,
        "method": method,
        "clean": over_seeds([row["clean"] for row in rows]),
        "worst": over_seeds([row["worst"] for row in rows]),
        "gradients": round(statistics.mean(row["gradients"] for row in rows)),
        "seconds": round(statistics.mean(row["seconds"] for row in rows), 1),
        "stamps": {stamp: stamps.count(stamp) for stamp in dict.fromkeys(stamps)},
        "seeds": rows,
    }


def over_seeds(rates: list[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds with its t interval, cut to [0, 1]; of one seed, Wilson's interval."""
    if len(rates) == 1:
        return {"mean": rates[0]["k"] / rates[0]["n"], "low": rates[0]["low"], "high": rates[0]["high"], "seeds": 1}
    told = student([r["k"] / r["n"] for r in rates])
    return {"mean": told.value, "low": max(0.0, told.low), "high": min(1.0, told.high), "seeds": len(rates)}


if __name__ == "__main__":
    main()
