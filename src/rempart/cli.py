"""The command line: arguments to a spec, the spec to `tasks.run`, the report to the screen."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads cost 2 to 20 times otherwise

import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from rempart.core.errors import RempartError, SpecError

if TYPE_CHECKING:
    from collections.abc import Generator

    from rempart.core.events import Event, Notify
    from rempart.report.schema import AttackChoice, DefenceChoice, DetectorChoice, Reading, Report
    from rempart.serve.auth import Tokens

app = typer.Typer(
    name="rempart",
    help="Attack, audit and harden image classifiers. MODEL is a folder written by `rempart train` or by Hugging Face, "
    "a .keras, .h5, .hdf5, .onnx or .pt2 file, or python:package.module:factory. DATA is digits, mnist:DIR, a folder "
    "or .zip of class folders (pictures, DICOM, NIfTI), or a .csv, .parquet or .npz file; add :train or :test and a "
    "slice such as [:500].",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="digits, mnist:DIR, cifar10:PATH, FOLDER, FILE.zip, FILE.csv, FILE.parquet, FILE.npz; :test[:500]",
    ),
]
Patients = Annotated[
    str | None, typer.Option("--patients", help="CSV with the columns patient and path or number: who each image is of")
]
ThreatText = Annotated[
    str,
    typer.Option(
        "--threat", help="Norm and budget in pixel units, linf:8/255, l2:0.5, l1:12, or in those of the data, linf:10HU"
    ),
]
Options = Annotated[list[str] | None, typer.Option("--option", "-o", help="key=value, repeatable")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random draw")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use the first N samples")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images per batch; changes no result")]
Defence = Annotated[
    list[str] | None,
    typer.Option(
        "--defence",
        help="Preprocessing in front of the model: NAME or NAME:key=value,key=value; repeatable, the first nearest to "
        "the image; see `rempart list preprocessors`",
    ),
]
Box = Annotated[
    str,
    typer.Option(
        "--box",
        help="What the network takes for images in [0, 1]: 0:255, -1:1, mean=0.449,std=0.226 (per channel: "
        "mean=A,B,C,std=D,E,F) or per-image",
    ),
]
Classes = Annotated[
    str | None, typer.Option("--classes", help="Names of the model's outputs in their order: cat,dog,hare")
]
Outputs = Annotated[
    Literal["logits", "probabilities"] | None,
    typer.Option("--outputs", help="What the network returns, where its last operations do not show it"),
]
EightBit = Annotated[bool, typer.Option("--eight-bit", help="Also judge each adversarial image rounded to 8 bit")]


@app.command()
def train(
    data: Data,
    out: Annotated[str, typer.Option("--out", help="Folder for the trained model and its report")],
    model: Annotated[
        str | None, typer.Option("--model", help="Architecture; see `rempart list models`; lenet without --from")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="A trained model to train further")] = None,
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Recipe name or TOML file; see `rempart list recipes`")
    ] = "plain",
    option: Options = None,
    model_option: Annotated[
        list[str] | None, typer.Option("--model-option", "-m", help="key=value of the architecture, repeatable")
    ] = None,
    patients: Patients = None,
    seed: Seed = 0,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option("--device", help="Where to train; the best there is by default")
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes (cuda: GPUs) that share each batch")] = 1,
    log: Annotated[
        list[str] | None, typer.Option("--log", help="tensorboard or mlflow, beside log.csv; repeatable")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training stopped in --out")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever --out holds")] = False,
) -> None:
    """Train or harden a model: the epoch that does best on images set aside is kept."""
    from rempart.report.schema import LOGS, TrainSpec

    for name in log or []:
        if name not in LOGS:
            raise SpecError(f"a log out of {', '.join(LOGS)}", got=repr(name))
    _run(
        TrainSpec(
            data=data,
            patients=patients,
            model=model if model or start else "lenet",
            start=start,
            reading=_reading(box, classes, outputs),
            device=device,
            devices=devices,
            log=tuple(log or ()),  # pyright: ignore[reportArgumentType]  (checked above)
            resume=resume,
            overwrite=overwrite,
            model_options=_options(model_option),
            recipe=recipe,
            options=_options(option),
            seed=seed,
            out=out,
        )
    )


@app.command()
def audit(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Data,
    threat: ThreatText,
    out: Annotated[str, typer.Option("--out", help="Run folder for report.json, report.html, samples.npz")],
    suite: Annotated[
        str | None, typer.Option("--suite", help="See `rempart list suites`; fast without --attack")
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option("--attack", help="NAME or NAME:key=value,key=value; repeatable")
    ] = None,
    option: Options = None,
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    defence: Defence = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    patients: Patients = None,
    seed: Seed = 0,
    eight_bit: EightBit = False,
    sweep: Annotated[bool, typer.Option(help="Add an accuracy-against-eps curve")] = True,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", help="Also aim from class to class: all, or TRUE:TARGET,TRUE:TARGET by name or number"),
    ] = None,
    costs: Annotated[
        str | None,
        typer.Option("--costs", help="CSV table of what mistakes cost: a row per true class, a column per predicted"),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option("--window", help="LOW:HIGH, pixel values that pictures show black and white; default: the box"),
    ] = None,
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Samples worked off and stored as a whole")] = 512,
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Where the model runs")] = "cpu",
    devices: Annotated[int, typer.Option("--devices", min=1, help="Processes (cuda: GPUs) that share the samples")] = 1,
) -> None:
    """Measure how far a model falls under attack, per sample, with intervals. `-o` goes to every --attack."""
    from rempart.report.schema import AttackChoice, AuditSpec

    shared = _options(option)
    if shared and not attack:
        raise SpecError("--attack beside -o", got=", ".join(option or []), hint="add for example --attack pgd")
    chosen: list[AttackChoice] = []
    for text in attack or []:
        name, own = _named(text)
        chosen.append(AttackChoice(name=name, options={**shared, **own}))
    _run(
        AuditSpec(
            model=model,
            reading=_reading(box, classes, outputs),
            data=data,
            patients=patients,
            threat=threat,
            suite=suite,
            attacks=tuple(chosen),
            defences=_defences(defence),
            limit=limit,
            batch_size=batch_size,
            chunk=chunk,
            seed=seed,
            eight_bit=eight_bit,
            sweep=sweep,
            pairs=pairs,
            costs=costs,
            window=None if window is None else _window(window),
            device=device,
            devices=devices,
            out=out,
        )
    )


@app.command()
def attack(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Data,
    attack: Annotated[str, typer.Option("--attack", help="See `rempart list attacks`")],
    threat: ThreatText,
    out: Annotated[
        str, typer.Option("--out", help="FILE.npz for the adversarial images; FILE.json and FILE.html beside it")
    ],
    target: Annotated[
        str | None, typer.Option("--target", help="Class to reach: a name, a number, nearest or least-likely")
    ] = None,
    option: Options = None,
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    defence: Defence = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    patients: Patients = None,
    seed: Seed = 0,
    eight_bit: EightBit = False,
) -> None:
    """Run one attack and keep its images."""
    from rempart.report.schema import AttackChoice, AttackSpec

    choice = AttackChoice(name=attack, options=_options(option))
    _run(
        AttackSpec(
            model=model,
            reading=_reading(box, classes, outputs),
            data=data,
            patients=patients,
            threat=threat,
            attack=choice,
            defences=_defences(defence),
            target=target,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            eight_bit=eight_bit,
            out=out,
        )
    )


@app.command()
def certify(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Data,
    sigma: Annotated[float, typer.Option("--sigma", help="Standard deviation of the noise in pixel units")],
    out: Annotated[str, typer.Option("--out", help="Run folder for report.json, report.html, samples.npz")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="Draws of noise that count, per image")] = 10_000,
    selection: Annotated[int, typer.Option("--selection", min=1, help="Draws that choose the class")] = 100,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Probability with which a certificate may be wrong, in (0, 0.5)")
    ] = 0.001,
    threat: Annotated[
        str | None, typer.Option("--threat", help="Bracket the accuracy in this threat: l2:0.5, linf:2/255, l1:3")
    ] = None,
    attack: Annotated[
        str, typer.Option("--attack", help="Attack on the smoothed model: NAME or NAME:key=value,key=value")
    ] = "pgd",
    attack_draws: Annotated[int, typer.Option("--attack-draws", min=1, help="Draws of noise the attack averages")] = 16,
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    defence: Defence = None,
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Noisy images per forward pass")] = 256,
    seed: Seed = 0,
) -> None:
    """Certify the model under Gaussian noise: radii within which its vote cannot change; --threat adds an attack."""
    from rempart.report.schema import AttackChoice, CertifySpec

    attack_name, attack_options = _named(attack)
    _run(
        CertifySpec(
            model=model,
            reading=_reading(box, classes, outputs),
            data=data,
            sigma=sigma,
            samples=samples,
            selection=selection,
            alpha=alpha,
            threat=threat,
            attack=AttackChoice(name=attack_name, options=attack_options),
            defences=_defences(defence),
            attack_draws=attack_draws,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            out=out,
        )
    )


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="A spec, or a report.json whose spec is run again")],
    out: Annotated[str | None, typer.Option("--out", help="Another place for what it writes")] = None,
) -> None:
    """Run a spec from a file, or replay a report. A training does not write over its own model: give it another --out.

    It loads the model that the file names, which runs code where that is python:package.module:factory.
    """
    from rempart.report.store import read_spec

    request = read_spec(spec)
    _run(request if out is None else request.model_copy(update={"out": out}))


@app.command()
def compare(
    reports: Annotated[
        list[Path],
        typer.Argument(
            help="Audits on the same samples, with judged detectors if you like, or training runs on the same data; a "
            "run that began with your own code as python:package.module:factory@FOLDER"
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file")] = None,
    threat: Annotated[
        str | None, typer.Option("--threat", help="Training runs: what to audit against, if not that of the recipes")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Training runs: audit on the first N test images")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option("--device", help="Training runs: where to audit")] = "cpu",
) -> None:
    """Put audits or training runs side by side, with paired intervals of the differences to the first.

    The model of each training run is audited first, in the folder of the run, unless it was already.
    """
    from rempart.runs import compare as compare_runs
    from rempart.terminal import progress

    with progress() as notify:
        table = compare_runs(reports, threat=threat, limit=limit, device=device, out=out, notify=_heeding(notify))
    _say(table)
    if out is not None:
        print(f"\n{out}")


@app.command()
def explain(
    model: Annotated[list[str], typer.Argument(metavar="MODEL", help="The first is illustrated")],
    threat: ThreatText,
    out: Annotated[str, typer.Option("--out", help="Run folder: report")],
    data: Annotated[str | None, typer.Option("--data", help="Images to measure on; left out, --image alone")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Image file to illustrate")] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="True class of --image; left out, what the first model takes it for")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", help="NAME or NAME:key=value; the first makes the pairs, default pgd"),
    ] = None,
    layers: Annotated[list[str] | None, typer.Option("--layers", help="Module or pattern; default: all blocks")] = None,
    share: Annotated[float, typer.Option("--share", help="Of a layer's neurons that count as sensitive")] = 0.1,
    limit: Limit = None,
    test: Annotated[int, typer.Option("--test", min=0, help="Images that neurons are masked and replaced on")] = 128,
    draws: Annotated[int, typer.Option("--draws", min=2, help="Random choices of neurons to compare with")] = 5,
    suite: Annotated[
        str | None, typer.Option("--suite", help="Also attack anew, by this suite, what is left without the neurons")
    ] = None,
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    defence: Defence = None,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
) -> None:
    """Show which neurons an attack moves, whether they carry the wrong prediction, and what the model looks at."""
    from rempart.report.schema import ExplainSpec

    if not 0 < share <= 1:
        raise SpecError("a share in (0, 1]", got=share)
    _run(
        ExplainSpec(
            models=tuple(model),
            reading=_reading(box, classes, outputs),
            data=data,
            image=image,
            label=label,
            defences=_defences(defence),
            threat=threat,
            attacks=_attacks(attack or ["pgd"]),
            suite=suite,
            layers=tuple(layers or ()),
            share=share,
            limit=limit,
            test=test,
            draws=draws,
            batch_size=batch_size,
            seed=seed,
            out=out,
        )
    )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Annotated[str | None, typer.Option("--data", help="Images to check it on; noise without")] = None,
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Look at a model before an audit: input, classes, layers, normalisation, outputs, gradients, one prediction."""
    from rempart.inspection import described, inspect_model

    found = inspect_model(model, _reading(box, classes, outputs), data)
    _say(found.model_dump_json(indent=1) if as_json else described(found))


