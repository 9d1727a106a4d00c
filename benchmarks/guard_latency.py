"""What does a guard cost where images come one by one?

Question: median latency of `Guarded.predict` on one grey image of 128x128 over that of the bare classifier (mri-cnn) on
the CPU, for the default detector and all others at their default options.

How: bare classifier and guards take turns on the same image, in one process and one thread. Latency does not depend on
what was learnt: detectors that learn from attacks are given images under noise in their place and are fitted in one
epoch, and without --model the network is untrained. What grows with the number of images fitted on (neighbours,
densities) is measured at --images. The row `rejected, named` is the default detector with a threshold that rejects the
image, and attack-type as the detector that names attacks. The ratio has the interval of a bootstrap over the rounds.

The default is mahalanobis: it reads the activations of the very pass that classifies and keeps no images, so that it
costs little more; unlike the baselines it looks at more than the logits; and it needs no attack to learn from.

    python benchmarks/guard_latency.py [--data ../shared/data/brain-mri.zip] [--model runs/mri] [--images 600]
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from rempart.core.model import Classifier
from rempart.core.repro import environment
from rempart.data import open_data
from rempart.detectors import Fitted, Learning, Threshold, detectors, fit
from rempart.guard import Guarded
from rempart.models import build, load

RESULT = Path(__file__).parent / "results" / "guard_latency.json"
DEFAULT = "mahalanobis"
TARGET = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/brain-mri.zip")
    parser.add_argument("--model", help="a trained model; untrained without")
    parser.add_argument("--images", type=int, default=600, help="images fitted on")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--detector", action="append", help="only these; all without")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)

    data = open_data(f"{given.data}:train").head(given.images)
    model = build("mri-cnn", shape=data.shape, num_classes=data.num_classes).eval()
    model = load(given.model) if given.model else model
    batch = data.batch(torch.arange(len(data)))
    learning = noised(batch.x, batch.y, batch.index)
    names = given.detector or [entry.name for entry in detectors]
    guards = {name: guarded(name, model, learning, reject=False) for name in names}
    named = guarded(DEFAULT, model, learning, reject=True)
    guards["rejected, named"] = replace(named, namer=guarded("attack-type", model, learning, reject=False).detector)

    image = batch.x[0]
    calls: dict[str, Callable[[], object]] = {"bare": lambda: model(image[None]).softmax(1).max(1)}
    calls |= {name: (lambda g: lambda: g.predict(image))(guard) for name, guard in guards.items()}
    seconds = in_turns(calls, given.rounds)
    rows = {name: row(seconds["bare"], seconds[name]) for name in calls}
    record = {
        "question": "latency of a guard on one 128x128 image on the CPU, over that of the bare classifier",
        "command": "python benchmarks/guard_latency.py",
        "default": DEFAULT,
        "target": TARGET,
        "hardware": environment(),
        "date": date.today().isoformat(),
        "n": given.rounds,
        "seed": 0,
        "results": rows,
    }
    if DEFAULT in rows:
        found = rows[DEFAULT]
        kept = "kept" if found["high"] <= TARGET else "not kept"
        record["result"] = f"{DEFAULT}: {found['times']:g} times the bare classifier (target {TARGET:g}: {kept})"
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def noised(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> Learning:
    """Images under noise in the place of attacked ones."""
    generator = torch.Generator().manual_seed(0)
    noisy = [(x + 0.03 * torch.randn(x.shape, generator=generator)).clamp(0, 1) for _ in range(6)]
    attacked = {f"noise {i}": (torch.arange(len(x)), images) for i, images in enumerate(noisy[1:])}
    return Learning(x=x, y=y, index=index, noisy=noisy[0], attacked=attacked)


def guarded(name: str, model: Classifier, learning: Learning, *, reject: bool) -> Guarded:
    """A guard that rejects every image, or none."""
    options = {"epochs": 1} if "epochs" in detectors[name].params.model_fields else {}
    fitted: Fitted = fit(name, options, model, learning)
    threshold = Threshold(value=-1e300 if reject else 1e300, fpr=0.05, n=len(learning.x))
    fitted = replace(fitted, card=fitted.card.model_copy(update={"threshold": threshold}))
    return Guarded(classifier=model, detector=fitted, source="")


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds + 2):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - started)
    return {name: times[2:] for name, times in seconds.items()}


def row(bare: list[float], own: list[float]) -> dict[str, float]:
    """Median milliseconds, and the ratio of the medians with its 95 % interval."""
    pairs = np.array([bare, own])
    draws = np.random.default_rng(0).integers(0, len(bare), (1000, len(bare)))
    medians = np.median(pairs[:, draws], axis=2)
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    times = statistics.median(own) / statistics.median(bare)
    given = {"ms": 1000 * statistics.median(own), "times": times, "low": float(low), "high": float(high)}
    return {key: round(value, 3) for key, value in given.items()}


if __name__ == "__main__":
    main()
