"""The documentation against the code: no missing entry, no drifted command, no dead link, no figure without source."""

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import nn

import rempart
from contracts.test_objectives import CHECKS, Case, Make
from rempart import cli
from rempart.attacks import SUITES, attack_batch, attacks
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.detectors import detectors
from rempart.models import load
from rempart.models.zoo import models
from rempart.objectives import objectives
from rempart.preprocess import preprocessors
from rempart.report import store
from rempart.report.schema import AttackChoice, AuditSpec
from rempart.train.config import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.rglob("*.md"))


def commands(group: Any, before: str = "") -> dict[str, Any]:
    """Commands by the words they are called by, those of a group too."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        within = commands(command, f"{before}{name} ") if hasattr(command, "commands") else {}
        found |= within or {f"{before}{name}": command}
    return found


COMMANDS = commands(typer.main.get_command(cli.app))


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(hooks: ModuleType) -> dict[str, str]:
    return {Path(path).stem: content for path, content in hooks.pages().items()}


def ident(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- the reference


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("attacks", [entry.name for entry in attacks]),
        ("models", [entry.name for entry in models]),
        ("preprocessors", [entry.name for entry in preprocessors]),
        ("recipes", [*recipe_names(), *(f"objective-{entry.name}" for entry in objectives)]),
        ("suites", list(SUITES)),
        ("detectors", [entry.name for entry in detectors]),
        ("cli", [name.replace(" ", "-") for name in COMMANDS]),
    ],
)
def test_everything_registered_has_its_own_heading(reference: dict[str, str], page: str, names: list[str]) -> None:
    anchors = re.findall(r"^##+ \S.* \{ #(\S+) \}$", reference[page], flags=re.MULTILINE)
    assert names and set(names) <= set(anchors)
    assert len(anchors) == len(set(anchors))


@pytest.mark.parametrize(
    ("page", "anchor", "options"),
    [
        *(("attacks", e.name, list(e.params.model_fields)) for e in attacks),
        *(("models", e.name, list(e.params.model_fields)) for e in models),
        *(("detectors", e.name, list(e.params.model_fields)) for e in detectors),
        *(("preprocessors", e.name, list(e.params.model_fields)) for e in preprocessors),
        *(("recipes", f"objective-{e.name}", list(e.params.model_fields)) for e in objectives),
        *(("recipes", name, list(load_recipe(name).options)) for name in recipe_names()),
    ],
)
def test_every_option_has_a_row(reference: dict[str, str], page: str, anchor: str, options: list[str]) -> None:
    rows = re.findall(r"^\| `([^`]+)` \|", section(reference[page], anchor), flags=re.MULTILINE)
    assert set(options) <= set(rows)


@pytest.mark.parametrize("page", ["attacks", "detectors"])
def test_options_are_explained(reference: dict[str, str], page: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", reference[page].replace("\\|", "/"), flags=re.MULTILINE)
    assert rows
    assert [name for name, meaning in rows if len(meaning) < 5] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_of_a_command_has_a_row(reference: dict[str, str], name: str) -> None:
    told = section(reference["cli"], name.replace(" ", "-"))
    assert f"rempart {name} " in told
    for parameter in COMMANDS[name].params:
        for option in (
            parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or parameter.name]
        ):
            assert re.search(rf"^\| `[^`]*{re.escape(option)}\b", told, flags=re.MULTILINE), option


def test_options_show_the_defaults_that_hold(reference: dict[str, str]) -> None:
    told = section(reference["attacks"], "pgd")
    assert "| `steps` | `40` | `int, >= 1` |" in told
    assert "| `random_start` | `true` | `bool` |" in told
    assert "| `loss` | `ce` | `'ce' | 'margin' | 'dlr'` |" in told, "a bar inside code is not escaped"
    assert "| `width` | `64` |" in section(reference["models"], "resnet18")
    assert "| `threat` | `linf:0.1` |" not in section(reference["recipes"], "plain")
    assert "| `threat` | `linf:0.1` |" in re.sub(r"` +\|", "` |", section(reference["recipes"], "pgd-at"))


def test_names_handed_to_mkdocstrings_exist(reference: dict[str, str]) -> None:
    named = {name for page in reference.values() for name in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)}
    assert len(named) > 40
    found = {name: resolved(name) for name in named}
    public = [getattr(rempart, name) for name in rempart.__all__]
    assert all(any(value is other for other in found.values()) for value in public)


def resolved(dotted: str) -> Any:
    """The object behind `package.module.name`; AttributeError or ImportError where there is none."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if importlib.util.find_spec(".".join(parts[:1])) and is_module(".".join(parts[:cut])):
            value: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                value = getattr(value, part)
            return value
    raise ImportError(dotted)


