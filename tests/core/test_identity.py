"""Which network it is: every change of weights, code or answers is seen, and a change of neither is not."""

import importlib
import importlib.util
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toys
from rempart import Classifier
from rempart.core.identity import Identity, agree, code_of, identity
from rempart.models import load
from rempart.models.load import card

NET = '''"""A network."""
import torch
from torch import nn
from {name}_help import bend, SLOPE

class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1 * g  # BACK

class Net(nn.Module):
    """Docs."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(16, 3)
    def forward(self, x):
        return self.a(bend(Own.apply(x.flatten(1))) * SLOPE)

def net():
    n = Net(); n.shape = (1, 4, 4); n.num_classes = 3
    return n
'''
HELP = "SLOPE = 1.0\n\ndef bend(x):\n    from {name}_deep import deep\n    return deep(x)\n"
DEEP = "def deep(x):\n    return x\n"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Identity]:
    """The identity of the network of three modules, with a text in them replaced; each call imports them anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def made(old: str = "", new: str = "", name: str = "own_net") -> Identity:
        for suffix, text in (("", NET), ("_help", HELP), ("_deep", DEEP)):
            content = text.replace("{name}", name)
            (tmp_path / f"{name}{suffix}.py").write_text(content.replace(old, new) if old else content)
            monkeypatch.delitem(sys.modules, name + suffix, raising=False)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        found = identity(load(f"python:{name}:net"))
        for suffix in ("", "_help", "_deep"):
            sys.modules.pop(name + suffix, None)
        return found

    return made


@pytest.mark.parametrize(
    ("old", "new", "answered"),
    [
        ("return x\n", "return x.flip(-1)\n", True),  # two imports away, inside a function
        ("SLOPE = 1.0", "SLOPE = 1.1", True),  # a constant of a module
        ("return 1 * g", "return 0 * g", True),  # the backward pass alone
        ("def net():", "def hook(*_):\n    return None\n\ndef net():", False),  # the module of the factory
        ("x.flatten(1)", "(x * (x < 9)).flatten(1)", False),  # what no answer shows
    ],
)
def test_a_change_of_code_with_the_same_weights_is_seen(
    written: Callable[..., Identity], old: str, new: str, answered: bool
) -> None:
    before, after = written(), written(old, new)
    assert before.weights == after.weights and before.code != after.code
    assert "the same weights" in before.difference(after) and not before.certain(after)
    assert agree(before.answers, after.answers) == (not answered)


@pytest.mark.parametrize("call", ["importlib.import_module('late_part')", "__import__('late_part')"])
def test_modules_that_a_call_imports_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "late_net.py").write_text(
        "import importlib\nfrom torch import nn\n"
        f"class Net(nn.Module):\n    def forward(self, x):\n        return {call}.part(x.flatten(1))[:, :3]\n"
        "def net():\n    n = Net(); n.shape = (1, 4, 4); n.num_classes = 3\n    return n\n"
    )
    found = []
    for part in ("def part(x): return x\n", "def part(x): return x.where(x < 9, 0)\n"):
        (tmp_path / "late_part.py").write_text(part)
        for name in ("late_net", "late_part"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        monkeypatch.syspath_prepend(tmp_path)
        found.append(identity(load("python:late_net:net")))
    assert found[0].weights == found[1].weights and found[0].code != found[1].code


class Polar(nn.Module):
    """Dark images are turned into their negatives, from a brightness on that is neither weight nor code."""

    def __init__(self, dark: float) -> None:
        super().__init__()
        self.dark, self.passes = dark, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return torch.where(x.mean((1, 2, 3), keepdim=True) < self.dark, x, 1 - x).flatten(1)[:, :4]


def test_a_setting_counts_and_a_counter_does_not() -> None:
    def known(dark: float) -> Identity:
        return identity(Classifier(Polar(dark), shape=(1, 4, 4), num_classes=4, output="logits"))

    one, same, near, far = known(0.4), known(0.4), known(0.41), known(0.2)
    assert one.certain(same)
    assert "other code" in one.difference(near) and agree(one.answers, near.answers), "no probe lies between"
    assert not agree(one.answers, far.answers)
    model = Classifier(Polar(0.4), shape=(1, 4, 4), num_classes=4, output="logits")
    assert identity(model) == identity(model), "however often it was asked"


class Bent(nn.Module):
    """A value that its backward pass alone uses."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = torch.tensor(slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)[:, :4] ** 2
        if x.requires_grad:
            x.register_hook(lambda gradient: torch.where(gradient > 1.5, self.slope * gradient, gradient))
        return x


def test_a_value_of_the_backward_pass_shows_in_the_gradients() -> None:
    one, same, other = (
        identity(Classifier(Bent(slope), shape=(1, 4, 4), num_classes=4, output="logits")) for slope in (1.0, 1.0, 0.5)
    )
    assert one.certain(same) and one.code == other.code
    assert "other gradients" in one.difference(other)


@pytest.mark.parametrize(
    ("old", "new"),
    [("# BACK", "# as it was"), ('"""Docs."""', '"""Other words."""'), ("Linear(16, 3)", "Linear(16,3)")],
)
def test_comments_docstrings_and_formatting_change_nothing(
    written: Callable[..., Identity], old: str, new: str
) -> None:
    before, after = written(), written(old, new)
    assert before == after and before.certain(after) and before.difference(after) == ""


