"""The guard: says what its classifier and its detector say, refuses what they cannot judge, and keeps in one folder."""

import csv
import importlib
import json
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import rempart
from rempart import detectors as detect
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.core.model import Classifier, metered
from rempart.core.repro import Draws
from rempart.detectors import Learning, State, detectors
from rempart.detectors.catalogue import Score
from rempart.guard import GUARD, Guarded, guard, load_guard, save_guard
from rempart.models import build, save
from rempart.models import load as load_model
from rempart.models.reading import read_as
from rempart.preprocess import defended
from rempart.report.schema import DefenceChoice, Reading
from test_cli import rempart as command

SHAPE, N = (1, 8, 8), 40
BYTES = torch.randint(0, 256, (N, *SHAPE), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
X = BYTES / 255
Y = torch.arange(N) % 3
DEFENCE = (DefenceChoice(name="bit-depth", options={"bits": 3}),)
FACTORY = """
from rempart import Classifier
from rempart.models import build

def classifier():
    return build("mlp", shape=(1, 8, 8), num_classes=3, class_names=("no, none", "b", "c"), seed=7)

def probable():
    import torch
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3), torch.nn.Softmax(1))
    return Classifier(net, shape=(1, 8, 8), num_classes=3)
"""


def network(seed: int = 3) -> Classifier:
    model = build("mlp", shape=SHAPE, num_classes=3, class_names=("no, none", "b", "c"), seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
        model(X).argmax(1)
    return model


def learnt(name: str, model: Classifier, folder: Path, fpr: float = 0.5, **options: Any) -> Path:
    """A detector, calibrated so that about half of `X` is rejected."""
    attacked = {name: (torch.arange(N), X.roll(shift, 0) ** power) for name, shift, power in (("a", 1, 2), ("b", 2, 3))}
    learning = Learning(x=X, y=Y, index=torch.arange(N), noisy=(X + 0.01).clamp(0, 1), attacked=attacked)
    fitted = detect.fit(name, options, model, learning)
    with torch.no_grad():
        detect.save(detect.calibrate(fitted, fitted.score(X, numbers(X)), fpr), folder)
    return folder


def numbers(x: Tensor) -> Tensor:
    """Sample numbers, from the pixels: CRC-32 of their bytes as float32."""
    return torch.tensor([zlib.crc32(image.numpy().astype("<f4").tobytes()) for image in x])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and detectors on it with and without a defence."""
    root = tmp_path_factory.mktemp("guard")
    model = network()
    save(model, root / "model", name="mlp")
    learnt("max-softmax", model, root / "bare")
    chain = defended(model, [(choice.name, choice.options) for choice in DEFENCE])
    learnt("knn", chain, root / "knn", k=3)
    learnt("attack-type", chain, root / "namer", epochs=5)
    return root


@pytest.fixture
def guarded(folders: Path) -> Guarded:
    return guard(str(folders / "model"), DEFENCE, folders / "knn", folders / "namer")


@pytest.fixture
def saved(guarded: Guarded, tmp_path: Path) -> Path:
    save_guard(guarded, tmp_path / "guard")
    return tmp_path / "guard"


def test_a_guard_keeps_how_its_model_is_read(folders: Path, tmp_path: Path) -> None:
    names = tuple(f"kind {k}" for k in range(network().num_classes))
    learnt("max-softmax", read_as(network(), Reading(box="-1:1")), tmp_path / "detector")
    reading = Reading(box="-1:1", classes=names)
    made = guard(str(folders / "model"), (), tmp_path / "detector", reading=reading)
    with torch.no_grad():
        expected = network()(2 * X - 1)
    assert torch.equal(made.predict(X).labels, expected.argmax(1))
    save_guard(made, tmp_path / "guard")
    again = load_guard(tmp_path / "guard")
    assert again.reading == reading
    assert again.predict(X).names == tuple(names[k] for k in expected.argmax(1))
    with pytest.raises(ModelError, match="was fitted on"):
        guard(str(folders / "model"), (), tmp_path / "detector")


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "guarded_factory.py").write_text(FACTORY, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "python:guarded_factory"
    sys.modules.pop("guarded_factory", None)


# ---- what it says


def test_it_says_what_classifier_and_detectors_say(guarded: Guarded, folders: Path) -> None:
    said = guarded.predict(X)
    levels = (X * 7).round() / 7
    p = load_model(str(folders / "model"))(levels).double().softmax(1).detach()
    assert said.labels.tolist() == p.argmax(1).tolist() and len(set(said.labels.tolist())) > 1
    assert said.names == tuple(("no, none", "b", "c")[label] for label in said.labels.tolist())
    torch.testing.assert_close(said.confidence, p.amax(1), rtol=1e-6, atol=1e-7)

    knn, namer = (detect.load(folders / name, guarded.classifier) for name in ("knn", "namer"))
    torch.testing.assert_close(said.scores, knn.score(X, torch.arange(N)).detach())
    assert knn.card.threshold is not None and said.threshold == knn.card.threshold.value
    assert said.accepted.tolist() == [score <= said.threshold for score in said.scores.tolist()]
    assert 0 < int(said.accepted.sum()) < N
    assert said.verdicts == tuple("accepted" if passed else "rejected" for passed in said.accepted.tolist())

    likely, kinds = namer.named(X, torch.arange(N)).max(1)
    assert namer.kinds == ("clean", "a", "b")
    for i, passed in enumerate(said.accepted.tolist()):
        assert said.attacks[i] == (None if passed else namer.kinds[int(kinds[i])])
        assert (
            said.probabilities[i] is None
            if passed
            else said.probabilities[i] == pytest.approx(float(likely[i]), abs=1e-4)
        )


def test_an_image_at_the_threshold_passes_and_the_next_number_does_not(guarded: Guarded) -> None:
    score = float(guarded.predict(X[:1]).scores)
    card, least = guarded.detector.card, float(np.nextafter(score, -np.inf))
    for value, passes in ((score, True), (least, False)):
        assert card.threshold is not None
        moved = card.model_copy(update={"threshold": card.threshold.model_copy(update={"value": value})})
        other = replace(guarded, detector=replace(guarded.detector, card=moved))
        assert other.predict(X[:1]).accepted.tolist() == [passes]


@pytest.mark.parametrize("name", [entry.name for entry in detectors])
def test_every_detector_leaves_the_prediction_alone(name: str, tmp_path: Path) -> None:
    """Also of a network with dropout, which a detector may let drop; the score is the detector's own."""
    model = build("nin" if name == "kernel-density" else "mlp", shape=SHAPE, num_classes=3, seed=1).eval()
    options: dict[str, Any] = {"passes": 2} if name == "kernel-density" else {}
    options |= {"k": 3} if name in ("knn", "lof", "lid") else {}
    options |= {"epochs": 1} if "epochs" in detectors[name].params.model_fields else {}
    fitted = detect.load(learnt(name, model, tmp_path, **options), model)
    said = Guarded(classifier=model, detector=fitted, source="").predict(X[:5])
    with torch.no_grad():
        p = model(X[:5]).double().softmax(1)
        scores = fitted.score(X[:5], numbers(X[:5]))
    torch.testing.assert_close(said.confidence, p.amax(1))
    torch.testing.assert_close(said.scores, scores)


def test_one_pass_serves_prediction_and_detector(guarded: Guarded, folders: Path) -> None:
    with metered(guarded.classifier) as meter:
        guarded.predict(X[:4])
    assert meter.queries == 4 + 2 * int((~guarded.predict(X[:4]).accepted).sum()), "the namer shows rejected ones twice"
    model = load_model(str(folders / "model"))
    blind = detect.fit("binary", {"epochs": 1}, model, Learning(x=X, y=Y, index=Y, attacked={"a": (Y[:9], X[:9])}))
    blind = detect.calibrate(blind, torch.arange(40.0))
    with metered(model) as meter:
        Guarded(classifier=model, detector=blind, source="").predict(X[:4])
    assert meter.queries == 4


def test_what_is_said_of_an_image_depends_on_no_other(folders: Path, tmp_path: Path) -> None:
    model = load_model(str(folders / "model"))
    fitted = detect.load(learnt("noise", model, tmp_path), model)
    noisy = Guarded(classifier=model, detector=fitted, source="")
    both, alone = noisy.predict(X[:6]), noisy.predict(X[5])
    torch.testing.assert_close(both.scores[5:], alone.scores, rtol=1e-5, atol=1e-6)
    twice = noisy.predict(torch.stack([X[0], X[0]])).scores
    torch.testing.assert_close(twice[0], twice[1], rtol=1e-5, atol=1e-6)


def test_threads_do_not_read_the_layers_of_each_others_images(guarded: Guarded) -> None:
    """Two threads show one image each, to a network that is slow enough for them to meet in it."""
    alone = [float(guarded.predict(X[i]).scores) for i in range(2)]
    last = [module for module in guarded.classifier.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda *_: time.sleep(0.02))
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda i: float(guarded.predict(X[i % 2]).scores), range(6)))
    assert together == pytest.approx(alone * 3) and alone[0] != alone[1]


