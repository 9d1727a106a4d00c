"""A classifier, the defences in front of it and a calibrated detector as one object that accepts or rejects images."""

import csv
import hashlib
import io
import os
import shutil
import threading
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from rempart import detectors as detect
from rempart.attacks.recognition import look, recognised
from rempart.core import given
from rempart.core.disk import refuse_folder, replace, unread
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.core.model import Classifier, frozen, placed
from rempart.core.repro import seeded
from rempart.core.threat import rounding
from rempart.core.types import Images, Labels, Logits, Mask, Scores
from rempart.data import Data, files, open_data
from rempart.data.samples import in_memory
from rempart.detectors import Fitted
from rempart.detectors.fitted import CARD
from rempart.models.formats import PYTHON
from rempart.models.formats.hugging_face import PARTS, is_hugging_face
from rempart.models.formats.named import is_timm
from rempart.models.load import load
from rempart.models.save import CONFIG, WEIGHTS
from rempart.preprocess import defended, described
from rempart.report.schema import AS_IT_IS, DefenceChoice, Reading, Strict, fault

GUARD = "guard.json"
_File = Literal[
    "model/config.json",
    "model/weights.safetensors",
    "model/model.safetensors",
    "model/preprocessor_config.json",
    "model.pt2",
    "model.onnx",
    "model.keras",
    "model.h5",
    "model.hdf5",
    "detector/detector.json",
    "detector/detector.safetensors",
    "namer/detector.json",
    "namer/detector.safetensors",
]


