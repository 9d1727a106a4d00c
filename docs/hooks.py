"""The generated part of the documentation: made at build time from the code and from `benchmarks/results/*.json`.

`pages()` gives the reference as Markdown, `results()` the tables of figures. Only `on_files` and `on_page_markdown`,
which mkdocs calls, know mkdocs; the tests read the other two directly.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

import rempart
from rempart import cli, listing
from rempart.attacks import SUITES, attacks
from rempart.attacks.suites import suite
from rempart.core import errors
from rempart.core.registry import Entry, bounds_of
from rempart.core.stats import Rate
from rempart.core.threat import Threat
from rempart.data import arrays, files, tables
from rempart.detectors import detectors
from rempart.models.zoo import models
from rempart.objectives import objectives
from rempart.preprocess import preprocessors
from rempart.report import text
from rempart.report.schema import AttackResult, Report
from rempart.train.config import Settings, load_recipe, recipe_names

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MARK = "<!-- results -->"
TOLD_ELSEWHERE = {
    "[Do the defences hold?](defences.md)": ("defences", "deep_defense_mlp", "deep_defense_lenet"),
    "[Do detectors and preprocessing hold?](guarding.md)": (
        "detectors",
        "preprocessing",
        "attack_types",
        "guard_latency",
    ),
    "[What do sensitive neurons do?](explaining.md)": ("sensitivity",),
    "[The MRI story](how-to/mri.md)": ("mri_story",),
}


def on_files(files: Any, *, config: Any) -> Any:
    """Add the reference pages and the JSON files of the results to the site."""
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    for path in sorted(RESULTS.glob("*.json")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the tables of figures where the page asks for them."""
    return markdown.replace(MARK, results()) if page.file.src_uri == "results.md" else markdown


# ---- the reference


def pages() -> dict[str, str]:
    """The generated pages: path in the site to Markdown."""
    return {
        "reference/cli.md": _cli(),
        "reference/attacks.md": _attacks(),
        "reference/suites.md": _suites(),
        "reference/detectors.md": _detectors(),
        "reference/models.md": _models(),
        "reference/preprocessors.md": _preprocessors(),
        "reference/recipes.md": _recipes(),
        "reference/data.md": _data(),
        "reference/python.md": _python(),
    }


