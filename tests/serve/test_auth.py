"""Who may do what: tokens, roles, sessions, and requests made by other sites' pages."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from limits import parse

from rempart.core.errors import SpecError
from rempart.serve import auth
from rempart.serve.app import create_app
from rempart.serve.auth import Tokens
from rempart.serve.settings import Settings

AT = "/api/v1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployment") / "data"


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[dict[str, str]]:
    """Tokens of each role, of a deployment that asks for one."""
    folder.mkdir()
    yield {role: Tokens.of(folder).add(role, role) for role in ("read", "run", "admin")}


@pytest.fixture
def client(folder: Path, guarded: dict[str, str]) -> Iterator[FlaskClient]:
    app = create_app(Settings(folder=folder, tokens=True))
    yield app.test_client()
    app.extensions["rempart"].jobs.table.destroy()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[FlaskClient]:
    app = create_app(Settings(folder=tmp_path))
    yield app.test_client()
    app.extensions["rempart"].jobs.table.destroy()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_tokens_are_kept_as_hashes_alone(tmp_path: Path) -> None:
    tokens = Tokens.of(tmp_path)
    token = tokens.add("alice", "run")
    kept = (tmp_path / "tokens.json").read_text()
    assert token not in kept and token.removeprefix("rempart_") not in kept and "alice" in kept
    assert (tmp_path / "tokens.json").stat().st_mode & 0o077 == 0
    with pytest.raises(SpecError, match="new name"):
        tokens.add("alice", "read")
    with pytest.raises(SpecError, match="new name"):
        tokens.add("../alice", "read")
    tokens.remove("alice")
    assert tokens.all() == []
    with pytest.raises(SpecError, match="name of a token"):
        tokens.remove("alice")


@pytest.mark.parametrize("path", ["/models", "/data", "/jobs", "/guards", "/catalog", "/requests/audit"])
def test_nothing_is_read_without_a_token(client: FlaskClient, path: str, guarded: dict[str, str]) -> None:
    assert client.get(AT + path).status_code == 401
    for wrong in ("", "x", guarded["read"][:-1], guarded["read"] + "x"):
        assert client.get(AT + path, headers=bearer(wrong)).status_code == 401
    assert client.get(AT + path, headers={"Authorization": f"Basic {guarded['read']}"}).status_code == 401
    assert client.get(AT + path, headers=bearer(guarded["read"])).status_code == 200


def test_health_needs_none(client: FlaskClient) -> None:
    assert client.get(f"{AT}/health").status_code == 200 and client.get(f"{AT}/ready").status_code == 200
    assert client.get("/metrics").status_code == 401


TRAIN = {"kind": "train", "data": "digits"}


def test_each_role_may_do_what_it_says(client: FlaskClient, guarded: dict[str, str]) -> None:
    def status(role: str, method: str, path: str, **options: object) -> int:
        return client.open(AT + path, method=method, headers=bearer(guarded[role]), **options).status_code

    made = client.post(f"{AT}/jobs", json=TRAIN, headers=bearer(guarded["run"])).json
    assert made["user"] == "run"
    job = f"/jobs/{made['id']}"
    assert status("read", "POST", "/jobs", json=TRAIN) == 403
    assert status("read", "POST", f"{job}/cancel") == 403
    assert status("read", "POST", "/models?name=a.zip", data=b"x", content_type="application/octet-stream") == 403
    assert status("read", "POST", "/try", json={}) == 403
    assert status("run", "POST", f"{job}/cancel") == 202
    assert status("run", "DELETE", job) == 403
    assert status("read", "DELETE", job) == 403
    assert status("admin", "DELETE", job) == 204


def test_a_token_that_is_taken_back_is_worth_nothing(client: FlaskClient, folder: Path) -> None:
    token = Tokens.of(folder).add("gone", "read")
    assert client.get(f"{AT}/jobs", headers=bearer(token)).status_code == 200
    Tokens.of(folder).remove("gone")
    assert client.get(f"{AT}/jobs", headers=bearer(token)).status_code == 401


def test_wrong_tokens_are_slowed_down(client: FlaskClient) -> None:
    answers = [client.get(f"{AT}/jobs", headers=bearer(f"guess{n}")).status_code for n in range(40)]
    assert answers[:30] == [401] * 30 and answers[-1] == 429


def test_who_asks_too_often_fills_no_disk(client: FlaskClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auth._LIMITS, "*", parse("5/minute"))
    (folder / "audit.log").unlink(missing_ok=True)
    answers = [client.post(f"{AT}/nowhere").status_code for _ in range(20)]
    assert answers == [404] * 5 + [429] * 15
    assert len((folder / "audit.log").read_text().splitlines()) == 5


def test_other_sites_cannot_use_a_local_service(local: FlaskClient) -> None:
    """No token stands between a page that the user visits and a service on their machine: the origin does."""
    assert local.post(f"{AT}/jobs", json=TRAIN).status_code == 202  # curl
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://localhost"},  # ours, but without what our pages know
        {"Sec-Fetch-Site": "same-origin"},
    ):
        assert local.post(f"{AT}/jobs", json=TRAIN, headers=headers).status_code == 403, headers
    assert len(local.get(f"{AT}/jobs").json["jobs"]) == 1


def test_our_own_pages_can(local: FlaskClient) -> None:
    page = local.get(f"{AT}/docs/", buffered=True).text
    token = page.split('data-csrf="')[1].split('"')[0]
    same = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    assert local.post(f"{AT}/jobs", json=TRAIN, headers={**same, "X-CSRF-Token": token}).status_code == 202
    assert local.post(f"{AT}/jobs", json=TRAIN, headers={**same, "X-CSRF-Token": token[:-1]}).status_code == 403
    assert local.post(f"{AT}/jobs", json=TRAIN).status_code == 403, "a browser's cookie without its token"


def test_a_name_that_was_pointed_at_this_machine_gets_nothing(local: FlaskClient) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"):
        assert local.get(f"{AT}/jobs", headers={"Host": host}).status_code == 421
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert local.get(f"{AT}/jobs", headers={"Host": host}).status_code == 200


def test_cookies_keep_to_this_site(local: FlaskClient) -> None:
    cookie = local.get(f"{AT}/docs/", buffered=True).headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie


def test_the_audit_log_tells_who_changed_what(client: FlaskClient, folder: Path, guarded: dict[str, str]) -> None:
    (folder / "audit.log").unlink(missing_ok=True)
    client.get(f"{AT}/jobs", headers=bearer(guarded["run"]))
    job = client.post(f"{AT}/jobs", json=TRAIN, headers=bearer(guarded["run"])).json["id"]
    client.delete(f"{AT}/jobs/{job}", headers=bearer(guarded["run"]))
    lines = [json.loads(line) for line in (folder / "audit.log").read_text().splitlines()]
    told = [(line["user"], line["method"], line["path"], line["status"]) for line in lines]
    assert told == [("run", "POST", f"{AT}/jobs", 202), ("run", "DELETE", f"{AT}/jobs/{job}", 403)]


@pytest.mark.parametrize("path", ["/api/v1/health", "/api/v1/nowhere", "/api/v1/docs/"])
def test_browsers_are_told_to_run_nothing_foreign(local: FlaskClient, path: str) -> None:
    headers = local.get(path, buffered=True).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["style-src"] == "'self'"
    assert headers["Referrer-Policy"] == "same-origin", "by no-referrer, browsers send our own forms as of nowhere"
    assert policy["frame-ancestors"] == "'none'" and headers["X-Content-Type-Options"] == "nosniff"
