"""From what a client asks for to a spec: ids become places in the store, and nothing else names a file."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Len
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from rempart.core.errors import SpecError
from rempart.models.save import CONFIG, WEIGHTS
from rempart.models.zoo import models
from rempart.report.schema import (
    AnySpec,
    AttackSpec,
    AuditSpec,
    CertifySpec,
    DetectSpec,
    ExplainSpec,
    Strict,
    TrainSpec,
    fault,
)
from rempart.report.store import JSON
from rempart.serve.child import RUN
from rempart.serve.errors import Missing
from rempart.serve.jobs import Jobs
from rempart.serve.store import Store
from rempart.train.config import recipe_names

EMBEDDED = "digits"
_DATA = rf"({EMBEDDED}|[0-9a-f]{{16}})"
_TAIL = (
    r"((?:@(?:[0-9]{1,5}(?:x[0-9]{1,5})?|grey|rgb|window=[-a-z0-9.:]{1,30}|slice=[-a-z0-9:]{1,30}"
    r"|(?:image|label)=[A-Za-z0-9_]{1,60}))*(?::(?:train|val|test))?(?:\[[-0-9:]{1,60}\])?)"
)
_MODEL = "[0-9a-f]{16}|[0-9a-f]{32}"


def _names_data(text: str) -> str:
    if re.fullmatch(_DATA + _TAIL, text) is None:
        told = "expected digits or the id of a data set, with @64, :train, :val, :test or [:500] behind it, got {got}"
        raise PydanticCustomError("data", told, {"got": repr(text[:80])})
    return text


Data = Annotated[
    str,
    AfterValidator(_names_data),
    WithJsonSchema(
        {"type": "string", "pattern": f"^{_DATA}{_TAIL}$", "description": "digits or an id, then :test[:500]"}
    ),
]
Model = Annotated[str, Field(pattern=f"^(?:{_MODEL})$", description="The id of a model")]
_ASIDE = frozenset(
    ("out", "device", "devices", "reading", "patients", "costs", "image", "label", "log", "resume", "overwrite")
)
"""Fields of specs that name files of the machine or how it is used: a client does not set them."""


class Asked(Strict):
    """What comes from outside: no number that is none."""

    model_config = ConfigDict(allow_inf_nan=False)


def _request(name: str, spec: type[Strict]) -> type[Asked]:
    """A spec as a client may fill it in."""
    fields: dict[str, Any] = {
        key: (info.annotation if not info.metadata else Annotated[info.annotation, *info.metadata], info)
        for key, info in spec.model_fields.items()
        if key not in _ASIDE
    }
    fields["kind"] = (spec.model_fields["kind"].annotation, ...)
    if spec is TrainSpec:
        fields |= {
            "data": (Data, ...),
            "start": (Model | type(None), None),
            "recipe": (Literal[recipe_names()], "plain"),
        }
    elif spec is ExplainSpec:
        fields |= {"data": (Data, ...), "models": (Annotated[tuple[Model, ...], Len(1, 8)], ...)}
    else:
        fields |= {"data": (Data, ...), "model": (Model, ...)}
    return create_model(name, __base__=Asked, __doc__=(spec.__doc__ or "").split("\n")[0], **fields)


SPECS: Mapping[str, type[Strict]] = {
    "audit": AuditSpec,
    "attack": AttackSpec,
    "train": TrainSpec,
    "certify": CertifySpec,
    "detect": DetectSpec,
    "explain": ExplainSpec,
}
REQUESTS: Mapping[str, type[Strict]] = {kind: _request(f"{kind.title()}Request", spec) for kind, spec in SPECS.items()}
"""What a client may ask for, by kind; `model`, `start` and `data` are ids."""


def resolved(request: Strict, store: Store, jobs: Jobs) -> AnySpec:
    """The spec of a request, with places relative to the data directory.

    Raises:
        SpecError: If an id is of nothing that is here, or a name of nothing that comes with Rempart.
    """
    asked: dict[str, Any] = request.model_dump()
    kind: str = asked["kind"]
    if kind == "train":
        asked |= _training(asked, store, jobs)
    elif kind == "explain":
        found = [model_of(id, store, jobs) for id in asked["models"]]
        asked |= {"models": tuple(place for place, _ in found), "reading": found[0][1]}
    else:
        place, reading = model_of(asked["model"], store, jobs)
        asked |= {"model": place, "reading": reading}
    if asked.get("data") is not None:
        asked["data"] = data_of(asked["data"], store)
    try:
        return SPECS[kind].model_validate({"out": "run", **asked})  # pyright: ignore[reportReturnType]
    except ValidationError as error:
        raise SpecError("a valid request", got=fault(error)) from None


def model_of(id: str, store: Store, jobs: Jobs) -> tuple[str, Any]:
    """Where a model lies, relative to the data directory, and how it is read: an upload, or what a training left.

    Raises:
        Missing: If there is none under that id.
    """
    if len(id) == 32:
        folder = jobs.folder(id) / RUN
        running = jobs.find(id).state in ("queued", "running")  # its model is written anew at each epoch
        if running or not all((folder / name).exists() for name in (CONFIG, WEIGHTS)):
            raise Missing("the id of a training that is done", got=repr(id), hint="list the models")
        return str(folder.relative_to(jobs.settings.folder)), {}
    item = store.find("model", id)
    return str(store.place(item).relative_to(store.folder)), item.reading.model_dump()


def data_of(text: str, store: Store) -> str:
    """Where images lie, relative to the data directory, with what stands behind their id: `ID@64@grey:test[:500]`.

    Raises:
        SpecError: If the text names anything else.
        Missing: If there are none under that id.
    """
    match = re.fullmatch(_DATA + _TAIL, text)
    if match is None:
        hint = "for example digits:test, or an id with :test[:500]"
        raise SpecError("the id of a data set, with @64, :test or [:500] behind it", got=repr(text[:80]), hint=hint)
    if match[1] == EMBEDDED:
        return text
    return str(store.place(store.find("data", match[1])).relative_to(store.folder)) + match[2]


def _training(asked: dict[str, Any], store: Store, jobs: Jobs) -> dict[str, Any]:
    """What a training names: an architecture and a recipe that come with Rempart, a model and a run of this service."""
    if asked["recipe"] not in recipe_names():
        raise SpecError("the name of a recipe that comes with Rempart", got=repr(asked["recipe"]))
    if asked["start"] is None:
        asked["model"] = asked["model"] or "lenet"
        models[asked["model"]]  # raises
        started = {"start": None, "reading": {}}
    else:
        place, reading = model_of(asked["start"], store, jobs)
        started = {"start": place, "reading": reading}
    options = dict(asked["options"])
    if (neurons := options.get("neurons")) is not None:
        folder = jobs.folder(str(neurons)) / RUN
        if not (folder / JSON).exists():
            raise Missing("the id of an explain job that is done, as neurons", got=repr(neurons))
        options["neurons"] = str(folder.relative_to(jobs.settings.folder))
    return {**started, "options": options}
