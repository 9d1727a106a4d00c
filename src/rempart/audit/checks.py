"""Checks after the attacks: signs that they failed and not the adversary, with remedies tried on the spot."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from scipy.stats import binom
from torch import Tensor, nn

from rempart.attacks import Outcome, Verdict, attack_data, attacks
from rempart.attacks.catalogue import Attack
from rempart.attacks.losses import LossName, climb_direction, lead, reached, score
from rempart.attacks.run import join
from rempart.audit import remedies
from rempart.core.errors import Cancelled
from rempart.core.events import Event, Notify, named, silent
from rempart.core.model import Classifier, blind, frozen, placed
from rempart.core.repro import Draws
from rempart.core.stats import wilson
from rempart.core.threat import Threat
from rempart.core.types import Images, Labels, Logits, Mask, Scores
from rempart.data import Data
from rempart.data.samples import spread
from rempart.report.schema import Check, Remedy

_CHEAP, _THOROUGH, _FEW = 64, 200, 32
_PASSES = 5
_DRAWS = 100
_LEVEL, _POINTS = 0.01, 0.03
"""A remedy or probe overturns the figures from this share of the images on; for random models also at this level."""
_ITERATIVE = ("bim", "mim", "pgd", "apgd")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the checks found.

    Attributes:
        checks: One entry per check, in a fixed order.
        outcomes: What probes and remedies broke, on the samples they were run on and within the audit's threat.
    """

    checks: tuple[Check, ...]
    outcomes: Mapping[str, Verdict]


def diagnose(
    model: Classifier,
    data: Data,
    threat: Threat,
    verdicts: Mapping[str, Verdict],
    *,
    thorough: bool,
    random: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    notify: Notify = silent,
) -> Diagnosis:
    """Look for signs that the attacks of an audit failed, and where there are any, try what should help.

    Works on 64 samples (thorough: 200) that the model gets right and that lie evenly over the data. A check is `warned`
    when it finds its sign, and `failed` when a probe or a remedy breaks 3 % of them more than the attacks of the audit
    did (at least two), or when there are no gradients at all.

    Args:
        model: The classifier as it was attacked, preflight behind it; it is left as it was.
        data: All samples of the audit.
        threat: The threat of the audit. Without a budget, checks that need one are skipped.
        verdicts: What the attacks of the audit did, each to all samples or to some. Without any, pgd stands for them.
        thorough: Also run the probes that cost as much as an attack.
        random: Whether `preflight` found the model to be random.
        batch_size: Images per pass.
        seed: Seed of every random draw.
        notify: Receives progress.

    Source:
        Athalye et al. 2018, arXiv:1802.00420, section 3.1; Carlini et al. 2019, arXiv:1902.06705; Pintor et al. 2022,
        arXiv:2106.09947 (I1 to I6); AutoAttack (Croce & Hein 2020, arXiv:2003.01690) for `without gradients`.
        Thresholds are ours.
    """
    rules = [rule for rule in RULES if thorough or not rule.thorough]
    checks: list[Check] = []
    with frozen(model):
        bench = _bench(model, data, threat, verdicts, _THOROUGH if thorough else _CHEAP, batch_size, seed, random)
        for done, rule in enumerate(rules):
            notify(Event(stage="checks", done=done, total=len(rules), note=rule.name))
            if bench is None:
                found = _skipped("The model gets no image right.")
            elif rule.gradients and blind(model):
                found = _skipped("It needs gradients, which the model does not give.")
            elif rule.budget and not threat.eps:
                found = _skipped("It needs a threat with a budget.")
            elif rule.steady and bench.random:
                found = _skipped("The model is random: chance alone would give the same sign.")
            else:
                bench.notify = named(f"check {rule.name}", notify)
                found = _look(rule, bench)
            checks.append(_conclude(rule, found, bench))
    notify(Event(stage="checks", done=len(rules), total=len(rules)))
    return Diagnosis(tuple(checks), {} if bench is None else bench.outcomes)


def _look(rule: "Rule", bench: "_Bench") -> "_Found":
    """What the check sees; a check that breaks down is skipped, and the rest of the audit stands."""
    try:
        return rule.look(bench)
    except Cancelled:
        raise
    except Exception as failure:  # noqa: BLE001  probes ask more of a model than attacks do
        return _skipped(f"It could not be made: {type(failure).__name__}: {str(failure).partition(chr(10))[0]}")


def _attempt(remedy: Callable[["_Bench"], Verdict | None], bench: "_Bench") -> Verdict | None:
    """What the remedy broke; None where there is nothing to try it on, or where the model does not bear it."""
    try:
        return remedy(bench)
    except Cancelled:
        raise
    except Exception:  # noqa: BLE001  the check that asked for it stands without it
        return None


