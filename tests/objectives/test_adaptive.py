"""The controller against sequences written out, and the mixture against the registered attacks."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import toys
from rempart.attacks import attacks as registered
from rempart.core.errors import SpecError, ThreatError
from rempart.core.model import frozen
from rempart.core.repro import Draws
from rempart.core.threat import Threat
from rempart.objectives import adaptive

SHAPE = (1, 4, 4)
N = 40
X = toys.images(SHAPE, N)
RNG = Draws(5, torch.arange(100, 100 + N))


def smooth():
    model = toys.smooth(SHAPE)
    return model.train(), toys.labels(model, X)


def steered(objective, gaps):
    """The budgets after steps with these gaps."""
    budgets = []
    for gap in gaps:
        objective.after_step(nn.Identity(), {"gap": torch.tensor(gap)})
        budgets.append(float(objective.state["eps"]))
    return budgets


OPTIONS = {"threat": "linf:0.1", "eps_0": 0.04, "eps_min": 0.02, "alpha": 0.01, "momentum": 0.0}


def test_mode_target_moves_towards_the_gap_it_wants_and_stays_in_its_bounds():
    budgets = steered(adaptive(mode="target", target=0.5, **OPTIONS), [0.5, 0.1, 0.1, 2.5, 2.5, 0.0, -9.0, -9.0])
    # + 0, + 0.004, + 0.004, - 0.02, - 0.02 (cut), + 0.005, + 0.095 (cut), + 0.095 (cut)
    assert budgets == pytest.approx([0.04, 0.044, 0.048, 0.028, 0.02, 0.025, 0.1, 0.1], abs=1e-9)


def test_mode_article_only_grows_while_adversarial_images_cost_more():
    budgets = steered(adaptive(mode="article", **OPTIONS), [0.5, 0.1, 2.5, 0.0, 9.0, 1.0, -1.0, -99.0])
    assert budgets == pytest.approx([0.045, 0.046, 0.071, 0.071, 0.1, 0.1, 0.09, 0.02], abs=1e-9)
    gaps = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    budgets = steered(adaptive(mode="article", **OPTIONS | {"alpha": 0.001}), gaps)
    assert all(a < b for a, b in pairwise(budgets))
    assert budgets[-1] == pytest.approx(0.04 + 0.001 * sum(gaps))


def test_the_gap_is_smoothed_from_the_first_one_on():
    objective = adaptive(mode="article", **OPTIONS | {"momentum": 0.75})
    # smoothed: 1; 0.75 * 1 + 0.25 * 3 = 1.5; 0.75 * 1.5 + 0.25 * 0.5 = 1.25
    assert steered(objective, [1.0, 3.0, 0.5]) == pytest.approx([0.05, 0.065, 0.0775])
    assert float(objective.state["gap"]) == pytest.approx(1.25)


def test_budgets_are_shares_of_the_threat_unless_given():
    objective = adaptive(threat="l2:2", alpha=1)
    assert float(objective.state["eps"]) == 0.5 and str(objective.threat) == "l2:2"
    assert steered(objective, [99.0]) == [0.25]


@pytest.mark.parametrize("options", [{"eps_0": 0.2}, {"eps_min": 0.05}, {"attacks": "fgsm,cw"}, {"attacks": ""}])
def test_impossible_options_are_refused(options):
    with pytest.raises(SpecError, match=r"eps_min <= eps_0|attacks out of fgsm, pgd, mim, margin"):
        adaptive(**OPTIONS | options)
    with pytest.raises(ThreatError):
        adaptive(threat="linf")


BALL = Threat(norm="l2", eps=0.1)  # in linf all four end in the same corners
CALLS = {
    "fgsm": ("pgd", {"steps": 1, "step": 1.25 * 0.1}),
    "pgd": ("pgd", {"steps": 4}),
    "mim": ("mim", {"steps": 4}),
    "margin": ("pgd", {"steps": 4, "loss": "margin"}),
}


def called(name, model, y, rng=RNG):
    """The registered attack itself."""
    attack, options = CALLS[name]
    with frozen(model):
        return registered[attack].function(model, X, y, BALL, rng=rng, **options)


def crafted(objective, model, x, y, rng=RNG):
    return objective.craft(model, x, y, rng=rng, progress=0.5)


def mixture(**options):
    return adaptive(threat="l2:0.4", eps_0=0.1, steps=4, **options)


@pytest.mark.parametrize("draw", ["batch", "sample"])
@pytest.mark.parametrize("name", CALLS)
def test_each_attack_is_the_registered_one_with_the_same_draws(name, draw):
    model, y = smooth()
    x_adv = crafted(mixture(attacks=name, draw=draw), model, X, y)
    same = [other for other in CALLS if torch.equal(x_adv, called(other, model, y))]
    assert same == [name] and model.training


def test_of_a_mixture_each_sample_gets_its_own_whatever_the_order():
    model, y = smooth()
    single = {name: called(name, model, y) for name in CALLS}
    x_adv = crafted(mixture(draw="sample"), model, X, y)
    owners = [[name for name in CALLS if torch.allclose(x_adv[n], single[name][n], atol=1e-6)] for n in range(N)]
    assert all(len(names) == 1 for names in owners) and {names[0] for names in owners} == set(CALLS)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = crafted(mixture(draw="sample"), model, X[order], y[order], RNG.select(order))
    assert torch.allclose(shuffled, x_adv[order], atol=1e-6)


def test_or_a_batch_gets_one_whatever_the_order():
    model, y = smooth()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    drawn = []
    for epoch in range(20):
        rng = Draws(5, RNG.index, (str(epoch),))
        x_adv = crafted(mixture(), model, X, y, rng)
        drawn += [name for name in CALLS if torch.equal(x_adv, called(name, model, y, rng))]
        shuffled = crafted(mixture(), model, X[order], y[order], rng.select(order))
        assert torch.allclose(shuffled, x_adv[order], atol=1e-6)
    assert len(drawn) == 20 and set(drawn) == set(CALLS)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", CALLS)
def test_every_attack_stays_in_the_ball_of_the_moment(name, norm):
    model, y = smooth()
    objective = adaptive(threat=f"{norm}:0.4", eps_min=0.01, alpha=1, momentum=0, attacks=name, steps=3)
    for eps in (0.1, 0.37, 0.01):
        if eps != 0.1:
            steered(objective, [0.5 - (eps - float(objective.state["eps"]))])
        x_adv = crafted(objective, model, X, y)
        assert float(objective.state["eps"]) == pytest.approx(eps)
        assert bool(Threat(norm=norm, eps=eps).holds(X, x_adv).all())
        assert float(Threat(norm=norm).distance(X, x_adv).max()) > 0.7 * eps


def test_a_state_that_was_kept_goes_on_as_if_nothing_had_happened():
    model, y = smooth()
    first = adaptive(**OPTIONS | {"momentum": 0.9})
    steered(first, [0.3, 0.9])
    second = adaptive(**OPTIONS | {"momentum": 0.9})
    assert not torch.equal(crafted(first, model, X, y), crafted(second, model, X, y))
    second.state.update({name: value.clone() for name, value in first.state.items()})
    assert torch.equal(crafted(first, model, X, y), crafted(second, model, X, y))
    assert steered(first, [0.1, 0.7]) == steered(second, [0.1, 0.7])


def test_the_loss_is_the_weighted_sum_written_out():
    model, y = smooth()
    x_adv = (X + 0.05).clamp(0, 1)
    w, v = model.net[1], model.net[3]
    phi = [torch.tanh(images.flatten(1) @ w.weight.T + w.bias).detach() for images in (X, x_adv)]
    clean, adversarial = (F.cross_entropy(p @ v.weight.T + v.bias, y).detach() for p in phi)
    distance = sum(float(((a - b) ** 2).sum() / 16) for a, b in zip(*phi, strict=True)) / N
    objective = adaptive(**OPTIONS, w_clean=0.3, w_adv=0.6, w_feature=2.0)
    loss = objective.loss(model, X, x_adv, y, rng=RNG, progress=1.0)
    expected = 0.3 * clean + 0.6 * adversarial + 2 * distance
    assert float(loss.value.detach()) == pytest.approx(float(expected), rel=1e-5)
    parts = {name: float(value) for name, value in loss.parts.items()}
    assert parts == pytest.approx(
        {
            "accuracy": 1.0,
            "accuracy_adv": float((model(x_adv).argmax(1) == y).float().mean()),
            "gap": float(adversarial - clean),
            "feature": distance,
            "eps": 0.04,
        },
        rel=1e-4,
    )


def test_both_halves_go_through_batch_norm_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).train()
    y, x_adv = torch.arange(N) % 3, X + 0.05
    objective = adaptive(threat="linf:0.1", w_feature=0)
    loss = objective.loss(model, X, x_adv, y, rng=RNG, progress=1.0)
    expected = F.cross_entropy(model(torch.cat([X, x_adv])), y.repeat(2))
    assert torch.allclose(loss.value, expected) and int(model[2].num_batches_tracked) == 2
    crafted(objective, model, X, y)  # in inference mode, which leaves no trace
    assert int(model[2].num_batches_tracked) == 2 and all(
        p.requires_grad and p.grad is None for p in model.parameters()
    )


def test_without_a_budget_the_images_stay():
    model, y = smooth()
    assert torch.equal(crafted(adaptive(threat="linf:0"), model, X, y), X)
