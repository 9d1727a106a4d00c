"""The pages as they are served: whole without scripts, in three languages, with every client's word escaped."""

import json
import re
import string
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from flask.testing import FlaskClient

import rempart.report
import rempart.serve
from bringing import OPTIONS, SHAPE, data_zip, model_zip, picture, zipped
from rempart.models.save import save
from rempart.models.zoo import build
from rempart.serve import words
from rempart.serve.app import create_app
from rempart.serve.auth import Tokens
from rempart.serve.settings import Settings

SERVE = Path(rempart.serve.__file__).parent
REPORT = Path(rempart.report.__file__).parent
BYTES = "application/octet-stream"
EVIL = '"><img src=x onerror=alert(1)>'
PLACES = ["/", "/audit", "/train", "/detect", "/explain", "/jobs", "/reports", "/compare-reports", "/models", "/data"]
PLACES += ["/data/digits", "/guards", "/login"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployment") / "data"


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[FlaskClient]:
    app = create_app(Settings(folder=folder))
    yield app.test_client()
    app.extensions["rempart"].jobs.table.destroy()


@pytest.fixture
def api(client: FlaskClient) -> FlaskClient:
    """A program beside the browser: it has no cookies, and so needs no token of a form."""
    return client.application.test_client(use_cookies=False)


class Seen(HTMLParser):
    """Elements of a page with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._in = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if data.strip() and self._in not in ("script", "code"):
            self.texts.append(data.strip())


# ---- words


@pytest.mark.parametrize("language", ["fr", "zh"])
def test_every_sentence_has_a_translation_and_none_is_left_over(language: str) -> None:
    said = words.in_templates() | words.in_scripts() | words.in_catalogue()
    assert len(said) > 300
    known = set(words.dictionary(language))
    assert sorted(said - known) == [], f"add these to serve/words/{language}.json"
    assert sorted(known - said) == [], f"take these out of serve/words/{language}.json"


@pytest.mark.parametrize("language", ["fr", "zh"])
def test_a_translation_has_the_names_of_its_sentence(language: str) -> None:
    def names(text: str) -> list[str]:
        return sorted(field for _, field, _, _ in string.Formatter().parse(text) if field)

    for sentence, text in words.dictionary(language).items():
        assert text.strip() and names(text) == names(sentence), sentence
        assert text.count("`") == sentence.count("`"), sentence
    assert list(words.dictionary(language)) == sorted(words.dictionary(language))


def test_templates_and_modules_say_nothing_past_the_dictionaries() -> None:
    for path in (SERVE / "templates").glob("*.html"):
        if path.name == "swagger.html":
            continue
        bare = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|<[^>]*>|&\w+;", " ", path.read_text(), flags=re.DOTALL)
        left = set(re.findall(r"[^\W\d_]{2,}", bare)) - {"Rempart", "UTC", "KB", "MB", "GB", "KiB"}
        assert left <= {"PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "EN", "api", "guards", "predict"}, path.name
    for path in (SERVE / "static").glob("*.js"):
        text = re.sub(r"//.*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL if "/*" in path.read_text() else 0)
        spoken = re.findall(r'(?<!t\()"([A-Z][a-z]+ [a-z][^"]*)"', re.sub(r"//[^\n]*", "", text))
        assert spoken == [], path.name


@pytest.mark.parametrize(
    ("cookie", "accepted", "language"),
    [
        (None, [], "en"),
        (None, ["fr-CA", "en"], "fr"),
        (None, ["de", "zh-Hant-TW", "en"], "zh"),
        (None, ["de"], "en"),
        ("fr", ["zh"], "fr"),
        ("xx", ["zh"], "zh"),
        ("../fr", [], "en"),
    ],
)
def test_the_language_is_the_cookies_else_the_browsers_else_english(
    cookie: str | None, accepted: list[str], language: str
) -> None:
    assert words.chosen(cookie, accepted) == language


def test_values_are_put_into_a_translation_once() -> None:
    told = words.translated("Logged in as {name}", "fr", name="{name} {n}")
    assert told == "Connecté\u00a0: {name} {n}"
    assert words.translated("Not a sentence of ours, {n}", "zh", n=3) == "Not a sentence of ours, 3"


def test_a_page_speaks_the_language_asked_for(client: FlaskClient) -> None:
    for tag, title in (("fr", "Essayer une attaque sur une image"), ("zh-CN,en;q=0.5", "在一张图像上试用攻击")):
        page = client.get("/", headers={"Accept-Language": tag}).text
        assert title in page and f'<html lang="{tag[:2]}"' in page
        island = re.search(r'id="words">(.*?)</script>', page)
        assert island is not None
        assert json.loads(island[1]) == dict(words.of_scripts(tag[:2]))


# ---- every page


@pytest.mark.parametrize("place", PLACES)
def test_a_page_has_nothing_inline_and_names_what_it_has(client: FlaskClient, place: str) -> None:
    answer = client.get(place)
    assert answer.status_code == 200
    seen = Seen(answer.text)
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = {attributes.get("for") for tag, attributes in seen.elements if tag == "label"}
    for tag, attributes in seen.elements:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
        assert tag != "style" and (tag != "script" or "src" in attributes or attributes["type"] == "application/json")
        for name in ("src", "href", "action"):
            assert not re.match(r"(\w+:)?//", attributes.get(name) or ""), "a third-party host"
        if tag in ("input", "select", "textarea") and attributes.get("type") != "hidden":
            assert attributes.get("aria-label") or attributes.get("id") in labels, attributes
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
    assert [tag for tag, _ in seen.elements].count("h1") == 1
    assert "unsafe" not in answer.headers["Content-Security-Policy"]


def test_an_address_where_nothing_is_gets_a_page_and_the_api_json(client: FlaskClient) -> None:
    for place in ("/nope", "/models/0123456789abcdef", "/jobs/0123", "/data/../../etc/passwd"):
        answer = client.get(place)
        assert answer.status_code == 404 and "Nothing is here" in answer.text
    assert client.get("/api/v1/nope").json["error"]["code"] == "not_found"


def test_pages_and_reports_have_the_same_colours() -> None:
    def colours(text: str) -> list[dict[str, str]]:
        blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
        return [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in blocks]

    theirs, ours = (
        colours((REPORT / "templates/parts.html").read_text()),
        colours((SERVE / "static/rempart.css").read_text()),
    )
    for report, page in zip(theirs, ours, strict=True):
        assert report and report.items() <= page.items()


def test_a_language_is_kept_and_leads_nowhere_else(client: FlaskClient) -> None:
    token = re.search(r'name="csrf_token" value="([^"]+)"', client.get("/jobs?offset=0").text)
    assert token is not None
    for back, to in (
        ("/jobs?offset=0", "/jobs?offset=0"),
        ("//evil.example/", "/"),
        ("https://evil.example/", "/"),
        ("/\\evil.example", "/"),
        ("/a\nb", "/"),
    ):
        form = {"csrf_token": token[1], "language": "zh", "back": back}
        answer = client.post("/language", data=form, headers={"Sec-Fetch-Site": "same-origin"})
        assert (answer.status_code, answer.headers["Location"]) == (303, to)
    assert "试用" in client.get("/").text
    refused = client.post("/language", data={"language": "fr"}, headers={"Sec-Fetch-Site": "same-origin"})
    assert refused.status_code == 403
    client.delete_cookie("language")


# ---- what clients named


def test_names_that_clients_chose_are_text_and_nothing_else(
    client: FlaskClient, api: FlaskClient, tmp_path: Path
) -> None:
    classes = ["<b>cat</b>", "{{ 7 * 7 }}", "</script><script>alert(2)</script>"]
    entries = {f"{name.replace('/', '')}/{i}.png": picture(i) for name in classes for i in range(2)}
    named = {"name": f"{EVIL}.zip"}
    data = api.post("/api/v1/data", query_string=named, data=zipped(entries), content_type=BYTES).json
    net = build("mlp", shape=SHAPE, num_classes=3, class_names=tuple(classes), options=OPTIONS, seed=0)
    save(net, tmp_path / "net", name="mlp", options=OPTIONS)
    content = zipped({path.name: path.read_bytes() for path in (tmp_path / "net").iterdir()})
    model = api.post("/api/v1/models", query_string=named, data=content, content_type=BYTES).json
    for place in ("/", "/audit", "/models", f"/models/{model['id']}", "/data", f"/data/{data['id']}"):
        page = client.get(place).text
        seen = Seen(page)
        assert not any(attributes.get("src") == "x" or "onerror" in attributes for _, attributes in seen.elements)
        assert "alert(2)</script>" not in page and "<b>cat" not in page
        assert sum(tag == "script" for tag, _ in seen.elements) <= 3
    assert EVIL in " ".join(Seen(client.get("/models").text).texts)
    assert "{{ 7 * 7 }}" in " ".join(Seen(client.get(f"/data/{data['id']}").text).texts)


def test_modules_make_no_html_of_text() -> None:
    for path in (SERVE / "static").glob("*.js"):
        text = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in text, path.name


def test_lists_are_there_without_scripts(client: FlaskClient, api: FlaskClient, tmp_path: Path) -> None:
    content = model_zip(tmp_path / "net")
    model = api.post("/api/v1/models?name=first.zip", data=content, content_type=BYTES).json
    data = api.post("/api/v1/data?name=animals.zip", data=data_zip(), content_type=BYTES).json
    asked = {"kind": "audit", "model": model["id"], "data": f"{data['id']}:test", "threat": "linf:8/255"}
    job = api.post("/api/v1/jobs", json=asked).json
    jobs = Seen(client.get("/jobs").text)
    assert {"queued", "first.zip · animals.zip:test · linf:8/255"} <= set(jobs.texts)
    assert ("a", {"href": f"/jobs/{job['id']}"}) in jobs.elements
    page = client.get(f"/jobs/{job['id']}").text
    assert "Waiting for a worker" in page and "first.zip · animals.zip:test" in page
    assert "No report yet" in client.get("/reports").text
    assert {"digits", "1,343", "454"} <= set(Seen(client.get("/data/digits").text).texts)
    page = Seen(client.get(f"/models/{model['id']}", headers={"Accept-Language": "fr"}).text)
    assert {"Modèle", "Couches", "cat, dog, hare"} <= {text.removeprefix("3: ") for text in page.texts}


# ---- who may see what


def test_who_is_not_logged_in_is_asked_to(tmp_path: Path) -> None:
    tokens = {role: Tokens.of(tmp_path).add(role, role) for role in ("read", "run", "admin")}
    app = create_app(Settings(folder=tmp_path, tokens=True))
    try:
        client = app.test_client()
        answer = client.get("/jobs?offset=50")
        assert answer.status_code == 302 and answer.headers["Location"] == "/login?next=/jobs?offset%3D50"
        page = client.get(answer.headers["Location"])
        assert "/audit" not in page.text, "no navigation for strangers"
        csrf = re.search(r'name="csrf_token" value="([^"]+)"', page.text)
        assert csrf is not None
        browser = {"Sec-Fetch-Site": "same-origin"}
        wrong = client.post("/login", data={"csrf_token": csrf[1], "token": "rempart_x"}, headers=browser)
        assert wrong.status_code == 401 and "This token is not known" in wrong.text
        form = {"csrf_token": csrf[1], "token": tokens["read"], "next": "//evil.example"}
        right = client.post("/login", data=form, headers=browser)
        assert (right.status_code, right.headers["Location"]) == (303, "/")
        page = client.get("/models").text
        assert "Logged in as read" in page and "data-upload" not in page and "data-first-model" not in page
        csrf = re.search(r'name="csrf_token" value="([^"]+)"', page)
        assert csrf is not None
        client.post("/logout", data={"csrf_token": csrf[1]}, headers=browser)
        assert client.get("/models").status_code == 302
    finally:
        app.extensions["rempart"].jobs.table.destroy()