def stamp(checks: Sequence[Check]) -> Literal["valid", "suspicious", "invalid"]:
    """What checks come to: invalid if one failed, suspicious if one warns, else valid."""
    statuses = {check.status for check in checks}
    return "invalid" if "failed" in statuses else "suspicious" if "warned" in statuses else "valid"


# ---- the bench: samples, what the audit did to them, and what is tried on them


@dataclass(slots=True)
class _Bench:
    """The samples checks work on, and what was done to them so far.

    Attributes:
        data: Samples that were right at first.
        verdicts: Of the audit, on all its samples.
        standing: Which of the samples no attack of the audit broke.
        random: Whether passes over the same images differ by more than rounding.
        outcomes: What was tried within the threat of the audit.
    """

    model: Classifier
    data: Data
    x: Images
    y: Labels
    z: Logits
    threat: Threat
    verdicts: Mapping[str, Verdict]
    standing: Mask
    random: bool
    evidence: dict[str, float]
    batch_size: int
    seed: int
    notify: Notify = silent
    outcomes: dict[str, Verdict] = field(default_factory=dict[str, Verdict])
    surrogate: Classifier | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """What a check saw: `sign` of failure or not, `fatal` where no figure can stand, and what should help."""

    message: str
    evidence: Mapping[str, float] = field(default_factory=dict[str, float])
    sign: bool = False
    fatal: bool = False
    skipped: bool = False
    remedies: tuple[str, ...] = ()


def _bench(
    model: Classifier,
    data: Data,
    threat: Threat,
    verdicts: Mapping[str, Verdict],
    limit: int,
    batch_size: int,
    seed: int,
    random: bool = False,
) -> _Bench | None:
    kept: list[Tensor] = []
    images: list[Images] = []
    logits: list[Logits] = []
    start, order = 0, spread(len(data))  # so that the first few of them, too, are images of all kinds
    for batch in data.take(order).batches(batch_size):
        x = placed(model, batch.x)
        with torch.no_grad():
            z = model(x)
        right = (z.argmax(1).cpu() == batch.y).nonzero()[:, 0][: limit - sum(map(len, kept))]
        kept.append(start + right)
        images.append(x[right])
        logits.append(z[right])
        start += len(batch.y)
        if sum(map(len, kept)) == limit:
            break
    some = data.take(order[torch.cat(kept)]) if kept else data
    if not kept or len(some) == 0:
        return None
    x, y, z = torch.cat(images), some.labels.to(logits[0].device), torch.cat(logits)
    evidence = _repeats(model, x, y, z, batch_size)
    random = random or evidence["largest difference"] > 1e-4
    bench = _Bench(
        model, some, x, y, z, threat, verdicts, torch.ones(len(some), dtype=torch.bool), random, evidence,
        batch_size, seed,
    )  # fmt: skip
    known, broken = _union(verdicts.values(), some.index)
    if threat.eps and not bool(known.any()) and not blind(model):
        broken = _try(bench, "pgd", "pgd", {"steps": 20, "early_stop": True}).broken
    bench.standing = ~broken
    return bench


def _repeats(model: Classifier, x: Images, y: Labels, z: Logits, batch_size: int) -> dict[str, float]:
    """How far repeated passes differ, relative to the logits, and how many images change class between them."""
    gap, flipped = 0.0, torch.zeros_like(y, dtype=torch.bool)
    size = max(float(z.abs().max()), 1e-12)
    with torch.no_grad():
        for _ in range(_PASSES - 1):
            again = torch.cat([model(part) for part in x.split(batch_size)])
            gap = max(gap, float((again - z).abs().max()) / size)
            flipped |= again.argmax(1) != y
    return {"largest difference": gap, "share that changes class": float(flipped.double().mean())}


def _union(verdicts: Iterable[Verdict], index: Tensor) -> tuple[Mask, Mask]:
    """For each sample number, whether any of the verdicts knows it, and whether any says it is broken."""
    known = torch.zeros(len(index), dtype=torch.bool)
    broken = torch.zeros(len(index), dtype=torch.bool)
    for verdict in verdicts:
        known |= torch.isin(index, verdict.index)
        broken |= torch.isin(index, verdict.index[verdict.broken])
    return known, broken


def _try(
    bench: _Bench,
    label: str,
    attack: str | Attack,
    options: Mapping[str, Any],
    *,
    search: Classifier | None = None,
    at: Tensor | None = None,
    seed: int | None = None,
) -> Outcome | Verdict:
    """Attack the samples (or those `at` these positions) within the threat, once for each label; the model judges."""
    if label not in bench.outcomes:
        bench.outcomes[label] = _attack(bench, attack, options, bench.threat, search, at, seed).verdict
    return bench.outcomes[label]


