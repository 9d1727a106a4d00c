"""Comparing training runs: which audits are made, which are used again, and what is refused."""

import importlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rempart import runs, tasks
from rempart.attacks import attack_data
from rempart.core.errors import Cancelled, SpecError
from rempart.core.events import Event
from rempart.core.threat import Threat
from rempart.data import open_data
from rempart.models import load
from rempart.report import store
from rempart.report.schema import AuditSpec, Report, Training, TrainSpec

LIMIT = 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small networks trained on the embedded digits, whose recipes measure themselves by one threat; audited."""
    folders = tmp_path_factory.mktemp("runs") / "a", tmp_path_factory.mktemp("runs") / "b"
    for seed, folder in enumerate(folders):
        spec = TrainSpec(
            data="digits",
            model="mlp",
            recipe="plain:digits",
            options={"epochs": 1 + seed},
            seed=seed,
            out=str(folder),
        )
        report = tasks.run(spec)
        assert report is not None
        store.write(hardened(report, "linf:0.1"), folder)
    runs.audited(reports(folders), threat=None, limit=LIMIT)
    return folders


def hardened(report: Report, threat: str | None) -> Report:
    recipe: dict[str, Any] = {"options": {} if threat is None else {"threat": threat}}
    training = Training(
        recipe=recipe,
        objective="plain",
        best_epoch=1,
        train_images=1000,
        validation_images=100,
        queries=2000,
        gradients=1000,
        seconds=1.0,
    )
    return report.model_copy(update={"training": training})


@pytest.fixture
def fresh(trained: tuple[Path, Path], tmp_path: Path) -> list[Path]:
    """Copies of both runs, with their audits."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in trained]


def reports(paths: Sequence[Path]) -> dict[Path, Report]:
    return {path: store.read(path) for path in paths}


def test_each_model_is_audited_on_its_test_images_within_the_threat_of_the_recipes(trained: tuple[Path, Path]):
    found = runs.audited(reports(trained), threat=None, limit=LIMIT)
    assert list(found) == ["a", "b"]
    for folder, run in zip(trained, found.values(), strict=True):
        assert isinstance(run.audit.spec, AuditSpec)
        assert (run.audit.spec.suite, run.audit.spec.threat, run.audit.data.split) == ("fast", "linf:0.1", "test")
        assert run.audit.samples is not None and run.audit.samples.index == tuple(range(LIMIT))
        assert run.audit == store.read(folder / "audits" / f"linf-0.1-{LIMIT}")
        assert [attack.name for attack in run.minimum.attacks if attack.name != "checks"] == ["deepfool"]
        assert run.minimum.attacks[0].norm == "l2"


