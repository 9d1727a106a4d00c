"""Do deepfool, cw and ead find smaller perturbations than those of foolbox and torchattacks, and at what cost?

Question: at equal steps, the share of images broken, the norms found, the input gradients spent and the seconds, on a
LeNet for MNIST and images it gets right.

How: every attack gets the same model and images and is judged by the same code: broken means another class, with the
norm of the perturbation in float64; a gradient is one image sent backward, counted by the same hook. Norms are medians
over all images, unbroken ones counting as infinite, and means over the images that all of a row's attacks broke. Each
attack runs twice in turn and the faster run counts.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rempart import models
from rempart.attacks import attack_batch
from rempart.core.data import Data, open_data
from rempart.core.model import Classifier, metered
from rempart.core.repro import environment
from rempart.core.threat import Threat

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import foolbox
    import torchattacks

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "peers.json"
Run = Callable[[Classifier, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a saved model of MNIST; default: train a LeNet here")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    place = Path(os.environ.get("REMPART_DATA", HERE.parent / "../shared/data")) / "mnist"
    model = models.load(args.model) if args.model else trained(open_data(f"mnist:{place}:train"))
    x, y, accuracy = right_ones(model, open_data(f"mnist:{place}:test"), args.n)
    results = {name: compare(model, x, y, *row, rounds=args.rounds) for name, row in contests().items()}
    record = {
        "question": "norms, gradients and seconds of minimum-norm attacks at equal steps",
        "command": " ".join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "hardware": environment() | {"foolbox": foolbox.__version__, "torchattacks": torchattacks.__version__},
        "n": len(x),
        "rounds": args.rounds,
        "date": date.today().isoformat(),
        "accuracy": accuracy,
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def contests() -> dict[str, tuple[str, dict[str, Run]]]:
    """Rows of the table: a norm, and the attacks to compare in it."""
    fb, ta = foolbox.attacks, torchattacks
    cw = {"steps": 100, "search_steps": 6, "initial_const": 0.1, "learning_rate": 0.05}
    ead = {"steps": 100, "search_steps": 6, "initial_const": 0.1, "beta": 1e-2}
    peer = {"steps": 100, "binary_search_steps": 6, "initial_const": 0.1}
    peer_ead = peer | {"initial_stepsize": 0.01, "regularization": 1e-2}
    ta_ead = {"max_iterations": 100, "binary_search_steps": 6, "initial_const": 0.1, "lr": 0.01, "beta": 1e-2}
    rows: dict[str, tuple[str, dict[str, Run]]] = {
        "deepfool l2, 50 steps": (
            "l2",
            {
                "rempart": ours("deepfool", "l2", steps=50),
                "foolbox": foolboxes(fb.L2DeepFoolAttack(steps=50)),
                "torchattacks": torchattackses(ta.DeepFool, steps=50),
            },
        ),
        "deepfool linf, 50 steps": (
            "linf",
            {
                "rempart": ours("deepfool", "linf", steps=50),
                "foolbox": foolboxes(fb.LinfDeepFoolAttack(steps=50)),
            },
        ),
    }
    for early, note in ((True, "stopping early"), (False, "to the end")):
        end = {"abort_early": early}
        rows[f"cw, 6 x 100 steps, {note}"] = (
            "l2",
            {
                "rempart": ours("cw", "l2", **cw, **end),
                "foolbox": foolboxes(fb.L2CarliniWagnerAttack(stepsize=0.05, **peer, **end)),
                "torchattacks (1 x 600)": torchattackses(ta.CW, steps=600, lr=0.05),
            },
        )
        for rule, name in (("l1", "EADL1"), ("en", "EADEN")):
            rows[f"ead {rule}, 6 x 100 steps, {note}"] = (
                "l1" if rule == "l1" else "elastic",
                {
                    "rempart": ours("ead", "l1", rule=rule, **ead, **end),
                    "foolbox": foolboxes(fb.EADAttack(decision_rule=rule.upper(), **peer_ead, **end)),
                    "torchattacks": torchattackses(getattr(ta, name), **ta_ead, **end),
                },
            )
    return rows


def ours(name: str, norm: str, **options: Any) -> Run:
    return lambda model, x, y: attack_batch(model, x, y, Threat.parse(norm), name, options).x_adv


def foolboxes(attack: Any) -> Run:
    """Where it finds nothing it returns black images; they are put back, not counted as found."""

    def run(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
        z, _, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None)
        return torch.where(z.flatten(1).any(1).view(-1, 1, 1, 1), z, x)

    return run


def torchattackses(kind: Any, **options: Any) -> Run:
    return lambda model, x, y: kind(model, **options)(x, y).detach()


def compare(
    model: Classifier, x: Tensor, y: Tensor, norm: str, runs: dict[str, Run], *, rounds: int
) -> dict[str, dict[str, float]]:
    sizes: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    gradients: dict[str, int] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            with counted(model) as count:
                z = run(model, x, y)
            seconds[name] = min(seconds.get(name, torch.inf), time.perf_counter() - started)
            gradients[name] = count()
            sizes[name] = measured(model, x, y, z, norm)
    shared = torch.stack([~size.isinf() for size in sizes.values()]).all(0)
    table = {
        name: {
            "found": float((~size.isinf()).double().mean()),
            "median": float(size.median()),
            "mean_of_shared": float(size[shared].mean()),
            "gradients_per_image": gradients[name] / len(x),
            "seconds": seconds[name],
        }
        for name, size in sizes.items()
    }
    show(norm, table)
    return table
