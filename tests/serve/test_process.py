"""A process that is watched: how it ends, what it may use, and that it does not outlive who started it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from rempart.serve import process
from rempart.serve.process import supervised
from serve.deployment import alive, environment, until

MIB = 2**20


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run Python code in a watched process."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'code'}{os.pathsep}{environment()['PYTHONPATH']}")
    (tmp_path / "code").mkdir()
    (tmp_path / "place").mkdir()

    def ran(code, **limits):
        (tmp_path / "code" / "played_module.py").write_text("from rempart.serve.process import *\n" + code)
        options = {"timeout": 20.0, "memory": 500 * MIB, **limits}
        return supervised("played_module", ["one", "two"], log=tmp_path / "log", place=tmp_path / "place", **options)

    return ran


def test_it_runs_in_its_place_with_its_arguments_and_logs(run, tmp_path):
    ended = run("import os, sys; print(os.getcwd(), sys.argv[1:]); sys.exit(7)")
    assert (ended.status, ended.stopped, ended.reason) == (7, None, "")
    assert (tmp_path / "log").read_text() == f"{tmp_path / 'place'} ['one', 'two']\n"


def test_no_module_comes_from_the_folder_it_runs_in(run, tmp_path):
    """What lies there was brought by clients."""
    (tmp_path / "place" / "colorsys.py").write_text("print('brought')")
    assert run("import colorsys; colorsys.rgb_to_hls(0, 0, 0)").status == 0
    assert "brought" not in (tmp_path / "log").read_text()


def test_what_is_asked_to_stop_may_write_down_what_it_has(run, tmp_path):
    code = """
import time
from pathlib import Path
Path("begun").touch()
try:
    time.sleep(60)
except KeyboardInterrupt:
    Path("kept").touch()
"""
    started = time.monotonic()
    ended = run(code, asked=lambda: (tmp_path / "place" / "begun").exists())
    assert (ended.status, ended.stopped, ended.reason) == (0, "asked", "cancelled")
    assert (tmp_path / "place" / "kept").exists()
    assert time.monotonic() - started < 5


def test_what_does_not_hear_is_ended_with_its_children(run, tmp_path):
    code = """
import signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", deaf])
Path("child").write_text(str(child.pid))
time.sleep(60)
"""
    file = tmp_path / "place" / "child"
    ended = run(code, asked=lambda: file.exists() and file.read_text())
    assert (ended.status, ended.stopped) == (-signal.SIGKILL, "asked")
    until(lambda: not alive(int(file.read_text())), 5)


def test_time_runs_out(run):
    ended = run("import time; time.sleep(60)", timeout=0.5)
    assert (ended.status, ended.stopped) == (-signal.SIGINT, "time")
    assert ended.reason == "ran longer than 0.5 seconds"


def test_memory_counts_with_that_of_children(run):
    code = """
import subprocess, sys, time
each = "import time; held = b'x' * (60 * 2**20); time.sleep(60)"
children = [subprocess.Popen([sys.executable, "-c", each]) for _ in range(3)]
time.sleep(60)
"""
    ended = run(code, memory=150 * MIB)
    assert (ended.status, ended.stopped) == (-signal.SIGKILL, "memory")
    used, limit = (int(word) for word in ended.reason.replace(",", "").split() if word.isdigit())
    assert 150 < used < 400 and limit == 150


def test_the_kernel_takes_it_before_the_service(run, tmp_path):
    run("from pathlib import Path; import time; time.sleep(0.3); print(Path('/proc/self/oom_score_adj').read_text())")
    assert (tmp_path / "log").read_text().split() == ["1000"]


def test_it_ends_before_the_disk_is_full(run, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 64 * MIB - 1))
    ended = run("import time; time.sleep(60)")
    assert (ended.stopped, ended.reason) == ("disk", process.FULL)


def test_it_leaves_with_who_started_it_and_so_do_its_children(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "played_module.py").write_text("""
import os, subprocess, sys, time
from pathlib import Path
from rempart.serve.process import leave_with_parent
leave_with_parent()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path("pids.part").write_text(f"{os.getpid()} {child.pid}")
os.rename("pids.part", "pids")
time.sleep(60)
""")
    starter = f"""
from pathlib import Path
from rempart.serve.process import supervised
here = Path({str(tmp_path)!r})
supervised("played_module", [], log=here / "log", place=here, timeout=60, memory=2**40)
"""
    env = environment()
    env["PYTHONPATH"] = f"{code}{os.pathsep}{env['PYTHONPATH']}"
    parent = subprocess.Popen([sys.executable, "-c", starter], env=env)
    until((tmp_path / "pids").exists, 20)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    until(lambda: not any(map(alive, pids)), 5)
    assert Path(tmp_path / "log").read_text() == ""