@app.command()
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `rempart explain` on this model")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the pruned model")],
    share: Annotated[float, typer.Option("--share", help="Of a layer's neurons to take out, in (0, 1)")] = 0.1,
    choose: Annotated[
        Literal["sensitive", "least", "random"], typer.Option("--choose", help="Which neurons to take out")
    ] = "sensitive",
    layers: Annotated[
        list[str] | None, typer.Option("--layers", help="Layer of the run or pattern; default: all of them")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Take neurons out of a model by their sensitivity: their weights become 0. `rempart audit` says what is left."""
    from rempart.explain import doubts, prune_model

    found = prune_model(str(model), run, out, share=share, choose=choose, layers=layers or (), seed=seed)
    for layer, neurons in found.items():
        _say(f"{layer}: {len(neurons)} neurons taken out")
    for doubt in doubts(run):
        _say(f"\n{doubt}")
    print(f"\nAudit it on other images than those of {run}, which chose these neurons.\n\n{out}")


detect = typer.Typer(
    name="detect",
    help="Notice attacked images: fit detectors, set their thresholds, judge them, score images.",
    no_args_is_help=True,
)
app.add_typer(detect)

Detectors = Annotated[
    list[str], typer.Option("--detector", help="NAME or NAME:key=value,key=value; see `rempart list detectors`")
]
Attacks = Annotated[
    list[str] | None, typer.Option("--attack", help="NAME or NAME:key=value,key=value; default fgsm, pgd and deepfool")
]
Fpr = Annotated[float, typer.Option("--fpr", help="Share of clean images that may be flagged, in (0, 1)")]
FitLimit = Annotated[int | None, typer.Option("--fit-limit", min=1, help="Fit on the first N images only")]


@detect.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Data,
    threat: ThreatText,
    detector: Detectors,
    out: Annotated[str, typer.Option("--out", help="Run folder: report, scores, and the detectors, calibrated")],
    attack: Attacks = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", help="A further budget of the threat, such as 8/255; repeatable")
    ] = None,
    fpr: Fpr = 0.05,
    fit_limit: FitLimit = None,
    limit: Limit = None,
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    defence: Defence = None,
    adaptive: Annotated[bool, typer.Option(help="Also attack by an attacker who knows the detector")] = True,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of that attacker, for each class aimed at")] = 100,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
) -> None:
    """Fit detectors on the train split, set thresholds on a part of the test split, and judge them on the rest."""
    from rempart.report.schema import DetectSpec

    if not 0 < fpr < 1:
        raise SpecError("--fpr in (0, 1)", got=fpr, hint="write 0.05 for 5 %")
    _run(
        DetectSpec(
            model=model,
            reading=_reading(box, classes, outputs),
            data=data,
            defences=_defences(defence),
            detectors=_detectors(detector),
            attacks=_attacks(attack),
            threat=threat,
            budgets=tuple(map(_budget, budget or ())),
            fpr=fpr,
            fit_limit=fit_limit,
            limit=limit,
            adaptive=adaptive,
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            out=out,
        )
    )


@detect.command()
def score(
    detector: Annotated[Path, typer.Argument(help="Folder of a fitted detector")],
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="CSV file: number, score, threshold and verdict of each image")],
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    defence: Defence = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
) -> None:
    """Score images with a fitted detector; larger = more suspicious, and flagged above its threshold."""
    from rempart.detect.run import score_data

    read: Any = {"reading": _reading(box, classes, outputs), "defences": _defences(defence)}
    scored, flagged = score_data(detector, model, data, out, **read, limit=limit, batch_size=batch_size)
    print(f"{flagged} of {scored} images flagged\n\n{out}")


guard = typer.Typer(
    name="guard",
    help="A model, defences and a calibrated detector as one folder that classifies images or rejects them.",
    no_args_is_help=True,
)
app.add_typer(guard)


@guard.command()
def make(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    detector: Annotated[
        Path, typer.Option("--detector", help="Folder of a calibrated detector, fitted on the model and its defences")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder for the guard; models and detectors are copied")],
    namer: Annotated[
        Path | None, typer.Option("--namer", help="Folder of a detector that names attacks, such as attack-type")
    ] = None,
    box: Box = "0:1",
    classes: Classes = None,
    outputs: Outputs = None,
    defence: Defence = None,
) -> None:
    """Put a model behind defences and under a detector, and keep all of it in one folder."""
    from rempart.guard import guard as make_guard
    from rempart.guard import save_guard

    guarded = make_guard(model, _defences(defence), detector, namer, _reading(box, classes, outputs))
    save_guard(guarded, out)
    card = guarded.detector.card
    assert card.threshold is not None  # `guard` refuses a detector without one
    limit = f"{card.detector} rejects above {card.threshold.value:.4g}"
    print(f"{limit}, set for {card.threshold.fpr:g} false alarms on {card.threshold.n} clean images\n\n{out}")


@guard.command()
def predict(
    folder: Annotated[Path, typer.Argument(metavar="GUARD", help="Folder that `rempart guard make` wrote")],
    out: Annotated[Path, typer.Option("--out", help="CSV file: class, confidence, verdict and score of each image")],
    images: Annotated[list[Path] | None, typer.Argument(metavar="IMAGE", help="Image files")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data in place of image files")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="python:package.module:factory, where the guard's model needs it")
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
) -> None:
    """Classify images, and reject those that the detector flags."""
    from rempart.guard import predict_data

    given: Any = {"data": data, "images": images or (), "model": model, "limit": limit, "batch_size": batch_size}
    found = predict_data(folder, out, **given)
    told = f"{found.rejected} of {found.accepted + found.rejected} images rejected"
    for name, n, right in (
        ("accepted", found.accepted, found.right_accepted),
        ("rejected", found.rejected, found.right_rejected),
    ):
        told += f"\n{right / n:.1%} of the {n} {name} have the right class" if n and right is not None else ""
    _say(f"{told}\n\n{out}")


Folder = Annotated[Path, typer.Option("--folder", help="Data directory of the service; nothing is kept elsewhere")]
Database = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="REMPART_DATABASE",
        show_envvar=True,
        help="postgresql://USER:PASSWORD@HOST/NAME for the table of jobs; without, a file in the data directory",
    ),
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Jobs a worker runs at once")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds an attempt of a job may take")]
Memory = Annotated[float, typer.Option("--memory", min=0.25, help="GiB of memory a job may use")]
DEPLOYMENT = Path("rempart-data")


@app.command()
def serve(
    host: Annotated[str, typer.Option("--host", help="Interface to listen on; others than loopback need a token")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for a free one")] = 8000,
    folder: Folder = DEPLOYMENT,
    database: Database = None,
    jobs: Jobs = 1,
    timeout: Timeout = 21600,
    memory: Memory = 4,
    upload: Annotated[float, typer.Option("--upload", min=0.001, help="GiB of one upload")] = 2,
    worker: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Also run jobs, not only answer requests")
    ] = True,
    secure: Annotated[
        bool, typer.Option("--secure", help="The service is reached by HTTPS alone, through a proxy: cookies too")
    ] = False,
) -> None:
    """Serve the API and the web interface, with a worker for jobs. No other server is needed."""
    with _extra_serve():
        from rempart.serve.run import serve as run_service
        from rempart.serve.settings import GIB, Settings
    settings = Settings(
        folder=folder,
        database=database,
        jobs=jobs,
        timeout=timeout,
        memory=int(memory * GIB),
        upload=int(upload * GIB),
        secure=secure,
    )
    run_service(settings, host, port, worker=worker, say=lambda line: print(line, flush=True))


@app.command()
def worker(
    folder: Folder = DEPLOYMENT,
    database: Database = None,
    jobs: Jobs = 1,
    timeout: Timeout = 21600,
    memory: Memory = 4,
) -> None:
    """Run jobs of a service, until told to stop: any number of workers on machines that share its data directory."""
    with _extra_serve():
        from rempart.serve.settings import GIB, Settings, prepared
        from rempart.serve.worker import work
    settings = Settings(folder=folder, database=database, jobs=jobs, timeout=timeout, memory=int(memory * GIB))
    work(prepared(settings), ready=lambda: print("a worker takes jobs", flush=True))


token = typer.Typer(name="token", help="Who may use a service, by tokens.", no_args_is_help=True)
app.add_typer(token)


@token.command(name="add")
def token_add(
    name: Annotated[str, typer.Argument(help="Whose it is")],
    role: Annotated[
        Literal["read", "run", "admin"],
        typer.Option("--role", help="read: look; run: also bring data and start jobs; admin: also delete"),
    ],
    folder: Folder = DEPLOYMENT,
) -> None:
    """Make a token and print it, this one time. From then on the service asks for one."""
    print(_tokens(folder).add(name, role))


@token.command(name="list")
def token_list(folder: Folder = DEPLOYMENT) -> None:
    """List who has a token."""
    for known in _tokens(folder).all():
        print(f"{known.name}\t{known.role}\t{known.created}")


@token.command(name="remove")
def token_remove(name: Annotated[str, typer.Argument(help="Whose it is")], folder: Folder = DEPLOYMENT) -> None:
    """Take a token back, at once."""
    _tokens(folder).remove(name)


def _tokens(folder: Path) -> "Tokens":
    with _extra_serve():
        from rempart.serve.auth import Tokens
        from rempart.serve.settings import Settings, prepared
    return Tokens.of(prepared(Settings(folder=folder)).folder)


@contextmanager
def _extra_serve() -> "Generator[None]":
    """Name the extra where a package of it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("rempart"):
            raise
        raise SpecError(f"the package {error.name}", got="none", hint="pip install 'rempart[serve]'") from None


def _reading(box: str, classes: str | None, outputs: Literal["logits", "probabilities"] | None) -> "Reading":
    from rempart.report.schema import Reading

    names = tuple(name.strip() for name in classes.split(",")) if classes else ()
    return Reading(box=box, classes=names, outputs=outputs)


def _defences(texts: list[str] | None) -> "tuple[DefenceChoice, ...]":
    from rempart.report.schema import DefenceChoice

    return tuple(DefenceChoice(name=name, options=options) for name, options in map(_named, texts or []))


def _detectors(texts: list[str]) -> "tuple[DetectorChoice, ...]":
    from rempart.report.schema import DetectorChoice

    return tuple(DetectorChoice(name=name, options=options) for name, options in map(_named, texts))


def _budget(text: str) -> float:
    """Read what stands behind the norm in --threat."""
    from rempart.core.numbers import read_number

    found = read_number(text)
    if isinstance(found, str) or not 0 < found < float("inf"):
        raise SpecError("--budget in pixel units, such as 8/255 or 0.03", got=repr(text))
    return found


def _window(text: str) -> tuple[float, float]:
    from rempart.core.numbers import read_number

    low, _, high = (read_number(part) if part != ":" else ":" for part in text.partition(":"))
    if isinstance(low, str) or isinstance(high, str) or not low < high:
        raise SpecError("--window as LOW:HIGH in pixel values, LOW < HIGH", got=repr(text), hint="for example 0.2:0.7")
    return low, high


def _attacks(texts: list[str] | None) -> "tuple[AttackChoice, ...]":
    from rempart.report.schema import AttackChoice

    named = texts or ["fgsm", "pgd", "deepfool"]
    return tuple(AttackChoice(name=name, options=options) for name, options in map(_named, named))


@app.command()
def gate(
    report: Annotated[Path, typer.Argument(help="report.json or its run folder")],
    min_robust: Annotated[
        float, typer.Option("--min-robust", min=0, max=1, help="Least worst-case accuracy, in [0, 1]")
    ],
) -> None:
    """Exit with status 1 unless the worst-case accuracy is surely high enough (lower end of its interval)."""
    from rempart.report import compare as comparing
    from rempart.report import store

    passed, reason = comparing.gate(store.read(report), min_robust)
    _say(("passed: " if passed else "failed: ") + reason)
    raise typer.Exit(0 if passed else 1)


@app.command(name="report")
def report_(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of `rempart audit`, or its report.json")],
    out: Annotated[Path, typer.Option("--out", help="FILE.html, or FILE.pdf with the extra pdf")],
) -> None:
    """Write the appendix of evidence of an audit: the same report in the order in which a reviewer asks."""
    from rempart.report.evidence import write_evidence

    print(write_evidence(run, out))


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="attacks, suites, detectors, models, recipes, preprocessors or data")],
) -> None:
    """List what can be named on the command line, with options, defaults and bounds."""
    from rempart import listing

    print(listing.describe(what))


