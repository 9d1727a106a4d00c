"""What a network returns: logits and probabilities told apart by statement, by structure, and by all images."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toys
from audit.planted import Function, behind
from rempart.attacks import attack_batch
from rempart.attacks.preflight import preflight
from rempart.core.errors import ModelError
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.data.samples import in_memory, spread
from rempart.models import load
from rempart.report.schema import Reading

SHAPE = (1, 4, 4)


def data_of(model: Classifier, x: Tensor):
    return in_memory("all", x, toys.labels(model, x), model.class_names)


def status(checks, name: str = "logits"):
    return next(check for check in checks if check.name == name)


def sorted_images(model: Classifier) -> Tensor:
    """100 images whose single logit lies in [0, 1], then 30 of others; all within [0, 1]."""
    x = torch.rand(8000, *SHAPE, generator=torch.Generator().manual_seed(3))
    s = model.net(x)[:, 0].detach()
    return torch.cat([x[(s > 0) & (s < 1)][:100], x[(s < 0) | (s > 1)][:30]])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("inside", [100, 130])
def test_a_logit_that_lies_in_0_1_on_the_first_images_or_on_all_is_a_logit(inside: int, turned: bool) -> None:
    model = toys.one_logit(SHAPE)
    x = sorted_images(model)[:inside]
    mended, checks = preflight(model, data_of(model, x.flip(0) if turned else x))
    assert status(checks).status == "passed"
    assert torch.equal(mended(x), model(x)), "the threshold is 0, as it was"


EXACT = {
    "softmax": (3, lambda z: z.softmax(1)),
    "F.softmax": (3, lambda z: F.softmax(z, dim=-1)),
    "handed on": (3, lambda z: z.softmax(1).clone().view(-1, 1, 3).double().squeeze(1)),
    "turned": (3, lambda z: z.flip(1).softmax(1).flip(1)),
    "sigmoids": (3, torch.sigmoid),
    "one sigmoid": (1, lambda z: z.sigmoid().reshape(-1)),
    "two steps": (3, lambda z: (z + z.softmax(1).sum(1, keepdim=True)).softmax(1)),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_logits_under_a_last_activation_are_read_where_its_outputs_saturate(name: str) -> None:
    """A scale of 40 makes softmax and sigmoid exactly 0 and 1 in float32: logarithms would have no gradient there."""
    outputs, last = EXACT[name]
    plain = toys.linear(SHAPE) if outputs > 1 else toys.one_logit(SHAPE)
    scaled = behind(plain, lambda z: 40 * z)
    x = torch.cat([toys.images(SHAPE, 20), torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(0))])
    data = data_of(plain, x)
    mended, checks = preflight(behind(scaled, last), data)
    assert status(checks).status == "repaired" and "taken off" in status(checks).message
    gap = mended(x) - scaled(x)
    assert torch.allclose(gap, gap[:, :1].expand_as(gap), atol=1e-4), "the logits, up to a constant per image"
    x, y = x[:20], data.labels[:20]
    threat = Threat(norm="linf", eps=float(toys.radius(plain, x, y, "linf").median()))
    verdict = attack_batch(mended, x, y, threat, "pgd").success
    assert torch.equal(verdict, attack_batch(scaled, x, y, threat, "pgd").success)


MEANT = {
    "log-softmax": (3, lambda z: z.log_softmax(1), "passed"),
    "weights behind softmax": (3, lambda z: 5 * z.softmax(1) @ torch.eye(3) - 2, "passed"),
    "temperature": (3, lambda z: z.softmax(1) / 2, "repaired"),
    "mean of softmaxes": (3, lambda z: (z.softmax(1) + (z / 2).softmax(1)) / 2, "repaired"),
    "kept off 0 and 1": (3, lambda z: z.softmax(1).clamp(1e-7, 1 - 1e-7), "repaired"),
    "exp of log-softmax": (3, lambda z: z.log_softmax(1).exp(), "repaired"),
    "two shares of one sigmoid": (1, lambda z: torch.cat([1 - z.sigmoid(), z.sigmoid()], 1), "repaired"),
    "one share of a softmax": (1, lambda z: torch.cat([0 * z, z], 1).softmax(1)[:, 1:], "repaired"),
    "mean of sigmoids": (1, lambda z: (z.sigmoid() + (z / 2).sigmoid()) / 2, "repaired"),
    "rescaled tanh": (1, lambda z: (z.tanh() + 1) / 2, "repaired"),
    "clamped": (1, lambda z: (z + 0.5).clamp(0, 1), "repaired"),
    "hardsigmoid": (1, F.hardsigmoid, "repaired"),
    "temperature of a logit": (1, lambda z: z / 1000, "passed"),
    "SiLU": (1, lambda z: 3 * F.silu(z), "passed"),
}


@pytest.mark.parametrize("name", MEANT)
def test_the_classes_are_those_of_the_logits_whatever_stands_behind_them(name: str) -> None:
    outputs, last, told = MEANT[name]
    plain = toys.linear(SHAPE) if outputs > 1 else toys.one_logit(SHAPE)
    x = torch.rand(130, *SHAPE, generator=torch.Generator().manual_seed(2))
    mended, checks = preflight(behind(plain, last), data_of(plain, x))
    assert status(checks).status == told
    assert torch.equal(mended(x).argmax(1), plain(x).argmax(1))


OPEN = {
    "sigmoid by hand": (1, lambda z: 1 / (1 + (-z).exp())),
    "without a graph": (1, lambda z: z.sigmoid().detach()),
    "weights that may take a mean": (1, lambda z: torch.cat([z, z], 1).sigmoid() @ torch.full((2, 1), 0.5)),
    "weights on several members": (
        1,
        lambda z: torch.cat([z.sigmoid(), (z / 2).sigmoid()], 1) @ torch.full((2, 1), 0.5),
    ),
    "weights on scaled members": (1, lambda z: torch.cat([z.tanh() + 1, z.tanh() + 1], 1) @ torch.full((2, 1), 0.25)),
    "weights on limited members": (1, lambda z: torch.cat([z, z], 1).add(0.5).clamp(0, 1) @ torch.full((2, 1), 0.5)),
    "hard sigmoid of relu6": (1, lambda z: F.relu6(3 * z + 3) / 6),
    "hard sigmoid of clamp": (1, lambda z: (z + 3).clamp(0, 6) / 6),
    "limited one by one": (1, lambda z: (z + 0.5).clamp(min=0).clamp(max=1)),
    "smaller and larger": (1, lambda z: (z + 0.5).minimum(torch.ones_like(z)).maximum(torch.zeros_like(z))),
    "kernels": (3, lambda z: (-z.square()).exp()),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_stays_open_is_asked_and_what_is_stated_holds(name: str) -> None:
    outputs, last = OPEN[name]
    plain = toys.linear(SHAPE) if outputs > 1 else toys.one_logit(SHAPE)
    x = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ModelError, match=r"--outputs logits or --outputs probabilities") as caught:
        preflight(behind(plain, last), data_of(plain, x))
    assert caught.value.exit_code == 2
    if outputs == 1 and name != "without a graph":
        shares, _ = preflight(behind(plain, last, output="probabilities"), data_of(plain, x))
        logits, _ = preflight(behind(plain, last, output="logits"), data_of(plain, x))
        assert torch.equal(shares(x).argmax(1), plain(x).argmax(1))
        assert torch.equal(logits(x).argmax(1), (logits.raw(x)[:, 0] > 0).long()), "the threshold is 0"


def test_a_statement_reaches_the_model_and_contradicts_none_of_its_own(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "stated.py").write_text(
        "import toys\nfrom rempart import Classifier\n"
        "def silent(): return toys.one_logit((1, 4, 4))\n"
        "def says(): return toys.one_probability((1, 4, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load("python:stated:silent").output is None
    assert load("python:stated:silent", Reading(outputs="probabilities")).output == "probabilities"
    assert load("python:stated:says", Reading(outputs="probabilities")).output == "probabilities"
    with pytest.raises(ModelError, match="as the model itself says"):
        load("python:stated:says", Reading(outputs="logits"))
    assert json.loads(Reading().model_dump_json())["outputs"] is None and Reading.model_validate({"box": "0:1"})


def test_an_undefined_answer_is_found_on_every_clean_image_and_names_it() -> None:
    plain = toys.linear(SHAPE)
    x = toys.images(SHAPE, 310)
    x[300] = 0
    broken = behind(plain, lambda z: z)
    broken.net = nn.Sequential(Function(lambda x: torch.where(x.amax((1, 2, 3), True) > 0, x, torch.nan)), plain.net)
    with pytest.raises(ModelError, match=r"finite outputs.*1 of 310 clean images.*sample 300"):
        preflight(broken, data_of(plain, x))


@pytest.mark.parametrize("at", [0, 150, 309])
def test_pixels_outside_the_box_are_found_wherever_they_are(at: int) -> None:
    plain = toys.linear(SHAPE)
    x = toys.images(SHAPE, 310)
    data = data_of(plain, x.clone())
    x[at, 0, 0, 0] = 1.5
    with pytest.raises(Exception, match="pixels in the model's box"):
        preflight(plain, in_memory("all", x, data.labels, data.class_names))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 630, 631, 10_000])
def test_every_beginning_of_a_spread_lies_evenly_also_over_periodic_data(count: int) -> None:
    order = spread(count)
    assert sorted(order.tolist()) == list(range(count))
    for limit in (8, 64):
        some = order[:limit].sort().values
        gaps = torch.diff(torch.cat([torch.tensor([-1]), some, torch.tensor([count])]))
        assert int(gaps.max()) <= math.ceil(3 * count / limit) + 1
    for period in (2, 3, 7, 10):
        if count >= 630:
            share = (order[:64] % period).bincount(minlength=period) / 64
            assert float((share - 1 / period).abs().max()) < 0.15, period


def test_gradients_hidden_in_one_class_of_sorted_data_are_found() -> None:
    """The first 300 images have gradients; those of the last class, darker than all others, have none."""
    plain = toys.linear(SHAPE)
    dark = toys.images(SHAPE, 60) * 0.5
    x = torch.cat([toys.images(SHAPE, 300), dark])
    hiding = behind(plain, lambda z: z)
    rounded = Function(lambda x: torch.where(x.mean((1, 2, 3), True) < 0.4, (x * 64).round() / 64, x))
    hiding.net = nn.Sequential(rounded, plain.net)
    check = status(preflight(hiding, data_of(hiding, x))[1], "gradients")
    assert check.status == "warned" and 0.1 < check.evidence["zero share"] < 0.25
