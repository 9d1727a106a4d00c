"""From a request to a trained model on disk and a report."""

import time
from datetime import UTC, datetime

import torch

from rempart.core.data import Data, open_data
from rempart.core.errors import Cancelled, DataError
from rempart.core.events import Notify, silent
from rempart.core.repro import environment
from rempart.core.stats import wilson
from rempart.models import build, card, load, save
from rempart.report.schema import DataCard, Epoch, Report, TrainSpec
from rempart.train.config import load_recipe
from rempart.train.loop import train


def run_training(spec: TrainSpec, notify: Notify = silent) -> Report:
    """Train a model on the train split, save it after every epoch, and report its accuracy on the test split.

    An interruption (Ctrl-C, or `Cancelled` from `notify`) ends the training with the last finished epoch, marked
    incomplete; before the first epoch is finished, it is passed on.

    Raises:
        SpecError: If data, model, recipe or an option is wrong; before anything runs.
        TrainError: If the training fails; the epochs finished by then are kept.
    """
    started = time.perf_counter()
    recipe = load_recipe(spec.recipe, spec.options)
    train_data, test_data = _splits(spec.data)
    mean, std = channel_moments(train_data)
    classifier = build(
        spec.model,
        shape=train_data.shape,
        num_classes=train_data.num_classes,
        options=spec.model_options,
        class_names=train_data.class_names,
        mean=mean,
        std=std,
        seed=spec.seed,
    )
    record = {"data": train_data.source, "digest": train_data.digest, "seed": spec.seed, "recipe": recipe.model_dump()}
    epochs: list[Epoch] = []

    def keep(finished: tuple[Epoch, ...]) -> None:
        save(
            classifier,
            spec.out,
            name=spec.model,
            options=spec.model_options,
            training={**record, "epochs": [epoch.model_dump() for epoch in finished]},
        )
        epochs[:] = finished

    try:
        train(train_data, test_data, classifier, recipe, seed=spec.seed, keep=keep, notify=notify)
    except (KeyboardInterrupt, Cancelled):
        if not epochs:
            raise
    left = recipe.epochs - len(epochs)
    return Report(
        kind="train",
        complete=not left,
        spec=spec,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.perf_counter() - started,
        environment=environment(),
        model=card(load(spec.out), spec.out),
        data=DataCard.of(test_data),
        clean=wilson(round(epochs[-1].accuracy * len(test_data)), len(test_data)),
        not_run=(f"the last {left} of {recipe.epochs} epochs",) if left else (),
        epochs=tuple(epochs),
    )


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


def _splits(source: str) -> tuple[Data, Data]:
    """The train split and the test split, in memory.

    Raises:
        DataError: If both are the same one.
    """
    train_data, test_data = open_data(source, split="train"), open_data(source, split="test")
    if train_data.split == test_data.split:
        raise DataError(
            "data with a train and a test split",
            got=f"{source}, where both are {train_data.split}",
            hint="name no split in the spec, and sort the images into train/CLASS and test/CLASS",
        )
    return train_data.load(), test_data.load()
