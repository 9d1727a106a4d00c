"""Requests meant to do harm: none opens a file of the machine, writes outside the data directory, or runs anything.

After each, everything around the data directory is as it was, and the service answers.
"""

import base64
import io
import json
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask.sessions import SecureCookieSessionInterface
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from bringing import model_zip, picture, zipped
from rempart.serve import api
from rempart.serve.app import create_app
from rempart.serve.auth import Tokens
from rempart.serve.settings import Settings

AT, BYTES = "/api/v1", "application/octet-stream"
SECRET = "the content of a file beside the data directory"


class Target:
    """A deployment, what lies around it, and a model in it."""

    def __init__(self, around: Path) -> None:
        self.around, self.folder = around, around / "data"
        (around / "secret.txt").write_text(SECRET)
        (around / "recipe.toml").write_text('summary = "mine"\n')
        self.client: FlaskClient = create_app(Settings(folder=self.folder, upload=2**22)).test_client()
        answer = self.upload("models", "net.zip", model_zip(around / "made"))
        assert answer.status_code == 201, answer.text
        self.model: str = answer.json["id"]
        self.before = self.outside()

    def upload(self, kind: str, name: str, content: bytes) -> TestResponse:
        query = {"name": name}
        return self.client.post(f"{AT}/{kind}", query_string=query, data=content, content_type=BYTES)

    def post(self, path: str, **body: object) -> TestResponse:
        return self.client.post(AT + path, json=body)

    def outside(self) -> dict[str, bytes]:
        found = (path for path in self.around.rglob("*") if path.is_file() and self.folder not in path.parents)
        return {str(path): path.read_bytes() for path in found}

    def refused(self, answer: TestResponse) -> None:
        assert 400 <= answer.status_code < 500, answer.text
        self.unharmed(answer)

    def unharmed(self, answer: TestResponse) -> None:
        text = answer.get_data()
        for told in (SECRET.encode(), str(self.around).encode(), b"Traceback", b"root:x:0"):
            assert told not in text
        assert self.outside() == self.before
        assert not list((self.folder / "incoming").iterdir())
        assert self.client.get(f"{AT}/health").status_code == 200


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    found = Target(tmp_path_factory.mktemp("around"))
    yield found
    found.client.application.extensions["rempart"].jobs.table.destroy()


# ---- paths

