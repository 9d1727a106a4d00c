"""The HTTP server: waitress, and what it does before a request reaches the application.

It receives a body whole before anybody is asked who sends it. So only those who are known here may send a large one,
and what it refuses by itself has the shape that all errors have.
"""

import copy
import socket
from collections.abc import Mapping
from typing import Any

from flask import Flask
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import create_server
from waitress.task import ErrorTask
from waitress.utilities import Error, RequestEntityTooLarge
from werkzeug.exceptions import HTTPException

from rempart.serve.app import CODES, Told
from rempart.serve.app import Error as Shape
from rempart.serve.settings import Settings

CONNECTIONS = 1000
_THREADS = 16
_IDLE = 60  # seconds without a byte after which a connection is closed
_STRANGER = 64 * 2**10  # bytes of a body of somebody who is not known: a form with a token


def server(app: Flask, settings: Settings, listening: socket.socket) -> Any:
    """The server of an application on a socket; `run` it, and `task_dispatcher.shutdown` it."""
    options: dict[str, Any] = {
        "threads": _THREADS,
        "connection_limit": CONNECTIONS,
        "channel_timeout": _IDLE,
        "max_request_body_size": settings.upload + 2**20,
        "asyncore_use_poll": True,  # select() ends the server at the 1024th file that is open
        "ident": None,
        **(_PROXY if settings.secure else {}),
    }
    made: Any = create_server(app, sockets=[listening], **options)
    made.channel_class = _channel(app)
    return made


_PROXY: dict[str, Any] = {"trusted_proxy": "*", "trusted_proxy_headers": {"x-forwarded-for"}}
"""Behind a proxy, the address of a client is the last one that the proxy tells."""


class _Unauthorized(Error):
    code = 401
    reason = "Unauthorized"


def _channel(app: Flask) -> type[HTTPChannel]:
    class Parser(HTTPRequestParser):
        known = True

        def parse_header(self, header_plus: bytes) -> None:
            super().parse_header(header_plus)
            if (self.chunked or self.content_length >= _STRANGER) and not _known(app, self.headers):
                self.known, self.adj = False, copy.copy(self.adj)
                self.adj.max_request_body_size = _STRANGER

        def received(self, data: bytes) -> int:
            taken = super().received(data)
            if not self.known and isinstance(self.error, RequestEntityTooLarge):
                self.error = _Unauthorized("a token is needed: send it as 'Authorization: Bearer TOKEN', or log in")
            if self.error is not None:
                self.expect_continue = False  # it would wait for the body
            return taken

    class Channel(HTTPChannel):
        parser_class = Parser
        error_task_class = _Refused

    return Channel


def _known(app: Flask, headers: Mapping[str, str]) -> bool:
    """Whether somebody with a token sends these headers; without tokens, whether they are for this machine."""
    told = {name.title(): headers[name] for name in ("AUTHORIZATION", "COOKIE", "HOST") if name in headers}
    with app.test_request_context(headers=told):
        try:
            return app.extensions["door"].who()[0] is not None
        except HTTPException:
            return False


class _Refused(ErrorTask):
    """An answer of the server itself, in the shape of all errors."""

    def execute(self) -> None:
        request: Any = self.request
        error: Error = request.error
        told = Told(code=CODES.get(error.code, "error"), message=error.body)
        body = Shape(error=told).model_dump_json(exclude_none=True).encode()
        self.status = f"{error.code} {error.reason}"
        bearer = [("WWW-Authenticate", "Bearer")] if error.code == 401 else []
        self.response_headers = [("Content-Type", "application/json"), *bearer]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
