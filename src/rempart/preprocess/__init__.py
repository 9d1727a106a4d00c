"""Input transformations in front of a model."""

from rempart.preprocess.bilateral import bilateral
from rempart.preprocess.bit_depth import bit_depth
from rempart.preprocess.catalogue import Traits, bpda, defended, described, preprocessors
from rempart.preprocess.gaussian_noise import gaussian_noise
from rempart.preprocess.jpeg import jpeg
from rempart.preprocess.median import median
from rempart.preprocess.non_local_means import non_local_means
from rempart.preprocess.pixel_deflection import pixel_deflection
from rempart.preprocess.resize_pad import resize_pad
from rempart.preprocess.total_variation import total_variation

__all__ = [
    "Traits",
    "bilateral",
    "bit_depth",
    "bpda",
    "defended",
    "described",
    "gaussian_noise",
    "jpeg",
    "median",
    "non_local_means",
    "pixel_deflection",
    "preprocessors",
    "resize_pad",
    "total_variation",
]
