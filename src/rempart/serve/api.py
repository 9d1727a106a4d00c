"""The HTTP API under /api/v1. Views translate between HTTP and the store, the jobs and what answers at once."""

import base64
import binascii
import json
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Le, Len
from apiflask import APIBlueprint
from flask import Response, g, request, send_file, url_for
from pydantic import BaseModel, Field, RootModel
from werkzeug.exceptions import ServiceUnavailable, UnsupportedMediaType

from rempart.core.errors import SpecError
from rempart.core.types import Images
from rempart.data import Data, open_data
from rempart.guard import guard as make_guard
from rempart.guard import save_guard
from rempart.report import compare as comparing
from rempart.report.pictures import png
from rempart.report.schema import AttackChoice, DefenceChoice, DetectSpec, Reading, Strict
from rempart.report.store import HTML, JSON, read
from rempart.serve import live
from rempart.serve.auth import needs, user
from rempart.serve.catalog import Catalog, catalog
from rempart.serve.child import RUN
from rempart.serve.errors import Conflict, Missing
from rempart.serve.fit import check
from rempart.serve.jobs import Job, Kind
from rempart.serve.requests import EMBEDDED, REQUESTS, Asked, data_of, model_of, resolved
from rempart.serve.service import service
from rempart.serve.store import Item

api = APIBlueprint("api", __name__, url_prefix="/api/v1", tag="Rempart")
STREAM = 30.0  # seconds an answer with events lasts; a client comes back with the place it had reached
_STAYING = threading.BoundedSemaphore(8)
"""Answers with events that last, each in a thread of its own; further ones tell what is there, and come back."""
_TRY = 20.0  # seconds an attack on one image may take
_MOST = 256  # images in one request
Text = Annotated[str, Field(max_length=200)]
Image = Annotated[str, Field(max_length=64 * 2**20, description="An image file, base64")]
_DETECTORS = "detectors"
_JSON = ("api.jobs_add", "api.try_it", "api.guards_add")


class Upload(Asked):
    """What is told of a file beside its bytes."""

    name: Annotated[str, Field(max_length=400, description="Name of the file; its ending says what form it has")]
    box: Text = "0:1"
    classes: Annotated[str, Field(max_length=10_000)] = ""
    outputs: Literal["logits", "probabilities"] | None = None


class Page(Asked):
    """A part of a list."""

    kind: Kind | None = None
    offset: Annotated[int, Ge(0), Le(1_000_000)] = 0
    limit: Annotated[int, Ge(1), Le(200)] = 50


class Shown(Asked):
    """Which images of a data set."""

    split: Literal["train", "val", "test", "all"] = "test"
    label: Annotated[int, Ge(0), Le(100_000)] | None = None
    offset: Annotated[int, Ge(0), Le(10_000_000)] = 0
    limit: Annotated[int, Ge(1), Le(200)] = 24


class Split(Asked):
    """A part of a data set."""

    split: Literal["train", "val", "test", "all"] = "test"


class Number(Strict):
    """An image of a data set."""

    number: int
    label: int
    name_of_class: str


class Images_(Strict):
    """Images of a data set."""

    images: tuple[Number, ...]
    total: int


class Model(Strict):
    """A model that can be named by its id: an upload, or what a training left."""

    id: str
    name: str
    source: Literal["upload", "training"]
    created: str
    size: int
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    low: float
    high: float
    parameters: int
    digest: str
    facts: dict[str, Any] = Field(default_factory=dict)


class Models(Strict):
    """Models, the newest first."""

    models: tuple[Model, ...]


class Items(Strict):
    """Things of the store, the newest first."""

    items: tuple[Item, ...]


class JobList(Strict):
    """Jobs, the newest first."""

    jobs: tuple[Job, ...]


class File(Strict):
    """A file that a job wrote."""

    name: str
    size: int


class Files(Strict):
    """What a job wrote."""

    files: tuple[File, ...]


class Guarding(Asked):
    """A guard to make: the model and the defences of a detect job, under one of its detectors."""

    name: Text
    job: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    detector: Text


