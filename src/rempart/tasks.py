"""`run(spec, notify)`: the one entry for the command line and for a worker."""

import dataclasses
import io
import math
import shutil
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from rempart.attacks import attack_data, attacks
from rempart.attacks.losses import score
from rempart.attacks.plan import Planned, averaged, mean_gradient
from rempart.attacks.preflight import is_random, preflight
from rempart.attacks.result import measure, per_image
from rempart.attacks.run import allowed, native, targets
from rempart.attacks.suites import suite
from rempart.audit import Audit, audit
from rempart.certify import (
    Attacked,
    Certificates,
    Sampling,
    attack_smoothed,
    bracketed,
    certified_curve,
    certify_groups,
    covering,
    join,
    section,
)
from rempart.core.disk import replace
from rempart.core.errors import Cancelled, DataError, RempartError, SpecError
from rempart.core.events import Notify, silent
from rempart.core.foreign import contained
from rempart.core.model import Classifier, class_number, frozen, placed
from rempart.core.ranks import ALONE, Ranks, launched, ranks
from rempart.core.repro import environment, seeded
from rempart.core.stats import Rate, wilson
from rempart.core.threat import Norm
from rempart.data import ADVERSARIAL, TRUE, Data, one_image, open_data, with_patients
from rempart.detect.evaluate import alone
from rempart.detect.run import crafts, judged, labelled, means, parts, sets
from rempart.detectors import detectors
from rempart.detectors import save as save_detector
from rempart.detectors.fitted import CARD, STATE
from rempart.explain import Subject, explain, layers_of, trend
from rempart.explain.contribution import run_once
from rempart.models.load import card, load
from rempart.models.save import CONFIG, WEIGHTS
from rempart.preprocess import defended, described
from rempart.report.groups import by_group, group_columns
from rempart.report.html import page
from rempart.report.schema import (
    AnySpec,
    AttackSpec,
    AuditSpec,
    Bracket,
    CertifySpec,
    Check,
    DataCard,
    DefenceChoice,
    Detection,
    DetectSpec,
    ExplainSpec,
    ModelCard,
    Reading,
    Report,
    Samples,
    TrainSpec,
    pack,
)
from rempart.report.store import claim, write

SPEC = "spec.json"
DETECTORS = "detectors"


@contained("networks, attacks and other code of the request to run", SpecError)
@torch.inference_mode(mode=False)  # models are loaded with weights that gradients can flow through
def run(spec: AnySpec, notify: Notify = silent) -> Report | None:
    """Do what a spec asks for, write its files to `spec.out`, and return the report.

    Where several processes share an audit or a training, all but the first return None.

    Raises:
        RempartError: With the exit status of the command line in `exit_code`.
    """
    if isinstance(spec, TrainSpec):
        return _train(spec, notify)
    if isinstance(spec, AuditSpec):
        return _audit(spec, notify)
    with seeded(spec.seed, torch.device("cpu")):  # for models that draw random numbers
        if isinstance(spec, CertifySpec):
            return _certify(spec, notify)
        if isinstance(spec, ExplainSpec):
            return _explain(spec, notify)
        return _detect(spec, notify) if isinstance(spec, DetectSpec) else _attack(spec, notify)


def _opened(spec: AuditSpec | AttackSpec | CertifySpec | DetectSpec) -> tuple[Classifier, ModelCard]:
    """The model of a request behind its defences, and the card of both."""
    return _behind(spec.model, spec.reading, spec.defences)


def _behind(model: str, reading: Reading, defences: Sequence[DefenceChoice]) -> tuple[Classifier, ModelCard]:
    chain = [(defence.name, defence.options) for defence in defences]
    told = described(chain)  # a wrong option is told before the model is loaded
    classifier = defended(load(model, reading), chain)
    return classifier, card(classifier, model, told)


def _data(spec: AuditSpec | AttackSpec, model: Classifier) -> Data:
    """The samples of a request in the box of the model, with their patients."""
    data = open_data(spec.data)
    data = data if spec.patients is None else with_patients(data, Path(spec.patients))
    return data.head(spec.limit).seen_by(model)


def _unmasked(data: Data) -> Data:
    if data.mask is not None:
        raise DataError("data without masks", got=data.source, hint="audit and attack keep to them, nothing else does")
    return data


