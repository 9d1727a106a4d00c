"""One image from inside: the landscape of affine models is a plane, and images of any shape can be shown."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

import toys
from rempart.attacks.losses import lead
from rempart.core.features import blocks, features
from rempart.core.threat import Threat
from rempart.explain import illustrate

LARGE = Threat.parse("linf:0.1")


def pixels(text):
    return np.array(Image.open(io.BytesIO(base64.b64decode(text)))).astype(float)


def case(model, reach=0.01):
    """An image, a counterpart within `reach`, and its class."""
    x = toys.images(model.shape, 1)
    x_adv = x + reach * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).sign()
    return x, x_adv, toys.labels(model, x)


def test_the_landscape_of_an_affine_model_is_a_plane_whose_centre_is_the_margin():
    model = toys.linear((1, 4, 4), classes=2)
    x, x_adv, y = case(model)
    found = illustrate(model, {}, x, x_adv, y, LARGE, index=7)
    grid = np.array(found.landscape)
    margin = float(lead(model(x), y)[0].detach())
    weight, _ = toys.affine(model)
    size = float((weight[y[0]] - weight[1 - y[0]]).abs().sum())
    steps = np.linspace(-found.reach, found.reach, 21)
    assert grid.shape == (21, 21) and found.index == 7 and found.reach == pytest.approx(0.02, rel=1e-4)
    assert grid[10, 10] == pytest.approx(margin, abs=1e-5) and margin > 0
    side = (grid[10, 20] - grid[10, 0]) / (2 * found.reach)
    assert grid == pytest.approx(margin - size * steps[:, None] + side * steps[None], abs=1e-4)  # rows climb the loss
    assert abs(side) < size
    other = illustrate(model, {}, x, x_adv, y, LARGE, seed=1)
    assert other.landscape[10][0] != found.landscape[10][0] and other.landscape[0][10] == found.landscape[0][10]


def test_the_landscape_stays_inside_the_box():
    model = toys.linear((1, 4, 4), classes=2)
    x, x_adv, y = case(model)
    tight = Threat(norm="linf", eps=0.05, low=float(x.min()), high=float(x.max()))
    found = illustrate(model, {}, x, x_adv.clamp(tight.low, tight.high), y, tight)
    grid = np.array(found.landscape)
    weight, bias = toys.affine(model)
    z = x.double().flatten(1) @ weight.T + bias
    assert grid[10, 10] == pytest.approx(float(lead(z, y)[0]), abs=1e-4)
    steepest = -(weight[y[0]] - weight[1 - y[0]]).sign().view_as(x)
    reach = found.reach
    points = torch.cat([x + up * steepest for up in torch.linspace(-reach, reach, 21).tolist()])
    cut = points.clamp(tight.low, tight.high)
    assert not torch.equal(cut, points), "nothing to cut"
    margins = lead(cut.double().flatten(1) @ weight.T + bias, y.expand(21))
    assert grid[:, 10] == pytest.approx(margins.numpy(), abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 6, 5), (2, 6, 5), (1, 4, 6, 5), (2, 7)])
def test_images_of_every_shape_can_be_shown(shape):
    model = toys.conv(shape)
    x, x_adv, y = case(model)
    layers = blocks(model)
    sigma = {layer: torch.rand(8, generator=torch.Generator().manual_seed(3)) for layer in layers}
    found = illustrate(model, sigma, x, x_adv, y, LARGE)
    flat = (*shape[-2:],) if len(shape) > 2 else (1, shape[-1])
    for picture in (found.original_png, found.adversarial_png, found.perturbation_png):
        assert pixels(picture).shape == ((*flat, 3) if shape[0] == 3 else flat)
    for picture in (found.saliency_png, found.adversarial_saliency_png):
        assert pixels(picture).shape == flat
    assert [(m.layer, m.neuron) for m in found.maps] == [
        (layer, int(sigma[layer].argsort(descending=True)[rank])) for rank in range(3) for layer in layers
    ]
    assert all(pixels(m.clean_png).shape == flat for m in found.maps)


def test_maps_saliency_and_perturbation_are_those_of_the_model():
    model = toys.conv((1, 6, 5))
    x, x_adv, y = case(model)
    found = illustrate(model, {"net.2": torch.arange(8.0)}, x, x_adv, y, LARGE)
    with features(model, ["net.2"]) as seen:
        z = model(torch.cat([x, x_adv]))
    before, after = seen["net.2"][:, 7].detach().numpy()
    first = found.maps[0]
    low, high, reach = min(before.min(), after.min()), max(before.max(), after.max()), abs(after - before).max()
    assert (first.neuron, len(found.maps)) == (7, 6)
    assert (first.low, first.high, first.reach) == pytest.approx((low, high, reach), rel=1e-4)
    assert pixels(first.clean_png) == pytest.approx(255 * (before - low) / (high - low), abs=0.6)
    assert pixels(first.difference_png) == pytest.approx(255 * (0.5 + (after - before) / (2 * reach)), abs=0.6)
    assert (found.predicted, found.adversarial) == tuple(z.argmax(1).tolist()) and found.label == int(y)
    images = torch.cat([x, x_adv]).requires_grad_()
    (slope,) = torch.autograd.grad(lead(model(images), torch.cat([y, y])).sum(), images)
    for picture, own in zip((found.saliency_png, found.adversarial_saliency_png), slope[:, 0].abs(), strict=True):
        assert pixels(picture) == pytest.approx(255 * (own / own.max()).numpy(), abs=0.6)
    change = (x_adv - x)[0, 0].numpy()
    assert pixels(found.perturbation_png) == pytest.approx(255 * (0.5 + change / (2 * abs(change).max())), abs=0.6)
