"""What does each idea in `cascade` bring, in samples broken and in gradients spent?

Question: how many samples stand, and what does a sample cost in gradients, if one part of `cascade` is left out or
replaced; and which idea not taken up would have helped?

How: every variant attacks the same images with the same random draws, keyed by sample. `only_cascade` and
`only_variant` count the samples that one of the two breaks and the other does not. Counts, not seconds: they do not
depend on what else the machine does. A difference of one or two samples in several hundred is noise.

    python benchmarks/ablation.py [--data ../shared/data] [--runs runs] [--n 200] [--models lenet-at-0.2 ...]
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from rempart.attacks import attack_data
from rempart.attacks.cascade import STAGES, Stage, climb
from rempart.core.model import Classifier
from rempart.core.repro import Draws, environment
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels
from rempart.data import Data, open_data
from rempart.models.load import load

RESULT = Path(__file__).parent / "results" / "ablation.json"
MODELS = {  # folder of the model, data, threat
    "lenet-at-0.2": ("lenet-at", "mnist:{}/mnist", "linf:0.2"),
    "lenet-at-0.3": ("lenet-at", "mnist:{}/mnist", "linf:0.3"),
    "lenet-0.1": ("lenet", "mnist:{}/mnist", "linf:0.1"),
    "mri-2/255": ("mri", "{}/brain-mri.zip", "linf:2/255"),
}
SHORT = STAGES[:3]


@dataclass(frozen=True)
class Variant:
    """Stages, and module constants of `cascade` replaced."""

    stages: Sequence[Stage] = STAGES
    patches: dict[str, Any] = field(default_factory=dict[str, Any])


def log_odds(aim: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss `ce` where no class is aimed at, and also where one is."""
    if aim is None:
        return lambda z, y: z.scatter(1, y[:, None], -torch.inf).logsumexp(1) - z.gather(1, y[:, None])[:, 0]
    return lambda z, _: -log_odds(None)(z, aim)


def each(**changes: Any) -> list[Stage]:
    return [replace(stage, **changes) for stage in STAGES]


VARIANTS: dict[str, Variant] = {
    "cascade": Variant(),
    "1 stage": Variant(STAGES[:1]),
    "2 stages": Variant(STAGES[:2]),
    "3 stages": Variant(STAGES[:3]),
    "4 stages": Variant(STAGES[:4]),
    "5 stages": Variant(STAGES[:5]),
    "no targets, same steps": Variant([*STAGES[:2], Stage(90, "best"), *(replace(s, targets=0) for s in STAGES[3:])]),
    "no first stage": Variant(STAGES[1:]),
    "no second stage": Variant([STAGES[0], *STAGES[2:]]),
    "all targets, no order": Variant([*SHORT, *(replace(s, targets=9) for s in STAGES[3:])]),
    "one target in the end": Variant([*SHORT, *(replace(s, targets=1) for s in STAGES[3:])]),
    "no reach: all stages for all": Variant(each(reach=float("inf"))),
    "all from the original": Variant(each(start="origin")),
    "all from random points": Variant(each(start="random")),
    "all from the best point": Variant(each(start="best")),
    "first step 1 eps": Variant(patches={"_STEP": 1.0}),
    "first step 4 eps": Variant(patches={"_STEP": 4.0}),
    "no inertia": Variant(patches={"_PULL": 1.0}),
    "inertia 0.5": Variant(patches={"_PULL": 0.5}),
    "linear schedule": Variant(patches={"_fall": lambda done: 1 - done}),
    "geometric schedule": Variant(patches={"_fall": lambda done: 0.02**done}),
    "constant steps of eps / 4": Variant(patches={"_fall": lambda done: 0.125}),
    "log-odds (ce) loss": Variant(patches={"_goal": log_odds}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name in args.models:
        folder, source, budget = MODELS[name]
        model = load(str(args.runs / folder))
        data = spread(open_data(f"{source.format(args.data)}:test"), args.n)
        threat = Threat.parse(budget, low=model.low, high=model.high)
        results[name] = measure(name, model, data, threat, dict.fromkeys(["cascade", *args.variants]), args.seed)
        record = {
            "question": "samples standing and gradients per sample, with one part of `cascade` changed",
            "command": " ".join(["python", "benchmarks/ablation.py", *sys.argv[1:]]),
            "hardware": environment(),
            "n": args.n,
            "seed": args.seed,
            "note": "Differences of one or two samples are noise.",
            "date": date.today().isoformat(),
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def spread(data: Data, n: int) -> Data:
    """About n samples at even distances: files of one class lie side by side."""
    return data.take(torch.arange(0, len(data), max(1, len(data) // n))[:n])


def measure(
    name: str, model: Classifier, data: Data, threat: Threat, variants: Iterable[str], seed: int
) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    reference: Tensor | None = None
    for variant in variants:
        right, queries, gradients = attack(model, data, threat, VARIANTS[variant], seed)
        reference = right if reference is None else reference
        results[variant] = {
            "right": int(right.sum()),
            "only_cascade": int((right & ~reference).sum()),
            "only_variant": int((reference & ~right).sum()),
            "queries_per_sample": round(queries / len(data), 2),
            "gradients_per_sample": round(gradients / len(data), 2),
        }
        row = results[variant]
        print(f"{name:14} {variant:30} {row}", flush=True)
    return results


def attack(model: Classifier, data: Data, threat: Threat, variant: Variant, seed: int) -> tuple[Tensor, int, int]:
    def staged(m: torch.nn.Module, x: Images, y: Labels, t: Threat, *, rng: Draws, **_: Any) -> Images:
        return climb(m, x, y, t, variant.stages, rng=rng)

    with patch.dict(vars(import_module("rempart.attacks.cascade")), variant.patches):
        outcome = attack_data(model, data, threat, staged, seed=seed)
    return outcome.right, outcome.queries, outcome.gradients


if __name__ == "__main__":
    main()
