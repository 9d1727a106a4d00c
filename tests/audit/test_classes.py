"""Per class, and from class to class: matrices known in closed form, and sums that must agree with the whole."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linprog
from torch import Tensor, nn

import toys
from rempart.attacks.plan import read_pairs
from rempart.audit import Audit, audit
from rempart.audit.classes import by_class
from rempart.core.errors import SpecError, ThreatError
from rempart.core.events import Event, silent
from rempart.core.model import BlackBox, Classifier
from rempart.core.stats import wilson
from rempart.data import Data
from rempart.report.schema import AttackChoice, AuditSpec, ModelCard, Report

EPS = 0.1
NAMES = ("glioma", "meningioma", "no tumour", "pituitary")


def brightest() -> Classifier:
    """The class is the brightest of four pixels: z = x."""
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    return Classifier(nn.Sequential(nn.Flatten(), layer), shape=(1, 2, 2), num_classes=4, class_names=NAMES)


def distances(x: Tensor) -> Tensor:
    """Smallest linf perturbation that makes each pixel the brightest: half of what it lacks to the brightest other."""
    flat = x.flatten(1).double()
    others = flat[:, None, :].masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf).amax(2)
    return ((others - flat) / 2).clamp_min(0)


def scans(n: int = 60) -> tuple[Tensor, Tensor]:
    """Images of which no distance lies within 3 % of the budget; every seventh is labelled wrongly."""
    x = 0.2 + 0.6 * torch.rand((4 * n, 1, 2, 2), generator=torch.Generator().manual_seed(3))
    x = x[((distances(x) - EPS).abs() > 0.03 * EPS).all(1)][:n]
    y = x.flatten(1).argmax(1)
    return x, torch.where(torch.arange(n) % 7 == 0, (y + 1) % 4, y)


def dataset(x: Tensor, y: Tensor, names: tuple[str, ...] = NAMES) -> Data:
    numbers = torch.arange(len(x)).flip(0) + 100  # in no order that positions have
    return Data("toy", "test", numbers, y, tuple(x.shape[1:]), names, lambda n: x[len(x) - 1 - (n - 100)])


def run(
    pairs: str | None = "all",
    *,
    model: Classifier | None = None,
    data: Data | None = None,
    threat: str = f"linf:{EPS}",
    notify: Callable[[Event], None] = silent,
    folder: Path | None = None,
    **others: object,
) -> Audit:
    model = model or brightest()
    card = ModelCard(source="", name="m", digest="0", parameters=1, shape=model.shape, classes=model.class_names)
    spec = AuditSpec(
        model="", data="", threat=threat, attacks=(AttackChoice(name="fgsm"),), sweep=False, pairs=pairs, **others
    )  # type: ignore
    result = audit(model, data or dataset(*scans()), spec, card=card, folder=folder, notify=notify)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def whole() -> Report:
    return run().report


def cells(report: Report) -> dict[tuple[int, int], tuple[int, int]]:
    return {(pair.label, pair.target): (pair.turned.k, pair.turned.n) for pair in report.pairs}


def expected() -> dict[tuple[int, int], tuple[int, int]]:
    x, y = scans()
    right, within = x.flatten(1).argmax(1) == y, distances(x) <= EPS
    return {
        (a, b): (int((right & (y == a) & within[:, b]).sum()), int((right & (y == a)).sum()))
        for a in range(4)
        for b in range(4)
        if a != b
    }


def test_the_matrix_of_the_brightest_pixel_is_known(whole: Report) -> None:
    assert cells(whole) == expected()
    assert 0 < sum(k for k, _ in expected().values()) < sum(n for _, n in expected().values())
    for pair in whole.pairs:
        assert pair.turned == wilson(pair.turned.k, pair.turned.n)


def test_the_worst_case_counts_what_targeted_attacks_broke(whole: Report) -> None:
    x, y = scans()
    radius = distances(x).masked_fill(nn.functional.one_hot(y, 4).bool(), torch.inf).amin(1)
    stands = (x.flatten(1).argmax(1) == y) & (radius > EPS)
    assert whole.worst_case is not None and whole.worst_case.k == int(stands.sum())
    line = next(attack for attack in whole.attacks if attack.label == "pairs")
    assert line.accuracy.k == whole.worst_case.k and line.tried == 51 and line.gradients > 0
    assert whole.samples is not None and list(whole.samples.right) == ["fgsm", "pairs", "checks"]
    weak = run(None).report
    assert weak.worst_case is not None and not weak.pairs


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_a_matrix_agrees_with_linear_programs(norm: str) -> None:
    """Least budget within which W x + b has its largest entry at the target, box included: a linear program."""
    model = toys.linear((1, 2, 3), 4)
    x = toys.images((1, 2, 3), 12)
    y = toys.labels(model, x)
    weight, bias = (t.numpy() for t in toys.affine(model))
    eps = {"linf": 0.055, "l1": 0.2}[norm]
    within = np.zeros((12, 4), dtype=bool)
    for i, image in enumerate(x.flatten(1).double().numpy()):
        for t in set(range(4)) - {int(y[i])}:
            least = program(weight - weight[t], bias - bias[t], image, norm)
            assert abs(least - eps) > 0.01 * eps, "too close to call"
            within[i, t] = least < eps
    found = run(model=model, data=dataset(x, y, model.class_names), threat=f"{norm}:{eps}").report
    assert 0 < within.sum() < 36
    for (a, b), (k, n) in cells(found).items():
        assert (k, n) == (within[y == a, b].sum(), (y == a).sum())


def program(weight: np.ndarray, bias: np.ndarray, x: np.ndarray, norm: str) -> float:
    """Minimise |u + v| over x + u - v in [0, 1] with weight (x + u - v) + bias <= 0; the variables are u, v, size."""
    d = len(x)
    rows = [np.hstack([weight, -weight, np.zeros((len(weight), 1))])]
    bounds = [-(weight @ x + bias)]
    if norm == "linf":
        rows.append(np.hstack([np.eye(d), np.eye(d), -np.ones((d, 1))]))
        bounds.append(np.zeros(d))
    else:
        rows.append(np.hstack([np.ones(2 * d), [-1]])[None])
        bounds.append(np.zeros(1))
    box = [(0, 1 - p) for p in x] + [(0, p) for p in x] + [(0, None)]
    cost = np.append(np.zeros(2 * d), 1)
    return float(linprog(cost, np.vstack(rows), np.concatenate(bounds), bounds=box).fun)


def test_named_pairs_alone_are_tried() -> None:
    found = run("glioma:no tumour, 3:2").report
    assert cells(found) == {pair: expected()[pair] for pair in ((0, 2), (3, 2))}
    line = next(attack for attack in found.attacks if attack.label == "pairs")
    assert line.tried == expected()[0, 2][1] + expected()[3, 2][1]


def test_finds_of_other_attacks_count_for_their_pair() -> None:
    """Two classes: what fgsm turns, it turns into the only other class; the attack that aims cannot do more."""
    model = toys.linear((1, 2, 2), 2)
    x = toys.images((1, 2, 2), 20)
    y = toys.labels(model, x)
    found = run(model=model, data=dataset(x, y, model.class_names), threat="linf:0.05").report
    broken = (toys.radius(model, x, y, "linf") < 0.05).numpy()
    assert cells(found) == {(a, 1 - a): (broken[y == a].sum(), (y == a).sum()) for a in set(y.tolist())}


def test_classes_add_up_to_the_whole(whole: Report) -> None:
    assert whole.clean is not None and whole.worst_case is not None
    for rates, total in (
        ([c.clean for c in whole.classes], whole.clean),
        ([c.worst for c in whole.classes], whole.worst_case),
    ):
        assert sum(rate.k for rate in rates) == total.k and sum(rate.n for rate in rates) == total.n
        assert all(rate == wilson(rate.k, rate.n) for rate in rates)
    x, y = scans()
    right = x.flatten(1).argmax(1) == y
    assert [c.clean.k for c in whole.classes] == [int(right[y == k].sum()) for k in range(4)]


def test_a_class_without_images_is_left_out() -> None:
    labels, right = np.array([0, 2, 2]), np.array([True, False, True])
    found = by_class(labels, right, np.zeros(3, dtype=bool))
    assert [(c.label, c.clean.k, c.clean.n, c.worst.k) for c in found] == [(0, 1, 1, 0), (2, 1, 2, 0)]


def test_a_stopped_audit_goes_on_with_its_pairs(tmp_path: Path, whole: Report) -> None:
    begun: list[tuple[str, str]] = []

    def stop(event: Event) -> None:
        if event.stage.startswith("pairs") and (event.stage, event.note) not in begun:
            if len(begun) == 6:
                raise KeyboardInterrupt
            begun.append((event.stage, event.note))

    partial = run(notify=stop, folder=tmp_path, chunk=16).report
    assert not partial.complete and partial.samples is not None and len(partial.samples.index) == 16
    assert {pair.turned.n for pair in partial.pairs} < set(range(16))
    again: list[str] = []
    final = run(notify=lambda event: again.append(event.stage + event.note), folder=tmp_path, chunk=16).report
    assert not {stage + note for stage, note in begun} & set(again), "a finished piece was done again"
    assert final.complete and final.pairs == whole.pairs and final.samples == whole.samples


def test_pieces_of_other_pairs_are_not_taken_up(tmp_path: Path) -> None:
    run("0:2", folder=tmp_path)
    assert cells(run("0:2,3:2", folder=tmp_path).report) == {pair: expected()[pair] for pair in ((0, 2), (3, 2))}


def test_a_stop_in_the_first_chunk_keeps_the_targets_that_were_finished() -> None:
    def stop(event: Event) -> None:
        if event.stage == "pairs 2":
            raise KeyboardInterrupt

    partial = run(notify=stop).report
    assert {pair.target for pair in partial.pairs} == {0, 1}
    assert partial.not_run == ("pairs", "checks")
    assert {key: value for key, value in expected().items() if key[1] < 2} == cells(partial)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("glioma", "--pairs as all"),
        ("glioma:glioma", "two different classes"),
        ("0:0", "two different classes"),
        ("glioma:0", "two different classes"),
        ("glioma:notumor", "did you mean 'no tumour'"),
        ("glioma:4", "or of their numbers, got '4'"),
        ("", "--pairs as all"),
    ],
)
def test_a_wrong_pair_is_refused_before_anything_runs(text: str, message: str) -> None:
    seen: list[Event] = []
    with pytest.raises(SpecError, match=message):
        run(text, notify=seen.append)
    assert not seen


def test_pairs_need_a_budget() -> None:
    with pytest.raises(ThreatError, match="a budget for apgd"):
        model = brightest()
        spec = AuditSpec(
            model="", data="", threat="linf", attacks=(AttackChoice(name="deepfool"),), pairs="all", sweep=False
        )
        card = ModelCard(source="", name="m", digest="0", parameters=1, shape=model.shape, classes=NAMES)
        audit(model, dataset(*scans()), spec, card=card)


def test_names_come_before_numbers() -> None:
    assert read_pairs("1:0", ("1", "0", "2")) == ((0, 1),)
    assert read_pairs("2:0,0:2", ("a", "b", "c")) == ((0, 2), (2, 0))
    assert len(read_pairs("all", ("a", "b", "c"))) == 6


def test_pictures_are_shown_at_the_window() -> None:
    """Black and white are its ends; the change keeps its own scale, of which the largest is black or white."""
    x, _ = scans()
    found, plain = run(None, window=(0.3, 0.7)).report, run(None).report
    assert found.examples and found.worst_case == plain.worst_case
    for shown, same in zip(found.examples, plain.examples, strict=True):
        original = x[len(x) - 1 - (shown.index - 100), 0]
        expected = ((original - 0.3) / 0.4).clamp(0, 1) * 255
        assert np.abs(picture(shown.original_png) - expected.numpy()).max() <= 0.51
        adversarial = (picture(same.adversarial_png) / 255 - 0.3) / 0.4
        assert np.abs(picture(shown.adversarial_png) - adversarial.clip(0, 1) * 255).max() <= 3
        assert shown.perturbation_png == same.perturbation_png
        change = picture(shown.perturbation_png)
        assert change.min() <= 1 or change.max() >= 254
        assert 0.5 / shown.amplification == pytest.approx(shown.distance), "linf: the largest change"
    with pytest.raises(SpecError, match="--window as LOW:HIGH"):
        run(None, window=(0.7, 0.3))


def picture(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), dtype=float)


def test_a_model_without_gradients_is_aimed_at_by_scores() -> None:
    """Search at random finds what is far within the budget, and nothing beyond it."""
    sighted = brightest()
    hidden = Classifier(_Elsewhere(sighted.net), shape=(1, 2, 2), num_classes=4, class_names=NAMES, output="logits")
    x, y = scans(16)
    card = ModelCard(source="", name="m", digest="0", parameters=1, shape=(1, 2, 2), classes=NAMES)
    choice = (AttackChoice(name="square", options={"queries": 50}),)
    spec = AuditSpec(model="", data="", threat=f"linf:{EPS}", attacks=choice, sweep=False, pairs="0:1,1:0")
    result = audit(hidden, dataset(x, y), spec, card=card)
    assert result is not None
    line = next(attack for attack in result.report.attacks if attack.label == "pairs")
    assert line.name == "square" and line.gradients == 0 and line.queries > 0
    right, least = x.flatten(1).argmax(1) == y, distances(x)
    for (a, b), (k, n) in cells(result.report).items():
        images = right & (y == a)
        assert n == int(images.sum())
        assert int((least[images, b] <= EPS / 2).sum()) <= k <= int((least[images, b] <= EPS).sum())


class _Elsewhere(BlackBox):
    def __init__(self, net: nn.Module) -> None:
        super().__init__("it runs elsewhere")
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.net(x)
