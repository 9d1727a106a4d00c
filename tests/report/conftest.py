"""Reports that could have come from an audit: every rate follows from the results per sample."""

import base64
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rempart.audit.classes import by_class, turned
from rempart.audit.risk import risk
from rempart.core.stats import Auroc, Difference, Mean, Rate, auroc, wilson
from rempart.explain.contribution import TESTS
from rempart.report.html import page
from rempart.report.methods import Trained
from rempart.report.schema import (
    ALL,
    EVERY,
    KNOWS,
    AttackChoice,
    AttackResult,
    AttackSpec,
    AuditSpec,
    Bracket,
    Certificate,
    CertifySpec,
    Check,
    Curve,
    DataCard,
    Detection,
    DetectorChoice,
    DetectSpec,
    Effect,
    Epoch,
    Example,
    Explained,
    ExplainSpec,
    Held,
    Illustration,
    Layer,
    Maps,
    ModelCard,
    NormStats,
    Overlap,
    Remedy,
    Report,
    Samples,
    Separation,
    Test,
    Training,
    TrainSpec,
    Trend,
    pack,
    unpack,
)

HOSTILE = "<script>alert('x')</script>"
LONG = tuple(f"glioma, grade {k // 3 + 1}, with perifocal oedema, variant {k}" for k in range(30))
TUMOURS = ("glioma", "meningioma", "no tumour", "pituitary")


def attack_result(label: str, right: np.ndarray, clean: np.ndarray, **changes: Any) -> AttackResult:
    broken = wilson(int((clean & ~right).sum()), int(clean.sum())) if clean.any() else None
    values: dict[str, Any] = {
        "label": label,
        "name": label.split(" ")[0],
        "options": {"steps": 40, "step": None, "restarts": 1, "random_start": True, "loss": "ce", "stop_early": True},
        "norm": "linf",
        "accuracy": rate(right),
        "success": broken,
        "eight_bit": rate(right | (np.arange(len(right)) % 41 == 0) & clean),
        "queries": 41 * int(clean.sum()),
        "gradients": 40 * int(clean.sum()),
        "seconds": 12.345,
    }
    return AttackResult(**{**values, **changes})


def rate(flags: np.ndarray) -> Rate:
    return wilson(int(flags.sum()), len(flags))


