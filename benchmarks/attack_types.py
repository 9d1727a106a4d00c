"""Can a classifier of attack types name the attack on images it has not seen, and what does it say of other attacks?

Question: accuracy over clean, fgsm, bim, mim, pgd and cw on held-out source images, as they are in memory and as 8-bit
files keep them; and which share of unseen attacks is flagged, and under which name, at a threshold set for 5 % of
clean images.

How: the test split, which the classifier was not trained on, is parted by source image into images to fit on, to set
the threshold on, and to judge on. Attacks have the settings of the MRI system that the six classes come from, but for
a random start of pgd and a search for the constant of cw. Accuracy is the mean over the six classes, each of which
counts the same. Slices of one patient may lie on both sides of the split.

    rempart train --data ../shared/data/brain-mri.zip --model mri-cnn --recipe plain:medical --out runs/mri
    python benchmarks/attack_types.py [--data ../shared/data/brain-mri.zip] [--model runs/mri] [--images 600]
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

from rempart.core.model import Classifier
from rempart.core.repro import environment
from rempart.core.stats import wilson
from rempart.core.threat import Threat
from rempart.data import Data, open_data
from rempart.detect.protocol import Crafting, gather, split
from rempart.detectors.catalogue import Learning
from rempart.detectors.fitted import Fitted, calibrate, fit
from rempart.models.load import load

RESULT = Path(__file__).parent / "results" / "attack_types.json"
SEEN = {
    "fgsm": Crafting(attack="fgsm", threat=Threat.parse("linf:0.01")),
    "bim": Crafting(attack="bim", threat=Threat.parse("linf:0.03"), options={"steps": 10, "step": 0.005}),
    "mim": Crafting(attack="mim", threat=Threat.parse("linf:0.03"), options={"steps": 10, "step": 0.005}),
    "pgd": Crafting(attack="pgd", threat=Threat.parse("linf:0.03"), options={"steps": 10, "step": 0.007}),
    "cw": Crafting(
        attack="cw",
        threat=Threat.parse("l2"),
        options={"steps": 100, "search_steps": 3, "initial_const": 1.0, "confidence": 10.0},
    ),
}
UNSEEN = {
    "deepfool": Crafting(attack="deepfool", threat=Threat.parse("l2")),
    "apgd": Crafting(attack="apgd", threat=Threat.parse("linf:0.03"), options={"steps": 20}),
    "pgd-l2": Crafting(attack="pgd", threat=Threat.parse("l2:1.5"), options={"steps": 10}),
    "fgsm-0.02": Crafting(attack="fgsm", threat=Threat.parse("linf:0.02")),
}
NOISE = Threat.parse("linf:0.03")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/brain-mri.zip")
    parser.add_argument("--model", default="runs/mri")
    parser.add_argument("--images", type=int, default=600, help="source images, half of them to fit on")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    model, data = load(given.model), open_data(f"{given.data}:test").head(given.images)
    rows = [measure(model, data, eight_bit) for eight_bit in (False, True)]
    record = {
        "question": "Can a classifier of attack types name the attack on images it has not seen, and of other attacks?",
        "command": "python benchmarks/attack_types.py",
        "date": str(date.today()),
        "hardware": environment(),
        "data": data.source,
        "rows": rows,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")


def measure(model: Classifier, data: Data, eight_bit: bool) -> dict[str, Any]:
    """One table: detectors with and without rounding, on images in memory or of 8 bits."""
    learn, clean, judge = split(data, (0.5, 0.2, 0.3))
    options: dict[str, Any] = {"noise": NOISE, "eight_bit": eight_bit, "batch_size": 32}
    learnt, judged = gather(model, learn, SEEN, **options), gather(model, judge, SEEN | UNSEEN, **options)
    fresh = gather(model, clean, {}, eight_bit=eight_bit)
    row: dict[str, Any] = {"eight_bit": eight_bit, "fitted_on": len(learnt.x), "judged_on": len(judged.x)}
    for rounds in (True,) if eight_bit else (True, False):
        start = time.perf_counter()
        found = fit("attack-type", {"eight_bit": rounds}, model, learnt)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            found = calibrate(found, found.score(fresh.x, fresh.index))
            row["rounding" if rounds else "not rounding"] = {"fit_seconds": round(seconds, 1), **table(found, judged)}
    return row


def table(found: Fitted, judged: Learning) -> dict[str, Any]:
    """Per set: how often each kind is named, and the share that is flagged, with its 95 % interval."""
    assert judged.noisy is not None
    everyone = torch.arange(len(judged.x))
    sets = {"clean": (everyone, judged.x), "noisy": (everyone, judged.noisy), **judged.attacked}
    result: dict[str, Any] = {}
    for name, (at, images) in sets.items():
        if len(images) == 0:
            continue
        parts = images.split(32)
        p = torch.cat([found.detector.name(found.model, part, found.state, rng=None) for part in parts])
        numbers = judged.index[at].split(32)
        flags = found.flags(torch.cat([found.score(*pair) for pair in zip(parts, numbers, strict=True)]))
        named = p.argmax(1).bincount(minlength=len(found.kinds))
        rate = wilson(int(flags.sum()), len(flags))
        result[name] = {
            "named": dict(zip(found.kinds, named.tolist(), strict=True)),
            "flagged": [round(number, 4) for number in (float(flags.double().mean()), rate.low, rate.high)],
        }
        print(name, result[name], flush=True)
    kinds = found.kinds
    right = [result[kind]["named"][kind] / max(1, sum(result[kind]["named"].values())) for kind in kinds]
    print("accuracy over the kinds", sum(right) / len(right), flush=True)
    return {"accuracy": round(sum(right) / len(right), 4), "sets": result}


if __name__ == "__main__":
    main()
