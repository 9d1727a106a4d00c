"""A whole explanation on toys: counts, halves, sums on shared images, overlaps, and what memory holds."""

import tracemalloc

import pytest
import torch

import toys
from rempart.attacks import attack_batch
from rempart.core.errors import Cancelled, DataError
from rempart.core.features import moved
from rempart.core.model import Classifier
from rempart.core.threat import Threat
from rempart.data import Data
from rempart.explain import Subject, explain, jaccard, top
from rempart.explain import run as running
from rempart.explain.sensitivity import by_chance
from rempart.models.load import card
from rempart.report.schema import AttackChoice, ExplainSpec

SHAPE, LAYER = (1, 4, 4), "net.2"
THREAT = Threat.parse("linf:0.02")
PGD = {"steps": 3}


def data(model: Classifier, n=40) -> Data:
    """Images with the classes of a model, but every fifth has another: wrong from the first."""
    x = toys.images(model.shape, n)
    y = torch.where(torch.arange(n) % 5 == 2, (toys.labels(model, x) + 1) % 3, toys.labels(model, x))
    return Data(
        "toys", "test", 100 + torch.arange(n), y, model.shape, ("0", "1", "2"), lambda numbers: x[numbers - 100]
    )


def spec(**changes) -> ExplainSpec:
    given = {"models": ("a",), "data": "toys", "threat": "linf:0.02", "share": 0.25, "draws": 2, "test": 9}
    given |= {"layers": (LAYER,), "attacks": (AttackChoice(name="pgd", options=PGD),), "batch_size": 7, "out": "o"}
    return ExplainSpec.model_validate(given | changes)


def explained(models: dict[str, Classifier], images: Data, **changes):
    subjects = {label: Subject(model, card(model, f"python:{label}:f")) for label, model in models.items()}
    found = explain(subjects, images, THREAT, spec(**changes))
    assert found.not_run == ()
    return found.explained, found.illustration


def pairs(model: Classifier, images: Data, name="pgd", options=PGD):
    """The right images, their counterparts and all verdicts, from one call of the attack."""
    batch = images.batch(torch.arange(len(images)))
    made = attack_batch(model, batch.x, batch.y, THREAT, name, options, index=batch.index)
    return batch.x[made.correct], made.x_adv[made.correct], made


def approx(values):
    return pytest.approx(values.tolist(), rel=1e-5, abs=1e-9)


def test_counts_sums_and_sets_are_those_of_all_pairs_at_once():
    model = toys.smooth(SHAPE)
    images = data(model)
    (found,), _ = explained({"a": model}, images)
    x, x_adv, made = pairs(model, images)
    assert (found.clean.k, found.clean.n) == (32, 40)
    assert found.attacked.k == int(made.right.sum()) and 0 < found.attacked.k < 32
    sums = moved(model, [(x, x_adv)], [LAYER])[LAYER]
    (layer,) = found.layers
    assert (found.pairs, found.tested, layer.name) == (32, 7, LAYER) and found.overlaps == ()
    assert layer.overall == pytest.approx(float(sums.change.sum() / sums.clean.sum()), rel=1e-5)
    assert layer.absolute == approx(sums.absolute) and layer.relative == approx(sums.relative)
    assert layer.sensitive == tuple(sums.absolute.argsort(descending=True)[:4].tolist())
    assert layer.shared_absolute is layer.shared_relative is None and len(layer.pull) == 16
    assert layer.agreement is not None and -1 <= layer.agreement <= 1


def test_neurons_are_chosen_on_even_places_and_tested_on_odd_ones(monkeypatch):
    model = toys.smooth(SHAPE)
    images = data(model)
    seen = []
    monkeypatch.setattr(
        running, "effects", lambda model, sigma, given, *rest, **more: seen.append((sigma, given)) or ()
    )
    explained({"a": model}, images)
    ((sigma, tested),) = seen
    x, x_adv, made = pairs(model, images)
    places = images.index[made.correct]
    spread = [place for place in range(16) if place * 9 % 20 < 9]  # 9 of the 20 there could be
    assert len(spread) == 7 and tested.index.tolist() == places[1::2][spread].tolist()
    assert torch.equal(tested.x, x[1::2][spread]) and torch.allclose(tested.x_adv, x_adv[1::2][spread])
    chosen = moved(model, [(x[::2], x_adv[::2])], [LAYER])[LAYER].absolute
    assert sigma[LAYER].tolist() == approx(chosen)


