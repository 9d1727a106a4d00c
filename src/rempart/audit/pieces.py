"""An audit in pieces: one attack on one chunk of the samples, done once, stored, and taken up again after a stop."""

import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from rempart.attacks import attacks
from rempart.attacks.plan import Planned
from rempart.attacks.run import Outcome, TargetRule, Verdict, attack_data
from rempart.core.disk import replace
from rempart.core.events import Event, Notify
from rempart.core.identity import agree, answers, code_of
from rempart.core.model import Classifier
from rempart.core.repro import digest_state, seeded
from rempart.core.threat import Threat
from rempart.core.types import Images, Mask
from rempart.data import Data
from rempart.report.schema import AuditSpec

_PICTURES = 4
_PROBED = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """What one attack did to one chunk.

    Attributes:
        verdict: On the samples it was given; None where none was left.
        shown: Numbers of up to four samples it broke, of different classes where possible.
        images: Their adversarial images.
    """

    verdict: Verdict | None
    shown: Tensor
    images: Images


Pieces = dict[tuple[int, str], Piece]
"""By number of the chunk and label of the attack."""


def chunks(data: Data, size: int) -> list[Data]:
    """The samples in order, `size` at a time.

    A chunk, not a process, is what is computed as a whole: results agree to the last bit whoever works on it.
    """
    return [data.take(positions) for positions in torch.arange(len(data)).split(size)]


def attack_chunk(
    model: Classifier,
    part: Data,
    number: int,
    planned: Sequence[Planned],
    threat: Threat,
    spec: AuditSpec,
    done: Pieces,
    folder: Path | None,
    notify: Notify,
    *,
    random: bool = False,
) -> None:
    """Run what is not done yet of the planned attacks on one chunk; each piece joins `done` and the folder at once.

    Where the model is `random`, images are judged by mean logits.
    """
    standing = torch.ones(len(part), dtype=torch.bool)
    note = f"{threat}, samples {int(part.index[0])} to {int(part.index[-1])}"
    for at, attack in enumerate(planned):
        given = standing.nonzero()[:, 0] if attack.survivors else torch.arange(len(part))
        if attack.target is not None:
            given = torch.isin(part.labels, torch.tensor(attack.sources)).nonzero()[:, 0]
        if (number, attack.label) not in done:
            told = _annotated(attack.label, note, notify)
            right = attack.survivors and at > 0  # what an attack left standing was right at first
            piece = _attack(model, part.take(given), attack, threat, spec, right, random, told)
            if folder is not None:
                replace(folder / f"{number}-{attack.label}.npz".replace(" ", "_"), pack(number, attack.label, piece))
            done[number, attack.label] = piece
        verdict = done[number, attack.label].verdict
        if verdict is not None:
            standing[given] &= verdict.right


def stored(folder: Path | None) -> Pieces:
    """The pieces an earlier run of the same request left in the folder; a file that cannot be read is done again."""
    found: Pieces = {}
    for file in sorted(folder.glob("*.npz")) if folder is not None else ():
        try:
            found |= unpack(file.read_bytes())
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            continue
    return found


def kept_in(
    folder: Path,
    model: Classifier,
    data: Data,
    planned: Sequence[Planned],
    threat: Threat,
    spec: AuditSpec,
    versions: Mapping[str, str],
) -> Path:
    """The folder for the pieces of an audit: the one whose pieces depend on the very same things, or a new one.

    Its name is a digest of them. What the model answers to some images is kept in the folder and compared within
    rounding, which differs between machines and may depend on the number of threads.
    """
    depends = {
        "planned": [[a.label, a.name, a.options, a.survivors, a.target, a.sources] for a in planned],
        "attacks": [code_of([attacks[a.name].function], installed=True) for a in planned],
        "threat": [str(threat), repr(threat.eps), threat.low, threat.high],
        "spec": spec.model_dump(mode="json", include=_DECIDES),
        "versions": [versions["rempart"], versions["torch"]],
        "model": [digest_state(model.state_dict()), code_of([model]), model.output, model.class_names],
        "data": [data.digest, data.class_names, data.labels.tolist()],
    }
    name = sha256(json.dumps(depends, sort_keys=True, default=repr).encode()).hexdigest()[:16]
    some = data.spread(_PROBED)
    said = list(answers(model, some.batch(torch.arange(len(some))).x))
    for number in itertools.count(1):
        place = folder / (name if number == 1 else f"{name}-{number}")
        known = _known(place / _ANSWERS)
        if known is None:
            place.mkdir(parents=True, exist_ok=True)
            replace(place / _ANSWERS, json.dumps(said).encode())
        if known is None or (said and agree(known, said)):  # without answers nobody can tell
            return place
    raise AssertionError


