"""An audit in pieces: whoever works on them, and however often it was stopped, the report is the same."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toys
from alike import differences
from rempart import tasks
from rempart.attacks.plan import Planned
from rempart.attacks.run import Verdict
from rempart.audit import Audit, audit
from rempart.audit.pieces import Piece, Pieces, attack_chunk, chunks, kept_in, stored, varied
from rempart.core.errors import RempartError
from rempart.core.events import Event, silent
from rempart.core.model import Classifier
from rempart.core.ranks import ranks
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.report.schema import AttackChoice, AuditSpec, ModelCard, Report, TrainSpec
from rempart.report.store import read

TIMES = {"created": "", "seconds": 0.0, "environment": {}}


def comparable(report: Report) -> dict[str, Any]:
    """Everything but times, versions and the way the work was shared out."""
    spec = report.spec.model_copy(update={"devices": 1, "out": None})
    attacks = tuple(result.model_copy(update={"seconds": 0.0}) for result in report.attacks)
    return report.model_copy(update={**TIMES, "spec": spec, "attacks": attacks}).model_dump()


def toy(n: int = 30) -> tuple[Any, Data]:
    model = toys.linear((1, 4, 4), 4)
    x = toys.images((1, 4, 4), n)
    y = toys.labels(model, x)
    y[::5] = (y[::5] + 1) % 4
    names = tuple("0123")
    return model, Data("toy", "test", torch.arange(n) + 100, y, (1, 4, 4), names, lambda numbers: x[numbers - 100])


def run(folder: Path | None = None, *, notify: Any = silent, chunk: int = 8, suite: str | None = None) -> Audit:
    model, data = toy()
    card = ModelCard(source="", name="toy", digest="0", parameters=1, shape=(1, 4, 4), classes=tuple("0123"))
    names = () if suite else ("fgsm", "pgd", "deepfool")
    choices = tuple(AttackChoice(name=name) for name in names)
    spec = AuditSpec(
        model="", data="", threat="linf:0.02", attacks=choices, suite=suite, chunk=chunk, batch_size=4, sweep=False
    )
    result = audit(model, data, spec, card=card, folder=folder, notify=notify)
    assert result is not None
    return result


class Stopped:
    """A listener that notes which pieces are worked on and stops the audit when the n-th begins."""

    def __init__(self, after: int = 10**9) -> None:
        self.after, self.begun = after, list[tuple[str, str]]()

    def __call__(self, event: Event) -> None:
        piece = (event.stage, event.note)
        if piece not in self.begun and not event.stage.startswith("check"):
            if len(self.begun) == self.after:
                raise KeyboardInterrupt
            self.begun.append(piece)


def test_the_size_of_a_chunk_changes_no_result() -> None:
    whole, parts = run(chunk=512).report, run(chunk=7).report
    same = {"spec": whole.spec}
    one, other = (comparable(report.model_copy(update=same)) for report in (whole, parts))
    assert not list(differences(one, other))  # a product of fewer rows is rounded otherwise


@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_a_stopped_audit_goes_on_and_repeats_no_piece(after: int, tmp_path: Path) -> None:
    first, second = Stopped(after), Stopped()
    partial = run(tmp_path / "pieces", notify=first).report
    assert not partial.complete and len(first.begun) == after
    final = run(tmp_path / "pieces", notify=second).report
    assert not set(first.begun) & set(second.begun), "a finished piece was done again"
    assert len(first.begun) + len(second.begun) == 12
    assert comparable(final) == comparable(run().report)
    assert len(list((tmp_path / "pieces").glob("*/*.npz"))) == 12, "the caller removes them, once the report is safe"


def test_a_partial_report_tells_whole_chunks() -> None:
    partial, whole = run(notify=Stopped(8)).report, run().report
    assert partial.samples is not None and whole.samples is not None
    assert partial.samples.index == whole.samples.index[:16]
    assert partial.samples.right == {label: row[:16] for label, row in whole.samples.right.items() if label != "checks"}
    assert partial.not_run == ("14 of 30 samples", "checks")


def test_pieces_of_another_request_and_broken_files_are_not_taken_up(tmp_path: Path) -> None:
    run(tmp_path / "pieces", notify=Stopped(3))
    (folder,) = (tmp_path / "pieces").iterdir()
    sorted(folder.glob("*.npz"))[0].write_bytes(b"PK not an archive")
    assert len(stored(folder)) == 2
    listener = Stopped()
    run(tmp_path / "pieces", notify=listener, chunk=9)
    assert len(listener.begun) == 12


def test_pieces_of_a_model_with_the_same_weights_and_other_code_are_not_taken_up(tmp_path: Path) -> None:
    model, data = toy()
    card = ModelCard(source="", name="toy", digest="0", parameters=1, shape=(1, 4, 4), classes=tuple("0123"))
    spec = AuditSpec(model="a", data="", threat="linf:0.02", attacks=(AttackChoice(name="fgsm"),), chunk=8, sweep=False)
    inverted = Classifier(nn.Sequential(_Inverse(), model.net), shape=(1, 4, 4), num_classes=4)
    audit(model, data, spec, card=card, folder=tmp_path, notify=Stopped(3))
    for other, name in ((inverted, "a"), (model, "b")):
        listener = Stopped()
        audit(other, data, spec.model_copy(update={"model": name}), card=card, folder=tmp_path, notify=listener)
        assert len(listener.begun) == 4, "pieces of another model were taken up"
    listener = Stopped()
    audit(model, data, spec, card=card, folder=tmp_path, notify=listener)
    assert len(listener.begun) == 1


class _Inverse(nn.Module):
    """No weights of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1 - x


