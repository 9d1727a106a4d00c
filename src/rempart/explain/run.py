"""A request to explain: attack in batches, sum up what neurons do, test the sensitive ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import torch

from rempart.attacks import Outcome, attack_batch, attacks
from rempart.attacks.plan import mean_gradient
from rempart.attacks.preflight import is_random
from rempart.attacks.run import native
from rempart.core.errors import Cancelled, DataError, SpecError
from rempart.core.events import Event, Notify, named, silent
from rempart.core.features import Moved, moved
from rempart.core.foreign import contained
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.core.stats import wilson
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.explain.anew import anew
from rempart.explain.contribution import TESTS, Pairs, effects, pull
from rempart.explain.pictures import illustrate
from rempart.explain.sensitivity import by_chance, jaccard, joined, layers_of, rank_correlation, top
from rempart.report.schema import (
    AttackChoice,
    Check,
    Effect,
    Explained,
    ExplainSpec,
    Illustration,
    Layer,
    ModelCard,
    Overlap,
    Trend,
)

_EXACT, _ORDERS = 6, 2000  # up to so many points all orders are tried, of more so many drawn at random
TO_CHOOSE, TO_TEST = 0, 1
"""Of the images that are right at first, those at even places choose neurons for the tests, those at odd ones test."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One of the models to explain.

    Attributes:
        model: The model.
        card: Describes it.
        checks: What `preflight` found of it.
    """

    model: Classifier
    card: ModelCard
    checks: tuple[Check, ...] = ()

    @property
    def random(self) -> bool:
        """Whether two passes over the same images differ."""
        return is_random(self.checks)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found.

    Attributes:
        explained: Of each model.
        illustration: One image seen by the first; None where there is no pair.
        not_run: What an interruption left undone.
    """

    explained: tuple[Explained, ...]
    illustration: Illustration | None
    not_run: tuple[str, ...] = ()


@dataclass(slots=True)
class Seen:
    """What is summed up of one model while the batches go by.

    Attributes:
        layers: The layers looked at.
        halves: Sums under the first attack, of the pairs that choose and of those that test.
        others: Sums under each further attack.
        shared: Sums on the images attacked on the first model.
        kept: Pairs to test on.
        n: Images.
        right: Of them, right at first.
        held: Of these, right under the first attack.
    """

    layers: list[str]
    halves: tuple[dict[str, Moved], dict[str, Moved]] = field(default_factory=lambda: ({}, {}))
    others: dict[str, dict[str, Moved]] = field(default_factory=dict[str, dict[str, Moved]])
    shared: dict[str, Moved] = field(default_factory=dict[str, Moved])
    kept: list[Pairs] = field(default_factory=list[Pairs])
    n: int = 0
    right: int = 0
    held: int = 0

    @property
    def whole(self) -> dict[str, Moved]:
        """Sums of all pairs under the first attack."""
        return joined(self.halves)


@contained("models and attacks to run", SpecError)
def explain(
    models: Mapping[str, Subject],
    data: Data,
    threat: Threat,
    spec: ExplainSpec,
    *,
    picture: Data | None = None,
    notify: Notify = silent,
) -> Explanation:
    """Attack, measure and test each model; illustrate the first.

    Memory does not grow with the images but for the pairs that neurons are tested on. Models that draw random numbers
    are attacked by mean gradients; their draws add to what their neurons move. An interruption (Ctrl-C, or `Cancelled`
    from `notify`) keeps what was found before it: of the batches that every model has seen, without tests of neurons
    where it came before these.

    Args:
        models: By label.
        data: The images.
        threat: Norm, budget and box.
        spec: Recorded in the report; its models and data are those given.
        picture: One image to illustrate, instead of one of the data.
        notify: Receives progress.

    Raises:
        SpecError: If an attack, an option or a layer is unknown.
        DataError: If a model gets no image right, or the images do not fit it.
    """
    found = {label: Seen(layers_of(subject.model, spec.layers)) for label, subject in models.items()}
    first = next(iter(models))
    whole = found  # of whole batches
    try:
        for batch in data.batches(spec.batch_size):
            found = {label: _copied(seen) for label, seen in whole.items()}
            lent: tuple[torch.Tensor, torch.Tensor] | None = None
            for label, subject in models.items():
                seen = found[label]
                lent_now = _see(subject, seen, batch.x, batch.y, batch.index, threat, spec, len(data))
                if label == first:
                    lent = lent_now
                elif lent is not None and len(lent[0]):
                    seen.shared = joined([seen.shared, moved(subject.model, [lent], seen.layers)])
            whole, done = found, found[first].n
            notify(Event(stage="neurons", done=done, total=len(data), values={"accuracy": found[first].held / done}))
    except (KeyboardInterrupt, Cancelled):
        left = len(data) - whole[first].n
        missing = (*((f"{left} of {len(data)} images",) if left else ()), *(f"tests of {label}" for label in models))
        if not all(seen.right for seen in whole.values()):
            return Explanation((), None, missing)
        told = [_told(label, subject, whole[label], whole[first], first, spec) for label, subject in models.items()]
        return Explanation(tuple(told), _illustrated(models[first], whole[first], picture, threat, spec), missing)
    for label, seen in found.items():
        if seen.right == 0:
            raise DataError("images that the model classifies rightly", got=f"none of {seen.n} for {label}")
    told = [_told(label, subject, found[label], found[first], first, spec) for label, subject in models.items()]
    shown = _illustrated(models[first], found[first], picture, threat, spec)
    for at, (label, subject) in enumerate(models.items()):
        rows: list[Effect] = []
        stopped = False
        try:
            for row in _tests(subject, found[label], threat, spec, named(label, notify)):
                rows.append(row)
        except (KeyboardInterrupt, Cancelled):
            stopped = True
        told[at] = told[at].model_copy(update={"effects": tuple(rows)})
        if stopped:
            return Explanation(tuple(told), shown, tuple(f"tests of {name}" for name in [*models][at:]))
    return Explanation(tuple(told), shown)