def test_bytes_arrays_and_wider_floats_are_the_same_images(guarded: Guarded) -> None:
    said = guarded.predict(X)
    for same in (BYTES, BYTES.numpy(), X.double(), X.numpy()):
        other = guarded.predict(same)
        assert torch.equal(said.scores, other.scores) and torch.equal(said.confidence, other.confidence)
    one = guarded.predict(BYTES[3])
    assert one.labels.tolist() == said.labels[3:4].tolist()
    torch.testing.assert_close(one.scores, said.scores[3:4])


def test_arrays_in_any_memory_order_are_taken(guarded: Guarded) -> None:
    array = X.numpy()
    for view, same in ((array[::-1], X.flip(0)), (array[..., ::-1], X.flip(3)), (np.asfortranarray(array), X)):
        assert torch.equal(guarded.predict(view).scores, guarded.predict(same).scores)


def test_a_line_says_what_a_guard_and_a_prediction_are(guarded: Guarded, folders: Path) -> None:
    told = f"Guarded({str(folders / 'model')!r}, shape=(1, 8, 8), classes=3, defences=['bit-depth'], detector='knn'"
    assert repr(guarded) == f"{told}, namer='attack-type')"
    assert repr(replace(guarded, namer=None)) == f"{told})"
    said = guarded.predict(X)
    rejected = N - int(said.accepted.sum())
    assert repr(said) == f"Prediction(images=40, rejected={rejected}, threshold={said.threshold:.4g})"


