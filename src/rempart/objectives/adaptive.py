"""Adversarial training whose strength follows the model, with a mixture of attacks."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from rempart.attacks.gradient import mim, pgd
from rempart.core.errors import SpecError
from rempart.core.features import features, penultimate
from rempart.core.model import frozen
from rempart.core.numbers import Pixels
from rempart.core.registry import suggestion
from rempart.core.repro import Draws
from rempart.core.threat import Threat, wider
from rempart.core.types import Images, Labels
from rempart.objectives.catalogue import Loss, Objective, boxed, budgeted, hits, objectives

Weight = Annotated[float, Ge(0)]
Size = Annotated[Pixels, Ge(0)]
Member = Callable[[nn.Module, Images, Labels, Threat, int, Draws], Images]
MEMBERS: Mapping[str, Member] = {
    "fgsm": lambda model, x, y, ball, steps, rng: pgd(model, x, y, ball, steps=1, step=1.25 * ball.budget, rng=rng),
    "pgd": lambda model, x, y, ball, steps, rng: pgd(model, x, y, ball, steps=steps, rng=rng),
    "mim": lambda model, x, y, ball, steps, rng: mim(model, x, y, ball, steps=steps, rng=rng),
    "margin": lambda model, x, y, ball, steps, rng: pgd(model, x, y, ball, steps=steps, loss="margin", rng=rng),
}
"""The attacks of the mixture: each starts from the original image and stays in the one ball it is given."""


@objectives.register("adaptive", None)
def adaptive(
    *,
    threat: str = "linf:8/255",
    mode: Literal["target", "article"] = "target",
    eps_0: Size | None = None,
    eps_min: Size | None = None,
    alpha: Size = 1e-5,
    target: float = 0.5,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
    attacks: str = "fgsm,pgd,mim,margin",
    draw: Literal["batch", "sample"] = "batch",
    steps: Annotated[int, Ge(1)] = 10,
    w_clean: Weight = 0.5,
    w_adv: Weight = 0.5,
    w_feature: Weight = 0.1,
) -> Objective:
    """Train on images and on their adversarial versions, of a strength that is steered by how the model copes.

    Loss: w_clean * CE(x) + w_adv * CE(x') + w_feature * mean |phi(x) - phi(x')|^2 / dim, phi being what the last layer
    is fed with. Both halves go through the model in one pass, so that batch norm treats them alike.

    After each step the gap CE(x') - CE(x), smoothed, moves the budget: target: eps + alpha * (target - gap), so that
    the attack gets stronger only while the model copes with it. article: eps + alpha * gap, which only ever grows as
    long as the adversarial images cost more than the originals, and fastest for the model that copes worst.

    Args:
        threat: The norm, and the largest budget.
        mode: How the gap steers the budget.
        eps_0: First budget in pixel units. Default a quarter of that of the threat.
        eps_min: Smallest budget in pixel units. Default an eighth of that of the threat.
        alpha: Pixel units by which a gap of 1 moves the budget at each step; fit it to the number of steps.
        target: The gap in cross-entropy at which mode target keeps the budget.
        momentum: Share of the old gap in the smoothed one; 0 takes each batch as it is.
        attacks: Which to mix, separated by commas: fgsm (one step of 1.25 eps from a random start), pgd, mim, margin
            (pgd on the margin of the logits).
        draw: One attack for each batch, by the draws of its lowest sample number, whatever its order; or one for each
            sample, by its own draws.
        steps: Gradient evaluations of pgd, mim and margin.
        w_clean: Weight of the cross-entropy of the originals.
        w_adv: Weight of the cross-entropy of the adversarial images.
        w_feature: Weight of the distance of their features.

    Raises:
        SpecError: If an attack is unknown, or not eps_min <= eps_0 <= that of the threat.
        ThreatError: If the threat has no budget.

    Source:
        An article on adaptive training that we could trace to no paper (its title names DeepSeek); none of its figures
        can be verified. Of it: the three ideas and mode article. Our design: mode target; the attacks, which start
        from the original and share one ball, where the article chains them; one joint loss; one step per batch;
        attacks in inference mode; the defaults of all weights; fgsm with the step and start of Wong et al. 2020,
        arXiv:2001.03994.
    """
    within = budgeted(threat)
    least = within.budget / 8 if eps_min is None else eps_min
    first = within.budget / 4 if eps_0 is None else eps_0
    if wider(least, first) or wider(first, within.budget):
        raise SpecError("eps_min <= eps_0 <= eps of the threat", got=f"{least:g}, {first:g}, {within.budget:g}")
    members = [_member(name.strip()) for name in attacks.split(",")]
    state = {"eps": torch.tensor(first, dtype=torch.float64)}

    def craft(model: nn.Module, x: Images, y: Labels, *, rng: Draws, progress: float) -> Images:
        ball = replace(boxed(within, model), eps=float(state["eps"]))
        picks, x_adv = _picks(rng.at("attack"), draw, len(members)), x.clone()
        with frozen(model):
            for number, member in enumerate(members):
                part = (picks == number).nonzero().flatten()
                if len(part) > 0:
                    rows = part.to(x.device)
                    x_adv[rows] = member(model, x[rows], y[rows], ball, steps, rng.select(part))
        return x_adv

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        phi = penultimate(model)
        with features(model, [phi]) as seen:
            z, z_adv = model(torch.cat([x, x_adv])).chunk(2)
        clean, adversarial = F.cross_entropy(z, y), F.cross_entropy(z_adv, y)
        before, after = seen[phi].chunk(2)
        distance = F.mse_loss(before, after)
        value = w_clean * clean + w_adv * adversarial + w_feature * distance
        parts = {
            "accuracy": hits(z, y),
            "accuracy_adv": hits(z_adv, y),
            "gap": (adversarial - clean).detach(),
            "feature": distance.detach(),
            "eps": state["eps"].to(z.detach()),
        }
        return Loss(value, parts)

    def after_step(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
        gap = float(parts["gap"])
        gap = momentum * float(state.get("gap", gap)) + (1 - momentum) * gap
        eps = float(state["eps"]) + alpha * (gap if mode == "article" else target - gap)
        state["gap"] = torch.tensor(gap, dtype=torch.float64)
        state["eps"] = torch.tensor(min(max(eps, least), within.budget), dtype=torch.float64)

    return Objective(loss=loss, craft=craft, threat=within, after_step=after_step, state=state)


def _member(name: str) -> Member:
    if name not in MEMBERS:
        raise SpecError(f"attacks out of {', '.join(MEMBERS)}", got=repr(name), hint=suggestion(name, MEMBERS).strip())
    return MEMBERS[name]


def _picks(rng: Draws, draw: str, count: int) -> Tensor:
    """Which of `count` attacks each sample gets, on the CPU."""
    n = len(rng.index)
    chosen = rng if draw == "sample" else rng.select(rng.index.argmin().expand(n))
    shares = chosen.uniform(torch.empty(n, 1, dtype=torch.float64)).flatten()
    return (shares * count).long().clamp_max(count - 1)