def test_sizes_are_those_of_the_images_deepfool_returns(fresh: list[Path]):
    run = runs.audited(reports(fresh), threat="linf:0.1", limit=LIMIT)["b"]
    model, data = load(str(fresh[1])), open_data("digits:test").head(LIMIT)
    outcome = attack_data(model, data, Threat(norm="l2"), "deepfool")
    x = data.batch(torch.arange(LIMIT)).x.double()
    right = model(x.float()).argmax(1) == data.labels
    fooled = model(outcome.x_adv).argmax(1) != data.labels
    relative = (outcome.x_adv.double() - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    expected = torch.where(right, torch.where(fooled, relative, torch.inf), 0.0)
    assert 0 < int(right.sum()) < LIMIT, "both kinds of image are there"
    assert run.sizes == pytest.approx(expected.numpy(), rel=1e-4)


def test_audits_are_used_again_until_something_they_depend_on_changes(
    fresh: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[str] = []

    def counted(spec: AuditSpec, notify: Any) -> Report | None:
        made.append(Path(str(spec.out)).relative_to(tmp_path).as_posix())
        return tasks.run(spec, notify)

    monkeypatch.setattr(runs, "run", counted)
    fresh = [fresh[0].rename(tmp_path / "c"), fresh[1]]
    assert set(runs.audited(reports(fresh), threat="linf:0.1", limit=LIMIT)) == {"c", "b"}
    assert made == [], "the same runs, in another place"
    runs.compare(fresh, threat="linf:0.05", limit=LIMIT)
    assert made == [f"{run}/audits/linf-0.05-{LIMIT}" for run in ("c", "b")], "the sizes have no threat"
    made.clear()
    shutil.copy(fresh[1] / "weights.safetensors", fresh[0] / "weights.safetensors")
    runs.compare(fresh, threat="linf:0.1", limit=LIMIT)
    assert made == [f"c/audits/{kind}-{LIMIT}" for kind in ("linf-0.1", "l2")], "other weights"
    made.clear()
    report = store.read(fresh[1] / "audits" / f"l2-{LIMIT}")
    older = report.model_copy(update={"environment": {**report.environment, "torch": "0"}})
    store.write(older, fresh[1] / "audits" / f"l2-{LIMIT}")
    runs.compare(fresh, threat="linf:0.1", limit=LIMIT)
    assert made == [f"b/audits/l2-{LIMIT}"], "another version"


def test_an_audit_cut_off_before_its_table_is_made_again(fresh: list[Path], monkeypatch: pytest.MonkeyPatch):
    """Other weights, and an end between the two files of their audit: the table is still that of the old ones."""

    def end(path: Path, arrays: Any) -> None:
        if path.parent.name.startswith("l2"):
            raise Cancelled

    shutil.copy(fresh[1] / "weights.safetensors", fresh[0] / "weights.safetensors")
    monkeypatch.setattr(tasks, "save_arrays", end)
    with pytest.raises(Cancelled):
        runs.audited(reports(fresh), threat="linf:0.1", limit=LIMIT)
    monkeypatch.undo()
    found = runs.audited(reports(fresh), threat="linf:0.1", limit=LIMIT)
    assert found["a"].sizes == pytest.approx(found["b"].sizes), "the same weights"
    assert (fresh[0] / "audits" / f"linf-0.1-{LIMIT}" / "samples.npz").exists()


def test_a_stopped_comparison_goes_on(fresh: list[Path], tmp_path: Path):
    def stop(event: Event) -> None:
        if event.stage.startswith("b: ") and event.done:
            raise Cancelled

    shutil.rmtree(fresh[1] / "audits")
    with pytest.raises(Cancelled):
        runs.compare(fresh, threat="linf:0.1", limit=LIMIT, out=tmp_path / "page.html", notify=stop)
    assert not (tmp_path / "page.html").exists()
    before = store.read(fresh[0] / "audits" / f"linf-0.1-{LIMIT}")
    assert before.complete
    table = runs.compare(fresh, threat="linf:0.1", limit=LIMIT, out=tmp_path / "page.html")
    assert store.read(fresh[0] / "audits" / f"linf-0.1-{LIMIT}") == before
    assert "worst case" in table and "rho_2" in table
    assert "2 training runs on digits" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize(("threats", "told"), [(("linf:0.1", "linf:0.05"), "linf:0.1 of"), ((None, None), "none in")])
def test_recipes_that_agree_on_no_threat_need_one(fresh: list[Path], threats: tuple[str | None, ...], told: str):
    for folder, threat in zip(fresh, threats, strict=True):
        store.write(hardened(store.read(folder), threat), folder)
    with pytest.raises(SpecError, match=f"--threat.*{told}"):
        runs.compare(fresh, limit=LIMIT + 1)
    assert not list(fresh[0].glob(f"audits/*-{LIMIT + 1}"))


def test_a_recipe_without_threat_has_no_say(fresh: list[Path]):
    store.write(hardened(store.read(fresh[0]), None), fresh[0])
    found = runs.audited(reports(fresh), threat=None, limit=LIMIT)
    assert {run.audit.spec.threat for run in found.values() if isinstance(run.audit.spec, AuditSpec)} == {"linf:0.1"}


def test_kinds_do_not_mix_and_audits_have_their_own_threat(fresh: list[Path], tmp_path: Path):
    audits = [folder / "audits" / f"linf-0.1-{LIMIT}" for folder in fresh]
    with pytest.raises(SpecError, match="training runs alone, or audits alone"):
        runs.compare([fresh[0], audits[1]], threat="linf:0.1")
    with pytest.raises(SpecError, match="an audit has its own"):
        runs.compare(audits, threat="linf:0.1")
    with pytest.raises(SpecError, match="two or more"):
        runs.compare(fresh[:1], threat="linf:0.1")
    assert "worst case" in runs.compare(audits, out=tmp_path / "audits.html")
    assert (tmp_path / "audits.html").exists()


def test_the_folder_of_a_run_cannot_name_code_to_run(
    fresh: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A report may say that its model began as Python code; only the user may say so, as for every other command."""
    (fresh[0] / "planted.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef net(): ...\n")
    monkeypatch.chdir(tmp_path)
    code = f"python:{fresh[0].name}.planted:net"
    report = store.read(fresh[0])
    assert isinstance(report.spec, TrainSpec)
    store.write(report.model_copy(update={"spec": report.spec.model_copy(update={"start": code})}), fresh[0])
    with pytest.raises(SpecError, match=f"where you trust that code, give {code}@"):
        runs.compare(fresh, threat="linf:0.1", limit=LIMIT)
    assert not Path("ran").exists()


OWN = """
from rempart.models import build
def net(): return build("mlp", shape=(1, 8, 8), num_classes=10)
"""


def test_runs_of_a_network_of_the_users_own_are_compared_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_compared.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    code = "python:own_compared:net"
    for seed, name in enumerate(("a", "b")):
        tasks.run(
            TrainSpec(data="digits", start=code, recipe="plain:digits", options={"epochs": 2}, seed=seed, out=name)
        )
    table = runs.compare([Path(f"{code}@{name}") for name in ("a", "b")], threat="linf:0.1", limit=LIMIT)
    assert "worst case" in table and (tmp_path / "a/audits").exists()


OWN_CODE = """import torch
from torch import nn
class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return g * 1
class Net(nn.Module):
    shape, num_classes = (1, 8, 8), 10
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 10)
    def forward(self, x): return self.b(torch.relu(self.a(Own.apply(x).flatten(1))))
def net(): return Net()
"""


def test_a_kept_audit_is_not_that_of_other_code_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in front of the same weights, another backward pass, a report that records no code: audited anew."""
    monkeypatch.chdir(tmp_path)
    source = Path("code_of_runs.py")
    where = "python:code_of_runs:net"
    for number in (0, 1):
        write_code(source, OWN_CODE, monkeypatch)
        options: Any = {"data": "digits", "start": where, "recipe": "plain:digits", "options": {"epochs": 1}}
        tasks.run(TrainSpec(**options, seed=number, out=f"run{number}"))
    made: list[str] = []

    def counted(spec: AuditSpec, notify: Any) -> Report | None:
        made.append(str(spec.out))
        return tasks.run(spec, notify)

    monkeypatch.setattr(runs, "run", counted)

    def clean() -> list[float]:
        found = {Path(f"run{number}"): store.read(f"run{number}") for number in (0, 1)}
        code = dict.fromkeys(found, where)
        audited = runs.audited(found, code=code, threat="linf:0.05", limit=8)
        values = [run.audit.clean.value for run in audited.values() if run.audit.clean is not None]
        number, made[:] = len(made), []
        return [number, *values]

    assert clean()[0] == 4 and clean()[0] == 0
    write_code(source, OWN_CODE.replace("Own.apply(x)", "Own.apply(x.flip(-1))"), monkeypatch)
    count, *values = clean()
    x, y = (batch := open_data("digits:test").batch(torch.arange(8))).x, batch.y
    assert count == 4 and values == [
        float((load(f"{where}@run{number}")(x).argmax(1) == y).double().mean()) for number in (0, 1)
    ]
    write_code(source, OWN_CODE.replace("g * 1", "g * 0"), monkeypatch)
    assert clean()[0] == 4
    folder = next(Path("run0/audits").glob("l2-*"))
    report = store.read(folder)
    store.write(
        report.model_copy(update={"model": report.model.model_copy(update={"code": "", "answers": ()})}), folder
    )
    assert clean()[0] == 1, "a report of an earlier version leaves open which code it is about"


def write_code(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process would find it."""
    path.write_text(text)
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
