"""How much faster is Deep Defense when only the linearisation chosen is differentiated?

Question: seconds per epoch of MNIST (60,000 images, batches of 100) of the objective, forward, backward and step of
the optimiser, over those of a plain loop that does what the released script does: in each linearisation the gradients
of all candidate classes with their graph, of the whole batch, with masks for the images that are done, until all are.

    python benchmarks/deep_defense_speed.py [--data ../shared/data/mnist]

How: reference networks are trained first, as in deep_defense.py (fewer epochs), so that DeepFool takes the number of
linearisations it takes in practice. Both then run on the same batches from the same weights, one after the other in an
order that turns; a ratio is taken within a batch. That their losses agree is checked on every batch. Cross-entropy
alone stands beside them.
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
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deep_defense import SPACES, Bench, Settings, fit, fresh, plain, read
from rempart.core.model import Classifier
from rempart.core.repro import Draws, environment
from rempart.objectives import deep_defense

RESULT = Path(__file__).parent / "results" / "deep_defense_speed.json"
Loss = Callable[[Classifier, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist"))
    parser.add_argument("--nets", nargs="+", default=["mlp", "lenet"])
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--reference-epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {net: measure(net, args.data, args.batches, args.reference_epochs) for net in args.nets}
    record = {
        "question": "seconds per epoch of Deep Defense: the objective against a plain loop over all classes",
        "command": " ".join(["python", "benchmarks/deep_defense_speed.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": environment(),
        "n": args.batches,
        "seed": 0,
        "note": "n counts batches of 100 images; ratios are to the objective, within a batch",
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(layout: str, data: Path, batches: int, epochs: int) -> dict[str, Any]:
    settings = Settings(15_000, 5, epochs, 1000)
    bench, images, space = Bench(Path(), "published", layout, 0, settings), read(data, settings), SPACES["published"]
    model = fresh(bench, images)
    fit(bench, model, images, plain, epochs, space.reference_rate, len(images.x), halve=False)
    objective = deep_defense(stabiliser=space.stabiliser, origin="mean")
    objective.state["mean"] = images.mean
    rng = Draws(0, torch.arange(100))
    losses: dict[str, Loss] = {
        "objective": lambda model, x, y: objective(model, x, y, rng=rng).value,
        "plain loop": lambda model, x, y: plain_loop(model, x, y, images.mean, space.stabiliser),
        "cross-entropy": plain,
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    model.train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for number, part in enumerate(torch.arange(100 * (batches + 1)).split(100)):
        values = {}
        names = list(losses)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            model.load_state_dict(start)
            optimiser = torch.optim.SGD(model.parameters(), space.fine_rate, momentum=0.9, weight_decay=5e-4)
            begun = time.perf_counter()
            value = losses[name](model, images.x[part], images.y[part])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            if number:  # the first batch warms up
                seconds[name].append(time.perf_counter() - begun)
            values[name] = float(value.detach())
        assert abs(values["objective"] - values["plain loop"]) < 1e-3 * values["plain loop"], values
    told: dict[str, Any] = {}
    for name, each in seconds.items():
        ratios = [other / own for other, own in zip(each, seconds["objective"], strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        told[name] = {"seconds per epoch": 600 * statistics.median(each)}
        told[name] |= {"ratio_median": middle, "ratio_min": low, "ratio_max": high, "ratios": ratios}
        print(f"{layout:6} {name:13} {told[name]['seconds per epoch']:8.1f} s  {middle:5.2f} ({low:.2f} - {high:.2f})")
    return told


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, mean: Tensor, stabiliser: float) -> Tensor:
    """The loss as the released script computes it, by automatic differentiation; lambda 15, c 25, d 5, 5 steps."""
    z = model(x)
    first = z.argmax(1)
    right = first == y
    value = cross_entropy(z, y)
    for mask, sign in ((right, -25.0), (~right, 5.0)):
        if bool(mask.any()):
            away = sign < 0
            order = z.detach()[mask].argsort(1, descending=True)[:, :10] if away else None
            delta = plain_deepfool(model, x[mask], y[mask], order, stabiliser)
            r = delta.flatten(1).norm(dim=1) / (x[mask] - mean).flatten(1).norm(dim=1)
            value = value + 15 / len(x) * (sign * r).exp().sum()
    return value


def plain_deepfool(model: nn.Module, x: Tensor, y: Tensor, order: Tensor | None, stabiliser: float) -> Tensor:
    """Towards all classes in `order` but the first, or the true class alone; 5 steps, or until all are done."""
    rows = torch.arange(len(x))
    x = x.clone().requires_grad_(True)
    point, total, done = x, torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
    for _ in range(5):
        z = model(point)
        start = z.argmax(1) if order is None else order[:, 0]
        (base,) = torch.autograd.grad(z[rows, start].sum(), point, create_graph=True)
        steps, distances = [], []
        for goal in [y] if order is None else order[:, 1:].T:
            f = z[rows, goal] - z[rows, start]
            w = torch.autograd.grad(z[rows, goal].sum(), point, create_graph=True)[0] - base
            size = (w + stabiliser).flatten(1).norm(dim=1)
            distances.append(f.abs() / size)
            steps.append((distances[-1] / size).view(-1, 1, 1, 1) * w)
        nearest = torch.stack(distances).detach().argmin(0)
        step = torch.stack(steps)[nearest, rows] * ~done.view(-1, 1, 1, 1)
        total, point = total + step, point + step
        with torch.no_grad():
            hit = model(x + 1.02 * total).argmax(1)
        done = done | ((hit == y) if order is None else (hit != y))
        if bool(done.all()):
            break
    return 1.02 * total


if __name__ == "__main__":
    main()
