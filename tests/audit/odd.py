"""Odd but legal networks on images of three pixels, where the exact worst case can be found by looking everywhere.

`ODD` names the networks that an audit must judge rightly, `REFUSED` those that it must refuse in words.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from audit.planted import Reversed, Rounded
from rempart.audit import audit
from rempart.core.model import Classifier, Output, placed
from rempart.core.types import Images, Labels, Logits, Mask, Scores
from rempart.data import Data
from rempart.report.schema import AuditSpec, ModelCard, Report

SHAPE = (1, 1, 3)
EPS = 0.12


class Net(nn.Module):
    """What `forward(x, net)` gives for pixels x of shape (n, 3), with 3 classes and seeded weights."""

    def __init__(self, compute: Callable[[Tensor, "Net"], object], num_classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.compute = compute
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, num_classes)
        self.plain = nn.Linear(3, num_classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.plain.bias.zero_()

    def mlp(self, x: Tensor) -> Logits:
        """A hidden layer of eight smooth units."""
        return self.last(torch.tanh(self.first(2 * x - 1)))

    def forward(self, x: Images) -> object:
        """Flatten and compute."""
        return self.compute(x.flatten(1), self)


def _standardised(x: Tensor, net: Net) -> Logits:
    return net.plain((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True))


def _hue(x: Tensor, net: Net) -> Logits:
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return net.mlp((x - low) / (high - low)) + high


def _in_place(x: Tensor, net: Net) -> Logits:
    x.clamp_(0.3, 0.7)
    return net.mlp(x)


def _behind_the_back(x: Tensor, net: Net) -> Logits:
    x.data.clamp_(0.3, 0.7)
    return net.mlp(x)


def _autocast(x: Tensor, net: Net) -> Logits:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.plain(x)


class Members(nn.Module):
    """Two members in a plain list, which `modules()` does not reach; each drops half of its units in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.members = [nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)) for _ in range(2)]
        generator = torch.Generator().manual_seed(6)
        for member in self.members:
            for parameter in member.parameters():
                nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Images) -> Logits:
        return sum((member(x.flatten(1)) for member in self.members), torch.zeros(()))


class Attention(nn.Module):
    """Attention of each pixel to all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(1, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(12, 3)
        _refill(self, 6, 1.0)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Images) -> Logits:
        tokens = self.embed(4 * x.flatten(1)[:, :, None] - 2)
        return self.out(self.attend(tokens, tokens, tokens, need_weights=False)[0].flatten(1))


class Recurrent(nn.Module):
    """An LSTM that reads the pixels one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.out = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 3)
        _refill(self, 0, 1.0)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Images) -> Logits:
        return self.out(self.read(4 * x.flatten(1)[:, :, None] - 2)[0][:, -1])


def _refill(net: nn.Module, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def _mlp(x: Tensor, net: Net) -> Logits:
    return net.mlp(x)


def _again(reentrant: bool) -> Callable[[Tensor, Net], object]:
    return lambda x, net: checkpoint(net.mlp, x, use_reentrant=reentrant)


def _small_ints() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    _refill(net, 3, 1.0)
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def _normed() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh())
    _refill(net, 3, 1.0)
    return net


def _made(compute: Callable[[Tensor, Net], object], num_classes: int = 3) -> Callable[[], nn.Module]:
    return lambda: Net(compute, num_classes)


