"""Does the service hold under load, and does its memory stay flat?

Question: of --clients clients that ask a guard for the class of an image over and over for --seconds, while --jobs jobs
wait in the queue and one runs: how many get an error, how long do they wait, and is any job lost or run twice? How much
memory does the web process have after each 1,000 of --requests requests?

How: `rempart serve` in a process of its own with a fresh data directory; everything goes through its API. A lenet is
trained on the embedded digits, mahalanobis is fitted and judged, and both become the guard. The clients are threads of
one process, each with one connection that is kept; the time of a request is from its first byte sent to the last byte
received. Service, clients and jobs share the cores of one machine. A job is an FGSM on 50 images, most of which is the
start of a process that loads torch. Memory is the resident set in /proc after the answer.

    python benchmarks/service_load.py [--clients 200] [--seconds 60] [--jobs 50] [--requests 10000]
"""

import argparse
import base64
import http.client
import io
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from rempart.core.repro import environment
from rempart.data import open_data

RESULT = Path(__file__).parent / "results" / "service_load.json"
API = "/api/v1"
TRAIN = {"kind": "train", "data": "digits", "model": "lenet", "options": {"epochs": 3}}
DETECT = {
    "kind": "detect",
    "data": "digits",
    "threat": "linf:0.2",
    "detectors": [{"name": "mahalanobis", "options": {}}],
    "attacks": [{"name": "fgsm", "options": {}}],
    "adaptive": False,
    "limit": 200,
}
ATTACK = {
    "kind": "attack",
    "data": "digits:test[:50]",
    "threat": "linf:0.1",
    "attack": {"name": "fgsm", "options": {}},
}


class Client:
    """One connection that is kept."""

    def __init__(self, address: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body)
        told = {"Content-Type": "application/json", **(headers or {})}
        self.connection.request(method, API + path, content, told)
        answer = self.connection.getresponse()
        found = answer.read()
        return answer.status, json.loads(found) if found else None

    def job(self, request: dict[str, Any], key: str | None = None) -> str:
        """Id of a new job."""
        status, found = self.ask("POST", "/jobs", request, {"Idempotency-Key": key} if key else None)
        assert status == 202, found
        return found["id"]

    def wait(self, id: str, seconds: float = 1800) -> dict[str, Any]:
        """A job that ended."""
        end = time.monotonic() + seconds
        while (found := self.ask("GET", f"/jobs/{id}")[1])["state"] in ("queued", "running"):
            assert time.monotonic() < end, found
            time.sleep(0.5)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service, address = started(Path(folder))
        try:
            found = measured(address, service.pid, Path(folder), given)
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(30)
    record = {
        "question": "errors, waiting times, lost jobs and memory of the service under load",
        "command": shlex.join(["python", "benchmarks/service_load.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": environment(),
        "results": found,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def started(folder: Path) -> tuple["subprocess.Popen[str]", str]:
    command = [sys.executable, "-m", "rempart", "serve", "--port", "0", "--folder", str(folder)]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    for line in service.stdout:
        if line.startswith("http"):
            return service, line.strip()
    raise SystemExit("the service did not start")


def measured(address: str, pid: int, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    one = Client(address)
    model = one.wait(one.job(TRAIN))
    assert model["state"] == "done", model
    detect = one.wait(one.job({**DETECT, "model": model["id"]}))
    assert detect["state"] == "done", detect
    status, guard = one.ask("POST", "/guards", {"name": "load", "job": detect["id"], "detector": "mahalanobis"})
    assert status == 201, guard
    path, body = f"/guards/{guard['id']}/predict", json.dumps({"images": [picture()]}).encode()

    def told(client: Client) -> int:
        return client.ask("POST", path, body)[0]

    assert told(one) == 200

    jobs = [one.job({**ATTACK, "model": model["id"], "seed": n}, f"load-{n}") for n in range(given.jobs)]
    waited, answers = load(address, told, given.clients, given.seconds)
    ends = Counter(one.wait(id)["state"] for id in jobs)
    attempts = [(folder / "jobs" / id / "attempts.jsonl").read_text().count('"begun"') for id in jobs]
    return {
        "load": {
            "clients": given.clients,
            "seconds": given.seconds,
            "requests": len(waited),
            "per_second": len(waited) / given.seconds,
            **{f"answers {status}": number for status, number in sorted(answers.items())},
            "seconds_p50": quantile(waited, 0.50),
            "seconds_p95": quantile(waited, 0.95),
            "seconds_p99": quantile(waited, 0.99),
            "seconds_max": max(waited),
        },
        "jobs": {"queued": given.jobs, **ends, "most attempts": max(attempts)},
        "memory": memory(address, told, pid, given.requests),
    }


def picture() -> str:
    """A digit as a PNG, base64."""
    data = open_data("digits:test").head(1)
    pixels = (data.batch(data.index[:1]).x[0, 0] * 255).round().byte().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def load(address: str, told: Callable[[Client], int], clients: int, seconds: float) -> tuple[list[float], Counter[str]]:
    """Seconds of each request, and how many were answered how."""
    waited: list[float] = []
    answers: Counter[str] = Counter()
    ready = threading.Barrier(clients)

    def ask() -> None:
        client = Client(address)
        ready.wait()
        until = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < until:
            try:
                answer = str(told(client))
            except (OSError, http.client.HTTPException) as error:
                answer, client = type(error).__name__, Client(address)
            waited.append(time.perf_counter() - begun)
            answers[answer] += 1

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return waited, answers


def memory(address: str, told: Callable[[Client], int], pid: int, requests: int) -> dict[str, Any]:
    """MiB of the web process after each 1,000 requests of 8 clients, and by how much the second half grew."""
    found: list[float] = []
    for _ in range(requests // 1000):
        threads = [threading.Thread(target=some, args=(address, told, 125)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found.append(resident(pid))
    half = found[len(found) // 2 :]
    return {"requests": requests, "mib": found, "growth_of_second_half_mib": half[-1] - half[0]}


def some(address: str, told: Callable[[Client], int], number: int) -> None:
    client = Client(address)
    for _ in range(number):
        assert told(client) == 200


def resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def quantile(values: list[float], q: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(q * 1000) - 1]


if __name__ == "__main__":
    main()