def _attack(
    bench: _Bench,
    attack: str | Attack,
    options: Mapping[str, Any],
    threat: Threat,
    search: Classifier | None = None,
    at: Tensor | None = None,
    seed: int | None = None,
) -> Outcome:
    return attack_data(
        bench.model,
        bench.data if at is None else bench.data.take(at),
        threat,
        attack,
        options,
        batch_size=bench.batch_size,
        search=search,
        seed=bench.seed if seed is None else seed,
        random=bench.random,
        notify=bench.notify,
    )


def _beaten(bench: _Bench, tried: Verdict | Mask, beside: Mask | None = None) -> tuple[int, bool]:
    """How many samples were broken that neither the audit broke nor what stands `beside`; and if they overturn it.

    A find on a fixed model is a fact: two of them, and three of a hundred images, overturn figures. A random model
    breaks some at every further attempt: there a paired test (McNemar, exact, one-sided) must also exclude chance.
    """
    broken = _mask(bench, tried)
    other = torch.zeros_like(broken) if beside is None else beside
    gain = int((bench.standing & broken & ~other).sum())
    if not bench.random:
        return gain, gain >= max(2, math.ceil(_POINTS * len(broken)))
    loss = int((bench.standing & other & ~broken).sum())
    level = float(binom.sf(gain - 1, gain + loss, 0.5)) if gain else 1.0
    return gain, level < _LEVEL and gain - loss >= _POINTS * len(broken)


def _mask(bench: _Bench, tried: Verdict | Mask) -> Mask:
    return tried if isinstance(tried, Tensor) else _union([tried], bench.data.index)[1]


def _control(bench: _Bench) -> Mask:
    """What plain pgd breaks with the steps and starts of a remedy: that much is no merit of the remedy."""
    verdict = _attempt(_plain, bench)
    return ~bench.standing if verdict is None else _mask(bench, verdict)


def _conclude(rule: "Rule", found: _Found, bench: _Bench | None) -> Check:
    """Try the remedies of what was found, and keep the one that breaks most beyond plain pgd."""
    status: Literal["passed", "warned", "failed", "skipped"] = "skipped" if found.skipped else "passed"
    message, remedy = found.message, None
    if found.sign and bench is not None:
        status = "failed" if found.fatal else "warned"
        names = found.remedies if bench.threat.eps else ()
        tried = {name: verdict for name in names if (verdict := _attempt(REMEDIES[name], bench)) is not None}
        if tried:
            remedy, overturned = _best(bench, tried, _control(bench))
            status = "failed" if overturned else status
    return Check(
        name=rule.name,
        status=status,
        message=message,
        evidence=dict(found.evidence),
        reading=rule.reading,
        remedy=remedy,
    )


def _best(bench: _Bench, tried: Mapping[str, Verdict], control: Mask) -> tuple[Remedy, bool]:
    """The remedy that breaks most beyond plain pgd, or plain pgd itself where that alone shows a weak audit.

    For a random model plain pgd breaks some by chance alone, so that it shows nothing.
    """
    plain, weak = _beaten(bench, control) if not bench.random else (0, False)
    own = {name: _beaten(bench, verdict, control) for name, verdict in tried.items()}
    name = max(own, key=lambda name: own[name][0])
    gain, overturned = own[name]
    n, stood = len(bench.data), int(bench.standing.sum())
    if weak and plain > gain:
        more = plain
        name, told = "more steps", f"{_WEAK}: {more} of the {stood} images left standing fall to plain pgd."
    else:
        more = int((bench.standing & _mask(bench, tried[name])).sum())
        told = f"{_TOLD[name]}: {more} of the {stood} images left standing fall, {gain} of them not to plain pgd."
    return Remedy(name=name, message=told, before=wilson(stood, n), after=wilson(stood - more, n)), overturned or weak


def _skipped(message: str) -> _Found:
    return _Found(message, skipped=True)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if len(mask) else 0.0


# ---- cheap checks


def _zero_gradients(bench: _Bench) -> _Found:
    """Pintor et al. 2022, I1."""
    points: list[tuple[str, Images, LossName]] = [("image", bench.x, loss) for loss in _losses(bench)]
    if bench.threat.eps:
        draws = Draws(bench.seed, bench.data.index, ("checks", "start"))
        points.append(("random point", bench.threat.start(bench.x, draws), "ce"))
    evidence: dict[str, float] = {}
    for place, point, loss in points:
        goal = score(loss, targeted=False, num_classes=bench.model.num_classes)
        gradient, z = _gradient(bench, point, goal)
        zero = (gradient.flatten(1) == 0).all(1)
        # dlr is flat by design where the class is third, so only images that are right there count
        evidence[f"{loss}, {place}"] = _share(zero[lead(z, bench.y) > 0])
    worst = max(evidence.values())
    if worst == 0:
        return _Found("Every image gives an input gradient.", evidence)
    message = f"Up to {worst:.0%} of the images give an input gradient of exactly zero: attacks cannot move them."
    helps = ("straight through", "smoothed gradient", "other losses")
    return _Found(message, evidence, sign=True, fatal=min(evidence.values()) == 1, remedies=helps)