def _cast(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    return net.to(dtype)


ODD: dict[str, Callable[[], nn.Module]] = {
    "square root": _made(lambda x, net: net.plain(x.sqrt())),
    "power": _made(lambda x, net: net.mlp(x.pow(0.2))),
    "logarithm": _made(lambda x, net: net.plain(x.log() / 4)),
    "standardised": _made(_standardised),
    "unit length": _made(lambda x, net: net.plain(x / x.norm(dim=1, keepdim=True))),
    "hue": _made(_hue),
    "angle": _made(lambda x, net: net.mlp(torch.atan2(x - 0.5, x.flip(1) - 0.5))),
    "in place": _made(_in_place),
    "autocast": _made(_autocast),
    "half head": _made(lambda x, net: net.mlp(x).half()),
    "double head": _made(lambda x, net: net.mlp(x).double()),
    "double": lambda: _cast(Net(_mlp), torch.float64),
    "list of members": Members,
    "one output": _made(_mlp, 1),
    "one probability": _made(lambda x, net: net.mlp(x).sigmoid(), 1),
    "one output between 0 and 1": _made(lambda x, net: (net.mlp(x) * 0.02 + 0.5).clamp(0, 1), 1),
    "softmax": _made(lambda x, net: net.mlp(x).softmax(1)),
    "saturated softmax": _made(lambda x, net: (40 * net.mlp(x)).softmax(1)),
    "mean of softmaxes": _made(lambda x, net: (net.mlp(x).softmax(1) + net.plain(x).softmax(1)) / 2),
    "log softmax": _made(lambda x, net: net.mlp(x).log_softmax(1)),
    "sigmoids": _made(lambda x, net: net.mlp(x).sigmoid()),
    "huge logits": _made(lambda x, net: 1e19 * net.mlp(x)),
    "tiny logits": _made(lambda x, net: 1e-12 * net.mlp(x)),
    "attention": Attention,
    "recurrent": Recurrent,
    "checkpoint": _made(_again(False)),
    "reentrant checkpoint": _made(_again(True)),
    "spatial outputs": _made(lambda x, net: net.mlp(x)[:, :, None, None]),
    "squeezed": _made(lambda x, net: net.mlp(x).squeeze()),
    "largest pixel": _made(lambda x, net: net.mlp(F.max_pool1d(x[:, None], 2, 1)[:, 0] @ x.new_ones(2, 3))),
    "weight norm": _normed,
    "quantiser": _made(lambda x, net: net.mlp(Rounded.apply(x))),
    "rounded": _made(lambda x, net: net.mlp((x * 7).round() / 7 + 0 * x)),
    "partly rounded": _made(lambda x, net: net.mlp((x * 7).round() / 7 + 0.01 * x)),
    "wrong gradient": _made(lambda x, net: net.mlp(Reversed.apply(x))),
    "partly detached": _made(lambda x, net: net.mlp(x.detach()) + 0.01 * net.plain(x)),
    "quantised weights": _small_ints,
}
"""Networks that are judged rightly, or of which the audit says that its figures are not to be trusted."""


def _fixed(x: Tensor, net: Net) -> Logits:
    return net.mlp(x.reshape(16, 3))


def _blended(x: Tensor, net: Net) -> Logits:
    return net.mlp(x - x.mean(0))


def _lookup(x: Tensor, net: Net) -> Logits:
    return net.mlp((x * 255).long().to(x.dtype) / 255)


def _without_gradients(x: Tensor, net: Net) -> Logits:
    with torch.no_grad():
        return net.mlp(x)


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "in place behind autograd": _made(_behind_the_back),
    "tuple": _made(lambda x, net: (net.mlp(x), x)),
    "dictionary": _made(lambda x, net: {"logits": net.mlp(x)}),
    "list": _made(lambda x, net: [net.mlp(x)]),
    "fixed batch": _made(_fixed),
    "blended batch": _made(_blended),
    "no gradient": _made(_without_gradients),
    "table look-up": _made(_lookup),
    "lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)),
    "meta weights": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 3, device="meta")),
    "wrong channels": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten()),
    "statistics of the batch": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3, track_running_stats=False)),
    "several rows": _made(lambda x, net: torch.cat([net.mlp(x), net.mlp(x)])),
    "too many outputs": _made(lambda x, net: torch.cat([net.mlp(x), net.mlp(x)], 1)),
    "not a number": _made(lambda x, net: net.mlp(x) / 0.0),
    "half precision": lambda: _cast(Net(_mlp), torch.bfloat16),
}
"""Networks for which there is no verdict: refused before any attack, with status 2."""


