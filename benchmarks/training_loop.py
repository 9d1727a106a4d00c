"""How much does the training loop cost beside the passes it cannot do without?

Question: the processor time of one epoch of `pgd-at` (7 steps) through `rempart.train.train`, over that of a bare loop
of the same passes written out: 7 forward and input-gradient passes from a random start, one forward pass that judges
the last point, and one step of Adam.

How: the two train a LeNet on the same MNIST images in batches of 128, one after the other in every round, in an order
that turns; a ratio is taken within a round, so that what else the machine does cancels. Reading the data does
not count, and nothing is measured after the epoch.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from rempart.core.model import Classifier
from rempart.core.repro import environment
from rempart.data import Data, open_data
from rempart.models import build
from rempart.train import load_recipe, train

RESULT = Path(__file__).parent / "results" / "training_loop.json"
BATCH, STEPS, EPS, RATE = 128, 7, 0.1, 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/mnist", help="folder of the four IDX files")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    learn = open_data(f"mnist:{args.data}:train[:{args.images}]").load()
    results = measure(learn, args.rounds)
    for name, row in results.items():
        ratios = f"{row['ratio_median']:.3f} ({row['ratio_min']:.3f} - {row['ratio_max']:.3f})"
        print(f"{name:12} {row['seconds_median']:8.3f} s   ratio to the bare loop: {ratios}")
    record = {
        "question": "processor seconds of an epoch of PGD-7 adversarial training over those of its bare passes",
        "command": " ".join(["python", "benchmarks/training_loop.py", *sys.argv[1:]]),
        "hardware": environment(),
        "n": len(learn),
        "rounds": args.rounds,
        "date": date.today().isoformat(),
        "results": {"lenet": results},
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(learn: Data, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and ratios to the bare loop, each as least, median and greatest over the rounds."""
    runs: dict[str, Callable[[], object]] = {
        "bare loop": lambda: bare(learn, lenet(learn)),
        "rempart": lambda: ours(learn, lenet(learn)),
    }
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for number in range(-1, rounds):  # round -1 warms up
        names = list(runs)
        turn = number % len(names)
        for run in names[turn:] + names[:turn]:
            started = time.process_time()
            runs[run]()
            if number >= 0:
                seconds[run].append(time.process_time() - started)
    return {
        run: {
            **spread("seconds", values),
            **spread("ratio", [own / least for own, least in zip(values, seconds["bare loop"], strict=True)]),
        }
        for run, values in seconds.items()
    }


def lenet(data: Data) -> Classifier:
    return build("lenet", shape=data.shape, num_classes=data.num_classes, mean=[0.13], std=[0.31], seed=0)


def ours(learn: Data, model: Classifier) -> None:
    options = {"epochs": 1, "batch_size": BATCH, "steps": STEPS, "threat": f"linf:{EPS}", "learning_rate": RATE}
    train(learn, None, model, load_recipe("pgd-at", options | {"schedule": "constant", "optimiser": "adam"}))


def bare(learn: Data, model: Classifier) -> None:
    """The passes, with what turns one into the next and nothing more."""
    model.to(memory_format=torch.channels_last).train()  # as the loop has it
    optimiser = AdamW(model.parameters(), RATE, weight_decay=1e-2)
    for positions in torch.randperm(len(learn)).tensor_split(-(-len(learn) // BATCH)):
        batch = learn.batch(positions)
        x, y = batch.x, batch.y
        model.eval().requires_grad_(False)
        point = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            point = point.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(cross_entropy(model(point), y, reduction="sum"), point)
            moved = point.detach() + 2.5 * EPS / STEPS * slope.sign()
            point = torch.minimum(torch.maximum(moved, x - EPS), x + EPS).clamp(0, 1)
        with torch.no_grad():
            model(point)
        model.train().requires_grad_(True)
        optimiser.zero_grad()
        cross_entropy(model(point), y).backward()
        optimiser.step()


def spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_{key}": f(values) for key, f in (("min", min), ("median", statistics.median), ("max", max))}


if __name__ == "__main__":
    main()
