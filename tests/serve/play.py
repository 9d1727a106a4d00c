"""`python -m serve.play FOLDER`: the process of a job that plays what the model of its spec says.

steps N S       N pieces of work of S seconds, each written down once in played.txt and told as an event
die N           ends by SIGKILL in the first N attempts, then is done
exit N          ends with status N
eat             takes more and more memory
full            meets a full disk
refuse          meets a request that is wrong
deaf            hears no SIGINT
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from rempart.core.errors import SpecError
from rempart.core.events import Event, Notify
from rempart.serve import child


def play(spec: dict, told: Notify) -> None:
    verb, *rest = spec["model"].split()
    folder = Path(sys.argv[1])
    played = folder / "played.txt"
    past = played.read_text().split() if played.exists() else []
    if verb == "steps":
        for step in range(int(rest[0])):
            if str(step) not in past:
                time.sleep(float(rest[1]))
                with played.open("a") as file:
                    file.write(f"{step}\n")
                told(Event(stage=f"step {step}", done=step + 1, total=int(rest[0])))
    elif verb == "die":
        with played.open("a") as file:
            file.write("again\n")
        if len(past) < int(rest[0]):
            os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "exit":
        os._exit(int(rest[0]))
    elif verb == "eat":
        eaten = []
        while True:
            eaten.append(b"x" * 2**24)
            time.sleep(0.01)
    elif verb == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif verb == "refuse":
        raise SpecError("something else", got=f"{folder.resolve()}/run/x")
    elif verb == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        played.write_text("deaf")
        time.sleep(60)


if __name__ == "__main__":
    sys.modules["rempart.tasks"] = SimpleNamespace(run=play)  # without torch
    sys.modules["rempart.report.store"] = SimpleNamespace(read_spec=lambda path: json.loads(path.read_bytes()))
    sys.exit(child.main(Path(sys.argv[1])))
