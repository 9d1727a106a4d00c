"""How much memory and time does a step of training take on networks of ordinary size?

Question: peak resident memory of the process and seconds per step of each objective, on NIN (32x32, 10 classes),
AlexNet (224x224, 1,000 classes, 61 million weights, dropout) and ResNet-18 (224x224, 1,000 classes); random images.

    python benchmarks/training_size.py [plain deep-defense gfa adaptive sns] [--nets nin alexnet resnet18] [--batch 8]

How: one process for each, three steps of SGD, of which the first is not timed. Labels are the model's own predictions
for every second image and random for the others. Deep Defense gets a stabiliser so large that its steps are too short
to change a class: then no image is done early, which is the most memory and time that a batch can take.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

from rempart import models
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws, environment
from rempart.data import Data
from rempart.objectives import objectives

RESULT = Path(__file__).parent / "results" / "training_size.json"
LIMIT = 8192  # MiB
OPTIONS: dict[str, dict[str, Any]] = {"deep-defense": {"stabiliser": 100.0}}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["plain", "deep-defense", "gfa", "adaptive", "sns"])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", action="store_true", help="measure one objective on one network, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.names[0], args.nets[0], args.batch, args.threads)))
        return
    results: dict[str, dict[str, Any]] = {}
    for net in args.nets:
        for name in args.names:
            sizes = ["--batch", str(args.batch), "--threads", str(args.threads)]
            command = [sys.executable, __file__, name, "--nets", net, *sizes, "--one"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            told = results.setdefault(net, {})[name] = json.loads(done.stdout)
            print(f"{net:9} {name:13} {told['peak MiB']:6} MiB  {told['seconds per step']:8.2f} s", flush=True)
    record = {
        "question": "peak resident memory of a process that trains, and seconds per step",
        "command": " ".join(["python", "benchmarks/training_size.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": environment(),
        "n": args.batch,
        "seed": 0,
        "note": f"n images per step; weights, gradients, momentum and the interpreter are part of the memory; "
        f"the aim is to stay below {LIMIT} MiB",
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(name: str, net: str, batch: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = NETS[net]()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch, *model.shape), generator=generator)
    y = torch.randint(model.num_classes, (batch,), generator=generator)
    with frozen(model), torch.no_grad():
        y[::2] = model(x).argmax(1)[::2]
    rng = Draws(0, torch.arange(batch))
    data = Data("random", "train", torch.arange(batch), y, model.shape, model.class_names, lambda index: x[index])
    objective = objectives[name].function(**OPTIONS.get(name, {}))
    optimiser = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    model.train()
    seconds = []
    if objective.before_epoch:
        objective.before_epoch(model, data, rng=rng, epoch=1)
    for _ in range(STEPS):
        begun = time.perf_counter()
        loss = objective(model, x, y, rng=rng)
        optimiser.zero_grad()
        loss.value.backward()
        optimiser.step()
        if objective.after_step:
            objective.after_step(model, loss.parts)
        seconds.append(time.perf_counter() - begun)
    assert bool(loss.value.isfinite())
    return {
        "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "seconds per step": sum(seconds[1:]) / (STEPS - 1),
        "weights": sum(parameter.numel() for parameter in model.parameters()),
    }


def small() -> Classifier:
    return built(models.build("nin", shape=(3, 32, 32), num_classes=10))


def alexnet() -> Classifier:
    """The layout of Krizhevsky 2014 (arXiv:1404.5997) that the libraries carry."""

    def conv(before: int, after: int, kernel: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(before, after, kernel, stride, padding), nn.ReLU()]

    return built(
        Classifier(
            nn.Sequential(
                *conv(3, 64, 11, 4, 2),
                nn.MaxPool2d(3, 2),
                *conv(64, 192, 5, 1, 2),
                nn.MaxPool2d(3, 2),
                *conv(192, 384, 3),
                *conv(384, 256, 3),
                *conv(256, 256, 3),
                nn.MaxPool2d(3, 2),
                nn.Flatten(),
                nn.Dropout(),
                nn.Linear(256 * 6 * 6, 4096),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(4096, 4096),
                nn.ReLU(),
                nn.Linear(4096, 1000),
            ),
            shape=(3, 224, 224),
            num_classes=1000,
        )
    )


def resnet18() -> Classifier:
    """The packaged network with the stem for large images: a 7x7 convolution and max pooling, both of stride 2."""
    model = models.build("resnet18", shape=(3, 224, 224), num_classes=1000)
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    model.net[1][0] = nn.Sequential(*stem)
    return built(model)


def built(model: Classifier) -> Classifier:
    return model.to(memory_format=torch.channels_last)


NETS = {"nin": small, "alexnet": alexnet, "resnet18": resnet18}


if __name__ == "__main__":
    main()
