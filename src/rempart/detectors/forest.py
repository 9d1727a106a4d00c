"""Isolation forest: how few random cuts set the activations of an image apart."""

from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from rempart.core.model import Classifier
from rempart.core.repro import Draws
from rempart.core.types import Images, Scores
from rempart.detectors.activations import activations, by_class, chosen, references
from rempart.detectors.catalogue import Detector, Learning, State, detectors


@detectors.register("isolation-forest", None)
def isolation_forest(*, trees: Annotated[int, Ge(1)] = 100, samples: Annotated[int, Ge(2)] = 256) -> Detector:
    """How early random cuts isolate an image among the training images of its predicted class.

    On what the last layer is fed with. Score: 2^(-h / c), h the mean depth of the leaf that the image falls into and c
    the depth expected for as many samples as a tree has seen; between 0 and 1. A step function of the image: an
    attacker gets no gradient.

    Args:
        trees: Number of trees for each class.
        samples: Images that each tree is grown on, or all there are.

    Raises:
        DataError: When fitted, if a class has fewer than two images.

    Source:
        Liu, Ting, Zhou 2008, "Isolation forest", ICDM; grown by scikit-learn's IsolationForest, stored as arrays, and
        scored as there. That it is taken per predicted class on activations is our design.
    """

    def fit(model: Classifier, learning: Learning, *, rng: Draws) -> State:
        known = references(model, learning, 2)
        state: State = {}
        for c in range(model.num_classes):
            rows = known["references"][known["labels"] == c]
            grown = _grown(rows, trees, min(samples, len(rows)), (rng.seed + c) % 2**32)
            state.update({f"{c}.{part}": tensor.to(rows.device) for part, tensor in grown.items()})
        return state

    def score(model: Classifier, x: Images, state: State, *, rng: Draws) -> Scores:
        with torch.no_grad():
            (f,), predicted = activations(model, x, chosen(model, "last"))
            return by_class(predicted, lambda c, rows: _isolation(f[rows].float(), state, c))

    return Detector(fit=fit, score=score, differentiable=False)


def _isolation(f: Tensor, state: State, c: int) -> Scores:
    """Walk down all trees at once: a leaf leads to itself."""
    feature, threshold, left, right, depth = (state[f"{c}.{part}"] for part in _PARTS)
    tree = torch.arange(len(feature), device=f.device)
    node = torch.zeros(len(f), len(feature), dtype=torch.int64, device=f.device)
    for _ in range(int(state[f"{c}.height"])):
        below = f.gather(1, feature[tree, node]) <= threshold[tree, node]
        node = torch.where(below, left[tree, node], right[tree, node])
    return 2 ** -(depth[tree, node].mean(1) / state[f"{c}.expected"])


_PARTS = ("feature", "threshold", "left", "right", "depth")


def _grown(f: Tensor, trees: int, samples: int, seed: int) -> dict[str, Tensor]:
    """The trees as arrays (trees, nodes), padded; their height; the depth expected."""
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(n_estimators=trees, max_samples=samples, random_state=seed)  # pyright: ignore[reportArgumentType]
    forest.fit(f.cpu().numpy().astype(np.float32))
    grown = [_arrays(estimator.tree_) for estimator in forest.estimators_]
    nodes, height = max(len(tree["left"]) for tree in grown), max(e.tree_.max_depth for e in forest.estimators_)
    arrays = {
        part: torch.from_numpy(np.stack([np.pad(tree[part], (0, nodes - len(tree[part]))) for tree in grown]))
        for part in _PARTS
    }
    return {**arrays, "height": torch.tensor(height), "expected": torch.from_numpy(_expected(np.array(samples)))}


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    nodes = np.arange(tree.node_count)
    leaf = tree.children_left < 0
    left, right = (np.where(leaf, nodes, side) for side in (tree.children_left, tree.children_right))
    depth = np.zeros(len(nodes))
    for node in nodes[~leaf]:  # parents come before their children
        depth[[left[node], right[node]]] = depth[node] + 1
    return {
        "feature": np.where(leaf, 0, tree.feature).astype(np.int64),
        "threshold": tree.threshold,
        "left": left.astype(np.int64),
        "right": right.astype(np.int64),
        "depth": depth + _expected(tree.n_node_samples),
    }


def _expected(n: np.ndarray) -> np.ndarray:
    """Mean depth of a leaf in a random tree of n samples: 2 H(n - 1) - 2 (n - 1) / n, with H as log(n) + 0.5772."""
    more = np.maximum(n, 3)
    many = 2 * (np.log(more - 1) + np.euler_gamma) - 2 * (more - 1) / more
    return np.where(n <= 1, 0.0, np.where(n == 2, 1.0, many))
