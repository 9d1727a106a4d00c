"""Stabilising the neurons that adversarial images change most."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from rempart.core.errors import DataError, ModelError
from rempart.core.features import Neurons, blocks, change, features, sensitivity
from rempart.core.model import frozen, placed
from rempart.core.numbers import Pixels
from rempart.core.repro import Draws
from rempart.core.types import Images, Labels
from rempart.data import Data
from rempart.objectives.catalogue import Loss, Objective, budgeted, hits, objectives, ramp
from rempart.objectives.pgd_at import pgd_images
from rempart.report.store import read_explained

Choice = Literal["sensitive", "random", "least", "all"]
_CHUNK = 250  # images of the probe per pass
_CHOSEN = "neurons of "  # in the state: the mask of a layer


@objectives.register("sns", None)
def sns(
    *,
    threat: str = "linf:8/255",
    steps: Annotated[int, Ge(1)] = 10,
    step: Pixels | None = None,
    mixed: bool = True,
    weight: Annotated[float, Ge(0)] = 1.0,
    warmup: Annotated[float, Ge(0), Le(1)] = 0.2,
    share: Annotated[float, Gt(0), Le(1)] = 0.1,
    choose: Choice = "sensitive",
    probe: Annotated[int, Ge(1)] = 1000,
    refresh: Annotated[int, Ge(1)] | None = 1,
    neurons: str | None = None,
    detach: bool = False,
) -> Objective:
    """Adversarial training that also holds the most sensitive neurons of each layer still.

    Loss: (CE(x) + CE(x')) / 2 + weight * mean over layers and chosen neurons of |F(x) - F(x')|_1 / dim F, with x' from
    PGD, F the feature map or output of a neuron and dim its number of entries. Layers are the outputs of all blocks
    and what the last layer is fed with. Both halves go through the model in one pass, so that batch norm treats them
    alike; dropout does not, and adds to the distance.

    Before an epoch the sensitivity of every neuron, the mean of that distance, is measured on fixed training images
    under the same attack with the model as it is, and the neurons are chosen. The distance shrinks with the
    activations, which hardens nothing: a lower sensitivity is no evidence. If `choose=random` does as well at the same
    weight, the choice of neurons is irrelevant.

    With `neurons`, the layers and the sensitivities are those that `rempart explain` found; the choice is then the same
    throughout the training. It suits a training that begins with the model explained.

    Args:
        threat: What to harden against, for example `linf:8/255`.
        steps: Gradient evaluations of the attack per image and epoch.
        step: Step length in pixel units. Default 2.5 * eps / steps.
        mixed: Whether half of the cross-entropy is that of the original images, or none of it.
        weight: Of the distance.
        warmup: Share of the training over which the weight rises from 0; 0 suits a model that is trained already.
        share: Of the neurons of a layer that are chosen, at least one.
        choose: The most sensitive neurons; or, to compare, as many at random (the same throughout a training), the
            least sensitive, or all.
        probe: Training images to measure the sensitivity on, chosen by the seed.
        refresh: Epochs after which the neurons are chosen anew; none keeps those of the initial model.
        neurons: Run folder of `rempart explain`, whose first model has the layers of this one: nothing is measured, and
            `probe` and `refresh` do not count. It is read before the first epoch.
        detach: Whether the original image is only the goal of the distance, so that no gradient flows through it.

    Raises:
        ThreatError: If the threat has no budget.

    Source:
        Zhang, Liu, Liu, Xu, Yu, Ma, Li 2021, arXiv:1909.06978. The full text was not available to us. Of it: to measure
        how much neurons change and to constrain the sensitive ones. Our design: the mean instead of a sum, layers,
        number of neurons, weight, warm-up, probe and refresh.
    """
    within = budgeted(threat)
    attack = pgd_images(within, steps, step)
    state: Neurons = {}

    def before_epoch(model: nn.Module, data: Data, *, rng: Draws, epoch: int) -> None:
        last = int(state.get("epoch", torch.tensor(0)))
        if last > 0 and (neurons is not None or refresh is None or epoch - last < refresh):
            return
        fixed, device = replace(rng, stage=("sns",)), next(model.parameters()).device
        order = fixed.at("probe").uniform(torch.empty(len(data), 1, dtype=torch.float64)).flatten().argsort(stable=True)

        def pairs() -> Iterator[tuple[Images, Images]]:
            for positions in order[:probe].split(_CHUNK):
                batch = data.batch(positions)
                x = placed(model, batch.x)
                yield x, attack(model, x, batch.y.to(x.device), rng=fixed.select(positions), progress=1.0)

        measured = sensitivity(model, pairs(), _layers(model)) if neurons is None else _explained(neurons, model, data)
        for layer, sigma in measured.items():
            state[_CHOSEN + layer] = _chosen(sigma, share, choose, fixed.at(layer)).to(device)
        state["epoch"] = torch.tensor(epoch)

    def loss(model: nn.Module, x: Images, x_adv: Images, y: Labels, *, rng: Draws, progress: float) -> Loss:
        masks = {key.removeprefix(_CHOSEN): mask for key, mask in state.items() if key.startswith(_CHOSEN)}
        assert masks, "before_epoch chooses the neurons"
        with features(model, masks) as seen:
            z, z_adv = model(torch.cat([x, x_adv])).chunk(2)
        distances: list[Tensor] = []
        for layer, mask in masks.items():
            before, after = seen[layer].chunk(2)
            moved = change(before.detach() if detach else before, after).mean(0)
            distances.append((moved * mask.to(moved)).sum() / mask.sum())
        distance = torch.stack(distances).mean()
        adversarial = F.cross_entropy(z_adv, y)
        task = (F.cross_entropy(z, y) + adversarial) / 2 if mixed else adversarial
        parts = {"accuracy": hits(z, y), "accuracy_adv": hits(z_adv, y), "distance": distance.detach()}
        return Loss(task + weight * ramp(progress, warmup) * distance, parts)

    return Objective(loss=loss, craft=attack, threat=within, before_epoch=before_epoch, state=state)


def _layers(model: nn.Module) -> list[str]:
    """All blocks, and the pooling of the last one, which the last layer sees."""
    layers = list(dict.fromkeys([*blocks(model), *blocks(model, pooled=True)[-1:]]))
    if not layers:
        raise ModelError("a network with hidden layers", got="none", hint="choose another model or objective")
    return layers


def _explained(run: str, model: nn.Module, data: Data) -> Neurons:
    """The sensitivities of an explain run about one model, if its layers are also those of this model.

    Raises:
        DataError: If there is no such run, or it is about several models.
        ModelError: If a layer is missing, or has another number of neurons.
    """
    told, *others = read_explained(run)
    if others:
        raise DataError("neurons of a run about one model", got=f"{run}, which is about {len(others) + 1}")
    found = {layer.name: torch.tensor(layer.absolute, dtype=torch.float64) for layer in told.layers}
    hint = "explain the model that the training begins with"
    try:
        with frozen(model), torch.no_grad(), features(model, found) as seen:
            model(placed(model, data.batch(torch.arange(1)).x))
    except ModelError as error:
        raise ModelError(f"the layers of {run} in this network", got=str(error), hint=hint) from None
    for layer, sigma in found.items():
        count = seen[layer].shape[1] if layer in seen else 0
        if count != len(sigma):
            raise ModelError(f"{len(sigma)} neurons in {layer}, as in {run}", got=count, hint=hint)
    return found


def _chosen(sigma: Tensor, share: float, choose: Choice, rng: Draws) -> Tensor:
    """The mask of the chosen neurons of a layer."""
    n = len(sigma)
    count = n if choose == "all" else max(1, round(share * n))
    if choose == "random":
        sigma = replace(rng, index=torch.arange(n)).uniform(torch.empty(n, 1, dtype=torch.float64)).flatten()
    order = sigma.argsort(descending=choose != "least", stable=True)
    return torch.zeros(n, dtype=torch.bool).index_fill(0, order[:count], True)
