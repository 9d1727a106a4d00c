"""What does it cost to measure the sensitivity of all neurons, in time and in memory?

Question: seconds of `core.features.moved` on 10,000 pairs of MNIST images and their counterparts, all blocks of a
lenet, over the seconds of two plain forward passes, over the images and over the counterparts. At most 1.3 is wanted.

How: both run one after the other in every round, in an order that turns, in one process on one thread; a ratio is
taken within a round, so that what else the machine does cancels as far as it lasts. Plain passes go through in the
batches that suit them best of those tried here. The counterparts are the images with random signs of size 0.1 added:
what an attack takes is not counted. Memory is the peak of a process of its own that streams the pairs from the file.

    python benchmarks/explain_cost.py [--data mnist:../shared/data/mnist:test]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from rempart import models
from rempart.core.features import blocks, moved
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws, environment
from rempart.data import Data, open_data

RESULT = Path(__file__).parent / "results" / "explain_cost.json"
PLAIN = (64, 128, 256)
FEW = 10  # a process that streams so many times fewer pairs is compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist:../shared/data/mnist:test")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64, help="Images attacked at a time, as in `rempart explain`")
    parser.add_argument("--stream", action="store_true", help="Only stream the pairs, and print the peak memory in KiB")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data(args.data).head(args.n)
    model = models.build("lenet", shape=data.shape, num_classes=10).eval()
    if args.stream:
        moved(model, pairs(data, args.batch), blocks(model))
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(status["VmHWM"].split()[0])  # not ru_maxrss, which begins with that of the parent
        return
    results = {"lenet": {**timed(model, data, args.batch, args.rounds), **memory(args.data, args.n)}}
    record = {
        "question": "seconds of the sensitivity of all neurons over seconds of two plain forward passes",
        "command": " ".join(["python", "benchmarks/explain_cost.py", *sys.argv[1:]]),
        "hardware": environment(),
        "n": len(data),
        "rounds": args.rounds,
        "seed": 0,
        "date": date.today().isoformat(),
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


def pairs(data: Data, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in data.batches(size):
        sign = Draws(0, batch.index, ("explain-cost",)).sign(batch.x)
        yield batch.x, (batch.x + 0.1 * sign).clamp(0, 1)


def timed(model: Classifier, data: Data, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and ratios to the best plain passes, each as least, median and greatest over the rounds."""
    made = list(pairs(data, size))
    x, x_adv = (torch.cat(part) for part in zip(*made, strict=True))
    layers = blocks(model)

    def plain(batch: int) -> None:
        with frozen(model), torch.no_grad():
            for images in (x, x_adv):
                for part in images.split(batch):
                    model(part)

    runs = {f"plain, {batch} at a time": lambda batch=batch: plain(batch) for batch in PLAIN}
    runs["sensitivity"] = lambda: moved(model, made, layers)
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for number in range(-1, rounds):  # round -1 warms up
        turn = number % len(runs)
        for run in [*runs][turn:] + [*runs][:turn]:
            started = time.perf_counter()
            runs[run]()
            if number >= 0:
                seconds[run].append(time.perf_counter() - started)
    best = min((run for run in runs if run != "sensitivity"), key=lambda run: statistics.median(seconds[run]))
    return {
        run: {
            **spread("seconds", values),
            **spread("ratio", [own / bare for own, bare in zip(values, seconds[best], strict=True)]),
        }
        for run, values in seconds.items()
    }


def memory(data: str, n: int) -> dict[str, dict[str, float]]:
    """Peak resident memory of processes that stream all pairs, and a part of them."""
    found: dict[str, dict[str, float]] = {}
    for count in (n // FEW, n):
        command = [sys.executable, __file__, "--stream", "--data", data, "--n", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[f"{count} pairs streamed"] = {"peak MiB": round(int(done.stdout) / 1024, 1)}
    return found


def spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_{key}": f(values) for key, f in (("min", min), ("median", statistics.median), ("max", max))}


if __name__ == "__main__":
    main()