def _cli() -> str:
    group = typer.main.get_command(cli.app)
    parts = ["# Command line", group.help or "", "Every command has `--help`.", "## Exit status", _statuses()]
    for name, command in commands(group):
        context = command.make_context(name, [], resilient_parsing=True)
        rows = [_parameter(*record) for p in command.params if (record := p.get_help_record(context))]
        parts += [
            f"## {name} {{ #{name.replace(' ', '-')} }}",
            command.help or "",
            f"```text\nrempart {_plain_usage(command.get_usage(context))}\n```",
            table(("argument or option", "meaning", "default and bounds"), rows),
        ]
    return "\n\n".join(parts) + "\n"


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """The commands with the words they are called by; those of a group instead of the group."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _plain_usage(usage: str) -> str:
    return usage.removeprefix("Usage: ").replace("{", "").replace("}", "").strip()


def _parameter(left: str, right: str) -> Sequence[str]:
    """Split `meaning  [default: 0; x>=1]`, as `--help` prints it."""
    meaning, _, bounds = f"  {right}".partition("  [") if right.endswith("]") else (right, "", "]")
    return _code(left), meaning.strip(), _code(bounds.removesuffix("]"))


def _statuses() -> str:
    kinds = {kind.exit_code: kind for kind in (errors.Cancelled, errors.SpecError, errors.RempartError)}
    meanings = {
        0: "done",
        1: "`rempart gate`: the audit does not pass",
        kinds[2].exit_code: "the request was wrong: the message says what was expected, what came and what to try",
        kinds[3].exit_code: "the run failed",
        kinds[130].exit_code: "interrupted; what was finished is kept",
    }
    return table(("status", "meaning"), [(str(status), meaning) for status, meaning in meanings.items()])


def _attacks() -> str:
    parts = [
        "# Attacks",
        "The norm that stands first is the attack's own. An option is given as `-o key=value`, or inside "
        "`--attack NAME:key=value,key=value`. Formulas, sources and differences are in [Methods](../methods.md).",
    ]
    for entry in attacks:
        traits = entry.traits
        facts = [f"Norms: {', '.join(traits.norms)}"]
        facts += ["can aim at a class" if traits.targeted else "untargeted only"]
        facts += ["looks for the smallest perturbation" if traits.minimum else "works within a budget"]
        facts += ["draws random numbers" if traits.random else "draws nothing"]
        facts += [f"asks the model for {traits.access}"] + ["one perturbation for all images"] * traits.joint
        parts += _entry(entry, "; ".join(facts) + ".")
    return "\n\n".join(parts) + "\n"


def _suites() -> str:
    parts = [
        "# Suites",
        "A suite is a list of attacks with their options: `rempart audit ... --suite NAME`. Options that are not named "
        "have their [defaults](attacks.md). Shown is what runs in linf at 0.1 on ten classes; in l1, and for fewer "
        "classes, some options differ, and the report says where a suite departs from the protocol it is named after. "
        "A minimum-norm attack that does not know the norm of the threat searches in its own and is judged in that of "
        "the threat. The worst case of an audit is taken over all its attacks, sample by sample.",
    ]
    for name, make in SUITES.items():
        chosen = suite(name, Threat(norm="linf", eps=0.1), 10)
        rows = [
            (f"[{attack}](attacks.md#{attack})", _code(", ".join(f"{k}={v}" for k, v in options.items())))
            for attack, options in chosen.members
        ]
        how = "Each attack runs on the samples that all before it left standing." if chosen.cascade else ""
        told = " ".join([*(inspect.getdoc(make) or "").split("\n"), how])
        parts += [f"## {name} {{ #{name} }}", told[:1].upper() + told[1:], table(("attack", "options"), rows)]
    return "\n\n".join(parts) + "\n"


def _detectors() -> str:
    parts = [
        "# Detectors",
        "How suspicious an image is: larger scores are more so. The threshold is set on clean images that a detector "
        "was not fitted on, for a false-positive rate. Facts hold for the default options. Formulas, sources and "
        "differences are in [Methods](../methods.md#detectors).",
    ]
    for entry in detectors:
        facts = listing.detector_traits(entry.function())
        parts += _entry(entry, f"{facts[:1].upper()}{facts[1:]}.")
    return "\n\n".join(parts) + "\n"


def _models() -> str:
    parts = [
        "# Models",
        "Networks that `rempart train --model NAME` builds for any image shape and number of classes, behind their "
        "normalisation. Other networks are audited through [a function of yours](../how-to/own-model.md).",
    ]
    for entry in models:
        parts += _entry(entry)
    return "\n\n".join(parts) + "\n"


def _preprocessors() -> str:
    parts = [
        "# Preprocessing defences",
        "What `--defence NAME:key=value,key=value` puts in front of a model. They work on images in [0, 1], whatever "
        "the box of the model. Formulas and sources are in [Methods](../methods.md#preprocessing-defences), how to use "
        "and judge them on [a page of its own](../how-to/defend-by-preprocessing.md).",
    ]
    for entry in preprocessors:
        slope = "its own gradient is used" if entry.traits.differentiable else "a substitute gradient is used"
        parts += _entry(entry, f"{'Random' if entry.traits.random else 'Draws nothing'}; {slope} by attacks.")
    return "\n\n".join(parts) + "\n"


def _recipes() -> str:
    told = _sections(Settings)["Attributes"]
    parts = [
        "# Recipes",
        "A recipe is a TOML file: an objective, an optimiser and a schedule. `rempart train --recipe NAME` takes one "
        "of the packaged ones, `--recipe FILE.toml` one of yours, and `-o key=value` overrides a key of either.",
    ]
    for name in recipe_names():
        recipe = load_recipe(name).model_dump()
        rows = [(_code(k), _code(_value(v))) for k, v in recipe.items() if k not in ("summary", "options")]
        rows += [(_code(k), _code(_value(v))) for k, v in recipe["options"].items()]
        parts += [f"## {name} {{ #{name} }}", f"{recipe['summary']}.", table(("key", "value"), rows)]
    parts += ["## Keys of every recipe { #keys }", _options(Settings.model_fields, told)]
    parts += ["## Objectives { #objectives }", "What a training run minimises. Their options are keys of the recipe."]
    for entry in objectives:
        parts += _entry(entry, level=3, prefix="objective-")
    return "\n\n".join(parts) + "\n"


def _data() -> str:
    rows = [(_code(form), meaning) for form, meaning in listing._DATA]
    return "\n\n".join(
        [
            "# Data",
            "What `--data` takes. Training reads the train split; everything else reads the test split unless the "
            "spec names another.",
            table(("form", "meaning"), rows),
            "## In detail",
            "::: rempart.data.open_data",
            "::: rempart.data.tables.with_patients",
            "::: rempart.data.samples.Data",
            "::: rempart.data.samples.Batch",
            "## Limits",
            "Archives and images are untrusted input. The limits are constants.",
            *(
                f"::: {m.__name__}.{name}"
                for m in (arrays, tables, files)
                for name in vars(m)
                if name.startswith("MAX_")
            ),
            "",
        ]
    )


def _python() -> str:
    """Public names by their homes, then what they are made of."""
    public = [getattr(rempart, name) for name in rempart.__all__]
    parts = [
        "# Python",
        "`import rempart` gives the names of the first section and loads them on first use. `open_data` and `Data` are "
        "on [the page about data](data.md).",
        "## rempart",
        *(f"::: {o.__module__}.{o.__qualname__}" for o in public if not o.__module__.startswith("rempart.data")),
    ]
    for title, names in _FURTHER.items():
        parts += [f"## {title}", *(f"::: rempart.{name}" for name in names)]
    return "\n\n".join(parts) + "\n"


_FURTHER = {
    "Requests": [
        f"report.schema.{name}" for name in ("AuditSpec", "AttackSpec", "TrainSpec", "CertifySpec", "DetectSpec")
    ]
    + [f"report.schema.{name}" for name in ("AttackChoice", "DefenceChoice", "DetectorChoice")],
    "What a report holds": [
        *(f"report.schema.{name}" for name in ("AttackResult", "NormStats", "Check", "Curve", "Example", "Samples")),
        *(f"report.schema.{name}" for name in ("ModelCard", "DataCard", "Epoch", "Certificate", "Bracket")),
        *(f"report.schema.{name}" for name in ("Detection", "Separation", "Held")),
        *(f"report.schema.{name}" for name in ("Similarity", "Groups", "GroupAccuracy")),
        *(f"core.stats.{name}" for name in ("Rate", "Difference", "wilson", "paired_bootstrap", "median_interval")),
        *(f"core.stats.{name}" for name in ("Auroc", "auroc", "Mean", "bootstrap_mean")),
        *(f"attacks.similarity.{name}" for name in ("psnr", "ssim")),
    ],
    "Reports on disk, comparison, gate": [
        *(f"report.store.{name}" for name in ("read", "read_spec", "write")),
        *(f"report.compare.{name}" for name in ("compare", "gate")),
    ],
    "The audit": ["audit.audit", "attacks.preflight.preflight", "audit.curves.sweep", "audit.curves.from_distances"],
    "Certification": [f"certify.{name}" for name in ("certify", "predict", "smoothed", "Certificates", "covering")],
    "Preprocessing defences": [
        *(f"preprocess.catalogue.{name}" for name in ("defended", "described", "bpda", "Traits", "preprocessors")),
    ],
    "Adding an attack, a model, an objective": [
        *(f"attacks.catalogue.{name}" for name in ("Attack", "Traits", "attacks")),
        *(f"attacks.losses.{name}" for name in ("score", "climb_direction", "reached", "surely_reached")),
        *(f"core.repro.{name}" for name in ("Draws",)),
        *(f"core.registry.{name}" for name in ("Registry", "Entry")),
        "models.zoo.build",
        *(f"objectives.catalogue.{name}" for name in ("Objective", "Loss")),
    ],
    "Detectors": [
        *(f"detectors.fitted.{name}" for name in ("fit", "calibrate", "save", "load", "Fitted", "Card", "Threshold")),
        *(f"detectors.catalogue.{name}" for name in ("Detector", "Learning", "Fit", "Score", "Name", "detectors")),
    ],
    "Explanation": [
        *(f"explain.run.{name}" for name in ("explain",)),
        *(f"explain.sensitivity.{name}" for name in ("layers_of", "top", "jaccard")),
        *(f"explain.contribution.{name}" for name in ("Pairs", "effects", "against", "pull")),
        *(f"core.features.{name}" for name in ("Moved", "moved", "blocks", "watched")),
        *("explain.pictures.illustrate", "explain.prune.prune", "explain.prune.prune_model"),
    ],
    "A guard": [f"guard.{name}" for name in ("Guarded", "Prediction", "guard", "save_guard", "load_guard")],
    "Progress": ["core.events.Event", "core.events.Notify"],
    "Errors": [f"core.errors.{name}" for name, kind in vars(errors).items() if inspect.isclass(kind) and name != "Any"],
}


def _entry(entry: Entry[Any, Any], facts: str = "", *, level: int = 2, prefix: str = "") -> list[str]:
    """A registered function: what it does, its options, and the other sections of its docstring."""
    told = _sections(entry.function)
    parts = [f"{'#' * level} {entry.name} {{ #{prefix}{entry.name} }}", told[""], facts]
    parts += [_options(entry.params.model_fields, told.get("Args", ""))]
    parts += [f"**{name}.** {_flat(told[name])}" for name in ("Returns", "Raises", "Source") if name in told]
    return [part for part in parts if part]


def _options(fields: Mapping[str, Any], told: str) -> str:
    meanings = dict(_items(told))
    rows = [
        (_code(key), _code(_value(field.default)), _code(bounds_of(field)), meanings.get(key, ""))
        for key, field in fields.items()
    ]
    return table(("option", "default", "values", "meaning"), rows) if rows else "No options."


def _value(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else f"{value}"


def _sections(documented: Any) -> dict[str, str]:
    """The sections of a Google docstring, indented as they stand; the text before them under the empty name."""
    parts = re.split(r"^([A-Z][a-z]+):$", inspect.getdoc(documented) or "", flags=re.MULTILINE)
    return {name: inspect.cleandoc(body) for name, body in zip(["", *parts[1::2]], parts[::2], strict=True)}


def _items(section: str) -> Iterator[tuple[str, str]]:
    for item in re.split(r"\n(?=\w)", section):
        name, _, meaning = item.partition(": ")
        yield name, _flat(meaning)


def _flat(lines: str) -> str:
    return " ".join(lines.split())


# ---- the results


def results() -> str:
    """One section per JSON file there is; nothing about those there are not."""
    return "\n\n".join(_result(path) for path in sorted(RESULTS.glob("*.json")))


def _result(path: Path) -> str:
    body = json.loads(path.read_text("utf-8"))
    facts = [("Result", body.get("result")), ("Note", body.get("note")), ("Date", str(body.get("date", ""))[:10])]
    facts += [("Images", body.get("n")), ("Seed", body.get("seed")), ("Hardware", _hardware(body))]
    parts = [f"## {path.stem} {{ #{path.stem} }}", str(body.get("question", ""))]
    if body.get("command"):
        parts += [f"```sh\n{body['command']}\n```"]
    parts += ["\n".join(f"- {name}: {value}" for name, value in facts if value not in (None, ""))]
    if "report" in body:
        parts += [_report(Report.model_validate(body["report"]))]
    if pages := [page for page, stems in TOLD_ELSEWHERE.items() if path.stem.startswith(stems)]:
        parts += [f"Its tables are on a page of their own: {pages[0]}"]
    elif "results" in body:
        parts += [_grid(body["results"])]
    return "\n\n".join(part for part in [*parts, f"[The whole of it](results/{path.name})"] if part)


def _hardware(body: Mapping[str, Any]) -> str:
    known = {**body.get("hardware", {}), **body.get("versions", {})} if _is_flat(body.get("hardware", {})) else {}
    named = ("processor", "cores", "threads", "accelerator", "python", "torch", "rempart")
    return ", ".join(f"{key} {known[key]}" for key in named if key in known)


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and not any(isinstance(v, Mapping | list) for v in value.values())


def _report(report: Report) -> str:
    """The table of a report, and the options of its attacks under it."""
    rounded = any(attack.eight_bit for attack in report.attacks)
    sizes = any(attack.norms for attack in report.attacks)

    def row(name: str, accuracy: Rate | None, norm: str = "", *rest: str) -> Sequence[str]:
        return name, norm, _rate(accuracy), *(rest or [""] * (2 + rounded + sizes))

    rows = [row("clean", report.clean)]
    for attack in report.attacks:
        cells = [f"{attack.success.value:.1%}" if attack.success else ""]
        cells += [_rate(attack.eight_bit)] * rounded
        cells += [_median(attack)] * sizes
        rows += [row(attack.label, attack.accuracy, attack.norm, *cells, f"{attack.queries:,}")]
    rows += [row("**worst case**", report.worst_case)]
    header = ("attack", "norm", "accuracy", "broken", *["8-bit"] * rounded, *["median size"] * sizes, "queries")
    title = f"{report.title}, {text.where(report)}." if report.attacks else f"{report.title}."
    options = (
        (a.label, ", ".join(f"{key}={_value(value)}" for key, value in a.options.items())) for a in report.attacks
    )
    return "\n\n".join([title, table(header, rows), "\n".join(f"- {label}: {_code(told)}" for label, told in options)])


def _median(attack: AttackResult) -> str:
    if attack.norms is None:
        return ""
    return "not reached" if attack.norms.median is None else f"{attack.norms.median:.3g}"


def _rate(rate: Rate | None) -> str:
    return "" if rate is None else f"{rate.value:.1%} " + text.interval(rate).replace(" ", "\N{NO-BREAK SPACE}")


def _grid(value: Any) -> str:
    """Nested figures as one table: a row for each innermost group of plain values."""
    rows = list(_rows(value, ()))
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    depth = max((len(path) for path, _ in rows), default=0)
    cells = [[*path, *[""] * (depth - len(path)), *(_cell(row.get(key, "")) for key in columns)] for path, row in rows]
    return table([*[" "] * depth, *(column.replace("_", " ") for column in columns)], cells) if rows else ""


def _rows(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if isinstance(value, list):
        for item in value:
            yield from _rows(item, path)
    elif isinstance(value, Mapping):
        plain = {k: v for k, v in value.items() if not isinstance(v, Mapping | list)}
        if plain:
            yield path, plain
        for key, inner in value.items():
            if key not in plain:
                yield from _rows(inner, (*path, str(key)))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the page about training methods makes its own with it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell_text, line))} |" for line in lines)


def _cell_text(words: str) -> str:
    """Escape bars, but not in code, where they are no border and the escape would show."""
    return re.sub(r"`[^`]*`|\|", lambda found: "\\|" if found[0] == "|" else found[0], words)


def _code(words: str) -> str:
    return f"`{words}`" if words else ""
