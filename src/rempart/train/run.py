"""From a request to a trained model on disk and a report."""

import json
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch

from rempart.core.errors import Cancelled, DataError, SpecError, TrainError
from rempart.core.events import Notify, silent
from rempart.core.identity import code_of
from rempart.core.model import Classifier, frozen, placed
from rempart.core.names import Numbers, Undecoded
from rempart.core.ranks import ALONE, Ranks
from rempart.core.repro import Draws, environment
from rempart.core.stats import Rate, wilson
from rempart.data import Data, open_data, refuse_shared_patients, with_patients
from rempart.models import build, card, load, save
from rempart.models.load import architecture
from rempart.models.save import CONFIG, UNCHANGED, plain
from rempart.objectives.catalogue import objectives
from rempart.report.schema import AS_IT_IS, DataCard, Epoch, Report, Training, TrainSpec
from rempart.report.store import JSON, claim, read, write
from rempart.train import checkpoint
from rempart.train.checkpoint import State
from rempart.train.config import Recipe, load_recipe
from rempart.train.log import MLFLOW_RUN, open_logs, write_csv
from rempart.train.loop import best, collapsed, settle_outputs, train
from rempart.train.setup import uses_gpu

LAST = "last"
CHECKPOINT = "checkpoint.safetensors"
LOG = "log.csv"
_ASIDE = {"resume", "overwrite", "out", "device", "devices", "log"}  # change nothing in what is learnt


def run_training(spec: TrainSpec, notify: Notify = silent, *, ranks: Ranks = ALONE) -> Report | None:
    """Train a model on the train split, and report the accuracy of the epoch kept on the test split.

    Up to a tenth of the training images are set aside to choose that epoch by. Written to `spec.out`, each file whole
    or not at all: the model of the best epoch; that of the last one in `last`; `checkpoint.safetensors`, which a run
    with `resume` goes on from and which goes away at the end; `log.csv`; and the report.

    An interruption (Ctrl-C, or `Cancelled` from `notify`) ends the training with the last finished epoch, marked
    incomplete; before the first epoch is finished, it is passed on. After an error too, what was finished is reported.

    Args:
        spec: The request.
        notify: Receives progress.
        ranks: This process among those that train together; all but the first return None.

    Raises:
        SpecError: If data, model, recipe or an option is wrong, or `out` holds a model already; before anything runs.
        TrainError: If the training fails or its files cannot be written; the epochs finished by then are kept.
    """
    started, out = time.perf_counter(), Path(spec.out)
    recipe = load_recipe(spec.recipe, spec.options)
    train_data, test_data = _splits(spec.data, spec.patients)
    learn, validation = set_aside(train_data, recipe.validation_images)
    classifier, name, options, box = _network(spec, learn)
    learn, test_data = (data.seen_by(classifier) for data in (learn, test_data))
    validation = None if validation is None else validation.seen_by(classifier)
    plain(classifier)  # what cannot be saved is refused before it is trained
    code = code_of([classifier, objectives[recipe.objective].function])
    request = _request(spec, recipe, learn, code)
    if (finished := _finished(spec, recipe, test_data, code_of([classifier]))) is not None:
        return finished
    read_as_logits = settle_outputs(classifier, learn, seed=spec.seed)
    resume = _resumed(spec, request)
    if ranks.number == 0:
        claim(out, spec.kind)
        if resume is None:
            (out / MLFLOW_RUN).unlink(missing_ok=True)
    logs = open_logs(spec.log, out, spec.model_dump(exclude=_ASIDE)) if ranks.number == 0 else []
    if ranks.number == 0 and resume is None:
        (out / CHECKPOINT).unlink(missing_ok=True)
    record = {"data": learn.source, "digest": learn.digest, "seed": spec.seed, "recipe": recipe.model_dump()}
    epochs: list[Epoch] = list(resume[0]) if resume else []

    def keep(done: tuple[Epoch, ...], state: State) -> None:
        history = {**record, "epochs": [epoch.model_dump() for epoch in done]}
        new = done[len(epochs) :]
        try:
            if new:  # not after a resume, which goes on from this very checkpoint
                checkpoint.write(out / CHECKPOINT, done, state, request)
            if best(done) is done[-1]:
                save(classifier, out, name=name, options=options, box=box, training=history)
            save(classifier, out / LAST, name=name, options=options, box=box, training=history)
            write_csv(out / LOG, done)
        except OSError as error:
            hint = "the last checkpoint is whole: make room, and run the same command with --resume"
            raise TrainError(
                f"to write epoch {len(done)} to {out}", got=error.strerror or str(error), hint=hint
            ) from None
        epochs[:] = done
        for epoch in new:
            for log in logs:
                log(epoch)

    error: Exception | None = None
    try:
        train(
            learn,
            validation,
            classifier,
            recipe,
            seed=spec.seed,
            resume=resume,
            device=spec.device,
            ranks=ranks,
            keep=keep,
            notify=notify,
        )
    except (KeyboardInterrupt, Cancelled):
        if not epochs:
            raise
    except Exception as failure:  # noqa: BLE001  raised again once what was finished is reported
        error = failure
    if ranks.number:
        if error is not None:
            raise error
        return None
    if not epochs:
        assert error is not None
        raise error
    seconds = time.perf_counter() - started
    report = _report(spec, recipe, learn, validation, test_data, epochs, error, seconds, read_as_logits)
    try:
        write(report, out)
    except OSError:
        if error is None:
            raise
    if report.complete:
        (out / CHECKPOINT).unlink(missing_ok=True)
    if error is not None:
        raise error
    return report