PLACES = (
    "../secret.txt",
    "../../../../etc/passwd",
    "/etc/passwd",
    "python:os:getcwd",
    "file:///etc/passwd",
    "http://x/y",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("field", ["model", "data", "patients", "costs", "out", "device", "reading"])
def test_no_field_of_an_audit_names_a_file(target: Target, field: str, place: str) -> None:
    body = {"kind": "audit", "model": target.model, "data": "digits", "threat": "linf:0.1", field: place}
    target.refused(target.post("/jobs", **body))


@pytest.mark.parametrize("place", [*PLACES, "../recipe.toml"])
@pytest.mark.parametrize("field", ["start", "model", "recipe", "data", "out"])
def test_no_field_of_a_training_names_a_file(target: Target, field: str, place: str) -> None:
    target.refused(target.post("/jobs", **{"kind": "train", "data": "digits", field: place}))


@pytest.mark.parametrize("place", PLACES)
def test_no_option_names_a_file(target: Target, place: str) -> None:
    body = {"kind": "train", "data": "digits", "recipe": "sns", "options": {"neurons": place}}
    target.refused(target.post("/jobs", **body))


@pytest.mark.parametrize(
    "data", ["digits@mask=/etc", "digits@mask=../made", "digits:../x", "digits/../x", "mnist:/etc", "cifar10:../x"]
)
def test_nothing_behind_an_id_of_data_names_a_file(target: Target, data: str) -> None:
    target.refused(target.post("/jobs", kind="audit", model=target.model, data=data, threat="linf:0.1"))
    body = {"model": target.model, "data": data, "number": 0, "threat": "linf:0.1", "attack": {"name": "fgsm"}}
    target.refused(target.post("/try", **body))


@pytest.mark.parametrize(
    "path",
    [
        "/models/..%2f..%2fsecret.txt",
        "/models/%2e%2e",
        "/data/..%2f..%2f..%2fetc/images",
        "/data/....//....//etc",
        "/jobs/..%2f..%2fsecret.txt/report",
        "/guards/%2fetc%2fpasswd",
        "/docs/..%2f..%2fapp.py",
        "/docs/../../api.py",
    ],
)
def test_no_address_names_a_file(target: Target, path: str) -> None:
    target.refused(target.client.get(AT + path, buffered=True))
    target.refused(target.client.delete(AT + path))


@pytest.mark.parametrize(
    "name", ["../spec.json", "..%2fspec.json", "%2e%2e/request.json", "/etc/passwd", "../../../secret"]
)
def test_files_of_a_job_are_those_it_wrote(target: Target, name: str) -> None:
    made = target.post("/jobs", kind="train", data="digits").json["id"]
    (target.folder / "jobs" / made / "run").mkdir(exist_ok=True)
    target.refused(target.client.get(f"{AT}/jobs/{made}/files/{name}", buffered=True, follow_redirects=True))


def test_a_link_in_the_folder_of_a_job_is_not_followed(target: Target) -> None:
    made = target.post("/jobs", kind="train", data="digits").json["id"]
    run = target.folder / "jobs" / made / "run"
    run.mkdir(exist_ok=True)
    (run / "out.txt").symlink_to(target.around / "secret.txt")
    (run / "out").symlink_to(target.around)
    for name in ("out.txt", "out/secret.txt"):
        target.refused(target.client.get(f"{AT}/jobs/{made}/files/{name}", buffered=True))
    assert target.client.get(f"{AT}/jobs/{made}/files").json == {"files": []}


@pytest.mark.parametrize(
    "name", ["../../../evil.zip", "/evil.zip", "..\\..\\evil.zip", "a/../../b.zip", ".zip", "\0.zip"]
)
def test_the_name_of_an_upload_is_no_path(target: Target, name: str) -> None:
    answer = target.upload("data", name, b"PK no archive")
    target.refused(answer)
    assert not Path("/evil.zip").exists()


# ---- archives and images


def test_an_archive_that_leads_out_is_refused(target: Target) -> None:
    target.refused(target.upload("data", "a.zip", zipped({"cat/1.png": picture(1), "../../evil.png": picture(2)})))
    target.refused(target.upload("models", "a.zip", zipped({"../config.json": b"{}", "../weights.safetensors": b""})))


def test_an_archive_with_a_link_is_refused(target: Target) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        link = zipfile.ZipInfo("config.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "../../../secret.txt")
        archive.writestr("weights.safetensors", b"")
    target.refused(target.upload("models", "a.zip", stream.getvalue()))


def test_an_archive_that_grows_is_refused(target: Target) -> None:
    """4 MiB of zeros a file would fill the disk a thousandfold."""
    started = time.monotonic()
    zeros = {f"cat/{n}.bmp": bytes(2**22) for n in range(60)}
    target.refused(target.upload("data", "a.zip", zipped(zeros)))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights.safetensors", bytes(2**28))
        archive.writestr("config.json", b"{}")
    target.refused(target.upload("models", "a.zip", stream.getvalue()))
    assert time.monotonic() - started < 60


def bomb(side: int) -> bytes:
    """A PNG that says it is `side` times `side` pixels, of zeros."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(2**16))) + chunk(b"IEND", b"")
    )


def test_an_image_that_grows_is_refused(target: Target) -> None:
    image = base64.b64encode(bomb(60_000)).decode()
    target.refused(target.post(f"/models/{target.model}/predict", images=[image]))
    asked = {"model": target.model, "image": image, "threat": "linf:0.1", "attack": {"name": "fgsm"}}
    target.refused(target.post("/try", **asked))
    target.refused(target.upload("data", "a.zip", zipped({"cat/1.png": bomb(60_000), "dog/1.png": bomb(60_000)})))


class Evil:
    """Runs when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.proof, "ran"))


@pytest.mark.parametrize("name", ["net.keras", "net.h5", "net.onnx", "net.zip"])
def test_a_pickle_in_disguise_does_not_run(target: Target, name: str) -> None:
    proof = target.around / "proof"
    content = pickle.dumps(Evil(proof))
    target.refused(target.upload("models", name, content))
    target.refused(target.upload("models", name, zipped({"archive/data.pkl": content, "archive/version": b"3"})))
    assert not proof.exists()


