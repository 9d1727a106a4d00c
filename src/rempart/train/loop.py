"""The training loop on Lightning Fabric: set up, fit an epoch, validate, keep."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from rempart.attacks.gradient import pgd
from rempart.attacks.recognition import look, recognised
from rempart.core.errors import DataError, SpecError, TrainError
from rempart.core.events import Notify, silent
from rempart.core.foreign import contained
from rempart.core.model import Classifier, frozen, metered, placed
from rempart.core.ranks import ALONE, Ranks
from rempart.core.repro import Draws, own_random_state, reseed, seeded
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.data.samples import spread
from rempart.objectives.catalogue import Loss, boxed
from rempart.report.schema import Epoch
from rempart.train.augment import augment
from rempart.train.checkpoint import State, restore, snapshot
from rempart.train.config import Recipe
from rempart.train.processes import added_up, connected, share_statistics, together
from rempart.train.setup import Run, setup

Keep = Callable[[tuple[Epoch, ...], State], None]
"""Called with all epochs finished so far, while the classifier holds the weights measured after the last of them."""

_LOOKED_AT = 512  # images from which it is decided what a network returns, beside its last operations
_SHOWN = 8
_PAUSE = 0.4  # seconds between two events
_RISE = 0.2  # share of a onecycle schedule in which the learning rate grows
_STEPS = 10  # of the PGD that measures progress
_LEARNT = 0.25  # of the way from guessing to no error: from there on, a fall back to guessing is a collapse


@contained("the network, and what trains it, to run", SpecError)
def train(
    learn: Data,
    validation: Data | None,
    classifier: Classifier,
    recipe: Recipe,
    *,
    seed: int = 0,
    resume: tuple[Sequence[Epoch], State] | None = None,
    device: str | None = None,
    ranks: Ranks = ALONE,
    keep: Keep = lambda epochs, state: None,
    notify: Notify = silent,
) -> tuple[Epoch, ...]:
    """Train a classifier in place, and measure it on the validation images after every epoch.

    Order, augmentation and attacks depend on (seed, sample, epoch) alone; what layers such as dropout draw depends on
    (seed, epoch). So a training that is resumed repeats the same losses. The global random state is left as it was.

    Several processes share each batch and add up their gradients; batch norms see their own part of it, and their
    running statistics are averaged after each epoch. Every process measures all validation images.

    Args:
        learn: Images to learn from; they are read once.
        validation: Images to measure on: accuracy, and accuracy under PGD with 10 steps where the recipe says what to
            withstand. Without them the accuracy is that on the training images as they were learnt.
        classifier: Handed back on the CPU in inference mode, also after an error: then with the weights of an epoch
            begun. With `ema`, it ends with the running mean.
        recipe: Objective, optimiser and schedule.
        seed: Seed of every random draw.
        resume: Epochs finished before, and the state that `keep` was given after the last of them.
        device: cpu or cuda. Default: the best there is.
        ranks: This process among those that train together.
        keep: Called after each finished epoch, to save it, and after a resume with the epochs that were finished, as
            they may not have been saved whole; in the first process only.
        notify: Receives loss and accuracy so far, about twice a second.

    Returns:
        One record per epoch, those before the resume included. Fewer than the recipe asks for where `collapsed`.

    Raises:
        DataError: If the data do not fit the classifier.
        SpecError: If the objective cannot be shared by several processes.
        TrainError: If the loss is not finite, or the model does no better than guessing: at the end, or after it did
            once, or if it does worse.
        Cancelled: If `notify` raises it.
    """
    for data in (learn, validation):
        _refuse_others(data, classifier)
    learn, validation = learn.load(), None if validation is None else validation.load()
    if classifier.output is None:
        settle_outputs(classifier, learn, seed=seed)
    epochs = list(resume[0]) if resume else []
    with ExitStack() as stack:
        stack.enter_context(_handed_back(classifier))
        stack.enter_context(own_random_state([torch.device("cuda", k) for k in range(torch.cuda.device_count())]))
        stack.enter_context(connected(ranks, device))
        run = setup(classifier, recipe, seed=seed, samples=len(learn), device=device, ranks=ranks, notify=notify)
        if resume:
            restore(run, resume[1])
            with _averaged(run):
                if ranks.number == 0:
                    keep(tuple(epochs), resume[1])
            if validation is not None:
                _check_learned(epochs, validation.labels, last=len(epochs) == recipe.epochs)
        while len(epochs) < recipe.epochs and not collapsed(recipe, epochs):
            number, begun = len(epochs) + 1, time.perf_counter()
            epoch = fit(run, learn, number, epochs[-1] if epochs else None)
            state = snapshot(run)
            with _averaged(run):
                if validation is not None:
                    epoch = validate(run, validation, epoch)
                epochs.append(epoch.model_copy(update={"seconds": time.perf_counter() - begun}))
                if ranks.number == 0:
                    keep(tuple(epochs), state)
            if validation is not None:
                _check_learned(epochs, validation.labels, last=number == recipe.epochs)
        _settle(run)
    return tuple(epochs)


def settle_outputs(classifier: Classifier, learn: Data, *, seed: int) -> str | None:
    """Decide whether a network returns logits before a loss is taken of them; return a note where it does not.

    What was decided stays in the classifier, and is saved with it.

    Raises:
        DataError: If the data do not fit the classifier.
        ModelError: If nobody said what it returns and it cannot be told.
    """
    _refuse_others(learn, classifier)
    some = learn.spread(_LOOKED_AT)
    x = placed(classifier, some.batch(spread(len(some))[:_SHOWN]).x)
    with frozen(classifier), seeded(seed, torch.device("cpu")):
        read, message = recognised(classifier, x, look(classifier, some))
    classifier.output = read.output or "logits"
    return None if read is classifier else message.replace("attacks see logits", "the loss is taken of logits")


def _refuse_others(data: Data | None, classifier: Classifier) -> None:
    if data is not None and (tuple(data.shape) != classifier.shape or data.num_classes != classifier.num_classes):
        raise DataError(
            f"images of shape {classifier.shape} in {classifier.num_classes} classes",
            got=f"{tuple(data.shape)} in {data.num_classes}",
            hint="the data must be of the kind that the model takes",
        )


def fit(run: Run, data: Data, epoch: int, last: Epoch | None = None) -> Epoch:
    """Train for one epoch; `last` is the one before it, as far as progress is told."""
    recipe, objective = run.recipe, run.objective
    draws = Draws(run.seed, data.index, ("train", str(epoch)))
    reseed((run.seed * 1_000_003 + epoch) * 1009 + run.ranks.number)
    order = draws.at("order").uniform(torch.empty(run.samples, 1, dtype=torch.float64)).flatten().argsort(stable=True)
    batches = order.tensor_split(math.ceil(run.samples / recipe.batch_size))
    before, seen, heard = (epoch - 1) * run.samples, 0, time.monotonic()
    total: dict[str, Tensor] = {}
    run.classifier.train()
    with metered(run.classifier) as meter:
        if objective.before_epoch is not None:
            with run.fabric.autocast():
                objective.before_epoch(run.classifier, data, rng=draws.at("before"), epoch=epoch)
        for number, positions in enumerate(batches):
            progress = (epoch - 1 + number / len(batches)) / recipe.epochs
            for group in run.optimiser.param_groups:
                group["lr"] = recipe.learning_rate * schedule(recipe, progress)
            parts = _step(run, data, positions, draws, progress)
            for _ in range(objective.repeats - 1):
                parts = _step(run, data, positions, draws, progress)
            if recipe.ema:
                _follow(run, (epoch - 1) * len(batches) + number)
            for name, part in parts.items():
                total[name] = total.get(name, 0) + part * len(positions)
            seen += len(positions)
            due = run.ranks.number == 0 and time.monotonic() - heard > _PAUSE  # one process stops the others
            if due or seen == run.samples:
                heard = time.monotonic()
                mean = _finite(total["loss"] / seen, epoch)
                values = {"loss": mean, "accuracy": float(total["accuracy"] / seen)}
                run.tell(before + seen, f"epoch {epoch}, training", values, last)
    share_statistics(run)
    queries, gradients = added_up(run, meter)
    means = {name: float(part) / run.samples for name, part in total.items()}
    loss, accuracy = means.pop("loss"), means.pop("accuracy")
    return Epoch(
        epoch=epoch,
        loss=loss,
        accuracy=accuracy,
        seconds=0,
        learning_rate=run.optimiser.param_groups[0]["lr"],
        queries=queries,
        gradients=gradients,
        parts=means,
    )


def _step(run: Run, data: Data, positions: Tensor, draws: Draws, progress: float) -> dict[str, Tensor]:
    """One step of the optimiser on one batch; returns the loss and its parts, averaged over all of it."""
    recipe, objective, device = run.recipe, run.objective, run.fabric.device
    own = positions.tensor_split(run.ranks.world)[run.ranks.number]
    parts: dict[str, Tensor] = {}
    run.optimiser.zero_grad()
    for chunk in own.tensor_split(min(recipe.accumulate, max(1, len(own)))):
        batch, rng = data.batch(chunk), draws.select(chunk)
        x, y = (tensor.to(device, non_blocking=True) for tensor in (batch.x, batch.y))  # no step waits for the last
        x = augment(x, flip=recipe.flip, shift=recipe.shift, rng=rng, black=run.classifier.low)
        with run.fabric.autocast():
            loss: Loss = objective(run.classifier, x, y, rng=rng, progress=progress)
        share = len(chunk) / len(positions)
        run.fabric.backward(loss.value if share == 1 else loss.value * share)
        for name, part in {"loss": loss.value, **loss.parts}.items():
            parts[name] = parts.get(name, 0) + part.detach() * share
    if run.ranks.world > 1:
        parts = together(run, parts)
    if recipe.clip is not None:
        run.fabric.clip_gradients(run.classifier, run.optimiser, max_norm=recipe.clip, error_if_nonfinite=False)
    run.optimiser.step()
    if objective.after_step is not None:
        objective.after_step(run.classifier, parts)
    return parts


def validate(run: Run, data: Data, epoch: Epoch) -> Epoch:
    """Measure the model on images it does not learn from, as they are and under a short PGD; return the epoch with it.

    The attack starts from the same points after each epoch, so that epochs differ by the weights alone.
    """
    recipe, heard = run.recipe, time.monotonic()
    threat = recipe.measured(run.objective)
    right: list[Tensor] = []
    standing: list[Tensor] = []
    with frozen(run.classifier), run.fabric.autocast():
        for batch in data.batches(recipe.batch_size):
            x, y = batch.x.to(run.fabric.device), batch.y.to(run.fabric.device)
            with torch.no_grad():
                correct = run.classifier(x).argmax(1) == y
            if threat is not None:
                standing.append((correct & _withstands(run, x, y, threat, Draws(run.seed, batch.index))).cpu())
            right.append(correct.cpu())
            done = sum(map(len, right)) == len(data)
            if time.monotonic() - heard > _PAUSE or done:
                heard = time.monotonic()
                epoch = epoch.model_copy(update=_measured(right, standing, data.labels))
                run.tell(epoch.epoch * run.samples, f"epoch {epoch.epoch}, validation", {"loss": epoch.loss}, epoch)
    return epoch


def _measured(right: Sequence[Tensor], standing: Sequence[Tensor], labels: Tensor) -> dict[str, float | None]:
    """Accuracies over the images measured so far."""
    hit = torch.cat([*right]).double()
    y = labels[: len(hit)]
    return {
        "accuracy": float(hit.mean()),
        "balanced_accuracy": float(torch.stack([hit[y == k].mean() for k in y.unique()]).mean()),
        "robust_accuracy": float(torch.cat([*standing]).double().mean()) if standing else None,
    }


def _withstands(run: Run, x: Tensor, y: Tensor, threat: Threat, rng: Draws) -> Tensor:
    x_adv = pgd(run.classifier, x, y, boxed(threat, run.classifier), steps=_STEPS, rng=rng.at("validate"))
    with torch.no_grad():
        return run.classifier(x_adv).argmax(1) == y


def best(epochs: Sequence[Epoch]) -> Epoch:
    """The epoch to keep: of the highest accuracy under attack, without one of the highest accuracy; the last such."""
    return max(reversed(epochs), key=lambda e: e.accuracy if e.robust_accuracy is None else e.robust_accuracy)


def collapsed(recipe: Recipe, epochs: Sequence[Epoch]) -> bool:
    """Whether the accuracy under attack lies further below its best than the recipe allows."""
    robust = [e.robust_accuracy for e in epochs if e.robust_accuracy is not None]
    return recipe.collapse is not None and bool(robust) and robust[-1] < max(robust) - recipe.collapse


def schedule(recipe: Recipe, progress: float) -> float:
    """Learning rate as a share of the largest, at `progress` in [0, 1] of the training."""
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return recipe.factor ** sum(progress >= milestone for milestone in recipe.milestones)
    rise = _RISE if recipe.schedule == "onecycle" else 0.0
    if progress < rise:
        return 0.04 + 0.96 * progress / rise
    return 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / (1 - rise))


@torch.no_grad()
def _follow(run: Run, step: int) -> None:
    """Move the running mean of the weights; it forgets faster at first, when there is little to remember."""
    decay = min(run.recipe.ema, (1 + step) / (10 + step))
    for name, parameter in run.learnt():
        run.averaged[name].lerp_(parameter, 1 - decay)


@contextmanager
def _averaged(run: Run) -> Generator[None]:
    """The running mean in the place of the weights, where there is one."""
    own = {name: parameter.detach().clone() for name, parameter in run.learnt()} if run.averaged else {}
    _settle(run)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in run.learnt():
                if name in own:
                    parameter.copy_(own[name])


@torch.no_grad()
def _settle(run: Run) -> None:
    """Write the running mean over the weights, where there is one."""
    for name, parameter in run.learnt():
        if name in run.averaged:
            parameter.copy_(run.averaged[name])


# ---- when to stop


def _finite(loss: Tensor, epoch: int) -> float:
    if not bool(loss.isfinite()):
        raise TrainError("a finite loss", got=f"{float(loss)} in epoch {epoch}", hint="try a smaller learning_rate")
    return float(loss)


def _check_learned(epochs: Sequence[Epoch], labels: Tensor, *, last: bool) -> None:
    """Refuse a model whose mean recall lies within two standard errors of guessing: that of one constant answer.

    Not before the last epoch, unless it knew better before; and at any time one that is surely worse than guessing,
    by three standard errors of a guess that is as likely in each class, however few images a class has.
    """
    counts = labels.unique(return_counts=True)[1].tolist()
    classes = len(counts)
    if classes == 1:
        return
    chance = 1 / classes
    error = math.sqrt(chance * (1 - chance) / len(labels))
    worst_error = chance * math.sqrt(chance * (1 - chance) * sum(1 / count for count in counts))
    recalls = [e.balanced_accuracy for e in epochs if e.balanced_accuracy is not None]
    came = f"{recalls[-1]:.3f} after epoch {len(epochs)}"
    if recalls[-1] < chance - 3 * worst_error:
        raise TrainError(
            f"a mean recall of {chance:.3f} or more, which is guessing among {classes} classes",
            got=f"{came}: the model has learnt to answer wrong",
            hint="try a smaller weight of the penalty, or a longer warmup",
        )
    learnt = max(recalls) > chance + _LEARNT * (1 - chance)
    if (last or learnt) and recalls[-1] <= chance + 2 * error:
        raise TrainError(
            f"a mean recall above {chance + 2 * error:.3f}, which is guessing among {classes} classes",
            got=f"{came}, where it was {max(recalls):.3f} before" if learnt else came,
            hint="try a smaller learning_rate, a smaller threat or more epochs",
        )


@contextmanager
def _handed_back(classifier: Classifier) -> Generator[None, None, None]:
    try:
        yield
    finally:
        classifier.to("cpu").to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        classifier.eval()