def png(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.uint8(np.clip(pixels, 0, 1) * 255)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def example(index: int, classes: tuple[str, ...], attack: str) -> Example:
    side = np.linspace(-1, 1, 16)
    ring = np.exp(-18 * (np.hypot(*np.meshgrid(side, side * (1 + 0.2 * (index % 3)))) - 0.6) ** 2)
    noise = np.sign(np.random.default_rng(index).normal(size=ring.shape)) * 8 / 255
    return Example(
        index=index,
        attack=attack,
        label=index % len(classes),
        predicted=index % len(classes),
        confidence=0.9912,
        adversarial=(index + 1) % len(classes),
        adversarial_confidence=0.8734,
        distance=8 / 255,
        amplification=10.0,
        original_png=png(ring),
        perturbation_png=png(0.5 + 10 * noise),
        adversarial_png=png(ring + noise),
    )


def build(
    *,
    n: int = 500,
    classes: tuple[str, ...] = TUMOURS,
    attacks: bool = True,
    strength: float = 0.5,
    seed: int = 0,
    name: str = "mri-cnn",
    minimum_found: float = 1.0,
    **changes: Any,
) -> Report:
    """An audit; `strength` is the share of images an attack breaks, `minimum_found` the share deepfool finds."""
    rng = np.random.default_rng(seed)
    clean, order = rng.random(n) < 0.95, rng.random(n)
    if n == 1:
        clean[:] = True
    right = {
        "fgsm": clean & (order > 0.6 * strength),
        "pgd": clean & (order > strength),
        "pgd margin": clean & ((order > strength) ^ (rng.random(n) < 0.02)),
        "deepfool": clean & (order > 0.9 * strength),
    }
    right = right if attacks else {}
    samples = Samples(
        index=tuple(range(n)),
        labels=tuple(k % len(classes) for k in range(n)),
        clean=pack(clean),
        right={label: pack(row) for label, row in right.items()},
    )
    results = [attack_result(label, row, clean) for label, row in right.items()]
    if attacks:
        found = round(minimum_found * clean.sum())
        many = found > clean.sum() / 2
        norms = NormStats(
            norm="l2",
            found=found,
            n=int(clean.sum()),
            median=0.4123 if many else None,
            median_low=0.3871 if many else None,
            median_high=0.4402 if many else None,
            mean=0.5012 if found else None,
            quartiles=(0.21, 0.77) if found else None,
            rho2=0.0123 if found else None,
        )
        options = {"steps": 50, "overshoot": 0.02}
        results[-1] = attack_result("deepfool", right["deepfool"], clean, norm="l2", options=options, norms=norms)
    grid = tuple(k / 255 for k in (0, 1, 2, 4, 8, 12, 16))
    sizes = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
    curves = (
        Curve(
            label="pgd, eps sweep", norm="linf", eps=grid, accuracy=tuple(rate(clean & (order > 16 * e)) for e in grid)
        ),
        Curve(
            label="fgsm, eps sweep", norm="linf", eps=grid, accuracy=tuple(rate(clean & (order > 7 * e)) for e in grid)
        ),
        Curve(label="deepfool", norm="l2", eps=sizes, accuracy=tuple(rate(clean & (order > e)) for e in sizes)),
    )
    values: dict[str, Any] = {
        "kind": "audit",
        "complete": True,
        "spec": AuditSpec(model="runs/mri-cnn", data="brain-mri:test", threat="linf:8/255", suite="quick", limit=n),
        "created": "2026-11-21T06:11:41+00:00",
        "seconds": 187.25,
        "environment": {"python": "3.11.2", "system": "Linux x86_64", "torch": "2.9.0", "rempart": "0.1.0"},
        "model": ModelCard(
            source="runs/mri-cnn",
            name=name,
            digest="0123456789abcdef",
            parameters=123_456,
            shape=(1, 64, 64),
            classes=classes,
        ),
        "data": DataCard(
            source="brain-mri:test", split="test", digest="fedcba9876543210", n=n, shape=(1, 64, 64), classes=classes
        ),
        "notes": ("The images were resized from 512 x 512 to 64 x 64 pixels.",),
        "preflight": (
            Check(name="value range", status="passed", message="Pixels lie in the model's box [0, 1]."),
            Check(
                name="batch independence",
                status="repaired",
                message="Dropout was active in training mode and was switched off for the audit.",
                evidence={"largest_difference": 0.0312},
            ),
            Check(
                name="gradient masking",
                status="warned",
                message="Gradients vanish for 12 of 64 images: attacks that follow gradients may miss weak points.",
                evidence={"zero_gradients": 12.0, "images": 64.0},
            ),
            Check(name="labels", status="skipped", message="The data set has no names of classes to compare."),
        ),
        "clean": rate(clean),
        "attacks": tuple(results),
        "worst_case": rate(samples.worst_case()) if attacks else None,
        "curves": curves if attacks else (),
        "examples": tuple(example(k, classes, "pgd") for k in range(4)) if attacks else (),
        "samples": samples,
    }
    return Report(**{**values, **changes})


def build_attack(**changes: Any) -> Report:
    """The report of one attack."""
    audit = build()
    spec = AttackSpec(
        model="runs/mri-cnn", data="brain-mri:test", threat="linf:8/255", attack=AttackChoice(name="pgd"), out="runs/a"
    )
    values: dict[str, Any] = {
        "kind": "attack",
        "spec": spec,
        "attacks": audit.attacks[1:2],
        "preflight": (),
        "curves": (),
    }
    return audit.model_copy(update={**values, **changes})


def build_training(num_epochs: int = 30, **changes: Any) -> Report:
    """The report of a training run."""
    audit = build(attacks=False)
    epochs = tuple(
        Epoch(
            epoch=k,
            loss=2.3 * float(np.exp(-k / 8)) + 0.05,
            accuracy=1 - 0.8 * float(np.exp(-k / 6)),
            seconds=3.21,
            learning_rate=0.1 * (1 - k / 40),
            robust_accuracy=0.55 * (1 - float(np.exp(-k / 9))) if k % 2 == 0 else None,
        )
        for k in range(1, num_epochs + 1)
    )
    spec = TrainSpec(data="brain-mri", model="mri-cnn", recipe="trades", options={"epochs": 30}, out="runs/mri-cnn")
    recipe = {"summary": "TRADES", "objective": "trades", "epochs": 30, "clip": None, "learning_rate": 0.05}
    training = Training(
        recipe={**recipe, "options": {"beta": 6.0, "threat": "linf:0.1"}},
        objective="trades",
        best_epoch=max(1, 4 * num_epochs // 5),
        train_images=4500,
        validation_images=500,
        queries=1_620_000,
        gradients=1_485_000,
        seconds=96.3,
    )
    values: dict[str, Any] = {
        "kind": "train",
        "spec": spec,
        "preflight": (),
        "samples": None,
        "epochs": epochs,
        "training": training,
    }
    return audit.model_copy(update={**values, **changes})


def build_trained(
    recipe: str, strength: float, *, seed: int = 0, gradients: int = 100_000, found: float = 1.0, **changes: Any
) -> Trained:
    """A training run with its audits: `found` is the share of images with a smallest perturbation."""
    training = build_training()
    name = f"{recipe}-{seed}"
    card = training.model.model_copy(update={"source": f"runs/{name}"})
    spec = training.spec.model_copy(update={"recipe": recipe, "options": {}, "seed": seed, "out": f"runs/{name}"})
    cost = {"queries": gradients * 11 // 10, "gradients": gradients, "seconds": gradients / 12_345}
    recipe_keys = {"objective": recipe, "epochs": 30, "options": {"threat": "linf:8/255"}}
    assert training.training is not None
    kept = training.training.model_copy(update={**cost, "objective": recipe, "recipe": recipe_keys})
    training = training.model_copy(update={"spec": spec, "model": card, "training": kept, **changes})
    audit = build(strength=strength, seed=seed, stamp="valid", preflight=(), model=card)
    minimum = build(strength=strength, seed=seed, stamp="valid", preflight=(), model=card, minimum_found=found)
    minimum = minimum.model_copy(update={"attacks": minimum.attacks[-1:]})
    assert audit.samples is not None
    rng = np.random.default_rng(seed + 100)
    sizes = np.where(unpack(audit.samples.clean), rng.gamma(4, 0.1 / strength, size=audit.data.n), 0.0)
    sizes[(rng.random(len(sizes)) > found) & (sizes > 0)] = np.inf
    return Trained(training, audit, minimum, sizes)


def build_classes(classes: tuple[str, ...] = TUMOURS, *, some: bool = False, **changes: Any) -> Report:
    """An audit with accuracies by class, a matrix of pairs, and costs: k - j for class k taken for class j below it."""
    audit = build(classes=classes)
    assert audit.samples is not None
    labels, clean = np.array(audit.samples.labels), unpack(audit.samples.clean)
    rng, size = np.random.default_rng(5), len(classes)
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    pairs = pairs[: size // 2] if some else pairs
    found = (rng.random((len(labels), size)) < np.linspace(0, 1, size)) & clean[:, None]
    found[np.arange(len(labels)), labels] = False
    costs = np.clip(np.subtract.outer(np.arange(size), np.arange(size)), 0, None).astype(float) / 2
    spec = audit.spec.model_copy(update={"pairs": "all", "costs": "costs.csv", "window": (0.1, 0.9)})
    values: dict[str, Any] = {
        "spec": spec,
        "classes": by_class(labels, clean, audit.samples.worst_case()),
        "pairs": tuple(turned(pairs, labels, clean, found)),
        "risk": risk(costs, labels, np.where(clean, labels, 0), found),
        "examples": tuple(example(k, classes, "pgd") for k in range(2)),
    }
    return audit.model_copy(update={**values, **changes})


def build_certificate(threat: str | None = "linf:2/255", **changes: Any) -> Report:
    """The report of a certification, bracketed where there is a threat."""
    audit = build(attacks=False)
    radius = np.random.default_rng(1).random(500) * 1.2 - 0.2
    levels = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 0.85)
    curve = Curve(label="certified", norm="l2", eps=levels, accuracy=tuple(rate(radius > r) for r in levels))
    eps = (0.0, 2 / 255, 4 / 255)
    cube = Curve(label="certified", norm="linf", eps=eps, accuracy=tuple(rate(radius > 64 * e) for e in eps))
    bracket = Bracket(
        norm="linf",
        eps=2 / 255,
        radius=64 * 2 / 255,
        lower=rate(radius > 64 * 2 / 255),
        upper=rate(radius > 0),
        contradictions=1,
        attack="pgd",
        options={"steps": 40},
        draws=16,
        votes=1000,
        queries=20_000,
        gradients=19_000,
        seconds=3.21,
    )
    certificate = Certificate(
        sigma=0.25,
        samples=10_000,
        selection=100,
        alpha=0.001,
        largest=0.8,
        right=rate(radius > 0),
        abstained=rate(radius < -0.1),
        median_radius=0.31,
        bracket=bracket if threat else None,
    )
    spec = CertifySpec(model="runs/mri-cnn", data="brain-mri:test", sigma=0.25, threat=threat, out="runs/c")
    values: dict[str, Any] = {
        "kind": "certify",
        "spec": spec,
        "certificate": certificate,
        "curves": (curve, cube) if threat else (curve,),
    }
    return audit.model_copy(update={**values, **changes})


def build_checked(status: str = "failed", **changes: Any) -> Report:
    """An audit by a cascade, with checks after the attacks."""
    rate = wilson(30, 64)
    checks = (
        Check(
            name="zero gradients",
            status=status,  # type: ignore[arg-type]
            message="Up to 40% of the images give an input gradient of exactly zero: attacks cannot move them.",
            evidence={"ce, image": 0.4, "margin, image": 0.4},
            reading="Shares of images whose gradient is exactly zero, for each loss: none should be.",
            remedy=Remedy(name="straight through", message="With it, 20 fall.", before=rate, after=wilson(10, 64)),
        ),
        Check(name="randomness", status="passed", message="Repeated passes over the same images agree."),
        Check(name="large budgets", status="skipped", message="It needs a threat with a budget."),
    )
    stamp = {"failed": "invalid", "warned": "suspicious", "passed": "valid"}[status]
    report = build(preflight=(), checks=checks, stamp=stamp)
    attacks = [attack.model_copy(update={"survivors": True, "tried": 100}) for attack in report.attacks]
    return report.model_copy(update={"attacks": tuple(attacks), **changes})


def build_detection(labels: tuple[str, ...] = ("lid", "attack-type"), *, knows: bool = True, **changes: Any) -> Report:
    """The report of detectors, the last of which names attacks; all rates differ."""
    audit = build(attacks=False)
    attacks, n = ("fgsm", "pgd", "fgsm at 0.1"), audit.data.n
    found: list[Detection] = []
    for at, label in enumerate(labels):
        last = at == len(labels) - 1
        held = {"none": 450, ALL: 200, **({KNOWS: 30} if knows else {}), "fgsm": 400, "pgd": 300, "fgsm at 0.1": 350}
        rows = tuple(
            Separation(
                attack=name,
                n=100 + k,
                learnt=last and k < 2,
                auroc=separated(0.6 + 0.1 * k + 0.01 * at),
                caught={"0.01": wilson(20 + 5 * k + at, 100 + k), "0.05": wilson(50 + 5 * k + at, 100 + k)},
            )
            for k, name in enumerate(attacks)
        )
        found.append(
            Detection(
                label=label,
                detector=label.split(" ")[0],
                options={"k": 20},
                learnt=attacks[:2] if last else (),
                fitted_on=3000,
                calibrated_on=1300,
                threshold=1.25,
                fpr=0.1,
                false_alarms={"0.01": wilson(7 + at, 475), "0.05": wilson(27 + at, 475), "0.1": wilson(51 + at, 475)},
                separations=rows,
                left_out=tuple(row.model_copy(update={"auroc": separated(0.55)}) for row in rows[:2]) if last else (),
                held=tuple(Held(attack=name, held=wilson(k - at, n)) for name, k in held.items()),
                evaded=wilson(420, 450 - at) if knows else None,
                kinds=("clean", *attacks[:2]) if last else (),
                confusion={"clean": (400, 50, 25), "fgsm": (9, 80, 11), "fgsm at 0.1": (1, 2, 98)} if last else {},
                seconds=3.21,
            )
        )
    spec = DetectSpec(
        model="runs/mri-cnn",
        data="brain-mri",
        detectors=tuple(DetectorChoice(name=label.split(" ")[0]) for label in labels),
        attacks=(AttackChoice(name="fgsm"), AttackChoice(name="pgd")),
        threat="linf:8/255",
        fpr=0.1,
        out="runs/d",
    )
    values: dict[str, Any] = {
        "kind": "detect",
        "spec": spec,
        "detection": tuple(found),
        "samples": None,
        "worst_case": wilson(20, n),
    }
    return audit.model_copy(update={**values, **changes})


def separated(area: float) -> Auroc:
    """The area of 200 scores below 100 others, but for the share that the area asks for."""
    return auroc(np.arange(200) / 200, np.full(100, area))


def build_explanation(
    labels: tuple[str, ...] = ("plain", "pgd-at"),
    layers: dict[str, int] | None = None,
    *,
    effects: bool = True,
    picture: bool = True,
    **changes: Any,
) -> Report:
    """The report of models whose neurons move by 1/k of their layer's number, the k-th neuron in a mixed order."""
    audit = build(attacks=False, n=200)
    sizes = layers or {"block1": 10, "block2": 40}
    found = tuple(explained(label, at, sizes, effects) for at, label in enumerate(labels))
    spec = ExplainSpec(
        models=tuple(f"runs/{k}" for k in range(max(1, len(labels)))),
        data="brain-mri",
        threat="linf:8/255",
        attacks=(AttackChoice(name="pgd", options={"steps": 10}), AttackChoice(name="fgsm")),
        suite="fast",
        out="runs/e",
    )
    values: dict[str, Any] = {"kind": "explain", "spec": spec, "explained": found, "samples": None}
    values["illustration"] = illustration(next(iter(sizes))) if picture else None
    if len(labels) > 2:
        values["trend"] = Trend(models=len(labels), spearman=-0.5, chance=0.45, shared=0.25, shared_chance=0.75)
    return audit.model_copy(update={**values, **changes})


def explained(label: str, at: int, sizes: dict[str, int], effects: bool) -> Explained:
    layers: list[Layer] = []
    for number, (name, n) in enumerate(sizes.items(), 1):
        absolute = np.roll((number + at) / np.arange(1, n + 1), 3)
        layers.append(
            Layer(
                name=name,
                absolute=tuple(absolute.tolist()),
                relative=tuple((absolute[::-1] / 4).tolist()),
                overall=float(absolute.mean() / 3),
                pull=tuple((absolute - 0.1).tolist()),
                agreement=0.9 - 0.1 * number,
                sensitive=tuple(int(k) for k in np.argsort(-absolute)[: max(1, n // 10)]),
                shared_absolute=0.31 * number if at else None,
                shared_relative=0.07 * number if at else None,
            )
        )
    rows = [effect(layer, test, k + 3 * at) for layer in (*sizes, EVERY) for k, test in enumerate(TESTS)]
    rows.append(effect(EVERY, "zero, attacked anew", 2 * at))
    return Explained(
        label=label,
        model=build(attacks=False).model,
        clean=wilson(190 - at, 200),
        attacked=wilson(60 + 30 * at, 200),
        pairs=190 - at,
        tested=64,
        layers=tuple(layers),
        overlaps=tuple(Overlap(layer=name, beside="fgsm", jaccard=0.25 + at / 8, chance=0.05) for name in sizes),
        effects=tuple(rows) if effects else (),
    )


def effect(layer: str, test: Test, k: int) -> Effect:
    return Effect(
        layer=layer,
        test=test,
        share=0.1,
        before=wilson(32, 64),
        sensitive=wilson(40 + k, 64),
        least=wilson(20 + k, 64),
        random=Mean(value=0.5 + k / 100, low=0.4, high=0.7, n=5),
        gap=Difference(value=(40 + k) / 64 - 0.5 - k / 100, low=0.01, high=0.3, n=64),
    )


def illustration(layer: str) -> Illustration:
    side = np.linspace(-1, 1, 12)
    pixels = np.outer(side, side) / 2 + 0.5
    grid = 3 - 10 * np.linspace(-0.06, 0.06, 5)[:, None] * 10 + np.zeros(5)
    return Illustration(
        index=7,
        label=0,
        predicted=0,
        adversarial=1,
        original_png=png(pixels),
        adversarial_png=png(pixels**2),
        perturbation_png=png(pixels / 2),
        saliency_png=png(pixels**3),
        adversarial_saliency_png=png(pixels**4),
        maps=tuple(
            Maps(
                layer=layer,
                neuron=k,
                low=-1.25 - k,
                high=2.5,
                reach=0.375,
                clean_png=png(pixels),
                adversarial_png=png(pixels),
                difference_png=png(pixels),
            )
            for k in range(2)
        ),
        reach=0.06,
        landscape=tuple(tuple(row) for row in grid.tolist()),
    )


CASES: dict[str, Callable[[], Report]] = {
    "invalid": build_checked,
    "suspicious": lambda: build_checked("warned"),
    "full": build,
    "partial": lambda: build(complete=False, not_run=("cw", "ead")),
    "no attacks": lambda: build(attacks=False, complete=False, not_run=("fgsm", "pgd")),
    "two classes": lambda: build(classes=("benign", "malignant")),
    "thirty classes": lambda: build(classes=LONG, name="a-rather-long-name-of-a-model-with-many-parts-" * 2),
    "one image": lambda: build(n=1),
    "nothing found": lambda: build(minimum_found=0.2),
    "hostile": lambda: build(
        classes=(HOSTILE, '"><img src=x>', "$\\frac{$", "日本\x00"), name=HOSTILE, notes=(HOSTILE,)
    ),
    "attack": build_attack,
    "training": build_training,
    "certificate": build_certificate,
    "certificate without threat": lambda: build_certificate(None),
    "no certificate": lambda: build_certificate(complete=False, certificate=None, clean=None, curves=()),
    "detection": build_detection,
    "detection cut short": lambda: build_detection(complete=False, not_run=("knn",), notes=("The evaluation failed.",)),
    "detection without who knows": lambda: build_detection(knows=False),
    "no detection": lambda: build_detection((), complete=False, not_run=("lid",), clean=None, worst_case=None),
    "explanation": build_explanation,
    "explanation of five": lambda: build_explanation(("a", "b", "c", "d", "e" * 80)),
    "explanation of one": lambda: build_explanation(("plain",), {"only": 1}, effects=False, picture=False),
    "explanation, hostile": lambda: build_explanation((HOSTILE, "$\\frac{$"), {HOSTILE: 12, "日本\x00": 3}),
    "no explanation": lambda: build_explanation((), complete=False, picture=False),
    "one epoch": lambda: build_training(1),
    "classes": build_classes,
    "a few pairs": lambda: build_classes(some=True),
    "ten classes": lambda: build_classes(tuple("0123456789")),
    "pairs of thirty": lambda: build_classes(LONG),
    "classes, hostile": lambda: build_classes((HOSTILE, '"><img src=x>', "$\\frac{$", "日本\x00")),
    "training without cost": lambda: build_training(training=None, clean=None),
}


@cache
def report_of(case: str) -> Report:
    return CASES[case]()


@cache
def page_of(case: str) -> str:
    return page(report_of(case))


@pytest.fixture
def make_report() -> Callable[..., Report]:
    return build


@pytest.fixture
def make_training() -> Callable[..., Report]:
    return build_training


@pytest.fixture
def make_trained() -> Callable[..., Trained]:
    return build_trained


@pytest.fixture
def make_attack() -> Callable[..., Report]:
    return build_attack


@pytest.fixture
def make_detection() -> Callable[..., Report]:
    return build_detection


@pytest.fixture
def make_explanation() -> Callable[..., Report]:
    return build_explanation


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """Each kind of report in turn."""
    return str(request.param)


@pytest.fixture
def any_report(case: str) -> Report:
    return report_of(case)


@pytest.fixture
def any_page(case: str) -> str:
    """The page of `any_report`, made once."""
    return page_of(case)
