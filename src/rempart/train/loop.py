"""The training loop on Lightning Fabric: set up, fit an epoch, validate, keep."""

import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rempart.core.data import Data
from rempart.core.errors import DataError, TrainError
from rempart.core.events import Event, Notify, silent
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.report.schema import Epoch
from rempart.train.augment import augment
from rempart.train.config import Recipe

Keep = Callable[[tuple[Epoch, ...]], None]
"""Called after each finished epoch with all epochs so far, while the classifier holds the weights of the last one."""

_PAUSE = 0.4  # seconds between two events
_MOMENTUM = 0.9
_RISE = 0.2  # share of a onecycle schedule in which the learning rate grows


def train(
    train_data: Data,
    test_data: Data,
    classifier: Classifier,
    recipe: Recipe,
    *,
    seed: int = 0,
    keep: Keep = lambda epochs: None,
    notify: Notify = silent,
) -> tuple[Epoch, ...]:
    """Train a classifier in place, and measure its clean accuracy on the test data after every epoch.

    Order, augmentation and attacks depend on (seed, sample, epoch) alone; what layers such as dropout draw depends on
    the seed. The global random state is left as it was. Nothing is chosen by the test data: the last epoch counts.

    Args:
        train_data: Images to learn from; they are read once.
        test_data: Images to measure on.
        classifier: Trained on the best device there is, and handed back on the CPU in inference mode, also after an
            error: then with the weights of an epoch begun.
        recipe: Objective, optimiser and schedule.
        seed: Seed of every random draw.
        keep: Called after each finished epoch, to save it.
        notify: Receives loss and accuracy so far, about twice a second.

    Returns:
        One record per epoch.

    Raises:
        DataError: If the data do not fit the classifier.
        TrainError: If the loss is not finite, or the model is no better than chance at the end.
        Cancelled: If `notify` raises it.
    """
    for data in (train_data, test_data):
        if tuple(data.shape) != classifier.shape or data.num_classes != classifier.num_classes:
            raise DataError(
                f"images of shape {classifier.shape} in {classifier.num_classes} classes",
                got=f"{tuple(data.shape)} in {data.num_classes}",
                hint="train and test data must be of one kind",
            )
    learn, test = train_data.load(), test_data.load()
    epochs: list[Epoch] = []
    recalls = torch.empty(0)
    with _handed_back(classifier), _seeded(seed):
        run = setup(classifier, recipe, seed=seed, samples=len(learn), notify=notify)
        for number in range(1, recipe.epochs + 1):
            begun = time.perf_counter()
            loss = fit(run, learn, number)
            right = validate(run, test, number)
            seconds = time.perf_counter() - begun
            epochs.append(
                Epoch(
                    epoch=number,
                    loss=loss,
                    accuracy=float(right.double().mean()),
                    seconds=seconds,
                    learning_rate=run.optimiser.param_groups[0]["lr"],
                )
            )
            keep(tuple(epochs))
            recalls = _recalls(right, test.labels)
    _check_learned(recalls, len(test))
    return tuple(epochs)


@dataclass(frozen=True, slots=True)
class Run:
    """What the parts of the loop share. `model` is the classifier as Fabric wraps it."""

    fabric: Fabric
    classifier: Classifier
    model: nn.Module
    optimiser: Optimizer
    recipe: Recipe
    seed: int
    samples: int
    notify: Notify

    def tell(self, done: int, note: str, loss: float, accuracy: float) -> None:
        """Send one event; `done` counts training images over all epochs."""
        values = {"loss": loss, "accuracy": accuracy}
        self.notify(Event(stage="train", done=done, total=self.samples * self.recipe.epochs, values=values, note=note))


def setup(classifier: Classifier, recipe: Recipe, *, seed: int, samples: int, notify: Notify) -> Run:
    """Choose the device, make the optimiser, and wrap both for it."""
    fabric = Fabric(devices=1)
    if len(classifier.shape) == 3:
        classifier.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (1.6 times faster on a CPU)
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimiser == "sgd":
        plain = SGD(parameters, rate, momentum=_MOMENTUM, nesterov=True, weight_decay=decay)
    else:
        plain = AdamW(parameters, rate, weight_decay=decay)
    model, optimiser = fabric.setup(classifier, plain)
    return Run(fabric, classifier, model, cast(Optimizer, optimiser), recipe, seed, samples, notify)


