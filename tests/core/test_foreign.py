"""Code that is not Rempart's ends no process and leaves nothing behind in it."""

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rempart import Classifier, cli, tasks
from rempart.attacks import attack_batch
from rempart.core import foreign
from rempart.core.errors import ModelError, SpecError
from rempart.core.ranks import ranks
from rempart.core.registry import Registry
from rempart.models import load
from rempart.report.schema import AttackChoice, AuditSpec

NET = "from rempart.models import build\ndef net(): return build('mlp', shape=(1, 8, 8), num_classes=10)\n"
PARSER = "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('input')\nparser.parse_args(ARGS)\n"
ENDS = {
    "sys.exit(0)": "import sys\nsys.exit(0)\n",
    "sys.exit(None)": "import sys\nsys.exit()\n",
    "sys.exit('bye')": "raise SystemExit('bye')\n",
    "sys.exit(2)": PARSER.replace("ARGS", "[]"),
    "sys.exit(0) ": PARSER.replace("ARGS", "['--help']"),
    "KeyboardInterrupt": "raise KeyboardInterrupt\n",
    "GeneratorExit": "raise GeneratorExit\n",
    "CancelledError": "import asyncio\nraise asyncio.CancelledError\n",
    "Own": "class Own(BaseException): ...\nraise Own\n",
}


@pytest.fixture
def handled() -> Iterator[None]:
    """Ctrl-C as the command line handles it."""
    before = signal.signal(signal.SIGINT, foreign.stop)
    yield
    signal.signal(signal.SIGINT, before)
    foreign.STOPPED.clear()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module in the current directory and return the source of a model."""
    monkeypatch.chdir(tmp_path)

    def written(text: str) -> str:
        (tmp_path / "script.py").write_text(text)
        monkeypatch.delitem(sys.modules, "script", raising=False)
        importlib.invalidate_caches()
        return "python:script:net"

    return written


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("where", ["import", "factory", "forward"])
def test_code_that_ends_the_process_is_an_error_that_names_its_line(
    module: Callable[[str], str], how: str, where: str
) -> None:
    body = "".join(f"    {line}\n" for line in ENDS[how].splitlines())
    text = {
        "import": ENDS[how] + NET,
        "factory": f"def net():\n{body}",
        "forward": "from rempart import Classifier\nfrom torch import nn\ndef run(x):\n"
        + body
        + "class Net(nn.Module):\n"
        "    def forward(self, x): return run(x)\n"
        "def net(): return Classifier(Net(), shape=(1, 8, 8), num_classes=2)\n",
    }[where]
    with pytest.raises(ModelError) as caught:
        model = load(module(text))
        model(torch.zeros(1, 1, 8, 8))
    assert f"{how.strip()} in script.py, line " in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize("how", ["import", "factory"])
def test_an_ending_that_a_module_wraps_is_its_error(module: Callable[[str], str], how: str) -> None:
    body = (
        "try:\n    raise SystemExit(3)\nexcept SystemExit as error:\n    raise RuntimeError('no weights') from error\n"
    )
    inner = "".join(f"    {line}\n" for line in body.splitlines())
    with pytest.raises(ModelError, match=r"RuntimeError: no weights \(script.py, line"):
        load(module(body if how == "import" else f"def net():\n{inner}"))


@pytest.mark.usefixtures("handled")
def test_a_users_interruption_stays_one() -> None:
    with pytest.raises(KeyboardInterrupt), foreign.contained("nothing"):
        os.kill(os.getpid(), signal.SIGINT)
    assert foreign.STOPPED.is_set()


def test_without_our_handler_an_interruption_counts_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), foreign.contained("nothing"):
        raise KeyboardInterrupt


class Ending(nn.Module):
    """It ends the process in its backward pass, where no forward pass is guarded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Ending.apply(x.flatten(1)[:, :10])  # pyright: ignore


