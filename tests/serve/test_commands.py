"""`rempart serve`, `worker` and `token` as they are typed."""

import re
import stat
import sys

import pytest

from rempart import cli
from rempart.serve.auth import Tokens


@pytest.fixture
def typed(monkeypatch, capsys):
    """Exit status and output of a command line."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["rempart", *map(str, words)])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run


def test_tokens_are_made_listed_and_taken_back(typed, tmp_path):
    folder = ("--folder", tmp_path / "data")
    status, token, _ = typed("token", "add", "alice", "--role", "run", *folder)
    assert status == 0 and re.fullmatch(r"rempart_\S{40,}\n", token)
    assert typed("token", "add", "bob", "--role", "admin", *folder)[0] == 0
    status, told, _ = typed("token", "list", *folder)
    assert [line.split("\t")[:2] for line in told.splitlines()] == [["alice", "run"], ["bob", "admin"]]
    assert token.strip() not in told
    file = tmp_path / "data" / "tokens.json"
    assert token.strip() not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    status, _, error = typed("token", "add", "alice", "--role", "read", *folder)
    assert status == 2 and "a new name" in error
    assert typed("token", "remove", "alice", *folder)[0] == 0
    assert [known.name for known in Tokens.of(tmp_path / "data").all()] == ["bob"]
    assert typed("token", "remove", "alice", *folder)[0] == 2
    assert typed("token", "add", "eve", "--role", "root", *folder)[0] == 2


def test_other_machines_are_let_in_by_token_alone(typed, tmp_path):
    status, _, error = typed("serve", "--host", "0.0.0.0", "--folder", tmp_path)
    assert status == 2
    assert f"make one: rempart token add NAME --role admin --folder {tmp_path}" in error


@pytest.mark.parametrize("words", [("serve",), ("worker",), ("token", "list")])
def test_a_missing_extra_is_named(typed, tmp_path, monkeypatch, words):
    for name in [*sys.modules]:
        if name.startswith("rempart.serve"):
            monkeypatch.delitem(sys.modules, name)
    for name in ("dbos", "flask", "waitress"):
        monkeypatch.setitem(sys.modules, name, None)
    status, _, error = typed(*words, "--folder", tmp_path)
    assert status == 2
    assert re.search(r"the package (dbos|flask|waitress), got none; pip install 'rempart\[serve\]'", error)


def test_a_database_that_cannot_be_reached_is_told_by_serve_and_worker(typed, tmp_path):
    url = "postgresql://rempart:hunter2@127.0.0.1:1/rempart"
    for command in (("serve", "--port", "0"), ("worker",)):
        status, _, error = typed(*command, "--folder", tmp_path, "--database", url)
        assert status == 2
        assert "a database that can be reached" in error and "hunter2" not in error


def test_the_url_of_the_database_may_come_by_the_environment(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("REMPART_DATABASE", "mysql://x")
    assert "a URL of PostgreSQL, got mysql://" in typed("worker", "--folder", tmp_path)[2]
