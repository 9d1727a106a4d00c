"""The HTTP API, against what the same functions and plain numpy say."""

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flask.testing import FlaskClient
from PIL import Image

from bringing import CLASSES, data_zip, model_zip, network, picture, pixels
from rempart.serve.app import create_app
from rempart.serve.errors import Unavailable
from rempart.serve.jobs import Jobs
from rempart.serve.settings import Settings

BYTES = "application/octet-stream"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployment") / "data"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[FlaskClient]:
    app = create_app(Settings(folder=folder, upload=2**20))
    yield app.test_client()
    app.extensions["rempart"].jobs.table.destroy()


@pytest.fixture(scope="module")
def model(client: FlaskClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    content = model_zip(tmp_path_factory.mktemp("model") / "net")
    answer = client.post("/api/v1/models?name=My Net.zip", data=content, content_type=BYTES)
    assert answer.status_code == 201, answer.text
    return answer.json["id"]


@pytest.fixture(scope="module")
def data(client: FlaskClient) -> str:
    answer = client.post("/api/v1/data?name=animals.zip", data=data_zip(), content_type=BYTES)
    assert answer.status_code == 201, answer.text
    return answer.json["id"]


def encoded(number: int) -> str:
    return base64.b64encode(picture(number)).decode()


def softmax(number: int) -> np.ndarray:
    x = torch.from_numpy(pixels(number)).float()[None, None] / 255
    with torch.no_grad():
        z = network()(x)[0].double().numpy()
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def test_an_uploaded_model_says_what_it_is(client: FlaskClient, model: str, folder: Path) -> None:
    about = client.get(f"/api/v1/models/{model}").json
    assert about["name"] == "My Net.zip" and about["source"] == "upload"
    assert about["shape"] == [1, 8, 8] and about["classes"] == list(CLASSES)
    assert about["parameters"] == sum(p.numel() for p in network().parameters())
    assert [layer["kind"] for layer in about["facts"]["layers"]].count("Linear") == 3
    assert [entry["id"] for entry in client.get("/api/v1/models").json["models"]] == [model]
    assert {path.name for path in (folder / "models" / model / "my-net").iterdir()} == {
        "config.json",
        "weights.safetensors",
    }
    assert not list((folder / "incoming").iterdir())


def test_predictions_are_the_softmax_of_the_network(client: FlaskClient, model: str) -> None:
    answer = client.post(f"/api/v1/models/{model}/predict", json={"images": [encoded(0), encoded(7)]}).json
    for number, told in zip((0, 7), answer["predictions"], strict=True):
        expected = softmax(number)
        assert told["label"] == int(expected.argmax()) and told["name"] == CLASSES[told["label"]]
        np.testing.assert_allclose([told["probabilities"][name] for name in CLASSES], expected, atol=1e-5)
        assert told["verdict"] is None
    files = [(io.BytesIO(picture(number)), "x.png") for number in (0, 7)]
    form = client.post(f"/api/v1/models/{model}/predict", data={"images": files}).json
    assert form["predictions"] == answer["predictions"] and 0 < form["seconds"] < 10


def test_data_are_shown_as_they_came(client: FlaskClient, data: str) -> None:
    about = client.get(f"/api/v1/data/{data}").json
    assert about["facts"]["splits"] == {"all": {"images": 15, "classes": dict.fromkeys(CLASSES, 5)}}
    listed = client.get(f"/api/v1/data/{data}/images?split=all&label=1&limit=3&offset=1").json
    assert listed["total"] == 5 and [image["name_of_class"] for image in listed["images"]] == ["dog"] * 3
    everything = client.get(f"/api/v1/data/{data}/images?split=all&limit=200").json["images"]
    shown = []
    for image in everything:
        answer = client.get(f"/api/v1/data/{data}/images/{image['number']}.png?split=all")
        with Image.open(io.BytesIO(answer.data)) as decoded:
            shown.append((image["name_of_class"], np.asarray(decoded).tobytes()))
    assert sorted(shown) == sorted((CLASSES[n // 5], pixels(n).tobytes()) for n in range(15))


def test_one_image_is_tried(client: FlaskClient, model: str) -> None:
    """FGSM of one step: the sign of the gradient of the cross-entropy, worked out here."""
    expected = softmax(3)
    label = int(expected.argmax())
    asked = {"model": model, "image": encoded(3), "threat": "linf:8/255", "attack": {"name": "fgsm"}}
    told = client.post("/api/v1/try", json=asked).json
    assert told["label"] == label and told["predicted"]["original"]["label"] == label
    x = (torch.from_numpy(pixels(3)).float()[None, None] / 255).requires_grad_(True)
    net = network()
    torch.nn.functional.cross_entropy(net(x), torch.tensor([label])).backward()
    attacked = (x + 8 / 255 * x.grad.sign()).clamp(0, 1).detach()
    with torch.no_grad():
        probability = net(attacked).double().softmax(1)[0, label]
    name = CLASSES[label]
    assert told["predicted"]["adversarial"]["probabilities"][name] == pytest.approx(float(probability), abs=1e-5)
    assert told["success"] == (int(net(attacked).argmax()) != label)
    picture_ = base64.b64decode(told["adversarial_png"])
    with Image.open(io.BytesIO(picture_)) as decoded:
        np.testing.assert_allclose(np.asarray(decoded) / 255, attacked[0, 0].numpy(), atol=0.51 / 255)


def test_an_image_of_a_data_set_is_tried_with_its_own_class(client: FlaskClient, model: str, data: str) -> None:
    first = client.get(f"/api/v1/data/{data}/images?split=all&limit=1").json["images"][0]
    asked = {"model": model, "data": data, "number": first["number"], "threat": "linf:0.1", "attack": {"name": "pgd"}}
    told = client.post("/api/v1/try", json=asked).json
    assert told["label"] == first["label"]


def audit(model: str, data: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "audit", "model": model, "data": f"{data}[:9]", "threat": "linf:0.1", **changes}


def test_a_job_is_queued_listed_cancelled_and_deleted(client: FlaskClient, model: str, data: str, folder: Path) -> None:
    answer = client.post("/api/v1/jobs", json=audit(model, data))
    assert answer.status_code == 202
    job = answer.json
    assert answer.headers["Location"] == f"/api/v1/jobs/{job['id']}"
    assert job["state"] == "queued" and job["kind"] == "audit" and job["user"] == "local"
    assert job["request"]["model"] == model and client.get(answer.headers["Location"]).json == job
    spec = json.loads((folder / "jobs" / job["id"] / "spec.json").read_bytes())
    assert spec["model"] == f"models/{model}/my-net" and spec["out"].startswith(f"jobs/{job['id']}/")
    assert job["id"] in [found["id"] for found in client.get("/api/v1/jobs?kind=audit").json["jobs"]]
    assert client.get("/api/v1/jobs?kind=train").json["jobs"] == []
    assert client.delete(f"/api/v1/jobs/{job['id']}").status_code == 422
    assert client.post(f"/api/v1/jobs/{job['id']}/cancel").json["state"] == "cancelled"
    assert client.delete(f"/api/v1/jobs/{job['id']}").status_code == 204
    assert client.get(f"/api/v1/jobs/{job['id']}").status_code == 404 and not (folder / "jobs" / job["id"]).exists()


def test_what_a_waiting_job_needs_is_not_deleted(client: FlaskClient, model: str) -> None:
    made = client.post("/api/v1/data?name=other.zip", data=data_zip(), content_type=BYTES).json["id"]
    job = client.post("/api/v1/jobs", json=audit(model, made)).json["id"]
    for path in (f"models/{model}", f"data/{made}"):
        assert client.delete(f"/api/v1/{path}").status_code == 409
    client.post(f"/api/v1/jobs/{job}/cancel")
    assert client.delete(f"/api/v1/data/{made}").status_code == 204
    assert client.get(f"/api/v1/models/{model}").status_code == 200


def test_the_same_key_is_the_same_job(client: FlaskClient, model: str, data: str) -> None:
    key = {"Idempotency-Key": "one"}
    first = client.post("/api/v1/jobs", json=audit(model, data), headers=key).json
    again = client.post("/api/v1/jobs", json=audit(model, data), headers=key).json
    assert again["id"] == first["id"]
    other = client.post("/api/v1/jobs", json=audit(model, data, seed=1), headers=key)
    assert other.status_code == 409 and "Idempotency-Key" in other.json["error"]["expected"]
    assert client.post("/api/v1/jobs", json=audit(model, data)).json["id"] != first["id"]


def events(text: str) -> list[tuple[str, dict[str, object]]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields.get("id", ""), json.loads(fields["data"])))
    return found


def test_events_go_on_where_the_connection_was_lost(client: FlaskClient, model: str, data: str, folder: Path) -> None:
    job = client.post("/api/v1/jobs", json=audit(model, data)).json["id"]
    client.post(f"/api/v1/jobs/{job}/cancel")
    lines = [json.dumps({"stage": "s", "done": n}) + "\n" for n in range(5)]
    (folder / "jobs" / job / "events.jsonl").write_text("".join(lines) + '{"half')
    seen = events(client.get(f"/api/v1/jobs/{job}/events").text)
    assert [event.get("done") for _, event in seen[:-1]] == [0, 1, 2, 3, 4]
    assert seen[-1][1]["state"] == "cancelled"
    for at in range(5):
        rest = client.get(f"/api/v1/jobs/{job}/events", headers={"Last-Event-ID": seen[at][0]}).text
        assert [event.get("done") for _, event in events(rest)[:-1]] == list(range(at + 1, 5))


def test_clients_that_watch_leave_threads_to_others(client: FlaskClient, model: str, data: str) -> None:
    """Each holds a thread of the server: those beyond eight get what is there, and come back."""
    path = f"/api/v1/jobs/{client.post('/api/v1/jobs', json=audit(model, data)).json['id']}/events"
    watching = [client.get(path) for _ in range(8)]
    for answer in watching:
        assert "queued" in next(answer.iter_encoded()).decode()
    started = time.monotonic()
    assert events(client.get(path).text)[-1][1]["state"] == "queued"
    assert time.monotonic() - started < 2
    watching.pop().close()
    with client.get(path) as answer:
        pieces = answer.iter_encoded()
        assert "queued" in next(pieces).decode() and next(pieces) == b": here\n\n"
    for answer in watching:
        answer.close()


def test_files_of_a_job_come_whole_or_in_ranges(client: FlaskClient, model: str, data: str, folder: Path) -> None:
    job = client.post("/api/v1/jobs", json=audit(model, data)).json["id"]
    run = folder / "jobs" / job / "run"
    (run / "inner").mkdir(parents=True)
    (run / "inner" / "a.txt").write_bytes(b"0123456789")
    at = f"/api/v1/jobs/{job}/files"
    assert client.get(at).json == {"files": [{"name": "inner/a.txt", "size": 10}]}
    assert client.get(f"{at}/inner/a.txt", buffered=True).data == b"0123456789"
    part = client.get(f"{at}/inner/a.txt", headers={"Range": "bytes=2-5"}, buffered=True)
    assert part.status_code == 206 and part.data == b"2345" and part.headers["Content-Range"] == "bytes 2-5/10"
    assert client.get(f"{at}/inner/b.txt").status_code == 404
    assert client.get(f"/api/v1/jobs/{job}/report").status_code == 404


def test_metrics_count_images(client: FlaskClient, model: str) -> None:
    def count() -> float:
        lines = client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("rempart_images_total"))

    before = count()
    client.post(f"/api/v1/models/{model}/predict", json={"images": [encoded(n) for n in range(3)]})
    assert count() - before == 3


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/api/v1/nowhere", {}, 404),
        ("PUT", "/api/v1/models", {}, 405),
        ("POST", "/api/v1/models?name=a.zip", {"data": b"x", "content_type": "text/plain"}, 415),
        ("POST", "/api/v1/models?name=a.zip", {"data": b"", "content_type": BYTES}, 422),
        ("POST", "/api/v1/models?name=a.pt2", {"data": b"x", "content_type": BYTES}, 422),
        ("POST", "/api/v1/data?name=a.zip", {"data": b"0" * (2**20 + 1), "content_type": BYTES}, 413),
        ("POST", "/api/v1/jobs", {"data": b"{", "content_type": "application/json"}, 400),
        ("POST", "/api/v1/jobs", {"data": b"null", "content_type": "application/json"}, 422),
        ("POST", "/api/v1/jobs", {"json": {"kind": "audit"}}, 422),
        ("GET", "/api/v1/jobs?limit=0", {}, 422),
        ("GET", "/api/v1/jobs/" + "0" * 32, {}, 404),
    ],
)
def test_errors_have_one_shape(
    client: FlaskClient, method: str, path: str, options: dict[str, object], status: int
) -> None:
    answer = client.open(path, method=method, **options)
    assert answer.status_code == status, answer.text
    assert answer.mimetype == "application/json" and set(answer.json) == {"error"}
    assert {"code", "message"} <= set(answer.json["error"])