def _gradient(bench: _Bench, x: Images, goal: Callable[[Logits, Labels], Scores]) -> tuple[Images, Logits]:
    size = bench.batch_size
    parts = [climb_direction(bench.model, *part, goal) for part in zip(x.split(size), bench.y.split(size), strict=True)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _logits(bench: _Bench, x: Images) -> Logits:
    return torch.cat([bench.model(part) for part in x.split(bench.batch_size)])


def _losses(bench: _Bench) -> tuple[LossName, ...]:
    return ("ce", "dlr", "margin") if bench.model.num_classes >= 3 else ("ce", "margin")


def _randomness(bench: _Bench) -> _Found:
    if not bench.random:
        return _Found("Repeated passes over the same images agree.", bench.evidence)
    flips = bench.evidence["share that changes class"]
    message = f"Repeated passes differ, and {flips:.0%} of the images change class: one gradient is one draw."
    return _Found(message, bench.evidence, sign=True, remedies=("mean gradient",))


def _probabilities(bench: _Bench) -> _Found:
    """Outputs that end at a ceiling: preflight takes off softmax and sigmoid, but not every bounded function."""
    z = bench.z.double()
    top = z.amax(1)
    ceiling = _share(top >= top.max() - 1e-6 * top.max().abs()) if bool((z != z[:1]).any()) else 0.0
    evidence = {"share at the ceiling": ceiling}
    if len(z) >= 8 and ceiling > 0.5:
        message = f"{ceiling:.0%} of the images reach the same largest output: it is bounded, and flat where it ends."
        return _Found(message, evidence, sign=True, remedies=("smoothed gradient", "surrogate gradient"))
    return _Found("The outputs are logits.", evidence)


def _naive_gradients(bench: _Bench) -> _Found:
    """What an attack on cross-entropy in float32 would see, as torchattacks and others do it."""
    z = bench.z.float()
    slope = z.softmax(1) - torch.nn.functional.one_hot(bench.y, z.shape[1]).to(z)
    vanished = _share((slope == 0).all(1))
    margin = lead(bench.z.double(), bench.y)
    evidence = {
        "share without naive gradient": vanished,
        "median margin": float(margin.median()),
        "largest logit": float(z.abs().max()),
    }
    if vanished <= 0.1:
        return _Found("The gradient of plain cross-entropy does not vanish.", evidence)
    message = (
        f"The logits are so large that the gradient of plain cross-entropy is zero for {vanished:.0%} of the images: "
        "attacks of other tools would call the model safe. Ours climb the log-odds, which do not saturate."
    )
    return _Found(message, evidence, sign=True, remedies=("rescaled logits", "other losses"))


def _one_step(bench: _Bench) -> _Found:
    """Athalye et al. 2018: one-step attacks perform better than iterative ones."""
    by_name = {label: _attack_of(label) for label in bench.verdicts}
    single = [bench.verdicts[label] for label, name in by_name.items() if name == "fgsm"]
    many = [bench.verdicts[label] for label, name in by_name.items() if name in _ITERATIVE]
    if not (single and many):
        single = [_try(bench, "probe: fgsm", "fgsm", {})]
        many = [_try(bench, "probe: pgd-20", "pgd", {"steps": 20, "early_stop": True})]
    index = single[0].index[single[0].correct]
    (one_known, one), (many_known, iterated) = _union(single, index), _union(many, index)
    both = one_known & many_known
    n = int(both.sum())
    if n == 0:
        return _skipped("One-step and iterative attacks share no images.")
    ahead = int((both & one & ~iterated).sum())
    evidence = {"one step": _share(one[both]), "many steps": _share(iterated[both]), "one step alone": ahead, "n": n}
    if ahead >= 3 and ahead > _POINTS * n:
        message = f"One step breaks {ahead} of {n} images that many steps leave standing: the steps lose their way."
        return _Found(message, evidence, sign=True, remedies=("smoothed gradient", "other losses"))
    return _Found("Many steps break what one step breaks.", evidence)


def _attack_of(label: str) -> str:
    """The attack behind a label of a report: `pgd-margin 2` is pgd."""
    name = label.split(" ")[0]
    while name not in attacks and "-" in name:
        name = name.rpartition("-")[0]
    return name


def _without_gradients(bench: _Bench) -> _Found:
    """Athalye et al. 2018: black-box and random search perform better; the 0.2 points are AutoAttack's."""
    access = {
        label: attacks[name].traits.access if (name := _attack_of(label)) in attacks else "gradients"
        for label in bench.verdicts
    }
    blind = [bench.verdicts[label] for label, asked in access.items() if asked != "gradients"]
    sighted = [bench.verdicts[label] for label, asked in access.items() if asked == "gradients"]
    index = torch.unique(torch.cat([v.index[v.correct] for v in sighted])) if sighted else bench.data.index[:0]
    _, seen = _union(sighted, index)
    _, found = _union(blind, index)
    ahead, n = int((found & ~seen).sum()), len(index)
    at = bench.standing.nonzero()[:, 0]
    noise = 0
    if len(at):
        noise = int(_try(bench, "probe: noise", _noise, {}, at=at).broken.sum())
    evidence = {"without gradients alone": ahead, "n": n, "noise alone": noise, "n of noise": len(bench.data)}
    searched, overturned = 0, False
    if len(at) and not blind and bench.threat.norm in attacks["square"].traits.norms:
        probe = _try(bench, "probe: square", "square", {"queries": 300, "rescale": True}, at=at)
        searched, overturned = _beaten(bench, probe)
        evidence["square alone"] = searched
    helps = ("straight through", "smoothed gradient", "surrogate gradient")
    if ahead >= 3 and ahead > 0.002 * n:
        message = f"Attacks without gradients break {ahead} of {n} images that those with gradients leave standing."
        return _Found(message, evidence, sign=True, remedies=helps)
    if overturned or searched >= 3:
        message = f"A search without gradients breaks {searched} of {len(bench.data)} images that were left standing."
        return _Found(message, evidence, sign=True, fatal=overturned, remedies=helps)
    if noise >= 2:
        _, overturned = _beaten(bench, bench.outcomes["probe: noise"])
        message = f"Random noise breaks {noise} of {len(bench.data)} images that the attacks leave standing."
        return _Found(message, evidence, sign=True, fatal=overturned, remedies=helps)
    return _Found("Gradients find what noise and attacks without gradients find.", evidence)


def _noise(
    model: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    *,
    targeted: bool = False,
    rng: Draws | None = None,
    notify: Notify = silent,
) -> Images:
    """Draw random points of the ball and of its sphere (linf: its corners); keep the first that does it."""
    rng = rng or Draws(0, torch.arange(len(x)))
    out, active = x.clone(), torch.arange(len(x), device=x.device)
    for t in range(_DRAWS):
        draws = rng.select(active.cpu()).at(t)
        inside = t % 4 == 3 or threat.norm == "l1"
        step = draws.sign(x) if threat.norm == "linf" else draws.normal(x)
        point = threat.start(x, draws) if inside else threat.project(x, x + threat.ascend(x, step, threat.budget))
        with torch.no_grad():
            hit = reached(model(point), y, targeted=targeted)
        out[active[hit]] = point[hit]
        active, x, y = active[~hit], x[~hit], y[~hit]
        if len(active) == 0:
            break
    return out


def _large_budgets(bench: _Bench) -> _Found:
    """Athalye et al. 2018: unbounded attacks do not reach 100 %; Pintor et al. 2022, I6."""
    span, dims = bench.threat.high - bench.threat.low, math.prod(bench.model.shape)
    whole = {"linf": span, "l2": span * math.sqrt(dims), "l1": span * dims}[bench.threat.norm]
    standing = torch.ones(len(bench.data), dtype=torch.bool)
    evidence: dict[str, float] = {}
    for part, name in ((0.5, "half the box"), (1.0, "the whole box")):
        threat = replace(bench.threat, eps=part * whole)
        for loss in ("ce", "margin"):
            at = standing.nonzero()[:, 0]
            if len(at):
                options = {"steps": 10, "loss": loss, "early_stop": True}
                standing[at] = _attack(bench, "pgd", options, threat, at=at).right
        evidence[f"standing at {name}"] = _share(standing)
    left = evidence["standing at the whole box"]
    if left > 0.05:
        message = (
            f"{left:.0%} of the images withstand gradient attacks that may change them entirely: the attacks fail."
        )
        helps = ("straight through", "smoothed gradient", "surrogate gradient", "other losses")
        return _Found(message, evidence, sign=True, remedies=helps)
    return _Found("With a large enough budget, every image falls.", evidence)


class _Watched(nn.Module):
    """Passes the logits of a model on, and keeps them."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Logits] = []

    def forward(self, x: Images) -> Logits:
        z = self.model(x)
        self.seen.append(z.detach())
        return z


def _watched_pgd(bench: _Bench, steps: int) -> tuple[Tensor, Outcome]:
    """The logits of every iterate, shape (steps + 1, n, K), and what came back. One batch, so that rows stay rows."""
    model = bench.model
    watch = _Watched(model)
    search = Classifier(watch, shape=model.shape, num_classes=model.num_classes, low=model.low, high=model.high)
    paths: list[Tensor] = []
    found: list[Outcome] = []
    for at in torch.arange(min(len(bench.data), _FEW)).split(bench.batch_size):
        watch.seen.clear()
        found.append(_attack(bench, "pgd", {"steps": steps}, bench.threat, search, at))
        paths.append(torch.stack(watch.seen).cpu())
    return torch.cat(paths, 1), join(found)


def _silent_success(bench: _Bench) -> _Found:
    """Pintor et al. 2022, I3, measured on pgd."""
    path, found = _watched_pgd(bench, 10)
    hit = (path.argmax(2) != bench.data.labels[: path.shape[1]]).any(0)
    lost = int((hit & ~found.broken).sum())
    evidence = {"broken on the way": float(hit.sum()), "lost": lost, "n": len(hit)}
    if lost:
        return _Found(f"pgd met {lost} adversarial images on its way and did not return them.", evidence, sign=True)
    return _Found("What pgd breaks on its way is returned.", evidence)


def _local_linearity(bench: _Bench) -> _Found:
    """Whether a short step along the gradient does what the gradient says; Pintor et al. 2022, I2.

    The local linearity measure of Qin et al. 2019, arXiv:1907.02610, relative to the change itself.
    """
    threat, goal = bench.threat, score("margin", targeted=False, num_classes=bench.model.num_classes)
    draws = Draws(bench.seed, bench.data.index, ("checks", "linearity"))
    evidence: dict[str, float] = {}
    for place, x in {"image": bench.x, "random point": threat.start(bench.x, draws)}.items():
        gradient, _ = _gradient(bench, x, goal)
        moved = (x + threat.ascend(x, gradient, threat.budget / 10)).clamp(threat.low, threat.high)
        with torch.no_grad():
            before, after = (goal(_logits(bench, point), bench.y).double() for point in (x, moved))
        told = (gradient.double() * (moved - x)).flatten(1).sum(1)
        done = after - before
        gap = (done - told).abs() / torch.maximum(done.abs(), told.abs()).clamp_min(1e-300)
        gap = gap.nan_to_num(1.0, 1.0)  # an answer that is NaN is not what the gradient says
        evidence[f"{place}, median error"] = float(torch.where(told == 0, 1.0, gap).median())
    noise = min(4 / 255 * (threat.high - threat.low), threat.budget) if _is_linf(bench) else 0.0
    if noise:
        size = bench.z.double()
        margin = lead(size, bench.y)
        change = torch.zeros_like(margin)
        for t in range(5):
            shifted = (bench.x + draws.at(t).uniform(bench.x, -noise, noise)).clamp(threat.low, threat.high)
            with torch.no_grad():
                change += ((lead(_logits(bench, shifted).double(), bench.y) - margin).abs() / margin.abs()).clamp_max(1)
        evidence["change under slight noise"] = float(change.mean()) / 5
    worst = max(value for name, value in evidence.items() if "error" in name)
    unstable = evidence.get("change under slight noise", 0.0)
    helps = ("smoothed gradient", "straight through", "surrogate gradient")
    if worst > 0.8:
        message = f"A tenth of the budget along the gradient misses what the gradient says by {worst:.0%}."
        return _Found(message, evidence, sign=True, remedies=helps)
    if unstable > 0.3:
        message = f"Noise too weak to see changes the margins by {unstable:.0%}."
        return _Found(message, evidence, sign=True, remedies=helps)
    return _Found("Short steps do what the gradient says.", evidence)


# ---- thorough checks


def _losses_differ(bench: _Bench) -> _Found:
    options = {"steps": 20, "early_stop": True}
    tried = {loss: _try(bench, f"probe: pgd-{loss}", "pgd", {**options, "loss": loss}) for loss in _losses(bench)}
    evidence = {loss: _share(verdict.broken) for loss, verdict in tried.items()}
    union = torch.stack([verdict.broken for verdict in tried.values()]).any(0)
    evidence["union"] = _share(union)
    worst = min(tried, key=lambda loss: evidence[loss])
    behind = int((union & ~tried[worst].broken).sum())
    added = {loss: _beaten(bench, verdict) for loss, verdict in tried.items()}
    evidence["added to the audit"] = max(count for count, _ in added.values())
    if any(overturned for _, overturned in added.values()):
        message = "An attack with another loss breaks many images that the audit left standing."
        return _Found(message, evidence, sign=True, fatal=True, remedies=("other losses",))
    if behind >= 7 and behind > 0.15 * len(union):
        message = f"The loss {worst} misses {behind} of {len(union)} images that another loss breaks."
        return _Found(message, evidence, sign=True, remedies=("other losses",))
    return _Found("The losses agree.", evidence)


def _restarts(bench: _Bench) -> _Found:
    options = {"steps": 20, "early_stop": True}
    one = _try(bench, "probe: pgd-ce", "pgd", {**options, "loss": "ce"})
    more = _then(bench, one, "probe: pgd-restarts", {**options, "restarts": 4})
    gain, (added, overturned) = int((more & ~one.broken).sum()), _beaten(bench, more)
    evidence = {"one start": _share(one.broken), "five starts": _share(more), "added to the audit": added}
    if overturned or (gain >= 7 and gain > 0.1 * len(bench.data)):
        message = f"Five random starts break {gain} images more than one: where pgd ends depends on where it begins."
        return _Found(message, evidence, True, overturned, remedies=("smoothed gradient", "straight through"))
    return _Found("More random starts bring little.", evidence)


def _then(bench: _Bench, first: Verdict, label: str, options: Mapping[str, Any]) -> Mask:
    """Which of the samples fall to this pgd or already fell to the first attack; from other random starts."""
    at = (~first.broken).nonzero()[:, 0]
    if len(at) == 0:
        return first.broken
    _, broken = _union([_try(bench, label, "pgd", options, at=at, seed=bench.seed + 2)], bench.data.index)
    return broken | first.broken


def _converged(bench: _Bench) -> _Found:
    """Pintor et al. 2022, I4, by what more steps break instead of by the course of the loss."""
    short = _try(bench, "probe: pgd-40", "pgd", {"steps": 40, "early_stop": True})
    long = _then(bench, short, "probe: pgd-80", {"steps": 80, "early_stop": True})
    gain, (added, overturned) = int((long & ~short.broken).sum()), _beaten(bench, long)
    evidence = {
        "40 steps": _share(short.broken),
        "80 steps": _share(long),
        "added to the audit": added,
    }
    if overturned or (gain >= 7 and gain > 0.1 * len(bench.data)):
        message = f"Twice the steps break {gain} images more: the attacks had not come to their end."
        return _Found(message, evidence, True, overturned, remedies=("more steps",))
    return _Found("Twice the steps bring little.", evidence)


def _transfer(bench: _Bench) -> _Found:
    student = _surrogate(bench)
    moved = _try(bench, "probe: transfer", "mim", {"steps": 20, "keep": "last"}, search=student)
    added, overturned = _beaten(bench, moved)
    evidence = {
        "agreement": remedies.agreement(bench.model, student, bench.x, batch_size=bench.batch_size),
        "transfer": _share(moved.broken),
        "audit": _share(~bench.standing),
        "added to the audit": added,
    }
    if overturned or (added >= 3 and added > 0.02 * len(bench.data)):
        message = f"Images made on a small surrogate break {added} that the audit's own gradients left standing."
        return _Found(message, evidence, True, overturned, remedies=("surrogate gradient",))
    return _Found("Gradients of the model do better than those of a surrogate.", evidence)


def _surrogate(bench: _Bench) -> Classifier:
    if bench.surrogate is None:
        width = max(0.1 * (bench.threat.high - bench.threat.low), bench.threat.budget if _is_linf(bench) else 0.0)
        bench.surrogate = remedies.surrogate(
            bench.model, bench.x, width=width, seed=bench.seed, batch_size=bench.batch_size
        )
    return bench.surrogate


def _is_linf(bench: _Bench) -> bool:
    return bench.threat.norm == "linf"


# ---- remedies


def _pgd_on(label: str, made: Callable[[_Bench], Classifier], **options: Any) -> Callable[[_Bench], Verdict | None]:
    def attempt(bench: _Bench) -> Verdict | None:
        chosen = {"steps": 40, "loss": "margin", "early_stop": True, **options}
        at = bench.standing.nonzero()[:, 0]
        return _try(bench, f"remedy: {label}", "pgd", chosen, search=made(bench), at=at) if len(at) else None

    return attempt


def _other_losses(bench: _Bench) -> Verdict | None:
    at = bench.standing.nonzero()[:, 0]
    options = {"steps": 40, "restarts": 2, "early_stop": True}
    loss = "dlr" if bench.model.num_classes >= 3 else "margin"
    return _try(bench, "remedy: other losses", "pgd", {**options, "loss": loss}, at=at) if len(at) else None


def _plain(bench: _Bench) -> Verdict | None:
    """No remedy but their control: pgd on the model itself, with as many steps and starts."""
    at = bench.standing.nonzero()[:, 0]
    options = {"steps": 40, "restarts": 2, "loss": "margin", "early_stop": True}
    return _try(bench, "control: pgd", "pgd", options, at=at, seed=bench.seed + 1) if len(at) else None


def _mean_gradient(bench: _Bench) -> Verdict | None:
    at = bench.standing.nonzero()[:, 0]
    options = {"steps": 20, "eot": 10, "early_stop": True}
    return _try(bench, "remedy: mean gradient", "pgd", options, at=at) if len(at) else None


REMEDIES: dict[str, Callable[[_Bench], Verdict | None]] = {
    "other losses": _other_losses,
    "more steps": lambda bench: bench.outcomes.get("probe: pgd-80"),
    "rescaled logits": _pgd_on(
        "rescaled logits",
        lambda b: remedies.rescaled(b.model, remedies.usual_margin(b.model, b.x, batch_size=b.batch_size)),
    ),
    "straight through": _pgd_on("straight through", lambda b: remedies.through_rounding(b.model), restarts=2),
    "smoothed gradient": _pgd_on("smoothed gradient", lambda b: remedies.smoothed(b.model, b.threat, seed=b.seed)),
    "surrogate gradient": _pgd_on("surrogate gradient", lambda b: remedies.borrowed(b.model, _surrogate(b))),
    "mean gradient": _mean_gradient,
}
"""What is tried where a check finds something; None where nothing is left standing to try it on."""

_WEAK = "The attacks of the audit were too weak"
_TOLD = {
    "other losses": "With a loss of another scale and another start",
    "more steps": "With twice the steps",
    "rescaled logits": "With logits in float64, divided by their usual margin",
    "straight through": "With gradients passed straight through rounding and sign",
    "smoothed gradient": "With gradients averaged over slightly shifted images",
    "surrogate gradient": "With the gradients of a small surrogate",
    "mean gradient": "With gradients averaged over ten passes",
}


# ---- the rules


@dataclass(frozen=True, slots=True)
class Rule:
    """One check.

    Attributes:
        name: As in the report.
        look: The check itself.
        reading: How to read it.
        budget: Whether it needs a threat with a budget.
        thorough: Whether it costs as much as an attack.
        steady: Whether it means nothing for a random model, where chance alone gives the same sign.
        gradients: Whether it needs gradients, or compares what attacks with them do.
    """

    name: str
    look: Callable[[_Bench], _Found]
    reading: str
    budget: bool = True
    thorough: bool = False
    steady: bool = False
    gradients: bool = True


RULES: tuple[Rule, ...] = (
    Rule(
        "zero gradients",
        _zero_gradients,
        "Shares of images whose gradient is exactly zero, for each loss: none should be.",
        budget=False,
    ),
    Rule(
        "randomness",
        _randomness,
        "Largest difference of repeated passes over the logits' size; a random model needs mean gradients.",
        budget=False,
        gradients=False,
    ),
    Rule(
        "probabilities",
        _probabilities,
        "Outputs that end at a ceiling are flat where the model is sure.",
        budget=False,
        gradients=False,
    ),
    Rule(
        "naive gradients",
        _naive_gradients,
        "The share of images for which plain cross-entropy has no gradient in float32: figures of other tools are "
        "too high by up to that.",
        budget=False,
    ),
    Rule(
        "one step against many",
        _one_step,
        "Broken by one step alone: many steps should break those as well.",
        steady=True,
    ),
    Rule(
        "without gradients",
        _without_gradients,
        "Broken by noise or attacks without gradients alone: gradients should find those first.",
        steady=True,
    ),
    Rule(
        "large budgets",
        _large_budgets,
        "Shares standing when pixels may change by half the box or all of it: the last should be near zero.",
        budget=False,
    ),
    Rule(
        "silent success",
        _silent_success,
        "Adversarial images that an attack met and did not return: none.",
        steady=True,
    ),
    Rule(
        "local linearity",
        _local_linearity,
        "How far a short step along the gradient misses what the gradient says, relative to the change.",
        steady=True,
    ),
    Rule(
        "other losses",
        _losses_differ,
        "Shares broken with each loss and with any: they should be close.",
        thorough=True,
        steady=True,
    ),
    Rule(
        "restarts",
        _restarts,
        "Shares broken from one random start and from five: they should be close.",
        thorough=True,
        steady=True,
    ),
    Rule(
        "convergence",
        _converged,
        "Shares broken with 40 and 80 steps: they should be close.",
        thorough=True,
        steady=True,
    ),
    Rule(
        "transfer",
        _transfer,
        "Share broken by images made on a small copy of the model: it should add nothing to the audit.",
        thorough=True,
        steady=True,
    ),
)
"""Every check, in the order of the report."""