def test_a_table_of_pickles_does_not_run(target: Target) -> None:
    import numpy as np

    proof, stream = target.around / "proof", io.BytesIO()
    np.savez(stream, test_images=np.array([Evil(proof)], dtype=object), test_labels=np.zeros(1))
    target.refused(target.upload("data", "a.npz", stream.getvalue()))
    assert not proof.exists()


@pytest.mark.parametrize(
    "content", [b"GIF89a/*", b"<html><script>alert(1)</script>", b"%PDF-1.4", b"\x7fELF", b"PK\x05\x06"]
)
def test_a_file_of_two_kinds_is_shown_as_none(target: Target, content: bytes) -> None:
    """An archive behind other bytes is an archive to some and a page to others."""
    target.refused(target.upload("models", "a.zip", content + zipped({"config.json": b"{}", "evil.html": b"<script>"})))
    image = base64.b64encode(content + picture(1)).decode()
    target.refused(target.post(f"/models/{target.model}/predict", images=[image]))


# ---- bodies


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"kind":' * 100_000,
        b'{"kind": "audit", "model": "' + b"a" * 2**20 + b'"}',
        b'{"kind": "certify", "model": "0000000000000000", "data": "digits", "sigma": 1e999}',
        b'{"kind": "certify", "model": "0000000000000000", "data": "digits", "sigma": NaN}',
        b'{"kind": "audit", "seed": ' + b"9" * 100_000 + b"}",
        b'{"kind": "audit", "kind": "train"}',
        b"\xff\xfe\x00",
        b'{"kind": {"$ne": 1}}',
    ],
)
def test_odd_json_is_refused(target: Target, body: bytes) -> None:
    target.refused(target.client.post(f"{AT}/jobs", data=body, content_type="application/json"))


def test_large_json_is_refused_unread(target: Target) -> None:
    answer = target.client.post(f"{AT}/jobs", data=b" " * (64 * 2**20 + 1), content_type="application/json")
    assert answer.status_code == 413
    target.refused(answer)


def test_too_many_parts_are_refused(target: Target) -> None:
    files = {"images": [(io.BytesIO(b"x"), f"{n}.png") for n in range(300)]}
    target.refused(target.client.post(f"{AT}/models/{target.model}/predict", data=files))


def test_work_without_end_is_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_TRY", 1.0)
    asked = {"model": target.model, "image": base64.b64encode(picture(1)).decode(), "threat": "linf:0.1"}
    target.refused(target.post("/try", **asked, attack={"name": "pgd", "options": {"steps": 10**9}}))
    for steps in (10**9, str(10**9)):
        endless = [{"name": "tv", "options": {"steps": steps}}]
        target.refused(target.post("/try", **asked, attack={"name": "fgsm"}, defences=endless))
    overflow = [{"name": "pixel-deflection", "options": {"window": 10**30}}]
    target.refused(target.post("/try", **asked, attack={"name": "fgsm"}, defences=overflow))
    started = time.monotonic()
    slow = {"name": "pgd", "options": {"steps": 100_000, "restarts": 1000}}
    target.refused(target.post("/try", **asked, attack=slow))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("header", ["bytes=" + "0-," * 5000 + "0-", "bytes=-99999999999999999999", "bytes=5-2"])
def test_odd_ranges_do_no_harm(target: Target, header: str) -> None:
    made = target.post("/jobs", kind="train", data="digits").json["id"]
    (target.folder / "jobs" / made / "run").mkdir(exist_ok=True)
    (target.folder / "jobs" / made / "run" / "a.txt").write_bytes(b"0123456789")
    answer = target.client.get(f"{AT}/jobs/{made}/files/a.txt", headers={"Range": header}, buffered=True)
    assert answer.status_code in (200, 206, 416) and len(answer.data) <= 1000
    target.unharmed(answer)


@pytest.mark.parametrize("at", ["-1", "1e3", "99999999999999999", "0; drop table", "\u0661"])
def test_an_odd_place_in_events_is_the_beginning_or_the_end(target: Target, at: str) -> None:
    made = target.post("/jobs", kind="train", data="digits").json["id"]
    target.post(f"/jobs/{made}/cancel")
    headers = {"Last-Event-ID": at.encode().decode("latin-1")}
    answer = target.client.get(f"{AT}/jobs/{made}/events", headers=headers)
    assert answer.status_code == 200 and '"cancelled"' in answer.text
    target.unharmed(answer)


