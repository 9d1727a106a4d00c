"""Audits of networks whose gradients or answers are no numbers somewhere within the threat."""

import pytest
import torch
from torch import Tensor, nn

from rempart.attacks.preflight import preflight
from rempart.audit import Audit, audit
from rempart.certify import ABSTAIN, Sampling, attack_smoothed, certify, predict
from rempart.core.errors import ModelError
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.report.html import page
from rempart.report.schema import AuditSpec, ModelCard, Report
from rempart.report.text import table

SHAPE = (1, 2, 2)


class Gap(nn.Module):
    """Class 1 where the mean of the pixels is above 0.4, and no answer where a pixel is below 0.1."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.where((x < 0.1).any(1), torch.nan, 50 * (x.mean(1) - 0.4))[:, None]


class Root(nn.Module):
    """Square roots of pixels: the class of the brighter half."""

    def forward(self, x: Tensor) -> Tensor:
        root = x.flatten(1).sqrt()
        return torch.stack([root[:, :2].sum(1), root[:, 2:].sum(1)], 1)


def given(net: nn.Module, x: Tensor, y: Tensor) -> tuple[Classifier, Data]:
    model = Classifier(net, shape=SHAPE, num_classes=2).eval()
    return model, Data("t", "test", torch.arange(len(x)), y, SHAPE, ("0", "1"), lambda numbers: x[numbers])


def gap(n: int = 8) -> tuple[Classifier, Data]:
    """Class 1 throughout; the first pixel is the least, 0.16 to 0.44, and 0.1 less far from where no answer is."""
    x = 0.8 + 0.1 * torch.rand((n, *SHAPE), generator=torch.Generator().manual_seed(0))
    x[:, 0, 0, 0] = 0.16 + 0.04 * torch.arange(n)
    return given(Gap(), x, torch.ones(n, dtype=torch.int64))


def run(model: Classifier, data: Data, **others: object) -> Audit:
    card = ModelCard(source="t", name="t", digest="0", parameters=0, shape=SHAPE, classes=("0", "1"))
    found = audit(model, data, AuditSpec(model="t", data="t", threat="linf:0.2", **others), card=card)  # type: ignore
    assert found is not None and found.error is None
    return found


@pytest.mark.parametrize("suite", ["fast", "quick"])
def test_an_image_without_an_answer_is_broken_and_said(suite: str) -> None:
    """The mean cannot fall to 0.4 within 0.2 (it is 0.63 or more), so that what breaks has no answer: where the first
    pixel is below 0.3."""
    model, data = gap()
    result = run(model, data, suite=suite, eight_bit=True, pairs="all")
    report = result.report
    assert report.complete and report.worst_case is not None and report.samples is not None
    first = data.batch(torch.arange(len(data))).x[:, 0, 0, 0]
    assert report.samples.worst_case().tolist() == (first >= 0.3 - 1e-6).tolist()
    told = [attack for attack in report.attacks if attack.undefined]
    assert told and all(0.06 - 1e-6 <= (attack.undefined_distance or 0) <= 0.2 + 1e-6 for attack in told)
    assert sum(cell.turned.k for cell in report.pairs) == 0  # turned into no class
    again = Report.model_validate_json(report.model_dump_json())
    assert again == report
    for shown in (table(report), page(report)):
        assert "no defined answer" in " ".join(shown.split())


def test_an_infinite_gradient_of_a_clean_image_is_a_warning_and_no_refusal() -> None:
    """Black pixels under a root. A linf budget of 0.2 breaks what it can: sqrt(0.2) in each dark pixel is 0.89 in all,
    against 2 sqrt(b - 0.2) of the bright half."""
    bright = torch.linspace(0.25, 0.9, 8)
    x = torch.zeros(8, *SHAPE)
    x[:, 0, 1] = bright[:, None]
    model, data = given(Root(), x, torch.ones(8, dtype=torch.int64))
    _, checks = preflight(model, data)
    check = next(check for check in checks if check.name == "gradients")
    assert check.status == "warned" and check.evidence["singular"] == 8 and "square root" in check.message
    result = run(model, data)
    assert result.report.samples is not None
    assert result.report.samples.worst_case().tolist() == (bright > 0.4 + 1e-4).tolist()
    assert result.report.attacks[0].singular > 0
    assert "held NaN or infinity" in " ".join(table(result.report).split())


def test_votes_without_an_answer_are_for_no_class() -> None:
    """A pixel at 0.1 is below it in half of the draws: no class has a sure majority, though all that vote say 1."""
    x = torch.full((2, *SHAPE), 0.9)
    x[0, 0, 0, 0] = 0.1
    model, data = given(Gap(), x, torch.ones(2, dtype=torch.int64))
    sampling = Sampling(sigma=0.05, samples=200, selection=20)
    found = certify(model, data, sigma=0.05, samples=200, selection=20)
    assert found.predicted.tolist() == [ABSTAIN, 1] and 60 < int(found.votes[0]) < 140
    assert predict(model, x, sigma=0.05, samples=200).tolist() == [ABSTAIN, 1]
    dark = torch.zeros(1, *SHAPE)
    with pytest.raises(ModelError, match="under noise"):
        predict(model, dark, sigma=0.001, samples=20)
    threat = Threat(norm="linf", eps=0.1)
    attacked = attack_smoothed(model, data, found, threat, "pgd", {"steps": 5}, sampling, draws=4)
    assert attacked.broken.tolist() == [False, False]