class Encoded(Asked):
    """Images to classify."""

    images: Annotated[list[Image], Len(1, _MOST)]


class Answer(Strict):
    """What was said of images.

    Attributes:
        seconds: Of reading the images and classifying them.
        notes: What was done to the images.
    """

    predictions: tuple[live.Predicted, ...]
    seconds: float
    notes: tuple[str, ...] = ()


class Trying(Asked):
    """One image to attack: a file, or one of a data set by its number."""

    model: Text
    image: Image | None = None
    data: Text | None = None
    number: Annotated[int, Ge(0), Le(100_000_000)] | None = None
    threat: Text
    attack: AttackChoice
    label: Annotated[int, Ge(0), Le(100_000)] | None = None
    target: Text | None = None
    defences: Annotated[tuple[DefenceChoice, ...], Len(0, 10)] = ()
    guard: Text | None = None
    seed: int = 0


class Compared(Asked):
    """Jobs to put side by side."""

    job: Annotated[list[Annotated[str, Field(pattern="^[0-9a-f]{32}$")]], Len(2, 12)]


class Health(Strict):
    """How the service is."""

    status: str
    jobs: dict[str, int] = Field(default_factory=dict)


JobRequest = RootModel[Annotated[Union[tuple(REQUESTS.values())], Field(discriminator="kind")]]  # noqa: UP007
JobRequest.__name__ = "JobRequest"


@api.before_request
def json_says_so() -> None:
    """A page of another site can send text unasked, and JSON not."""
    if request.endpoint in _JSON and request.mimetype != "application/json":
        raise UnsupportedMediaType("send application/json")


# ---- how the service is


@api.get("/health")
@api.output(Health)
def health() -> Health:
    """Whether this process answers."""
    return Health(status="ok")


@api.get("/ready")
@api.output(Health)
def ready() -> Health:
    """Whether jobs can be taken and files be kept."""
    try:
        counts = service().jobs.counts()
        (service().settings.folder / "incoming").stat()
    except Exception as error:
        raise ServiceUnavailable("the database or the data directory cannot be reached") from error
    return Health(status="ready", jobs=counts)


@api.get("/catalog")
@needs("read")
@api.output(Catalog)
def catalog_get() -> Catalog:
    """All that can be named in a request, with the schemas of options."""
    return catalog()


@api.get("/requests/<kind>")
@needs("read")
def request_schema(kind: str) -> dict[str, Any]:
    """JSON schema of a request for a job."""
    if kind not in REQUESTS:
        raise Missing(f"a kind out of {', '.join(REQUESTS)}", got=repr(kind[:40]))
    return REQUESTS[kind].model_json_schema()


# ---- models


@api.get("/models")
@needs("read")
@api.output(Models)
def models_list() -> Models:
    """Uploaded models, and those that trainings left."""
    return Models(models=tuple(known_models()))


def known_models() -> list[Model]:
    """Models that can be named by their id, the newest first."""
    uploads = [_uploaded(item) for item in service().store.items("model")]
    trained = [found for job in service().jobs.list(kind="train", limit=200) if (found := _trained(job)) is not None]
    return sorted([*uploads, *trained], key=lambda model: model.created, reverse=True)


def known_model(id: str) -> Model:
    """One of them, with all that was found when it was looked at.

    Raises:
        Missing: If there is none under that id.
    """
    if len(id) == 32:
        found = _trained(service().jobs.find(id))
        if found is None:
            raise Missing("the id of a training that is done", got=repr(id), hint="list the models")
        return found
    item = service().store.find("model", id)
    return _uploaded(item).model_copy(update={"facts": item.facts})


@api.get("/models/<id>")
@needs("read")
@api.output(Model)
def models_get(id: str) -> Model:
    """One model, with what was found when it was looked at."""
    return known_model(id)


