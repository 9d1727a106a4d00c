"""Do our minimum-norm attacks find smaller perturbations than those of foolbox and torchattacks, and faster?

Question: the median norm, with its 95 % interval, and the time of deepfool, ddn, fmn, fab, cw and ead beside the peers'
versions at equal steps, on a LeNet for MNIST and on a small network for the embedded digits that is trained here.

How: every attack gets the same images, all of them rightly classified, and one judge measures what comes back: the
norm of the perturbation in float64 where the original model now errs and the pixels lie in the box, infinite elsewhere.
Ours run through `attack_batch`, checks and judging included. The runs of a row follow each other in every round, in an
order that turns; a ratio of times, ours over the peer's, is taken within a round. An attack that is not registered is
skipped.

    python benchmarks/minimum_norm.py --model runs/lenet [--mnist ../shared/data/mnist] [--rows NAME ...]
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from rempart import models
from rempart.attacks import attack_batch, attacks
from rempart.core.model import Classifier
from rempart.core.repro import environment
from rempart.core.stats import median_interval
from rempart.core.threat import Norm, Threat
from rempart.data import Data, open_data
from rempart.train import load_recipe, train

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import foolbox
    import torchattacks

RESULT = Path(__file__).parent / "results" / "minimum_norm.json"
Run = Callable[[Classifier, Tensor, Tensor], Tensor]
OURS = "rempart"
LEARNING_RATE, CONST, BETA = 0.05, 0.1, 1e-2
FAR = {"linf": 1.0, "l2": 100.0, "l1": 1000.0}
"""Budgets that exclude nothing, for torchattacks' fab, which returns the original beyond its budget."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, default=Path("../shared/data/mnist"), help="folder with the MNIST files")
    parser.add_argument("--model", type=Path, help="a saved model of MNIST; without it only the digits are attacked")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="+", help="rows to run, for example fmn-l2; default all")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = {"digits": (digits_model(), open_data("digits:test"))}
    if args.model:
        cases["mnist"] = (models.load(str(args.model)).eval(), open_data(f"mnist:{args.mnist}:test"))
    results: dict[str, dict[str, Any]] = {}
    for name, (model, data) in cases.items():
        x, y = right_ones(model, data, args.n)
        results[name] = {"n": len(x)}
        for row, (norm, runs) in table(args.steps).items():
            if args.rows and row not in args.rows:
                continue
            if row.split("-")[0] not in {entry.name for entry in attacks}:
                print(f"{name} {row}: skipped, no such attack is registered")
                continue
            results[name][row] = measure(model, x, y, norm, runs, args.rounds)
            show(f"{name} {row}", results[name][row])
    peers = {"foolbox": foolbox.__version__, "torchattacks": torchattacks.__version__}
    record = {
        "question": "median norms of minimum-norm attacks at equal steps, and seconds of ours over the peers'",
        "command": f"python benchmarks/minimum_norm.py --model runs/lenet --n {args.n} --rounds {args.rounds}",
        "hardware": environment() | peers,
        "n": args.n,
        "steps": args.steps,
        "rounds": args.rounds,
        "date": date.today().isoformat(),
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def table(steps: int) -> dict[str, tuple[Norm, dict[str, Run]]]:
    """Rows: a norm, and the runs to compare. cw and ead try 6 constants; torchattacks' cw has one, and more steps."""
    fb, ta = foolbox.attacks, torchattacks
    search = {"steps": steps, "initial_const": CONST, "abort_early": True}
    mine, theirs = {**search, "search_steps": 6}, {**search, "binary_search_steps": 6}
    ta_ead = {"max_iterations": steps, "binary_search_steps": 6, "initial_const": CONST, "beta": BETA, "lr": 0.01}
    rows: dict[str, tuple[Norm, dict[str, Run]]] = {
        "deepfool-l2": (
            "l2",
            {
                OURS: ours("deepfool", "l2", steps=50),
                "foolbox": of_foolbox(fb.L2DeepFoolAttack(steps=50)),
                "torchattacks": of_torchattacks(ta.DeepFool, steps=50),
            },
        ),
        "deepfool-linf": (
            "linf",
            {
                OURS: ours("deepfool", "linf", steps=50),
                "foolbox": of_foolbox(fb.LinfDeepFoolAttack(steps=50)),
            },
        ),
        "ddn-l2": ("l2", {OURS: ours("ddn", "l2", steps=steps), "foolbox": of_foolbox(fb.DDNAttack(steps=steps))}),
    }
    kinds: dict[Norm, Any] = {"linf": fb.LInfFMNAttack, "l2": fb.L2FMNAttack, "l1": fb.L1FMNAttack}
    for norm, kind in kinds.items():
        rows[f"fmn-{norm}"] = norm, {OURS: ours("fmn", norm, steps=steps), "foolbox": of_foolbox(kind(steps=steps))}
    for norm in kinds:
        peer = of_torchattacks(ta.FAB, norm=norm.capitalize(), eps=FAR[norm], steps=steps, n_restarts=1)
        theirs_too = {} if norm == "l1" else {"torchattacks": peer}  # its l1 form raises UnboundLocalError
        rows[f"fab-{norm}"] = norm, {OURS: ours("fab", norm, steps=steps, restarts=1), **theirs_too}
    rows["cw-l2"] = (
        "l2",
        {
            OURS: ours("cw", "l2", learning_rate=LEARNING_RATE, **mine),
            "foolbox": of_foolbox(fb.L2CarliniWagnerAttack(stepsize=LEARNING_RATE, **theirs)),
            "torchattacks": of_torchattacks(ta.CW, steps=6 * steps, lr=LEARNING_RATE),
        },
    )
    peer = fb.EADAttack(initial_stepsize=0.01, regularization=BETA, decision_rule="L1", **theirs)
    rows["ead-l1"] = (
        "l1",
        {
            OURS: ours("ead", "l1", rule="l1", beta=BETA, **mine),
            "foolbox": of_foolbox(peer),
            "torchattacks": of_torchattacks(ta.EADL1, **ta_ead),
        },
    )
    return rows


def ours(name: str, norm: Norm, **options: Any) -> Run:
    def run(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        known = attacks[name].params.model_fields
        return attack_batch(
            model, x, y, Threat(norm=norm), name, {k: v for k, v in options.items() if k in known}
        ).x_adv

    return run


def of_foolbox(attack: Any) -> Run:
    return lambda model, x, y: attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None)[1]


def of_torchattacks(kind: Any, **options: Any) -> Run:
    """Cut to the box, which its ead leaves by half a hundredth."""
    return lambda model, x, y: kind(model, **options)(x, y).detach().clamp(0, 1)


def measure(
    model: Classifier, x: Tensor, y: Tensor, norm: Norm, runs: dict[str, Run], rounds: int
) -> dict[str, dict[str, Any]]:
    found: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    for number in range(rounds):
        names = list(runs)
        turn = number % len(names)
        for run in names[turn:] + names[:turn]:
            started = time.perf_counter()
            found[run] = runs[run](model, x, y)
            seconds[run].append(time.perf_counter() - started)
    result: dict[str, dict[str, Any]] = {}
    for run, z in found.items():
        sizes = judged(model, x, y, z, norm)
        ratios = [mine / other for mine, other in zip(seconds[OURS], seconds[run], strict=True)]
        low, high = median_interval(sizes.numpy())
        result[run] = {
            "found": float((~sizes.isinf()).double().mean()),
            **{key: finite(value) for key, value in (("median", float(sizes.median())), ("low", low), ("high", high))},
            "seconds_median": statistics.median(seconds[run]),
            "ratio_min": min(ratios),
            "ratio_median": statistics.median(ratios),
            "ratio_max": max(ratios),
        }
    return result


def judged(model: Classifier, x: Tensor, y: Tensor, z: Tensor, norm: Norm) -> Tensor:
    """Norms in float64, infinite where the class is still the true one or a pixel lies outside the box."""
    threat = Threat(norm=norm)
    with torch.no_grad():
        wrong = model(z).argmax(1) != y
    return torch.where(wrong & threat.holds(x, z), threat.distance(x, z), torch.inf)


def finite(value: float) -> float | None:
    """JSON has no infinity: null stands for it."""
    return value if value < float("inf") else None


def right_ones(model: Classifier, data: Data, n: int) -> tuple[Tensor, Tensor]:
    """The first n images that the model gets right."""
    batch = data.batch(torch.arange(min(len(data), n + n // 4 + 20)))
    with torch.no_grad():
        right = (model(batch.x).argmax(1) == batch.y).nonzero()[:n, 0]
    return batch.x[right], batch.y[right]


def digits_model() -> Classifier:
    model = models.build("lenet", shape=(1, 8, 8), num_classes=10, mean=[0.3], std=[0.37])
    train(open_data("digits:train"), open_data("digits:test"), model, load_recipe("digits", {"epochs": "6"}))
    return model.eval().requires_grad_(False)


def show(title: str, result: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title:24} found  median (95 % interval)       seconds  ours / its time (min - max)")
    for run, row in result.items():
        low, mid, high = ("inf" if row[key] is None else f"{row[key]:.4f}" for key in ("low", "median", "high"))
        ratios = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} - {row['ratio_max']:.2f})"
        norms = f"{mid} ({low} - {high})"
        print(f"  {run:20} {row['found']:7.3f}  {norms:28} {row['seconds_median']:7.2f}  {ratios}", flush=True)


if __name__ == "__main__":
    main()
