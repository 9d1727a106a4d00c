"""Take neurons out of a model: the same network with weights of 0."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rempart.core.errors import ModelError, SpecError
from rempart.core.features import Neurons, block_of, watched
from rempart.core.identity import identity
from rempart.core.model import Classifier, frozen, placed
from rempart.core.repro import Draws
from rempart.explain.anew import without
from rempart.explain.sensitivity import Choose, matching, top
from rempart.models.load import architecture, load
from rempart.models.save import CONFIG, save
from rempart.report.store import read, read_explained

_PROBE = 16  # images of noise the pruned model is checked on


def prune(model: Classifier, neurons: Neurons) -> Classifier:
    """A copy of a model whose chosen neurons give 0, whatever the image; its architecture stays.

    In the weighted layer of the block, and in the batch norm behind it, the weights and biases of these neurons become
    0. Whether that does it is checked by running both: it does not where the activation is not 0 at 0, or where a
    residual sum brings other values.

    Args:
        model: The classifier; left as it was.
        neurons: By layer, named as for `core.features.watched`, the mask of those to take out, shape (neurons).

    Raises:
        ModelError: If neurons of a layer cannot be taken out like this.
    """
    pruned = copy.deepcopy(model)
    modules = dict(pruned.named_modules())
    for layer, mask in neurons.items():
        for name in block_of(pruned, layer):
            module = modules[name]
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_NORMS)):
                _clear(module, mask, layer)
    _check(model, pruned, neurons)
    return pruned


def prune_model(
    source: str,
    run: str | Path,
    out: str | Path,
    *,
    share: float = 0.1,
    choose: Choose = "sensitive",
    layers: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, list[int]]:
    """Take neurons out of a saved model by what an explain run found of it, and save the result.

    Args:
        source: A model that `models.load` takes, and that can be saved.
        run: The folder of an explain run, or its report, in which the same model occurs.
        out: A new folder for the pruned model.
        share: Of the neurons of each layer, in (0, 1).
        choose: The most sensitive, the least, or as many at random.
        layers: Names or patterns; none: all layers of the run.
        seed: Of the random choice.

    Returns:
        By layer, the numbers of the neurons taken out.

    Raises:
        SpecError: If the share or a pattern is wrong, or there is a model in `out`.
        DataError: If there is no such run.
        ModelError: If the run is not about this model, or its neurons cannot be taken out.
    """
    if not 0 < share < 1:
        raise SpecError("a share in (0, 1)", got=share, hint="of a layer without neurons, nothing would be left")
    if (Path(out) / CONFIG).exists():
        raise SpecError("a folder without a model", got=out, hint="choose another --out")
    name, options, box = architecture(source)
    model = load(source)
    explained, known = read_explained(run), identity(model)
    differs = [told.model.identity.difference(known) for told in explained]
    told = next((told for told, other in zip(explained, differs, strict=True) if not other), None)
    if told is None:
        raise ModelError(
            f"one of the models that {run} is about",
            got=f"{source}, which has {max(differs, key=lambda words: words.startswith('the same'))}",
            hint="run `rempart explain` on it, without defences",
        )
    sigma = {layer.name: torch.tensor(layer.absolute, dtype=torch.float64) for layer in told.layers}
    rng = Draws(seed, torch.zeros(1, dtype=torch.int64), ("prune",))
    wanted = matching(list(sigma), layers or ["*"])
    neurons = {layer: top(sigma[layer], share, choose, rng.at(layer)) for layer in wanted}
    pruned = prune(model, neurons)
    numbers = {layer: mask.nonzero()[:, 0].tolist() for layer, mask in neurons.items()}
    record = {"from": source, "explained": str(run), "share": share, "choose": choose, "seed": seed, "neurons": numbers}
    record |= {"doubts": list(doubts(run))}
    save(pruned, out, name=name, options=options, box=box, training={"pruned": record})
    return numbers


def doubts(run: str | Path) -> tuple[str, ...]:
    """What speaks against choosing neurons by an explain run, one sentence each.

    Raises:
        DataError: If there is no such run.
    """
    report = read(run)
    found: list[str] = []
    if not report.complete:
        found.append(f"The run was interrupted (not run: {', '.join(report.not_run)}): fewer images chose the neurons.")
    if report.data.split == "test":
        found.append(
            "Test images chose the neurons, and an audit on them judges its own choice: explain on train images."
        )
    return tuple(found)


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _clear(module: nn.Module, mask: Tensor, layer: str) -> None:
    for parameter in (module.weight, module.bias):
        if isinstance(parameter, Tensor):
            if len(parameter) != len(mask):
                raise ModelError(f"{len(parameter)} neurons in {layer}", got=len(mask), hint=_HINT)
            with torch.no_grad():
                parameter[mask.to(parameter.device)] = 0


def _check(model: Classifier, pruned: Classifier, neurons: Neurons) -> None:
    """Compare with the model whose neurons are masked while it runs."""
    noise = Draws(0, torch.arange(_PROBE), ("prune",)).uniform(torch.empty(_PROBE, *model.shape))
    x = placed(model, model.low + (model.high - model.low) * noise)

    def is_zero(layer: str, value: Tensor) -> None:
        left = value[:, neurons[layer].to(value.device)].abs()
        if bool((left != 0).any()):
            raise ModelError(
                f"neurons of {layer} that give 0 without weights", got=f"up to {float(left.max()):.3g}", hint=_HINT
            )

    with frozen(model), frozen(pruned), torch.no_grad():
        with watched(pruned, neurons, is_zero):
            z = pruned(x)
        expected = without(model, neurons)(x)
    if not torch.allclose(z, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
        raise ModelError(f"neurons of {', '.join(neurons)} that nothing goes around", got="other logits", hint=_HINT)


_HINT = "name --layers that end with a ReLU or a pooling, and no residual sum"
