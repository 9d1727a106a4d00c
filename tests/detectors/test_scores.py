"""Scores against independent implementations: scikit-learn, SciPy, or the formula in NumPy."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from scipy.special import logsumexp, softmax
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KernelDensity, LocalOutlierFactor, NearestNeighbors
from torch import nn

import toys
from rempart.core.errors import DataError, ModelError, SpecError
from rempart.core.model import Classifier, frozen
from rempart.core.repro import Draws
from rempart.detectors import Learning, fit
from rempart.detectors.combine import held_out
from rempart.detectors.density import dropping
from rempart.detectors.lid import dimension
from rempart.detectors.squeeze import median_filtered, non_local_means, rounded

MODEL = toys.conv((3, 4, 4), seed=4)
N = 90
INDEX = torch.arange(N)
X = 0.5 + 3 * (toys.images((3, 4, 4), N) - 0.5)
Y = torch.arange(N) % 3
NEW, NEW_INDEX = 0.5 + 4 * (toys.images((3, 4, 4), 12, 7) - 0.5), torch.arange(12) + 500
FREE = ~held_out(Draws(0, INDEX, ("detect", "fit")))


def scored(name: str, **options: Any) -> np.ndarray:
    detector = fit(name, options, MODEL, Learning(x=X, y=Y, index=INDEX))
    return detector.score(NEW, NEW_INDEX).detach().double().numpy()


def logits(x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return MODEL.net(x).double().numpy()


def layers(x: torch.Tensor) -> list[np.ndarray]:
    """The first block by its mean over space, and what the last layer sees."""
    with torch.no_grad():
        return [MODEL.net[:3](x).mean((2, 3)).double().numpy(), MODEL.net[:8](x).double().numpy()]


def close(found: np.ndarray, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_three_fourths_are_fitted_on_and_the_others_do_not_depend_on_their_order() -> None:
    assert int(FREE.sum()) == N - N // 4
    order = torch.arange(N).flip(0)
    assert torch.equal(held_out(Draws(0, INDEX[order], ("detect", "fit"))), ~FREE[order])


# ---- logits


def test_logits() -> None:
    z = logits(NEW)
    p = softmax(z, axis=1).max(1)
    close(scored("max-softmax"), np.log((1 - p) / p))
    close(scored("margin"), [np.sort(row)[-2] - np.sort(row)[-1] for row in z])
    close(scored("energy"), -logsumexp(z, axis=1))
    close(scored("energy", temperature=3.0), -3 * np.log(np.exp(z / 3).sum(1)))


def test_max_softmax_is_not_rounded_away_where_the_model_is_sure() -> None:
    model = toys.rescaled(toys.linear(), 1e4)
    x = toys.images(model.shape).requires_grad_()
    found = fit("max-softmax", {}, model, Learning(x=x.detach(), y=torch.zeros(8).long(), index=torch.arange(8)))
    score = found.score(x, torch.arange(8))
    assert float(model(x).detach().softmax(1).amax(1).median()) == 1.0
    assert len(score.unique()) == 8 and bool((torch.autograd.grad(score.sum(), x)[0] != 0).any())


# ---- noise and squeezing


def test_noise_is_the_mean_distance_of_probabilities() -> None:
    p, expected = softmax(logits(NEW), axis=1), np.zeros(12)
    for i in range(5):
        noisy = NEW + 0.2 * Draws(0, NEW_INDEX, ("detect", str(i))).normal(NEW)
        expected += np.abs(softmax(logits(noisy), axis=1) - p).sum(1) / 5
    close(scored("noise", sigma=0.2, passes=5), expected)


@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 3, 4, 4), (1, 2, 7), (1, 1, 3, 4, 5)])
def test_squeezers_are_those_of_numpy_and_scipy(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    close(rounded(x, 3).numpy(), np.rint(x.numpy() * 7) / 7)
    for width in (2, 3):
        window = (1, 1, *(width,) * (len(shape) - 2))
        close(median_filtered(x, width).numpy(), scipy.ndimage.median_filter(x.numpy(), size=window, mode="reflect"))


def test_non_local_means_is_the_weighted_mean_written_out() -> None:
    x = torch.rand((1, 2, 5, 4), generator=torch.Generator().manual_seed(1)).double()
    image, h = x[0].numpy(), 0.4
    pad = np.pad(image, ((0, 0), (3, 3), (3, 3)), mode="edge")  # 2 for the search, 1 for the patch
    expected = np.zeros_like(image)
    for i, j in product(range(5), range(4)):
        here = pad[:, i + 2 : i + 5, j + 2 : j + 5]
        total = 0.0
        for a, b in product(range(5), repeat=2):
            weight = math.exp(-((pad[:, i + a : i + a + 3, j + b : j + b + 3] - here) ** 2).mean() / h**2)
            total += weight
            expected[:, i, j] += weight * pad[:, i + a + 1, j + b + 1]
        expected[:, i, j] /= total
    close(non_local_means(x, 5, 3, h)[0].numpy(), expected)


def test_squeezing_is_the_largest_distance_over_the_squeezers() -> None:
    p = softmax(logits(NEW), axis=1)
    squeezed = rounded(NEW, 2), median_filtered(NEW, 3), non_local_means(NEW, 5, 3, 20 / 255)
    each = np.stack([np.abs(softmax(logits(x), axis=1) - p).sum(1) for x in squeezed])
    found = scored("squeezing", bits=2, median=3, search=5, strength=20.0)
    close(found, each.max(0))
    assert len(set(each.argmax(0))) > 1, "one squeezer leads everywhere: the case shows little"
    close(scored("squeezing", bits=2, median=None, search=None), each[0])


def test_squeezing_works_in_the_box_of_the_model() -> None:
    wide = Classifier(nn.Sequential(_Halves(), MODEL.net), shape=MODEL.shape, num_classes=3, low=-1.0, high=1.0)
    found = fit("squeezing", {"search": 5}, wide.eval(), Learning(x=2 * X - 1, y=Y, index=INDEX))
    close(found.score(2 * NEW - 1, NEW_INDEX).detach().numpy(), scored("squeezing", search=5))


class _Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1) / 2


def test_rounding_passes_the_gradient_through() -> None:
    """For z = W x and p = softmax(z), d |p(Q(x)) - p(x)|_1 / dx with dQ/dx = 1, by the chain rule."""
    model = toys.linear((1, 4, 4), 2)
    weight, bias = toys.affine(model)
    x = toys.images((1, 4, 4), 1).requires_grad_()
    found = fit("squeezing", {"bits": 1, "median": None, "search": None}, model,
                Learning(x=x.detach(), y=torch.zeros(1).long(), index=torch.zeros(1).long()))  # fmt: skip
    (slope,) = torch.autograd.grad(found.score(x, torch.zeros(1).long()).sum(), x)
    here, there = (torch.softmax(weight @ v.detach().double().flatten() + bias, 0)[0] for v in (x, x.round()))
    both = 2 * (there - here).sign() * (there * (1 - there) - here * (1 - here)) * (weight[0] - weight[1])
    close(slope.flatten().numpy(), both.numpy())


def test_squeezing_needs_a_squeezer_and_odd_windows() -> None:
    for options in ({"bits": None, "median": None, "search": None}, {"search": 4}, {"patch": 2}):
        with pytest.raises(SpecError):
            scored("squeezing", **options)


# ---- layers


def gaussian(f: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = np.stack([f[y == c].mean(0) for c in range(3)])
    covariance = np.cov((f - means[y]).T, bias=True)
    return means, np.linalg.inv(covariance + 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))


def nearest(f: np.ndarray, means: np.ndarray, precision: np.ndarray) -> np.ndarray:
    return np.array([min((row - m) @ precision @ (row - m) / 2 for m in means) for row in f])


def z_scores(new: list[np.ndarray], held: list[np.ndarray]) -> np.ndarray:
    return np.stack([(a - b.mean()) / b.std(ddof=1) for a, b in zip(new, held, strict=True)], 1)


def mahalanobis_columns(x: torch.Tensor) -> list[np.ndarray]:
    fitted = [gaussian(f, Y[FREE].numpy()) for f in layers(X[FREE])]
    return [nearest(f, *known) for f, known in zip(layers(x), fitted, strict=True)]


def test_mahalanobis() -> None:
    table = z_scores(mahalanobis_columns(NEW), mahalanobis_columns(X[~FREE]))
    close(scored("mahalanobis"), table.sum(1))
    close(scored("mahalanobis", layers="last"), table[:, 1])


def test_mahalanobis_moves_the_image_against_the_sign_of_the_gradient() -> None:
    """On a linear model the layer is the image itself: d has the gradient P (x - mu_c)."""
    model, x = toys.linear((1, 2, 2), 3), toys.images((1, 2, 2), N)
    found = fit("mahalanobis", {"nu": 0.01}, model, Learning(x=x, y=Y, index=INDEX))
    means, precision = gaussian(x[FREE].flatten(1).double().numpy(), Y[FREE].numpy())

    def distance(images: torch.Tensor) -> np.ndarray:
        rows = []
        for row in images.flatten(1).double().numpy():
            mean = min(means, key=lambda m: (row - m) @ precision @ (row - m))
            rows.append(row - 0.01 * np.sign(precision @ (row - mean)))
        return nearest(np.stack(rows), means, precision)

    new = toys.images((1, 2, 2), 12, 7)
    expected = z_scores([distance(new)], [distance(x[~FREE])])[:, 0]
    np.testing.assert_allclose(found.score(new, NEW_INDEX).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_logistic_regression_is_that_of_scikit_learn() -> None:
    """Positives: attacked images of sources held out; negatives: those sources, and the same under noise."""
    at = torch.arange(0, N, 2)
    noisy, broken = X + 0.05 * (toys.images(X.shape[1:], N, 3) - 0.5), X[at] + 0.8 * (X[at].flip(2) - 0.5)
    known = Learning(x=X, y=Y, index=INDEX, noisy=noisy, attacked={"pgd": (at, broken)})
    found = fit("mahalanobis", {"combine": "logistic"}, MODEL, known)
    held = mahalanobis_columns(X[~FREE])
    sets = [z_scores(mahalanobis_columns(x), held) for x in (X[~FREE], noisy[~FREE], broken[~FREE[at]])]
    truth = [0] * (2 * len(sets[0])) + [1] * len(sets[2])
    learnt = LogisticRegression(max_iter=1000).fit(np.concatenate(sets), truth)
    expected = learnt.decision_function(z_scores(mahalanobis_columns(NEW), held))
    np.testing.assert_allclose(found.score(NEW, NEW_INDEX).detach().numpy(), expected, rtol=1e-3, atol=1e-4)
    assert found.card.attacks == ("pgd",)


def test_lid() -> None:
    found = fit("lid", {"k": 6, "references": 30}, MODEL, Learning(x=X, y=Y, index=INDEX))

    def column(f: np.ndarray, references: np.ndarray) -> np.ndarray:
        r = np.sort(np.linalg.norm(f[:, None] - references, axis=2), axis=1)[:, :6]
        return -1 / np.log(r / r[:, -1:]).mean(1)

    known = [found.state[f"references.{i}"].numpy() for i in range(2)]
    rows = {tuple(np.round(row, 9)) for row in layers(X[FREE])[1]}
    assert len(known[1]) == 30 and {tuple(np.round(row, 9)) for row in known[1]} <= rows, "references not held out"
    new, held = ([column(f, r) for f, r in zip(layers(x), known, strict=True)] for x in (NEW, X[~FREE]))
    close(found.score(NEW, NEW_INDEX).detach().numpy(), z_scores(new, held).sum(1))


def test_lid_of_a_plane_in_space_is_two() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.rand((3000, 2), generator=generator).double() @ torch.randn((2, 6), generator=generator).double()
    inner = plane[:200] * 0.2 + plane.mean(0) * 0.8
    assert float(1 / (1 / dimension(inner, plane[200:], 50)).mean()) == pytest.approx(2, abs=0.1)


def test_lid_leaves_out_the_image_itself_and_has_a_limit() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [4.0]]).double()
    assert float(dimension(line[:1], line, 3)) == pytest.approx(3 / (math.log(4) + math.log(2)))
    assert float(dimension(line[:1], torch.ones(5, 1).double(), 3)) == pytest.approx(1e6)
    assert float(dimension(line[:1], torch.zeros(5, 1).double(), 3)) == pytest.approx(1e6)


# ---- neighbours


def predicted(x: torch.Tensor) -> np.ndarray:
    return logits(x).argmax(1)


def per_class(x: torch.Tensor, f: np.ndarray, references: np.ndarray, y: torch.Tensor, of: Any) -> np.ndarray:
    """`of(references of the predicted class, row)` for each row."""
    classes = predicted(x)
    assert len(set(classes)) > 1, "one class alone is predicted: the case shows little"
    return np.array([of(references[y.numpy() == c], f[[i]]) for i, c in enumerate(classes)])


def test_kernel_density() -> None:
    def density(references: np.ndarray, row: np.ndarray) -> float:
        return -KernelDensity(kernel="gaussian", bandwidth=0.3).fit(references).score_samples(row)[0]

    columns = [per_class(x, layers(x)[1], layers(X[FREE])[1], Y[FREE], density) for x in (NEW, X[~FREE])]
    close(scored("kernel-density", bandwidth=0.3), z_scores(columns[:1], columns[1:])[:, 0])


def test_the_bandwidth_is_the_likeliest_for_images_held_out() -> None:
    found = float(fit("kernel-density", {}, MODEL, Learning(x=X, y=Y, index=INDEX)).state["bandwidth"])
    free, held = layers(X[FREE])[1], layers(X[~FREE])[1]

    def likelihood(h: float) -> float:
        each = [KernelDensity(bandwidth=h).fit(free[Y[FREE] == c]).score(held[Y[~FREE] == c]) for c in range(3)]
        return sum(each)

    step = 10**0.1
    assert likelihood(found) > max(likelihood(found * step), likelihood(found / step))


def dropout_net() -> Classifier:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Dropout2d(0.4), nn.Flatten(), nn.Dropout(0.25), nn.utils.skip_init(nn.Linear, 12, 3))
    with torch.no_grad():
        net[3].weight.copy_(torch.randn((3, 12), generator=generator))
        net[3].bias.zero_()
    return Classifier(net, shape=(3, 2, 2), num_classes=3).eval()


def test_uncertainty_is_the_variance_under_dropout_of_maps_and_neurons() -> None:
    model, x = dropout_net(), toys.images((3, 2, 2), N)
    found = fit("kernel-density", {"bandwidth": 0.1, "passes": 4}, model, Learning(x=x, y=Y, index=INDEX))
    new = toys.images((3, 2, 2), 12, 7)
    weight = model.net[3].weight.detach().double().numpy()
    own = fit("kernel-density", {"bandwidth": 0.1, "passes": None}, model, Learning(x=x, y=Y, index=INDEX))

    def uncertainty(x: torch.Tensor, rng: Draws) -> np.ndarray:
        passes = []
        for i in range(4):
            draws = rng.at("dropout", i)
            maps = draws.at("net.0").uniform(x[:, :, :1, :1]).numpy() >= 0.4
            neurons = draws.at("net.2").uniform(x.flatten(1)).numpy() >= 0.25
            given = (x.numpy() * maps / 0.6).reshape(len(x), -1) * neurons / 0.75
            passes.append(softmax(given @ weight.T, axis=1))
        return np.stack(passes).var(0).mean(1)

    columns = [
        uncertainty(new, Draws(0, NEW_INDEX, ("detect",))),
        uncertainty(x[~FREE], Draws(0, INDEX[~FREE], ("detect", "fit"))),
    ]
    expected = own.score(new, NEW_INDEX).detach().numpy() + z_scores(columns[:1], columns[1:])[:, 0]
    np.testing.assert_allclose(found.score(new, NEW_INDEX).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_dropout_at_work_keeps_the_mean() -> None:
    model, x = dropout_net(), torch.ones(2, 3, 2, 2)
    with frozen(model), torch.no_grad():
        passes = []
        for i in range(1000):
            with dropping(model, Draws(0, torch.arange(2)).at(i)):
                passes.append(model(x))
        assert not model.net[0]._forward_hooks
    each = torch.stack(passes)
    error = each.std(0) / math.sqrt(len(passes))
    assert bool(((each.mean(0) - model(x).detach()).abs() < 4 * error).all())


def test_knn() -> None:
    unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (layers(NEW)[1], layers(X)[1])]
    expected = per_class(
        NEW, *unit, Y, lambda known, row: NearestNeighbors(n_neighbors=4).fit(known).kneighbors(row)[0][0, -1]
    )
    close(scored("knn", k=4), expected)


def test_lof() -> None:
    def factor(known: np.ndarray, row: np.ndarray) -> float:
        return -LocalOutlierFactor(n_neighbors=7, novelty=True).fit(known).score_samples(row)[0]

    close(scored("lof", k=7), per_class(NEW, layers(NEW)[1], layers(X)[1], Y, factor))


def test_isolation_forest() -> None:
    new, known = (f.astype(np.float32) for f in (layers(NEW)[1], layers(X)[1]))
    forests = [
        IsolationForest(n_estimators=25, max_samples=20, random_state=c).fit(known[Y.numpy() == c]) for c in range(3)
    ]
    expected = [-forests[c].score_samples(new[[i]])[0] for i, c in enumerate(predicted(NEW))]
    close(scored("isolation-forest", trees=25, samples=20), expected)


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [
        ("knn", {"k": 31}, N),
        ("lof", {"k": 30}, N),
        ("lid", {"k": 20}, 24),
        ("kernel-density", {}, 6),
        ("isolation-forest", {}, 5),
        ("mahalanobis", {}, 2),
    ],
)
def test_too_few_images_are_refused(name: str, options: dict[str, Any], kept: int) -> None:
    with pytest.raises(DataError, match="more"):
        fit(name, options, MODEL, Learning(x=X[:kept], y=Y[:kept], index=INDEX[:kept]))


def test_a_layer_without_part_in_the_pass_is_refused() -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = toys.linear((1, 2, 2), 3).net, nn.utils.skip_init(nn.Linear, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Classifier(Detour(), shape=(1, 2, 2), num_classes=3)
    with pytest.raises(ModelError, match="take part in a pass"):
        fit("knn", {}, model, Learning(x=toys.images((1, 2, 2), N), y=Y, index=INDEX))
