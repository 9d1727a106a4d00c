"""What the service answers at once, against closed forms, manual softmax, and threads that get in each other's way."""

import base64
import io
import json
import math
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import toys
from rempart.attacks import attacks
from rempart.attacks.plan import EOT
from rempart.core.errors import DataError, ModelError, SpecError, ThreatError
from rempart.core.model import BlackBox, Classifier
from rempart.data import files
from rempart.guard import Guarded, guard, save_guard
from rempart.models import build, save
from rempart.preprocess import defended
from rempart.report.schema import AttackChoice, DefenceChoice, Reading
from rempart.serve import live
from rempart.serve.live import Cache, Trial, attack_choices, predict, read_images, try_image
from test_guard import DEFENCE, X, learnt, network

FGSM, PGD = AttackChoice(name="fgsm"), AttackChoice(name="pgd")
BITS = DefenceChoice(name="bit-depth", options={"bits": 2})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a guard on it behind a defence."""
    root = tmp_path_factory.mktemp("live")
    save(network(), root / "model", name="mlp")
    chain = defended(network(), [(choice.name, choice.options) for choice in DEFENCE])
    learnt("knn", chain, root / "knn", k=3)
    learnt("attack-type", chain, root / "namer", epochs=5)
    save_guard(guard(str(root / "model"), DEFENCE, root / "knn", root / "namer"), root / "guard")
    return root


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The loads of models, each of which takes a while."""
    seen: list[str] = []
    load = live.load

    def counted(source: str, reading: Reading) -> Classifier:
        seen.append(Path(source).name)
        time.sleep(0.05)
        return load(source, reading)

    monkeypatch.setattr(live, "load", counted)
    return seen


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(function: Callable[[int], Any], threads: int) -> list[Any]:
    gate = threading.Barrier(threads)

    def one(number: int) -> Any:
        gate.wait()
        return function(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(threads)))


# ---- what was loaded


def test_threads_that_ask_at_once_wait_for_one_load(folders: Path, loads: list[str]) -> None:
    cache = Cache(2)
    found = together(lambda _: cache.classifier(str(folders / "model")), 8)
    assert loads == ["model"] and len({id(model) for model in found}) == 1


