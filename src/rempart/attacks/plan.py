"""Which attacks a request asks for, with which options, and at which classes they aim."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from rempart.attacks import attacks
from rempart.attacks.losses import score
from rempart.attacks.run import native
from rempart.attacks.suites import suite, without_gradients
from rempart.core.errors import SpecError
from rempart.core.model import class_number
from rempart.core.registry import suggestion
from rempart.core.threat import Threat
from rempart.report.schema import AuditSpec

EOT = 20
"""Passes whose mean gradient an attack on a random model takes, unless it was told how many."""
PAIRS = "pairs"
"""The label of all targeted attacks of an audit together."""
ALL_PAIRS = "all"
RESTARTS = 3
"""Random starts of the attack that aims: where a class is hard to reach, one path often misses it."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One attack of an audit.

    Attributes:
        label: Its name in the report.
        name: The attack.
        options: Its validated options.
        survivors: Run it only on samples that every attack before left standing.
        target: The class to reach; None: any other.
        sources: The true classes it is run on, where it has a target.
    """

    label: str
    name: str
    options: dict[str, Any]
    survivors: bool = False
    target: int | None = None
    sources: tuple[int, ...] = ()


def plan(
    spec: AuditSpec,
    threat: Threat,
    num_classes: int,
    *,
    classes: Sequence[str] = (),
    random: bool = False,
    gradients: bool = True,
) -> tuple[tuple[Planned, ...], tuple[str, ...]]:
    """The attacks an audit will run, validated, and notes on the suite.

    The suite's come first, then the named ones, then those that aim at one of the `classes` each, if pairs are asked
    for. Repeated labels are numbered. Where the model is `random`, attacks that can take mean gradients do, unless they
    were told how many. Where it gives no `gradients`, attacks that need none stand in for a suite and aim.

    Raises:
        SpecError: If a suite, an attack or an option is unknown, or a loss is undefined for so few classes.
        ThreatError: If an attack cannot work in this threat.
    """
    name = spec.suite if spec.suite is not None or spec.attacks else "fast"
    chosen = None
    if name:
        chosen = suite(name, threat, num_classes) if gradients else without_gradients(name)
    wanted = [(*member, chosen.cascade) for member in chosen.members] if chosen else []
    wanted += [(choice.name, choice.options, False) for choice in spec.attacks]
    planned: list[Planned] = []
    means: list[str] = []
    for name, given, survivors in wanted:
        entry = attacks[name]
        mean = mean_gradient(name, given) if random else {}
        options = entry.parse({**given, **mean})
        means += [name] if mean else []
        native(entry, threat, options)
        if "loss" in options:
            score(options["loss"], targeted=name.endswith("-t"), num_classes=num_classes)  # apgd-t aims at each class
        label = name if "loss" not in given else f"{name}-{given['loss']}"
        taken = sum(other.label.split(" ")[0] == label for other in planned)
        planned.append(Planned(f"{label} {taken + 1}" if taken else label, name, options, survivors))
    if spec.pairs is not None:
        name, given = aiming_attack(num_classes, gradients=gradients)
        native(attacks[name], threat)
        mean = mean_gradient(name, given) if random else {}
        planned += aimed(read_pairs(spec.pairs, classes), name, attacks[name].parse({**given, **mean}))
        means += [name] if mean else []
    return tuple(planned), (*(chosen.notes if chosen else ()), *averaged(means))


def mean_gradient(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The option by which an attack on a random model takes mean gradients (expectation over transformation).

    Empty where it has none or was told how many passes to take.

    Source:
        Athalye, Carlini, Wagner 2018, arXiv:1802.00420, section 4.2.
    """
    return {"eot": EOT} if "eot" in attacks[name].params.model_fields and "eot" not in given else {}


def averaged(names: Iterable[str]) -> tuple[str, ...]:
    """The note that these attacks took mean gradients; none where there are none of them."""
    told = ", ".join(dict.fromkeys(names))
    return (f"The model is random: {told} climbed the mean gradient of {EOT} passes (eot={EOT}).",) if told else ()


def read_pairs(text: str, classes: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Read `all` or TRUE:TARGET,TRUE:TARGET, classes by name or number, as numbers in their order.

    Raises:
        SpecError: If a class is unknown or a pair is none.
    """
    if text.strip() == ALL_PAIRS:
        return tuple(permutations(range(len(classes)), 2))
    return tuple(sorted({_pair(part.strip(), classes) for part in text.split(",")}))


def _pair(text: str, classes: Sequence[str]) -> tuple[int, int]:
    true, colon, target = text.partition(":")
    if not colon:
        raise SpecError("--pairs as all, or as TRUE:TARGET,TRUE:TARGET", got=repr(text))
    first, second = _class(true, classes), _class(target, classes)
    if first == second:
        raise SpecError("--pairs of two different classes", got=repr(text))
    return first, second


def _class(name: str, classes: Sequence[str]) -> int:
    number = class_number(name, classes)
    if number is None:
        known = f"--pairs of the classes {', '.join(classes)}, or of their numbers"
        hint = suggestion(name, [*map(str, range(len(classes))), *classes]).strip(" ()")
        raise SpecError(known, got=repr(name), hint=hint)
    return number


def aiming_attack(num_classes: int, *, gradients: bool = True) -> tuple[str, dict[str, Any]]:
    """The attack that aims, with its options: on dlr, which found most, where there are classes enough for it."""
    if not gradients:
        return "square", {}
    return "apgd", {"loss": "dlr" if num_classes >= 4 else "margin", "restarts": RESTARTS}


def aimed(pairs: Iterable[tuple[int, int]], name: str, options: Mapping[str, Any]) -> tuple[Planned, ...]:
    """One targeted attack for each class that is aimed at, on the classes that are to become it."""
    sources: dict[int, list[int]] = {}
    for true, target in pairs:
        sources.setdefault(target, []).append(true)
    return tuple(
        Planned(f"{PAIRS} {target}", name, dict(options), target=target, sources=tuple(classes))
        for target, classes in sorted(sources.items())
    )
