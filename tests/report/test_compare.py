import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rempart.core.errors import DataError, SpecError
from rempart.core.stats import wilson
from rempart.report.compare import compare, compare_html, gate, named
from rempart.report.schema import Check, Report


def flags(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])


def test_differences_are_those_of_the_samples_and_inside_their_intervals(make_report: Callable[..., Report]):
    reports = {f"m{i}": make_report(seed=i, strength=0.3 + 0.1 * i) for i in range(3)}
    comparison = compare(reports)
    base = reports["m0"].samples
    assert base is not None
    seen = []
    for contrast in comparison.contrasts:
        samples = reports[contrast.name].samples
        assert samples is not None
        if contrast.measure == "clean":
            ours, theirs = flags(samples.clean), flags(base.clean)
        elif contrast.measure == "worst case":
            ours, theirs = (
                np.logical_and.reduce([flags(s.clean), *(flags(r) for r in s.right.values())]) for s in (samples, base)
            )
        else:
            ours, theirs = flags(samples.right[contrast.measure]), flags(base.right[contrast.measure])
        gap = contrast.difference
        assert gap.value == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
        assert gap.low <= gap.value <= gap.high
        error = (ours.astype(float) - theirs).std() / np.sqrt(len(ours))  # the normal interval, close at n = 500
        assert (gap.low, gap.high) == pytest.approx((gap.value - 1.96 * error, gap.value + 1.96 * error), abs=0.006)
        seen.append((contrast.name, contrast.measure))
    labels = ("clean", "fgsm", "pgd", "pgd margin", "deepfool", "worst case")
    assert seen == [(name, measure) for name in ("m1", "m2") for measure in labels]
    assert comparison.measures == labels
    assert comparison.notes == ()


def test_confidence_reaches_every_interval(make_report: Callable[..., Report]):
    reports = {"a": make_report(seed=1), "b": make_report(seed=2)}
    wide, narrow = compare(reports, confidence=0.99), compare(reports, confidence=0.5)
    clean = reports["a"].clean
    assert clean is not None
    assert wide.entries[0].accuracy["clean"] == wilson(clean.k, clean.n, 0.99)
    one, other = wide.contrast("b", "pgd"), narrow.contrast("b", "pgd")
    assert one is not None
    assert other is not None
    assert one.low < other.low <= other.high < one.high
    assert compare(reports).entries[0].accuracy["clean"] == clean


def test_a_report_compared_with_itself_differs_by_nothing(make_report: Callable[..., Report]):
    report = make_report()
    assert {(c.difference.low, c.difference.high) for c in compare({"a": report, "b": report}).contrasts} == {(0, 0)}


def test_attacks_with_other_options_are_not_compared_and_the_reader_is_told(make_report: Callable[..., Report]):
    first, second = make_report(seed=1), make_report(seed=2)
    weak = second.attacks[1].model_copy(update={"options": {"steps": 1}})
    second = second.model_copy(update={"attacks": (second.attacks[0], weak, *second.attacks[2:])})
    comparison = compare({"a": first, "b": second})
    assert "pgd" not in {c.measure for c in comparison.contrasts}
    assert "pgd margin" in {c.measure for c in comparison.contrasts}
    assert "same attacks with the same options" in comparison.notes[0]


def test_other_threats_and_partial_reports_are_named(make_report: Callable[..., Report]):
    first, second = make_report(), make_report(complete=False)
    second = second.model_copy(update={"spec": second.spec.model_copy(update={"threat": "linf:4/255"})})
    notes = " ".join(compare({"a": first, "b": second}).notes)
    assert "Interrupted, so that attacks may be missing: b." in notes
    assert "a linf:8/255, b linf:4/255" in notes


def test_what_cannot_be_compared_is_refused(make_report: Callable[..., Report], make_training: Callable[..., Report]):
    report = make_report()
    with pytest.raises(SpecError, match="two or more"):
        compare({"a": report})
    with pytest.raises(DataError, match="same samples"):
        compare({"a": report, "b": make_report(n=400)})
    with pytest.raises(DataError, match="results per sample"):
        compare({"a": report, "b": make_training()})


def test_reports_without_attacks_still_compare_on_originals(make_report: Callable[..., Report]):
    comparison = compare({"a": make_report(), "b": make_report(attacks=False, complete=False, seed=3)})
    assert [c.measure for c in comparison.contrasts] == ["clean"]
    assert "worst case" not in comparison.entries[1].accuracy


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["runs/plain", "runs/trades"], ["plain", "trades"]),
        (["a/model", "b/model"], ["a/model", "b/model"]),
        (["a/model", "a/model"], ["1 a/model", "2 a/model"]),
    ],
)
def test_names_differ(make_report: Callable[..., Report], sources: list[str], names: list[str]):
    report = make_report(n=1)
    models = [report.model.model_copy(update={"source": source}) for source in sources]
    assert list(named([report.model_copy(update={"model": model}) for model in models])) == names


