"""Odd networks under every suite: the verdict of brute force, or a refusal in words; never valid and wrong."""

import warnings

import pytest
import torch

from audit.odd import ODD, REFUSED, audited, judged, pixels
from rempart.attacks.suites import SUITES
from rempart.core.errors import ModelError

SLOW = [name if name == "fast" else pytest.param(name, marks=pytest.mark.slow) for name in SUITES]


@pytest.mark.parametrize("suite", SLOW)
@pytest.mark.parametrize("name", list(ODD))
def test_an_odd_network_is_judged_as_brute_force_judges_it(name: str, suite: str) -> None:
    try:
        found = judged(name, suite)
    except ModelError as error:
        assert error.hint and name in MAY_BE_REFUSED, f"{name}: {error}"
        return
    assert not found.wrongly_broken, found
    if found.report.stamp == "valid":
        assert not found.wrongly_left, found
    elif suite != "rand":  # its attacks are for networks that draw: a check often breaks one image more
        assert name in MAY_BE_DOUBTED, [c for c in found.report.checks if c.status == "warned"]


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
        net, x = REFUSED[name], pixels()
        with pytest.raises(ModelError) as refused:
            audited(net(), x, torch.zeros(len(x), dtype=torch.int64), "fast")
    assert refused.value.exit_code == 2 and refused.value.hint