class Card(Strict):
    """What `guard.json` holds.

    Attributes:
        format_version: Version of this file.
        code: The function that builds the network, `python:package.module:factory`, where code other than Rempart's
            does; it is run only when the caller names it too.
        reading: How the network is read.
        defences: Preprocessing in front of the network, the first nearest to the image.
        files: SHA-256 of the other files of the folder.
    """

    format_version: Literal[1] = 1
    code: str | None = None
    reading: Reading = AS_IT_IS
    defences: tuple[DefenceChoice, ...] = ()
    files: dict[_File, str]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Prediction:
    """What a guard says of images; tensors on the CPU, one entry per image.

    Attributes:
        labels: Predicted classes, int64, shape (n).
        names: Their names.
        confidence: Softmax of the predicted class, in [0, 1]; it says nothing of attacks.
        softmax: Of every class, shape (n, classes).
        accepted: Whether the image passes, shape (n).
        scores: How suspicious it is; larger = more.
        threshold: An image is rejected above it.
        attacks: For rejected images, what the naming detector takes them for: an attack, or `clean`; otherwise None.
        probabilities: How likely that is to the naming detector; None where `attacks` is.
    """

    labels: Labels
    names: tuple[str, ...]
    confidence: Tensor
    softmax: Tensor
    accepted: Mask
    scores: Scores
    threshold: float
    attacks: tuple[str | None, ...]
    probabilities: tuple[float | None, ...]

    def __repr__(self) -> str:
        n = len(self.accepted)
        return f"Prediction(images={n}, rejected={n - int(self.accepted.sum())}, threshold={self.threshold:.4g})"

    @property
    def verdicts(self) -> tuple[Literal["accepted", "rejected"], ...]:
        """The same as `accepted` in words."""
        return tuple("accepted" if passed else "rejected" for passed in self.accepted.tolist())


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Guarded:
    """A classifier that tells which images it takes no responsibility for; made by `guard` or `load_guard`.

    Attributes:
        classifier: With its preprocessing defences inside.
        detector: Calibrated, and fitted on that classifier.
        namer: A detector that names the attack, asked about rejected images alone.
        source: Where the network came from, as `models.load` takes it.
        reading: How it is read there.
        defences: The preprocessing that is inside.
        turn: Held by the thread whose images are judged: detectors read the layers of the one network all share.
    """

    classifier: Classifier
    detector: Fitted
    namer: Fitted | None = None
    source: str
    reading: Reading = AS_IT_IS
    defences: tuple[DefenceChoice, ...] = ()
    turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __repr__(self) -> str:
        names = [choice.name for choice in self.defences]
        namer = "" if self.namer is None else f", namer={self.namer.card.detector!r}"
        seen = f"shape={self.classifier.shape}, classes={self.classifier.num_classes}"
        return f"Guarded({self.source!r}, {seen}, defences={names}, detector={self.detector.card.detector!r}{namer})"

    def predict(self, images: "Tensor | np.ndarray[Any, Any]") -> Prediction:
        """Classify images, and reject those the detector flags.

        The detector and the prediction share a forward pass: the logits are those of the first pass in which the
        detector shows the model the image itself, and of a pass of their own where it does not. What is said of an
        image depends on its pixels, not on its batch mates; random defences draw anew at each call. An image whose
        score or confidence is no number is rejected. Calls from several threads take turns.

        Args:
            images: One image (*shape) or a batch (n, *shape): floating point in the box of the model, or uint8, where
                0 to 255 spans the box.

        Raises:
            DataError: If they have another shape or type, leave the box, or are not finite.
        """
        x = self._checked(images)
        index = _numbers(x)
        x = placed(self.classifier, x)
        with self.turn, torch.no_grad():
            with _heard(self.classifier, x) as passes:
                scores = self.detector.score(x, index)
                if not passes:
                    with frozen(self.classifier):
                        self.classifier(x)
            softmax = passes[0].double().softmax(1)
            confidence, labels = softmax.max(1)
            rejected = self.detector.flags(scores) | ~confidence.isfinite()
            attacks, probabilities = self._named(x, index, rejected)
        assert self.detector.card.threshold is not None  # `flags` raises without one
        return Prediction(
            labels=labels.cpu(),
            names=tuple(self.classifier.class_names[label] for label in labels.tolist()),
            confidence=confidence.cpu(),
            softmax=softmax.cpu(),
            accepted=~rejected.cpu(),
            scores=scores.cpu(),
            threshold=self.detector.card.threshold.value,
            attacks=attacks,
            probabilities=probabilities,
        )

    def _named(self, x: Images, index: Tensor, at: Mask) -> tuple[tuple[str | None, ...], tuple[float | None, ...]]:
        found: list[tuple[str | None, float | None]] = [(None, None)] * len(x)
        if self.namer is not None and bool(at.any()):
            likely, kinds = self.namer.named(x[at], index[at.cpu()]).max(1)
            rows = zip(at.nonzero()[:, 0].tolist(), kinds.tolist(), likely.tolist(), strict=True)
            for row, kind, probability in rows:
                found[row] = (self.namer.kinds[kind], probability)
        return tuple(name for name, _ in found), tuple(probability for _, probability in found)

    def _checked(self, images: "Tensor | np.ndarray[Any, Any]") -> Images:
        """A batch of float32 images in the box."""
        x = given.tensor(images, "images")
        shape, low, high = self.classifier.shape, self.classifier.low, self.classifier.high
        came, x = tuple(x.shape), x[None] if x.ndim == len(shape) else x
        if tuple(x.shape[1:]) != shape:
            raise DataError(
                f"an image of shape {shape}, or a batch of them",
                got=came,
                hint=given.channels_first(came, shape) or "resize images as those of the training were",
            )
        if not len(x):
            raise DataError("one image or more", got=f"an empty batch, {came}")
        if x.dtype == torch.uint8:
            return files.unit(x) * (high - low) + low
        if not x.is_floating_point():
            raise DataError("uint8, or floating-point pixels", got=x.dtype)
        x = x.float()
        if not bool(x.isfinite().all()):
            raise DataError("finite pixels", got="NaN or infinity")
        least, most = x.aminmax()
        slack = rounding(low, high)
        if least < low - slack or most > high + slack:
            hint = "give bytes as uint8" if most > 1.5 else ""
            raise DataError(f"pixels in [{low:g}, {high:g}]", got=f"[{least:g}, {most:g}]", hint=hint)
        return x


def guard(
    model: str,
    defences: Sequence[DefenceChoice],
    detector: str | Path,
    namer: str | Path | None = None,
    reading: Reading = AS_IT_IS,
) -> Guarded:
    """Put a classifier behind defences and under a detector.

    Args:
        model: As `models.load` takes it.
        defences: Preprocessing in front of it, the first nearest to the image.
        detector: Folder of a calibrated detector that was fitted on the model behind those defences.
        namer: Folder of a detector that names attacks, such as `attack-type`, fitted on the same.
        reading: How to read the model.

    Raises:
        SpecError: If a defence is unknown or an option wrong.
        ModelError: If a file is missing or damaged, or a detector was fitted on another model or other defences.
        DataError: If the detector is not calibrated, or `namer` names no attacks.
    """
    chain = [(choice.name, choice.options) for choice in defences]
    described(chain)  # a wrong option is told before the model is loaded
    classifier = defended(load(model, reading), chain)
    _refuse_undeclared(classifier)
    judge = detect.load(Path(detector), classifier)
    if judge.card.threshold is None:
        hint = "`rempart detect evaluate` writes calibrated ones"
        raise DataError("a calibrated detector", got=f"{detector}, without threshold", hint=hint)
    naming = None if namer is None else detect.load(Path(namer), classifier)
    if naming is not None and not naming.kinds:
        raise DataError("a detector that names attacks", got=naming.card.detector, hint="take attack-type")
    return Guarded(
        classifier=classifier, detector=judge, namer=naming, source=model, reading=reading, defences=tuple(defences)
    )