PASSED = Check(name="gradients", status="passed", message="Every sample gives an input gradient.")
WARNED = PASSED.model_copy(update={"status": "warned", "message": "100% of the samples give a gradient of zero."})
REPAIRED = PASSED.model_copy(update={"status": "repaired"})
FAILED = Check(name="pixel range", status="failed", message="Pixels reach 255.")


@pytest.mark.parametrize(
    ("changes", "least", "passed", "reason"),
    [
        ({}, 0.40, True, "against the attacks run here"),
        ({}, 0.41481, True, "begins at 41.48%"),  # the interval begins at 0.414814...
        ({}, 0.41482, False, "begins below 41.48%"),
        ({}, 0.45, False, "begins below"),  # the estimate, 45.8%, is not enough
        ({}, 0.0, True, "begins at 0.00%"),
        ({"complete": False, "not_run": ("cw",)}, 0.0, False, "interrupted.*not run: cw"),
        ({"attacks": False}, 0.0, False, "no attack"),
        ({"attacks": False, "complete": False}, 0.0, False, "interrupted"),
        ({"preflight": (FAILED,)}, 0.0, False, r"too high.*\(pixel range\)"),
        ({"preflight": (FAILED, WARNED)}, 0.0, False, r"too high.*\(pixel range, gradients\)"),
        ({"preflight": (PASSED, REPAIRED)}, 0.0, True, "begins at"),
        ({"checks": (PASSED, WARNED)}, 0.0, False, r"too high.*\(gradients\)"),
        ({"checks": (FAILED,)}, 0.0, False, r"too high.*\(pixel range\)"),
        ({"checks": (PASSED,), "stamp": "valid"}, 0.0, True, "begins at"),
        ({"worst_case": None}, 0.0, False, "no attack"),
    ],
)
def test_gate(make_report: Callable[..., Report], changes: dict[str, Any], least: float, passed: bool, reason: str):
    got, words = gate(make_report(**{"preflight": (PASSED,), **changes}), least)
    assert got is passed
    assert re.search(reason, words)


def test_a_comparison_names_reports_with_doubtful_figures(make_report: Callable[..., Report]):
    sound = make_report(stamp="valid", checks=(PASSED,), preflight=())
    doubtful = make_report(stamp="invalid", checks=(FAILED,), preflight=())
    notes = compare({"a": sound, "b": doubtful}).notes
    assert [note for note in notes if "figures of" in note] == [
        "The figures of b are invalid (pixel range): read its checks first."
    ]


def test_only_an_audit_passes_the_gate(make_attack: Callable[..., Report], make_training: Callable[..., Report]):
    for report in (make_attack(), make_training()):
        assert gate(report, 0.0)[0] is False
        assert report.kind in gate(report, 0.0)[1]


@pytest.mark.parametrize("least", [-0.1, 45, float("nan")])
def test_a_gate_in_percent_is_refused(make_report: Callable[..., Report], least: float):
    with pytest.raises(SpecError, match=r"in \[0, 1\]"):
        gate(make_report(n=1), least)


def test_a_model_behind_defences_has_another_name_than_the_model_alone(make_report: Callable[..., Report]):
    plain = make_report()
    behind = plain.model_copy(
        update={"model": plain.model.model_copy(update={"defences": ("bit-depth:bits=4", "median:size=2")})}
    )
    alone, both = named([plain, behind])
    assert both == f"{alone} behind bit-depth and median"


def test_detectors_follow_the_comparison_with_all_they_hold(
    make_report: Callable[..., Report], make_detection: Callable[..., Report]
):
    reports, judged = {"a": make_report(), "b": make_report(seed=2)}, make_detection()
    bare = compare_html(compare(reports), reports)
    page = compare_html(compare(reports), reports, [judged])
    assert judged.clean is not None and judged.worst_case is not None
    shares = [judged.clean, judged.worst_case]
    for found in judged.detection:
        shares += [row.held for row in found.held if row.attack in ("none", "all of these", "knows the detector")]
    told = Counter(re.findall(r'<data value="([^"]+)">', page)) - Counter(re.findall(r'<data value="([^"]+)">', bare))
    assert Counter(repr(rate.value) for rate in shares) <= told
    assert "Detectors beside" in page and "Detectors beside" not in bare