class _Ending(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise SystemExit(0)


def ending() -> Classifier:
    return Classifier(Ending(), shape=(1, 8, 8), num_classes=10, output="logits")


def test_a_request_whose_code_ends_the_process_fails_and_a_job_with_it(tmp_path: Path) -> None:
    """`tasks.run` is what the command line, Python and the child process of a job call."""
    from rempart.serve import child

    spec = AuditSpec(
        model=f"python:{__name__}:ending",
        data="digits:test[:8]",
        threat="linf:0.1",
        attacks=(AttackChoice(name="fgsm"),),
        out=str(tmp_path / "out"),
    )
    with pytest.raises(SpecError, match=r"sys.exit\(0\) in test_foreign.py, line"):
        tasks.run(spec)
    assert not (tmp_path / "out" / "report.json").exists()
    (tmp_path / child.SPEC).write_text(spec.model_dump_json())
    outcome = child._done(tmp_path)
    assert outcome is not None and outcome.state == "failed" and "sys.exit(0)" in outcome.reason


def _leaves(*_: Any, **__: Any) -> torch.Tensor:
    raise SystemExit(0)


def test_attacks_target_rules_and_backward_passes_end_no_process() -> None:
    """Called from Python, as a test or a notebook does."""
    x, y, plain = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), ending()
    y = plain(x).argmax(1)
    for attack, target in ((_leaves, None), ("pgd", _leaves), ("pgd", None), ("fab", None), ("cw", None)):
        with pytest.raises(SpecError, match=r"sys.exit\(0\) in test_foreign.py, line") as caught:
            attack_batch(plain, x, y, "linf:0.1" if attack != "cw" else "l2:1", attack, target=target)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit(1)])
def test_no_command_ends_as_if_it_had_done_its_work(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last guard: whatever part of a command ends the process, here a listing."""
    from rempart import listing

    def end(what: str) -> str:
        raise error

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(listing, "describe", end)
    monkeypatch.setattr(sys, "argv", ["rempart", "list", "attacks"])
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 2 and "test_foreign.py, line" in capsys.readouterr().err


def test_a_plug_in_that_ends_the_process_or_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        value = "climbing.attacks"

        def __init__(self, error: BaseException) -> None:
            self.error = error

        def load(self) -> None:
            raise self.error

    for error, words in ((SystemExit(0), r"sys.exit\(0\)"), (ImportError("no module x"), "ImportError: no module x")):
        monkeypatch.setattr("rempart.core.registry.entry_points", lambda group, error=error: [Point(error)])
        with pytest.raises(SpecError, match=f"climbing.attacks of the group made.up.*{words}"):
            len(Registry("thing", group="made.up"))


def test_a_process_that_ends_with_0_and_sent_nothing_ends_the_work() -> None:
    from rempart.core.errors import RempartError

    child = [sys.executable, "-c", "import os; os._exit(0)"]
    with pytest.raises(RempartError, match="exit status 0"), ranks(2, child) as here:
        here.gather([b""])


LEAVES = {
    "the directory": "import os\nos.chdir('/')\n",
    "gradients": "import torch\ntorch.set_grad_enabled(False)\n",
    # kept, as by a module that stays: when it goes, it puts back the modes it found, in the middle of whatever runs
    "inference mode": "import sys, torch\nsys.kept = torch.inference_mode()\nsys.kept.__enter__()\n",
    "the dtype": "import torch\ntorch.set_default_dtype(torch.float64)\n",
    "the device": "import torch\ntorch.set_default_device('meta')\n",
    "threads": "import torch\ntorch.set_num_threads(torch.get_num_threads() + 1)\n",
    "arguments": "import sys\nsys.argv = ['other']\n",
    "warnings": "import warnings\nwarnings.simplefilter('error')\nwarnings.simplefilter('ignore')\n",
    "signals": "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n",
    "output": "import sys\nsys.stdout = sys.stderr\n",
    "sys.path": "import sys\nsys.path.pop(0)\n",
    "an empty sys.path": "import sys\nsys.path[:] = []\n",
    "anomalies": "import torch\ntorch.autograd.set_detect_anomaly(True)\n",
    "determinism": "import torch\ntorch.use_deterministic_algorithms(True)\n",
    "precision": "import torch\ntorch.set_float32_matmul_precision('medium')\n",
}


def _state() -> tuple[Any, ...]:
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    modes += (torch.is_anomaly_enabled(), torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision())
    here = os.getcwd(), list(sys.argv), sys.stdout, list(warnings.filters), list(sys.path)
    return (*modes, str(torch.get_default_device()), torch.get_num_threads(), *here, signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("what", LEAVES)
@pytest.mark.parametrize("fails", [False, True])
def test_what_foreign_code_changes_is_put_back(module: Callable[[str], str], what: str, fails: bool) -> None:
    before = _state()
    source = module(NET + LEAVES[what] + ("1 / 0\n" if fails else ""))
    if fails:
        with pytest.raises(ModelError, match="division by zero"):
            load(source)
    elif what == "the device":
        with pytest.raises(ModelError, match="on the meta device"):  # nothing that was built there holds numbers
            load(source)
    else:
        assert load(source).num_classes == 10
    assert _state() == before


def test_a_stream_that_was_closed_writes_to_the_same_place_again(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "out.txt").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        load(module(NET + "import sys\nprint('one')\nsys.stdout.close()\n"))
        sys.stdout.write("two\n")
        sys.stdout.close()
    assert (tmp_path / "out.txt").read_text() == "one\ntwo\n"
