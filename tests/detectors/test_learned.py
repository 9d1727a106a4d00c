"""Learned detectors against numbers worked out apart from them, and on attacks whose traces are planted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import toys
from rempart.core.errors import DataError, ModelError
from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.detectors import Learning, detectors
from rempart.detectors.combine import held_out
from rempart.detectors.fitted import fit, load, save
from rempart.detectors.magnet import divergence, measures
from rempart.detectors.networks import cross_entropy, descend, evened
from rempart.detectors.traces import REACH, histograms, responses, stored

CHEAP = {
    "attack-type": {"epochs": 20},
    "binary": {"epochs": 10},
    "magnet": {"epochs": 2, "width": 2},
}
SIDE = 12


def learning(n=24, first=0, seed=0, side=SIDE):
    """Smooth pictures of whole levels; `checks` adds 3 levels in a chequerboard, `stripes` in rows, noise 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 1, 3, 3), generator=generator)
    x = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    x = (x * 200 + 20).round() / 255
    row, column = torch.arange(side)[:, None], torch.arange(side)[None]
    checks, stripes = (((m % 2) * 6 - 3) / 255 for m in (row + column, row + 0 * column))
    noise = (torch.rand(x.shape, generator=generator) * 2 - 1).round() / 255
    at = torch.arange(0, n, 2)
    attacked = {"checks": (at, x[at] + checks), "stripes": (at + 1, x[at + 1] + stripes)}
    return Learning(
        x=x, y=torch.zeros(n, dtype=torch.long), index=torch.arange(n) + first, noisy=x + noise, attacked=attacked
    )


def model(side=SIDE, **given):
    return toys.conv((1, side, side), **given)


def fitted(name, seed=0, seen=None, net=None, **options):
    return fit(name, {**CHEAP[name], **options}, net or model(), seen or learning(), seed=seed)


# ---- what the networks are made of


def test_evened_weights_are_those_counted_by_hand():
    weight = evened(torch.tensor([0, 0, 0, 0, 1, 2, 2, 2]), [0.5, 0.25, 0.25])
    assert weight.tolist() == pytest.approx([1, 1, 1, 1, 2, 2 / 3, 2 / 3, 2 / 3])
    z = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    got = cross_entropy(z, torch.tensor([1, 0]), torch.tensor([1.0, 3.0]))
    assert float(got) == pytest.approx((-math.log(0.75) - 3 * math.log(0.5)) / 2)


def test_descent_finds_the_mean(untouched_rng):
    goal = torch.arange(10.0)
    found = descend(
        {"m": torch.zeros(1)},
        lambda weights, rows: (weights["m"] - goal[rows]).square().mean(),
        10,
        epochs=300,
        generator=torch.Generator().manual_seed(0),
        batch_size=5,
        learning_rate=0.1,
    )
    assert float(found["m"]) == pytest.approx(4.5, abs=0.02) and not found["m"].requires_grad


def test_histograms_count_differences_as_numpy_does():
    x = torch.randint(0, 30, (2, 1, 5, 7), generator=torch.Generator().manual_seed(0)) * 2 / 255 - 1
    got = histograms(x, -1.0, 0.0).numpy()
    bins = np.arange(-REACH, REACH + 1)
    for image, found in zip(x.numpy(), got, strict=True):
        parts = []
        for axis in (1, 2):
            for order in (1, 2):
                d = np.clip(np.diff((image + 1) * 255, n=order, axis=axis), -REACH, REACH).reshape(-1, 1)
                parts.append(np.exp(-0.5 * ((d - bins) / 0.5) ** 2).mean(0))
        assert np.allclose(found, np.sqrt(np.concatenate(parts) + 1e-4), atol=1e-4)


