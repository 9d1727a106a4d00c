"""Where the figures of each epoch go: a CSV file always, TensorBoard and MLflow where they are asked for."""

import csv
import importlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rempart.core.disk import replace
from rempart.core.errors import SpecError
from rempart.report.schema import Epoch

Log = Callable[[Epoch], None]
MLFLOW_RUN = "mlflow-run"


def figures(epoch: Epoch) -> dict[str, float]:
    """The figures of an epoch by name; those that were not measured are left out."""
    values = {**epoch.model_dump(exclude={"epoch", "parts"}), **epoch.parts}
    return {name: value for name, value in values.items() if value is not None}


def write_csv(path: Path, epochs: Sequence[Epoch]) -> None:
    """Write one row per epoch, whole or not at all."""
    rows = [{"epoch": epoch.epoch, **figures(epoch)} for epoch in epochs]
    stream = io.StringIO()
    table = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    replace(path, stream.getvalue().encode())


def open_logs(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Log]:
    """Open the logs asked for.

    Args:
        names: tensorboard or mlflow.
        folder: The run folder. TensorBoard files go to its `tensorboard`; MLflow's to its `mlflow.db`, unless the
            environment names a server in MLFLOW_TRACKING_URI. A run that is resumed goes on in the same place.
        settings: What the run was asked for; MLflow keeps it beside the figures.

    Raises:
        SpecError: If a package is missing.
    """
    return [_LOGS[name](folder, settings) for name in names]


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> Log:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:
        raise _missing("tensorboard") from None
    place = str(folder / "tensorboard")

    def log(epoch: Epoch) -> None:
        with SummaryWriter(place, purge_step=epoch.epoch) as writer:
            for name, value in figures(epoch).items():
                writer.add_scalar(name, value, epoch.epoch)

    return log


def _mlflow(folder: Path, settings: Mapping[str, Any]) -> Log:
    try:
        mlflow: Any = importlib.import_module("mlflow")
    except ImportError:
        raise _missing("mlflow") from None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{folder.resolve()}/mlflow.db")
    client = mlflow.MlflowClient()
    name = "rempart"
    experiment = client.get_experiment_by_name(name)
    number = client.create_experiment(name) if experiment is None else experiment.experiment_id
    mark = folder / MLFLOW_RUN
    if mark.exists():
        run = mark.read_text()
    else:
        run = client.create_run(number, run_name=folder.name).info.run_id
        for key, value in settings.items():
            client.log_param(run, key, value)
        replace(mark, run.encode())

    def log(epoch: Epoch) -> None:
        for key, value in figures(epoch).items():
            client.log_metric(run, key.replace(" ", "_"), value, step=epoch.epoch)

    return log


_LOGS: dict[str, Callable[[Path, Mapping[str, Any]], Log]] = {"tensorboard": _tensorboard, "mlflow": _mlflow}


def _missing(package: str) -> SpecError:
    return SpecError(f"the package {package}", got="none", hint=f"pip install 'rempart[{package}]'")
