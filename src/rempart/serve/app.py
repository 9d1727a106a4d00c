"""The web application: what stands around the views, the same for all of them."""

import errno
import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from apiflask import APIFlask
from apiflask.exceptions import HTTPError
from flask import Response, g, request
from flask.json.provider import DefaultJSONProvider
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from werkzeug.exceptions import BadRequest, HTTPException

from rempart.core.errors import RempartError
from rempart.serve import auth
from rempart.serve.api import Compared, Encoded, api
from rempart.serve.documentation import documentation
from rempart.serve.errors import status_of
from rempart.serve.jobs import Jobs
from rempart.serve.live import Cache
from rempart.serve.look import looker
from rempart.serve.pages import error_page, pages
from rempart.serve.service import Service, service
from rempart.serve.settings import Settings, prepared
from rempart.serve.store import Store, sweep

_BODY = 64 * 2**20  # bytes of a body that is no upload
_MODELS = 8  # kept loaded
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'self'; form-action 'self'; base-uri 'none'; frame-src 'self'; frame-ancestors 'none'"
)
log = logging.getLogger("rempart.serve")


class Fault(BaseModel):
    """Where a request is wrong."""

    field: str
    message: str


class Told(BaseModel):
    """What went wrong.

    Attributes:
        code: For programs: what kind of error.
        message: For people.
        expected: What was expected, where that can be said.
        got: What came.
        hint: What to try.
        fields: Each fault of a request.
    """

    code: str
    message: str
    expected: str | None = None
    got: str | None = None
    hint: str | None = None
    fields: list[Fault] | None = None


class Error(BaseModel):
    """The one shape of errors."""

    error: Told


def create_app(settings: Settings) -> APIFlask:
    """The application of a deployment.

    Raises:
        SpecError: If its data directory or database cannot be used.
    """
    settings = prepared(settings)
    app = APIFlask("rempart.serve", title="Rempart", docs_path=None, spec_path="/api/v1/openapi.json")
    app.json = _Json(app)
    app.secret_key = auth.secret(settings.folder)
    app.config.update(
        MAX_CONTENT_LENGTH=_BODY,
        MAX_FORM_MEMORY_SIZE=_BODY,
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Strict",
        SESSION_COOKIE_SECURE=settings.secure,
        SESSION_COOKIE_NAME="rempart",
        VALIDATION_ERROR_STATUS_CODE=422,
    )
    sweep(settings.folder)
    tokens = auth.Tokens.of(settings.folder)
    store, jobs = Store(settings.folder, looker(settings), settings.upload), Jobs.of(settings)
    app.extensions["rempart"] = Service(settings, store, jobs, Cache(_MODELS), tokens)
    _errors(app)
    _watch(app, settings)
    app.extensions["door"] = door = auth.Door(tokens=tokens if settings.tokens else None)
    app.before_request(door)
    app.after_request(_sealed)
    app.register_blueprint(api)
    app.register_blueprint(documentation)
    app.register_blueprint(pages)
    app.context_processor(lambda: {"csrf_token": auth.csrf_token})
    app.spec_processor(_documented)
    return app


class _Json(DefaultJSONProvider):
    """JSON as the standard has it: NaN and Infinity are none."""

    def loads(self, s: str | bytes, **_: Any) -> Any:
        try:
            return from_json(s, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


def _errors(app: APIFlask) -> None:
    @app.error_processor
    def shaped(error: HTTPError) -> Any:  # pyright: ignore[reportUnusedFunction]
        detail: Any = error.detail or {}
        fields = [
            Fault(field=name if name != "_schema" else place, message="; ".join(map(str, messages)))
            for place, faults in detail.items()
            for name, messages in (faults.items() if isinstance(faults, dict) else ())
        ]
        if fields:
            return _told(error.status_code, _faults(fields), fields=fields)
        return _told(error.status_code, error.message or "")

    @app.errorhandler(ValidationError)
    def invalid(error: ValidationError) -> Any:  # pyright: ignore[reportUnusedFunction]
        fields = [Fault(field=".".join(map(str, e["loc"])), message=e["msg"]) for e in error.errors()]
        return _told(422, _faults(fields), fields=fields)

    @app.errorhandler(RempartError)
    def refused(error: RempartError) -> Any:  # pyright: ignore[reportUnusedFunction]
        return _told(status_of(error), str(error), expected=error.expected, got=error.got, hint=error.hint)

    @app.errorhandler(OSError)
    def broken(error: OSError) -> Any:  # pyright: ignore[reportUnusedFunction]
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _told(507, "the disk of the service is full")
        return failed(error)

    @app.errorhandler(HTTPException)
    def plain(error: HTTPException) -> Any:  # pyright: ignore[reportUnusedFunction]
        if request.endpoint is None and not request.path.startswith("/api/"):
            return error_page(error)  # a person who typed an address
        if isinstance(
            cause := error.__cause__, BadRequest
        ):  # of a body that is no JSON: Flask says it to debuggers alone
            return _told(
                400, f"expected a body of JSON: {cause.description}", expected="a body of JSON", got=cause.description
            )
        return _told(error.code or 500, error.description or error.name)

    @app.errorhandler(Exception)
    def failed(error: Exception) -> Any:
        log.error("request %s failed", g.get("request_id"), exc_info=error)
        return _told(500, f"failed unexpectedly; the log of the service says more under {g.get('request_id')}")


def _faults(fields: list[Fault]) -> str:
    """What is wrong with a request, in one sentence."""
    return "expected a valid request, got " + "; ".join(f"{fault.field}: {fault.message}" for fault in fields)


CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    421: "misdirected_request",
    422: "invalid",
    429: "too_many_requests",
    431: "too_large",
    500: "internal",
    501: "not_implemented",
    503: "unavailable",
    507: "disk_full",
}
"""What programs are told, by the status of the answer."""


