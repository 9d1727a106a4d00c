"""How much does a whole attack cost beside the gradients it cannot do without?

Question: the time of `attack_batch(..., "pgd", {"steps": 10})`, checks, tracing and judging included, over the time of
a bare loop of 10 eager forward and input-gradient passes of the same model on the same batch; PGD of torchattacks and
of foolbox beside it, with the same steps.

How: the four run one after the other in every round, in an order that turns; a ratio is taken within a round, so that
what else the machine does cancels. Models are drawn at random, with batch norm statistics disturbed so that folding
them is real work; labels are the model's own predictions, so that every image is attacked to the end.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rempart import models
from rempart.attacks import attack_batch
from rempart.core.model import Classifier
from rempart.core.repro import environment
from rempart.core.threat import Threat

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import foolbox
    import torchattacks

RESULT = Path(__file__).parent / "results" / "attack_loop.json"
NETWORKS = {"convnet": ((3, 32, 32), 10), "resnet18": ((3, 32, 32), 10), "mri-cnn": ((1, 128, 128), 4)}
EPS, STEPS = 8 / 255, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {name: measure(name, args.batch, args.rounds) for name in args.networks}
    for name, result in results.items():
        show(name, result)
    record = {
        "question": "seconds of PGD-10 over seconds of 10 bare input gradients",
        "command": " ".join(["python", "benchmarks/attack_loop.py", *sys.argv[1:]]),
        "hardware": environment(),
        "n": args.batch,
        "rounds": args.rounds,
        "date": date.today().isoformat(),
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(name: str, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and ratios to the bare loop, each as least, median and greatest over the rounds."""
    shape, classes = NETWORKS[name]
    model = random_model(name, shape, classes)
    x = torch.rand((batch, *shape), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    runs = contenders(model, x, y)
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for number in range(-1, rounds):  # round -1 warms up
        names = list(runs)
        turn = number % len(names)
        for run in names[turn:] + names[:turn]:
            started = time.perf_counter()
            runs[run]()
            if number >= 0:
                seconds[run].append(time.perf_counter() - started)
    return {
        run: {
            **spread("seconds", values),
            **spread("ratio", [own / bare for own, bare in zip(values, seconds["bare loop"], strict=True)]),
        }
        for run, values in seconds.items()
    }


def contenders(model: Classifier, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    threat = Threat(norm="linf", eps=EPS)
    alpha = 2.5 * EPS / STEPS
    peer = torchattacks.PGD(model, eps=EPS, alpha=alpha, steps=STEPS)
    other = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=STEPS)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return {
        "bare loop": lambda: bare(model, x, y),
        "rempart": lambda: attack_batch(model, x, y, threat, "pgd", {"steps": STEPS}),
        "torchattacks": lambda: peer(x, y),
        "foolbox": lambda: other(wrapped, x, y, epsilons=EPS),
    }


def bare(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for _ in range(STEPS):
        point = x.detach().requires_grad_(True)
        torch.autograd.grad(cross_entropy(model(point), y, reduction="sum"), point)


def random_model(name: str, shape: tuple[int, ...], classes: int) -> Classifier:
    model = models.build(name, shape=shape, num_classes=classes, mean=[0.5] * shape[0], std=[0.25] * shape[0])
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                assert tensor is not None
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def spread(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_{key}": f(values) for key, f in (("min", min), ("median", statistics.median), ("max", max))}


def show(name: str, result: dict[str, dict[str, float]]) -> None:
    print(f"\n{name:14}  seconds   ratio to the bare loop: median (min - max)")
    for run, row in result.items():
        ratios = f"{row['ratio_median']:.3f} ({row['ratio_min']:.3f} - {row['ratio_max']:.3f})"
        print(f"  {run:12} {row['seconds_median']:8.3f}   {ratios}")


if __name__ == "__main__":
    main()