def _train(spec: TrainSpec, notify: Notify) -> Report | None:
    from rempart.train import (  # loads Lightning Fabric, which an audit does not need
        load_recipe,
        refuse_alone,
        run_training,
    )

    if spec.devices == 1 and launched() is None:
        return run_training(spec, notify)
    refuse_alone(load_recipe(spec.recipe, spec.options))  # before other processes start
    with _processes(spec, Path(spec.out)) as here:
        return run_training(spec, notify if here.number == 0 else silent, ranks=here)


def _audit(spec: AuditSpec, notify: Notify) -> Report | None:
    if spec.out is None:
        if spec.devices > 1:
            raise SpecError("--out beside --devices", got="none", hint="the processes meet in the run folder")
        return _share(spec, None, ALONE, notify)
    folder, place = Path(spec.out), launched()
    if place is None or place[0] == 0:
        _claim(folder, spec.kind)
    with _processes(spec, folder) as here:
        return _share(spec, folder, here, notify if here.number == 0 else silent)


def _claim(folder: Path, kind: str) -> None:
    """Claim a run folder, but none with a trained model, whose report would be set aside for another."""
    if all((folder / name).exists() for name in (CONFIG, WEIGHTS)):
        came = f"{folder}, which holds a trained model"
        raise SpecError("a run folder of its own", got=came, hint="choose another --out")
    claim(folder, kind)


def _clear(folder: Path) -> None:
    """Remove the detectors of an earlier run, so that those of two runs are never mixed; nothing else goes."""
    for card_file in folder.glob(f"*/{CARD}"):
        for name in (STATE, CARD):
            (card_file.parent / name).unlink(missing_ok=True)
        if not any(card_file.parent.iterdir()):
            card_file.parent.rmdir()


@contextmanager
def _processes(spec: AuditSpec | TrainSpec, folder: Path) -> Generator[Ranks]:
    """The processes that work on a spec together; those not started yet find it in the run folder."""
    place = launched()
    if place is None or place[0] == 0:
        replace(folder / SPEC, spec.model_dump_json(indent=1).encode())
    with ranks(spec.devices, [sys.executable, "-m", "rempart", "run", str(folder / SPEC)]) as here:
        yield here


def _share(spec: AuditSpec, folder: Path | None, here: Ranks, notify: Notify) -> Report | None:
    """This process's part of an audit; the first process gathers the others' and writes the report."""
    model, told = _opened(spec)
    if spec.device == "cuda":
        if not torch.cuda.is_available():
            raise SpecError("a GPU that torch can use", got="none", hint="leave out --device cuda")
        torch.backends.cudnn.allow_tf32 = False  # its rounding, 1e-3, would count as a model that depends on the batch
        model = model.to(f"cuda:{here.local % torch.cuda.device_count()}")
    data = _data(spec, model)
    pieces = None if folder is None else folder / "pieces"
    result = audit(model, data, spec, card=told, folder=pieces, ranks=here, notify=notify)
    if result is None:
        return None
    if folder is not None:
        save_arrays(folder / "samples.npz", _per_sample(result, data))
        write(result.report, folder)  # last: who finds the report can rely on the table
        if result.report.complete:
            shutil.rmtree(folder / "pieces", ignore_errors=True)
    if result.error is not None:
        raise result.error
    return result.report


