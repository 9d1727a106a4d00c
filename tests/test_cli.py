"""The command line as a user meets it: exit statuses, messages, files, interruption and replay."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rempart import cli
from rempart.data import open_data
from rempart.models import load
from rempart.report import store
from rempart.report.schema import Report


def rempart(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command line in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    before, sys.argv = sys.argv, ["rempart", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network trained on the embedded digits through the command line."""
    out = tmp_path_factory.mktemp("runs") / "mlp"
    command = ["train", "--data", "digits", "--model", "mlp", "-o", "epochs=3", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "rempart", *command], check=True, capture_output=True)
    return out


def test_train_writes_a_model_and_a_report_that_agree(trained: Path) -> None:
    report = store.read(trained)
    assert report.kind == "train" and len(report.epochs) == 3 and report.clean is not None
    model, data = load(str(trained)), open_data("digits:test")
    assert report.clean.k == int((model(data.batch(torch.arange(len(data))).x).argmax(1) == data.labels).sum())
    assert report.clean.value > 0.85
    assert {path.name for path in trained.iterdir()} >= {"config.json", "weights.safetensors", "report.html"}


def test_audit_writes_report_page_and_samples(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["audit", trained, "--data", "digits:test[:80]", "--threat", "linf:0.1", "--out", tmp_path]
    attacks = ["--attack", "fgsm", "--attack", "bim:steps=5", "--attack", "pgd", "--no-sweep"]
    status, out, _ = rempart(*arguments, *attacks, capsys=capsys)
    assert status == 0
    report = store.read(tmp_path)
    accuracy = {result.label: result.accuracy.k for result in report.attacks}
    assert accuracy["fgsm"] >= accuracy["bim"] >= accuracy["pgd"], "stronger attacks leave less"
    assert report.attacks[1].options["steps"] == 5
    assert "upper bound" in out and str(tmp_path / "report.html") in out
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as table:
        assert table["index"].tolist() == list(report.samples.index) if report.samples else False
        assert int((table["pgd/correct"] & ~table["pgd/success"]).sum()) == accuracy["pgd"]
    gate = {0.0: 0, 0.99: 1}
    for least, expected in gate.items():
        assert rempart("gate", tmp_path, "--min-robust", str(least), capsys=capsys)[0] == expected


def test_replay_gives_the_same_figures(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--data", "digits:test[:40]", "--threat", "l2:0.5", "--attack", "pgd", "--out", out]
    assert rempart("audit", trained, *arguments, "--no-sweep", capsys=capsys)[0] == 0
    first = store.read(out)
    assert rempart("run", out / "report.json", capsys=capsys)[0] == 0
    again = store.read(out)
    assert again.created >= first.created and again.samples == first.samples and again.worst_case == first.worst_case


def test_pairs_costs_and_window_are_replayed_and_reported(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, costs = tmp_path / "run", tmp_path / "costs.csv"
    lines = [["", *"0123456789"], *([str(k), *("0" if k == j else "2" for j in range(10))] for k in range(10))]
    costs.write_text("\n".join(map(",".join, lines)))
    arguments = ["--data", "digits:test[:30]", "--threat", "linf:0.1", "--attack", "fgsm", "--no-sweep", "--out", out]
    more = ["--pairs", "3:8,8:3", "--costs", costs, "--window", "1/4:0.75"]
    status, told, _ = rempart("audit", trained, *arguments, *more, capsys=capsys)
    first = store.read(out)
    assert status == 0 and "turned into" in told and "mean cost of an image" in told
    assert first.spec.window == (0.25, 0.75)  # type: ignore[union-attr]
    assert {(pair.label, pair.target) for pair in first.pairs} == {(3, 8), (8, 3)}
    assert first.clean is not None and first.worst_case is not None and first.risk is not None
    assert first.risk.clean.value == pytest.approx(2 * (1 - first.clean.value))
    assert first.risk.worst.value == pytest.approx(2 * (1 - first.worst_case.value)), "all mistakes cost the same"
    with np.load(out / "samples.npz", allow_pickle=False) as table:
        numbers, label = table["pairs 8/index"], dict(zip(table["index"], table["label"], strict=True))
        assert [label[n] for n in numbers] == [3] * len(numbers)
    assert rempart("run", out / "report.json", capsys=capsys)[0] == 0
    again = store.read(out)
    assert (again.spec, again.pairs, again.risk, again.samples) == (first.spec, first.pairs, first.risk, first.samples)
    status, told, _ = rempart("report", out, "--out", tmp_path / "appendix.html", capsys=capsys)
    assert status == 0 and told.strip() == str(tmp_path / "appendix.html") and (tmp_path / "appendix.html").exists()
    status, _, err = rempart("report", trained, "--out", tmp_path / "other.html", capsys=capsys)
    assert status == 2 and "the report of an audit" in err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pairs", "3:x", "--pairs of the classes"),
        ("--costs", "none.csv", "a CSV table of costs"),
        ("--window", "0.8:0.2", "--window as LOW:HIGH"),
        ("--window", "bone", "--window as LOW:HIGH"),
    ],
)
def test_wrong_classes_costs_and_windows_are_told(
    option: str, value: str, message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", "digits:test[:5]", "--threat", "linf:0.1", "--attack", "fgsm", "--out", tmp_path / "run"]
    status, _, err = rempart("audit", trained, *arguments, option, value, capsys=capsys)
    assert status == 2 and message in err
    assert not (tmp_path / "run" / "report.json").exists()


def test_attack_keeps_the_images_it_was_judged_on(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "adversarial.npz"
    arguments = ["--data", "digits:test[:30]", "--attack", "pgd", "--threat", "linf:0.2", "--target", "7"]
    assert rempart("attack", trained, *arguments, "--out", file, capsys=capsys)[0] == 0
    from rempart.data import open_data
    from rempart.models.load import load

    model, data = load(str(trained)), open_data("digits:test[:30]")
    with np.load(file, allow_pickle=False) as arrays:
        images, success, correct = (torch.from_numpy(arrays[key]) for key in ("x_adv", "success", "correct"))
    x = data.batch(torch.arange(30)).x
    assert float((images - x).abs().max()) <= 0.2 + 1e-6
    hit = (model(images).argmax(1) == 7) & (data.labels != 7)
    assert torch.equal(hit & correct, success & correct)
    assert hit.any()


def test_compare_needs_the_same_samples(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("a", "digits:test[:40]"), ("b", "digits:test[:40]"), ("c", "digits:test[:30]")):
        arguments = ["--data", data, "--threat", "linf:0.1", "--attack", "fgsm", "--no-sweep", "--out", tmp_path / name]
        assert rempart("audit", trained, *arguments, capsys=capsys)[0] == 0
    status, out, _ = rempart("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c.html", capsys=capsys)
    assert status == 0 and "worst case" in out and (tmp_path / "c.html").exists()
    status, _, err = rempart("compare", tmp_path / "a", tmp_path / "c", capsys=capsys)
    assert status == 2 and "same samples" in err


def test_compare_audits_training_runs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [Path(shutil.copytree(trained, tmp_path / name)) for name in ("a", "b")]
    arguments = ["--threat", "linf:0.1", "--limit", "10", "--out", tmp_path / "methods.html"]
    status, out, _ = rempart("compare", *folders, *arguments, capsys=capsys)
    assert status == 0 and "rho_2" in out and str(tmp_path / "methods.html") in out
    audit = store.read(folders[0] / "audits" / "linf-0.1-10")
    assert audit.worst_case is not None
    assert re.search(rf"^worst case +a +{audit.worst_case.value:.1%} ", out, flags=re.MULTILINE)
    status, _, err = rempart("compare", folders[0], folders[1] / "audits" / "l2-10", capsys=capsys)
    assert status == 2 and "training runs alone, or audits alone" in err


@pytest.mark.parametrize("what", ["attacks", "suites", "detectors", "models", "recipes", "data"])
def test_lists(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = rempart("list", what, capsys=capsys)
    expected = {
        "attacks": "steps=40",
        "suites": "fgsm, bim(steps=10)",
        "models": "lenet",
        "recipes": "plain",
        "detectors": "mahalanobis",
        "data": "digits",
    }
    assert status == 0 and expected[what] in out


def write_idx(folder: Path, labels: list[int]) -> None:
    folder.mkdir()
    for prefix in ("train", "t10k"):
        n = len(labels)
        pixels = bytes([0, 0, 8, 3]) + b"".join(v.to_bytes(4, "big") for v in (n, 8, 8)) + bytes(64 * n)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(pixels)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + n.to_bytes(4, "big") + bytes(labels))


def bad_requests(trained: Path, folder: Path) -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """Arguments that are wrong, with words the message must have: expected, got, what to try."""
    audit = ["audit", str(trained), "--out", str(folder / "out"), "--threat", "linf:0.1", "--attack", "pgd"]
    digits = ["--data", "digits:test[:10]"]
    (folder / "model.pt").write_bytes(pickle.dumps({"weights": 1}))
    (folder / "cut.zip").write_bytes(b"PK\x03\x04 this is not the whole archive")
    nan = np.full((4, 8, 8), np.nan, np.float32)
    np.savez(folder / "nan.npz", test_images=nan, test_labels=np.arange(4)[:, None])
    other = [*audit[:4], "--attack", "pgd", *digits]
    return {
        "a wrong key": ([*audit, *digits, "-o", "stepz=3"], ("unknown option", "did you mean 'step", "it takes")),
        "a wrong value": ([*audit, *digits, "-o", "steps=many"], ("steps='many'", "it takes steps")),
        "not key=value": ([*audit, *digits, "-o", "steps"], ("key=value", "-o steps=40")),
        "eps 8 on [0, 1]": ([*other, "--threat", "linf:8"], ("linf eps in [0, 1]", "got 8.0", "did you mean 8/255")),
        "an unknown norm": ([*other, "--threat", "l3:1"], ("linf, l2, l1", "'l3'")),
        "an unknown attack": ([*audit[:-1], "pdg", *digits], ("'pdg'", "did you mean 'pgd'")),
        "labels beyond the classes": ([*audit, "--data", f"mnist:{folder / 'idx'}"], ("classes", "got")),
        "NaN pixels": ([*audit, "--data", str(folder / "nan.npz:test")], ("expected", "got")),
        "a truncated zip": ([*audit, "--data", str(folder / "cut.zip")], ("zip", "got")),
        "a missing file": ([*audit, "--data", str(folder / "none.zip")], ("expected", "none.zip")),
        "a pickle as MODEL": (
            ["audit", str(folder / "model.pt"), *audit[2:], *digits],
            ("pickle", "safetensors"),
        ),
        "a missing model": (["audit", str(folder / "nowhere"), *audit[2:], *digits], ("expected", "nowhere")),
        "an unknown suite": ([*other, "--threat", "linf:0.1", "--suite", "quik"], ("quick", "did you mean")),
        "a GPU where there is none": ([*audit, *digits, "--device", "cuda"], ("GPU", "leave out --device")),
        "an unknown recipe": (
            ["train", "--data", "digits", "--recipe", "plane", "--out", str(folder / "out")],
            ("plain", "'plane'", "did you mean"),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("number", range(15))
def test_bad_requests_exit_with_2_and_say_what_to_try(
    number: int, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_idx(tmp_path / "idx", [0, 1, 2, 99])
    case, (arguments, words) = sorted(bad_requests(trained, tmp_path).items())[number]
    status, _, err = rempart(*arguments, capsys=capsys)
    assert status == 2, f"{case}: {err}"
    assert all(word in err for word in ("expected", *words)), f"{case}: {err}"
    assert "Traceback" not in err and not (tmp_path / "out" / "report.json").exists()


def test_interrupt_leaves_a_valid_partial_report(trained: Path, tmp_path: Path) -> None:
    slow = [f"--attack=pgd:steps=2000,restarts={r}" for r in range(2, 6)]
    arguments = ["--data", "digits", "--threat", "linf:0.02", "--attack", "fgsm", *slow, "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rempart", "audit", str(trained), *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 60
    for line in process.stderr:
        if line.startswith("pgd") or time.monotonic() > deadline:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    report = Report.model_validate(json.loads((tmp_path / "report.json").read_text()))
    assert not report.complete
    assert [result.label for result in report.attacks] == ["fgsm"] and "pgd" in report.not_run
    assert report.worst_case == report.attacks[0].accuracy
    assert "interrupted" in (tmp_path / "report.html").read_text()


def test_names_out_of_files_do_not_command_the_terminal(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ",".join(["\x1b[31mred", "\u202etext", *"bcdefghi"])
    status, out, _ = rempart("inspect", trained, "--classes", names, capsys=capsys)
    assert status == 0 and "?[31mred, ?text, b" in out and "\x1b" not in out and "\n" in out
    status, _, err = rempart("inspect", "\x1b]0;title\x07", capsys=capsys)
    assert status == 2 and "\x1b" not in err and "\x07" not in err


def test_a_reader_that_has_seen_enough_gets_no_error() -> None:
    code = "import sys; sys.argv = ['rempart', 'list', 'attacks']; from rempart import cli; cli.main()"
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert run.returncode == 1 and run.stderr == ""


def test_help_is_quick_and_does_not_load_torch() -> None:
    code = "import sys; sys.argv = ['rempart', '--help']; from rempart import cli\n"
    code += "try: cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_failed_audit_leaves_no_report_for_a_gate(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", "digits:test[:20]", "--threat", "linf:0.01", "--attack", "fgsm", "--no-sweep", "--out"]
    assert rempart("audit", trained, *arguments, tmp_path, capsys=capsys)[0] == 0
    assert rempart("audit", tmp_path / "nothere", *arguments, tmp_path, capsys=capsys)[0] == 2
    status, _, err = rempart("gate", tmp_path, "--min-robust", "0", capsys=capsys)
    assert status == 2 and "report.json" in err
    assert (tmp_path / "report.json.old").exists()
    file = tmp_path / "file"
    file.write_text("")
    status, _, err = rempart("audit", trained, *arguments, file, capsys=capsys)
    assert status == 2 and "--out" in err


def test_an_error_in_the_users_own_factory_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_factory.py").write_text("def model():\n    raise RuntimeError('no weights')\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "digits:test[:20]", "--threat", "linf:0.1", "--out", tmp_path / "out"]
    status, _, err = rempart("audit", "python:broken_factory:model", *arguments, capsys=capsys)
    assert status == 2 and "RuntimeError: no weights (broken_factory.py, line 2)" in err


def test_an_unknown_option_is_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = rempart("audit", "--bogus", capsys=capsys)
    assert status == 2 and "--bogus" in err and "Traceback" not in err


def test_certify_brackets_the_smoothed_model_and_replays(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", "digits:test[:20]", "--sigma", "0.2", "--samples", "300", "--out", tmp_path]
    threat = ["--threat", "l2:0.25", "--attack", "pgd:steps=5", "--attack-draws", "8"]
    status, out, _ = rempart("certify", trained, *arguments, *threat, capsys=capsys)
    assert status == 0 and "lies between" in out and str(tmp_path / "report.html") in out
    report = store.read(tmp_path)
    assert report.kind == "certify" and report.complete and report.certificate is not None
    bracket = report.certificate.bracket
    assert bracket is not None and bracket.options["steps"] == 5 and bracket.lower.k <= bracket.upper.k
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as rows:
        right = rows["predicted"] == rows["label"]
        assert report.certificate.right.k == int(right.sum()) > 10
        assert bracket.lower.k == int((right & (rows["radius"] > 0.25)).sum()) > 3
        assert bracket.upper.k == int((~rows["pgd/broken"]).sum()) < 20
        assert report.clean is not None and report.clean.k == int(rows["correct"].sum())
    budget = dict(zip(report.curves[0].eps, report.curves[0].accuracy, strict=True))[0.25]
    assert budget == bracket.lower
    assert "upper bound" in (tmp_path / "report.html").read_text()
    assert rempart("run", tmp_path / "report.json", capsys=capsys)[0] == 0
    again = store.read(tmp_path)
    assert (again.samples, again.curves) == (report.samples, report.curves) and again.certificate is not None
    assert rempart("gate", tmp_path, "--min-robust", "0", capsys=capsys)[0] == 1, "only an audit can pass"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--sigma", "0"], ("sigma > 0", "0.25")),
        (["--sigma", "0.2", "--samples", "5"], ("samples >= 10",)),
        (["--sigma", "0.2", "--alpha", "0.7"], ("alpha in (0, 0.5)",)),
        (["--sigma", "0.2", "--threat", "l2"], ("budget",)),
        (["--sigma", "0.2", "--threat", "l2:1", "--attack", "pdg"], ("did you mean 'pgd'",)),
    ],
)
def test_a_certificate_nothing_can_come_of_is_refused(
    wrong: list[str], words: tuple[str, ...], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["certify", trained, "--data", "digits:test[:5]", *wrong, "--out", tmp_path / "out"]
    status, _, err = rempart(*arguments, capsys=capsys)
    assert status == 2 and all(word in err for word in ("expected", *words)), err


def test_an_interrupted_certification_keeps_what_was_certified(trained: Path) -> None:
    from rempart import tasks
    from rempart.core.errors import Cancelled
    from rempart.core.events import Event
    from rempart.report.schema import CertifySpec

    def stop(event: Event) -> None:
        if event.stage == "pgd" or (event.done >= 16 and limit == 40):
            raise Cancelled

    for limit in (40, 10):
        spec = CertifySpec(model=str(trained), data="digits", sigma=0.2, samples=50, threat="l2:0.2", limit=limit)
        report = tasks.run(spec, stop)
        assert not report.complete and report.certificate is not None and report.certificate.bracket is None
        assert report.samples is not None and len(report.samples.index) == (16 if limit == 40 else 10)
        assert "pgd" in report.not_run and len(report.not_run) == (2 if limit == 40 else 1)


# ---- defences


def test_a_defence_belongs_to_the_model_that_is_audited(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", "digits:test[:40]", "--threat", "linf:0.2", "--attack", "fgsm", "--no-sweep"]
    defences = ["--defence", "median:size=3", "--defence", "bit-depth:bits=1"]
    status, told, _ = rempart("audit", trained, *common, *defences, "--out", tmp_path / "behind", capsys=capsys)
    assert status == 0
    report = store.read(tmp_path / "behind")
    assert report.model.defences == ("median:size=3", "bit-depth:bits=1")
    assert report.title.startswith("mlp behind median and bit-depth on ")
    assert "behind median:size=3, then bit-depth:bits=1" in told
    page = (tmp_path / "behind" / "report.html").read_text("utf-8")
    assert "<code>median:size=3</code>, then <code>bit-depth:bits=1</code>" in page
    data = open_data("digits:test[:40]")
    x = data.batch(torch.arange(40)).x
    wide = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="symmetric")
    window = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), axis=(2, 3)).reshape(40, 1, 8, 8, 9)
    seen = torch.from_numpy(np.median(window, -1)).round()
    assert report.clean is not None
    assert report.clean.k == int((load(str(trained))(seen).argmax(1) == data.labels).sum())
    rempart("audit", trained, *common, "--out", tmp_path / "bare", capsys=capsys)
    bare = store.read(tmp_path / "bare")
    assert bare.model.defences == () and bare.model.digest != report.model.digest
    assert bare.clean is not None and bare.clean.k > report.clean.k


def test_attack_and_certify_take_defences_too(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [trained, "--data", "digits:test[:10]", "--defence", "gaussian-noise:sigma=0.2"]
    attack = ["--attack", "pgd", "-o", "steps=2", "--threat", "linf:0.1", "--out", tmp_path / "x.npz"]
    assert rempart("attack", *common, *attack, capsys=capsys)[0] == 0
    report = Report.model_validate_json((tmp_path / "x.json").read_text("utf-8"))
    assert report.model.defences == ("gaussian-noise:sigma=0.2",) and report.attacks[0].options["eot"] == 20
    assert any("climbed the mean gradient of 20 passes" in note for note in report.notes)
    certify = ["--sigma", "0.1", "--samples", "20", "--selection", "5", "--out", tmp_path / "certified"]
    assert rempart("certify", *common, *certify, capsys=capsys)[0] == 0
    assert store.read(tmp_path / "certified").model.defences == ("gaussian-noise:sigma=0.2",)


def test_a_wrong_defence_is_told_before_anything_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["audit", "nowhere", "--data", "digits", "--threat", "linf:0.1", "--out", tmp_path / "out"]
    for text, expected in (("jpg", "did you mean 'jpeg'"), ("jpeg:quality=0", "quality='0'"), ("jpeg:q=1", "'q'")):
        status, _, error = rempart(*common, "--defence", text, capsys=capsys)
        assert status == 2 and expected in error, error
    status, listed, _ = rempart("list", "preprocessors", capsys=capsys)
    assert status == 0 and "-o quality=75" in listed and "random; a substitute gradient" in listed
