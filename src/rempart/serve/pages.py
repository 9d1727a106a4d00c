"""The pages for browsers. They show what is there; what people do on them goes through the API."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

from flask import Blueprint, g, redirect, render_template, request, session, url_for
from werkzeug.exceptions import HTTPException, Unauthorized

from rempart.core.errors import RempartError
from rempart.report.store import JSON
from rempart.serve import words
from rempart.serve.api import Model, known_model, known_models, opened, written
from rempart.serve.auth import ROLES, User, csrf_token, log_in, needs
from rempart.serve.child import RUN
from rempart.serve.errors import Missing, status_of
from rempart.serve.jobs import KINDS, Job
from rempart.serve.requests import EMBEDDED
from rempart.serve.service import service
from rempart.serve.store import Item

pages = Blueprint("pages", __name__)
_COOKIE, _YEAR = "language", 365 * 24 * 3600
_PATH = re.compile(r"/(?!/)[\w/-]*(\?[\w=&:-]*)?", re.ASCII)
_JOBS, _REPORTS, _MOST = 50, 25, 1000
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a report, for a list of them."""

    clean: str
    worst: str


# ---- what is on every page


@pages.context_processor
def _around() -> dict[str, Any]:
    tag = language_of()
    user: User | None = g.get("user")
    return {
        "_": lambda sentence, **values: words.translated(sentence, tag, **values),  # pyright: ignore[reportUnknownLambdaType]
        "back": request.full_path.rstrip("?") if request.method == "GET" else "/",
        "csrf_token": csrf_token,
        "here": (request.endpoint or "").rpartition(".")[2],
        "language": tag,
        "languages": words.LANGUAGES,
        "may": lambda role: user is not None and ROLES.index(user.role) >= ROLES.index(role),  # pyright: ignore
        "named": _named(),
        "number": lambda value: _number(value, tag),  # pyright: ignore[reportUnknownLambdaType]
        "user": user,
        "words": words.of_scripts(tag),
    }


def language_of() -> str:
    """The language of the request."""
    return words.chosen(request.cookies.get(_COOKIE), [tag for tag, _ in request.accept_languages])


def _number(value: int, tag: str) -> str:
    return f"{value:,}".replace(",", "\u202f" if tag == "fr" else ",")


def _share(rate: dict[str, Any] | None) -> str:
    """A share of a report in per cent, as the language writes it."""
    if not rate or not rate["n"]:
        return ""
    text = f"{100 * rate['k'] / rate['n']:.1f}"
    return f"{text.replace('.', ',')}\u202f%" if language_of() == "fr" else f"{text}%"


def _named() -> Callable[[Job], str]:
    """Names jobs by what they are about, with the names of models and data instead of ids; these are read once."""
    names: dict[str, str] = {}

    def name(id: Any) -> str:
        if not names:
            things = [*service().store.items("model"), *service().store.items("data")]
            names.update({item.id: item.name for item in things})
            names[EMBEDDED] = EMBEDDED
        text = str(id or "")
        head = re.split(r"[:@\[]", text, maxsplit=1)[0]
        if len(head) == 32 and head not in names:
            names[head] = _trained(head)
        return names.get(head, head[:8]) + text[len(head) :]

    def named(job: Job) -> str:
        asked = job.request
        if job.kind == "train":
            about = f"{asked.get('model') or name(asked.get('start'))} {asked.get('recipe', '')}"
        else:
            about = ", ".join(name(id) for id in asked.get("models") or [asked.get("model")])
        return " · ".join(filter(None, (about.strip(), name(asked.get("data")))))

    return named


def _trained(id: str) -> str:
    try:
        asked = service().jobs.find(id).request
    except Missing:
        return id[:8]
    return f"{asked.get('model') or 'tuned'} {asked.get('recipe', '')}".strip()