def test_a_load_keeps_nobody_from_another_model(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(network(seed=4), tmp_path / "other", name="mlp")
    cache, load, gate = Cache(2), live.load, threading.Event()

    def stuck(source: str, reading: Reading) -> Classifier:
        assert source.endswith("other") or gate.wait(20)
        return load(source, reading)

    monkeypatch.setattr(live, "load", stuck)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(cache.classifier, str(folders / "model"))
        cache.classifier(str(tmp_path / "other"))
        assert not waiting.done()
        gate.set()
        assert waiting.result(20).num_classes == 3


def test_a_replaced_file_is_loaded_again(tmp_path: Path, loads: list[str]) -> None:
    cache, source = Cache(2), str(tmp_path / "model")
    for seed in (3, 3, 4):  # the files are of one size
        save(network(seed), source, name="mlp")
        model = cache.classifier(source)
        with torch.no_grad():
            assert torch.equal(model(X), network(seed)(X))
        assert cache.classifier(source) is model
    assert len(loads) == 3


def test_the_least_recently_used_goes(tmp_path: Path, loads: list[str]) -> None:
    for name in "abc":
        save(network(), tmp_path / name, name="mlp")
    cache = Cache(2)
    for name in "abacab":  # c drives b out
        cache.classifier(str(tmp_path / name))
    assert loads == ["a", "b", "c", "b"]


def test_what_cannot_be_loaded_drives_nothing_out_and_is_tried_again(
    folders: Path, tmp_path: Path, loads: list[str]
) -> None:
    cache, late = Cache(1), str(tmp_path / "late")
    model = cache.classifier(str(folders / "model"))
    with pytest.raises(ModelError, match="does not exist"):
        cache.classifier(late)
    assert cache.classifier(str(folders / "model")) is model
    save(network(), late, name="mlp")
    assert cache.classifier(late).num_classes == 3
    assert loads == ["model", "late", "late"]


def test_defences_and_readings_are_part_of_the_question(folders: Path, loads: list[str]) -> None:
    cache, source = Cache(4), str(folders / "model")
    bare, behind = cache.classifier(source), cache.classifier(source, defences=(BITS,))
    assert loads == ["model"]
    assert not any(parameter.requires_grad for parameter in behind.parameters())
    with torch.no_grad():
        torch.testing.assert_close(behind(X), bare((X * 3).round() / 3))
        torch.testing.assert_close(cache.classifier(source, Reading(box="-1:1"))(X), bare(2 * X - 1))
    with pytest.raises(SpecError, match="bits"):
        cache.classifier(str(folders / "nothing"), defences=(DefenceChoice(name="bit-depth", options={"bits": 0}),))


def test_a_model_is_read_as_an_audit_reads_it_and_stays_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "live_factory.py").write_text(
        "import torch\nfrom rempart import Classifier\n\n\ndef probable():\n    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3), torch.nn.Softmax(1))\n"
        "    return Classifier(net, shape=(1, 4, 4), num_classes=3).train()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = Cache(1).classifier("python:live_factory:probable")
    x = toys.images((1, 4, 4))
    net = sys.modules.pop("live_factory").probable().net
    said = torch.tensor([[*told.probabilities.values()] for told in predict(model, x)])
    torch.testing.assert_close(said, net(x).detach())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_guards_are_kept_too(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, seen = Cache(1), []
    load_guard = live.load_guard
    monkeypatch.setattr(live, "load_guard", lambda folder: seen.append(folder) or load_guard(folder))
    first = cache.guard(folders / "guard")
    assert cache.guard(folders / "guard") is first and seen == [folders / "guard"]


# ---- images


def encoded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=form, **options)
    return stream.getvalue()


def png_of(width: int, height: int, lines: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("BMP", {}), ("GIF", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})],
)
def test_pixels_of_every_lossless_format_land_in_the_box(form: str, options: dict[str, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5), dtype=np.uint8)
    grey = np.repeat(pixels[..., None], 3, axis=2) if form == "WEBP" else pixels
    read = read_images([encoded(grey, form, **options)] * 2, (1, 6, 5), -1.0, 3.0)
    assert read.x.shape == (2, 1, 6, 5) and read.x.dtype == torch.float32 and read.notes == ()
    torch.testing.assert_close(read.x[1, 0], torch.from_numpy(pixels) / 255 * 4 - 1)


def test_colour_and_grey_become_what_the_model_takes() -> None:
    colour = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    luma = torch.from_numpy(colour @ np.array([0.299, 0.587, 0.114]) / 255).float()
    grey = read_images([encoded(colour)], (1, 4, 4), 0, 1).x[0, 0]
    assert (grey - luma).abs().max() <= 1 / 255
    back = read_images([encoded(colour[..., 0])], (3, 4, 4), 0, 1).x[0]
    assert torch.equal(back, torch.from_numpy(colour[..., 0] / 255).float().expand(3, 4, 4))
    deep = np.array([[0, 257], [32768, 65535]], dtype=np.uint16)
    torch.testing.assert_close(
        read_images([encoded(deep)], (3, 2, 2), 0, 1).x[0],
        torch.from_numpy(deep.astype(np.float32) / 65535).expand(3, 2, 2),
    )


def test_another_size_is_resized_and_said() -> None:
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (12, 1))  # 24 wide, 12 high
    read = read_images([encoded(ramp), encoded(ramp[:6, :12])], (1, 6, 12), 0, 1)
    assert read.notes == ("Image 1 of 24x12 was resized to 12x6, the size the model takes.",)
    wanted = (10 * (2 * torch.arange(12) + 0.5))[1:-1] / 255  # a ramp stays one, but for its ends
    assert (read.x[0, 0, :, 1:-1] - wanted).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "in none of the formats"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "in none of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "in none of the formats"),
        (png_of(50_000, 50_000, b""), "MAX_PIXELS"),
        (png_of(8_000, 8_000, bytes(1_001 * 8_000)), "MAX_PIXELS"),  # 8 kB that hold what they claim
        (encoded(np.zeros((8, 8), dtype=np.uint8))[:40], "image 1"),
        (encoded(np.zeros((8, 8), dtype=np.float32), "TIFF"), "32-bit"),
    ],
    ids=["nothing", "svg", "postscript", "a claim", "a bomb", "half a file", "32 bits"],
)
def test_what_is_no_image_or_a_bomb_is_refused(content: bytes, said: str) -> None:
    started = time.perf_counter()
    with pytest.raises(DataError, match=said):
        read_images([content], (1, 8, 8), 0, 1)
    assert time.perf_counter() - started < 1


