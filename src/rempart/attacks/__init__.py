"""Attacks search; `attacks.run` judges."""

from rempart.attacks.apgd import apgd, apgd_targeted
from rempart.attacks.cascade import cascade
from rempart.attacks.catalogue import Attack, Traits, attacks
from rempart.attacks.decision import hopskipjump
from rempart.attacks.fab import fab, fab_targeted
from rempart.attacks.gradient import bim, fgsm, mim, pgd
from rempart.attacks.minimum import deepfool
from rempart.attacks.optimise import cw, ead
from rempart.attacks.radius import ddn, fmn
from rempart.attacks.run import Outcome, Verdict, attack_batch, attack_data
from rempart.attacks.square import square
from rempart.attacks.suites import SUITES
from rempart.attacks.universal import fit_universal, universal

__all__ = [
    "SUITES",
    "Attack",
    "Outcome",
    "Traits",
    "Verdict",
    "apgd",
    "apgd_targeted",
    "attack_batch",
    "attack_data",
    "attacks",
    "bim",
    "cascade",
    "cw",
    "ddn",
    "deepfool",
    "ead",
    "fab",
    "fab_targeted",
    "fgsm",
    "fit_universal",
    "fmn",
    "hopskipjump",
    "mim",
    "pgd",
    "square",
    "universal",
]
