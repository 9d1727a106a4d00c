"""`rempart detect`: figures against the scores kept beside them, detectors that come back, and runs cut short."""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rempart import tasks
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.core.stats import auroc, wilson
from rempart.core.threat import Threat
from rempart.data import Data, open_data
from rempart.detect import run as running
from rempart.detect.protocol import split
from rempart.detectors import load as load_detector
from rempart.models import load
from rempart.report import store
from rempart.report.compare import compare, gate
from rempart.report.schema import (
    ALL,
    KNOWS,
    AttackChoice,
    AttackSpec,
    AuditSpec,
    CertifySpec,
    DefenceChoice,
    Detection,
    DetectorChoice,
    DetectSpec,
    ExplainSpec,
    Report,
    TrainSpec,
)
from test_cli import rempart

MODEL = "python:means_of_digits:classifier"
PROGRAM = """
import torch
from torch import nn
from rempart.data import open_data
from rempart.core.model import BlackBox, Classifier

def classifier():
    '''The class whose mean image is nearest: z_k = 8 (m_k x - |m_k|^2 / 2).'''
    data = open_data("digits:train")
    x = data.read(data.index).flatten(1)
    means = torch.stack([x[data.labels == k].mean(0) for k in range(10)])
    layer = nn.utils.skip_init(nn.Linear, 64, 10)
    with torch.no_grad():
        layer.weight.copy_(8 * means)
        layer.bias.copy_(-4 * (means**2).sum(1))
    return Classifier(nn.Sequential(nn.Flatten(), layer), shape=(1, 8, 8), num_classes=10, class_names=data.class_names)

def turned():
    model = classifier()
    names = model.class_names[::-1]
    return Classifier(model.net, shape=model.shape, num_classes=10, class_names=names)

class Sealed(BlackBox):
    def __init__(self, net):
        super().__init__("it is sealed")
        self.net = net

    def forward(self, x):
        return self.net(x).detach()

def sealed():
    model = classifier()
    return Classifier(Sealed(model.net), shape=model.shape, num_classes=10, class_names=model.class_names)

def softmax():
    model = classifier()
    return Classifier(nn.Sequential(*model.net, nn.Softmax(1)), shape=model.shape, num_classes=10)
"""
NAMES = ("max-softmax", "energy")