def is_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ModuleNotFoundError:
        return False


def section(page: str, anchor: str) -> str:
    """From the heading with this anchor to the next one of the same level or above."""
    start = re.search(rf"^(#+) .*\{{ #{re.escape(anchor)} \}}$", page, flags=re.MULTILINE)
    assert start, f"no heading #{anchor}"
    rest = page[start.end() :]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", rest, flags=re.MULTILINE)
    return rest[: end.start()] if end else rest


@pytest.mark.parametrize("name", [entry.name for entry in attacks])
def test_every_attack_has_a_section_in_methods_with_formula_source_and_mark(name: str) -> None:
    told = (DOCS / "methods.md").read_text("utf-8").split(f"\n### {name}\n")
    assert len(told) == 2, f"one section '### {name}' in docs/methods.md"
    own = re.split(r"^##+ ", told[1], flags=re.MULTILINE)[0]
    assert "```text" in own and "arxiv.org/abs/" in own
    assert re.search(r"\[(SRC|2ND|KNOWN|INF)", own)


@pytest.mark.parametrize("name", [*(entry.name for entry in objectives), "awp"])
def test_every_training_method_has_a_section_in_methods_with_formula_and_mark(name: str) -> None:
    told = (DOCS / "methods.md").read_text("utf-8").split(f"\n### {name}\n")
    assert len(told) == 2, f"one section '### {name}' in docs/methods.md"
    own = re.split(r"^##+ ", told[1], flags=re.MULTILINE)[0]
    assert "```text" in own and re.search(r"\[(SRC|2ND|KNOWN|INF)", own)
    assert ("arxiv.org/abs/" in own) == (name not in ("plain", "mart")), "what has a preprint names it"


@pytest.mark.parametrize("name", [entry.name for entry in detectors])
def test_every_detector_has_a_section_in_methods_with_formula_and_mark(name: str) -> None:
    told = (DOCS / "methods.md").read_text("utf-8").split(f"\n### {name}\n")
    assert len(told) == 2, f"one section '### {name}' in docs/methods.md"
    own = re.split(r"^##+ ", told[1], flags=re.MULTILINE)[0]
    assert "```text" in own and re.search(r"\[(SRC|2ND|KNOWN|INF)", own)


@pytest.mark.parametrize("entry", preprocessors, ids=lambda entry: entry.name)
def test_every_preprocessing_defence_has_a_section_in_methods_that_tells_its_traits(entry: Any) -> None:
    told = (DOCS / "methods.md").read_text("utf-8").split(f"\n### {entry.name}\n")
    assert len(told) == 2, f"one section '### {entry.name}' in docs/methods.md"
    own = re.split(r"^##+ ", told[1], flags=re.MULTILINE)[0]
    assert "```text" in own and re.search(r"\[(SRC|2ND|KNOWN|INF)", own)
    assert ("Random" in own) == entry.traits.random
    assert ("backwards the identity" in own.lower()) != entry.traits.differentiable
    assert (" own gradient." in own or "is its own" in own) == entry.traits.differentiable


# ---- commands and code