def error_page(error: Exception) -> Any:
    """An error as a page."""
    if isinstance(error, Unauthorized) and request.method == "GET":
        return redirect(url_for("pages.login", next=request.full_path.rstrip("?")))
    if isinstance(error, HTTPException):
        status, told = error.code or 500, {"message": error.description or error.name}
    else:
        assert isinstance(error, RempartError)
        status = status_of(error)
        folder = f"{service().settings.folder}/"
        parts = {"message": error, "expected": error.expected, "got": error.got, "hint": error.hint}
        told = {key: "" if text is None else str(text).replace(folder, "") for key, text in parts.items()}
    return render_template("error.html", status=status, error=told, **_around()), status


pages.register_error_handler(HTTPException, error_page)
pages.register_error_handler(RempartError, error_page)


@pages.post("/language")
def language() -> Any:
    """Keep a language, and go back."""
    back = request.form.get("back", "/")
    answer = redirect(back if _PATH.fullmatch(back) else "/", 303)
    if (tag := request.form.get("language", "")) in words.LANGUAGES:
        answer.set_cookie(_COOKIE, tag, max_age=_YEAR, httponly=True, samesite="Lax", secure=service().settings.secure)
    return answer


@pages.get("/login")
def login() -> str:
    """Ask for a token."""
    return render_template("login.html", next=request.args.get("next", "/"), wrong=False)


@pages.post("/login")
def enter() -> Any:
    """Take a token."""
    next = request.form.get("next", "/")
    try:
        log_in(request.form.get("token", ""))
    except Unauthorized:
        return render_template("login.html", next=next, wrong=True), 401
    return redirect(next if _PATH.fullmatch(next) else "/", 303)


@pages.post("/logout")
def leave() -> Any:
    """Forget who the browser's user is."""
    session.clear()
    return redirect(url_for("pages.login"), 303)


# ---- what can be asked for


@pages.get("/")
@needs("read")
def try_one() -> str:
    """One image attacked."""
    return render_template("try.html", models=known_models(), data=_all_data())


def _ask(kind: Literal["audit", "train", "detect", "explain"]) -> Callable[[], str]:
    def view() -> str:
        return render_template("ask.html", kind=kind, models=known_models())

    view.__name__ = view.__qualname__ = kind
    view.__doc__ = f"The form of a request: {kind}."
    return needs("read")(view)


for _kind in ("audit", "train", "detect", "explain"):
    pages.get(f"/{_kind}")(_ask(_kind))


# ---- jobs and reports


@pages.get("/jobs")
@needs("read")
def jobs() -> str:
    """All jobs."""
    offset = min(max(request.args.get("offset", 0, type=int), 0), 10**6)
    found = service().jobs.list(offset=offset, limit=_JOBS + 1)
    return render_template("jobs.html", jobs=found[:_JOBS], more=len(found) > _JOBS, offset=offset, limit=_JOBS)


@pages.get("/jobs/<id>")
@needs("read")
def job(id: str) -> str:
    """One job."""
    found = service().jobs.find(id)
    ended = found.state not in ("queued", "running")
    files = sorted(written(id).items()) if ended else []
    return render_template(
        "job.html",
        job=found,
        report=ended and _report(id) is not None,
        files=[{"name": name, "size": path.stat().st_size} for name, path in files],
    )


@pages.get("/reports")
@needs("read")
def reports() -> str:
    """The reports of jobs that are done."""
    done = [job for job in service().jobs.list(limit=_MOST) if job.state == "done" and _report(job.id) is not None]
    wanted = {field: request.args.get(field, "") for field in ("kind", "model", "data")}
    named = _named()
    about = {job.id: _about(job, named) for job in done}
    chosen = [job for job in done if all(value in ("", about[job.id][field]) for field, value in wanted.items())]
    choices = {field: [(value, value) for value in sorted({row[field] for row in about.values()})] for field in wanted}
    choices["kind"] = [(kind, kind) for kind in KINDS if any(job.kind == kind for job in done)]
    offset = min(max(request.args.get("offset", 0, type=int), 0), _MOST)

    def page(at: int) -> str:
        return f"?{urlencode({**wanted, 'offset': at})}"

    return render_template(
        "reports.html",
        reports=[(job, _figures(job.id)) for job in chosen[offset : offset + _REPORTS]],
        empty=not done,
        choices=choices,
        wanted=wanted,
        newer=page(max(offset - _REPORTS, 0)) if offset else None,
        older=page(offset + _REPORTS) if len(chosen) > offset + _REPORTS else None,
    )