def test_images_that_test_are_spread_over_data_sorted_by_class():
    model = toys.smooth(SHAPE)
    images = data(model, 200)
    (found,), _ = explained({"a": model}, images, test=100)
    assert found.tested == found.pairs // 2, "all there are, where there is room"
    order = images.labels.argsort(stable=True)
    kept: list[int] = []
    made = running.effects
    try:
        running.effects = lambda model, sigma, given, *rest, **more: kept.extend(given.y.tolist()) or ()
        explained({"a": model}, images.take(order), test=30)
    finally:
        running.effects = made
    right = images.labels[order][toys.labels(model, images.batch(order).x) == images.labels[order]]
    for label in range(3):
        share = float((right == label).double().mean())
        assert sum(y == label for y in kept) / len(kept) == pytest.approx(share, abs=0.1)


def test_the_batch_size_does_not_matter():
    model = toys.smooth(SHAPE)
    (one,), picture = explained({"a": model}, data(model), batch_size=40)
    (other,), again = explained({"a": model}, data(model), batch_size=3)
    assert one.effects == other.effects and (one.clean, one.attacked) == (other.clean, other.attacked)
    assert one.layers[0].absolute == pytest.approx(other.layers[0].absolute, rel=1e-5)
    assert one.layers[0].pull == pytest.approx(other.layers[0].pull, abs=1e-6)
    assert picture is not None and again is not None and (picture.index, picture.label) == (again.index, again.label)


def test_a_second_model_is_also_shown_the_images_of_the_first():
    first, second = toys.smooth(SHAPE), toys.smooth(SHAPE, seed=1)
    images = data(first)
    told, _ = explained({"a": first, "b": second}, images)
    x, x_adv, _ = pairs(first, images)
    shared, (layer,) = moved(second, [(x, x_adv)], [LAYER])[LAYER], told[1].layers
    assert layer.shared_absolute == pytest.approx(float(shared.absolute.mean()), rel=1e-5)
    assert layer.shared_relative == pytest.approx(float(shared.change.sum() / shared.clean.sum()), rel=1e-5)
    own, own_adv, made = pairs(second, images)
    own_sums = moved(second, [(own, own_adv)], [LAYER])[LAYER]
    assert told[1].pairs == int(made.correct.sum()) < 32 and layer.absolute == approx(own_sums.absolute)
    (overlap,) = told[1].overlaps
    masks = [top(torch.tensor(model.layers[0].absolute), 0.25) for model in told]
    assert overlap.beside == "a" and overlap.jaccard == jaccard(*masks) and overlap.chance == by_chance(16, 4, 4)


def test_the_overlap_with_itself_is_1_and_attacks_keep_their_names_over_all_batches():
    model = toys.smooth(SHAPE)
    images = data(model)
    choices = [AttackChoice(name="pgd", options=PGD)] * 2 + [AttackChoice(name="fgsm")]
    (found,), _ = explained({"a": model}, images, attacks=choices)
    assert [(row.layer, row.beside) for row in found.overlaps] == [(LAYER, "pgd 2"), (LAYER, "fgsm")]
    assert found.overlaps[0].jaccard == 1
    x, x_adv, _ = pairs(model, images, "fgsm", {})
    fgsm = top(moved(model, [(x, x_adv)], [LAYER])[LAYER].absolute, 0.25)
    assert found.overlaps[1].jaccard == jaccard(fgsm, top(torch.tensor(found.layers[0].absolute), 0.25))
    told, _ = explained({"pgd": model, "fgsm": toys.smooth(SHAPE)}, images, attacks=choices[1:])
    assert [(row.beside, row.jaccard == 1) for row in told[1].overlaps][-1] == ("pgd", True)  # the same network twice


def test_without_test_images_there_are_sensitivities_alone():
    model = toys.smooth(SHAPE)
    (found,), picture = explained({"a": model}, data(model), test=0)
    assert found.tested == 0 and found.effects == () and picture is None
    assert found.layers[0].pull == () and found.layers[0].agreement is None and any(found.layers[0].absolute)


def test_a_model_that_gets_nothing_right_is_refused():
    model = toys.smooth(SHAPE)
    images = data(model)
    wrong = Data(
        "toys", "test", images.index, (toys.labels(model, toys.images(SHAPE, 40)) + 1) % 3, SHAPE, *_rest(images)
    )
    with pytest.raises(DataError, match="none of 40 for a"):
        explained({"a": model}, wrong)


