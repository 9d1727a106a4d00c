"""Jobs as the web process sees them: put into the table, listed, cancelled; their files read."""

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from dbos import DBOS, DBOSClient
from dbos._serialization import DBOSPortableJSON

from rempart.core.disk import replace
from rempart.core.errors import SpecError
from rempart.report.schema import AnySpec, Strict
from rempart.serve.child import EVENTS, RUN, SPEC
from rempart.serve.settings import Settings
from rempart.serve.store import Missing

JSON = DBOSPortableJSON
QUEUE, VERSION = "jobs", "1"
Kind = Literal["audit", "attack", "train", "certify", "detect", "explain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What a job may do; in the table it goes by this name."""
State = Literal["queued", "running", "done", "failed", "cancelled", "dead"]
STATES: dict[str, State] = {"ENQUEUED": "queued", "DELAYED": "queued", "PENDING": "running", "CANCELLED": "cancelled"}
_ID = re.compile(r"[0-9a-f]{32}")
_REQUEST = "request.json"


class Job(Strict):
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
        try:
            DBOS.migrate(settings.url)
            table = DBOSClient(system_database_url=settings.url, serializer=JSON, application_name="rempart")
        except Exception as error:  # noqa: BLE001  DBOS and drivers raise what they like
            came = f"{settings.url.rpartition('@')[2]}: {error}"
            raise SpecError("a database that can be reached", got=came, hint="look at --database") from None
        return Jobs(settings, table)

    def submit(self, request: dict[str, Any], spec: AnySpec, *, user: str, key: str | None) -> tuple[Job, bool]:
        """Put a job into the queue.

        Args:
            request: As the client sent it, to be shown.
            spec: The same with places in the store; its `out` is set here.
            user: Who asks.
            key: Idempotency key: of two requests with the same, the second gets the job of the first.

        Returns:
            The job, and whether it is a new one.

        Raises:
            SpecError: If the key was used for another request.
        """
        id = uuid.uuid4().hex if key is None else uuid.uuid5(uuid.NAMESPACE_URL, f"{user}\n{key}").hex
        folder = self.settings.folder / "jobs" / id
        if (folder / _REQUEST).exists():
            if json.loads((folder / _REQUEST).read_bytes())["request"] != request:
                raise SpecError("the request that this Idempotency-Key came with before", got="another one")
            if self._status(id) is not None:
                return self.find(id), False
        out = f"jobs/{id}/{RUN}" + ("/adversarial.npz" if spec.kind == "attack" else "")
        replace(folder / SPEC, spec.model_copy(update={"out": out}).model_dump_json(indent=1).encode())
        replace(folder / _REQUEST, json.dumps({"request": request, "user": user}).encode())
        self.table.enqueue(
            {
                "workflow_name": spec.kind,
                "queue_name": QUEUE,
                "workflow_id": id,
                "app_version": VERSION,
            },
            id,
        )
        return self.find(id), True

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
        names: list[str] = [*KINDS] if kind is None else [kind]
        found = self.table.list_workflows(name=names, limit=limit, offset=offset, sort_desc=True, load_input=False)
        return [self._job(status) for status in found]

    def counts(self) -> dict[str, int]:
        """How many jobs are queued and running."""
        found = self.table.list_workflows(
            name=list(KINDS), status=["ENQUEUED", "PENDING"], load_input=False, load_output=False
        )
        states = [STATES[status.status] for status in found]
        return {state: states.count(state) for state in ("queued", "running")}

    def cancel(self, id: str) -> Job:
        """Cancel a job; one that ended stays as it is. Its process is gone within two seconds."""
        if self.find(id).state in ("queued", "running"):
            self.table.cancel_workflow(id)
        return self.find(id)

    def cancelled(self, id: str) -> bool:
        """Whether a job was cancelled."""
        status = self._status(id)
        return status is None or status.status == "CANCELLED"

    def remove(self, id: str) -> None:
        """Delete a job that ended, with its files.

        Raises:
            Missing: If there is none under that id.
            SpecError: If it did not end yet.
        """
        if (state := self.find(id).state) in ("queued", "running"):
            raise SpecError("a job that ended", got=f"one that is {state}", hint="cancel it first")
        self.table.delete_workflow(id)
        shutil.rmtree(self.settings.folder / "jobs" / id, ignore_errors=True)

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
        try:
            with path.open("rb") as file:
                file.seek(at)
                for line in file:
                    if not line.endswith(b"\n"):
                        return  # half a line: the rest is being written
                    at += len(line)
                    yield at, json.loads(line)
        except FileNotFoundError:
            return

    def _status(self, id: str) -> Any:
        found = self.table.list_workflows(workflow_ids=[id], name=list(KINDS), load_input=False)
        return found[0] if found else None

    def _job(self, status: Any) -> Job:
        folder = self.settings.folder / "jobs" / status.workflow_id
        state = STATES.get(status.status)
        reason = ""
        if status.status == "SUCCESS":
            state, reason = status.output["state"], status.output["reason"]
        elif state is None:
            state, reason = "dead", "its worker died each time"
        try:
            asked: dict[str, Any] = json.loads((folder / _REQUEST).read_bytes())
        except FileNotFoundError:
            asked = {"request": {}, "user": ""}
        return Job(
            id=status.workflow_id,
            kind=status.name,
            state=state,
            reason=reason,
            request=asked["request"],
            user=asked["user"],
            created=_time(status.created_at) or "",
            ended=None if state in ("queued", "running") else _time(status.completed_at or status.updated_at),
            progress=_last(folder / EVENTS),
        )


def _time(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _last(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file of events."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