def test_limits_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(np.zeros((8, 8), dtype=np.uint8))
    for shape in ((2, 8, 8), (1, 8, 8, 8), (8, 8)):
        with pytest.raises(DataError, match="flat grey or colour"):
            read_images([content], shape, 0, 1)
    with pytest.raises(DataError, match="one image or more"):
        read_images([], (1, 8, 8), 0, 1)
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", len(content) - 1)
    with pytest.raises(DataError, match="MAX_IMAGE_BYTES"):
        read_images([content], (1, 8, 8), 0, 1)


# ---- predictions


def test_probabilities_are_a_softmax_of_all_classes_or_the_first_five() -> None:
    for classes in (3, 20, 21, 100):
        model, x = toys.linear(classes=classes), toys.images((1, 4, 4), 70)  # more than one pass
        weight, bias = toys.affine(model)
        odds = (x.double().flatten(1) @ weight.T + bias).exp()
        p = odds / odds.sum(1, keepdim=True)
        for told, row in zip(predict(model, x), p, strict=True):
            order = row.argsort(descending=True).tolist()
            shown = range(classes) if classes <= 20 else order[:5]
            assert [*told.probabilities] == [str(k) for k in shown]
            assert told.probabilities == pytest.approx({str(k): float(row[k]) for k in shown}, rel=1e-4)
            assert (told.label, told.name) == (order[0], str(order[0]))
            assert told.confidence == pytest.approx(float(row.max()), rel=1e-4)
            assert (told.verdict, told.score, told.threshold, told.attack) == (None,) * 4


def test_classes_of_one_name_are_told_apart() -> None:
    net = toys.linear().net
    model = Classifier(net, shape=(1, 4, 4), num_classes=3, class_names=("crane", "b", "crane"))
    assert [*predict(model, toys.images((1, 4, 4), 1))[0].probabilities] == ["crane (0)", "b", "crane (2)"]


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = toys.linear()
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    with pytest.raises(ModelError, match="finite logits"):
        predict(model, toys.images((1, 4, 4)))


def test_a_guard_says_all_it_knows(folders: Path) -> None:
    guarded = Cache(1).guard(folders / "guard")
    said, told = guarded.predict(X), predict(guarded, X)
    with torch.no_grad():
        p = network()((X * 7).round() / 7).double().softmax(1)
    assert {one.verdict for one in told} == {"accepted", "rejected"}
    for k, one in enumerate(told):
        assert (one.label, one.name, one.verdict) == (int(p[k].argmax()), said.names[k], said.verdicts[k])
        assert [*one.probabilities.values()] == pytest.approx(p[k].tolist(), rel=1e-4)
        assert one.confidence == pytest.approx(float(p[k].max()), rel=1e-4)
        assert (one.score, one.threshold) == (float(said.scores[k]), said.threshold)
        assert (one.attack, one.probability) == (said.attacks[k], said.probabilities[k])
        assert (one.attack is None) == (one.verdict == "accepted")


# ---- one image attacked


def attacked(model: Classifier, x: Tensor, threat: str, attack: AttackChoice = FGSM, **others: Any) -> Trial:
    return try_image(model, x, threat=threat, attack=attack, **others)


