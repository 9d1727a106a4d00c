"""Every registered attack, in each of its norms, against every check; and what single attacks claim to be equal to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import toys
from contracts.conformance import CASES, CHECKS, AttackEntry
from rempart.attacks import attack_batch, attacks
from rempart.core.threat import NORMS, Norm, Threat

PAIRS = [(entry, norm) for entry in attacks for norm in entry.traits.norms]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("entry", "norm"), PAIRS, ids=[f"{entry.name}-{norm}" for entry, norm in PAIRS])
def test_conformance(entry: AttackEntry, norm: Norm, check: Callable[[AttackEntry, Norm], None]) -> None:
    check(entry, norm)


def test_every_row_of_the_table_is_an_attack() -> None:
    assert set(CASES) <= {entry.name for entry in attacks}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fgsm", {}),
        ("bim", {"steps": 1}),
        ("bim", {"steps": 1, "keep": "last"}),
        ("mim", {"steps": 1}),
        ("pgd", {"steps": 1, "random_start": False, "step": None}),
    ],
)
def test_one_step_is_fgsm(name: str, options: dict[str, Any], classes: int, norm: Norm) -> None:
    """x + eps g / |g|, with g the gradient of torch's own cross-entropy: its sign, its direction, its largest entry."""
    for model in (toys.linear(classes=classes), toys.smooth(classes=classes).double()):
        x = toys.images(model.shape).to(next(model.parameters()).dtype)
        y, eps = toys.labels(model, x), 0.03
        (g,) = torch.autograd.grad(cross_entropy(model(x.requires_grad_()), y, reduction="sum"), x)
        x, g = x.detach(), g.flatten(1)
        largest = torch.nn.functional.one_hot(g.abs().argmax(1), g.shape[1])
        step = {"linf": g.sign(), "l2": g / g.norm(dim=1, keepdim=True), "l1": g.sign() * largest}[norm]
        expected = x + eps * step.view_as(x)  # the box is out of reach
        options = {**options, "step": eps} if "step" in options else options
        outcome = attack_batch(model, x, y, Threat(norm=norm, eps=eps), name, options)
        torch.testing.assert_close(outcome.x_adv, expected, rtol=0, atol=1e-7)