def test_another_process_in_another_folder_finds_the_same_identity(
    written: Callable[..., Identity], tmp_path: Path
) -> None:
    before = written()
    text = "from rempart.core.identity import identity\nfrom rempart.models import load\n"
    text += "i = identity(load('python:own_net:net'))\nprint(i.weights, i.code)"
    other = tmp_path / "other"
    other.mkdir()
    for file in tmp_path.glob("*.py"):
        (other / file.name).write_text(file.read_text())
    run = subprocess.run([sys.executable, "-c", text], cwd=other, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [before.weights, before.code]


class Kept(nn.Module):
    """Its settings are no state."""

    def __init__(self, scale: float = 1.0, bend: Callable[[Any], Any] = torch.relu) -> None:
        super().__init__()
        self.scale, self.bend, self.table = scale, bend, torch.ones(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.bend(x.flatten(1) - 0.5)[:, :4] * self.table[:4]


def _kept(**settings: Any) -> Classifier:
    return Classifier(Kept(**settings), shape=(1, 4, 4), num_classes=4).eval()


def _patched() -> Classifier:
    model = _kept()
    model.net.forward = types.MethodType(lambda self, x: -x.flatten(1)[:, :4], model.net)
    return model


def _table() -> Classifier:
    model = _kept()
    model.net.table = torch.arange(16.0)
    return model


@pytest.mark.parametrize(
    "other",
    [
        lambda: _kept(scale=2.0),
        lambda: _kept(bend=torch.tanh),
        _patched,
        _table,
        lambda: Classifier(Kept(), shape=(1, 4, 4), num_classes=4, output="sigmoids"),
        lambda: Classifier(Kept(), shape=(1, 4, 4), num_classes=4, high=255.0),
    ],
)
def test_what_is_no_state_shows_in_the_answers(other: Callable[[], Classifier]) -> None:
    before, after = identity(_kept()), identity(other())
    assert before.weights == after.weights and before.difference(after)


def test_answers_agree_within_rounding_and_not_beyond() -> None:
    """One in a thousand of the largest, whichever processor: closed form."""
    assert agree([1.0, -1000.0], [1.9, -1000.9]) and not agree([1.0, -1000.0], [2.1, -1000.0])
    assert not agree([1.0], [1.0, 1.0]) and agree([0.0, 0.0], [0.0, 0.0])
    model = toys.linear((1, 4, 4), 4)
    exact = Classifier(model.net.double(), shape=(1, 4, 4), num_classes=4)
    assert agree(identity(toys.linear((1, 4, 4), 4)).answers, identity(exact).answers)


def test_a_network_that_cannot_be_replayed_is_never_certain() -> None:
    class Moody(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Moody.calls += 1
            return x.flatten(1)[:, :4] * Moody.calls

    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x.flatten(1)[:, :4], 0.5, training=True)

    known = identity(Classifier(Moody(), shape=(1, 4, 4), num_classes=4))
    assert known.answers == () and not known.certain(known) and known.difference(known) == ""
    seeded = [identity(Classifier(Dropping(), shape=(1, 4, 4), num_classes=4)) for _ in range(2)]
    assert seeded[0].answers and seeded[0].certain(seeded[1]), "seeded draws are the same ones"


def test_what_an_earlier_version_recorded_matches_by_its_weights() -> None:
    now = Identity("a", "b", (1.0,))
    assert Identity("a").difference(now) == "" and not Identity("a").certain(now)
    assert "other weights" in Identity("c").difference(now)


@pytest.mark.usefixtures("untouched_rng")
def test_it_draws_from_no_global_generator() -> None:
    identity(_kept())


def test_code_that_no_file_holds_counts_by_what_it_was_compiled_to() -> None:
    def typed(text: str) -> str:
        space: dict[str, Any] = {"__name__": "__typed__"}
        exec(text, space)
        return code_of([space["f"]])

    text = "K = 2\ndef g(x): return x + 1\ndef f(x): return g(x) * K\n"
    others = [text.replace("K = 2", "K = 3"), text.replace("x + 1", "x + 2"), text.replace("* K", "- K")]
    assert typed(text) == typed(text + "# a comment\n")
    assert len({typed(other) for other in [text, *others]}) == 4


def test_traced_and_scripted_networks_count_by_their_graphs() -> None:
    def shown(net: nn.Module) -> str:
        return code_of([torch.fx.symbolic_trace(net)])

    class Sum(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.times + 1

    assert shown(Sum(2)) == shown(Sum(2)) != shown(Sum(3))


def test_an_installed_attack_counts_and_the_libraries_it_imports_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "site-packages"
    (home / "climbing").mkdir(parents=True)
    monkeypatch.syspath_prepend(home)

    def shown(step: str, installed: bool) -> str:
        (home / "climbing" / "__init__.py").write_text("import torch, shared_lib\nfrom climbing.steps import step\n")
        (home / "climbing" / "steps.py").write_text(f"def step():\n    return {step}\n")
        (home / "shared_lib.py").write_text(f"VERSION = '{step}'\n" if not installed else "VERSION = 0\n")
        for name in ("climbing", "climbing.steps", "shared_lib"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        import climbing  # pyright: ignore[reportMissingImports]

        return code_of([climbing.step], installed=installed)

    assert shown("1", True) != shown("2", True)
    assert shown("1", False) == shown("2", False)


def test_a_card_records_it_and_an_old_card_opens() -> None:
    model = _kept()
    told = card(model, "python:own:net")
    assert told.identity == identity(model)
    old = told.model_dump(exclude={"code", "answers"})
    assert type(told).model_validate(old).identity == Identity(told.digest)
