"""Does Deep Defense gain on MNIST what its authors published?

Regenerates the MNIST half of the table of Yan, Guo, Zhang 2018 (arXiv:1803.00404) as a secondary source quotes it: an
MLP and a LeNet, fine-tuned from the same reference by each method; clean accuracy, rho_2 (mean length of the
perturbation of DeepFool with 5 steps over the length of the image) and accuracy under FGS at 0.2, 0.5 and 1.0 of
eps_ref, which is the smallest eps of FGS that fools Deep Defense on half of the test images. FGS and DeepFool are not
cut to the pixel box. FGS comes twice: by the gradient of cross-entropy in single precision, as one writes it down, and
by that of the log-odds, which has the same sign without rounding: for confident networks the former loses the term of
the true class.

    python benchmarks/deep_defense.py [--data ../shared/data/mnist] [--quick]

Two spaces. `published`: the network sees 255 x less the mean image, weights start as 0.01 N(0, 1), the reference is
trained with a learning rate of 0.001, and images are measured from the mean image. `unit`: the network sees pixels of
[0, 1], weights start as PyTorch draws them, learning rates are ours, and images are measured from black.

Methods: the reference; `fine-tuned` goes on with cross-entropy, as a control; `parseval` pulls the weights to
orthogonality after each step; `adversarial-fgs` and `adversarial-deepfool` take half of their loss on such images.
Which of the two the published `Adv. Train I` is, and with which eps, is not known: eps is chosen here on held out
images, for the greatest rho_2 among those that keep the accuracy of the reference. All fine-tuning: SGD with momentum
0.9, weight decay 5e-4, batches of 100, a learning rate of 5e-4 (published space) that is halved for the last fifth.
Every epoch of it takes a fresh random subset of the training images.

What is done is kept in --runs, and not repeated with the same settings.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rempart import models
from rempart.attacks.losses import climb_direction, score
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws, environment
from rempart.core.stats import student, wilson
from rempart.data import Data, open_data
from rempart.objectives.deep_defense import Plan, deep_defense, perturbations, ratios

RESULT = Path(__file__).parent / "results" / "deep_defense.json"
METHODS = ("reference", "fine-tuned", "parseval", "adversarial-fgs", "adversarial-deepfool", "deep-defense")
SHARES = (0.2, 0.5, 1.0)
PUBLISHED = {  # accuracy in %, rho_2, accuracy under FGS in %
    "mlp": {
        "reference": (98.31, 0.111, 72.76, 29.08, 3.31),
        "parseval": (98.32, 0.111, 77.44, 28.95, 2.96),
        "Adv. Train I": (98.49, 0.162, 87.70, 59.69, 22.55),
        "deep-defense": (98.65, 0.225, 95.04, 88.93, 50.00),
    },
    "lenet": {
        "reference": (99.02, 0.205, 90.95, 53.88, 19.75),
        "parseval": (99.10, 0.203, 91.68, 66.48, 19.64),
        "Adv. Train I": (99.18, 0.263, 95.20, 74.82, 41.40),
        "deep-defense": (99.34, 0.284, 96.51, 88.93, 50.00),
    },
}
NEEDED = {"mlp": 1.8, "lenet": 0.284 / 0.205}
NOTE = (
    "FGS and DeepFool with 5 steps are weak attacks, and rho_2 is an upper bound of the mean smallest perturbation "
    "where they succeed: nothing here says what a stronger attack would leave. Published figures after a secondary "
    "source; 88.93 stands there twice. The 50 % of Deep Defense at eps_ref hold by construction. The last 5,000 "
    "training images are held out to choose the eps of adversarial-fgs."
)
BETA = 3e-4  # of Parseval training


@dataclass(frozen=True)
class Space:
    """How a network sees images and is trained; lengths in pixels of [0, 1]."""

    reference_rate: float
    fine_rate: float
    centred: bool
    stabiliser: float


SPACES = {
    "published": Space(reference_rate=1e-3, fine_rate=5e-4, centred=True, stabiliser=255 * 5e-6),
    "unit": Space(reference_rate=5e-2, fine_rate=5e-3, centred=False, stabiliser=5e-6),
}


EPS_GRID = (0.01, 0.02, 0.04, 0.08, 0.12)


@dataclass(frozen=True)
class Settings:
    """What a stored result depends on besides its space, network, seed and method."""

    train_images: int
    epochs: int
    reference_epochs: int
    test_images: int
    eps: tuple[float, ...] = EPS_GRID


class Centred(nn.Module):
    """255 x less the mean image."""

    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * mean)

    def forward(self, x: Tensor) -> Tensor:
        """From pixels of [0, 1]."""
        return 255 * x - self.mean


@dataclass(frozen=True)
class Images:
    """The data in memory: training images but those held out, these, and the test images."""

    train: Data
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist"))
    parser.add_argument("--runs", type=Path, default=Path("runs/deep-defense"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=list(SPACES))
    parser.add_argument("--nets", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-images", type=int, default=15_000, help="of each epoch of fine-tuning; at most 55,000")
    parser.add_argument("--epochs", type=int, default=5, help="of fine-tuning")
    parser.add_argument("--reference-epochs", type=int, default=20, help="of the reference, over all training images")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--eps", type=float, nargs="+", default=EPS_GRID, help="tried for adversarial-fgs")
    parser.add_argument("--quick", action="store_true", help="a trial in minutes: one seed, MLP, few images")
    args = parser.parse_args()
    if args.quick:
        args.runs = args.runs / "quick"
        args.seeds, args.nets, args.out = 1, ["mlp"], args.runs / "quick.json"
        args.train_images, args.epochs, args.reference_epochs, args.test_images = 3000, 3, 3, 1000
    methods = [name for name in METHODS if name in {*args.methods, "reference", "deep-defense"}]
    settings = Settings(args.train_images, args.epochs, args.reference_epochs, args.test_images, tuple(args.eps))
    args.runs.mkdir(parents=True, exist_ok=True)
    images = read(args.data, settings)
    results: dict[str, Any] = {}
    for space in args.spaces:
        for net in args.nets:
            rows = [
                one_seed(Bench(args.runs, space, net, seed, settings), images, methods) for seed in range(args.seeds)
            ]
            results[f"{space} {net}"] = told = summary(net, rows, settings.test_images)
            show(f"{space} {net}", told)
    record = {
        "question": "Does Deep Defense gain on MNIST what its authors published?",
        "command": " ".join(["python", "benchmarks/deep_defense.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": environment(),
        "n": settings.test_images,
        "seeds": list(range(args.seeds)),
        "settings": {**asdict(settings), "spaces": {name: asdict(SPACES[name]) for name in args.spaces}},
        "note": NOTE,
        "published": PUBLISHED,
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, settings: Settings) -> Images:
    everything = open_data(f"mnist:{folder}", split="train").load()
    train, held = everything.take(torch.arange(55_000)), everything.take(torch.arange(55_000, 60_000))
    test = open_data(f"mnist:{folder}", split="test").load().head(settings.test_images)
    x, held_x, test_x = (data.read(data.index) for data in (train, held, test))
    return Images(train, x, train.labels, held_x, held.labels, test_x, test.labels, x.double().mean(0).float())


@dataclass(frozen=True)
class Bench:
    """One reference network, and everything made from it."""

    runs: Path
    space: str
    net: str
    seed: int
    settings: Settings

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is stored under a name, or else make and store it."""
        path = self.path(name).with_suffix(".json")
        if path.exists():
            stored = json.loads(path.read_text("utf-8"))
            if stored["settings"] == json.loads(json.dumps(asdict(self.settings))):
                return stored["figures"]
        started = time.perf_counter()
        figures = {**make(), "seconds": round(time.perf_counter() - started, 1)}
        path.write_text(json.dumps({"settings": asdict(self.settings), "figures": figures}, indent=1), "utf-8")
        print(path.stem, {key: value for key, value in figures.items() if not isinstance(value, dict)}, flush=True)
        return figures

    def path(self, name: str) -> Path:
        """Where something of this network is stored, without suffix."""
        return self.runs / f"{self.space}-{self.net}-{self.seed}-{name}"

    def generator(self) -> torch.Generator:
        """Draws that repeat with the seed."""
        return torch.Generator().manual_seed(1234 + self.seed)