def pixels(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def test_one_step_on_one_logit_is_known_in_full(untouched_rng: None) -> None:
    shape, eps = (1, 12, 12), 0.01
    model, x = toys.one_logit(shape), toys.images(shape, 1)
    weight, bias = toys.affine(model)
    s = float(x.double().flatten() @ weight[1] + bias[1])
    sign = -math.copysign(1, s) * weight[1].sign()
    after = s - math.copysign(eps * float(weight[1].abs().sum()), s)
    trial = attacked(model, x, f"linf:{eps}")

    assert (trial.label, trial.target, trial.attacked, trial.success, trial.found) == (int(s > 0), None, *(True,) * 3)
    for told, logit in ((trial.predicted.original, s), (trial.predicted.adversarial, after)):
        p = 1 / (1 + math.exp(-logit))
        assert told.probabilities == pytest.approx({"0": 1 - p, "1": p}, rel=1e-4)
        assert told.label == int(logit > 0)
    far = trial.distances
    assert far.model_dump() == pytest.approx({"linf": eps, "levels": 255 * eps, "l2": 12 * eps, "l1": 144 * eps}, 1e-5)
    assert trial.psnr == pytest.approx(-20 * math.log10(eps), rel=1e-5)
    assert trial.ssim is not None and trial.ssim < 1
    assert (trial.queries, trial.gradients, trial.threat, trial.eps) == (1, 1, "linf:0.01", eps)
    assert trial.amplification == pytest.approx(0.5 / eps, rel=1e-4)
    original = (x[0, 0] * 255).round().int().numpy()
    assert np.array_equal(pixels(trial.original_png), original)
    moved = (x[0, 0].double() + eps * sign.view(12, 12)) * 255
    assert np.abs(pixels(trial.adversarial_png) - moved.numpy()).max() <= 0.501
    assert np.abs(pixels(trial.perturbation_png) - np.where(sign.view(12, 12) > 0, 255, 0)).max() <= 1
    assert (trial.behind, trial.guarded) == ({}, None)
    assert trial.notes == (
        f"No class was given: what the model takes the image for, {trial.label}, counts as the true one.",
    )
    assert json.loads(trial.model_dump_json())["psnr"] == trial.psnr


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_success_begins_at_the_radius(norm: Any) -> None:
    model, x = toys.linear(), toys.images((1, 4, 4), 1)
    y = toys.labels(model, x)
    radius = float(toys.radius(model, x, y, norm))
    attack = AttackChoice(name="pgd", options={"loss": "margin"})
    below, above = (attacked(model, x, f"{norm}:{radius * share}", attack, label=int(y)) for share in (0.98, 1.03))
    assert (below.success, above.success) == (False, True)
    assert below.attacked and not below.found and below.notes == above.notes == ()
    assert getattr(above.distances, norm) <= radius * 1.03 * (1 + 1e-5)
    assert above.predicted.adversarial.label != int(y) == below.predicted.adversarial.label


def test_a_smallest_perturbation_is_as_long_as_the_radius() -> None:
    model, x = toys.linear(), toys.images((1, 4, 4), 1)
    radius = float(toys.radius(model, x, toys.labels(model, x), "l2"))
    free, tight = (attacked(model, x, threat, AttackChoice(name="deepfool")) for threat in ("l2", f"l2:{radius / 2}"))
    for trial in (free, tight):
        assert radius <= trial.distances.l2 <= 1.03 * radius and trial.found
    assert (free.success, free.eps) == (True, None)
    assert (tight.success, tight.eps) == (False, pytest.approx(radius / 2))
    assert "further from the original" in tight.notes[-1]
    assert free.ssim is None  # 4 pixels are less than its window


def test_budgets_and_levels_are_in_the_box_of_the_model() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    model = Classifier(net, shape=(1, 4, 4), num_classes=2, low=0.0, high=255.0)
    trial = attacked(model, torch.full((1, 1, 4, 4), 100.0), "linf:8")
    assert (trial.distances.linf, trial.distances.levels) == (8, 8)
    assert trial.psnr == pytest.approx(20 * math.log10(255 / 8))
    assert (pixels(trial.original_png) == 100).all()
    assert set(pixels(trial.adversarial_png).flatten()) <= {92, 108}


def test_an_image_that_is_wrong_already_is_left_alone() -> None:
    model, x = toys.linear(), toys.images((1, 4, 4), 1)
    label = (int(toys.labels(model, x)) + 1) % 3
    trial = attacked(model, x, "linf:0.1", PGD, label=label)
    assert (trial.attacked, trial.success, trial.found, trial.queries, trial.psnr) == (False, False, False, 0, None)
    assert trial.original_png == trial.adversarial_png and trial.distances.linf == 0 and trial.amplification == 1
    assert set(pixels(trial.perturbation_png).flatten()) == {128}
    assert trial.notes == (
        f"The model takes the image for {trial.predicted.original.name}, not {label}: "
        "it is wrong already, nothing was changed.",
    )


def test_targets_are_reached_or_there_already() -> None:
    model, x = toys.linear(), toys.images((1, 4, 4), 1)
    weight, bias = toys.affine(model)
    order = (x.double().flatten(1) @ weight.T + bias)[0].argsort(descending=True).tolist()
    for target, goal in ((str(order[2]), order[2]), ("least-likely", order[2]), ("nearest", order[1])):
        trial = attacked(model, x, "linf:0.2", PGD, target=target)
        assert (trial.target, trial.success, trial.predicted.adversarial.label) == (goal, True, goal)
    there = attacked(model, x, "linf:0.2", PGD, target=str(order[0]))
    assert (there.attacked, there.success) == (False, False) and "the class aimed at" in there.notes[-1]


def test_each_defence_and_the_guard_are_asked_about_the_same_two_images(folders: Path) -> None:
    cache = Cache(2)
    guarded = cache.guard(folders / "guard")
    model = cache.classifier(guarded.source, guarded.reading)
    x, eps = X[:1], 0.1
    z = x.clone().requires_grad_()
    y = model(x).argmax(1)
    nn.functional.cross_entropy(model(z), y).backward()
    assert z.grad is not None
    x_adv = (x + eps * z.grad.sign()).clamp(0, 1)
    trial = attacked(
        model, x, f"linf:{eps}", defences=(BITS, DefenceChoice(name="jpeg")), guard=guarded, notes=("1st",)
    )
    assert [*trial.behind] == ["bit-depth:bits=2", "jpeg:quality=75,subsampling=4:2:0"]
    with torch.no_grad():
        for image, told in ((x, "original"), (x_adv, "adversarial")):
            p = model((image * 3).round() / 3).double().softmax(1)[0]
            one = getattr(trial.behind["bit-depth:bits=2"], told)
            assert [*one.probabilities.values()] == pytest.approx(p.tolist(), rel=1e-3)
            assert one.verdict is None
    assert trial.guarded is not None
    for one, other in zip(
        (trial.guarded.original, trial.guarded.adversarial), predict(guarded, torch.cat([x, x_adv])), strict=True
    ):
        assert (one.verdict, one.label) == (other.verdict, other.label)
        assert one.score == pytest.approx(other.score, rel=1e-3)
    assert trial.notes[0] == "1st" and trial.notes[-1] == "The attack did not know the guard."
    assert "did not know the defences" in trial.notes[-2]


def test_a_random_model_is_attacked_by_mean_gradients() -> None:
    x = toys.images((1, 4, 4), 64)
    x = x[toys.linear()(x).softmax(1).amax(1).argmax()][None]  # far from the boundary, whatever is drawn
    model = defended(toys.linear(), [("gaussian-noise", {"sigma": 0.01})])
    trial = attacked(model, x, "linf:0.1", AttackChoice(name="pgd", options={"steps": 3}))
    assert (trial.attack.options, trial.gradients) == ({"steps": 3, "eot": EOT}, 3 * EOT)
    assert any("mean gradient of 20 passes (eot=20)" in note for note in trial.notes)
    assert any("mean logits over 16 passes" in note for note in trial.notes)
    told = attacked(model, x, "linf:0.1", AttackChoice(name="pgd", options={"steps": 3, "eot": 2}))
    assert told.gradients == 6 and not any("eot" in note for note in told.notes)


def test_passes_that_disagree_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = toys.linear(), toys.images((1, 4, 4), 1)
    monkeypatch.setattr(live, "varies", lambda *_: True)
    monkeypatch.setattr(live, "mean_logits", lambda model, x, passes: model(x).roll(1, 1).detach())
    trial = attacked(model, x, "linf:0.1")
    assert (trial.attacked, trial.success) == (False, False)
    assert any("passes of the random model disagree" in note for note in trial.notes)


class Slow(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return self.net(x)


@pytest.mark.parametrize("options", [{"steps": 5_000}, {"steps": 1, "eot": 5_000}])  # many steps, or one that is long
def test_the_time_is_limited(options: dict[str, int]) -> None:
    model = Classifier(Slow(toys.linear().net), shape=(1, 4, 4), num_classes=3)
    started = time.perf_counter()
    with pytest.raises(SpecError, match=r"within 0\.2 s, got pgd, steps=.* take fewer steps"):
        attacked(model, toys.images((1, 4, 4), 1), "linf:0.1", AttackChoice(name="pgd", options=options), seconds=0.2)
    assert time.perf_counter() - started < 3
    assert attacked(model, toys.images((1, 4, 4), 1), "linf:0.1", seconds=0.2).gradients == 1


class Elsewhere(BlackBox):
    def __init__(self, net: nn.Module) -> None:
        super().__init__("it runs elsewhere")
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x)


def test_a_black_box_is_tried_by_queries() -> None:
    model = Classifier(Elsewhere(toys.linear().net), shape=(1, 4, 4), num_classes=3)
    x = toys.images((1, 4, 4), 1)
    assert {choice.name for choice in attack_choices(model)} == {"square", "hopskipjump"}
    with pytest.raises(ModelError, match="use hopskipjump, square"):
        attacked(model, x, "linf:0.1")
    trial = attacked(model, x, "linf:0.1", AttackChoice(name="square", options={"queries": 200}))
    assert trial.success and trial.gradients == 0
    assert "gives no gradients (it runs elsewhere)" in trial.notes[-1]


def test_wrong_requests_are_refused(folders: Path) -> None:
    model, x = toys.linear(), toys.images((1, 4, 4), 1)
    guarded = Cache(1).guard(folders / "guard")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (SpecError, "which is one on many at once", {"attack": AttackChoice(name="universal")}),
        (SpecError, "up to 100,000", {"attack": AttackChoice(name="square", options={"queries": 100_001})}),
        (SpecError, "one attack out of", {"attack": AttackChoice(name="fgms")}),
        (SpecError, "unknown option", {"attack": AttackChoice(name="fgsm", options={"steps": 1})}),
        (SpecError, "one preprocessing defence", {"defences": (DefenceChoice(name="paint"),)}),
        (ThreatError, "a budget for fgsm", {"threat": "linf"}),
        (ThreatError, "a target out of", {"target": "cat"}),
        (DataError, r"labels in 0\.\.2", {"label": 3}),
        (DataError, "one image, a batch of shape", {"x": toys.images((1, 4, 4), 2)}),
        (DataError, "pixels in the model's box", {"x": x + 1}),
        (DataError, "a guard of images of shape", {"guard": guarded}),
    ]
    for error, said, change in cases:
        asked: dict[str, Any] = {"x": x, "threat": "linf:0.1", "attack": FGSM} | change
        with pytest.raises(error, match=said):
            try_image(model, asked.pop("x"), **asked)