def test_bytes_span_the_box_of_the_model(folders: Path, tmp_path: Path) -> None:
    model = network()
    model.low, model.high = -1.0, 3.0
    with pytest.raises(ModelError, match="the same weights, but other answers"):
        detect.load(folders / "bare", model)  # a detector belongs to the box that it was fitted in
    detector = replace(detect.load(folders / "bare", network()), model=model)
    wide = Guarded(classifier=model, detector=detector, source="")
    assert torch.equal(wide.predict(BYTES).scores, wide.predict(X * 4 - 1).scores)
    with pytest.raises(DataError, match=r"pixels in \[-1, 3\]"):
        wide.predict(X * 4.1 - 1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 8, 9), r"image of shape \(1, 8, 8\).*got \(1, 1, 8, 9\)"),
        (torch.zeros(1, 9, 8), r"got \(1, 9, 8\); resize images"),
        (torch.zeros(8, 8), r"image of shape .*got \(8, 8\); add the axis of channels: images\[None\]"),
        (torch.zeros(5, 8, 8), r"add the axis of channels: images\[:, None\]"),
        (torch.zeros(8, 8, 1), r"axis of channels first: np.moveaxis\(images, -1, -3\)"),
        (torch.zeros(5, 8, 8, 1), r"axis of channels first: np.moveaxis\(images, -1, -3\)"),
        (torch.zeros(3), "3 axes an image, channels first"),
        (torch.zeros(0, 1, 8, 8), "one image or more, got an empty batch"),
        (None, "an array of numbers, got NoneType"),
        (Path("scan.png"), "an array of numbers, got PosixPath"),
        ("scan.png", "an array of numbers, got str"),
        (torch.full(SHAPE, torch.nan), "finite pixels"),
        (torch.full(SHAPE, torch.inf), "finite pixels"),
        (torch.full(SHAPE, 255.0), r"pixels in \[0, 1\], got \[255, 255\]; give bytes as uint8"),
        (torch.full(SHAPE, -0.01), "pixels in"),
        (torch.zeros(SHAPE, dtype=torch.int64), "uint8, or floating-point"),
        (torch.zeros(SHAPE, dtype=torch.complex64), "uint8, or floating-point"),
        (np.array(["a"]), "tensor or an array of numbers, got an array of <U1"),
    ],
)
def test_images_it_cannot_judge_are_refused(guarded: Guarded, images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        guarded.predict(images)


def scored_by(score: Score, folders: Path) -> Guarded:
    """A guard whose detector has another score."""
    model = network()
    fitted = detect.load(folders / "bare", model)
    detector = replace(fitted.detector, score=score)
    return Guarded(classifier=model, detector=replace(fitted, detector=detector), source="")


def test_a_pass_of_other_images_is_not_taken_for_the_prediction(folders: Path) -> None:
    def score(model: Classifier, x: Tensor, state: State, *, rng: Draws) -> Tensor:
        return -(model(1 - x) + model(x.clone()))[:, 0].double()

    with torch.no_grad():
        p = network()(X).double().softmax(1)
    torch.testing.assert_close(scored_by(score, folders).predict(X).confidence, p.amax(1))


def test_what_is_no_number_is_rejected(folders: Path) -> None:
    scores = torch.tensor([-1e9, torch.nan, torch.inf]).double()
    guarded = scored_by(lambda model, x, state, *, rng: scores, folders)
    assert guarded.predict(X[:3]).verdicts == ("accepted", "rejected", "rejected")
    guarded.classifier.net.register_forward_hook(lambda _, x, z: torch.full_like(z, torch.nan))
    assert guarded.predict(X[:3]).verdicts == ("rejected", "rejected", "rejected")


# ---- what it is made of


def test_detectors_of_another_model_or_other_defences_are_refused(folders: Path, tmp_path: Path) -> None:
    save(network(seed=4), tmp_path / "other", name="mlp")
    with pytest.raises(ModelError, match="fitted on"):
        guard(str(tmp_path / "other"), DEFENCE, folders / "knn")
    for defences in ((), (DefenceChoice(name="bit-depth", options={"bits": 4}),)):
        with pytest.raises(ModelError, match="fitted on"):
            guard(str(folders / "model"), defences, folders / "knn")
    with pytest.raises(ModelError, match="fitted on"):
        guard(str(folders / "model"), DEFENCE, folders / "knn", folders / "bare")


def test_detectors_that_cannot_do_their_part_are_refused(folders: Path, tmp_path: Path) -> None:
    model = str(folders / "model")
    with pytest.raises(DataError, match="names attacks"):
        guard(model, DEFENCE, folders / "knn", folders / "knn")
    shutil.copytree(folders / "bare", tmp_path / "raw")
    card = json.loads((tmp_path / "raw" / "detector.json").read_text())
    (tmp_path / "raw" / "detector.json").write_text(json.dumps(card | {"threshold": None}))
    with pytest.raises(DataError, match="calibrated"):
        guard(model, (), tmp_path / "raw")
    with pytest.raises(SpecError, match="bits"):
        guard(model, [DefenceChoice(name="bit-depth", options={"bits": 99})], folders / "knn")


def test_probabilities_that_do_not_say_so_are_refused(factory: str, folders: Path) -> None:
    with pytest.raises(ModelError, match="says what it returns"):
        guard(f"{factory}:probable", (), folders / "bare")


# ---- on disk


def test_a_folder_is_all_that_is_needed(guarded: Guarded, saved: Path, tmp_path: Path) -> None:
    moved = saved.rename(tmp_path / "elsewhere")
    card = json.loads((moved / GUARD).read_text())
    assert set(card["files"]) == {p.relative_to(moved).as_posix() for p in moved.rglob("*.*")} - {GUARD}
    assert not any("/" in str(value) for value in card["defences"]) and str(tmp_path) not in json.dumps(card)
    again = rempart.load_guard(moved)
    before, after = guarded.predict(X), again.predict(X)
    assert torch.equal(before.scores, after.scores) and torch.equal(before.confidence, after.confidence)
    assert (before.names, before.verdicts, before.attacks) == (after.names, after.verdicts, after.attacks)
    save_guard(again, tmp_path / "copy")
    assert torch.equal(load_guard(tmp_path / "copy").predict(X).scores, before.scores)


@pytest.mark.parametrize("name", ["detector/detector.json", "model/weights.safetensors", "namer/detector.safetensors"])
def test_damage_is_noticed(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content.replace(b'"fpr":0.5', b'"fpr":0.6') if name.endswith("json") else content + b" ")
    if name.endswith("json"):
        text = json.loads(content)
        text["threshold"]["value"] += 1
        (saved / name).write_text(json.dumps(text))
    with pytest.raises(ModelError, match=f"the {name} that {GUARD} names"):
        load_guard(saved)
    (saved / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_guard(saved)


@pytest.mark.parametrize("change", [{"files": {"../x": "0"}}, {"extra": 1}, {"format_version": 2}])
def test_the_card_is_closed(saved: Path, change: dict[str, Any]) -> None:
    card = json.loads((saved / GUARD).read_text())
    (saved / GUARD).write_text(json.dumps(card | change))
    with pytest.raises(ModelError, match=r"damaged \(.+: [^\n]+\); make it again") as error:
        load_guard(saved)
    assert "pydantic" not in str(error.value)
    (saved / GUARD).unlink()
    with pytest.raises(ModelError, match=f"a folder with {GUARD}, got {saved} without {GUARD}$"):
        load_guard(saved)
    with pytest.raises(ModelError, match=r"got nowhere/guard, which does not exist$"):
        load_guard("nowhere/guard")


def test_no_half_of_a_folder_is_left(guarded: Guarded, folders: Path, tmp_path: Path) -> None:
    save(network(), tmp_path / "model", name="mlp")
    moved = guard(str(tmp_path / "model"), DEFENCE, folders / "knn")
    save(network(seed=9), tmp_path / "model", name="mlp")
    with pytest.raises(ModelError, match="fitted on"):
        save_guard(moved, tmp_path / "out" / "guard")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ModelError):
        save_guard(moved, tmp_path / "out" / "guard")
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / "guard").mkdir()
    with pytest.raises(SpecError, match="new folder"):
        save_guard(guarded, tmp_path / "out" / "guard")