def _attack(spec: AttackSpec, notify: Notify) -> Report:
    started = perf_counter()
    if not spec.out.endswith(".npz"):
        raise SpecError("--out to name a .npz file", got=repr(spec.out), hint="for example --out adversarial.npz")
    _claim(Path(spec.out).parent, spec.kind)
    model, told = _opened(spec)
    data = _data(spec, model)
    threat = data.threat(spec.threat, model.low, model.high)
    entry = attacks[spec.attack.name]
    options = entry.parse(spec.attack.options)
    native(entry, threat, options)
    if "loss" in options:
        score(options["loss"], targeted=spec.target is not None, num_classes=model.num_classes)
    model, checks = preflight(model, data)
    random = is_random(checks)
    mean = mean_gradient(entry.name, spec.attack.options) if random else {}
    planned = Planned(entry.name, entry.name, {**options, **mean})
    outcome = attack_data(
        model,
        data,
        threat,
        planned.name,
        planned.options,
        batch_size=spec.batch_size,
        target=targets(spec.target, model) if spec.target is not None else None,
        seed=spec.seed,
        eight_bit=spec.eight_bit,
        similarity=True,
        random=random,
        notify=notify,
    )
    rounded = None if outcome.right_after_rounding is None else outcome.right_after_rounding.numpy()
    arrays = {"index": data.index.numpy(), ADVERSARIAL: outcome.x_adv.numpy(), TRUE: data.labels.numpy()}
    save_arrays(Path(spec.out), {**arrays, **per_image(outcome), **group_columns(data)})
    correct = int(outcome.correct.sum())
    report = Report(
        kind="attack",
        complete=True,
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=perf_counter() - started,
        environment=environment(),
        model=told,
        data=DataCard.of(data),
        notes=averaged([entry.name] if mean else []),
        preflight=checks,
        clean=wilson(correct, len(data)),
        attacks=(measure(planned, threat, outcome, outcome.right.numpy(), rounded=rounded),),
        samples=Samples(
            index=tuple(data.index.tolist()),
            labels=tuple(data.labels.tolist()),
            clean=pack(outcome.correct),
            right={planned.label: pack(outcome.right)},
        ),
        groups=by_group([data], outcome.correct.numpy(), outcome.right.numpy()),
    )
    replace(Path(spec.out).with_suffix(".json"), report.model_dump_json(indent=1).encode())
    replace(Path(spec.out).with_suffix(".html"), page(report).encode())
    return report


def _certify(spec: CertifySpec, notify: Notify) -> Report:
    started = perf_counter()
    sampling = Sampling(
        sigma=spec.sigma,
        samples=spec.samples,
        selection=spec.selection,
        alpha=spec.alpha,
        batch_size=spec.batch_size,
        seed=spec.seed,
    )
    entry = attacks[spec.attack.name]
    options = entry.parse(spec.attack.options)
    if spec.out is not None:
        _claim(Path(spec.out), spec.kind)
    model, told = _opened(spec)
    data = _unmasked(open_data(spec.data)).head(spec.limit).seen_by(model)
    threat = None if spec.threat is None else data.threat(spec.threat, model.low, model.high)
    if threat is not None:
        native(entry, threat, options)
        allowed(entry, model)
        covering(threat, 1)
        if "loss" in options:
            score(options["loss"], targeted=False, num_classes=model.num_classes)
    model, checks = preflight(model, data)
    parts: list[Certificates] = []
    attacked: Attacked | None = None
    complete = False
    error: Exception | None = None
    try:
        for part in certify_groups(model, data, sampling, notify=notify):
            parts.append(part)
        if threat is not None:
            table, draws = join(parts), spec.attack_draws
            attacked = attack_smoothed(
                model, data, table, threat, entry.name, options, sampling, draws=draws, notify=notify
            )
        complete = True
    except (KeyboardInterrupt, Cancelled):
        pass  # the report says what is missing
    except Exception as failure:  # noqa: BLE001  raised again once what was finished is safe
        error = failure
    table = join(parts) if parts else None
    bracket, curves = None, ()
    dims = math.prod(model.shape)
    if threat is not None and attacked is not None and table is not None:
        bracket = bracketed(table, attacked, threat, entry.name, options, draws=spec.attack_draws, dims=dims)
    if table is not None:
        budgets: dict[Norm, float | None] = {"l2": None} if threat is None else {"l2": None, threat.norm: threat.eps}
        curves = tuple(certified_curve(table, sampling, norm, dims=dims, extra=eps) for norm, eps in budgets.items())
    missing = [] if table is not None and len(table.index) == len(data) else ["certificates of the other images"]
    missing += [entry.name] if threat is not None else []
    report = Report(
        kind="certify",
        complete=complete,
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=perf_counter() - started,
        environment=environment(),
        model=told,
        data=DataCard.of(data),
        notes=() if error is None else (f"The certification failed: {type(error).__name__}: {error}",),
        preflight=checks,
        clean=None if table is None else wilson(int(table.correct.sum()), len(table.index)),
        certificate=None if table is None else section(table, sampling, bracket),
        not_run=() if complete else tuple(missing),
        curves=curves,
        samples=None if table is None else _certified_samples(table, bracket, attacked),
    )
    if spec.out is not None:
        write(report, Path(spec.out))
        if table is not None:
            columns = {"index": table.index, "label": table.label, "correct": table.correct}
            columns |= {"predicted": table.predicted, "radius": table.radius}
            columns |= {"p_lower": table.p_lower, "votes": table.votes}
            if attacked is not None:
                columns |= {f"{entry.name}/predicted": attacked.predicted, f"{entry.name}/broken": attacked.broken}
            save_arrays(Path(spec.out) / "samples.npz", {name: column.numpy() for name, column in columns.items()})
    if error is not None:
        raise error
    return report