@api.post("/models")
@needs("run")
@api.input(Upload, location="query")
@api.output(Model, status_code=201)
def models_add(query_data: Upload) -> Model:
    """Keep a model: its bytes are the body, as application/octet-stream. It is looked at before it is kept."""
    classes = tuple(name.strip() for name in query_data.classes.split(",") if name.strip())
    reading = Reading(box=query_data.box, classes=classes, outputs=query_data.outputs)
    return known_model(_received("model", query_data.name, reading).id)


@api.delete("/models/<id>")
@needs("admin")
@api.output({}, status_code=204)
def models_delete(id: str) -> str:
    """Delete an uploaded model that no waiting job needs; that of a training goes with its job."""
    _unneeded(id)
    service().store.remove("model", id)
    return ""


@api.post("/models/<id>/predict")
@needs("read")
@api.output(Answer)
def models_predict(id: str) -> Answer:
    """Classify images: JSON {"images": [base64, ...]}, or files named "images" in a form."""
    model = _classifier(id)
    return _answer(model, model)


def _uploaded(item: Item) -> Model:
    facts = item.facts["model"]
    known = {key: facts[key] for key in ("shape", "classes", "low", "high", "parameters", "digest")}
    return Model(id=item.id, name=item.name, source="upload", created=item.created, size=item.size, **known)