def test_code_runs_only_when_the_caller_names_it(factory: str, tmp_path: Path) -> None:
    code = f"{factory}:classifier"
    model = load_model(code)
    guarded = guard(code, (), learnt("margin", model, tmp_path / "margin"))
    save_guard(guarded, tmp_path / "guard")
    sys.modules.pop("guarded_factory")
    for named in (None, "python:guarded_factory:probable"):
        with pytest.raises(ModelError, match="needs no code but Rempart's"):
            load_guard(tmp_path / "guard", model=named)
    assert "guarded_factory" not in sys.modules
    again = load_guard(tmp_path / "guard", model=code)
    assert torch.equal(again.predict(X).scores, guarded.predict(X).scores)


def test_weights_beside_code_are_copied(factory: str, tmp_path: Path) -> None:
    code = f"{factory}:classifier"
    save(network(), tmp_path / "trained", name=code)
    source = f"{code}@{tmp_path / 'trained'}"
    guarded = guard(source, (), learnt("margin", load_model(source), tmp_path / "margin"))
    save_guard(guarded, tmp_path / "guard")
    shutil.rmtree(tmp_path / "trained")
    again = load_guard(tmp_path / "guard", model=code)
    assert torch.equal(again.predict(X).scores, guarded.predict(X).scores)