def test_threads_share_a_network_without_touching_each_other(tmp_path: Path, impatient: None) -> None:
    save(build("lenet", shape=(1, 16, 16), num_classes=4, mean=[0.4], std=[0.2]), tmp_path / "model", name="lenet")
    cache, x = Cache(2), torch.rand((4, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    attack = AttackChoice(name="pgd", options={"steps": 5})

    def trial(number: int) -> dict[str, Any]:
        model = cache.classifier(str(tmp_path / "model"))
        told = predict(model, x)[number].model_dump()
        found = attacked(model, x[number : number + 1], "linf:0.05", attack, defences=(BITS,), seed=number)
        return told | found.model_dump(exclude={"seconds"})

    alone = [trial(number) for number in range(4)]
    for _ in range(3):
        assert together(trial, 4) == alone


# ---- what can be tried


def test_every_attack_on_one_image_is_on_offer_with_a_schema_that_holds_its_defaults() -> None:
    offered = {choice.name: choice for choice in attack_choices()}
    assert {*offered} == {entry.name for entry in attacks} - {"universal"}
    for name, choice in offered.items():
        defaults = {key: value["default"] for key, value in choice.options["properties"].items()}
        assert attacks[name].parse(defaults) == attacks[name].parse({}) and choice.summary.endswith(".")
        json.dumps(choice.options)
    assert offered["pgd"].options["properties"]["steps"] == {
        "default": 40,
        "minimum": 1,
        "title": "Steps",
        "type": "integer",
    }
    assert (offered["cw"].norms, offered["cw"].minimum, offered["cw"].access) == (("l2",), True, "gradients")
    assert {"cw", "ddn", "ead"}.isdisjoint(choice.name for choice in attack_choices(norm="linf"))
    assert isinstance(offered["fgsm"].model_dump_json(), str)


def test_a_guarded_is_told_from_a_classifier(folders: Path) -> None:
    cache = Cache(2)
    guarded = cache.guard(folders / "guard")
    assert isinstance(guarded, Guarded)
    own = cache.classifier(guarded.source, guarded.reading, guarded.defences)
    assert [one.probabilities for one in predict(own, X)] == [
        pytest.approx(one.probabilities, rel=1e-4) for one in predict(guarded, X)
    ]