def _trained(job: Job) -> Model | None:
    """The model a training left, from its report: nothing is loaded."""
    if job.state != "done":
        return None
    folder = service().settings.folder / "jobs" / job.id / RUN
    try:
        report = read(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    except (SpecError, OSError):
        return None
    about = report.model
    name = f"{job.request.get('model') or 'tuned'} {job.request.get('recipe', '')}".strip()
    known = {key: getattr(about, key) for key in ("shape", "classes", "low", "high", "parameters", "digest")}
    return Model(id=job.id, name=name, source="training", created=job.ended or job.created, size=size, **known)


def _classifier(id: str, defences: tuple[DefenceChoice, ...] = ()) -> Any:
    place, reading = model_of(id, service().store, service().jobs)
    return service().cache.classifier(
        str(service().settings.folder / place), Reading.model_validate(reading), tuple(defences)
    )


# ---- data


@api.get("/data")
@needs("read")
@api.output(Items)
def data_list() -> Items:
    """Uploaded data sets; `digits` is there without one."""
    return Items(items=tuple(service().store.items("data")))


@api.get("/data/<id>")
@needs("read")
@api.output(Item)
def data_get(id: str) -> Item:
    """One data set: its splits, its classes and how many images they have."""
    return service().store.find("data", id)


@api.post("/data")
@needs("run")
@api.input(Upload, location="query")
@api.output(Item, status_code=201)
def data_add(query_data: Upload) -> Item:
    """Keep a data set: its bytes are the body, as application/octet-stream. It is looked at before it is kept."""
    return _received("data", query_data.name, Reading())


@api.delete("/data/<id>")
@needs("admin")
@api.output({}, status_code=204)
def data_delete(id: str) -> str:
    """Delete a data set that no waiting job needs."""
    _unneeded(id)
    service().store.remove("data", id)
    return ""


def _unneeded(id: str) -> None:
    if waiting := service().jobs.needing(id):
        raise Conflict("what no waiting job needs", got=f"that of {len(waiting)}", hint="cancel them, or wait")


@api.get("/data/<id>/images")
@needs("read")
@api.input(Shown, location="query")
@api.output(Images_)
def data_images(id: str, query_data: Shown) -> Images_:
    """Numbers and classes of images."""
    data = opened(id, query_data.split)
    rows = [
        (number, label)
        for number, label in zip(data.index.tolist(), data.labels.tolist(), strict=True)
        if query_data.label in (None, label)
    ]
    part = rows[query_data.offset : query_data.offset + query_data.limit]
    images = tuple(Number(number=n, label=label, name_of_class=data.class_names[label]) for n, label in part)
    return Images_(images=images, total=len(rows))


@api.get("/data/<id>/images/<int:number>.png")
@needs("read")
@api.input(Split, location="query")
def data_image(id: str, number: int, query_data: Split) -> Response:
    """One image as PNG; of a volume its middle slice."""
    data = opened(id, query_data.split)
    image = base64.b64decode(png(_row(data, number).x[0]))
    return Response(image, mimetype="image/png", headers={"Cache-Control": "private, max-age=3600"})


def opened(id: str, split: str) -> Data:
    """A split of a data set."""
    if id != EMBEDDED:
        service().store.find("data", id)  # raises
    return _open(_absolute(data_of(id if split == "all" else f"{id}:{split}", service().store)))


@lru_cache(maxsize=16)
def _open(text: str) -> Data:
    """Data of the store, which do not change under their id; the directory of an archive is read once."""
    return open_data(text)


def _absolute(text: str) -> str:
    return text if text.startswith(EMBEDDED) else str(service().settings.folder / text)


def _row(data: Data, number: int) -> Any:
    at = (data.index == min(number, 2**63 - 1)).nonzero()
    if not len(at):
        raise Missing(f"the number of one of {len(data)} images", got=number)
    return data.batch(at[0])


# ---- guards


@api.get("/guards")
@needs("read")
@api.output(Items)
def guards_list() -> Items:
    """Guards."""
    return Items(items=tuple(service().store.items("guard")))


@api.get("/guards/<id>")
@needs("read")
@api.output(Item)
def guards_get(id: str) -> Item:
    """One guard."""
    return service().store.find("guard", id)


@api.post("/guards")
@needs("run")
@api.input(Guarding)
@api.output(Item, status_code=201)
def guards_add(json_data: Guarding) -> Item:
    """Put a model under a detector that a detect job fitted and judged."""
    folder = service().jobs.folder(json_data.job) / RUN
    report = read(folder) if (folder / JSON).exists() else None
    if report is None or not isinstance(report.spec, DetectSpec):
        raise Missing("the id of a detect job that is done", got=repr(json_data.job))
    judged = {found.label: found for found in report.detection}
    if json_data.detector not in judged:
        raise SpecError(f"a detector out of {', '.join(judged)}", got=repr(json_data.detector))
    spec = report.spec
    made = make_guard(
        str(service().settings.folder / spec.model),
        spec.defences,
        folder / _DETECTORS / json_data.detector.replace(" ", "-"),
        None,
        spec.reading,
    )
    facts = {"job": json_data.job, "detector": json_data.detector, "model": report.model.name}
    facts |= {"classes": list(report.model.classes), "shape": list(report.model.shape)}
    return service().store.make("guard", json_data.name, facts, lambda place: save_guard(made, place))


@api.delete("/guards/<id>")
@needs("admin")
@api.output({}, status_code=204)
def guards_delete(id: str) -> str:
    """Delete a guard."""
    service().store.remove("guard", id)
    return ""


@api.post("/guards/<id>/predict")
@needs("read")
@api.output(Answer)
def guards_predict(id: str) -> Answer:
    """Classify images, and reject those that look attacked: JSON {"images": [base64, ...]}, or files in a form."""
    guarded = service().cache.guard(service().store.place(service().store.find("guard", id)))
    return _answer(guarded, guarded.classifier)


def _answer(target: Any, model: Any) -> Answer:
    started = time.perf_counter()
    uploaded = live.read_images(_contents(), model.shape, model.low, model.high)
    predictions = tuple(live.predict(target, uploaded.x))
    g.images = len(predictions)
    return Answer(predictions=predictions, seconds=time.perf_counter() - started, notes=uploaded.notes)


def _contents() -> list[bytes]:
    """The image files of a request."""
    if request.mimetype == "multipart/form-data":
        files = request.files.getlist("images")
        if not 1 <= len(files) <= _MOST:
            raise SpecError(f"1 to {_MOST} files named images", got=len(files))
        return [file.read() for file in files]
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("send application/json or multipart/form-data")
    return [_decoded(image) for image in Encoded.model_validate(request.get_json()).images]


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        raise SpecError("an image file in base64", got=f"{text[:20]!r}...") from None


# ---- one image attacked


@api.post("/try")
@needs("run")
@api.input(Trying)
@api.output(live.Trial)
def try_it(json_data: Trying) -> live.Trial:
    """Attack one image, and say what the model, the model behind each defence and a guard make of it."""
    model = _classifier(json_data.model)
    guarded = None
    if json_data.guard is not None:
        guarded = service().cache.guard(service().store.place(service().store.find("guard", json_data.guard)))
    x, label, notes = _image(json_data, model)
    return live.try_image(
        model,
        x,
        threat=json_data.threat,
        attack=json_data.attack,
        label=label,
        target=json_data.target,
        defences=json_data.defences,
        guard=guarded,
        seed=json_data.seed,
        seconds=_TRY,
        notes=notes,
    )


def _image(asked: Trying, model: Any) -> tuple[Images, int | None, tuple[str, ...]]:
    if (asked.image is None) == (asked.data is None):
        raise SpecError("an image, or data and a number", got="both" if asked.image else "neither")
    if asked.image is not None:
        read = live.read_images([_decoded(asked.image)], model.shape, model.low, model.high)
        return read.x, asked.label, read.notes
    if asked.number is None:
        raise SpecError("the number of an image beside data", got="none")
    data = _open(_absolute(data_of(str(asked.data), service().store))).seen_by(model)
    row = _row(data, asked.number)
    return row.x, int(row.y[0]) if asked.label is None else asked.label, ()


# ---- jobs


@api.get("/jobs")
@needs("read")
@api.input(Page, location="query")
@api.output(JobList)
def jobs_list(query_data: Page) -> JobList:
    """Jobs, the newest first."""
    found = service().jobs.list(kind=query_data.kind, offset=query_data.offset, limit=query_data.limit)
    return JobList(jobs=tuple(found))


@api.post("/jobs")
@needs("run")
@api.input(JobRequest)
@api.output(Job, status_code=202)
def jobs_add(json_data: Any) -> Any:
    """Queue a job. Of two requests with the same Idempotency-Key header, the second gets the job of the first."""
    asked: BaseModel = json_data.root
    spec = resolved(asked, service().store, service().jobs)  # pyright: ignore[reportArgumentType]
    ids: tuple[str, ...] = () if spec.kind == "train" else getattr(asked, "models", None) or (getattr(asked, "model"),)  # noqa: B009
    check(spec, [known_model(id) for id in ids], None if spec.data is None else _open(_absolute(spec.data)))
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= 200:
        raise SpecError("an Idempotency-Key of 1 to 200 characters", got=len(key))
    job, _ = service().jobs.submit(asked.model_dump(mode="json"), spec, user=user().name, key=key)
    return job, 202, {"Location": url_for("api.jobs_get", id=job.id)}


@api.get("/jobs/<id>")
@needs("read")
@api.output(Job)
def jobs_get(id: str) -> Job:
    """One job."""
    return service().jobs.find(id)


@api.post("/jobs/<id>/cancel")
@needs("run")
@api.output(Job, status_code=202)
def jobs_cancel(id: str) -> Job:
    """Cancel a job: what it finished is kept in its files."""
    return service().jobs.cancel(id)


@api.delete("/jobs/<id>")
@needs("admin")
@api.output({}, status_code=204)
def jobs_delete(id: str) -> str:
    """Delete a job that ended, with its files, unless a waiting job needs its model."""
    _unneeded(id)
    service().jobs.remove(id)
    return ""


@api.get("/jobs/<id>/events")
@needs("read")
@api.doc(responses={200: {"description": "Events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}})
def jobs_events(id: str) -> Response:
    """Progress as server-sent events; with the header Last-Event-ID from there on."""
    jobs = service().jobs
    jobs.find(id)
    given = request.headers.get("Last-Event-ID", "0")
    at = int(given) if given.isascii() and given.isdigit() and len(given) < 16 else 0

    def stream() -> Iterator[str]:
        stays = _STAYING.acquire(blocking=False)
        until = time.monotonic() + (STREAM if stays else 0)
        try:
            place, told = at, None
            while True:
                job = jobs.find(id)  # before the events: none of those behind the last state is missed
                for byte, event in list(jobs.events(id, place)):
                    place = byte
                    yield f"id: {place}\nevent: progress\ndata: {json.dumps(event)}\n\n"
                if job.state != told:
                    told = job.state
                    yield f"event: state\ndata: {job.model_dump_json()}\n\n"
                if job.state not in ("queued", "running") or time.monotonic() >= until:
                    return
                yield ": here\n\n"  # an answer nobody reads is noticed
                time.sleep(0.5)
        finally:
            if stays:
                _STAYING.release()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Response(stream(), mimetype="text/event-stream", headers=headers)


@api.get("/jobs/<id>/report")
@needs("read")
def jobs_report(id: str) -> Response:
    """The report of a job."""
    return send_file(_written(id, _report_name(id, JSON)), mimetype="application/json", conditional=True)


@api.get("/jobs/<id>/report.html")
@needs("read")
def jobs_report_page(id: str) -> Response:
    """The report as a page that is one file."""
    return _sealed(send_file(_written(id, _report_name(id, HTML)), mimetype="text/html", conditional=True))


@api.get("/jobs/<id>/files")
@needs("read")
@api.output(Files)
def jobs_files(id: str) -> Files:
    """Names of the files a job wrote."""
    found = written(id)
    return Files(files=tuple(File(name=name, size=path.stat().st_size) for name, path in sorted(found.items())))


@api.get("/jobs/<id>/files/<path:name>")
@needs("read")
def jobs_file(id: str, name: str) -> Response:
    """One of them, or ranges of it."""
    path = _written(id, name)
    return send_file(path, mimetype="application/octet-stream", as_attachment=True, conditional=True)


@api.get("/compare")
@needs("read")
def compare() -> Response:
    """Audits side by side, with judged detectors beneath, as a page that is one file."""
    ids = Compared.model_validate({"job": request.args.getlist("job")}).job
    reports = {id: read(_written(id, _report_name(id, JSON))) for id in ids}
    if any(report.kind == "train" for report in reports.values()):
        raise SpecError("audits", got="a training", hint="audit its model, and compare the audits")
    detected = [report for report in reports.values() if report.kind == "detect"]
    audits = {id: report for id, report in reports.items() if report.kind != "detect"}
    names = {id: f"{report.model.name}{report.behind}" for id, report in audits.items()}
    several = len(set(names.values())) < len(names)
    named = {f"{name} ({id[:4]})" if several else name: audits[id] for id, name in names.items()}
    return _sealed(Response(comparing.compare_html(comparing.compare(named), named, detected), mimetype="text/html"))


def written(id: str) -> dict[str, Path]:
    """Files that a job wrote, by their names in its folder."""
    folder = service().jobs.folder(id) / RUN
    return {
        str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    }


def _written(id: str, name: str) -> Path:
    """One of them: a client's name is looked up and never opened."""
    found = written(id).get(name)
    if found is None:
        raise Missing(
            "the name of a file that this job wrote", got=repr(name[:80]), hint="wait for its end, or list them"
        )
    return found


def _report_name(id: str, name: str) -> str:
    """That of an attack stands beside its images."""
    for own in (name, f"adversarial{Path(name).suffix}"):
        if own in written(id):
            return own
    job = service().jobs.find(id)
    hint = job.reason or ("wait for its end" if job.state in ("queued", "running") else "")
    raise Missing("a job with a report", got=f"one that is {job.state}", hint=hint)


def _sealed(response: Response) -> Response:
    """A report: it holds its styles and pictures, and runs nothing."""
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'; sandbox"
    )
    return response


def _received(kind: Literal["model", "data"], name: str, reading: Reading) -> Item:
    if request.mimetype not in ("application/octet-stream", "application/zip"):
        raise UnsupportedMediaType("send the bytes of the file as application/octet-stream")
    request.max_content_length = service().settings.upload
    return service().store.add(kind, name, request.stream, reading)