def classifier(net: nn.Module, output: Output | None = None) -> Classifier:
    """The network as a classifier: of two classes where it has one output."""
    single = isinstance(net, Net) and net.last.out_features == 1
    return Classifier(net, shape=SHAPE, num_classes=2 if single else 3, output=output).eval()


def pixels(n: int = 12, *, black: bool = True) -> Images:
    """n images; one is nearly grey, and in some a pixel lies at the edge of the box (in none at 0 but for `black`)."""
    x = torch.rand((n, *SHAPE), generator=torch.Generator().manual_seed(11)) * 0.96 + 0.02
    x[1, 0, 0, 1], x[2, 0, 0, 0] = 0.01 - 0.01 * black, 1.0
    x[3] = torch.tensor([0.45, 0.5, 0.55])
    return x


def narrowest(model: Classifier, x: Images, y: Labels, eps: float) -> Scores:
    """The least margin of each image over the box and its linf ball, by a grid that is refined three times.

    Minus infinity where an image has no answer: NaN, or two classes at the same infinity.
    """
    steps = torch.linspace(-1, 1, 17, dtype=torch.float64)
    around = torch.cartesian_prod(steps, steps, steps).view(-1, *SHAPE)
    least = torch.empty(len(x), dtype=torch.float64)
    for k, (image, label) in enumerate(zip(x.double(), y.tolist(), strict=True)):
        low, high = (image - eps).clamp(0, 1), (image + eps).clamp(0, 1)
        centre, reach, best = image, torch.full_like(image, eps), math.inf
        for _ in range(4):
            points = (centre + around * reach).clamp(low, high)
            z = model(placed(model, points.to(x.dtype))).double()
            margin = _margins(z, label)
            place = int(margin.argmin())
            if float(margin[place]) < best:
                best, centre = float(margin[place]), points[place]
            reach = reach / 6
        least[k] = best
    return least


def _margins(z: Logits, label: int) -> Scores:
    others = z.clone()
    others[:, label] = -math.inf
    margin = z[:, label] - others.amax(1)
    return torch.where(margin.isnan(), -math.inf, margin)


@dataclass(frozen=True, slots=True)
class Judged:
    """An audit beside brute force.

    Attributes:
        report: The audit.
        stands: Images that no attack broke.
        least: Their least margins by brute force.
        sure: From this margin on, rounding does not decide.
    """

    report: Report
    stands: Mask
    least: Scores
    sure: float

    @property
    def wrongly_broken(self) -> int:
        """Images broken where nothing can be."""
        return int((~self.stands & (self.least > self.sure)).sum())

    @property
    def wrongly_left(self) -> int:
        """Images left that some image within the threat breaks."""
        return int((self.stands & (self.least < -self.sure)).sum())


def judged(name: str, suite: str) -> Judged:
    """One of `ODD` under a suite.

    Raises:
        ModelError: If the audit refuses it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantisation and reentrant checkpoints; users have both
        net = ODD[name]()
        truth = classifier(net, "probabilities" if name in SHARES else None)
        x = pixels(black=name != "logarithm")
        with torch.no_grad():
            z = truth(placed(truth, x))
            least = narrowest(truth, x, z.argmax(1), EPS)
        report = audited(net, x, z.argmax(1), suite)
    assert report.samples is not None
    stands = torch.from_numpy(report.samples.worst_case())
    return Judged(report, stands, least, 1e-3 * float(z.double().abs().amax()))


def audited(net: nn.Module, x: Images, y: Labels, suite: str) -> Report:
    """A whole audit of a network, with these images as data."""
    model = classifier(net)
    data = Data("odd", "test", torch.arange(len(x)), y, model.shape, model.class_names, lambda numbers: x[numbers])
    card = ModelCard(source="", name="", digest="", parameters=0, shape=model.shape, classes=model.class_names)
    spec = AuditSpec(model="", data="", threat=f"linf:{EPS}", suite=suite, sweep=False)
    result = audit(model, data, spec, card=card)
    assert result is not None and result.error is None and result.report.complete
    return result.report


SHARES = ("one probability", "one output between 0 and 1")
"""Of one output, whose probabilities brute force has to be told."""