def test_stored_images_are_whole_levels_and_pass_the_gradient_on():
    x = (torch.rand((2, 1, 3, 3), generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_(True)
    kept = stored(x, -1.0, 1.0)
    assert torch.allclose((kept + 1) / 2 * 255, ((x + 1) / 2 * 255).round(), atol=1e-3)
    (slope,) = torch.autograd.grad((kept * torch.arange(9.0).view(3, 3)).sum(), x)
    assert torch.equal(slope[0, 0], torch.arange(9.0).view(3, 3))


def test_responses_are_the_logits_of_an_image_and_of_its_smoothed_copy():
    net, x = toys.linear((1, 3, 4), 4), toys.images((1, 3, 4), 2)
    weight, bias = toys.affine(net)
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
    smooth = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    both = [image.reshape(2, -1) @ weight.numpy().T + bias.numpy() for image in (x.double().numpy(), smooth)]
    middles = [z - z.mean(1, keepdims=True) for z in both]
    order = np.argsort(-both[0], axis=1)
    expected = [np.take_along_axis(z, order, 1) for z in middles]
    expected += [np.log(np.exp(z).sum(1, keepdims=True)) for z in middles]
    assert np.allclose(responses(net, x).detach().numpy(), np.concatenate(expected, 1), atol=1e-5)


def test_divergence_of_known_distributions():
    def z(*p):
        return torch.tensor([p]).log()

    assert float(divergence(z(0.2, 0.8), z(0.2, 0.8) + 3)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(z(1.0, 1e-30), z(1e-30, 1.0))) == pytest.approx(math.log(2), abs=1e-5)
    p, q = np.array([0.1, 0.9]), np.array([0.6, 0.4])
    m = (p + q) / 2
    expected = 0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum()
    assert float(divergence(z(*p), z(*q))) == pytest.approx(expected, abs=1e-6)


# ---- each detector


def test_magnet_measures_errors_and_divergences_of_what_is_restored():
    """Auto-encoders set by hand: A gives the image in two shades per block of 2 x 2, B gives half the image."""
    side = 4
    passes = torch.zeros(1, 1, 3, 3)
    passes[0, 0, 1, 1] = 1.0
    state = {f"pooled.{k}.weight": passes for k in range(4)} | {f"plain.{k}.weight": passes for k in range(3)}
    state["plain.2.weight"] = passes / 2
    state |= {key.replace("weight", "bias"): torch.zeros(1) for key in list(state)}
    net, x = toys.linear((1, side, side), 3), toys.images((1, side, side), 3)
    blocks = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    p = [(net(image) / 10).softmax(1) for image in (x, blocks)]
    m = (p[0] + p[1]) / 2
    tenth = 0.5 * sum((q * (q / m).log()).sum(1) for q in p)
    got = measures(net, x, state)
    assert torch.allclose(got[:, 0], (x - blocks).square().mean((1, 2, 3)), atol=1e-6)
    assert torch.allclose(got[:, 1], x.mean((1, 2, 3)) / 2, atol=1e-6)
    assert torch.allclose(got[:, 2], tenth, atol=1e-6)
    unit = torch.tensor([1e-3, 1.0, 1e9, 1e9])
    score = detectors["magnet"].function().score(net, x, {**state, "unit": unit}, rng=None)
    assert torch.allclose(score, torch.maximum(got[:, 0] / 1e-3, got[:, 1]))


def test_magnet_sets_the_unit_on_clean_images_kept_out_of_training():
    found, seen = fitted("magnet"), learning()
    aside = held_out(Draws(0, seen.index, ("detect", "fit")))
    kept = seen.x[aside]
    values = measures(found.model, kept, found.state).detach()
    assert torch.allclose(found.state["unit"], torch.quantile(values, 0.95, dim=0), rtol=1e-4)
    unseen = seen.x.clone()
    unseen[aside] = 0.5
    other = fitted("magnet", seen=Learning(x=unseen, y=seen.y, index=seen.index))
    assert torch.equal(found.state["pooled.0.weight"], other.state["pooled.0.weight"])


def test_magnet_learns_to_restore_clean_images():
    short, long = (fitted("magnet", epochs=k, width=4).state for k in (1, 300))
    fresh = learning(seed=5).x
    errors = [measures(model(), fresh, state)[:, 0].mean().detach() for state in (short, long)]
    assert float(errors[1]) < 0.5 * float(errors[0])
    shuffled = fresh.flatten(1)[:, torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(0))]
    assert float(measures(model(), shuffled.view_as(fresh), long)[:, 0].mean().detach()) > 2 * float(errors[1])


@pytest.mark.parametrize("on", ["activations", "input"])
def test_binary_tells_planted_attacks_from_clean_and_noisy_images(on):
    def dark(seen):  # the means of a random layer tell dark from light, hardly fine patterns
        return replace(seen, attacked={name: (at, images / 4) for name, (at, images) in seen.attacked.items()})

    found, fresh = fitted("binary", seen=dark(learning()), on=on, epochs=100), dark(learning(seed=7, first=100))
    clean = torch.cat([found.score(fresh.x, fresh.index), found.score(fresh.noisy, fresh.index)])
    attacked = torch.cat([found.score(images, fresh.index[at]) for at, images in fresh.attacked.values()])
    assert float((attacked[:, None] > clean).float().mean()) > 0.9


def test_binary_reads_the_layer_it_is_told():
    net, seen = model(), learning()
    by_hand = net.net[:3](seen.x).mean((2, 3))
    found = fitted("binary", net=net, layer="net.2")
    state = found.state
    assert torch.allclose(
        state["layer.mean"],
        torch.cat(
            [by_hand, net.net[:3](seen.noisy).mean((2, 3))]
            + [net.net[:3](images).mean((2, 3)) for _, images in seen.attacked.values()]
        ).mean(0),
        atol=1e-5,
    )
    z = (by_hand - state["layer.mean"]) / state["layer.std"]
    z = (z @ state["net.0.weight"].T + state["net.0.bias"]).relu() @ state["net.1.weight"].T + state["net.1.bias"]
    assert torch.allclose(found.score(seen.x, seen.index), z[:, 1] - z[:, 0], atol=1e-4)
    with pytest.raises(ModelError, match="layer"):
        fitted("binary", layer="nowhere")


def test_attack_type_names_planted_attacks_and_calls_noise_clean():
    found, fresh = fitted("attack-type", epochs=100), learning(seed=7, first=100)
    assert found.kinds == ("clean", "checks", "stripes")

    def named(images):
        return found.detector.name(found.model, images, found.state, rng=None)

    sets = [fresh.x, fresh.noisy, *(images for _, images in fresh.attacked.values())]
    for images, kind in zip(sets, (0, 0, 1, 2), strict=True):
        p = named(images)
        assert torch.allclose(p.sum(1), torch.ones(len(p)))
        assert float((p.argmax(1) == kind).float().mean()) > 0.9
        score = found.score(images, torch.arange(len(images)))
        assert torch.allclose(score.sigmoid(), 1 - p[:, 0], atol=1e-5)


def test_attack_type_learns_nothing_from_what_rounding_hides():
    seen = learning()
    checks = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 * 0.8 / 255 - 0.4 / 255
    shifted = {name: (torch.arange(24), seen.x + sign * checks) for name, sign in (("checks", 1), ("stripes", -1))}
    hidden = Learning(x=seen.x, y=seen.y, index=seen.index, attacked=shifted)
    found = fitted("attack-type", seen=hidden)
    scores = [found.score(images, seen.index) for images in (seen.x, shifted["checks"][1], shifted["stripes"][1])]
    assert torch.allclose(scores[0], scores[1], atol=1e-3) and torch.allclose(scores[0], scores[2], atol=1e-3)
    told = fitted("attack-type", seen=hidden, eight_bit=False, epochs=100)
    scores = [told.score(images, seen.index) for images in (seen.x, shifted["checks"][1])]
    assert float(scores[1].mean()) > float(scores[0].mean()) + 0.1


def test_an_attack_that_broke_nothing_is_left_out():
    seen = learning()
    more = fitted("attack-type", seen=replace(seen, attacked={"pgd": (torch.arange(0), seen.x[:0]), **seen.attacked}))
    assert more.kinds == ("clean", *seen.attacked)
    with torch.no_grad():
        assert torch.equal(more.named(seen.x, seen.index), fitted("attack-type", seen=seen).named(seen.x, seen.index))


# ---- what holds for all


@pytest.mark.parametrize("name", CHEAP)
def test_the_same_seed_gives_the_same_detector(name, untouched_rng):
    first, again, other = (fitted(name, seed=seed, net=_NET) for seed in (0, 0, 1))
    assert all(torch.equal(first.state[key], again.state[key]) for key in first.state)
    assert any(not torch.equal(first.state[key], other.state[key]) for key in first.state)


_NET = model()


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in CHEAP), ("binary", {"on": "input"})])
def test_scores_do_not_depend_on_batch_mates_and_have_a_gradient(name, options):
    found, fresh = fitted(name, **options), learning(n=6, seed=3)
    x = fresh.x.clone().requires_grad_(True)
    whole = found.score(x, fresh.index)
    alone = torch.cat([found.score(x[k : k + 1], fresh.index[k : k + 1]) for k in range(6)])
    assert whole.shape == (6,) and torch.allclose(whole, alone, atol=1e-4)
    (slope,) = torch.autograd.grad(whole.sum(), x)
    assert bool(slope.isfinite().all()) and bool((slope.flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("name", CHEAP)
def test_what_is_saved_scores_the_same(name, tmp_path):
    found, fresh = fitted(name), learning(n=6, seed=3)
    save(found, tmp_path)
    back = load(tmp_path, found.model)
    assert back.card == found.card
    assert torch.equal(back.score(fresh.x, fresh.index), found.score(fresh.x, fresh.index))


@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 2), (1, 3, 4, 5)])
@pytest.mark.parametrize("name", CHEAP)
def test_any_number_of_axes_channels_and_another_box(name, shape):
    inner = toys.conv(shape, 2)
    net = Classifier(inner.net, shape=shape, num_classes=2, low=-1.0, high=3.0).eval()
    x = toys.images(shape, 12) * 4 - 1
    attacked = {k: (torch.arange(12), (x + s).clamp(-1, 3)) for k, s in (("checks", 0.1), ("stripes", -0.1))}
    seen = Learning(x=x, y=torch.zeros(12, dtype=torch.long), index=torch.arange(12), attacked=attacked)
    options = [{}, {"on": "input"}] if name == "binary" else [{}]
    for given in options:
        scores = fitted(name, seen=seen, net=net, **given).score(x, seen.index)
        assert scores.shape == (12,) and bool(scores.isfinite().all())


def test_clean_only_means_that_attacks_are_not_looked_at():
    seen = learning()
    alone = fitted("magnet", seen=Learning(x=seen.x, y=seen.y, index=seen.index))
    assert all(torch.equal(alone.state[key], value) for key, value in fitted("magnet").state.items())
    for name in ("binary", "attack-type"):
        with pytest.raises(DataError, match="attack"):
            fitted(name, seen=Learning(x=seen.x, y=seen.y, index=seen.index))
