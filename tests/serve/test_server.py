"""What the HTTP server does before the application is asked, spoken to by bare sockets."""

import json
import os
import resource
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flask import Flask

from rempart.serve.app import create_app
from rempart.serve.auth import Tokens
from rempart.serve.run import bound
from rempart.serve.server import server
from rempart.serve.settings import Settings

LARGE = 2**21
UPLOAD = "POST /api/v1/data?name=a.npz HTTP/1.1\r\nContent-Type: application/octet-stream\r\n"


@dataclass(frozen=True)
class Served:
    """A deployment that is answering, and the token of its administrator."""

    app: Flask
    port: int
    token: str

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def say(self, head: str, body: bytes = b"", host: str = "localhost") -> tuple[int, dict]:
        """The status and the JSON of the answer; the body is not sent whole where the answer comes before."""
        with self.connect() as line:
            line.sendall(f"{head}Host: {host}\r\nConnection: close\r\n\r\n".encode())
            try:
                line.sendall(body)
                answer = b"".join(iter(lambda: line.recv(65536), b""))
            except ConnectionError:
                answer = b"HTTP/1.1 0 closed before it could be read\r\n\r\nnull"
        first, _, content = answer.partition(b"\r\n\r\n")
        return int(first.split()[1]), json.loads(content)


def serving(folder: Path, **options: bool) -> Iterator[Served]:
    folder.mkdir()
    token = Tokens.of(folder).add("root", "admin")
    settings = Settings(folder=folder, upload=2 * LARGE, **options)
    app, listening = create_app(settings), bound("127.0.0.1", 0)
    answering = server(app, settings, listening)
    thread = threading.Thread(target=answering.run, daemon=True)
    thread.start()
    yield Served(app, listening.getsockname()[1], token)
    answering.close()
    answering.task_dispatcher.shutdown(timeout=2)
    app.extensions["rempart"].jobs.table.destroy()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(tmp_path_factory.mktemp("guarded") / "data", tokens=True, secure=True)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(tmp_path_factory.mktemp("local") / "data")


def refused(answer: tuple[int, dict], status: int, code: str) -> None:
    assert answer[0] == status and answer[1]["error"]["code"] == code and answer[1]["error"]["message"], answer


def test_a_large_body_is_received_of_those_who_are_known(guarded: Served) -> None:
    length, bearer = f"Content-Length: {LARGE}\r\n", f"Authorization: Bearer {guarded.token}\r\n"
    for sign in ("", "Authorization: Bearer wrong\r\n", "Cookie: rempart=forged\r\n"):
        refused(guarded.say(UPLOAD + length + sign), 401, "unauthorized")
        refused(guarded.say(UPLOAD + length + sign + "Expect: 100-continue\r\n"), 401, "unauthorized")
    refused(guarded.say(UPLOAD + length + bearer, b"0" * LARGE), 422, "invalid")  # received: it is no array


def test_a_large_body_in_pieces_is_received_of_those_who_are_known(guarded: Served) -> None:
    pieces = b"8000\r\n" + b"0" * 0x8000 + b"\r\n"
    head = UPLOAD + "Transfer-Encoding: chunked\r\n"
    answer = guarded.say(head, 2 * pieces)
    if answer != (0, None):  # the connection was closed while this client still sent
        refused(answer, 401, "unauthorized")
    bearer = f"Authorization: Bearer {guarded.token}\r\n"
    refused(guarded.say(head + bearer, 3 * pieces + b"0\r\n\r\n"), 422, "invalid")


def test_a_browser_that_is_logged_in_is_known(guarded: Served) -> None:
    client = guarded.app.test_client()
    client.post("/login", data={"token": guarded.token})
    cookie = client.get_cookie("rempart")
    assert cookie is not None
    sign = f"Cookie: language=fr; rempart={cookie.value}\r\nContent-Length: {LARGE}\r\n"
    refused(guarded.say(UPLOAD + sign, b"0" * LARGE), 403, "forbidden")  # received: it says nothing of our pages


def test_a_large_body_for_another_name_is_not_received(local: Served) -> None:
    length = f"Content-Length: {LARGE}\r\n"
    refused(local.say(UPLOAD + length, host="evil.example"), 401, "unauthorized")
    refused(local.say(UPLOAD + length, b"0" * LARGE), 422, "invalid")


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        ("GET / HTTP/1.1\r\nno header\r\n", 400, "bad_request"),
        ("POST /api/v1/data HTTP/1.1\r\nContent-Length: x\r\n", 400, "bad_request"),
        ("POST /api/v1/data HTTP/1.1\r\nTransfer-Encoding: gzip\r\n", 501, "not_implemented"),
        (f"{UPLOAD}Content-Length: {10**10}\r\n", 413, "too_large"),
        ("PUT /api/v1/jobs HTTP/1.1\r\n", 405, "method_not_allowed"),
    ],
)
def test_errors_of_the_server_have_the_shape_of_all(local: Served, head: str, status: int, code: str) -> None:
    refused(local.say(head), status, code)


def test_more_files_than_select_can_count(local: Served) -> None:
    """Whoever opened many connections ended the server by it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("needs more open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with local.connect() as first, local.connect() as second:
            assert max(first.fileno(), second.fileno()) > 1024
            assert local.say("GET /api/v1/health HTTP/1.1\r\n") == (200, {"jobs": {}, "status": "ok"})
    finally:
        for number in held:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_behind_a_proxy_the_audit_log_tells_the_address_of_the_client(guarded: Served, local: Served) -> None:
    """The last one, which the proxy tells: those before it are what the client says."""
    head = "DELETE /api/v1/data/0 HTTP/1.1\r\nX-Forwarded-For: 10.0.0.1, 203.0.113.7\r\n"
    found = []
    for served in (guarded, local):
        served.say(head)
        record = served.app.extensions["rempart"].settings.folder / "audit.log"
        found.append(json.loads(record.read_text().splitlines()[-1])["from"])
    assert found == ["203.0.113.7", "127.0.0.1"]