# ---- who asks


def test_forged_tokens_and_cookies_are_worth_nothing(tmp_path: Path) -> None:
    Tokens.of(tmp_path).add("admin", "admin")
    app = create_app(Settings(folder=tmp_path, tokens=True))
    digest = Tokens.of(tmp_path).all()[0].digest
    signer = SecureCookieSessionInterface().get_signing_serializer(app)
    assert signer is not None
    good = signer.dumps({"token": digest})
    own = type(signer)("another key", salt="cookie-session").dumps({"token": digest})
    plain = base64.urlsafe_b64encode(json.dumps({"token": digest}).encode()).decode()
    for cookie in (
        own,
        plain,
        good[:-2] + ("A" if good[-2] != "A" else "B") + good[-1],  # two bits of the last letter mean nothing
        "",
        "x.y.z",
        signer.dumps({"token": "0" * 64}),
    ):
        client = app.test_client()
        client.set_cookie("rempart", cookie)
        assert client.get(f"{AT}/jobs").status_code == 401, cookie
    for header in (f"Bearer {digest}", "Bearer null", "Bearer ' OR 1=1", "bearer", "Bearer " + "a" * 10_000):
        assert app.test_client().get(f"{AT}/jobs", headers={"Authorization": header}).status_code == 401, header
    client = app.test_client()
    client.set_cookie("rempart", good)
    assert client.get(f"{AT}/jobs").status_code == 200, "the true cookie is what this test says it is"
    app.extensions["rempart"].jobs.table.destroy()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_forms_of_other_sites_do_nothing(target: Target, kind: str) -> None:
    """What a page may send to another site without asking it first."""
    jobs = len(target.client.get(f"{AT}/jobs?limit=200").json["jobs"])
    headers = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    body = json.dumps({"kind": "train", "data": "digits"})
    target.refused(target.client.post(f"{AT}/jobs", data=body, content_type=kind, headers=headers))
    target.refused(target.client.post(f"{AT}/jobs", data=body, content_type=kind))
    assert len(target.client.get(f"{AT}/jobs?limit=200").json["jobs"]) == jobs


@pytest.mark.parametrize("origin", ["http://[", "null", "http://localhost.evil.example", "localhost", ""])
def test_an_odd_origin_is_another_one(target: Target, origin: str) -> None:
    body = {"kind": "train", "data": "digits"}
    answer = target.client.post(f"{AT}/jobs", json=body, headers={"Origin": origin})
    assert answer.status_code == 403
    target.refused(answer)


@pytest.mark.parametrize("number", [2**63 - 1, 2**63, 10**30])
def test_no_number_of_an_image_is_too_large(target: Target, number: int) -> None:
    answer = target.client.get(f"{AT}/data/digits/images/{number}.png")
    assert answer.status_code == 404
    target.refused(answer)


def test_methods_that_clients_make_up_take_no_memory(target: Target) -> None:
    """Each would be a line of the metrics, kept for good."""
    for number in range(3):
        target.refused(target.client.open(f"{AT}/jobs", method=f"MADEUP{number}"))
    told = target.client.get("/metrics").text
    assert "MADEUP" not in told and 'method="other"' in told


@pytest.mark.parametrize("key", ["", "x" * 201, "../../x", "a/b", "' OR 1=1 --"])
def test_an_odd_key_is_a_key_or_refused(target: Target, key: str) -> None:
    headers = {"Idempotency-Key": key}
    answer = target.client.post(f"{AT}/jobs", json={"kind": "train", "data": "digits"}, headers=headers)
    assert answer.status_code == (422 if len(key) in (0, 201) else 202)
    target.unharmed(answer)


def test_names_of_files_and_classes_stay_text(target: Target) -> None:
    script = "<script>alert(1)</script>"
    content = zipped({f"{script[:8]}{n}/{i}.png": picture(i) for n in range(2) for i in range(3)})
    made = target.upload("data", f"{script}.zip", content)
    assert made.status_code == 201
    target.unharmed(made)
    place = target.folder / "data" / made.json["id"]
    assert {path.name for path in place.iterdir()} == {"card.json", f"{made.json['file']}"}
    assert set(made.json["file"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert target.client.get(f"{AT}/data").mimetype == "application/json"