def save_guard(guarded: Guarded, folder: str | Path) -> None:
    """Write a guard as a folder that needs no other file of the model or the detectors.

    The files are gathered under another name, read back, and then named `folder`: it is there whole or not at all. Of a
    `python:` model the weights beside it are copied, the code is not.

    Raises:
        SpecError: If there is something under that name already, or it cannot be written.
        ModelError: If the model is gone, or is another one by now.
    """
    folder = Path(folder)
    if folder.exists():
        raise SpecError("a new folder", got=f"{folder}, which exists", hint="choose another --out")
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        code = _gathered(guarded, part)
        digests = {path.relative_to(part).as_posix(): _sha256(path) for path in sorted(part.rglob("*.*"))}
        card = Card.model_validate(
            {"code": code, "reading": guarded.reading, "defences": guarded.defences, "files": digests}
        )
        replace(part / GUARD, (card.model_dump_json(indent=1) + "\n").encode())
        load_guard(part, model=code)
        part.rename(folder)
    except OSError as error:
        came = f"{folder} ({error.strerror})"
        raise SpecError("a folder that files can be written to", got=came, hint="choose another --out") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_guard(folder: str | Path, *, model: str | None = None) -> Guarded:
    """Take up a guard that `save_guard` wrote; every file is checked against its digest before it is read.

    Digests show damage, not forgery: who can write the folder can write both. A folder with `model.pt2` is as
    trustworthy as that file (see `models.load`); otherwise nothing in it is executed.

    Args:
        folder: What `save_guard` wrote.
        model: `python:package.module:factory`, where the guard's network is built by such code: it is run because you
            say so, not because the folder does.

    Raises:
        ModelError: If a file is missing or damaged, or the network needs code that `model` does not name.
    """
    folder = Path(folder)
    try:
        card = Card.model_validate_json((folder / GUARD).read_bytes())
    except OSError as error:
        raise ModelError(f"a folder with {GUARD}", got=unread(error)) from None
    except ValidationError as error:
        came = f"{folder}, damaged ({fault(error)})"
        raise ModelError("a guard that `rempart guard make` wrote", got=came, hint="make it again") from None
    if model != card.code:
        if card.code is None:
            raise ModelError("no model beside a guard that holds its own", got=model)
        expected, hint = "a guard whose network needs no code but Rempart's", f"where you trust it, name {card.code}"
        raise ModelError(expected, got=f"{folder}, whose network {card.code} builds", hint=hint)
    for name, digest in card.files.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise ModelError(f"{name} in {folder}", got=unread(error)) from None
        if found != digest:
            raise ModelError(f"the {name} that {GUARD} names", got=f"another one in {folder}", hint="make it again")
    namer = folder / "namer" if f"namer/{CARD}" in card.files else None
    return guard(_source(card, folder), card.defences, folder / "detector", namer, card.reading)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many images a guard accepted and rejected, and of how many the class was right; None without true classes."""

    accepted: int
    rejected: int
    right_accepted: int | None = None
    right_rejected: int | None = None


def predict_data(
    folder: Path,
    out: Path,
    *,
    data: str | None = None,
    images: Sequence[Path] = (),
    model: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
) -> Tally:
    """Write a CSV of what a guard says of a data set, with its true classes, or of image files, and count.

    Raises:
        SpecError: If both or none of `data` and `images` are given, or an image does not fit the model.
    """
    if (data is None) == (not images):
        raise SpecError("image files or --data", got="both" if images else "neither")
    refuse_folder(out)
    guarded = load_guard(folder, model=model)
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    columns = ("image", "class", "name", "confidence", "verdict", "score", "threshold", "attack", "probability")
    table.writerow((*columns, "label") if data is not None else columns)
    counts: Counter[tuple[bool, bool]] = Counter()
    if data is None:
        source = _read(guarded, images[:limit])
    else:
        source = _batches(open_data(data).head(limit).seen_by(guarded.classifier), batch_size)
    for keys, x, true in source:
        said = guarded.predict(x)
        right = [False] * len(x) if true is None else (said.labels == true).tolist()
        counts.update(zip(said.accepted.tolist(), right, strict=True))
        judged = (said.labels.tolist(), said.names, said.confidence.tolist(), said.verdicts, said.scores.tolist())
        named = (said.attacks, said.probabilities)
        rest = (*named,) if true is None else (*named, true.tolist())
        table.writerows(zip(keys, *judged, [said.threshold] * len(x), *rest, strict=True))
    replace(out, lines.getvalue().encode())
    right = (None, None) if data is None else (counts[True, True], counts[False, True])
    return Tally(counts[True, True] + counts[True, False], counts[False, True] + counts[False, False], *right)


_Keyed = tuple[list[int] | list[Path], Images, Labels | None]


def _batches(data: Data, size: int) -> Iterator[_Keyed]:
    for batch in data.batches(size):
        yield batch.index.tolist(), batch.x, batch.y


def _read(guarded: Guarded, images: Sequence[Path]) -> Iterator[_Keyed]:
    """Image files one by one, grey or colour as the model takes them."""
    shape, low, high = guarded.classifier.shape, guarded.classifier.low, guarded.classifier.high
    for path in images:
        yield [path], files.read_image(path, shape) * (high - low) + low, None


def _refuse_undeclared(classifier: Classifier) -> None:
    """An audit finds out what a network returns that does not say so; what says so is needed here."""
    if classifier.output is not None:
        return
    x = torch.rand((8, *classifier.shape), generator=torch.Generator().manual_seed(0))
    x = x * (classifier.high - classifier.low) + classifier.low
    noise = in_memory("noise", x, torch.zeros(8, dtype=torch.int64), classifier.class_names)
    with frozen(classifier), seeded(0, torch.device("cpu")):
        read, _ = recognised(classifier, placed(classifier, x), look(classifier, noise))
    if read is not classifier:
        hint = "state it: --outputs probabilities, or output='probabilities' or 'sigmoids' where a python: function "
        hint += "returns a Classifier"
        raise ModelError("logits, or a model that says what it returns", got=read.output, hint=hint)


@contextmanager
def _heard(model: Classifier, x: Images) -> Generator[list[Logits]]:
    """The logits of the passes in which the model is shown these very images."""
    passes: list[Logits] = []

    def hook(_: Any, inputs: tuple[Any, ...], z: Logits) -> None:
        if inputs[0] is x:
            passes.append(z.detach())

    handle = model.register_forward_hook(hook)
    try:
        yield passes
    finally:
        handle.remove()


def _numbers(x: Images) -> Tensor:
    """Sample numbers that depend on the pixels alone: the key of the random numbers a detector may draw."""
    return torch.tensor([zlib.crc32(image.contiguous().numpy().tobytes()) for image in x.cpu()])


def _gathered(guarded: Guarded, part: Path) -> str | None:
    """Copy the model and write the detectors; return the code the network needs."""
    detect.save(guarded.detector, part / "detector")
    if guarded.namer is not None:
        detect.save(guarded.namer, part / "namer")
    code, _, weights = guarded.source.partition("@") if guarded.source.startswith(PYTHON) else ("", "", guarded.source)
    if weights and Path(weights).is_dir():
        folder = Path(weights)
        for name in PARTS[:2] if is_timm(folder) else PARTS if is_hugging_face(folder) else (CONFIG, WEIGHTS):
            _copy(Path(weights) / name, part / "model" / name)
    elif weights:
        _copy(Path(weights), part / f"model{Path(weights).suffix.lower()}")
    return code or None


def _copy(source: Path, to: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise ModelError("the model where it was", got=unread(error)) from None
    replace(to, content)


def _source(card: Card, folder: Path) -> str:
    """The model in a folder, as `models.load` takes it."""
    own = folder / next((name for name in card.files if name.startswith("model.")), "model")
    if card.code is None:
        return str(own)
    return f"{card.code}@{own}" if f"model/{CONFIG}" in card.files else card.code


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
