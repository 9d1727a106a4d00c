"""Jobs as the web process sees them: put into the table, listed, cancelled; their files read."""

import errno
import json
import logging
import os
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from dbos import DBOS, DBOSClient
from dbos._serialization import DBOSPortableJSON
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError

from rempart.core.disk import replace
from rempart.core.errors import SpecError
from rempart.serve.child import EVENTS, RUN, SPEC
from rempart.serve.errors import Conflict, Missing, Unavailable
from rempart.serve.process import FULL
from rempart.serve.settings import Settings

if TYPE_CHECKING:
    from rempart.report.schema import AnySpec  # loads torch, which a worker does without

JSON = DBOSPortableJSON
QUEUE, VERSION = "jobs", "1"
Kind = Literal["audit", "attack", "train", "certify", "detect", "explain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What a job may do; in the table it goes by this name."""
State = Literal["queued", "running", "done", "failed", "cancelled", "dead"]
STATES: dict[str, State] = {"ENQUEUED": "queued", "DELAYED": "queued", "PENDING": "running", "CANCELLED": "cancelled"}
_ID = re.compile(r"[0-9a-f]{32}")
_REQUEST = "request.json"
_PATIENCE = 10.0  # seconds in which a database that is started anew is back
_CONNECTIONS = 8
_FULL = ("disk is full", os.strerror(errno.ENOSPC))  # how SQLite and PostgreSQL say it
T = TypeVar("T")


class Job(BaseModel, frozen=True, extra="forbid"):
    """One job.

    Attributes:
        id: 32 hexadecimal digits.
        kind: What it does.
        state: queued; running; done; failed, with the reason; cancelled; dead: its process died at each attempt.
        reason: Why it is not done.
        request: What was asked for, with ids of models and data.
        user: Who asked.
        created: When, ISO 8601 in UTC.
        ended: When it ended.
        progress: The last event.
    """

    id: str
    kind: str
    state: State
    reason: str = ""
    request: dict[str, Any]
    user: str
    created: str
    ended: str | None = None
    progress: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Jobs:
    """The jobs of one deployment."""

    settings: Settings
    table: DBOSClient

    @staticmethod
    def of(settings: Settings) -> "Jobs":
        """Connect to the table, which is made if it is not there.

        Raises:
            SpecError: If the database cannot be reached.
        """
        logging.getLogger("dbos").setLevel(logging.CRITICAL)  # what it has to say is in the table, and in our errors
        try:
            DBOS.migrate(settings.url)
            table = DBOSClient(
                system_database_url=settings.url,
                system_database_pool_size=_CONNECTIONS,
                serializer=JSON,
                application_name="rempart",
                retry_connection_errors=False,  # it would wait for ever: see `_asked`
            )
        except Exception as error:  # noqa: BLE001  DBOS and drivers raise what they like
            came = f"{settings.url.rpartition('@')[2]}: {str(error).splitlines()[0]}"
            raise SpecError("a database that can be reached", got=came, hint="look at --database") from None
        return Jobs(settings, table)

    def submit(self, request: dict[str, Any], spec: "AnySpec", *, user: str, key: str | None) -> tuple[Job, bool]:
        """Put a job into the queue.

        Args:
            request: As the client sent it, to be shown.
            spec: The same with places in the store; its `out` is set here.
            user: Who asks.
            key: Idempotency key: of two requests with the same, the second gets the job of the first.

        Returns:
            The job, and whether it is a new one.

        Raises:
            Conflict: If the key was used for another request.
            Unavailable: If the table cannot be reached; the same request with the same key can be sent again.
            OSError: If the disk is full.
        """
        id = uuid.uuid4().hex if key is None else uuid.uuid5(uuid.NAMESPACE_URL, f"{user}\n{key}").hex
        folder = self.settings.folder / "jobs" / id
        new = _laid(folder, self._files(id, request, spec, user), _folder(spec))
        if not new and _request(folder).get("request") != request:
            raise Conflict("the request that this Idempotency-Key came with before", got="another one")
        if new or self._status(id) is None:
            options: Any = {"workflow_name": spec.kind, "queue_name": QUEUE, "workflow_id": id, "app_version": VERSION}
            _asked(lambda: self.table.enqueue(options, id))  # the second of two changes nothing
        return self.find(id), new

    def _files(self, id: str, request: dict[str, Any], spec: "AnySpec", user: str) -> dict[str, bytes]:
        out = f"jobs/{id}/{RUN}" + ("/adversarial.npz" if spec.kind == "attack" else "")
        asked = {"request": request, "user": user, "created": datetime.now(UTC).isoformat(timespec="milliseconds")}
        spec = spec.model_copy(update={"out": out})
        return {SPEC: spec.model_dump_json(indent=1).encode(), _REQUEST: json.dumps(asked).encode()}

    def find(self, id: str) -> Job:
        """One job.

        Raises:
            Missing: If there is none under that id.
        """
        status = self._status(id) if _ID.fullmatch(id) else None
        if status is None:
            raise Missing("the id of a job that is here", got=repr(id[:40]), hint="list the jobs")
        return self._job(status)

    def list(self, *, kind: str | None = None, offset: int = 0, limit: int = 50) -> list[Job]:
        """Jobs, the newest first."""
        names: Any = list(KINDS) if kind is None else kind
        found = _asked(lambda: _listed(self.table, name=names, limit=limit, offset=offset, sort_desc=True))
        jobs = [self._job(status) for status in found]
        return sorted(jobs, key=lambda job: job.created, reverse=True)  # the table may have whole seconds

    def needing(self, id: str) -> tuple[Job, ...]:
        """Jobs that are not ended and name this model or data set."""
        found = _asked(lambda: _listed(self.table, status=["ENQUEUED", "PENDING"], load_output=False))
        return tuple(job for job in map(self._job, found) if id in json.dumps(job.request))

    def counts(self) -> dict[str, int]:
        """How many jobs are queued and running."""
        found = _asked(lambda: _listed(self.table, status=["ENQUEUED", "PENDING"], load_output=False))
        states = [STATES[status.status] for status in found]
        return {state: states.count(state) for state in ("queued", "running")}

    def running(self) -> dict[str, frozenset[str]]:
        """Ids of jobs that run, by the name of their worker."""
        found = _listed(self.table, status="PENDING", load_output=False)
        names = {status.executor_id for status in found}
        return {name: frozenset(s.workflow_id for s in found if s.executor_id == name) for name in names if name}

    def requeue(self, id: str, worker: str) -> None:
        """Queue a job again that its worker will not end; nothing where another worker has it by now."""
        self.table._sys_db.reenqueue_for_recovery(id, [worker], QUEUE)

    def cancel(self, id: str) -> Job:
        """Cancel a job; one that ended stays as it is. Its process is gone within two seconds."""
        if self.find(id).state in ("queued", "running"):
            _asked(lambda: self.table.cancel_workflow(id))
        return self.find(id)

    def cancelled(self, id: str) -> bool:
        """Whether a job was cancelled, or deleted since then; False where that cannot be found out."""
        try:
            found = _listed(self.table, workflow_ids=[id], load_output=False)
        except Exception:  # noqa: BLE001  DBOS and drivers raise what they like, and the job goes on
            return False
        return not found or found[0].status == "CANCELLED"

    def gone(self, id: str) -> bool:
        """Whether there is no such job."""
        return self._status(id) is None

    def remove(self, id: str) -> None:
        """Delete a job that ended, with its files.

        Raises:
            Missing: If there is none under that id.
            SpecError: If it did not end yet.
        """
        if (state := self.find(id).state) in ("queued", "running"):
            raise SpecError("a job that ended", got=f"one that is {state}", hint="cancel it first")
        away = self.settings.folder / "incoming" / f"{id}.{secrets.token_hex(4)}.gone"
        with suppress(FileNotFoundError):
            (self.settings.folder / "jobs" / id).rename(away)  # first: a job of the same key finds nothing of this one
        _asked(lambda: self.table.delete_workflow(id))
        shutil.rmtree(away, ignore_errors=True)

    def folder(self, id: str) -> Path:
        """Where the files of a job lie.

        Raises:
            Missing: If there is none under that id.
        """
        self.find(id)
        return self.settings.folder / "jobs" / id

    def events(self, id: str, at: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """Events of a job that are there now, from a byte of the file on, each with the byte behind it."""
        path = self.settings.folder / "jobs" / id / EVENTS
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(at)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # half a line: the rest is being written
                at += len(line)
                if (event := _event(line)) is not None:
                    yield at, event

    def _status(self, id: str) -> Any:
        return next(iter(_asked(lambda: _listed(self.table, workflow_ids=[id]))), None)

    def _job(self, status: Any) -> Job:
        folder = self.settings.folder / "jobs" / status.workflow_id
        state, reason = STATES.get(status.status), ""
        if status.status == "SUCCESS":
            state, reason = status.output["state"], status.output["reason"]
        elif status.status == "ERROR":
            state, reason = "failed", "failed unexpectedly in the worker"
        asked = _request(folder)
        return Job(
            id=status.workflow_id,
            kind=status.name,
            state=state or "dead",
            reason=reason,
            request=asked.get("request", {}),
            user=asked.get("user", ""),
            created=asked.get("created") or _time(status.created_at) or "",
            ended=None if state in ("queued", "running") else _time(status.completed_at or status.updated_at),
            progress=_last(folder / EVENTS),
        )


def _listed(table: DBOSClient, **chosen: Any) -> list[Any]:
    options: dict[str, Any] = {"name": list(KINDS), "load_input": False, **chosen}
    return table.list_workflows(**options)


def _asked(question: Callable[[], T]) -> T:
    """The answer of the table; a database that is being started anew is waited for.

    Raises:
        Unavailable: If it is not back in time.
        OSError: If its disk is full.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return question()
        except DBAPIError as error:
            if any(told in str(error.orig) for told in _FULL):
                raise OSError(errno.ENOSPC, FULL) from error
            if time.monotonic() > until:
                raise Unavailable("a table of jobs that answers", got=type(error).__name__, hint="try again") from error
            time.sleep(0.2)


def _folder(spec: "AnySpec") -> str:
    """What the folder that a job writes to is really called: reports name a trained model by it."""
    if spec.kind != "train":
        return RUN
    return re.sub(r"[^a-z0-9]+", "-", f"{'tuned' if spec.start else spec.model} {spec.recipe}".lower()).strip("-")


def _laid(folder: Path, files: Mapping[str, bytes], run: str) -> bool:
    """Make a folder with these files and one that goes by RUN too, whole or not at all; False if it was there."""
    if folder.exists():
        return False
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        for name, content in files.items():
            replace(part / name, content)
        if run != RUN:
            (part / run).mkdir()
            (part / RUN).symlink_to(run)
        part.rename(folder)
    except OSError:
        if folder.exists():
            return False  # of two at once, the other one
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _request(folder: Path) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        return json.loads((folder / _REQUEST).read_bytes())
    return {}


def _time(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _last(path: Path) -> dict[str, Any] | None:
    """The last whole event of a file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 8192))
        for line in reversed(file.read().split(b"\n")[:-1]):
            if (event := _event(line)) is not None:
                return event
    return None


def _event(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None where it is the half of a line of a process that was killed."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
