"""The MRI story: a Keras classifier of brain MRI slices, audited, hardened, put behind a defence and beside detectors.

Keras trains a network and saves it. Rempart audits that file as it is, trains it further on attacked images, audits it
behind a preprocessing defence, fits detectors to it, and puts all of that on one page. Data: a zip of the public Brain
Tumor MRI Dataset, `train|test/CLASS/NAME.jpg`, or any other grey images in that layout.

    python examples/mri.py --data brain-mri.zip
    python examples/mri.py --data brain-mri.zip --quick

What is complete in the run folder is not done again; delete a folder in it to have it anew.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import rempart
from rempart.core.stats import Rate
from rempart.report import store
from rempart.report.schema import (
    AnySpec,
    AttackChoice,
    AuditSpec,
    DefenceChoice,
    DetectorChoice,
    DetectSpec,
    Reading,
    Report,
    TrainSpec,
)
from rempart.runs import compare
from rempart.terminal import progress

THREAT = "linf:4/255"
KERAS = "plain.keras"
DEFENCES = (DefenceChoice(name="bit-depth", options={"bits": 4}), DefenceChoice(name="median", options={"size": 2}))
DETECTORS = (DetectorChoice(name="max-softmax"), DetectorChoice(name="binary"))
FULL: dict[str, Any] = {"train": None, "epochs": 12, "further": 4, "steps": 30, "search": 3, "images": 200, "fit": 200}
QUICK: dict[str, Any] = {"train": 160, "epochs": 20, "further": 1, "steps": 2, "search": 1, "images": 8, "fit": 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the zip, or a folder in that layout")
    parser.add_argument("--side", type=int, default=64, help="images are resized to this many pixels a side")
    parser.add_argument("--runs", type=Path, help="default: runs/mri, or runs/mri-quick")
    parser.add_argument("--quick", action="store_true", help="few steps on few images, to see it run")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    given = parser.parse_args()
    size = QUICK if given.quick else FULL
    runs = given.runs or Path("runs/mri-quick" if given.quick else "runs/mri")
    told = story(f"{given.data}@{given.side}@grey", runs, size)
    if given.json is not None:
        given.json.write_text(json.dumps(figures(told, size), indent=1) + "\n", "utf-8")


def story(data: str, runs: Path, size: Mapping[str, Any]) -> dict[str, Report]:
    """Do what is not done yet, write the page, and return the reports by folder."""
    if not (runs / KERAS).exists():
        train_keras(data, runs / KERAS, images=size["train"], epochs=size["epochs"])
    told = {name: once(spec) for name, spec in specs(data, runs, size).items()}
    page = runs / "story.html"
    compared = [runs / name for name in told if name != "hardened"]
    print(f"\n{compare(compared, out=page)}\n{page}")
    return told


def specs(data: str, runs: Path, size: Mapping[str, Any]) -> dict[str, AnySpec]:
    """What is asked for once Keras has trained, by folder and in order."""
    out = {
        name: str(runs / name) for name in ("audit-plain", "hardened", "audit-hardened", "audit-defended", "detectors")
    }
    plain = {"model": str(runs / KERAS), "reading": Reading(classes=rempart.open_data(data).class_names)}
    attacks = (
        AttackChoice(name="fgsm"),
        AttackChoice(name="bim"),
        AttackChoice(name="mim"),
        AttackChoice(name="pgd", options={"steps": size["steps"]}),
        AttackChoice(name="cw", options={"steps": size["steps"], "search_steps": size["search"], "initial_const": 0.1}),
    )
    shared: dict[str, Any] = {"data": data, "threat": THREAT, "attacks": attacks, "limit": size["images"]}
    audit = {**shared, "batch_size": 100, "sweep": False}
    return {
        "audit-plain": AuditSpec(**plain, **audit, out=out["audit-plain"]),
        "hardened": TrainSpec(
            data=data,
            start=plain["model"],
            reading=plain["reading"],
            recipe="pgd-at:medical",
            options={"threat": THREAT, "steps": 3, "epochs": size["further"], "learning_rate": 0.02, "shift": 2},
            overwrite=True,
            out=out["hardened"],
        ),
        "audit-hardened": AuditSpec(model=out["hardened"], **audit, out=out["audit-hardened"]),
        "audit-defended": AuditSpec(**plain, defences=DEFENCES, **audit, out=out["audit-defended"]),
        "detectors": DetectSpec(
            **plain,
            **shared,
            detectors=DETECTORS,
            fit_limit=size["fit"],
            steps=size["steps"],
            out=out["detectors"],
        ),
    }


def train_keras(data: str, out: Path, *, images: int | None, epochs: int) -> None:
    """Train a small network with Keras alone, on images and their mirror images, and save it."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    train = rempart.open_data(data, split="train").head(images)
    x = train.read(train.index).movedim(1, -1).numpy()  # Keras has the channels last
    blocks = [
        layer
        for width in (16, 32, 64, 128)
        for layer in (
            layers.Conv2D(width, 3, padding="same", use_bias=False),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(),
        )
    ]
    outputs = layers.Dense(len(train.class_names), activation="softmax")
    net = keras.Sequential([keras.Input(x.shape[1:]), *blocks, layers.GlobalAveragePooling2D(), outputs])
    varied = keras.Sequential([layers.RandomFlip("horizontal"), net])
    rate = keras.optimizers.schedules.CosineDecay(2e-3, epochs * -(-len(x) // 32))
    varied.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    varied.fit(x, train.labels.numpy(), batch_size=32, epochs=epochs, verbose=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    net.save(out)


def once(spec: AnySpec) -> Report:
    """The report of a spec, which is run unless that was done."""
    folder = Path(str(spec.out))
    if (folder / store.JSON).exists():
        report = store.read(folder)
        if report.complete and report.spec == spec:
            return report
    with progress() as notify:
        report = rempart.run(spec, notify)
    if report is None or not report.complete:
        raise SystemExit(f"{folder} was interrupted; the same command takes it up again")
    return report


def figures(told: Mapping[str, Report], size: Mapping[str, Any]) -> dict[str, Any]:
    """What the reports say, as JSON: shares of test images with their intervals."""
    record, detected = told["detectors"].environment, told["detectors"]
    audits = {name.removeprefix("audit-"): report for name, report in told.items() if report.kind == "audit"}
    training = told["hardened"].training
    assert training is not None
    return {
        "question": "What do hardening, preprocessing and detection keep of a Keras classifier of brain MRI?",
        "command": "python examples/mri.py --data brain-mri.zip --json benchmarks/results/mri_story.json",
        "date": detected.created,
        "hardware": {key: record[key] for key in ("processor", "cores", "threads", "accelerator")},
        "versions": {key: record[key] for key in ("python", "torch", "numpy", "rempart")} | {"keras": keras_version()},
        "note": "One training of each network, all of seed 0. No patient identifiers: slices of one patient may lie on "
        "both sides of the split.",
        "threat": THREAT,
        "seed": 0,
        "data": detected.data.source.removesuffix(":test"),
        "settings": {**size, "defences": list(audits["defended"].model.defences)},
        "training": {"recipe": training.recipe, "seconds": training.seconds},
        "table": [
            {
                "model": name,
                "clean": shown(report.clean),
                "attacks": {attack.label: shown(attack.accuracy) for attack in report.attacks},
                "worst": shown(report.worst_case),
                "stamp": report.stamp,
                "fired": list(report.fired),
                "digest": report.model.digest,
            }
            for name, report in audits.items()
        ],
        "detectors": {
            "fitted_on": detected.detection[0].fitted_on,
            "calibrated_on": detected.detection[0].calibrated_on,
            "alone": {"clean": shown(detected.clean), "attacked": shown(detected.worst_case)},
            "table": [
                {
                    "detector": found.label,
                    "false_alarms": shown(found.false_alarms[f"{found.fpr:g}"]),
                    "held": {row.attack: shown(row.held) for row in found.held},
                }
                for found in detected.detection
            ],
        },
    }


def shown(rate: Rate | None) -> dict[str, float]:
    """A share with its interval."""
    assert rate is not None
    return {"k": rate.k, "n": rate.n, "share": rate.value, "low": rate.low, "high": rate.high}


def keras_version() -> str:
    """The version that trained or reads the plain network."""
    from importlib.metadata import version

    return version("keras")


if __name__ == "__main__":
    main()