def one_seed(bench: Bench, images: Images, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Figures of each method, those under FGS included."""
    figures = {name: bench.once(name, lambda name=name: trained(bench, images, name)) for name in methods}
    for kind in FGS:
        fgs = bench.once("-".join([kind, *methods]), lambda kind=kind: under_fgs(bench, images, methods, FGS[kind]))
        for name in methods:
            figures[name] = {**figures[name], kind: fgs["accuracy"][name], f"eps_ref, {kind}": fgs["eps_ref"]}
    return figures


def trained(bench: Bench, images: Images, method: str) -> dict[str, Any]:
    """Train, store the weights, and measure accuracy and rho_2."""
    extra: dict[str, Any] = {}
    model = fresh(bench, images)
    if method == "reference":
        space, count = SPACES[bench.space], len(images.x)
        fit(bench, model, images, plain, bench.settings.reference_epochs, space.reference_rate, count, halve=False)
    elif method == "adversarial-fgs":
        trials = {eps: tuned(bench, images, method, eps) for eps in bench.settings.eps}
        held = {
            eps: {"rho_2": rho_2(bench, trial, images, images.held_x)["rho_2"], "right": hits(trial, images)}
            for eps, trial in trials.items()
        }
        enough = hits(load(bench, images, "reference"), images)
        fine = [eps for eps in held if held[eps]["right"] >= enough]
        eps = max(fine, key=lambda eps: held[eps]["rho_2"], default=bench.settings.eps[0])
        model, extra = trials[eps], {"eps": eps, "held_out": {str(key): value for key, value in held.items()}}
    else:
        model = tuned(bench, images, method)
    torch.save(model.state_dict(), bench.path(method).with_suffix(".pt"))
    right = int((predictions(model, images.test_x) == images.test_y).sum())
    return {"right": right, **rho_2(bench, model, images, images.test_x), **extra}


def hits(model: Classifier, images: Images) -> int:
    return int((predictions(model, images.held_x) == images.held_y).sum())


def tuned(bench: Bench, images: Images, method: str, eps: float = 0.0) -> Classifier:
    """The reference, fine-tuned by a method."""
    model, space, after = load(bench, images, "reference"), SPACES[bench.space], None
    loss = plain
    if method == "parseval":
        after = parseval
    elif method == "adversarial-fgs":

        def loss(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
            return half(model, x, x + eps * direction(model, x, y), y)

    elif method == "adversarial-deepfool":

        def loss(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
            return half(model, x, x + deepfool(model, x, y, space), y)

    elif method == "deep-defense":
        origin = "mean" if space.centred else "black"
        objective = deep_defense(stabiliser=space.stabiliser, origin=origin)
        rng = Draws(bench.seed, torch.arange(100))
        if objective.before_epoch:
            objective.before_epoch(model, images.train, rng=rng, epoch=1)

        def loss(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
            return objective(model, x, y, rng=rng).value

    chosen = bench.settings
    fit(bench, model, images, loss, chosen.epochs, space.fine_rate, chosen.train_images, after=after)
    return model


def fresh(bench: Bench, images: Images) -> Classifier:
    """A network that has learnt nothing yet."""
    model = models.build(bench.net, shape=(1, 28, 28), num_classes=10, seed=bench.seed)
    if SPACES[bench.space].centred:
        generator = bench.generator()
        for name, parameter in model.named_parameters():
            scale = 0.0 if name.endswith("bias") else 0.01
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
        model.net = nn.Sequential(Centred(images.mean), model.net)
    return model.to(memory_format=torch.channels_last)


def load(bench: Bench, images: Images, method: str) -> Classifier:
    model = fresh(bench, images)
    model.load_state_dict(torch.load(bench.path(method).with_suffix(".pt"), weights_only=True))
    return model


def fit(
    bench: Bench,
    model: Classifier,
    images: Images,
    loss: Callable[[Classifier, Tensor, Tensor], Tensor],
    epochs: int,
    rate: float,
    count: int,
    *,
    halve: bool = True,
    after: Callable[[Classifier], None] | None = None,
) -> None:
    """SGD over batches of 100 of `count` images an epoch, chosen anew for each."""
    generator = bench.generator()
    optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    model.train()
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = rate * (0.5 if halve and epoch >= 0.8 * epochs else 1)
        for part in torch.randperm(len(images.x), generator=generator)[:count].split(100):
            value = loss(model, images.x[part], images.y[part])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            if after:
                after(model)
    model.eval()
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise SystemExit(f"the weights of {bench.path('')} are not finite")


def plain(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def half(model: Classifier, x: Tensor, other: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(torch.cat([x, other])), torch.cat([y, y]))


@torch.no_grad()
def parseval(model: Classifier) -> None:
    """W <- (1 + beta) W - beta W W^T W, kernels as matrices of one row per filter."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            w = layer.weight.flatten(1)
            layer.weight.copy_(((1 + BETA) * w - BETA * (w @ w.T) @ w).view_as(layer.weight))


def direction(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """Sign of the gradient of cross-entropy in single precision."""
    with frozen(model):
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(cross_entropy(model(x), y, reduction="sum"), x)[0].sign()


def exact_direction(model: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """The same without rounding: sign of the gradient of the log-odds, of which cross-entropy is a growing function."""
    with frozen(model):
        goal = score("ce", targeted=False, num_classes=model.num_classes)
        return climb_direction(model, x, y, goal)[0].sign()


def deepfool(model: Classifier, x: Tensor, y: Tensor, space: Space) -> Tensor:
    """Perturbations away from the class where it is predicted, else back to it."""
    with frozen(model):
        x = x.detach().requires_grad_(True)
        plan = Plan(stabiliser=space.stabiliser)
        return perturbations(lambda x, _: model(x), x, y, model(x), plan, create_graph=False).detach()


Way = Callable[[Classifier, Tensor, Tensor], Tensor]
FGS: dict[str, Way] = {"fgs": direction, "exact fgs": exact_direction}


@torch.no_grad()
def predictions(model: Classifier, x: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(500)])


def rho_2(bench: Bench, model: Classifier, images: Images, x: Tensor) -> dict[str, float]:
    """Mean ratio over all images, and the share of them that leave their class."""
    space = SPACES[bench.space]
    origin = images.mean if space.centred else torch.zeros(())
    values, fooled = [], 0
    for part in x.split(500):
        own = predictions(model, part)
        delta = deepfool(model, part, own, space)
        values.append(ratios(delta, part, origin))
        fooled += int((predictions(model, part + delta) != own).sum())
    return {"rho_2": float(torch.cat(values).double().mean()), "fooled": fooled / len(x)}


def under_fgs(bench: Bench, images: Images, methods: list[str], way: Way) -> dict[str, Any]:
    """eps_ref of the network of Deep Defense, in pixels of [0, 1], and who is right at which share of it."""
    nets = {method: load(bench, images, method).eval() for method in methods}
    x, y = images.test_x, images.test_y
    ways = {
        name: torch.cat([way(net, a, b) for a, b in zip(x.split(500), y.split(500), strict=True)])
        for name, net in nets.items()
    }

    def right(method: str, eps: float) -> int:
        return int((predictions(nets[method], x + eps * ways[method]) == y).sum())

    step, high = 1 / 255, 0.0
    while right("deep-defense", high) > len(x) / 2:
        high += 4 * step
        if high > 2:
            raise SystemExit("FGS does not fool Deep Defense on half of the images at any eps")
    low = max(0.0, high - 4 * step)
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if right("deep-defense", middle) > len(x) / 2 else (low, middle)
    accuracy = {method: {str(share): right(method, share * high) for share in SHARES} for method in methods}
    return {"eps_ref": high, "accuracy": accuracy}


def summary(net: str, rows: list[dict[str, dict[str, Any]]], n: int) -> dict[str, Any]:
    """Every figure per seed, with its mean over seeds and a 95 % interval; rates of one network with their own."""
    told: dict[str, Any] = {
        "eps_ref": {kind: spread([row["deep-defense"][f"eps_ref, {kind}"] for row in rows]) for kind in FGS},
        "methods": {},
    }
    for method in rows[0]:
        own = [row[method] for row in rows]
        rates = {"accuracy": [one["right"] for one in own]}
        rates |= {f"{kind} {share}": [one[kind][str(share)] for one in own] for kind in FGS for share in SHARES}
        told["methods"][method] = {
            **{key: {**spread([k / n for k in ks]), "each": [rate(k, n) for k in ks]} for key, ks in rates.items()},
            "rho_2": spread([one["rho_2"] for one in own]),
            "rho_2 ratio": spread([row[method]["rho_2"] / row["reference"]["rho_2"] for row in rows]),
            "fooled": spread([one["fooled"] for one in own]),
            "seconds": [one["seconds"] for one in own],
            **({"eps": [one["eps"] for one in own]} if "eps" in own[0] else {}),
        }
    told["acceptance"] = accepted(net, told["methods"])
    return told


def accepted(net: str, methods: dict[str, Any]) -> dict[str, bool]:
    mean = {
        name: {key: row[key]["mean"] for key in ("rho_2", "rho_2 ratio", "accuracy")} for name, row in methods.items()
    }
    ours = mean.pop("deep-defense")
    return {
        f"rho_2 grows {NEEDED[net]:.3f} times or more": ours["rho_2 ratio"] >= NEEDED[net],
        "accuracy not below the reference": ours["accuracy"] >= mean["reference"]["accuracy"],
        "rho_2 above every other method": all(ours["rho_2"] > other["rho_2"] for other in mean.values()),
        "rho_2 of adversarial-fgs above the reference": "adversarial-fgs" not in mean
        or mean["adversarial-fgs"]["rho_2"] > mean["reference"]["rho_2"],
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, its t-interval at 95 %, and the values of the seeds."""
    told = student(values)
    ends = {"low": told.low, "high": told.high} if len(values) > 1 else {}
    return {"mean": told.value, **ends, "seeds": values}


def rate(k: int, n: int) -> dict[str, Any]:
    return wilson(k, n).model_dump(include={"k", "n", "low", "high"})


def show(name: str, told: dict[str, Any]) -> None:
    eps = ", ".join(f"{255 * found['mean']:.1f}/255 by {kind}" for kind, found in told["eps_ref"].items())
    print(f"\n{name}: eps_ref {eps}\n{'':22} acc %  rho_2  ratio   @0.2   @0.5   @1.0   the same by exact fgs")
    for method, row in told["methods"].items():
        fgs = "".join(f"{100 * row[f'{kind} {share}']['mean']:7.2f}" for kind in FGS for share in SHARES)
        accuracy = 100 * row["accuracy"]["mean"]
        print(f"{method:21} {accuracy:6.2f} {row['rho_2']['mean']:6.4f} {row['rho_2 ratio']['mean']:6.3f}{fgs}")
    for method, row in PUBLISHED[name.split()[1]].items():
        print(
            f"  published {method:12} {row[0]:5.2f} {row[1]:6.4f}       "
            + "".join(f"{value:7.2f}" for value in row[2:])
        )
    for question, answer in told["acceptance"].items():
        print(f"  {question}: {'yes' if answer else 'NO'}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
