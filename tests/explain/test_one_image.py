"""One image file: what is illustrated, which class it counts as, and what is refused."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import toys
from rempart import tasks
from rempart.attacks.plan import EOT
from rempart.core.errors import DataError, SpecError
from rempart.core.threat import Threat
from rempart.data import open_data
from rempart.explain import Subject, explain
from rempart.explain import run as running
from rempart.models import build, load, save
from rempart.models.load import card
from rempart.report import store
from rempart.report.schema import AttackChoice, Check, ExplainSpec
from test_cli import rempart

PGD = (AttackChoice(name="pgd", options={"steps": 3}),)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("m") / "m"
    save(build("lenet", shape=(1, 8, 8), num_classes=10).eval(), folder, name="lenet", options={}, training={})
    return str(folder)


@pytest.fixture
def scan(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    return str(tmp_path / "scan.png"), pixels


def run(model, tmp_path, **changes):
    given = {"models": (model,), "threat": "linf:0.1", "attacks": PGD, "out": str(tmp_path / "run")}
    return tasks.run(ExplainSpec.model_validate(given | changes))


def shown(text):
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))).convert("L"))


def test_an_image_alone_is_measured_and_illustrated_as_what_the_model_takes_it_for(model, scan, tmp_path):
    path, pixels = scan
    report = run(model, tmp_path, image=path)
    with torch.no_grad():
        label = int(load(model)(torch.from_numpy(pixels / np.float32(255))[None, None]).argmax())
    (told,) = report.explained
    assert (told.pairs, told.tested, told.effects, report.data.source) == (1, 0, (), "scan.png")
    picture = report.illustration
    assert (picture.label, picture.predicted, picture.index) == (label, label, None)
    assert (shown(picture.original_png) == pixels).all()
    assert store.read(tmp_path / "run").spec.image == path


def test_beside_data_the_image_is_shown_and_the_data_are_measured(model, scan, tmp_path):
    given = {"data": "digits", "limit": 40, "test": 4, "draws": 2}
    alone = run(model, tmp_path, **given, out=str(tmp_path / "a"))
    both = run(model, tmp_path, **given, out=str(tmp_path / "b"), image=scan[0], label="3")
    assert both.explained == alone.explained and both.data == alone.data
    assert both.illustration.label == 3 and both.illustration.index is None
    assert (shown(both.illustration.original_png) != shown(alone.illustration.original_png)).any()


def test_what_does_not_fit_is_refused(model, scan, tmp_path):
    Image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save(tmp_path / "tall.png")
    with pytest.raises(DataError, match="8x8"):
        run(model, tmp_path, image=str(tmp_path / "tall.png"))
    with pytest.raises(SpecError, match="--label as one of 0, 1"):
        run(model, tmp_path, image=scan[0], label="cat")
    with pytest.raises(SpecError, match="--label beside --image"):
        run(model, tmp_path, data="digits", label="3")
    with pytest.raises(SpecError, match="--data or --image"):
        run(model, tmp_path)
    wrong = next(str(k) for k in range(10) if k != run(model, tmp_path, image=scan[0]).illustration.label)
    with pytest.raises(DataError, match="an image that the model takes for"):
        run(model, tmp_path, image=scan[0], label=wrong, out=str(tmp_path / "w"))


@pytest.mark.parametrize("random", [False, True])
def test_random_models_are_attacked_by_mean_gradients(monkeypatch, random):
    model, seen = toys.smooth((1, 4, 4)), []
    attack_batch = running.attack_batch

    def heard(model, x, y, threat, name, options, **rest):
        seen.append(options.get("eot"))
        return attack_batch(model, x, y, threat, name, options, **rest)

    monkeypatch.setattr(running, "attack_batch", heard)
    x = toys.images(model.shape, 6)
    y = toys.labels(model, x)
    data = open_data("digits").take(torch.arange(6))
    data = type(data)("t", "test", torch.arange(6), y, model.shape, ("0", "1", "2"), lambda numbers: x[numbers])
    spec = ExplainSpec(models=("a",), data="t", threat="linf:0.02", attacks=PGD, test=0, out="o")
    checks = (Check(name="determinism", status="warned", message="m"),) if random else ()
    explain({"a": Subject(model, card(model, "a"), checks)}, data, Threat.parse("linf:0.02"), spec)
    assert seen == [EOT if random else None]


@pytest.mark.parametrize("share", ["0", "2"])
def test_a_wrong_share_is_told_as_such(model, tmp_path, share, capsys):
    given = ["--data", "digits", "--threat", "linf:0.1", "--share", share, "--out", tmp_path / "o"]
    status, _, error = rempart("explain", model, *given, capsys=capsys)
    assert status == 2 and "a share in (0, 1]" in error and not (tmp_path / "o").exists()
