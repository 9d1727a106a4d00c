"""A request to explain: attack in batches, sum up what neurons do, test the sensitive ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rempart.attacks import attack_batch, attacks
from rempart.attacks.run import native
from rempart.core.data import Data
from rempart.core.errors import DataError
from rempart.core.events import Event, Notify, named, silent
from rempart.core.features import Moved, moved
from rempart.core.model import Classifier, frozen
from rempart.core.stats import wilson
from rempart.core.threat import Threat
from rempart.explain.contribution import TESTS, Pairs, effects, pull
from rempart.explain.pictures import illustrate
from rempart.explain.sensitivity import by_chance, jaccard, joined, layers_of, rank_correlation, top
from rempart.report.schema import (
    AttackChoice,
    Effect,
    Explained,
    ExplainSpec,
    Illustration,
    Layer,
    ModelCard,
    Overlap,
    Trend,
)

TO_CHOOSE, TO_TEST = 0, 1
"""Of the images that are right at first, those at even places choose neurons for the tests, those at odd ones test."""


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


def explain(
    models: Mapping[str, tuple[Classifier, ModelCard]],
    data: Data,
    threat: Threat,
    spec: ExplainSpec,
    *,
    notify: Notify = silent,
) -> tuple[tuple[Explained, ...], Illustration | None]:
    """Attack, measure and test each model; illustrate the first.

    Memory does not grow with the images but for the pairs that neurons are tested on.

    Raises:
        SpecError: If an attack, an option or a layer is unknown.
        DataError: If a model gets no image right, or the images do not fit it.
    """
    found = {label: Seen(layers_of(model, spec.layers)) for label, (model, _) in models.items()}
    first = next(iter(models))
    for batch in data.batches(spec.batch_size):
        lent: tuple[torch.Tensor, torch.Tensor] | None = None
        for label, (model, _) in models.items():
            seen = found[label]
            lent_now = _see(model, seen, batch.x, batch.y, batch.index, threat, spec)
            if label == first:
                lent = lent_now
            elif lent is not None and len(lent[0]):
                seen.shared = joined([seen.shared, moved(model, [lent], seen.layers)])
        done = found[first].n
        notify(Event(stage="neurons", done=done, total=len(data), values={"accuracy": found[first].held / done}))
    for label, seen in found.items():
        if seen.right == 0:
            raise DataError("images that the model classifies rightly", got=f"none of {seen.n} for {label}")
    told: list[Explained] = []
    for label, (model, card) in models.items():
        told.append(_told(label, model, card, found[label], found[first], first, spec, named(label, notify)))
    return tuple(told), _illustrated(models[first][0], found[first], threat, spec)


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
    return Trend(models=len(own), spearman=_correlated(own), shared=_correlated(shared))


def _correlated(points: Sequence[tuple[float, float]]) -> float | None:
    table = torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
    return rank_correlation(table[:, 0], table[:, 1])


def _see(
    model: Classifier,
    seen: Seen,
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    threat: Threat,
    spec: ExplainSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attack one batch, add to the sums, and return the pairs of the first attack."""
    pairs: tuple[torch.Tensor, torch.Tensor] = x[:0], x[:0]
    for number, (label, choice) in enumerate(_labelled(spec).items()):
        entry = attacks[choice.name]
        made = attack_batch(
            model, x, y, native(entry, threat), choice.name, choice.options, index=index, seed=spec.seed
        )
        right = made.correct
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
        room = spec.test - sum(len(part.x) for part in seen.kept)
        at = (halves == TO_TEST).nonzero()[:room, 0] if room > 0 else halves[:0]
        if len(at):
            seen.kept.append(Pairs(index=place[at], x=a[at], x_adv=b[at], y=c[at]))
        seen.n, seen.right, seen.held = seen.n + len(x), seen.right + len(a), seen.held + int((~made.broken).sum())
    return pairs


def _labelled(spec: ExplainSpec) -> dict[str, AttackChoice]:
    """The attacks by name, those that come again with their number."""
    found: dict[str, AttackChoice] = {}
    for number, choice in enumerate(spec.attacks, 1):
        found[f"{choice.name} {number}" if choice.name in found else choice.name] = choice
    return found


def _told(
    label: str,
    model: Classifier,
    card: ModelCard,
    seen: Seen,
    beside: Seen,
    first: str,
    spec: ExplainSpec,
    notify: Notify,
) -> Explained:
    """Everything of one model."""
    sums = seen.whole
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
                pull=tuple(pulls[name].tolist()) if name in pulls else (),
                agreement=rank_correlation(sigma, pulls[name].abs()) if name in pulls else None,
                sensitive=tuple(order.tolist()),
                shared_absolute=None if lent is None else float(lent.absolute.mean()),
                shared_relative=None if lent is None else float(lent.relative.mean()),
            )
        )
    rows: list[Effect] = []
    if pairs is not None and seen.halves[TO_CHOOSE]:
        sigma = {name: found.absolute for name, found in seen.halves[TO_CHOOSE].items()}
        total = len(TESTS) * (len(sigma) + (len(sigma) > 1))
        given = {"draws": spec.draws, "seed": spec.seed, "batch_size": spec.batch_size}
        for row in effects(model, sigma, pairs, [spec.share], **given):
            rows.append(row)
            notify(Event(stage="neurons masked", done=len(rows), total=total, values={}))
    return Explained(
        label=label,
        model=card,
        clean=wilson(seen.right, seen.n),
        attacked=wilson(seen.held, seen.n),
        pairs=seen.right,
        tested=0 if pairs is None else len(pairs.x),
        layers=tuple(layers),
        overlaps=tuple(_overlaps(seen, beside, first, label, spec.share)),
        effects=tuple(rows),
    )


def _overlaps(seen: Seen, beside: Seen, first: str, label: str, share: float) -> list[Overlap]:
    """Of the sensitive sets with those under other attacks, and with those of the first model."""
    own = seen.whole
    others = [*seen.others.items(), *([(first, beside.whole)] if label != first else [])]
    rows: list[Overlap] = []
    for name, sums in others:
        for layer, found in own.items():
            if layer in sums and len(sums[layer].absolute) == len(found.absolute):
                masks = [top(value.absolute, share) for value in (found, sums[layer])]
                chance = by_chance(len(masks[0]), int(masks[0].sum()))
                rows.append(Overlap(layer=layer, beside=name, jaccard=jaccard(*masks), chance=chance))
    return rows


def _joined(seen: Seen) -> Pairs | None:
    if not seen.kept:
        return None
    return Pairs(**{key: torch.cat([getattr(part, key) for part in seen.kept]) for key in ("index", "x", "x_adv", "y")})


def _illustrated(model: Classifier, seen: Seen, threat: Threat, spec: ExplainSpec) -> Illustration | None:
    """The first pair whose prediction the attack changed, or the first there is."""
    pairs = _joined(seen)
    if pairs is None:
        return None
    with frozen(model), torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in pairs.x_adv.split(spec.batch_size)])
    wrong = (predicted != pairs.y).nonzero()[:, 0]
    at = int(wrong[0]) if len(wrong) else 0
    sigma = {layer: found.absolute for layer, found in seen.whole.items()}
    x, x_adv, y = (part[at : at + 1] for part in (pairs.x, pairs.x_adv, pairs.y))
    return illustrate(model, sigma, x, x_adv, y, threat, index=int(pairs.index[at]), seed=spec.seed)