def test_a_guard_that_holds_its_model_takes_no_other(saved: Path) -> None:
    with pytest.raises(ModelError, match="holds its own"):
        load_guard(saved, model="python:a:b")


def test_an_exported_program_is_copied(folders: Path, tmp_path: Path) -> None:
    example, sizes = torch.rand(2, *SHAPE), ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(network().net, (example,), dynamic_shapes=sizes), tmp_path / "net.pt2")
    source = str(tmp_path / "net.pt2")
    guarded = guard(source, (), learnt("margin", load_model(source), tmp_path / "margin"))
    save_guard(guarded, tmp_path / "guard")
    (tmp_path / "net.pt2").unlink()
    assert torch.equal(load_guard(tmp_path / "guard").predict(X).scores, guarded.predict(X).scores)


# ---- from the command line


def test_images_of_an_attack_are_data_for_a_guard(
    folders: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "d.npz", test_images=BYTES[:, 0].numpy(), test_labels=Y.numpy())
    adversarial, table = tmp_path / "adv.npz", tmp_path / "said.csv"
    attack = ["--data", tmp_path / "d.npz", "--attack", "fgsm", "--threat", "linf:0.2", "--out", adversarial]
    assert command("attack", folders / "model", *attack, capsys=capsys)[0] == 0
    status, printed, _ = command("guard", "predict", saved, "--data", adversarial, "--out", table, capsys=capsys)
    x = torch.from_numpy(np.load(adversarial)["x_adv"])
    assert status == 0 and float((x - X).abs().max()) == pytest.approx(0.2)
    said = load_guard(saved).predict(x)
    assert [float(row["score"]) for row in rows(table)] == pytest.approx(said.scores.tolist(), rel=1e-4)
    assert [int(row["label"]) for row in rows(table)] == Y.tolist() and "of 40 images rejected" in printed


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_commands(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, table = folders / "model", tmp_path / "guard", tmp_path / "said.csv"
    detectors = ["--detector", folders / "knn", "--namer", folders / "namer", "--defence", "bit-depth:bits=3"]
    status, printed, _ = command("guard", "make", model, *detectors, "--out", out, capsys=capsys)
    limit = load_guard(out).detector.card.threshold
    assert status == 0 and limit is not None
    told = f"knn rejects above {limit.value:.4g}, set for 0.5 false alarms on 40 clean images"
    assert printed.split("\n\n") == [told, f"{out}\n"]

    for i in range(3):
        Image.fromarray(BYTES[i, 0].numpy()).save(tmp_path / f"{i}.png")
    images = [tmp_path / f"{i}.png" for i in range(3)]
    status, printed, _ = command("guard", "predict", out, *images, "--out", table, capsys=capsys)
    said = load_guard(out).predict(X[:3])
    assert status == 0 and printed.startswith(f"{3 - int(said.accepted.sum())} of 3 images rejected")
    for i, row in enumerate(rows(table)):
        assert (row["image"], row["name"], row["verdict"]) == (str(images[i]), said.names[i], said.verdicts[i])
        assert float(row["score"]) == pytest.approx(float(said.scores[i]))
        assert row["attack"] == (said.attacks[i] or "") and float(row["threshold"]) == said.threshold

    np.savez(tmp_path / "d.npz", test_images=BYTES[:, 0].numpy(), test_labels=Y.numpy())
    data = ["--data", tmp_path / "d.npz", "--limit", "7", "--batch-size", "3"]
    assert "right class" not in printed and "label" not in rows(table)[0]
    status, printed, _ = command("guard", "predict", out, *data, "--out", table, capsys=capsys)
    assert status == 0 and [int(row["label"]) for row in rows(table)] == Y[:7].tolist()
    for verdict in ("accepted", "rejected"):
        right = [row["class"] == row["label"] for row in rows(table) if row["verdict"] == verdict]
        share = f"{np.mean(right):.1%} of the {len(right)} {verdict} have the right class"
        assert share in printed if right else f" {verdict} have" not in printed
    assert [float(row["score"]) for row in rows(table)] == pytest.approx(load_guard(out).predict(X[:7]).scores.tolist())

    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "wide.png")
    for arguments, message in (
        ([tmp_path / "wide.png"], "expected an image of 8x8, got 9x8"),
        ([tmp_path / "gone.png"], "a file that can be read"),
        ([], "image files or --data"),
        ([*images, "--out", tmp_path], "--out to name a file"),
        ([*images, *data], "image files or --data"),
    ):
        status, _, told = command("guard", "predict", out, "--out", table, *arguments, capsys=capsys)
        assert status == 2 and message in told
    status, _, told = command("guard", "predict", tmp_path / "gone", *images, "--out", tmp_path, capsys=capsys)
    assert status == 2 and "--out to name a file" in told, "before the guard is loaded"
