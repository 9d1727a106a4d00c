"""How much memory does an audit of many images hold?

Question: peak resident memory of `rempart audit --suite fast` on the 10,000 test images of MNIST, in one process.

    rempart train --data mnist:../shared/data/mnist --out runs/lenet
    python benchmarks/memory.py [--data mnist:../shared/data/mnist:test] [--model runs/lenet]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from rempart.core.repro import environment
from rempart.report.store import read

RESULT = Path(__file__).parent / "results" / "memory.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist:../shared/data/mnist:test")
    parser.add_argument("--model", default="runs/lenet")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        audit = [sys.executable, "-m", "rempart", "audit", args.model, "--data", args.data, "--threat", "linf:0.1"]
        started = time.perf_counter()
        subprocess.run([*audit, "--suite", "fast", "--out", folder], check=True)
        seconds = time.perf_counter() - started
        report = read(folder)
    assert report.worst_case is not None
    record = {
        "question": "peak resident memory of an audit with the suite fast",
        "command": "python benchmarks/memory.py",
        "hardware": environment(),
        "date": date.today().isoformat(),
        "n": report.data.n,
        "seed": 0,
        "results": {
            "lenet, linf 0.1": {
                "peak MiB": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
                "seconds": round(seconds),
                "worst case": round(report.worst_case.value, 4),
                "low": round(report.worst_case.low, 4),
                "high": round(report.worst_case.high, 4),
                "stamp": report.stamp,
            }
        },
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["results"], indent=1))


if __name__ == "__main__":
    main()