def set_aside(data: Data, images: int) -> tuple[Data, Data | None]:
    """Part training images into those to learn from and up to `images` to choose the epoch by: a tenth at most.

    The same ones for every seed, so that trainings compare. None where there are too few. Where patients are known,
    whole patients are set aside, as many as fit in; None where none does.
    """
    count = min(images, len(data) // 10)
    if count == 0:
        return data, None
    order = Draws(0, data.index, ("validation",)).uniform(torch.empty(len(data), 1, dtype=torch.float64)).flatten()
    chosen = torch.zeros(len(data), dtype=torch.bool)
    drawn = order.argsort(stable=True)
    if data.patients is None:
        chosen[drawn[:count]] = True
    else:
        sizes = Counter(data.patients)
        aside: set[str] = set()
        for patient in dict.fromkeys(data.patients[k] for k in drawn.tolist()):
            if sum(sizes[p] for p in aside) + sizes[patient] <= count:
                aside.add(patient)
        chosen = torch.tensor([patient in aside for patient in data.patients])
        if not aside:
            return data, None
    return data.take((~chosen).nonzero().flatten()), data.take(chosen.nonzero().flatten())


def channel_moments(data: Data) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all images; a constant channel counts as of deviation 1."""
    count, total, square = 0, torch.zeros(data.shape[0]).double(), torch.zeros(data.shape[0]).double()
    for batch in data.batches(256):
        pixels = batch.x.double().transpose(0, 1).flatten(1)
        count += pixels.shape[1]
        total += pixels.sum(1)
        square += pixels.square().sum(1)
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    return mean.tolist(), torch.where(std > 1e-4, std, 1.0).tolist()


def _splits(source: str, patients: str | None) -> tuple[Data, Data]:
    """The train split and the test split, in memory.

    Raises:
        DataError: If both are the same one, there is only one class to learn, or a patient lies in both.
    """
    train_data, test_data = open_data(source, split="train"), open_data(source, split="test")
    if patients is not None:
        train_data, test_data = (with_patients(data, Path(patients)) for data in (train_data, test_data))
    if train_data.split == test_data.split:
        raise DataError(
            "data with a train and a test split",
            got=f"{source}, where both are {train_data.split}",
            hint="name no split in the spec, and sort the images into train/CLASS and test/CLASS",
        )
    present = train_data.labels.unique().tolist()
    if len(present) < 2:
        raise DataError(
            "training images of two classes or more",
            got=f"{len(train_data)} of class {train_data.class_names[present[0]]} alone",
            hint="where images lie sorted by class, take a slice such as [::10] instead of the first ones",
        )
    refuse_shared_patients(train_data, test_data)
    return train_data.load(), test_data.load()


def _network(spec: TrainSpec, learn: Data) -> tuple[Classifier, str, dict[str, object], str]:
    """The classifier to train, with the name and options it was built from, and what its network takes for images."""
    if (spec.model is None) == (spec.start is None):
        came = "both" if spec.model else "neither"
        raise SpecError("--model to train from scratch, or --from to train a model further", got=came)
    if spec.start is not None:
        if spec.model_options:
            raise SpecError("no --model-option beside --from", got=", ".join(spec.model_options))
        name, options, box = architecture(spec.start)
        if spec.reading.box != UNCHANGED != box:
            hint = "leave out --box: the folder says it"
            raise SpecError(f"images in [0, 1] for --from {spec.start}", got=f"{box} in the folder", hint=hint)
        classifier = load(spec.start, spec.reading)
        if isinstance(classifier.class_names, Numbers) and learn.num_classes == classifier.num_classes:
            classifier.class_names = learn.class_names  # of those it learns now
        return classifier, name, options, spec.reading.box if box == UNCHANGED else box
    assert spec.model is not None
    if spec.reading != AS_IT_IS:
        raise SpecError("--box, --classes and --outputs beside --from", got=f"--model {spec.model}")
    if isinstance(learn.class_names, Undecoded):
        hint = "zip the folder again with names in UTF-8, or use the folder itself"
        raise DataError("class names in UTF-8", got=f"another encoding, such as {learn.class_names[0]}", hint=hint)
    mean, std = channel_moments(learn)
    classifier = build(
        spec.model,
        shape=learn.shape,
        num_classes=learn.num_classes,
        options=spec.model_options,
        class_names=learn.class_names,
        mean=mean,
        std=std,
        seed=spec.seed,
    )
    return classifier, spec.model, dict(spec.model_options), UNCHANGED


def _request(spec: TrainSpec, recipe: Recipe, learn: Data, code: str) -> str:
    """All that a training depends on: the spec, its recipe and the user's code as they are today, and the images."""
    settings = recipe.model_dump(mode="json")
    own = settings.pop("options")
    asked = {**settings, **own, **spec.model_dump(mode="json", exclude=_ASIDE)}
    return json.dumps({**asked, "images": learn.digest, "code": code})


def _finished(spec: TrainSpec, recipe: Recipe, test: Data, code: str) -> Report | None:
    """The report of this very training, where it is to be resumed and came to its end before."""
    if not spec.resume or not (Path(spec.out) / JSON).exists():
        return None
    report = read(spec.out)
    same = (
        isinstance(report.spec, TrainSpec)
        and report.spec.model_dump_json(exclude=_ASIDE) == spec.model_dump_json(exclude=_ASIDE)
        and report.training is not None
        and report.training.recipe == recipe.model_dump(mode="json")
        and report.data.digest == test.digest
        and report.model.code in ("", code)  # earlier versions do not record it
    )
    return report if same and report.complete else None


def _resumed(spec: TrainSpec, request: str) -> tuple[list[Epoch], State] | None:
    """What to go on from, if anything; refuses to write over a model that was not asked to give way."""
    path = Path(spec.out) / CHECKPOINT
    if spec.resume and path.exists():
        epochs, state, of = checkpoint.read(path)
        if json.loads(request) != json.loads(request) | json.loads(of):  # an earlier version may say less
            raise SpecError(
                f"the same request as that of the checkpoint in {spec.out}",
                got=_difference(of, request),
                hint="repeat it as it was, or choose another --out",
            )
        return epochs, state
    if not spec.overwrite and spec.resume and (Path(spec.out) / JSON).exists():
        before = read(spec.out).spec.model_dump_json(exclude=_ASIDE)
        differing = _difference(before, spec.model_dump_json(exclude=_ASIDE))
        got = differing or "another recipe file, other images or other source code"
        hint = f"that training is complete: train its model further with --from {spec.out}, or choose another --out"
        raise SpecError(f"the same request as that of the training in {spec.out}", got=got, hint=hint)
    if not spec.overwrite and (path.exists() or (Path(spec.out) / CONFIG).exists()):
        held = "an unfinished training" if path.exists() else "a trained model"
        other = "--resume to go on with it" if path.exists() else "another --out"
        hint = f"choose {other}, or --overwrite to begin anew"
        raise SpecError("an --out without a model in it", got=f"{spec.out}, which holds {held}", hint=hint)
    return None


def _difference(before: str, now: str) -> str:
    """The keys in which two requests differ, with both values."""
    old, new = json.loads(before), json.loads(now)
    differing = [key for key in new if new[key] != old.get(key)]
    named = (f"{key}={new[key]!r} instead of {old.get(key)!r}" for key in differing if key != "code")
    changed = ("other source code of the network or the objective",) if "code" in differing and "code" in old else ()
    return ", ".join((*named, *changed))


def _report(
    spec: TrainSpec,
    recipe: Recipe,
    learn: Data,
    validation: Data | None,
    test: Data,
    epochs: list[Epoch],
    error: Exception | None,
    seconds: float,
    read_as_logits: str | None,
) -> Report:
    model = load(_source(spec))
    if uses_gpu(spec.device):
        model.to("cuda")
    stopped = collapsed(recipe, epochs)
    left = recipe.epochs - len(epochs)
    kept = best(epochs)
    notes: list[str] = [] if read_as_logits is None else [read_as_logits]
    if stopped and kept.robust_accuracy is not None and epochs[-1].robust_accuracy is not None:
        notes.append(
            f"Stopped after epoch {len(epochs)}: the accuracy under attack on the validation images fell from "
            f"{kept.robust_accuracy:.1%} to {epochs[-1].robust_accuracy:.1%}, as it does when a model overfits to a "
            f"weak attack. The model kept is that of epoch {kept.epoch}."
        )
    clean, chance = _accuracy(model, test, recipe.batch_size), 1 / model.num_classes
    if clean.low <= chance:
        notes.append(
            f"On the test images the model is not surely better than guessing among {model.num_classes} classes "
            f"({chance:.1%}). Whether it learnt anything is open: look at the course of the loss."
        )
    if error is not None:
        notes.append(f"The training failed in epoch {len(epochs) + 1}: {type(error).__name__}: {error}")
    missing = f"the last {left} of {recipe.epochs} epochs"
    return Report(
        kind="train",
        complete=error is None and (not left or stopped),
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=seconds,
        environment=environment(),
        model=card(model, spec.out),
        data=DataCard.of(test),
        notes=tuple(notes),
        clean=clean,
        not_run=(missing,) if left else (),
        epochs=tuple(epochs),
        training=Training(
            recipe=recipe.model_dump(mode="json"),
            objective=recipe.objective,
            best_epoch=kept.epoch,
            train_images=len(learn),
            validation_images=0 if validation is None else len(validation),
            queries=sum(epoch.queries for epoch in epochs),
            gradients=sum(epoch.gradients for epoch in epochs),
            seconds=sum(epoch.seconds for epoch in epochs),
        ),
    )


def _source(spec: TrainSpec) -> str:
    """The trained model, as `load` takes it."""
    code = spec.start is not None and spec.start.startswith("python:")
    return f"{str(spec.start).partition('@')[0]}@{spec.out}" if code else spec.out


def _accuracy(model: Classifier, data: Data, batch_size: int) -> Rate:
    with frozen(model), torch.no_grad():
        right = sum(
            int((model(placed(model, batch.x)).argmax(1).cpu() == batch.y).sum()) for batch in data.batches(batch_size)
        )
    return wilson(right, len(data))
