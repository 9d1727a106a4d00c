"""Suites: which attacks an audit runs, as data that depends on the norm and the number of classes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rempart.core.errors import SpecError
from rempart.core.registry import suggestion
from rempart.core.threat import Threat

Member = tuple[str, dict[str, Any]]
"""An attack by name, with the options that differ from its defaults."""


@dataclass(frozen=True, slots=True)
class Suite:
    """Attacks in their order.

    Attributes:
        members: The attacks.
        cascade: Each runs only on the samples that all before it left standing; the verdict is the same, for less.
        notes: What a reader must know: where it differs from the protocol it is named after.
    """

    members: tuple[Member, ...]
    cascade: bool = False
    notes: tuple[str, ...] = ()


def suite(name: str, threat: Threat, num_classes: int) -> Suite:
    """The suite of that name, for this threat and number of classes.

    Raises:
        SpecError: If there is none.
    """
    _known(name)
    return SUITES[name](threat, num_classes)


def _known(name: str) -> None:
    if name not in SUITES:
        raise SpecError(
            f"a suite out of {', '.join(SUITES)}", got=repr(name), hint=suggestion(name, SUITES).strip(" ()")
        )


def without_gradients(name: str) -> Suite:
    """What is run in place of a suite on a model that gives no gradients: square, then hopskipjump.

    Raises:
        SpecError: If there is no such suite.
    """
    _known(name)
    note = (
        f"The model gives no gradients: square and hopskipjump, which need none, stand in for the suite {name}; "
        "there is no curve over budgets, and checks that need gradients are skipped."
    )
    return Suite((("square", {}), ("hopskipjump", {"steps": 20})), cascade=True, notes=(note,))


def _quick(threat: Threat, num_classes: int) -> Suite:
    """fgsm, bim, mim, pgd with two losses, deepfool: each on every sample, to compare attacks."""
    return Suite(
        (
            ("fgsm", {}),
            ("bim", {"steps": 10}),
            ("mim", {"steps": 10}),
            ("pgd", {"steps": 40}),
            ("pgd", {"steps": 40, "loss": "margin"}),
            ("deepfool", {}),
        )
    )


def _classic(threat: Threat, num_classes: int) -> Suite:
    """As quick with restarts, and with cw and ead."""
    return Suite(
        (
            ("fgsm", {}),
            ("bim", {"steps": 10}),
            ("mim", {"steps": 10}),
            ("pgd", {"steps": 40, "restarts": 2}),
            ("pgd", {"steps": 40, "loss": "margin", "restarts": 2}),
            ("deepfool", {}),
            ("cw", {"steps": 100, "search_steps": 5, "initial_const": 0.1, "learning_rate": 0.1}),
            ("ead", {"steps": 100, "search_steps": 5, "initial_const": 0.1}),
        )
    )


def _standard(threat: Threat, num_classes: int) -> Suite:
    """AutoAttack standard (Croce & Hein 2020, arXiv:2003.01690): apgd-ce, apgd-t, fab-t, square."""
    large = {"large_steps": True} if threat.norm == "l1" else {}
    aimed, notes = _aimed(num_classes, 5 if threat.norm == "l1" else 9)
    members = (
        ("apgd", {"loss": "ce", **({"restarts": 5} | large if large else {})}),
        ("apgd-t", {**aimed, **large}),
        ("fab-t", {"targets": min(9, num_classes - 1), "within": threat.eps or None}),
        ("square", {}),
    )
    return Suite(members, cascade=True, notes=notes)


def _plus(threat: Threat, num_classes: int) -> Suite:
    """AutoAttack plus: five restarts of apgd on two losses and of fab, square, apgd-t, fab-t."""
    aimed, notes = _aimed(num_classes, 9)
    spread, more = _spread_loss(num_classes)
    members = (
        ("apgd", {"loss": "ce", "restarts": 5}),
        ("apgd", {**spread, "restarts": 5}),
        ("fab", {"restarts": 5, "within": threat.eps or None}),
        ("square", {}),
        ("apgd-t", aimed),
        ("fab-t", {"targets": aimed["targets"], "within": threat.eps or None}),
    )
    return Suite(members, cascade=True, notes=(*more, *notes))


def _rand(threat: Threat, num_classes: int) -> Suite:
    """AutoAttack rand, for randomised models: apgd on two losses, each gradient a mean over 20 passes."""
    spread, notes = _spread_loss(num_classes)
    members = (("apgd", {"loss": "ce", "eot": 20}), ("apgd", {**spread, "eot": 20}))
    return Suite(members, cascade=True, notes=notes)


def _fast(threat: Threat, num_classes: int) -> Suite:
    """Ours, the default: ever longer ascents for ever fewer samples, then a short search without gradients."""
    return Suite((("cascade", {}), ("square", {"queries": 300, "rescale": True})), cascade=True)


def _aimed(num_classes: int, targets: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options of apgd-t, and what they depart from."""
    options: dict[str, Any] = {"targets": min(targets, num_classes - 1)}
    notes: list[str] = []
    if num_classes <= targets:
        notes.append(
            f"With {num_classes} classes there are {num_classes - 1} to aim at, where the protocol has {targets}."
        )
    if num_classes < 4:
        options["loss"] = "margin"
        notes.append(
            f"With {num_classes} classes the targeted dlr loss is undefined; apgd-t climbs the margin instead."
        )
    return options, tuple(notes)


def _spread_loss(num_classes: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    if num_classes >= 3:
        return {"loss": "dlr"}, ()
    return {"loss": "margin"}, ("With 2 classes the dlr loss is undefined; apgd climbs the margin instead.",)


SUITES: dict[str, Callable[[Threat, int], Suite]] = {
    "fast": _fast,
    "quick": _quick,
    "classic": _classic,
    "standard": _standard,
    "plus": _plus,
    "rand": _rand,
}