def _explain(spec: ExplainSpec, notify: Notify) -> Report:
    """Measure and test the neurons of models; the report holds the values of all of them."""
    started, out = perf_counter(), Path(spec.out)
    models: dict[str, Subject] = {}
    for name in spec.models:
        model, told = _behind(name, spec.reading, spec.defences)
        label = told.name if told.name not in models else f"{told.name} {len(models) + 1}"
        models[label] = Subject(model, told)
        run_once(model, torch.full((1, *model.shape), (model.low + model.high) / 2), layers_of(model, spec.layers))
    subject = next(iter(models.values()))
    first, about = subject.model, subject.card
    if other := [name for name, s in models.items() if (s.model.low, s.model.high) != (first.low, first.high)]:
        raise SpecError(f"models for pixels in [{first.low}, {first.high}]", got=other[0], hint="explain it alone")
    for name, s in models.items():
        own = s.model.class_names
        if own != first.class_names and sorted(own) == sorted(first.class_names):
            came = f"{', '.join(own)} in {name}"
            hint = "explain it alone: the labels of the images are numbered as the outputs of the first model"
            raise SpecError(
                f"models with their classes in the order {', '.join(first.class_names)}", got=came, hint=hint
            )
    picture = _pictured(spec, first)
    if spec.data is not None:
        data = _unmasked(open_data(spec.data, split="test")).head(spec.limit).seen_by(first)
    elif picture is not None:
        data = picture
    else:
        raise SpecError("--data or --image", got="neither")
    threat = data.threat(spec.threat, first.low, first.high)
    if spec.suite is not None:
        suite(spec.suite, threat, first.num_classes)
    for choice in spec.attacks:
        entry = attacks[choice.name]
        native(entry, threat, entry.parse(choice.options))
    checks: list[Check] = []
    for label, subject in models.items():
        mended, told = preflight(subject.model, data)
        about_it = f", {label}" if len(models) > 1 else ""
        checks += [check.model_copy(update={"name": f"{check.name}{about_it}"}) for check in told]
        models[label] = Subject(mended, subject.card, told)
    _claim(out, spec.kind)
    found = explain(models, data, threat, spec, picture=picture, notify=notify)
    report = Report(
        kind="explain",
        complete=not found.not_run,
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=perf_counter() - started,
        environment=environment(),
        model=about,
        data=DataCard.of(data),
        preflight=tuple(checks),
        clean=found.explained[0].clean if found.explained else None,
        explained=found.explained,
        trend=trend(found.explained),
        illustration=found.illustration,
        not_run=found.not_run,
    )
    write(report, out)
    return report


def _pictured(spec: ExplainSpec, model: Classifier) -> Data | None:
    """The image of a request in the box of the model, with its true class, or with the one the model gives it."""
    if spec.image is None:
        if spec.label is not None:
            raise SpecError("--label beside --image", got=f"{spec.label} alone")
        return None
    names = model.class_names
    one = one_image(spec.image, shape=model.shape, label=0, class_names=names).seen_by(model)
    with frozen(model), torch.no_grad():
        seen = int(model(placed(model, one.batch(torch.arange(1)).x)).argmax())
    label = seen if spec.label is None else class_number(spec.label, names)
    if label is None:
        raise SpecError(f"--label as one of {', '.join(names)}", got=spec.label)
    if spec.data is None and label != seen:
        hint = "an attack has nothing to change in it; leave out --label, or measure on --data"
        raise DataError(f"an image that the model takes for {names[label]}", got=names[seen], hint=hint)
    return dataclasses.replace(one, labels=torch.tensor([label]))