def fit(run: Run, data: Data, epoch: int) -> float:
    """Train for one epoch; return the mean loss."""
    recipe, objective = run.recipe, run.recipe.build_objective()
    draws = Draws(run.seed, data.index, ("train", str(epoch)))
    order = draws.at("order").uniform(torch.empty(run.samples, 1, dtype=torch.float64)).flatten().argsort(stable=True)
    batches = order.tensor_split(math.ceil(run.samples / recipe.batch_size))
    before, seen, heard = (epoch - 1) * run.samples, 0, time.monotonic()
    loss_sum = hit_sum = torch.zeros((), device=run.fabric.device)
    run.model.train()
    for number, positions in enumerate(batches):
        batch, rng = data.batch(positions), draws.select(positions)
        x = augment(batch.x.to(run.fabric.device), flip=recipe.flip, shift=recipe.shift, rng=rng)
        y = batch.y.to(run.fabric.device)
        for group in run.optimiser.param_groups:
            group["lr"] = recipe.learning_rate * schedule(recipe, (epoch - 1 + number / len(batches)) / recipe.epochs)
        loss = objective(run.model, x, y, rng=rng)
        run.optimiser.zero_grad()
        run.fabric.backward(loss.value)
        run.optimiser.step()
        seen += len(positions)
        loss_sum = loss_sum + loss.value.detach() * len(positions)
        hit_sum = hit_sum + loss.parts["accuracy"] * len(positions)
        if time.monotonic() - heard > _PAUSE or seen == run.samples:
            heard = time.monotonic()
            mean = _finite(loss_sum / seen, epoch)
            run.tell(before + seen, f"epoch {epoch}, training", mean, float(hit_sum / seen))
    return float(loss_sum / run.samples)


@torch.no_grad()
def validate(run: Run, data: Data, epoch: int) -> Tensor:
    """Say for each test image whether the model is right, on the CPU."""
    right: list[Tensor] = []
    loss_sum, seen, heard = 0.0, 0, time.monotonic()
    with frozen(run.classifier):
        for batch in data.batches(run.recipe.batch_size):
            z = run.model(batch.x.to(run.fabric.device)).cpu()
            loss_sum += float(nn.functional.cross_entropy(z, batch.y, reduction="sum"))
            right.append(z.argmax(1) == batch.y)
            seen += len(batch.y)
            if time.monotonic() - heard > _PAUSE or seen == len(data):
                heard = time.monotonic()
                accuracy = float(torch.cat(right).double().mean())
                run.tell(epoch * run.samples, f"epoch {epoch}, test", loss_sum / seen, accuracy)
    return torch.cat(right)


def schedule(recipe: Recipe, progress: float) -> float:
    """Learning rate as a share of the largest, at `progress` in [0, 1] of the training."""
    if recipe.schedule == "constant":
        return 1.0
    rise = _RISE if recipe.schedule == "onecycle" else 0.0
    if progress < rise:
        return 0.04 + 0.96 * progress / rise
    return 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / (1 - rise))


def _finite(loss: Tensor, epoch: int) -> float:
    if not bool(loss.isfinite()):
        raise TrainError("a finite loss", got=f"{float(loss)} in epoch {epoch}", hint="try a smaller learning_rate")
    return float(loss)


def _recalls(right: Tensor, y: Tensor) -> Tensor:
    """Share right in each class that occurs."""
    return torch.stack([right[y == k].double().mean() for k in y.unique()])


def _check_learned(recalls: Tensor, n: int) -> None:
    """Refuse a model whose mean recall lies within two standard errors of guessing: that of one constant answer."""
    chance = 1 / len(recalls)
    limit = chance + 2 * math.sqrt(chance * (1 - chance) / n)
    if len(recalls) > 1 and float(recalls.mean()) <= limit:
        raise TrainError(
            f"a mean recall above {limit:.3f}, which is guessing among {len(recalls)} classes",
            got=f"{float(recalls.mean()):.3f} after the last epoch",
            hint="try a smaller learning_rate, a smaller threat or more epochs",
        )


@contextmanager
def _handed_back(classifier: Classifier) -> Generator[None, None, None]:
    try:
        yield
    finally:
        classifier.to("cpu").to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        classifier.eval()


@contextmanager
def _seeded(seed: int) -> Generator[None, None, None]:
    """Seed the global random state, which dropout draws from, and put it back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