@pages.get("/compare-reports")
@needs("read")
def comparison() -> str:
    """Reports side by side."""
    chosen = [service().jobs.find(id) for id in request.args.getlist("job")[:12]]
    source = f"/api/v1/compare?{urlencode([('job', job.id) for job in chosen])}"
    return render_template("comparison.html", chosen=chosen, source=source)


def _about(job: Job, named: Callable[[Job], str]) -> dict[str, str]:
    """What reports are chosen by."""
    model, _, data = named(job).rpartition(" · ")
    return {"kind": job.kind, "model": model, "data": data}


def _report(id: str) -> Path | None:
    """The report of a job; that of an attack stands beside its images."""
    folder = service().settings.folder / "jobs" / id / RUN
    return next((path for path in (folder / JSON, folder / "adversarial.json") if path.exists()), None)


def _figures(id: str) -> Figures:
    path = _report(id)
    found = {} if path is None else _read(path, path.stat().st_mtime_ns)
    return Figures(clean=_share(found.get("clean")), worst=_share(found.get("worst_case")))


@lru_cache(maxsize=512)
def _read(path: Path, _: int) -> dict[str, Any]:
    """What lists show of a report; the time of its file tells a new one."""
    report: dict[str, Any] = json.loads(path.read_bytes())
    labels = [row["label"] for row in report.get("detection", ())]
    return {"clean": report.get("clean"), "worst_case": report.get("worst_case"), "detectors": labels}


# ---- models, data, guards


@pages.get("/models")
@needs("read")
def models() -> str:
    """All models."""
    return render_template("models.html", models=known_models())


@pages.get("/models/<id>")
@needs("read")
def model(id: str) -> str:
    """One model, and what was found when it was looked at."""
    found: Model = known_model(id)
    facts = found.facts
    return render_template(
        "model.html",
        model=found,
        form=facts.get("form", ""),
        problem=facts.get("problem"),
        notes=facts.get("model", {}).get("notes", ()),
        checks=facts.get("checks", ()),
        layers=facts.get("layers", ()),
    )


@pages.get("/data")
@needs("read")
def data() -> str:
    """All data sets."""
    return render_template("data.html", data=_all_data())


@pages.get("/data/<id>")
@needs("read")
def dataset(id: str) -> str:
    """One data set."""
    return render_template(
        "dataset.html", set=_embedded() if id == EMBEDDED else _set(service().store.find("data", id))
    )


def _all_data() -> list[dict[str, Any]]:
    return [*map(_set, service().store.items("data")), _embedded()]


def _set(item: Item) -> dict[str, Any]:
    return {"id": item.id, "name": item.name, "size": item.size, "created": item.created, **item.facts}


@lru_cache(maxsize=1)
def _embedded() -> dict[str, Any]:
    """The digits, described as an upload is."""
    splits: dict[str, Any] = {}
    for name in ("train", "test"):
        found = opened(EMBEDDED, name)
        counts = found.labels.bincount(minlength=len(found.class_names)).tolist()
        splits[name] = {"images": len(found), "classes": dict(zip(found.class_names, counts, strict=True))}
    about = {"shape": list(found.shape), "classes": list(found.class_names), "splits": splits}
    return {"id": EMBEDDED, "name": EMBEDDED, "size": 0, "created": "", **about}


@pages.get("/guards")
@needs("read")
def guards() -> str:
    """All guards, and what new ones can be made of."""
    sources: list[tuple[Job, list[str]]] = []
    for job in service().jobs.list(kind="detect", limit=100):
        path = _report(job.id) if job.state == "done" else None
        if path is not None and (labels := _read(path, path.stat().st_mtime_ns)["detectors"]):
            sources.append((job, labels))
    made = [
        {"id": item.id, "name": item.name, "created": item.created, "detector": item.facts.get("detector", "")}
        for item in service().store.items("guard")
    ]
    return render_template("guards.html", guards=made, sources=sources, wanted=request.args.get("job", ""))