def _copied(seen: Seen) -> Seen:
    """What the next batch may add to, so that one cut short leaves no trace."""
    halves = dict(seen.halves[0]), dict(seen.halves[1])
    return replace(seen, halves=halves, others=dict(seen.others), kept=list(seen.kept))


def trend(explained: Sequence[Explained]) -> Trend | None:
    """Spearman's correlation of mean relative sensitivity and accuracy under attack; None for fewer than three models.

    Source:
        Our design: relative, as a model that shrinks its activations shrinks absolute sensitivities with them.
    """
    if len(explained) < 3:
        return None
    own = [(model.mean_relative, model.attacked.value) for model in explained]
    lent = [[layer.shared_relative for layer in model.layers] for model in explained]
    shared = [
        (sum(means) / len(means), model.attacked.value)
        for model, values in zip(explained, lent, strict=True)
        if (means := [value for value in values if value is not None])
    ]
    (spearman, chance), (beside, beside_chance) = _correlated(own), _correlated(shared)
    return Trend(models=len(own), spearman=spearman, chance=chance, shared=beside, shared_chance=beside_chance)


def _correlated(points: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Spearman's correlation, and the share of the orders of the points in which it is as far from 0."""
    table = torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
    found = rank_correlation(table[:, 0], table[:, 1])
    if found is None:
        return None, None
    if len(table) <= _EXACT:
        orders: Iterable[torch.Tensor] = map(torch.tensor, permutations(range(len(table))))
    else:
        keys = Draws(0, torch.arange(_ORDERS), ("trend",)).uniform(torch.empty(_ORDERS, len(table)))
        orders = keys.argsort(1)
    others = [rank_correlation(table[order, 0], table[:, 1]) or 0.0 for order in orders]
    return found, sum(abs(other) >= abs(found) - 1e-9 for other in others) / len(others)


def _see(
    subject: Subject,
    seen: Seen,
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    threat: Threat,
    spec: ExplainSpec,
    total: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attack one batch of `total` images, add to the sums, and return the pairs of the first attack."""
    pairs: tuple[torch.Tensor, torch.Tensor] = x[:0], x[:0]
    model = subject.model
    for number, (label, choice) in enumerate(_labelled(spec).items()):
        made = _attacked(subject, choice, x, y, index, threat, spec)
        right = made.correct & ~made.undefined  # neurons that are NaN compare with nothing
        a, b, c, place = x[right], made.x_adv[right], y[right], index[right]
        if number:
            if len(a):
                seen.others[label] = joined([seen.others.get(label, {}), moved(model, [(a, b)], seen.layers)])
            continue
        pairs = a, b
        halves = (torch.arange(len(a)) + seen.right) % 2
        for half in (TO_CHOOSE, TO_TEST):
            at = halves == half
            if bool(at.any()):
                seen.halves[half].update(joined([seen.halves[half], moved(model, [(a[at], b[at])], seen.layers)]))
        at = _spread(halves == TO_TEST, seen.right // 2, spec.test, total)
        if len(at):
            seen.kept.append(Pairs(index=place[at], x=a[at], x_adv=b[at], y=c[at]))
        seen.n, seen.right, seen.held = seen.n + len(x), seen.right + len(a), seen.held + int((~made.broken).sum())
    return pairs


def _spread(offered: torch.Tensor, before: int, wanted: int, total: int) -> torch.Tensor:
    """Of the images that may test, those that test: spread over the data, in which classes may come one by one.

    Args:
        offered: Which images of a batch may.
        before: How many others there were before them.
        wanted: How many are to test at most.
        total: Images of the data, of which half could.
    """
    at = offered.nonzero()[:, 0]
    place = before + torch.arange(len(at))
    half = max((total + 1) // 2, wanted, 1)
    return at[place * wanted % half < wanted]


def _attacked(
    subject: Subject,
    choice: AttackChoice,
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    threat: Threat,
    spec: ExplainSpec,
) -> Outcome:
    options = {**choice.options, **(mean_gradient(choice.name, choice.options) if subject.random else {})}
    within = native(attacks[choice.name], threat)
    return attack_batch(
        subject.model, x, y, within, choice.name, options, index=index, seed=spec.seed, random=subject.random
    )


def _labelled(spec: ExplainSpec) -> dict[str, AttackChoice]:
    """The attacks by name, those that come again with their number."""
    found: dict[str, AttackChoice] = {}
    for number, choice in enumerate(spec.attacks, 1):
        found[f"{choice.name} {number}" if choice.name in found else choice.name] = choice
    return found


def _told(
    label: str,
    subject: Subject,
    seen: Seen,
    beside: Seen,
    first: str,
    spec: ExplainSpec,
) -> Explained:
    """Everything of one model but the tests of its neurons."""
    model, sums = subject.model, seen.whole
    pairs = _joined(seen)
    pulls = pull(model, pairs, seen.layers, batch_size=spec.batch_size) if pairs is not None else {}
    layers: list[Layer] = []
    for name, found in sums.items():
        sigma = found.absolute
        order = sigma.argsort(descending=True, stable=True)[: int(top(sigma, spec.share).sum())]
        lent = seen.shared.get(name)
        layers.append(
            Layer(
                name=name,
                absolute=tuple(sigma.tolist()),
                relative=tuple(found.relative.tolist()),
                overall=found.overall,
                pull=tuple(pulls[name].tolist()) if name in pulls else (),
                agreement=rank_correlation(sigma, pulls[name].abs()) if name in pulls else None,
                sensitive=tuple(order.tolist()),
                shared_absolute=None if lent is None else float(lent.absolute.mean()),
                shared_relative=None if lent is None else lent.overall,
            )
        )
    return Explained(
        label=label,
        model=subject.card,
        clean=wilson(seen.right, seen.n),
        attacked=wilson(seen.held, seen.n),
        pairs=seen.right,
        tested=0 if pairs is None else len(pairs.x),
        layers=tuple(layers),
        overlaps=tuple(_overlaps(seen, beside, first, label, spec.share)),
    )


def _tests(subject: Subject, seen: Seen, threat: Threat, spec: ExplainSpec, notify: Notify) -> Iterator[Effect]:
    """Mask and replace the neurons that one half of the pairs chooses, on the other half."""
    pairs = _joined(seen)
    if pairs is None or not seen.halves[TO_CHOOSE]:
        return
    sigma = {name: found.absolute for name, found in seen.halves[TO_CHOOSE].items()}
    total = len(TESTS) * (len(sigma) + (len(sigma) > 1)) + (spec.suite is not None)
    given = {"draws": spec.draws, "seed": spec.seed, "batch_size": spec.batch_size}
    for done, row in enumerate(effects(subject.model, sigma, pairs, [spec.share], **given), 1):
        yield row
        notify(Event(stage="neurons masked", done=done, total=total, values={}))
    if spec.suite is not None:
        yield anew(subject.model, sigma, pairs, threat, spec, random=subject.random, notify=notify)


def _overlaps(seen: Seen, beside: Seen, first: str, label: str, share: float) -> list[Overlap]:
    """Of the sensitive sets with those under other attacks, and with those of the first model."""
    own = seen.whole
    others = [*seen.others.items(), *([(first, beside.whole)] if label != first else [])]
    rows: list[Overlap] = []
    for name, sums in others:
        for layer, found in own.items():
            if layer in sums and len(sums[layer].absolute) == len(found.absolute):
                sigmas = found.absolute, sums[layer].absolute
                first_set, second_set = (top(sigma, share) for sigma in sigmas)
                moving = int(((sigmas[0] > 0) | (sigmas[1] > 0)).sum())
                if bool(first_set.any() and second_set.any()):
                    chance = by_chance(moving, int(first_set.sum()), int(second_set.sum()))
                    rows.append(
                        Overlap(layer=layer, beside=name, jaccard=jaccard(first_set, second_set), chance=chance)
                    )
    return rows


def _joined(seen: Seen) -> Pairs | None:
    if not seen.kept:
        return None
    return Pairs(**{key: torch.cat([getattr(part, key) for part in seen.kept]) for key in ("index", "x", "x_adv", "y")})


def _illustrated(
    subject: Subject, seen: Seen, picture: Data | None, threat: Threat, spec: ExplainSpec
) -> Illustration | None:
    """The picture, or else the first pair whose prediction the attack changed, or the first there is."""
    model, sigma = subject.model, {layer: found.absolute for layer, found in seen.whole.items()}
    if picture is not None:
        one = picture.batch(torch.arange(1))
        made = _attacked(subject, spec.attacks[0], one.x, one.y, one.index, threat, spec)
        return illustrate(model, sigma, one.x, made.x_adv, one.y, threat, seed=spec.seed)
    pairs = _joined(seen)
    if pairs is None:
        return None
    with frozen(model), torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in pairs.x_adv.split(spec.batch_size)])
    wrong = (predicted != pairs.y).nonzero()[:, 0]
    at = int(wrong[0]) if len(wrong) else 0
    x, x_adv, y = (part[at : at + 1] for part in (pairs.x, pairs.x_adv, pairs.y))
    return illustrate(model, sigma, x, x_adv, y, threat, index=int(pairs.index[at]), seed=spec.seed)