_ANSWERS = "answers.json"
_DECIDES = {"model", "reading", "data", "defences", "seed", "batch_size", "chunk", "eight_bit", "device"}


def _known(path: Path) -> list[float] | None:
    """The answers kept in a folder of pieces; none that a model gives where they cannot be read."""
    try:
        return [float(value) for value in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return [math.nan]


def _annotated(stage: str, note: str, notify: Notify) -> Notify:
    return lambda event: notify(Event(stage=stage, done=event.done, total=event.total, values=event.values, note=note))


def _attack(
    model: Classifier,
    data: Data,
    attack: Planned,
    threat: Threat,
    spec: AuditSpec,
    right: bool,
    random: bool,
    notify: Notify,
) -> Piece:
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, *data.shape)
    if len(data) == 0:
        return Piece(None, *nothing)
    with seeded(spec.seed * 1_000_003 + int(data.index[0]), next(model.parameters(), torch.zeros(())).device):
        outcome = attack_data(
            model,
            data,
            threat,
            attack.name,
            attack.options,
            batch_size=spec.batch_size,
            target=None if attack.target is None else _aim(attack.target),
            seed=spec.seed,
            eight_bit=spec.eight_bit,
            right=right,
            similarity=True,
            random=random,
            notify=notify,
        )
    return Piece(outcome.verdict, *_pictures(outcome, data.labels))


def _aim(target: int) -> TargetRule:
    return lambda z, y: torch.full_like(y, target)


def _pictures(outcome: Outcome, labels: Tensor) -> tuple[Tensor, Images]:
    at = torch.tensor(varied(outcome.attacked & outcome.success & ~outcome.undefined, labels), dtype=torch.int64)
    return outcome.index[at], outcome.x_adv[at]


def varied(among: Mask, labels: Tensor) -> list[int]:
    """Up to four positions of `among`, of different classes first."""
    positions, seen = among.nonzero()[:, 0].tolist(), set[int]()
    fresh = [at for at in positions if (y := int(labels[at])) not in seen and not seen.add(y)]
    return [*fresh, *(at for at in positions if at not in fresh)][:_PICTURES]


def pack(number: int, label: str, piece: Piece) -> bytes:
    """A piece as the bytes of an .npz file, for a disk or another process; no pickle is in it."""
    arrays: dict[str, Any] = {"number": number, "label": label, "shown": piece.shown, "images": piece.images}
    if piece.verdict is not None:
        columns = {field.name: getattr(piece.verdict, field.name) for field in fields(Verdict)}
        arrays |= {f"verdict/{name}": value for name, value in columns.items() if value is not None}
    stream = io.BytesIO()
    np.savez(stream, **{name: np.asarray(value) for name, value in arrays.items()})  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def unpack(content: bytes) -> Pieces:
    """The piece of `pack`, under its key."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file.files}
    values: dict[str, Any] = {"eight_bit": None, "psnr": None, "ssim": None}
    for name, array in arrays.items():
        if name.startswith("verdict/"):
            values[name.removeprefix("verdict/")] = torch.from_numpy(array) if array.ndim else array.item()
    verdict = Verdict(**values) if "index" in values else None
    shown, images = torch.from_numpy(arrays["shown"]), torch.from_numpy(arrays["images"])
    return {(int(arrays["number"]), str(arrays["label"])): Piece(verdict, shown, images)}