def test_a_wrong_request_names_each_field(client: FlaskClient) -> None:
    fields = client.post("/api/v1/jobs", json={"kind": "audit", "zz": 1}).json["error"]["fields"]
    assert {fault["field"].rpartition(".")[2] for fault in fields} == {"model", "data", "threat", "zz"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": "digits:test"}, ("3 classes", "10 (0, 1, 2")),
        ({"data": "digits@8:test"}, ("modifiers on folders and zips", "digits@8:test")),
        ({"data": "DATA@16"}, ("1 x 8 x 8", "1 x 16 x 16")),
        ({"data": "DATA[99:]"}, ("at least one sample", "[99:] of 15")),
        ({"threat": "linf:-1"}, ("eps >= 0", "-1.0")),
        ({"threat": "linf:0"}, ("above 0", "linf:0")),
        ({"threat": "linf:8"}, ("in [0, 1]", "8.0")),
        ({"threat": "linf"}, ("a budget for", "linf")),
        ({"threat": "l2:much"}, ("such as linf:8/255", "l2:much")),
        ({"suite": "best"}, ("fast, quick", "'best'")),
        ({"attacks": [{"name": "pdg"}]}, ("attack", "pdg")),
        ({"attacks": [{"name": "pgd", "options": {"stepz": 3}}]}, ("options of 'pgd'", "stepz")),
        ({"defences": [{"name": "median", "options": {"size": "x"}}]}, ("options of 'median'", "size")),
        ({"kind": "explain", "suite": "best"}, ("fast, quick", "'best'")),
        ({"kind": "detect", "detectors": [{"name": "knm"}], "attacks": []}, ("detector", "knm")),
        ({"kind": "train", "options": {"epochz": 3}}, ("options of 'recipe plain'", "epochz")),
        ({"kind": "train", "recipe": "pgd-at", "options": {"threat": "linf:x"}}, ("such as linf:8/255", "linf:x")),
        ({"kind": "train", "model": "mlp", "model_options": {"first": 0}}, ("options of 'mlp'", "first")),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_it_is_a_job(
    client: FlaskClient, model: str, data: str, changes: dict[str, Any], told: tuple[str, str]
) -> None:
    asked = {**audit(model, data), **changes}
    asked["data"] = asked["data"].replace("DATA", data)
    if asked["kind"] == "explain":
        asked["models"] = [asked.pop("model")]
    if asked["kind"] == "train":
        asked = {"kind": "train", "data": data, **changes}
    before = len(client.get("/api/v1/jobs?limit=200").json["jobs"])
    answer = client.post("/api/v1/jobs", json=asked)
    assert answer.status_code == 422, answer.text
    error = answer.json["error"]
    assert told[0] in error["expected"] and told[1] in error["got"], error
    assert len(client.get("/api/v1/jobs?limit=200").json["jobs"]) == before


def test_faults_are_told_in_words(client: FlaskClient, model: str, data: str) -> None:
    def told(body: dict[str, Any]) -> str:
        return client.post("/api/v1/jobs", json=body).json["error"]["message"]

    assert "threat: Field required" in told({"kind": "audit", "model": model, "data": data})
    for wrong in ("animals.zip", "digits:tset"):
        said = told(audit(model, data) | {"data": wrong})
        assert "digits or the id of a data set" in said and repr(wrong) in said and "pattern" not in said
    answer = client.post("/api/v1/jobs", data=b'{"kind": audit}', content_type="application/json")
    assert answer.status_code == 400 and "line 1 column 10" in answer.json["error"]["got"]


def test_a_report_that_is_not_there_says_what_became_of_its_job(client: FlaskClient, model: str, data: str) -> None:
    job = client.post("/api/v1/jobs", json=audit(model, data)).json["id"]
    for state, hint in (("queued", "wait for its end"), ("cancelled", None)):
        error = client.get(f"/api/v1/jobs/{job}/report.html").json["error"]
        assert error["expected"] == "a job with a report" and error["got"] == f"one that is {state}"
        assert error.get("hint") == hint
        client.post(f"/api/v1/jobs/{job}/cancel")


def test_health_and_readiness(client: FlaskClient, folder: Path) -> None:
    assert client.get("/api/v1/health").json["status"] == "ok" and client.get("/api/v1/ready").status_code == 200
    (folder / "incoming").rename(folder / "elsewhere")
    try:
        assert client.get("/api/v1/ready").status_code == 503 and client.get("/api/v1/health").status_code == 200
    finally:
        (folder / "elsewhere").rename(folder / "incoming")


def test_every_view_is_on_the_api_page(client: FlaskClient) -> None:
    told = client.get("/api/v1/openapi.json").json["paths"]
    views = {
        str(rule).replace("int:", "").replace("path:", "").replace("<", "{").replace(">", "}")
        for rule in client.application.url_map.iter_rules()
        if rule.endpoint.startswith("api.")
    }
    assert views == set(told)
    assert client.get("/api/v1/docs/", buffered=True).status_code == 200


def test_jobs_stand_side_by_side(client: FlaskClient, model: str, data: str, folder: Path, tmp_path: Path) -> None:
    """Two models of one name: the page tells them apart, and its figures are those of the two reports."""
    client = client.application.test_client()  # without the cookie of a page
    other = client.post("/api/v1/models?name=My Net.zip", data=model_zip(tmp_path / "net", 1), content_type=BYTES)
    jobs, (end, mine) = [], os.pipe()
    for id in (model, other.json["id"]):
        asked = audit(id, data) | {"data": data, "attacks": [{"name": "fgsm"}], "sweep": False}
        jobs.append(client.post("/api/v1/jobs", json=asked).json["id"])
        command = [sys.executable, "-m", "rempart.serve.child", f"jobs/{jobs[-1]}"]
        subprocess.run(command, cwd=folder, stdin=end, check=True)
        client.post(f"/api/v1/jobs/{jobs[-1]}/cancel")
    os.close(mine)
    os.close(end)
    reports = [client.get(f"/api/v1/jobs/{job}/report", buffered=True).json for job in jobs]
    page = client.get(f"/api/v1/compare?job={jobs[0]}&job={jobs[1]}")
    assert page.mimetype == "text/html" and "sandbox" in page.headers["Content-Security-Policy"]
    for job, report in zip(jobs, reports, strict=True):
        assert f"my-net ({job[:4]})" in page.text
        assert f"{report['worst_case']['k'] / report['worst_case']['n']:.1%}" in page.text
    assert client.get(f"/api/v1/compare?job={jobs[0]}").status_code == 422


def test_without_its_table_the_service_says_so(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise Unavailable("a table of jobs that answers", got="none")

    monkeypatch.setattr(Jobs, "list", away)
    monkeypatch.setattr(Jobs, "counts", away)
    for path in ("/", "/jobs", "/models", "/metrics", "/api/v1/jobs", "/api/v1/ready"):
        assert client.get(path).status_code == 503, path
    assert client.get("/api/v1/health").status_code == 200
