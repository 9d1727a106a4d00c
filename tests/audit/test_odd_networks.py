"""Odd networks under every suite: the verdict of brute force, or a refusal in words; never valid and wrong."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from audit.odd import EPS, ODD, REFUSED, classifier, narrowest, pixels
from rempart.attacks.suites import SUITES
from rempart.audit import audit
from rempart.core.data import Data
from rempart.core.errors import ModelError
from rempart.core.model import placed
from rempart.core.types import Images, Labels
from rempart.report.schema import AuditSpec, ModelCard, Report

COMPLETE = ("fast", "standard", "plus")
SLOW = [name if name == "fast" else pytest.param(name, marks=pytest.mark.slow) for name in SUITES]


def audited(net: nn.Module, x: Images, y: Labels | None, suite: str) -> Report:
    model = classifier(net)
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    data = Data("odd", "test", torch.arange(len(x)), y, model.shape, model.class_names, lambda numbers: x[numbers])
    card = ModelCard(source="", name="", digest="", parameters=0, shape=model.shape, classes=model.class_names)
    spec = AuditSpec(model="", data="", threat=f"linf:{EPS}", suite=suite, sweep=False)
    result = audit(model, data, spec, card=card)
    assert result is not None and result.error is None and result.report.complete
    return result.report


@pytest.mark.parametrize("suite", SLOW)
@pytest.mark.parametrize("name", list(ODD))
def test_an_odd_network_is_judged_as_brute_force_judges_it(name: str, suite: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantisation and reentrant checkpoints; users have both
        net = ODD[name]()
        truth = classifier(net, "probabilities" if name in SHARES else None)
        x = pixels(black=name != "logarithm")
        with torch.no_grad():
            z = truth(placed(truth, x))
            y = z.argmax(1)
            least = narrowest(truth, x, y, EPS)
        try:
            report = audited(net, x, y, suite)
        except ModelError as error:
            assert error.hint and name in MAY_BE_REFUSED, f"{name}: {error}"
            return
    assert report.samples is not None and report.stamp is not None
    stands = torch.from_numpy(report.samples.worst_case())
    sure = 1e-3 * float(z.double().abs().amax())
    assert bool(stands[least > sure].all()), "broken where nothing can be"
    if report.stamp == "valid" and suite in COMPLETE:
        assert not bool(stands[least < -sure].any()), f"valid, but {int(stands.sum())} are left: {least}"
    assert report.stamp == "valid" or name in MAY_BE_DOUBTED, [c for c in report.checks if c.status == "warned"]


SHARES = ("one probability", "one output between 0 and 1")
MAY_BE_REFUSED = ("rounded", "quantised weights", "list of members", "reentrant checkpoint")
MAY_BE_DOUBTED = (
    *("quantiser", "rounded", "partly rounded", "wrong gradient", "partly detached", "quantised weights"),
    *("saturated softmax", "huge logits"),  # a plain cross-entropy sees no gradient there
    *("square root", "power"),  # infinite gradients at black pixels, which the preflight reports
    *("unit length", "hue", "angle"),  # some images withstand every gradient, whatever the budget
    "in place",  # most pixels are cut, so that nothing depends on them
)


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_network_without_a_verdict_is_refused_in_words(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net: Callable[[], nn.Module] = REFUSED[name]
        with pytest.raises(ModelError) as refused:
            audited(net(), pixels(), None, "fast")
    assert refused.value.exit_code == 2 and refused.value.hint