def blocks(path: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """Title and content of the fenced blocks in these languages."""
    text = path.read_text("utf-8")
    for found in re.finditer(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, flags=re.MULTILINE | re.DOTALL):
        if found[1] in languages:
            yield found[2] or "", found[3]


def command_lines(path: Path) -> list[list[str]]:
    """The commands of shell blocks, and of the list items of YAML blocks."""
    lines: list[str] = []
    for _, content in blocks(path, "sh"):
        lines += content.replace("\\\n", " ").splitlines()
    for _, content in blocks(path, "yaml"):
        lines += re.findall(r"^ +- ((?:rempart|pip|make) .*)$", content, flags=re.MULTILINE)
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [words for words in parts if words]


COMMAND_LINES = [(path, words) for path in WRITTEN for words in command_lines(path)]


@pytest.mark.parametrize(("path", "words"), COMMAND_LINES, ids=lambda v: v.name if isinstance(v, Path) else " ".join(v))
def test_commands_in_the_documentation_parse(path: Path, words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "rempart" and arguments != ["--help"]:
        check_command(*arguments)
    else:
        assert program in ("rempart", "python", "python3", "pip", ".", "echo"), "a command nobody checks"


def check_command(name: str, *arguments: str) -> None:
    """Parse a command as typer would, and look up what it names."""
    if name not in COMMANDS and arguments:
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    given = COMMANDS[name].make_context(name, list(arguments)).params
    if given.get("threat") is not None:
        Threat.parse(given["threat"], unit="HU", span=(-160, 240))
    for text in given.get("defence") or []:
        choice, _, own = text.partition(":")
        preprocessors[choice].parse(dict(pair.split("=") for pair in own.split(",") if pair))
    if name == "detect evaluate":
        for choice, _, own in (text.partition(":") for text in given["detector"]):
            detectors[choice].parse(dict(pair.split("=") for pair in own.split(",") if pair))
    if name in ("audit", "attack", "detect evaluate"):
        named = [given["attack"]] if name == "attack" else given["attack"]
        shared = dict(pair.split("=") for pair in given.get("option") or [])
        for choice, _, own in (text.partition(":") for text in named or [] if not text.startswith("corners")):
            attacks[choice].parse({**shared, **dict(pair.split("=") for pair in own.split(",") if pair)})
    if name == "audit":
        assert given["suite"] in (None, *SUITES)
    if name == "train":
        assert given["model"] is None or models[given["model"]]
        load_recipe(given["recipe"], dict(pair.split("=") for pair in given["option"] or []))
    if name == "list":
        from rempart.listing import describe

        assert describe(given["what"])


@pytest.mark.parametrize(
    "line",
    [
        "audit m --data digits --threat linf:0.1 --out o --swep",
        "audit m --data digits --threat linf:0.1 --out o --attack pgdd",
        "audit m --data digits --threat linf:0.1 --out o --attack pgd:stepz=3",
        "audit m --data digits --threat linf:9 --out o",
        "attack m --data digits --attack pgd --threat linf:0.1",
        "train --data digits --model lenet --recipe nothing --out o",
        "detect evaluate m --data digits --threat linf:0.1 --out o --detector lidd",
        "detect evaluate m --data digits --threat linf:0.1 --out o --detector lid:kk=3",
        "detect evaluate m --data digits --threat linf:0.1 --out o --detector lid --attack pgdd",
        "detect score d m --data digits --out o --fpr 0.1",
        "audit m --data digits --threat linf:0.1 --out o --defence jpegg",
        "frobnicate",
    ],
)
def test_a_drifted_command_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|expected|missing|frobnicate"):
        check_command(*line.split())


@pytest.mark.parametrize("path", [path for path in WRITTEN if list(blocks(path, "python"))], ids=ident)
def test_python_blocks_compile(path: Path) -> None:
    for title, content in blocks(path, "python"):
        if path.name != "design.md":  # whose sketches are no programs
            compile(content, title or path.name, "exec")


def test_the_example_of_an_own_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = dict(blocks(DOCS / "how-to" / "own-model.md", "python"))
    for name in ("my_model.py", "train_my_model.py"):
        (tmp_path / name).write_text(programs[name], "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with torch.random.fork_rng():
        training = importlib.import_module("train_my_model")
    model = load("python:my_model:classifier")
    pixels = training.data.read(training.data.index[:8])
    torch.testing.assert_close(model(pixels), training.net(training.x[:8]), msg="the normalisation of the training")
    choice = (AttackChoice(name="fgsm"),)
    spec = AuditSpec(model="python:my_model:classifier", data="digits", threat="linf:0.02", attacks=choice, sweep=False)
    report = rempart.run(spec)
    for name in ("my_model", "train_my_model"):
        sys.modules.pop(name)
    assert report.clean is not None and report.clean.value > 0.9
    assert {check.name for check in report.preflight if check.status != "passed"} <= {"inference mode"}


def test_the_example_of_an_own_attack_joins_and_works() -> None:
    ((title, program),) = blocks(DOCS / "how-to" / "add-an-attack.md", "python")
    try:
        exec(compile(program, title, "exec"), {})
        entry = attacks["corners"]
        assert entry.parse({"tries": "5"}) == {"tries": 5}
        x, y = torch.full((4, 1, 1, 2), 0.5), torch.zeros(4, dtype=torch.int64)
        broken = attack_batch(two_pixels(), x, y, Threat.parse("linf:0.2"), "corners", {"tries": 40})
        short = attack_batch(two_pixels(), x, y, Threat.parse("linf:0.09"), "corners", {"tries": 40})
    finally:
        attacks._entries.pop("corners", None)
    assert bool(broken.success.all()), "one corner in four breaks it: missed 40 times with a chance of one in 100,000"
    assert not bool(short.success.any()), "below the radius of 0.1 no corner does"


def test_the_example_of_an_own_objective_joins_and_keeps_the_contract(tmp_path: Path) -> None:
    page = DOCS / "how-to" / "add-an-objective.md"
    ((title, program),) = blocks(page, "python")
    recipes = {name: content for name, content in blocks(page, "toml") if name}
    try:
        exec(compile(program, title, "exec"), {})
        for name, content in recipes.items():
            (tmp_path / name).write_text(content, "utf-8")
        objective = load_recipe(str(tmp_path / "corners.toml"), {"threat": "linf:0.25"}).build_objective()
        entry = objectives["corner-training"]
        for check in CHECKS:
            check(Make(entry.function, Case(), frozenset(entry.params.model_fields)))
    finally:
        objectives._entries.pop("corner-training", None)
    x, y, rng = torch.linspace(0, 1, 40).view(20, 1, 1, 2), torch.arange(20) % 2, Draws(0, torch.arange(20))
    x_adv = objective.craft(two_pixels(), x, y, rng=rng, progress=0.0)
    below, above = x_adv == (x - 0.25).clamp(0, 1), x_adv == (x + 0.25).clamp(0, 1)
    assert bool((below ^ above).all()) and 10 < int(above.sum()) < 30, "the whole budget, or the edge of the box"
    z = two_pixels()(x_adv)
    expected = (z.logsumexp(1) - z[torch.arange(20), y]).mean()
    torch.testing.assert_close(objective(two_pixels(), x, y, rng=rng).value, expected)


def test_recipes_in_the_documentation_load(tmp_path: Path) -> None:
    (title, content), *_ = [found for found in blocks(DOCS / "how-to" / "harden.md", "toml") if found[0]]
    (tmp_path / title).write_text(content, "utf-8")
    recipe = load_recipe(str(tmp_path / title))
    assert recipe.objective == "trades" and recipe.options["beta"] == 3.0


def two_pixels() -> Classifier:
    """Logits (0.2, a - b): an image of a = b is class 0, and flips where a - b > 0.2, at the corner (+0.1, -0.1)."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        linear.bias.copy_(torch.tensor([0.2, 0.0]))
    return Classifier(nn.Sequential(nn.Flatten(), linear), shape=(1, 1, 2), num_classes=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the runs that most pages start from: runs/plain and runs/audit-plain."""
    folder = tmp_path_factory.mktemp("docs")
    for words in command_lines(ROOT / "README.md"):
        if words[0] == "rempart":
            execute(words, folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [
        "tutorial",
        *(
            f"how-to/{page}"
            for page in (
                "add-an-objective",
                "certify",
                "compare-training",
                "detect",
                "explain",
                "defend-by-preprocessing",
                "foreign-models",
                "from-python",
                "harden",
                "models-keras",
                "models-hugging-face",
                "models-onnx",
                "medical-report",
                "one-attack",
                "own-model",
                "replay",
                "threat",
            )
        ),
    ],
)
def test_the_commands_and_programs_of_a_page_run(name: str, trained: Path, tmp_path: Path) -> None:
    if name != "tutorial":  # which trains runs/plain itself
        shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    commands = [words for words in command_lines(DOCS / f"{name}.md") if words[0] in ("rempart", "python")]
    programs = dict(blocks(DOCS / f"{name}.md", "python"))
    for title, program in programs.items():
        (tmp_path / title).write_text(program, "utf-8")
    for title, table in blocks(DOCS / f"{name}.md", "csv"):
        (tmp_path / title).write_text(table, "utf-8")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    for words in commands:
        execute(words, tmp_path)
    for title in programs:
        if ["python", title] not in commands:
            execute(["python", title], tmp_path)


def execute(words: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "rempart", *words[1:]] if words[0] == "rempart" else [sys.executable, *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    fine = (0, 1) if words[1] == "gate" else (0,)
    assert done.returncode in fine and "Traceback" not in done.stderr, f"{words}: {done.stderr}"


# ---- links


@pytest.mark.parametrize("path", WRITTEN, ids=ident)
def test_internal_links_resolve(path: Path, hooks: ModuleType) -> None:
    generated = hooks.pages()
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        if file.parent == DOCS / "results":  # the JSON files are copied there when the site is built
            file = hooks.RESULTS / file.name
        page = generated.get(str(file.relative_to(DOCS))) if file.is_relative_to(DOCS) else None
        assert page is not None or file.exists(), f"{target} in {ident(path)}"
        leaves = path.is_relative_to(DOCS) and not file.is_relative_to(DOCS) and file.parent != hooks.RESULTS
        assert not leaves, f"{target} in {ident(path)} leaves the site"
        if anchor:
            assert anchor in anchors(page or file.read_text("utf-8")), f"{target} in {ident(path)}"


def anchors(markdown: str) -> set[str]:
    found = set(re.findall(r"\{ #(\S+) \}$", markdown, flags=re.MULTILINE))
    for heading in re.findall(r"^#+ (.*)$", markdown, flags=re.MULTILINE):
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()))
    return found


def test_every_page_is_in_the_navigation(hooks: ModuleType) -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    listed = re.findall(r": (\S+\.md)$", nav, flags=re.MULTILINE)
    there = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")] + list(hooks.pages())
    assert sorted(listed) == sorted(there)


# ---- figures


CONSTANTS = {"95 %", "5 %", "25%", "75%"}
"""Shares that are part of a definition, not results: coverage of intervals, first spread of l1 steps, quartiles."""
FIGURE = re.compile(r"(\d+(?:\.\d+)?)(?: ?(%)| (?:times (?:faster|slower|as)|seconds|percentage points|ms)\b)")


@pytest.mark.parametrize("path", WRITTEN, ids=ident)
def test_a_figure_in_the_text_is_one_of_the_json_named_beside_it(path: Path) -> None:
    for line in prose(path).splitlines():
        named = re.findall(r"results/([\w.-]+\.json)", line)
        known = {value for name in named for value in figures(read_result(name))}
        for found in FIGURE.finditer(line):
            number, percent = found.groups()
            places = len(number.partition(".")[2])
            values = {f"{value * (100 if percent else 1):.{places}f}" for value in known}
            assert found[0] in CONSTANTS or number in values, f"{found[0]} of {ident(path)} is in none of {named}"


def read_result(name: str) -> Any:
    path = ROOT / "benchmarks" / "results" / name
    assert path.is_file(), f"{name} does not exist"
    return json.loads(path.read_text("utf-8"))


def figures(value: Any) -> Iterator[float]:
    """Every number of a JSON value, and k / n where there are both."""
    if isinstance(value, dict):
        if isinstance(value.get("k"), int) and value.get("n"):
            yield value["k"] / value["n"]
        for inner in value.values():
            yield from figures(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from figures(inner)
    elif isinstance(value, int | float):
        yield value


def test_figures_of_a_rate() -> None:
    rate = {"worst": {"k": 3, "n": 4, "low": 0.25}, "list": [{"ratio": 1.5}]}
    assert set(figures(rate)) == {0.75, 3, 4, 0.25, 1.5}


@pytest.mark.parametrize("path", WRITTEN, ids=ident)
def test_robust_is_no_verdict(path: Path) -> None:
    assert re.findall(r"\brobust(?:ly)?\b", prose(path), flags=re.IGNORECASE) == []


def prose(path: Path) -> str:
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def test_the_picture_is_the_report_of_the_readme_commands() -> None:
    report = store.read(DOCS / "images" / "report.json")
    assert isinstance(report.spec, AuditSpec)
    audit = next(words for words in command_lines(ROOT / "README.md") if words[:2] == ["rempart", "audit"])
    given = COMMANDS["audit"].make_context("audit", audit[2:]).params
    asked = {key: given[key] for key in ("model", "data", "threat", "out")}
    assert asked == {key: getattr(report.spec, key) for key in asked}
    assert report.complete and report.samples is not None and report.worst_case is not None
    assert report.worst_case.k == report.samples.worst_case().sum()
    assert (DOCS / "images" / "report.png").stat().st_size < 250_000


def test_committed_results_can_be_shown_and_say_how_they_were_made(hooks: ModuleType) -> None:
    shown = hooks.results()
    for path in hooks.RESULTS.glob("*.json"):
        assert f"## {path.stem} {{ #{path.stem} }}" in shown
        assert json.loads(path.read_text("utf-8"))["command"] in shown


def test_results_show_what_is_there_and_nothing_else(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    assert hooks.results() == ""
    report = json.loads((DOCS / "images" / "report.json").read_text("utf-8"))
    audit = {"question": "How far?", "command": "python a.py", "n": 454, "hardware": {"cores": "2"}, "report": report}
    nested = {"net": {"ours": {"ratio_median": 1.0625, "n": 9}, "bare": {"ratio_median": 1.0, "n": 9}}}
    (tmp_path / "a.json").write_text(json.dumps(audit), "utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"question": "How fast?", "command": "b", "results": nested}), "utf-8")
    shown = hooks.results()
    worst = report["worst_case"]
    assert "## a { #a }\n\nHow far?\n\n```sh\npython a.py\n```\n\n- Images: 454\n- Hardware: cores 2\n" in shown
    assert f"| **worst case** |  | {worst['k'] / worst['n']:.1%} [{100 * worst['low']:.1f},\N{NO-BREAK SPACE}" in shown
    for attack in report["attacks"]:
        assert f"| {attack['label']} | linf | {attack['accuracy']['k'] / worst['n']:.1%} [" in shown
    assert "|   |   | ratio median | n |" in shown and "| net | ours | 1.062 | 9 |" in shown
    assert "[The whole of it](results/b.json)" in shown
