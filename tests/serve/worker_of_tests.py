"""`python -m serve.worker_of_tests SETTINGS MODULE [beside-serve]`: a worker whose jobs that module runs."""

import json
import sys
from pathlib import Path

from rempart.serve import worker
from rempart.serve.settings import Settings, prepared

if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    worker.CHILD = sys.argv[2] or worker.CHILD
    settings = prepared(Settings(**{**told, "folder": Path(told["folder"])}))
    worker.work(settings, beside_serve=len(sys.argv) > 3, ready=lambda: print("ready", flush=True))  # noqa: T201
