"""Is an audit of an odd but legal network right, under every suite?

How: the networks of tests/audit/odd.py see images of three pixels, so that brute force finds the exact worst case of
each image. Every suite audits every network; counted are images broken where nothing can be, images left that
something breaks, and what the audit said of itself. A network may be refused in words, too.

    python benchmarks/odd_networks.py [--suites fast standard]
"""

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from audit.odd import ODD, judged
from rempart.attacks.suites import SUITES
from rempart.core.errors import ModelError
from rempart.core.repro import environment

RESULT = Path(__file__).parent / "results" / "odd_networks.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="*", default=list(SUITES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    for suite in given.suites:
        for name in ODD:
            rows.append({"suite": suite, "network": name, **_row(name, suite)})
            print(rows[-1], flush=True)
    record = environment()
    content = {
        "question": "Is an audit of an odd but legal network right, under every suite?",
        "command": "python benchmarks/odd_networks.py",
        "date": date.today().isoformat(),
        "hardware": {key: record[key] for key in ("processor", "cores", "accelerator")},
        "versions": {key: record[key] for key in ("python", "torch", "numpy", "rempart")},
        "n": 12,
        "seed": 0,
        "seconds": round(time.perf_counter() - started),
        "suites": {suite: _summary([row for row in rows if row["suite"] == suite]) for suite in given.suites},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


def _row(name: str, suite: str) -> dict[str, Any]:
    try:
        found = judged(name, suite)
    except ModelError as error:
        return {"refused": str(error).partition("; ")[0]}
    checks = (*found.report.preflight, *found.report.checks)
    return {
        "stamp": found.report.stamp,
        "left": int(found.stands.sum()),
        "wrongly broken": found.wrongly_broken,
        "wrongly left": found.wrongly_left,
        "warned": [check.name for check in checks if check.status == "warned"],
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    judged_ = [row for row in rows if "stamp" in row]
    valid = [row for row in judged_ if row["stamp"] == "valid"]
    return {
        "networks": len(rows),
        "refused": len(rows) - len(judged_),
        "valid": len(valid),
        "valid and wrong": sum(row["wrongly left"] > 0 for row in valid),
        "not valid": len(judged_) - len(valid),
        "not valid and right": sum(row["wrongly left"] == 0 for row in judged_ if row["stamp"] != "valid"),
        "broken where nothing can be": sum(row["wrongly broken"] > 0 for row in judged_),
    }


if __name__ == "__main__":
    main()
