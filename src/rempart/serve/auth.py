"""Who asks, and what they may do: tokens, the browser's session, and requests that other sites' pages make."""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from flask import current_app, g, request, session
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from werkzeug.exceptions import Forbidden, MisdirectedRequest, TooManyRequests, Unauthorized

from rempart.core.disk import replace
from rempart.core.errors import SpecError
from rempart.report.schema import Strict

Role = Literal["read", "run", "admin"]
ROLES: tuple[Role, ...] = ("read", "run", "admin")
LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "::1"))
_PREFIX = "rempart_"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,60}")
_SAFE = frozenset(("GET", "HEAD", "OPTIONS"))
F = TypeVar("F", bound=Callable[..., Any])


class Token(Strict):
    """A token as it is kept: its SHA-256, never itself.

    Attributes:
        name: Whose it is.
        role: read: look at everything; run: also bring models and data, start and cancel jobs; admin: also delete.
        digest: SHA-256 of the token.
        created: When, ISO 8601 in UTC.
    """

    name: str
    role: Role
    digest: str
    created: str


@dataclass(frozen=True, slots=True)
class User:
    """Who made a request."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one deployment, in one file of its data directory."""

    path: Path

    @staticmethod
    def of(folder: Path) -> "Tokens":
        """The tokens of a data directory."""
        return Tokens(folder / "tokens.json")

    def all(self) -> list[Token]:
        """Those there are."""
        try:
            return [Token.model_validate(raw) for raw in json.loads(self.path.read_bytes())]
        except FileNotFoundError:
            return []

    def add(self, name: str, role: Role) -> str:
        """Make a token and return it: it is told this one time.

        Raises:
            SpecError: If the name is taken, or not one.
        """
        known = self.all()
        if not _NAME.fullmatch(name) or any(token.name == name for token in known):
            raise SpecError("a new name of letters, digits, dots and hyphens, at most 60", got=repr(name[:80]))
        token = _PREFIX + secrets.token_urlsafe(32)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self._write([*known, Token(name=name, role=role, digest=_digest(token), created=created)])
        return token

    def remove(self, name: str) -> None:
        """Take a token back; who is logged in by it is logged out.

        Raises:
            SpecError: If there is none under that name.
        """
        known = self.all()
        if all(token.name != name for token in known):
            names = ", ".join(token.name for token in known) or "none"
            raise SpecError("the name of a token", got=repr(name), hint=f"there are {names}")
        self._write([token for token in known if token.name != name])

    def holder(self, digest: str) -> User | None:
        """Who has the token of this SHA-256; the time it takes does not tell how much of it is right."""
        found = None
        for token in self.all():
            if hmac.compare_digest(token.digest, digest):
                found = User(token.name, token.role)
        return found

    def _write(self, tokens: list[Token]) -> None:
        replace(self.path, json.dumps([token.model_dump() for token in tokens], indent=1).encode())
        self.path.chmod(0o600)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def secret(folder: Path) -> bytes:
    """What cookies are signed with, made once for each data directory."""
    path = folder / "secret"
    if not path.exists():
        replace(path, secrets.token_bytes(32))
        path.chmod(0o600)
    return path.read_bytes()


def user() -> User:
    """Who makes the request.

    Raises:
        Unauthorized: If nobody known does.
    """
    if g.get("user") is None:
        raise Unauthorized("a token is needed: send it as 'Authorization: Bearer TOKEN', or log in")
    return g.user


def needs(role: Role) -> Callable[[F], F]:
    """Let a view be used by those alone who have this role, or one that may do more."""

    def decorate(view: F) -> F:
        @wraps(view)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if ROLES.index(user().role) < ROLES.index(role):
                raise Forbidden(f"this needs a token with the role {role}, and yours has {user().role}")
            return view(*args, **kwargs)

        return checked  # pyright: ignore[reportReturnType]

    return decorate


def log_in(token: str) -> User:
    """Keep in the session who the browser's user is.

    Raises:
        Unauthorized: If nobody has such a token.
    """
    found = _tokens().holder(_digest(token.strip()))
    if found is None:
        raise Unauthorized("no such token")
    session.clear()
    session["token"] = _digest(token.strip())
    return found


def csrf_token() -> str:
    """What forms and scripts of our pages send back, which other sites cannot read."""
    if "csrf" not in session:
        session["csrf"] = secrets.token_urlsafe(32)
    return session["csrf"]


class Door:
    """What every request passes before its view: who is it, may this page ask, and how often."""

    def __init__(self, *, tokens: Tokens | None) -> None:
        self.tokens = tokens
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def __call__(self) -> None:
        """Find out who asks, and refuse what is not theirs to ask."""
        g.user, by_header = self.who()
        self._within(_LIMITS.get(request.endpoint or "*", _LIMITS["*"]))
        if request.method not in _SAFE and not by_header:
            _refuse_foreign()

    def who(self) -> tuple[User | None, bool]:
        """Who asks, and whether a header says so, which no page of another site can send.

        Raises:
            MisdirectedRequest: If it is no name of this machine that is asked, and there are no tokens.
            Unauthorized: If the token is not known.
        """
        if self.tokens is None:
            if (urlsplit(f"//{request.host}").hostname or "") not in LOCAL_HOSTS:
                raise MisdirectedRequest("this service answers to localhost alone")  # a name somebody pointed here
            return User("local", "admin"), False
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind:
            found = self.tokens.holder(_digest(token.strip())) if kind.lower() == "bearer" else None
            if found is None:
                self._within(_WRONG)
                raise Unauthorized("the token is not known here")
            return found, True
        digest = session.get("token")
        return (None if digest is None else self.tokens.holder(str(digest))), False

    def _within(self, limit: RateLimitItem) -> None:
        if self.tokens is None:
            return  # one person at their own machine
        who = g.get("user")
        if not self._limiter.hit(limit, request.remote_addr or "", "" if who is None else who.name):
            raise TooManyRequests(f"at most {limit}; wait a little")


_WRONG = parse("30/minute")
_LIMITS = {
    "*": parse("1200/minute"),
    "pages.login": parse("20/minute"),
    "api.models_add": parse("60/minute"),
    "api.data_add": parse("60/minute"),
    "api.jobs_add": parse("300/minute"),
    "api.try_it": parse("300/minute"),
    "api.guards_predict": parse("60000/minute"),
    "api.models_predict": parse("60000/minute"),
}


def _refuse_foreign() -> None:
    """Refuse a request that changes something and comes from a page that is not ours."""
    origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
    foreign = origin is not None and origin.partition("://")[2] != request.host
    if foreign or site not in (None, "same-origin", "none"):
        raise Forbidden("this request comes from another site's page")
    if origin is None and site is None and not session:
        return  # not a browser: nothing that another site's page could make it send
    sent = request.headers.get("X-CSRF-Token") or (request.form.get("csrf_token") if _is_form() else None) or ""
    if not hmac.compare_digest(sent.encode(), str(session.get("csrf", "")).encode()) or not sent:
        raise Forbidden("the page is too old, or its cookie was not kept: load it again")


def _is_form() -> bool:
    return request.mimetype in ("application/x-www-form-urlencoded", "multipart/form-data")


def _tokens() -> Tokens:
    return current_app.extensions["rempart"].tokens
