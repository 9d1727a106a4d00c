"""Which neurons an attack moves, and what they do to the prediction."""

from rempart.explain.contribution import Pairs, against, effects, pull
from rempart.explain.pictures import illustrate
from rempart.explain.prune import doubts, prune, prune_model
from rempart.explain.run import Explanation, Subject, explain, trend
from rempart.explain.sensitivity import jaccard, layers_of, top

__all__ = [
    "Explanation",
    "Pairs",
    "Subject",
    "against",
    "doubts",
    "effects",
    "explain",
    "illustrate",
    "jaccard",
    "layers_of",
    "prune",
    "prune_model",
    "pull",
    "top",
    "trend",
]