def test_a_piece_survives_its_file(tmp_path: Path) -> None:
    model, data = toy()
    planned = (Planned("pgd 2", "pgd", {"steps": 3}), Planned("fgsm", "fgsm", {}, survivors=True))
    spec = AuditSpec(model="", data="", threat="linf:0.3", batch_size=4, eight_bit=True)
    done: Pieces = {}
    attack_chunk(model, data.head(8), 3, planned, Threat.parse(spec.threat), spec, done, tmp_path, silent)
    again = stored(tmp_path)
    assert done.keys() == again.keys() == {(3, "pgd 2"), (3, "fgsm")}
    assert done[3, "fgsm"].verdict is None, "pgd leaves nothing at that budget"
    for key, piece in done.items():
        assert torch.equal(piece.shown, again[key].shown) and torch.equal(piece.images, again[key].images)
        assert plain(piece) == plain(again[key])


def plain(piece: Piece) -> dict[str, Any]:
    if piece.verdict is None:
        return {}
    values = {name: getattr(piece.verdict, name) for name in Verdict.__dataclass_fields__}
    return {name: str(value.tolist()) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def test_in_a_cascade_later_attacks_get_the_survivors_alone() -> None:
    model, data = toy()
    alone = run(chunk=512)
    planned = (Planned("fgsm", "fgsm", {}), Planned("pgd", "pgd", {"steps": 40}, survivors=True))
    spec = AuditSpec(model="", data="", threat="linf:0.02", batch_size=4)
    done: Pieces = {}
    for number, part in enumerate(chunks(data, 8)):
        attack_chunk(model, part, number, planned, Threat.parse(spec.threat), spec, done, None, silent)
    for number, part in enumerate(chunks(data, 8)):
        standing = done[number, "fgsm"].verdict.right  # type: ignore[union-attr]
        second = done[number, "pgd"].verdict
        assert (second is None) == (not bool(standing.any()))
        if second is None:
            continue
        assert torch.equal(second.index, part.index[standing])
        everywhere = alone.verdicts["pgd"]
        rows = torch.isin(everywhere.index, second.index)
        assert torch.equal(everywhere.right[rows], second.right), "being in a cascade changed a verdict"


def test_pictures_are_of_different_classes_first() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    assert varied(torch.tensor([True, True, True, False, True, True]), labels) == [0, 4, 5, 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tasks.run(TrainSpec(data="digits", model="lenet", recipe="plain:digits", options={"epochs": 2}, out=str(folder)))
    return folder


def command(model: Path, data: str, out: Path, *more: str) -> list[str]:
    attacks = ["--attack", "fgsm", "--attack", "pgd:steps=10", "--batch-size", "8", "--chunk", "8"]
    head = [sys.executable, "-m", "rempart", "audit", str(model), "--data", data, "--threat", "linf:0.1"]
    return [*head, *attacks, "--out", str(out), *more]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(("data", "chunk"), [("digits:test[:21]", "8"), ("digits:train[:1000]", "250")])
def test_two_processes_give_the_report_of_one(model: Path, data: str, chunk: str, tmp_path: Path) -> None:
    for processes in ("1", "2"):
        done = call(*command(model, data, tmp_path / processes, "--devices", processes, "--chunk", chunk))
        assert done.returncode == 0, done.stderr
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert two.environment["processes"] == "2" and two.complete
    assert not list(differences(comparable(one), comparable(two)))  # the processes share out the threads


def test_an_audit_that_was_killed_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    arguments = command(model, "digits:train[:160]", tmp_path / "killed")
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    pieces = tmp_path / "killed" / "pieces"
    for _ in range(2000):
        if len(list(pieces.glob("*/*.npz"))) >= 10:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = {file: file.stat().st_mtime_ns for file in pieces.glob("*/*.npz")}
    assert 10 <= len(left) < 40
    finished = [int(file.name.split("-")[0]) for file in left if "pgd" in file.name]
    again = call(*arguments)
    assert again.returncode == 0, again.stderr
    for number in finished:
        assert f"samples {8 * number} to" not in again.stderr, "a finished chunk was done again"
    assert not pieces.exists(), "a finished audit leaves no pieces"
    call(*command(model, "digits:train[:160]", tmp_path / "whole"))
    assert not list(differences(comparable(read(tmp_path / "killed")), comparable(read(tmp_path / "whole"))))


def test_an_audit_shared_by_torchrun_is_the_same(model: Path, tmp_path: Path) -> None:
    """As torchrun starts them: the processes know each other through the environment alone."""
    arguments = command(model, "digits:test[:21]", tmp_path / "two")
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    both = [
        subprocess.Popen(
            arguments,
            env={**shared, "RANK": number, "LOCAL_RANK": number},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in ("1", "0")
    ]
    (second, silence), (first, _) = (process.communicate(timeout=200) for process in both)
    assert [process.returncode for process in both] == [0, 0], silence
    assert "worst case" in first and second == silence == "", "the first process alone talks"
    call(*command(model, "digits:test[:21]", tmp_path / "one"))
    assert not list(differences(comparable(read(tmp_path / "one")), comparable(read(tmp_path / "two"))))


def test_a_process_that_fails_ends_the_work() -> None:
    child = [sys.executable, "-c", "raise SystemExit(7)"]
    with pytest.raises(RempartError, match="exit status 7"), ranks(2, child) as here:
        here.gather([b""])


def test_large_pieces_travel_too() -> None:
    """The store of torch.distributed refuses values over 8 MiB."""
    large = "from rempart.core.ranks import ranks\nwith ranks(1, []) as r: r.gather([b'', b'ab' * 10_000_000])"
    with ranks(2, [sys.executable, "-c", large]) as here:
        assert here.gather([b"mine"]) == [b"mine", b"", b"ab" * 10_000_000]


def test_leaving_early_ends_the_other_processes(tmp_path: Path) -> None:
    sleeper = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt), ranks(2, [sys.executable, "-c", sleeper]):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Also when that one is killed, and cannot tell them."""
    note = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    child = f"import os, time\nfrom rempart.core.ranks import ranks\n{note}\nwith ranks(1, []):\n    time.sleep(600)"
    parent = (
        "import sys, time\nfrom rempart.core.ranks import ranks\n"
        f"with ranks(2, [sys.executable, '-c', {child!r}]):\n    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process.kill()
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    for _ in range(200):
        if not _runs(pid):
            break
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Alive, and not a zombie that nobody has collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _behind(text: str, net: nn.Module) -> Classifier:
    """The network behind a step that is typed in, as in a notebook."""
    space: dict[str, Any] = {"__name__": "__typed__", "nn": nn, "torch": torch}
    exec(text, space)
    return Classifier(nn.Sequential(space["Step"](), net), shape=(1, 4, 4), num_classes=4).eval()


def test_pieces_of_another_backward_pass_are_not_taken_up(tmp_path: Path) -> None:
    """Weights and answers are the same: only the code is not."""
    text = """
class Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g * FACTOR
FACTOR = 1
class Step(nn.Module):
    def forward(self, x): return Back.apply(x)
"""
    model, data = toy()
    card = ModelCard(source="", name="toy", digest="0", parameters=1, shape=(1, 4, 4), classes=tuple("0123"))
    spec = AuditSpec(model="a", data="", threat="linf:0.02", attacks=(AttackChoice(name="fgsm"),), chunk=8, sweep=False)
    for number, other in enumerate((text, text.replace("FACTOR = 1", "FACTOR = -1"), text.replace("g *", "0 * g *"))):
        listener = Stopped()
        audit(_behind(other, model.net), data, spec, card=card, folder=tmp_path, notify=listener)
        assert len(listener.begun) == 4, f"pieces of other code were taken up ({number})"
    listener = Stopped()
    audit(_behind(text, model.net), data, spec, card=card, folder=tmp_path, notify=listener)
    assert not listener.begun


def test_answers_that_differ_by_rounding_alone_share_a_folder(tmp_path: Path) -> None:
    """Machines with other processors or threads work on one audit: close answers never fall on two sides of a cut."""
    model, data = toy()
    threat, spec = Threat.parse("linf:0.1"), AuditSpec(model="", data="", threat="linf:0.1")
    versions = {"rempart": "0", "torch": "0"}

    def place(factor: float) -> str:
        scaled = Classifier(nn.Sequential(_Scaled(factor), model.net), shape=(1, 4, 4), num_classes=4).eval()
        return kept_in(tmp_path, scaled, data, (), threat, spec, versions).name

    exact = place(1.0)
    assert {place(1 + 1e-7 * k) for k in range(-20, 20)} == {exact}
    assert place(1.1) == f"{exact}-2" == place(1.1) and place(1.0) == exact


class _Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor
