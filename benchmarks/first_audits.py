"""How far do plainly trained classifiers of MNIST and of brain MRI slices fall under small perturbations?

Trains lenet on MNIST and mri-cnn on the Brain Tumor MRI Dataset (128x128, 4 classes) with the packaged recipes, audits
them as the documentation does, and writes one JSON per audit: a header, and the whole report without its pictures.

    python benchmarks/first_audits.py [--data ../shared/data] [--runs runs] [mnist] [mri]

The MRI files carry no patient identifiers, so slices of one patient may lie on both sides of the split: the clean
accuracy may be flattered by that. Hardware, versions, n, seed and date stand in each JSON.
"""

import argparse
import json
from pathlib import Path

from rempart.report import text
from rempart.report.schema import AttackChoice, AuditSpec, TrainSpec
from rempart.tasks import run
from rempart.terminal import progress

RESULTS = Path(__file__).parent / "results"
ATTACKS = ("fgsm", "bim", "mim", "pgd", "deepfool", "cw", "ead")
MINIMUM = {"steps": 200, "search_steps": 5, "initial_const": 0.1}
OPTIONS = {"cw": {**MINIMUM, "learning_rate": 0.05}, "ead": MINIMUM}
SPLIT_NOTE = "No patient identifiers: slices of one patient may lie on both sides of the split."


def audit(name: str, question: str, data: str, model: Path, threat: str, out: Path, attacks: tuple[str, ...]) -> None:
    choices = tuple(AttackChoice(name=attack, options=OPTIONS.get(attack, {})) for attack in attacks)
    spec = AuditSpec(model=str(model), data=data, threat=threat, attacks=choices, eight_bit=True, out=str(out))
    with progress() as notify:
        report = run(spec, notify)
    print(text.table(report))
    source = data.split("/")[-1]
    portable = spec.model_copy(update={"data": source, "model": model.name, "out": None})
    header = {
        "question": question,
        "command": "python benchmarks/first_audits.py " + name.split("-")[0],
        "date": report.created,
        "hardware": {key: report.environment[key] for key in ("processor", "cores", "threads", "accelerator")},
        "versions": {key: report.environment[key] for key in ("python", "torch", "numpy", "rempart")},
        "n": report.data.n,
        "seed": spec.seed,
        "result": text.verdict(report),
        "note": SPLIT_NOTE if name.startswith("mri") else "",
    }
    kept = report.model_copy(update={"examples": (), "spec": portable})
    body = {**header, "report": json.loads(kept.model_dump_json())}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n")


def train(data: str, model: str, recipe: str, out: Path) -> None:
    with progress() as notify:
        print(text.table(run(TrainSpec(data=data, model=model, recipe=recipe, out=str(out)), notify)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=["mnist", "mri"], help="mnist, mri")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with mnist/ and brain-mri.zip"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--reuse", action="store_true", help="audit the models already in --runs")
    given = parser.parse_args()
    if "mnist" in given.which:
        data, model = f"mnist:{given.data}/mnist", given.runs / "lenet"
        if not given.reuse:
            train(data, "lenet", "plain", model)
        question = "How far does a plainly trained LeNet fall on 1,000 MNIST test images at linf 0.1?"
        audit("mnist-linf-0.1", question, f"{data}:test[:1000]", model, "linf:0.1", given.runs / "a1", ATTACKS)
    if "mri" in given.which:
        data, model = f"{given.data}/brain-mri.zip", given.runs / "mri"
        if not given.reuse:
            train(data, "mri-cnn", "plain:medical", model)
        for eps in (2, 4):
            question = f"How far does a plainly trained network fall on the brain MRI test set at linf {eps}/255?"
            name, out = f"mri-linf-{eps}-255", given.runs / f"mri-{eps}"
            audit(name, question, f"{data}:test", model, f"linf:{eps}/255", out, ATTACKS[:5])


if __name__ == "__main__":
    main()
