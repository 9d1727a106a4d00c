"""What a network takes for images, and what its outputs are called."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rempart.attacks.preflight import preflight
from rempart.core.errors import ModelError
from rempart.core.model import Classifier
from rempart.core.repro import digest_state
from rempart.data import Data, open_data
from rempart.models import build, load, save
from rempart.models.reading import read_as
from rempart.report.schema import AuditSpec, Reading
from rempart.report.store import read_spec
from rempart.tasks import run


class Seen(nn.Module):
    """Gives back the pixels it is shown."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def shown(box: str, x: Tensor) -> Tensor:
    model = Classifier(Seen(), shape=x.shape[1:], num_classes=x[0].numel())
    return read_as(model, Reading(box=box))(x).view(x.shape)


X = torch.rand((3, 2, 4, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ("0:255", X * 255),
        ("-1:1", X * 2 - 1),
        ("-1024:3071", X * 4095 - 1024),
        ("mean=0.5,std=0.25", (X - 0.5) / 0.25),
        (
            "mean=0.1,0.2,std=1,2e-1",
            (X - torch.tensor([0.1, 0.2])[:, None, None]) / torch.tensor([1, 0.2])[:, None, None],
        ),
        (
            "per-image",
            (X - X.mean((1, 2, 3), keepdim=True)) / X.var((1, 2, 3), correction=0, keepdim=True).add(1e-8).sqrt(),
        ),
    ],
)
def test_the_network_is_shown_what_the_box_says(box: str, expected: Tensor) -> None:
    assert torch.allclose(shown(box, X), expected, rtol=1e-5, atol=1e-6)


def test_every_8_bit_level_of_0_to_255_is_a_whole_number() -> None:
    levels = torch.arange(256).view(1, 1, 16, 16) / 255
    assert torch.equal(shown("0:255", levels).round().flatten(), torch.arange(256.0))
    assert float((shown("0:255", levels).flatten() - torch.arange(256)).abs().max()) < 1e-4


def test_an_image_of_one_colour_standardised_on_its_own_has_a_finite_gradient() -> None:
    x = torch.full((1, 1, 3, 3), 0.5).requires_grad_()
    shown("per-image", x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    "box", ["255", "1:0", "0:inf", "mean=0.5", "mean=0.5,std=0", "mean=1,2,3,std=1", "per-picture", "mean=1;std=2", ""]
)
def test_other_boxes_are_refused(box: str) -> None:
    with pytest.raises(ModelError):
        shown(box, X)


def test_a_model_with_a_box_of_its_own_and_wrong_names_are_refused() -> None:
    model = Classifier(Seen(), shape=(1, 1, 2), num_classes=2, high=255.0)
    with pytest.raises(ModelError, match="images in"):
        read_as(model, Reading(box="0:255"))
    for names in (("a",), ("a", "a"), ("a", "b", "c")):
        with pytest.raises(ModelError, match="2 different class names"):
            read_as(model, Reading(classes=names))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights twice: for images in [0, 1], and for images in [0, 255]."""
    folder = tmp_path_factory.mktemp("read")
    plain = build("mlp", shape=(1, 8, 8), num_classes=10, options={"first": 20, "second": 20})
    save(plain, folder / "plain", name="mlp", options={"first": 20, "second": 20})
    wide = build("mlp", shape=(1, 8, 8), num_classes=10, options={"first": 20, "second": 20})
    with torch.no_grad():
        wide.get_parameter("net.1.1.weight").div_(255)
    save(wide, folder / "wide", name="mlp", options={"first": 20, "second": 20})
    return folder


def audited(model: Path, reading: Reading, out: Path) -> tuple[str, float, str]:
    spec = AuditSpec(
        model=str(model),
        reading=reading,
        data="digits:test[:40]",
        threat="linf:0.1",
        attacks=({"name": "pgd", "options": {"steps": 5}},),  # type: ignore[arg-type]
        sweep=False,
        out=str(out),
    )
    report = run(spec)
    assert report is not None and report.samples is not None and report.worst_case is not None
    return report.samples.clean + report.samples.right["pgd"], report.worst_case.k, report.model.digest


def test_eps_keeps_its_meaning_and_a_replay_reads_the_model_in_the_same_way(saved: Path, tmp_path: Path) -> None:
    expected = audited(saved / "plain", Reading(), tmp_path / "a")
    box = audited(saved / "wide", Reading(box="0:255"), tmp_path / "b")
    assert box[:2] == expected[:2]
    spec = read_spec(tmp_path / "b" / "report.json")
    assert isinstance(spec, AuditSpec) and spec.reading == Reading(box="0:255")
    again = run(spec.model_copy(update={"out": str(tmp_path / "c")}))
    assert again is not None and again.model.digest == box[2]
    assert again.model.notes == ("Its network gets images in [0, 1] as 0:255.",)
    assert json.loads((tmp_path / "b" / "report.json").read_text())["spec"]["reading"]["box"] == "0:255"


def test_the_box_belongs_to_the_digest(saved: Path) -> None:
    digests = {
        digest_state(load(str(saved / "plain"), Reading(box=box)).state_dict()) for box in ("0:1", "0:255", "-1:1")
    }
    assert len(digests) == 3


NAMES = tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


def renamed(data: Data) -> Data:
    return replace(data, class_names=NAMES)


def test_classes_in_another_order_are_matched_by_name_sample_by_sample(saved: Path) -> None:
    data = renamed(open_data("digits:test[:40]"))
    straight = load(str(saved / "plain"), Reading(classes=NAMES))
    turned = load(str(saved / "plain"))
    last = turned.get_submodule("net.1.5")
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.copy_(last.weight[ORDER])
        last.bias.copy_(last.bias[ORDER])
    turned = read_as(turned, Reading(classes=tuple(NAMES[k] for k in ORDER)))
    seen = data.seen_by(turned)
    assert [seen.class_names[label] for label in seen.labels] == [NAMES[label] for label in data.labels]
    with torch.no_grad():
        right = straight(data.batch(torch.arange(40)).x).argmax(1) == data.labels
        also = turned(data.batch(torch.arange(40)).x).argmax(1) == seen.labels
    assert torch.equal(right, also) and 0 < int(right.sum()) < 40
    assert seen.digest == data.digest and data.seen_by(straight) is data
    assert seen.seen_by(straight).labels.tolist() == data.labels.tolist()
    check = next(check for check in preflight(turned, seen)[1] if check.name == "classes")
    assert check.status == "repaired" and "matched by name" in check.message and "zero, one" in check.message


def test_names_that_differ_are_matched_by_number(saved: Path) -> None:
    data = renamed(open_data("digits:test[:10]"))
    assert data.seen_by(load(str(saved / "plain"))) is data


def test_a_folder_keeps_the_box_it_was_trained_in(saved: Path, tmp_path: Path) -> None:
    reading = Reading(box="-1:1", classes=NAMES)
    model = load(str(saved / "plain"), reading)
    options = {"first": 20, "second": 20}
    save(model, tmp_path / "kept", name="mlp", options=options, box="-1:1")
    again = load(str(tmp_path / "kept"))
    x = open_data("digits:test[:4]").batch(torch.arange(4)).x
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and again.class_names == NAMES
    with pytest.raises(ModelError, match="built as mlp"):
        save(model, tmp_path / "lost", name="mlp", options=options)
