"""`python -m serve.web_of_tests FOLDER`: `rempart serve` on a free port, whose jobs only play."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rempart.serve import run
from rempart.serve.settings import Settings


def command(settings: Settings) -> list[str]:
    told = json.dumps(asdict(settings), default=str)
    return [sys.executable, "-m", "serve.worker_of_tests", told, "serve.play", "beside-serve"]


if __name__ == "__main__":
    run.command = command
    run.serve(Settings(folder=Path(sys.argv[1])), "127.0.0.1", 0, say=lambda line: print(line, flush=True))  # noqa: T201