def _detect(spec: DetectSpec, notify: Notify) -> Report:
    """Fit, calibrate and judge detectors; what was finished stays, also where the work is stopped."""
    started, out = perf_counter(), Path(spec.out)
    for choice in spec.detectors:
        detectors[choice.name].parse(choice.options)
    model, about = _opened(spec)
    splits = (_unmasked(open_data(spec.data, split=name)) for name in ("train", "test"))
    train, test = (data.seen_by(model) for data in splits)
    threat = test.threat(spec.threat, model.low, model.high)
    crafts(spec, threat)
    _claim(out, spec.kind)
    _clear(out / DETECTORS)
    learn, calibration, judge = parts(train, test, spec)
    model, checks = preflight(model, judge)
    random = is_random(checks)
    found: list[Detection] = []
    table: dict[str, np.ndarray] = {}
    clean: Rate | None = None
    without: Rate | None = None
    complete = False
    failed: dict[str, Exception] = {}
    try:
        on = sets(model, learn, calibration, judge, spec, threat, random=random, notify=notify)
        clean, without = wilson(len(on.test.x), on.n), alone(on.test, on.n, threat)
        table = {"index": on.test.index.numpy(), "label": on.test.y.numpy()}
        for label, choice in labelled(spec).items():
            try:
                fitted, detection, scores = judged(label, choice, model, on, spec, threat, notify=notify)
            except Cancelled:
                raise
            except (RempartError, RuntimeError, ValueError) as failure:
                failed[label] = failure
                continue
            fitted = dataclasses.replace(fitted, card=fitted.card.of(about.identity))  # as loaded, not as repaired
            save_detector(fitted, out / DETECTORS / detection.label.replace(" ", "-"))
            columns = {"clean": scores.clean, "noisy": scores.noisy}
            for attack, (at, values) in scores.attacked.items():
                columns |= {f"{attack}/position": at, f"{attack}/score": values}
            table |= {f"{detection.label}/{name}": column.numpy() for name, column in columns.items()}
            found.append(detection)
        complete = not failed
    except (KeyboardInterrupt, Cancelled):
        pass  # the report says what is missing
    told = tuple(f"{label} failed: {type(error).__name__}: {error}" for label, error in failed.items())
    report = Report(
        kind="detect",
        complete=complete,
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=perf_counter() - started,
        environment=environment(),
        model=about,
        data=DataCard.of(judge),
        notes=(*means(spec, random=random), *told),
        preflight=checks,
        clean=clean,
        worst_case=without,
        detection=tuple(found),
        not_run=tuple(label for label in labelled(spec) if label not in {detection.label for detection in found}),
    )
    save_arrays(out / "samples.npz", table)
    write(report, out)
    for error in failed.values():
        raise error
    return report


def _certified_samples(table: Certificates, bracket: Bracket | None, attacked: Attacked | None) -> Samples:
    """Per sample: right by vote, certified for the threat, and not broken by the attack."""
    right = {"smoothed": pack(table.right)}
    if bracket is not None and attacked is not None:
        right |= {"certified": pack(table.certified(bracket.radius)), bracket.attack: pack(~attacked.broken)}
    index, labels = tuple(table.index.tolist()), tuple(table.label.tolist())
    return Samples(index=index, labels=labels, clean=pack(table.correct), right=right)


def _per_sample(result: Audit, data: Data) -> dict[str, np.ndarray]:
    """The table of an audit: one row per sample, or per sample an attack was given, as its own index says."""
    samples = result.report.samples
    if samples is None:
        return {}
    table = {"index": np.array(samples.index), "label": np.array(samples.labels)}
    if tuple(data.index.tolist()) == samples.index:
        table |= group_columns(data)
    for label, verdict in result.verdicts.items():
        columns = {"index": verdict.index.numpy(), **per_image(verdict)}
        table |= {f"{label}/{name}": column for name, column in columns.items()}
    return table


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a compressed .npz under a temporary name, then rename it."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # pyright: ignore[reportArgumentType]
    replace(path, stream.getvalue())
