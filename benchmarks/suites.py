"""How does the suite `fast` compare with `standard` and with AutoAttack of pyautoattack, in accuracy and in cost?

Question: worst-case accuracy, sample-wise agreement, seconds, and images sent forward and backward, on the same models
and samples.

How: the contenders take turns model by model, in an order that turns with the model, in one process. A suite runs its
members one after the other, each on the samples still standing. Forward and backward passes of all contenders are
counted by the same hooks on the model. `--seeds` repeats pyautoattack, which draws from the global random state, to
show how far its own verdicts spread. Seconds compare only on a quiet machine. Models that are not named keep the rows
they have in the JSON file.

    rempart train --data mnist:../shared/data/mnist --out runs/lenet
    rempart train --data mnist:../shared/data/mnist --recipe pgd-at -o threat=linf:0.2 -o epochs=6 --out runs/lenet-at
    rempart train --data digits --model lenet --recipe plain:digits --out runs/digits
    rempart train --data ../shared/data/brain-mri.zip --model mri-cnn --recipe plain:medical --out runs/mri
    python benchmarks/suites.py [--data ../shared/data] [--runs runs] [--n 300] [--models lenet-at-0.3 ...] [--quick]

pyautoattack 0.2.0 is needed (`pip install pyautoattack`); it is no part of the tests.
"""

import argparse
import json
import os
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from pyautoattack import AutoAttack
from torch import Tensor

from rempart.attacks import attack_data
from rempart.attacks.suites import suite
from rempart.core.model import Classifier, frozen, metered
from rempart.core.repro import environment
from rempart.core.stats import wilson
from rempart.core.threat import Threat
from rempart.data import Data, open_data
from rempart.models.load import load

RESULT = Path(__file__).parent / "results" / "suites.json"
MODELS = {  # folder of the model, data, threat, samples
    "lenet-0.1": ("lenet", "mnist:{}/mnist", "linf:0.1", 300),
    "lenet-0.3": ("lenet", "mnist:{}/mnist", "linf:0.3", 300),
    "lenet-at-0.1": ("lenet-at", "mnist:{}/mnist", "linf:0.1", 300),
    "lenet-at-0.3": ("lenet-at", "mnist:{}/mnist", "linf:0.3", 300),
    "mri-4/255": ("mri", "{}/brain-mri.zip", "linf:4/255", 200),
    "digits-0.1": ("digits", "digits", "linf:0.1", 300),
}
QUICK = {"lenet-at-0.3": 50}
BATCH = 250
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
Result = tuple[Tensor, float, int, int]
"""Which samples stand, seconds, images forward, images backward."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--n", type=int, help="samples per model; default 300, 200 for the MRI network")
    parser.add_argument("--seeds", type=int, default=1, help="runs of pyautoattack per model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one model, 50 samples, nothing written")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept = json.loads(args.out.read_text("utf-8"))["results"] if args.out.exists() and not args.quick else {}
    results: dict[str, Any] = {name: rows for name, rows in kept.items() if name in MODELS}
    for turn, name in enumerate(QUICK if args.quick else args.models):
        folder, source, budget, n = MODELS[name]
        model = load(str(args.runs / folder))
        data = spread(open_data(f"{source.format(args.data)}:test"), QUICK.get(name, n) if args.quick else args.n or n)
        results[name] = measure(model, data, Threat.parse(budget, low=model.low, high=model.high), turn, args.seeds)
        show(name, results[name])
    record = {
        "question": "worst-case accuracy and cost of fast, standard and pyautoattack's standard",
        "command": "python benchmarks/suites.py",
        "hardware": environment(),
        "date": date.today().isoformat(),
        "results": results,
    }
    if not args.quick:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def spread(data: Data, n: int) -> Data:
    """About n samples at even distances: files of one class lie side by side."""
    return data.take(torch.arange(0, len(data), max(1, len(data) // n))[:n])


def run(name: str, model: Classifier, data: Data, threat: Threat) -> Result:
    """Run the members of a suite in turn, each on what still stands."""
    right = torch.ones(len(data), dtype=torch.bool)
    seconds, queries, gradients = 0.0, 0, 0
    for attack, options in suite(name, threat, model.num_classes).members:
        left = right.nonzero()[:, 0]
        if len(left) == 0:
            break
        started = time.perf_counter()
        outcome = attack_data(model, data.take(left), threat, attack, options, batch_size=BATCH)
        seconds += time.perf_counter() - started  # freezing, copying and judging included, as on the other side
        queries, gradients = queries + outcome.queries, gradients + outcome.gradients
        right[left] = outcome.right
    return right, seconds, queries, gradients


def peer(seed: int, model: Classifier, data: Data, threat: Threat) -> Result:
    """AutoAttack `standard` of pyautoattack; its images are judged as ours are."""
    batch = data.batch(torch.arange(len(data)))
    started = time.perf_counter()
    with frozen(model), metered(model) as meter:
        attack = AutoAttack(
            model, norm=NORMS[threat.norm], eps=threat.budget, seed=seed, version="standard", device="cpu"
        )
        # It is meant for ten classes and more; with fewer, it aims at all others.
        others = model.num_classes - 1
        attack.apgd_targeted.n_target_classes = min(attack.apgd_targeted.n_target_classes, others)
        attack.fab.n_target_classes = min(attack.fab.n_target_classes, others)
        found, _ = attack.run_standard_evaluation(batch.x, batch.y, batch_size=BATCH)
        seconds, queries, gradients = time.perf_counter() - started, meter.queries, meter.gradients
        with torch.no_grad():
            fooled = model(found).argmax(1) != batch.y
    return ~(fooled & threat.holds(batch.x, found)), seconds, queries, gradients


def measure(model: Classifier, data: Data, threat: Threat, turn: int, seeds: int) -> dict[str, dict[str, Any]]:
    runs = {name: lambda name=name: run(name, model, data, threat) for name in ("fast", "standard")}
    for seed in range(seeds):
        runs[f"pyautoattack, seed {seed}"] = lambda seed=seed: peer(seed, model, data, threat)
    names = list(runs)
    cut = turn % len(names)
    results = {name: runs[name]() for name in names[cut:] + names[:cut]}
    theirs = results["pyautoattack, seed 0"]
    return {name: row(results[name], theirs) for name in names}


def row(own: Result, theirs: Result) -> dict[str, Any]:
    right, seconds, queries, gradients = own
    interval = wilson(int(right.sum()), len(right))
    return {
        "n": len(right),
        "right": int(right.sum()),
        "accuracy": round(float(right.float().mean()), 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "only_this_broke": int((theirs[0] & ~right).sum()),
        "only_pyautoattack_broke": int((right & ~theirs[0]).sum()),
        "seconds": round(seconds, 2),
        "forward": queries,
        "backward": gradients,
        "seconds_ratio": round(seconds / theirs[1], 4),
        "forward_ratio": round(queries / theirs[2], 4),
        "backward_ratio": round(gradients / max(1, theirs[3]), 4),
    }


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name:22} accuracy (interval)       only this / only peer  seconds   forward  backward  ratio of seconds")
    for contender, r in rows.items():
        interval = f"{r['accuracy']:.1%} ({r['low']:.1%} - {r['high']:.1%})"
        broke = f"{r['only_this_broke']} / {r['only_pyautoattack_broke']}"
        counts = f"{r['seconds']:8.1f} {r['forward']:9} {r['backward']:9} {r['seconds_ratio']:8.3f}"
        print(f"  {contender:20} {interval:26} {broke:20} {counts}", flush=True)


if __name__ == "__main__":
    main()
