"""compose.yaml, which no test here runs: every command line in it is one of ours, and its parts agree."""

import json
import re
from pathlib import Path

import pytest
import typer
import yaml

from rempart.cli import app
from rempart.serve.settings import Settings, prepared

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
OURS = {name: service for name, service in COMPOSE["services"].items() if service.get("image") == "rempart"}
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


def parsed(words):
    """What the command line makes of these words."""
    assert words[0] == "rempart"
    command, words = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command.name, command.make_context(command.name, list(words)).params


@pytest.mark.parametrize("name", OURS)
def test_each_command_is_one_of_ours_and_writes_to_the_volume_alone(name, tmp_path):
    service = OURS[name]
    command, params = parsed(service["command"])
    assert command == {"web": "serve", "worker": "worker"}[name]
    assert service["volumes"] == [f"data:{params['folder']}"] and service["read_only"]
    url = service["environment"]["REMPART_DATABASE"]
    prepared(Settings(folder=tmp_path, database=url))
    assert "POSTGRES_PASSWORD" in url and re.search(r"@(\w+)/", url)[1] in COMPOSE["services"]


def test_there_are_two_workers_and_the_web_process_is_none():
    assert OURS.keys() == {"web", "worker"}
    assert OURS["worker"]["deploy"]["replicas"] == 2
    params = parsed(OURS["web"]["command"])[1]
    assert params["worker"] is False and params["secure"] is True


def test_the_proxy_alone_is_reached_from_outside():
    assert [name for name, service in COMPOSE["services"].items() if "ports" in service] == ["proxy"]
    _, params = parsed(OURS["web"]["command"])
    caddy = (ROOT / "deploy" / "Caddyfile").read_text()
    assert f"reverse_proxy web:{params['port']} " in caddy
    assert "./deploy/Caddyfile:/etc/caddy/Caddyfile:ro" in COMPOSE["services"]["proxy"]["volumes"]


def test_volumes_are_those_that_are_declared():
    used = {volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service["volumes"]}
    assert {name for name in used if not name.startswith(".")} == COMPOSE["volumes"].keys()


def test_the_commands_told_in_the_comments_are_ours():
    told = re.findall(r"docker compose run --rm web (rempart .*)", (ROOT / "compose.yaml").read_text())
    assert [parsed(line.split())[0] for line in told] == ["add"]


def test_the_image_is_made_of_files_that_are_here_and_runs_a_command_of_ours():
    copied = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, flags=re.M) for word in line.split()[:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
    kept = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{word}" for word in copied} <= {*kept}
    assert parsed(json.loads(re.search(r"^CMD (.*)$", DOCKERFILE, flags=re.M)[1]))[0] == "serve"
    extras = re.search(r"\.\[(.*?)\]", DOCKERFILE)[1].split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, flags=re.M) for extra in extras)