def _told(
    status: int,
    message: str,
    *,
    expected: str | None = None,
    got: object = None,
    hint: str = "",
    fields: list[Fault] | None = None,
) -> tuple[dict[str, Any], int, dict[str, str]]:
    folder = f"{service().settings.folder}/"
    message, expected, came, hint = (
        None if text is None else str(text).replace(folder, "") for text in (message, expected, got, hint)
    )  # pyright: ignore[reportAssignmentType]
    told = Told(
        code=CODES.get(status, "error"),
        message=message or "",
        expected=expected,
        got=came,
        hint=hint or None,
        fields=fields,
    )
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Error(error=told).model_dump(exclude_none=True), status, headers


def _watch(app: APIFlask, settings: Settings) -> None:
    """Metrics of all requests, and a line in the audit log for each that changes something."""
    registry = CollectorRegistry()
    requests = Counter("rempart_requests", "Requests", ["method", "endpoint", "status"], registry=registry)
    seconds = Histogram("rempart_request_seconds", "Time of requests", ["endpoint"], registry=registry)
    images = Counter("rempart_images", "Images classified", registry=registry)
    jobs = Gauge("rempart_jobs", "Jobs", ["state"], registry=registry)
    record = settings.folder / "audit.log"

    @app.before_request
    def begin() -> None:  # pyright: ignore[reportUnusedFunction]
        g.started, g.request_id = time.perf_counter(), uuid.uuid4().hex[:12]

    @app.after_request
    def end(response: Response) -> Response:  # pyright: ignore[reportUnusedFunction]
        endpoint = request.endpoint or "none"
        method = request.method if request.method in _METHODS else "other"  # a client may name any number of them
        requests.labels(method, endpoint, response.status_code).inc()
        seconds.labels(endpoint).observe(time.perf_counter() - g.started)
        images.inc(g.get("images", 0))
        response.headers["X-Request-ID"] = g.request_id
        changing = request.method not in ("GET", "HEAD", "OPTIONS") and not endpoint.endswith("_predict")
        if changing and response.status_code != 429:  # who asks too often does not fill the disk
            _record(record, response)
        return response

    @app.get("/metrics")
    @app.doc(hide=True)
    @auth.needs("read")
    def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Figures for Prometheus."""
        for state, number in service().jobs.counts().items():
            jobs.labels(state).set(number)
        return Response(generate_latest(registry), mimetype="text/plain; version=0.0.4")


_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"))


def _record(path: Path, response: Response) -> None:
    who = g.get("user")
    line = {
        "at": round(time.time(), 3),
        "id": g.request_id,
        "user": None if who is None else who.name,
        "from": request.remote_addr,
        "method": request.method,
        "path": request.path[:300],
        "status": response.status_code,
    }
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError:
        log.exception("the audit log cannot be written")


def _sealed(response: Response) -> Response:
    """What a browser may do with what we send."""
    response.headers.setdefault("Content-Security-Policy", POLICY)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Referrer-Policy", "same-origin")  # with none, the origin of our own forms is "null"
    response.headers.setdefault("Cross-Origin-Opener-Policy", "same-origin")
    response.headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
    if not request.path.startswith("/static/"):
        response.headers.setdefault("Cache-Control", "no-store")
    return response


_COMMON = (400, 401, 403, 404, 409, 413, 415, 421, 422, 429, 503, 507)


def _documented(spec: Any) -> Any:
    """Say of every operation what errors it answers with, and of every body that it is needed."""
    spec["components"].setdefault("schemas", {})["Error"] = Error.model_json_schema(
        ref_template="#/components/schemas/Error/$defs/{model}"
    )
    answer = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            if method not in ("get", "post", "delete", "put", "patch"):
                continue
            for status in _COMMON:
                operation["responses"][str(status)] = {"description": CODES[status].replace("_", " "), **answer}
            if path in _BODIES and method == "post":
                operation["requestBody"] = {"content": _BODIES[path]}
            if "requestBody" in operation:
                operation["requestBody"]["required"] = True
    compared = Compared.model_json_schema()["properties"]["job"]
    spec["paths"]["/api/v1/compare"]["get"]["parameters"] = [
        {"name": "job", "in": "query", "required": True, "schema": compared, "style": "form", "explode": True}
    ]
    return spec


_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary", "minLength": 1}}}
_FORM = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}
_PICTURES = {
    "application/json": {"schema": Encoded.model_json_schema()},
    "multipart/form-data": {"schema": {"type": "object", "properties": {"images": _FORM}, "required": ["images"]}},
}
_BODIES = {
    "/api/v1/models": _BYTES,
    "/api/v1/data": _BYTES,
    "/api/v1/models/{id}/predict": _PICTURES,
    "/api/v1/guards/{id}/predict": _PICTURES,
}
"""Bodies that no model of pydantic is of, or that come in two forms."""
