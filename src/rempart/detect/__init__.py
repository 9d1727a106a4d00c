"""Detectors: how an attack is noticed."""

from rempart.detect.attack_type import attack_type
from rempart.detect.binary import binary
from rempart.detect.catalogue import Detector, Learning, State, detectors
from rempart.detect.density import kernel_density
from rempart.detect.fitted import Fitted, Threshold, calibrate, fit, load, save
from rempart.detect.forest import isolation_forest
from rempart.detect.lid import lid
from rempart.detect.logits import energy, margin, max_softmax
from rempart.detect.magnet import magnet
from rempart.detect.mahalanobis import mahalanobis
from rempart.detect.neighbours import knn, lof
from rempart.detect.noise import noise
from rempart.detect.squeeze import squeezing

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