@pytest.fixture(scope="module", autouse=True)
def program(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("program")
    (folder / "means_of_digits.py").write_text(PROGRAM, "utf-8")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("means_of_digits", None)


def spec(out: Path, **changes) -> DetectSpec:
    given = {
        "model": MODEL,
        "data": "digits",
        "detectors": tuple(DetectorChoice(name=name) for name in NAMES),
        "attacks": (AttackChoice(name="fgsm"), AttackChoice(name="deepfool", options={"steps": 10})),
        "threat": "linf:0.25",
        "budgets": (0.1,),
        "fpr": 0.1,
        "fit_limit": 200,
        "limit": 40,
        "steps": 10,
        "out": str(out),
    }
    return DetectSpec(**{**given, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, program) -> Path:
    out = tmp_path_factory.mktemp("runs") / "detect"
    tasks.run(spec(out))
    return out


def table_of(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / "samples.npz", allow_pickle=False) as table:
        return dict(table)


def held(detection: Detection) -> dict[str, int]:
    return {row.attack: row.held.k for row in detection.held}


def judging() -> Data:
    """The images that judge, found by hand: what the split leaves after the images for the thresholds."""
    test = open_data("digits:test")
    return split(test, (0.3, 0.7))[1].head(40)


def test_the_figures_are_those_of_the_scores_kept(whole: Path) -> None:
    report, table = store.read(whole), table_of(whole)
    assert report.kind == "detect" and report.complete and not report.not_run
    model, data = load(MODEL), judging()
    x = data.read(data.index)
    right = model(x).argmax(1) == data.labels
    assert report.clean == wilson(int(right.sum()), 40)
    assert table["index"].tolist() == data.index[right].tolist()
    assert [detection.label for detection in report.detection] == list(NAMES)
    attacks = ["fgsm", "deepfool", "fgsm at 0.1"]
    for detection in report.detection:
        clean, limit = table[f"{detection.label}/clean"], detection.threshold
        accepted = clean <= limit
        assert detection.false_alarms["0.1"] == wilson(int((~accepted).sum()), len(clean))
        assert list(held(detection)) == ["none", ALL, KNOWS, *attacks]
        assert held(detection)["none"] == accepted.sum()
        negatives = np.concatenate([clean, table[f"{detection.label}/noisy"]])
        for name in attacks:
            at, scores = (table[f"{detection.label}/{name}/{column}"] for column in ("position", "score"))
            left = accepted.copy()
            left[at[scores <= limit]] = False
            assert held(detection)[name] == left.sum()
            (row,) = (row for row in detection.separations if row.attack == name)
            assert row.n == len(at) > 0 and row.auroc == auroc(negatives, scores)
        assert held(detection)[KNOWS] <= held(detection)[ALL] <= held(detection)["fgsm at 0.1"]
        assert detection.evaded is not None and detection.evaded.n == accepted.sum()
        assert detection.evaded.k == accepted.sum() - held(detection)[KNOWS]
        assert detection.fitted_on <= 200 and detection.calibrated_on <= 139
        assert detection.evaded.k > 0, "the example must have images that get through"
    kept = right[right].numpy()
    for name in attacks[::2]:
        kept[table[f"energy/{name}/position"]] = False
    assert report.worst_case is not None and report.worst_case.n == 40
    assert report.worst_case.k <= kept.sum(), "deepfool breaks some within the threat as well"
    passed, reason = gate(report, 0.0)
    assert not passed and "only an audit can pass" in reason
    with pytest.raises(DataError, match="a detect report without"):
        compare({"a": report, "b": report})
    page = (whole / "report.html").read_text("utf-8")
    assert "Model and detector together" in page and KNOWS in page


def test_saved_detectors_give_the_scores_of_the_report(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, table = store.read(whole), table_of(whole)
    data = judging()
    where = {number: place for place, number in enumerate(data.index.tolist())}
    for detection in report.detection:
        fitted = load_detector(whole / "detectors" / detection.label, load(MODEL))
        assert fitted.card.threshold is not None and fitted.card.threshold.value == detection.threshold
        x = torch.stack([data.read(data.index)[where[number]] for number in table["index"].tolist()])
        scores = fitted.score(x, torch.from_numpy(table["index"]))
        np.testing.assert_allclose(scores.detach().numpy(), table[f"{detection.label}/clean"], rtol=1e-5)
    out = tmp_path / "deep" / "scores.csv"
    command = ["detect", "score", whole / "detectors" / "energy", MODEL, "--data", "digits:test", "--limit", "40"]
    status, told, _ = rempart(*command, "--out", out, "--batch-size", "7", capsys=capsys)
    data = open_data("digits:test").head(40)
    rows = list(csv.DictReader(out.read_text("utf-8").splitlines()))
    assert status == 0 and [int(row["index"]) for row in rows] == data.index.tolist()
    limit = report.detection[1].threshold
    assert {float(row["threshold"]) for row in rows} == {limit}
    assert [row["flagged"] == "1" for row in rows] == [float(row["score"]) > limit for row in rows]
    assert f"{sum(row['flagged'] == '1' for row in rows)} of 40 images flagged" in told
    kept = dict(zip(table["index"].tolist(), table["energy/clean"].tolist(), strict=True))
    assert all(
        float(row["score"]) == pytest.approx(kept[int(row["index"])]) for row in rows if int(row["index"]) in kept
    )


def test_the_command_line_says_what_is_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--detector", "margin", "--attack", "fgsm", "--fit-limit", "150", "--limit", "20", "--fpr", "0.2"]
    command = ["detect", "evaluate", MODEL, "--data", "digits", "--threat", "linf:0.1", *options, "--no-adaptive"]
    status, told, _ = rempart(*command, "--out", tmp_path, capsys=capsys)
    report = store.read(tmp_path)
    assert status == 0 and report.detection[0].evaded is None and KNOWS not in held(report.detection[0])
    assert "No attacker who knows the detector was tried" in " ".join(told.split())
    alarm = report.detection[0].false_alarms["0.2"]
    assert f"{alarm.value:.1%}" in told.split("\n\n")[1], "at the rate asked for"


@pytest.mark.parametrize(("source", "sizes"), [("digits", (200, 139, 40)), ("digits:test", (200, 90, 40))])
def test_no_image_is_in_two_parts(source: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    train, test = (open_data(source, split=name) for name in ("train", "test"))
    parts = running.parts(train, test, spec(tmp_path, data=source))
    held = [{image.numpy().tobytes() for image in part.read(part.index)} for part in parts]
    assert tuple(map(len, parts)) == tuple(map(len, held)) == sizes
    assert not held[1] & held[2] and (source == "digits" or not held[0] & (held[1] | held[2]))


def test_a_detector_that_learns_from_attacks_by_an_option_gets_some(tmp_path: Path) -> None:
    choice = DetectorChoice(name="mahalanobis", options={"combine": "logistic", "layers": "last"})
    report = tasks.run(spec(tmp_path, detectors=(choice,), adaptive=False, budgets=()))
    assert report is not None
    assert report.detection[0].learnt == ("fgsm", "deepfool")
    assert [row.attack for row in report.detection[0].left_out] == ["fgsm", "deepfool"]


# ---- cut short


def after_the_first(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    judge = tasks.judged

    def once(label, *rest, **given):
        if label != NAMES[0]:
            raise failure
        return judge(label, *rest, **given)

    monkeypatch.setattr(tasks, "judged", once)


def assert_the_first_is_kept(out: Path, whole: Path) -> Report:
    report, table = store.read(out), table_of(out)
    assert not report.complete and report.not_run == (NAMES[1],)
    assert [detection.label for detection in report.detection] == [NAMES[0]]
    assert held(report.detection[0])["none"] == held(store.read(whole).detection[0])["none"]
    assert f"{NAMES[0]}/clean" in table and f"{NAMES[1]}/clean" not in table
    assert [path.name for path in (out / "detectors").iterdir()] == [NAMES[0]]
    assert (out / "report.html").exists()
    return report


def test_an_interruption_keeps_what_was_finished(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_the_first(monkeypatch, KeyboardInterrupt())
    tasks.run(spec(tmp_path, adaptive=False))
    assert not assert_the_first_is_kept(tmp_path, whole).notes


@pytest.mark.parametrize("failure", [DataError("enough images", got=3), RuntimeError("singular matrix")])
def test_a_detector_that_fails_leaves_those_before_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    after_the_first(monkeypatch, failure)
    with pytest.raises(type(failure)):
        tasks.run(spec(tmp_path, adaptive=False))
    (note,) = assert_the_first_is_kept(tmp_path, whole).notes
    assert str(failure) in note


def test_an_interruption_before_any_detector_leaves_a_report_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "sets", stop)
    report = tasks.run(spec(tmp_path))
    assert report is not None and not report.complete and report.not_run == NAMES and report.clean is None
    assert store.read(tmp_path) == report


# ---- run folders


def test_a_folder_with_a_trained_model_is_no_run_folder(tmp_path: Path) -> None:
    """The report of the training would be set aside for that of another command."""
    for name in ("config.json", "weights.safetensors", "report.json"):
        (tmp_path / name).write_text("{}")
    given = {"model": MODEL, "data": "digits", "threat": "linf:0.1"}
    requests = [
        spec(tmp_path),
        AuditSpec(**given, out=str(tmp_path)),
        AttackSpec(**given, attack=AttackChoice(name="fgsm"), out=str(tmp_path / "adv.npz")),
        CertifySpec(**given, sigma=0.1, out=str(tmp_path)),
    ]
    for request in requests:
        with pytest.raises(SpecError, match=r"run folder of its own, got .* which holds a trained model; choose anoth"):
            tasks.run(request)
    kept = ["config.json", "report.json", "weights.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_run_replaces_no_report_of_another_command(tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": "digits[:8]", "threat": "linf:0.1", "out": str(tmp_path)}
    fgsm = AttackChoice(name="fgsm")
    requests = [
        AuditSpec(model=MODEL, **given),
        AttackSpec(model=MODEL, **given | {"attack": fgsm, "out": str(tmp_path / "adv.npz")}),
        CertifySpec(model=MODEL, **given, sigma=0.1),
        spec(tmp_path),
        ExplainSpec(models=(MODEL,), **given, attacks=(fgsm,), layers=("net.0",)),
        TrainSpec(data="digits", model="mlp", recipe="plain:digits", out=str(tmp_path)),
    ]
    for request in requests:
        for other in {one.kind for one in requests} - {request.kind}:
            (tmp_path / "report.json").write_text(f'{{"kind": "{other}"}}')
            with pytest.raises(SpecError, match=rf"of its own, got .* the report of another command \({other}\); cho"):
                tasks.run(request)
            assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    for earlier in ('{"kind": "audit"}', "{", "[]", "{}"):
        (tmp_path / "report.json").write_text(earlier)
        store.claim(tmp_path, "audit")
        assert (tmp_path / "report.json.old").read_text() == earlier and not (tmp_path / "report.json").exists()


def test_a_gradient_attack_on_a_smoothed_black_box_is_refused_before_anything_runs(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "python:means_of_digits:sealed", "data": "digits[:2]", "sigma": 0.1}
    with pytest.raises(
        ModelError, match=r"a model with gradients for pgd, got one without \(it is sealed\); use .*square"
    ):
        tasks.run(CertifySpec(**given, threat="l2:0.1", attack=AttackChoice(name="pgd"), samples=10, selection=2))
    report = tasks.run(CertifySpec(**given, samples=10, selection=2))
    assert report is not None and report.complete


def test_models_of_other_orders_of_classes_are_explained_alone(tmp_path: Path) -> None:
    models = (MODEL, "python:means_of_digits:turned")
    given: dict[str, Any] = {"data": "digits[:4]", "threat": "linf:0.1", "layers": ("net.0",), "out": str(tmp_path)}
    told = r"order 0, 1, .*, got 9, 8, .* in .*; explain it alone: the labels of the images are numbered"
    with pytest.raises(SpecError, match=told):
        tasks.run(ExplainSpec(models=models, attacks=(AttackChoice(name="fgsm"),), **given))
    assert not (tmp_path / "report.json").exists()


def test_detectors_of_two_runs_are_never_mixed(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "again"
    shutil.copytree(whole, out)
    (out / "detectors" / "mine").mkdir()
    (out / "detectors" / "mine" / "notes.txt").write_text("of the user")
    (out / "detectors" / "energy" / "notes.txt").write_text("of the user")
    monkeypatch.setattr(tasks, "sets", stop)
    tasks.run(spec(out))
    left = {str(path.relative_to(out)) for path in (out / "detectors").rglob("*") if path.is_file()}
    assert left == {"detectors/mine/notes.txt", "detectors/energy/notes.txt"}
    assert not (out / "detectors" / "max-softmax").exists()


# ---- requests that cannot be met, told before the attacks run


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"detectors": (DetectorChoice(name="energyy"),)}, SpecError, "energy"),
        ({"detectors": (DetectorChoice(name="energy", options={"temperature": -1}),)}, SpecError, "temperature"),
        ({"attacks": (AttackChoice(name="pgdd"),)}, SpecError, "pgd"),
        (
            {"fpr": 0.001},
            DataError,
            "999 or more clean.*part of the test split.* --limit .* larger --fpr",
        ),
    ],
)
def test_wrong_requests_are_told_before_an_attack_runs(tmp_path, monkeypatch, changes, error, told) -> None:
    asked = []
    gather = running.gather
    monkeypatch.setattr(running, "gather", lambda *a, **k: asked.append(len(a[2])) or gather(*a, **k))
    with pytest.raises(error, match=told):
        tasks.run(spec(tmp_path, **changes))
    assert not any(asked)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--fpr", "5"], "--fpr in (0, 1), got 5.0; write 0.05 for 5 %"),
        (["--fpr", "0"], "--fpr in (0, 1)"),
        (["--fpr", "nan"], "--fpr in (0, 1)"),
        (["--budget", "8/0"], "--budget in pixel units, such as 8/255 or 0.03, got '8/0'"),
        (["--budget", "-0.1"], "--budget in pixel units"),
        (["--budget", "linf:0.1"], "--budget in pixel units"),
    ],
)
def test_wrong_numbers_are_told_before_anything_is_loaded(
    given: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["detect", "evaluate", "nowhere", "--data", "nothing", "--threat", "linf:0.1", "--detector", "margin"]
    status, _, said = rempart(*command, *given, "--out", tmp_path / "run", capsys=capsys)
    assert status == 2 and told in said and not (tmp_path / "run").exists()


def test_bounds_hold_for_a_spec_from_a_file_too(tmp_path: Path) -> None:
    for wrong in ({"fpr": 5}, {"fpr": 1}, {"budgets": [0]}, {"budgets": ["x"]}):
        given = spec(tmp_path).model_dump(mode="json") | wrong
        (tmp_path / "spec.json").write_text(json.dumps(given))
        with pytest.raises(SpecError, match=next(iter(wrong))):
            store.read_spec(tmp_path / "spec.json")


def test_budgets_are_read_as_those_of_the_threat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = []

    def stop(spec, notify):
        asked.append(spec)
        raise SpecError("no more")

    monkeypatch.setattr(tasks, "run", stop)
    command = ["detect", "evaluate", MODEL, "--data", "digits", "--threat", "linf:0.1", "--detector", "margin"]
    rempart(*command, "--budget", "8/255", "--budget", "0.2", "--out", tmp_path, capsys=capsys)
    assert asked[0].budgets == (8 / 255, 0.2)


def test_too_few_images_to_fit_name_the_option(tmp_path: Path) -> None:
    for detector in ("lid", "knn", "lof"):
        few = spec(tmp_path, detectors=(DetectorChoice(name=detector),), fit_limit=15, limit=5, budgets=())
        with pytest.raises(DataError, match="a larger --fit-limit, or none"):
            tasks.run(few.model_copy(update={"attacks": few.attacks[:1]}))


def test_a_detector_belongs_to_its_model_and_its_defences(whole: Path, tmp_path: Path) -> None:
    where, out = whole / "detectors" / "energy", tmp_path / "scores.csv"
    defences = [DefenceChoice(name="bit-depth", options={"bits": 3})]
    with pytest.raises(ModelError, match="which the detector"):
        running.score_data(where, MODEL, "digits:test[:5]", out, defences=defences)
    assert not out.exists()


def test_scores_are_not_written_over_a_folder(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["detect", "score", whole / "detectors" / "energy", "nowhere", "--data", "digits"]
    status, _, told = rempart(*command, "--out", tmp_path, capsys=capsys)
    assert status == 2 and f"--out to name a file, got {tmp_path}, which is a folder" in told


def test_outputs_that_were_mended_for_the_fit_are_mended_for_the_scores(tmp_path: Path) -> None:
    """A network that ends in a softmax is judged by its logits in both commands."""
    softmax = "python:means_of_digits:softmax"
    tasks.run(spec(tmp_path, model=softmax, detectors=(DetectorChoice(name="energy"),), adaptive=False, budgets=()))
    running.score_data(tmp_path / "detectors" / "energy", softmax, "digits:test[:40]", tmp_path / "scores.csv")
    table, rows = table_of(tmp_path), list(csv.DictReader((tmp_path / "scores.csv").read_text("utf-8").splitlines()))
    kept = dict(zip(table["index"].tolist(), table["energy/clean"].tolist(), strict=True))
    assert np.std(list(kept.values())) > 0.1
    assert all(
        float(row["score"]) == pytest.approx(kept[int(row["index"])]) for row in rows if int(row["index"]) in kept
    )


# ---- random models


def test_attacks_on_a_random_model_climb_mean_gradients() -> None:
    own = AttackChoice(name="pgd", options={"eot": 3})
    wanted = spec(Path("out"), attacks=(AttackChoice(name="fgsm"), AttackChoice(name="pgd"), own))
    threat = Threat.parse("linf:0.1")
    fixed, noisy = running.crafts(wanted, threat), running.crafts(wanted, threat, random=True)
    assert list(noisy) == ["fgsm", "pgd", "pgd 2"]
    assert [fixed[name].options["eot"] for name in ("pgd", "pgd 2")] == [1, 3]
    assert [noisy[name].options["eot"] for name in ("pgd", "pgd 2")] == [20, 3]
    assert running.means(wanted, random=False) == ()
    assert "pgd climbed" in running.means(wanted, random=True)[0].replace("fgsm, ", "")


def test_a_random_defence_is_noted_and_the_attacker_who_knows_takes_means_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    evade = running.under_evasion

    def told(*rest, **given):
        passes.append(given["passes"])
        return evade(*rest, **given)

    monkeypatch.setattr(running, "under_evasion", told)
    noise = (DefenceChoice(name="gaussian-noise"),)
    pgd = (AttackChoice(name="pgd", options={"steps": 1}),)
    wanted = spec(
        tmp_path, defences=noise, attacks=pgd, budgets=(), detectors=(DetectorChoice(name="margin"),), steps=1
    )
    report = tasks.run(wanted.model_copy(update={"limit": 10, "fit_limit": 60, "fpr": 0.3}))
    assert report is not None and passes == [20] and "The model is random: pgd climbed" in report.notes[0]


def test_the_seed_of_a_request_is_that_of_a_random_defence_too(tmp_path: Path) -> None:
    """What is run again gives the same figures, and leaves the random numbers of the caller alone."""
    noise, pgd = (DefenceChoice(name="gaussian-noise"),), AttackChoice(name="pgd", options={"steps": 1, "eot": 1})
    given = {"model": MODEL, "data": "digits:test", "threat": "linf:0.1", "defences": noise, "limit": 10}
    state = torch.get_rng_state()
    for run in ("first", "second"):
        torch.manual_seed(len(run))
        changes = {"defences": noise, "attacks": (pgd,), "budgets": (), "adaptive": False, "fit_limit": 60, "fpr": 0.3}
        tasks.run(spec(tmp_path / run, **changes, limit=10))
        tasks.run(AttackSpec(attack=pgd, out=str(tmp_path / run / "attack" / "attack.npz"), **given))
        kept = CertifySpec(sigma=0.1, samples=100, selection=10, out=str(tmp_path / run / "certify"), **given)
        tasks.run(kept)
    torch.set_rng_state(state)
    for file in ("samples.npz", "attack/attack.npz", "certify/samples.npz"):
        with np.load(tmp_path / "first" / file) as first, np.load(tmp_path / "second" / file) as second:
            assert first.files and all(map(same, map(first.get, first.files), map(second.get, first.files))), file


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Equal, figures that are not there included."""
    return np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