def _rest(images: Data):
    return images.class_names, images.read


def test_the_picture_is_of_the_first_pair_that_broke():
    model, small = toys.smooth(SHAPE), Threat.parse("linf:0.005")
    images = data(model)
    picture = explain({"a": Subject(model, card(model, "python:a:f"))}, images, small, spec()).illustration
    batch = images.batch(torch.arange(len(images)))
    made = attack_batch(model, batch.x, batch.y, small, "pgd", PGD, index=batch.index)
    spread = [place for place in range(16) if place * 9 % 20 < 9]
    tested = made.correct.nonzero()[:, 0][1::2][spread]
    broken = tested[made.broken[tested]]
    assert len(broken) and broken[0] != tested[0], "the first one tested would do as well"
    assert picture is not None and picture.index == int(images.index[broken[0]])
    assert picture.adversarial != picture.predicted == picture.label


@pytest.mark.parametrize("stop", [Cancelled, KeyboardInterrupt])
def test_an_interruption_of_the_tests_keeps_what_was_found(stop):
    first, second = toys.smooth(SHAPE), toys.smooth(SHAPE, seed=1)
    images, seen = data(first), []

    def notify(event):
        seen.append(event.stage)
        if seen.count("a") == 4:
            raise stop

    subjects = {label: Subject(m, card(m, f"python:{label}:f")) for label, m in (("a", first), ("b", second))}
    whole, picture = explained({"a": first, "b": second}, images)
    found = explain(subjects, images, THREAT, spec(), notify=notify)
    assert found.not_run == ("tests of a", "tests of b") and found.illustration == picture
    assert found.explained[0].effects == whole[0].effects[:4] and found.explained[1].effects == ()
    for part, told in zip(found.explained, whole, strict=True):
        assert part.model_copy(update={"effects": told.effects}) == told


@pytest.mark.parametrize("stop", [Cancelled, KeyboardInterrupt])
@pytest.mark.parametrize("batches", [0, 2, 3, 5])
def test_an_interruption_of_the_attacks_keeps_the_batches_every_model_has_seen(stop, batches, monkeypatch):
    """As if only those images had been asked for, but for the tests."""
    first, second = toys.smooth(SHAPE), toys.smooth(SHAPE, seed=1)
    images = data(first)
    subjects = {label: Subject(m, card(m, f"python:{label}:f")) for label, m in (("a", first), ("b", second))}
    calls, see = [], running._see

    def see_and_stop(subject, *rest):
        pairs = see(subject, *rest)
        calls.append(subject)
        if len(calls) == 2 * batches + 2:  # in the next batch, when the second model has seen it but not all is summed
            raise stop
        return pairs

    monkeypatch.setattr(running, "_spread", lambda offered, *_: offered.nonzero()[:, 0])
    known = explain(subjects, images.take(torch.arange(7 * batches)), THREAT, spec()) if batches else None
    monkeypatch.setattr(running, "_see", see_and_stop)
    found = explain(subjects, images, THREAT, spec())
    assert found.not_run == (f"{40 - 7 * batches} of 40 images", "tests of a", "tests of b")
    if known is None:
        assert found.explained == () and found.illustration is None
        return
    assert [told.model_copy(update={"effects": ()}) for told in known.explained] == list(found.explained)
    assert found.illustration == known.illustration


def test_memory_does_not_grow_with_the_pairs():
    """Ten times the pairs: neither Python nor the tensors alive at the peak, feature maps among them, hold more."""
    model = toys.conv((1, 8, 8), width=16)

    def stream(n):
        for start in range(n):
            x = toys.images((1, 8, 8), 50, start)
            yield x, x.flip(3)

    held = {}
    for n in (1, 2, 20):  # the first warms up
        alive = []
        layers = ["net.2", "net.5"]

        def counted(module, inputs, output, alive=alive):
            alive.append(sum(1 for o in tensors() if o.shape[1:] == output.shape[1:]))

        handle = model.net[2].register_forward_hook(counted)
        tracemalloc.start()
        moved(model, stream(n), layers)
        held[n] = max(alive), tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        handle.remove()
    assert held[20][0] == held[2][0] and held[20][1] < 1.1 * held[2][1]


def tensors():
    import gc

    return [o for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim == 4]
