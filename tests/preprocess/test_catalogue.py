"""Substitute gradients, defended classifiers, and what they are called."""

import copy

import pytest
import torch
from torch import Tensor, nn

import toys
from rempart.attacks import attack_batch
from rempart.core.errors import ModelError, SpecError
from rempart.core.model import Classifier
from rempart.core.repro import digest_state
from rempart.core.threat import Threat
from rempart.preprocess import bpda, defended, described


def test_bpda_is_the_transform_forwards_to_the_last_bit_and_its_surrogate_backwards() -> None:
    def coarse(x: Tensor) -> Tensor:
        return (x * 3).round() / 3 + 1e-3

    x = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = bpda(coarse, lambda x: 2 * x * x)(x)
    assert torch.equal(y.detach(), coarse(x.detach()))
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, 4 * x.detach())
    (straight,) = torch.autograd.grad(bpda(coarse)(x).sum(), x)
    assert torch.equal(straight, torch.ones_like(x))


def test_the_first_defence_is_nearest_to_the_image_and_the_network_is_shared() -> None:
    model = toys.conv((3, 8, 8))
    chain = [("median", {"size": "3"}), ("bit-depth", {"bits": 2})]
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    wide = nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")  # one pixel of a mirrored edge
    middle = wide.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).median(-1).values
    expected = model((middle * 3).round() / 3)
    behind = defended(model, chain)
    torch.testing.assert_close(behind(x), expected)
    assert behind.net[1] is model.net  # pyright: ignore[reportIndexIssue]
    assert (behind.shape, behind.num_classes, behind.class_names) == (model.shape, 3, model.class_names)
    assert defended(model, []) is model


def test_modes_and_outputs_of_the_model_are_kept() -> None:
    model = toys.probabilities()
    model.eval()
    model.net[0].training = True  # pyright: ignore[reportIndexIssue]
    before = [module.training for module in model.modules()]
    behind = defended(model, [("bit-depth", {})])
    assert [module.training for module in model.modules()] == before
    assert behind.output == model.output and not behind.training


def test_digests_tell_defences_apart() -> None:
    model = toys.linear()
    chains = [[("bit-depth", {"bits": 3})], [("bit-depth", {"bits": 4})], [("median", {})]]
    digests = [digest_state(defended(model, chain).state_dict()) for chain in chains]
    assert len({*digests, digest_state(model.state_dict())}) == 4
    assert digests[0] == digest_state(defended(copy.deepcopy(model), [("bit-depth", {})]).state_dict())


def test_described_fills_in_the_defaults() -> None:
    assert described([("jpeg", {"quality": "50"}), ("median", {})]) == (
        "jpeg:quality=50,subsampling=4:2:0",
        "median:size=2",
    )


def test_bad_requests_are_refused() -> None:
    with pytest.raises(SpecError, match="jpeg"):
        defended(toys.linear(), [("jpg", {})])
    with pytest.raises(SpecError, match="bits=9"):
        defended(toys.linear(), [("bit-depth", {"bits": 9})])
    volume = Classifier(nn.Flatten(), shape=(1, 2, 2, 2), num_classes=8)
    with pytest.raises(ModelError, match="preprocessing defence"):
        defended(volume, [("median", {})])


def test_an_attack_through_the_defence_sees_past_the_rounding() -> None:
    """Rounding to two levels has no gradient; with the substitute pgd crosses the threshold of a pixel at 0.45."""
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0], [1.0]]))
        linear.bias.copy_(torch.tensor([0.5, 0.0]))
    model = Classifier(nn.Sequential(nn.Flatten(), linear), shape=(1, 1, 1), num_classes=2).eval()
    x, y = torch.tensor([0.45, 0.38]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    behind = defended(model, [("bit-depth", {"bits": 1})])
    outcome = attack_batch(behind, x, y, Threat.parse("linf:0.1"), "pgd", {"steps": 5, "random_start": False})
    assert outcome.success.tolist() == [True, False]
