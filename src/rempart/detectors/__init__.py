"""Detectors: how an attack is noticed."""

from rempart.detectors.attack_type import attack_type
from rempart.detectors.binary import binary
from rempart.detectors.catalogue import Detector, Learning, State, detectors
from rempart.detectors.density import kernel_density
from rempart.detectors.fitted import Fitted, Threshold, calibrate, fit, load, save
from rempart.detectors.forest import isolation_forest
from rempart.detectors.lid import lid
from rempart.detectors.logits import energy, margin, max_softmax
from rempart.detectors.magnet import magnet
from rempart.detectors.mahalanobis import mahalanobis
from rempart.detectors.neighbours import knn, lof
from rempart.detectors.noise import noise
from rempart.detectors.squeeze import squeezing

__all__ = [
    "Detector",
    "Fitted",
    "Learning",
    "State",
    "Threshold",
    "attack_type",
    "binary",
    "calibrate",
    "detectors",
    "energy",
    "fit",
    "isolation_forest",
    "kernel_density",
    "knn",
    "lid",
    "load",
    "lof",
    "magnet",
    "mahalanobis",
    "margin",
    "max_softmax",
    "noise",
    "save",
    "squeezing",
]