@app.command()
def demo(out: Annotated[Path, typer.Option("--out", help="Folder for the runs")] = Path("runs/demo")) -> None:
    """Train, attack, harden and compare on the embedded digits, in about a minute."""
    from rempart.demo import demo as play
    from rempart.terminal import progress

    with progress() as notify:
        page = play(out, notify, say=lambda line: print(line, flush=True))
    print(page)


def main() -> NoReturn:
    """Run the command line; a wrong request exits with 2, a failed run with 3, an interrupted one with 130."""
    from rempart.core import foreign

    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, foreign.stop)
    try:
        status = app(standalone_mode=False)
    except RempartError as error:
        _fail(str(error), error.exit_code)
    except SystemExit as error:  # no command exits by itself: this is foreign code,
        if isinstance(error.__context__, BrokenPipeError):  # or whoever read our output has seen enough
            sys.exit(1)
        _fail(str(foreign.ending("the command to run to its end", error)), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:  # noqa: BLE001  the edge of the program
        show = getattr(error, "show", None)  # a usage error of click, whichever copy of it Typer brings
        if show is None:
            traceback.print_exc()
            _fail(f"failed unexpectedly: {type(error).__name__}: {error}; please report it with the lines above", 3)
        show()
        sys.exit(2)
    sys.exit(status or 0)


def _run(spec: Any) -> None:
    from rempart import tasks
    from rempart.report import text
    from rempart.terminal import progress

    with progress() as notify:
        report: Report | None = tasks.run(spec, _heeding(notify))
    if report is None:
        return  # one of several processes; the first writes the report
    _say(text.table(report))
    if spec.out is not None:
        out = Path(spec.out)
        print(f"\n{out.with_suffix('.html') if out.suffix == '.npz' else out / 'report.html'}")
    if not report.complete:
        raise typer.Exit(130)


def _heeding(notify: "Notify") -> "Notify":
    """Stop at the next event, should the exception of Ctrl-C have been lost in somebody's callback."""
    from rempart.core.foreign import STOPPED

    def told(event: "Event") -> None:
        if STOPPED.is_set():
            raise KeyboardInterrupt
        notify(event)

    return told


def _named(text: str) -> tuple[str, dict[str, Any]]:
    """Read NAME or NAME:key=value,key=value."""
    name, _, own = text.partition(":")
    return name, _options(own.split(",") if own else None)


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """Read key=value pairs; the values stay strings until the schema they belong to reads them."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not (equals and key and value):
            raise SpecError("options as key=value", got=repr(pair), hint="for example -o steps=40")
        options[key.strip()] = value.strip()
    return options


def _say(told: str) -> None:
    print(_harmless(told))


def _harmless(told: str) -> str:
    """Without characters that command a terminal: names out of files may hold them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in told)


def _fail(message: str, status: int) -> NoReturn:
    print(_harmless(f"rempart: {message}"), file=sys.stderr)
    sys.exit(status)
