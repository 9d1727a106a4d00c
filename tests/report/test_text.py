import re
from collections.abc import Callable

import pytest

from rempart.core.stats import Mean, wilson
from rempart.core.threat import Threat
from rempart.report.compare import compare
from rempart.report.html import page
from rempart.report.schema import ALL, KNOWS, Check, GroupAccuracy, Groups, Report, Similarity
from rempart.report.text import WIDTH, amount, compare_table, interval, judged_on, limits, stamp, table, verdict
from report.conftest import report_of


def columns(text: str) -> list[dict[str, str]]:
    """The grid of a table, cut at the rule under its header."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if re.fullmatch(r"-+(  -+)+", line))
    spans = [match.span() for match in re.finditer(r"-+", lines[at])]
    header = [lines[at - 1][a:b].strip() for a, b in spans]
    rows = [line for line in lines[at + 1 :] if line]
    for line in rows:  # nothing stands between the columns
        assert all(not line[b : b + 2].strip() for _, b in spans)
    return [dict(zip(header, (line[a:b].strip() for a, b in spans), strict=True)) for line in rows]


def test_tables_are_narrow_printable_and_say_the_verdict(any_report: Report):
    text = table(any_report)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(c.isprintable() or c == "\n" for c in text)
    words = " ".join(text.split())
    assert stamp(any_report) in words
    assert verdict(any_report) in words


def test_columns_hold_the_figures_of_the_report(make_report: Callable[..., Report]):
    report = make_report()
    rows = {row["attack"]: row for row in columns(table(report))}
    assert list(rows) == ["clean", *(a.label for a in report.attacks), "worst case"]
    for attack in report.attacks:
        assert attack.success is not None
        assert attack.eight_bit is not None
        row, rate = rows[attack.label], attack.accuracy
        assert row["accuracy"] == f"{rate.k / rate.n:.1%}"
        assert row["95% interval"] == f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
        assert row["broken"] == f"{attack.success.k / attack.success.n:.1%}"
        assert row["8-bit"] == f"{attack.eight_bit.k / attack.eight_bit.n:.1%}"
        assert row["queries"] == f"{attack.queries:,}"
    assert rows["deepfool"]["median"] == "0.412"
    assert columns(table(make_report(minimum_found=0.1)))[4]["median"] == "inf"


def test_long_labels_are_cut_and_keep_the_width(make_report: Callable[..., Report]):
    report = make_report()
    long = report.attacks[0].model_copy(update={"label": "a" * 150})
    text = table(report.model_copy(update={"attacks": (long, *report.attacks[1:])}))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert columns(text)[1]["attack"].endswith("a…")


def test_a_terminal_is_not_moved_by_a_name(make_report: Callable[..., Report]):
    text = table(make_report(name="\x1b[2J\x07evil", notes=("line\r\x1b]0;title",)))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "?[2J?evil" in text


def test_epochs_are_the_last_ones(make_training: Callable[..., Report]):
    report = make_training(40)
    rows = columns(table(report))
    assert [row["epoch"] for row in rows] == [*map(str, range(29, 32)), "* 32", *map(str, range(33, 41))]
    assert rows[-1]["validation"] == f"{report.epochs[-1].accuracy:.1%}"


def test_a_training_tells_what_its_accuracies_were_measured_on_and_what_it_cost(make_training: Callable[..., Report]):
    report = make_training()
    training = report.training
    assert training is not None
    text = " ".join(table(report).split())
    for words in (
        "objective: trades (beta=6, threat=linf:0.1)",
        "recipe: trades: epochs=30, learning_rate=0.05 kept:",
        "the weights of epoch 24",
        "4,500 to learn from, 500 to choose the epoch by",
        "1,485,000 images sent backward, 1,620,000 forward, in 96.3 seconds",
    ):
        assert words in text
    assert judged_on(report) == "validation"
    without = training.model_copy(update={"validation_images": 0})
    assert judged_on(report.model_copy(update={"training": without})) == "training"
    assert judged_on(report.model_copy(update={"training": None})) == "test"


def test_compare_table_holds_shares_and_differences(make_report: Callable[..., Report]):
    reports = {"plain": make_report(seed=1), "b" * 120: make_report(seed=2, strength=0.2)}
    comparison = compare(reports)
    text = compare_table(comparison)
    assert max(map(len, text.splitlines())) <= WIDTH
    rows = [line.split() for line in text.splitlines() if line.startswith("clean")]
    gap = comparison.contrast("b" * 120, "clean")
    assert gap is not None
    assert f"{100 * gap.value:+.1f}" in rows[1]
    assert len([line for line in text.splitlines() if "%" in line and "[" in line]) == 2 * len(comparison.measures)


VERDICTS = {
    "full": (
        {},
        "At linf 8/255 (0.0314), the attacks run here left 45.8% [41.5, 50.2] of 500 images rightly classified. "
        "This is an upper bound: a stronger attack can only lower it.",
    ),
    "partial": ({"complete": False, "not_run": ("cw",)}, "the attacks finished so far left 45.8%"),
    "no attack": ({"attacks": False, "complete": False}, "No attack was finished. Without an attack, 93.8%"),
    "one": ({"n": 1}, "left 0.0% [0.0, 79.3] of 1 image rightly"),
    "failed": (
        {
            "attacks": False,
            "complete": False,
            "preflight": (Check(name="range", status="failed", message="Pixels reach 255."),),
        },
        "The audit stopped before any attack: Pixels reach 255.",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_in_golden_words(make_report: Callable[..., Report], case: str):
    changes, words = VERDICTS[case]
    assert words in verdict(make_report(**changes))


def test_verdicts_of_attacks_and_trainings(make_attack: Callable[..., Report], make_training: Callable[..., Report]):
    report = make_attack()
    spec = report.spec.model_copy(update={"target": "nearest"})
    assert verdict(report).startswith("pgd at linf 8/255 (0.0314) broke 49.5% [45.0, 54.0] of the 469 images")
    assert "moved to the target" in verdict(report.model_copy(update={"spec": spec}))
    assert verdict(make_training(1, training=None)) == "After 1 epoch, the accuracy is 32.3%."
    assert verdict(make_training(30)).startswith(
        "The weights of epoch 24 of 30 were kept: 98.5% of the validation images are rightly classified and 51.2% "
        "under a short attack. On the test images, 93.8% [91.3, 95.6] of 500 images are rightly classified."
    )
    assert verdict(make_training(0)) == "No epoch was finished."


@pytest.mark.parametrize(
    ("threat", "words"),
    [
        (Threat(norm="linf", eps=8 / 255), "8/255 (0.0314)"),
        (Threat(norm="linf", eps=0.1), "0.1"),
        (Threat(norm="linf", eps=0), "0"),
        (Threat(norm="linf", eps=8 / 255, low=-1), "0.0314 in the box [-1, 1]"),
        (Threat(norm="l2", eps=0.5), "0.5"),
        (Threat(norm="l2"), "any size"),
    ],
)
def test_a_budget_is_told_in_its_units(threat: Threat, words: str):
    assert amount(threat) == words


def test_limits_name_what_this_report_left_out(make_report: Callable[..., Report]):
    report = make_report(complete=False, not_run=("cw",))
    told = " ".join(limits(report))
    assert "not run: cw" in told
    assert "50 steps and 1 restart;" in told
    assert "followed gradients" in told
    assert "8-bit" not in told
    blind = report.attacks[0].model_copy(update={"gradients": 0, "eight_bit": None})
    told = " ".join(limits(report.model_copy(update={"attacks": (blind,)})))
    assert "followed gradients" not in told
    mixed = report.model_copy(update={"attacks": (blind, *report.attacks[1:])})
    assert "followed gradients" not in " ".join(limits(mixed))
    assert "8-bit" in told


def test_a_certificate_is_about_the_smoothed_model_and_bracketed_where_there_is_a_threat():
    report, alone = report_of("certificate"), report_of("certificate without threat")
    assert report.certificate is not None and report.certificate.bracket is not None
    bracket = report.certificate.bracket
    rows = {row["accuracy"]: row["share"] for row in columns(table(report))}
    assert rows["lower bound at linf 2/255 (0.00784)"] == f"{bracket.lower.value:.1%}"
    assert rows["upper bound at linf 2/255 (0.00784)"] == f"{bracket.upper.value:.1%}"
    assert rows["certified at l2 0.25"] == f"{report.curves[0].accuracy[2].value:.1%}"
    assert "smoothed model lies between" in verdict(report) and "smoothed model" not in verdict(alone)
    for told in (" ".join(limits(report)), " ".join(limits(alone))):
        assert "Nothing is certified about the model inside" in told and "No certificate was computed" not in told
    assert "Certified and yet broken: 1 image." in " ".join(limits(report))
    assert "No threat was given" in " ".join(limits(alone))


def test_detectors_are_told_by_what_is_held_first_of_all_under_who_knows():
    report = report_of("detection")
    text = table(report)
    alone, first, second = (row for row in columns("\n\n".join(text.split("\n\n")[1:2])))
    assert (first["detector"], second["detector"]) == ("lid", "attack-type")
    assert list(first) == ["detector", "none", KNOWS, ALL, "false alarms"]
    assert report.clean is not None
    assert (alone["detector"], alone["false alarms"], alone[KNOWS]) == ("no detector", "", "")
    assert alone["none"].startswith(f"{report.clean.value:.1%}") and alone[ALL].startswith("4.0%")
    told = {"false alarms": 51 / 475, "none": 0.9, ALL: 0.4, KNOWS: 0.06}
    assert {key: first[key].split(" ")[0] for key in told} == {key: f"{value:.1%}" for key, value in told.items()}
    rows = columns(text.split("\n\n")[2])
    assert [row["attack"] for row in rows[3:]] == ["fgsm (learnt)", "pgd (learnt)", "fgsm at 0.1"]
    area = report.detection[0].separations[0].auroc
    assert rows[0]["area under curve"] == f"{area.value:.3f} [{area.low:.3f}, {area.high:.3f}]"
    assert rows[0]["caught at 1%"].startswith("20.0%") and rows[0]["caught at 5%"].startswith("50.0%")
    assert "Under an attacker who knows it, the best, lid, holds 6.0%" in verdict(report)
    assert "an upper bound; the model alone keeps 4.0%." in verdict(report) and "At linf 8/255" in verdict(report)
    assert "holds 40.0%" in verdict(report), "the best of the blind figures is named too"
    for alone, adds in ((29, True), (30, False), (31, False)):
        beside = verdict(report.model_copy(update={"worst_case": wilson(alone, 500)}))
        assert beside.endswith(f"keeps {alone / 500:.1%}{'' if adds else ': no detector adds anything'}.")
    blind = verdict(report_of("detection without who knows"))
    assert "says little" in blind and "The model alone keeps 4.0% under the same attacks" in blind
    assert verdict(report.model_copy(update={"worst_case": None})).endswith(", an upper bound.")
    assert "No detector was judged" in verdict(report_of("no detection"))
    told = " ".join(limits(report_of("detection cut short")))
    assert "not run: knn" in told and "stronger one can only hold less" in told


def test_an_explanation_is_told_by_its_layers_and_its_tests():
    report = report_of("explanation")
    plain, other = report.explained
    blocks = table(report).split("\n\n")
    layers = columns(blocks[2])
    assert [row["layer"] for row in layers] == ["block1", "block2"]
    for row, layer in zip(layers, plain.layers, strict=True):
        n = len(layer.absolute)
        assert row["neurons"] == str(n)
        assert row["absolute"] == f"{sum(layer.absolute) / n:.3g}"
        assert row["relative"] == f"{layer.overall:.3g}"
        assert row["agreement"] == f"{layer.agreement:+.2f}"
        assert "shared rel." not in row
    effects = columns(blocks[3])
    assert len(effects) == len(plain.effects) == 19
    for row, effect in zip(effects, plain.effects, strict=True):
        assert (row["layer"], row["test"], row["before"]) == (effect.layer, effect.test, "50.0%")
        told = (row["most sensitive"], row["random"], row["least"])
        assert told == tuple(f"{rate.value:.1%}" for rate in (effect.sensitive, effect.random, effect.least))
        assert row["most - random"] == f"{100 * effect.gap.value:+.1f} [+1.0, +30.0]"
    assert columns(blocks[4])[1] == {"layer": "block2", "shared with": "fgsm", "jaccard": "0.25", "by chance": "0.05"}
    assert columns(blocks[6])[1]["shared rel."] == "0.14"
    assert blocks[5].splitlines()[0].startswith("pgd-at: ") and f"{other.attacked.value:.1%} under attack" in blocks[5]


def test_the_verdict_on_neurons_rests_on_the_clean_values_put_back_in_all_layers():
    report = report_of("explanation")
    words = verdict(report)
    assert words.startswith("At linf 8/255 (0.0314), pgd (steps=10) left 30.0% [24.1, 36.7] of 200 images rightly")
    effect = next(e for e in report.explained[0].effects if (e.layer, e.test) == ("all layers", "restored"))
    told = f"{effect.sensitive.value:.1%} of 64 attacked images are right; of as many at random, 54.0%"
    assert f"most sensitive 10% of the neurons of all layers put back, {told}" in words
    assert "the sensitive neurons carry more of the wrong prediction" in words
    anew = next(e for e in report.explained[0].effects if e.test == "zero, attacked anew")
    told = f"leaves {anew.sensitive.value:.1%} of 64 images right; without as many at random {anew.random.value:.1%} ("
    assert f"Without them, the suite fast {told}" in words and "of the whole model 50.0%." in words
    assert f"For others: pgd-at: 45.0% left, moved by {report.explained[1].mean_relative:.3g}" in words
    for low, high, said in ((-0.1, 0.3, "does not show"), (0.0, 0.3, "does not show"), (-0.3, -0.1, "carry less")):
        gap = effect.gap.model_copy(update={"low": low, "high": high})
        first = report.explained[0].model_copy(update={"effects": (effect.model_copy(update={"gap": gap}),)})
        assert said in verdict(report.model_copy(update={"explained": (first,)}))
    few = effect.model_copy(update={"gap": effect.gap.model_copy(update={"n": 9})})
    first = report.explained[0].model_copy(update={"effects": (few,)})
    assert "Fewer than 10 images show nothing" in verdict(report.model_copy(update={"explained": (first,)}))
    early = tuple(e for e in report.explained[0].effects if e.layer != "all layers")
    first = report.explained[0].model_copy(update={"effects": early})
    assert "No neurons were masked or replaced in all layers" in verdict(
        report.model_copy(update={"explained": (first,)})
    )
    assert "No neurons were masked" in verdict(report_of("explanation of one"))
    assert "No model was explained" in verdict(report_of("no explanation"))


def test_limits_of_an_explanation_name_shrunken_activations_the_images_and_too_few_models():
    two, five = (" ".join(limits(report_of(case))) for case in ("explanation", "explanation of five"))
    for told in (two, five):
        assert "no evidence of anything where activations shrank" in told
        assert "The tests are on 64 images per model" in told
    assert "fewer than 5 models says nothing, and these are 2" in two and "says nothing, and" not in five
    alone = " ".join(limits(report_of("explanation of one")))
    assert "The tests are on" not in alone and "Correlation" not in alone and "pictures" not in alone


def test_the_trend_over_models_stands_beside_what_chance_does():
    text = " ".join(table(report_of("explanation of five")).split())
    assert "Over the 5 models" in text and "is -0.50, and as far from 0 in 0.45 of all orders of the models." in text
    assert "attacked on the first, without it, it is +0.25, and as far from 0 in 0.75 of all orders" in text
    assert "Spearman" not in table(report_of("explanation"))


def test_the_stamp_names_the_checks_that_fired(make_report: Callable[..., Report]):
    check = Check(name="zero gradients", status="warned", message="Some gradients are zero.")
    sound = make_report(preflight=(), checks=(check.model_copy(update={"status": "passed"}),), stamp="valid")
    doubtful = make_report(preflight=(), checks=(check,), stamp="suspicious")
    wrong = make_report(preflight=(), checks=(check.model_copy(update={"status": "failed"}),), stamp="invalid")
    assert [stamp(report) for report in (sound, doubtful, wrong)] == [
        "complete, valid",
        "complete, suspicious: zero gradients",
        "complete, invalid: zero gradients",
    ]
    assert "may have failed" not in verdict(sound) and "may have failed" in verdict(doubtful)
    assert "the true figure is lower" in verdict(wrong) and "Some gradients are zero." in table(wrong)


def test_rows_of_a_cascade_say_that_they_ran_on_survivors(make_report: Callable[..., Report]):
    report = make_report()
    attacks = tuple(attack.model_copy(update={"survivors": True}) for attack in report.attacks)
    lines = table(report.model_copy(update={"attacks": attacks})).splitlines()
    assert [line.split()[0] for line in lines if "linf  " in line or " l2  " in line][:2] == ["fgsm", ">"]
    assert any("ran only on the images left standing" in line for line in lines)
    assert not any("left standing" in line for line in table(report).splitlines())


def test_one_patient_alone_has_no_interval(make_report: Callable[..., Report]):
    mean = Mean(value=0.25, low=0.0, high=1.0, n=1)
    figures = GroupAccuracy(whole=wilson(0, 1), mean=mean, pooled=mean)
    report = make_report(groups=(Groups(kind="patient", n=1, most=40, clean=figures, worst=figures),))
    assert interval(mean) == "[not known]" and interval(mean.model_copy(update={"n": 2})) == "[0.0, 100.0]"
    assert "[not known]" in table(report) and "[not known]" in page(report)
    assert "All images are of one patient" in page(report)
    assert "of one patient:" not in " ".join(limits(make_report()))


def test_it_is_said_why_there_is_no_psnr_or_ssim(make_report: Callable[..., Report]):
    report = make_report()
    small = Similarity(n=3, psnr=20.0, psnr_low=19.0, ssim=None, ssim_low=None)

    def told(**changes: object) -> str:
        attacks = tuple(attack.model_copy(update=changes) for attack in report.attacks)
        return " ".join(limits(report.model_copy(update={"attacks": attacks})))

    assert "There is no SSIM: its window of 11 pixels is larger" in told(similarity=small)
    assert "There is no" not in told(similarity=small.model_copy(update={"ssim": 0.9, "ssim_low": 0.8}))
    assert "no PSNR or SSIM: no attack turned an image" in told(similarity=None, success=wilson(0, 40))
    assert "There is no" not in told(similarity=None, success=wilson(3, 40)), "as in reports older than the two"


@pytest.mark.parametrize("kind", ["audit", "attack"])
@pytest.mark.parametrize(
    ("right", "broken", "says"),
    [(0, 0, "was wrong on the one image"), (1, 0, "The attack did not succeed"), (1, 1, "The attack succeeded")],
)
def test_one_image_is_told_in_words(make_report: Callable[..., Report], kind, right, broken, says):
    report = make_report(n=1)
    attack = report.attacks[0].model_copy(update={"success": wilson(broken, 1) if right else None})
    rates = {"clean": wilson(right, 1), "worst_case": wilson(right - broken, 1)}
    report = report.model_copy(update={"kind": kind, "attacks": (attack,), **rates})
    for told in (verdict(report), " ".join(table(report).split()), page(report)):
        assert says in told and "One image is no statistics" in told
        assert sum(told.count(f"attack {word}succe") for word in ("", "did not ")) == right
    assert "no statistics" not in verdict(make_report(n=2))


def test_one_explained_image_is_told_in_words():
    report = report_of("explanation")
    for held, says in ((0, "The attack succeeded on the one image."), (1, "The attack did not succeed on the one")):
        alone = report.explained[0].model_copy(update={"clean": wilson(1, 1), "attacked": wilson(held, 1)})
        told = verdict(report.model_copy(update={"clean": wilson(1, 1), "explained": (alone,)}))
        assert told.startswith(says) and "One image is no statistics" in told
    assert "no statistics" not in verdict(report)


def test_an_explanation_stopped_before_its_first_batch_says_so():
    missing = ("40 of 40 images", "tests of plain")
    empty = {"explained": (), "illustration": None, "trend": None, "clean": None, "complete": False}
    report = report_of("explanation").model_copy(update={**empty, "not_run": missing})
    for told in (" ".join(table(report).split()), page(report)):
        assert "No model was explained before the interruption." in told and "40 of 40 images" in told
