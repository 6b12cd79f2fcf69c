"""The joint estimate: all gradients at once, weighted by their noise, with error bars; and the bound on it."""

from rconv_fast.estimate.answer import joint_answer
from rconv_fast.estimate.bounds import Bound, cramer_rao, fisher_matrix
from rconv_fast.estimate.joint import Estimate, estimate
from rconv_fast.estimate.noise_model import entry_noise, noise_of, with_arithmetic
from rconv_fast.estimate.quantum import Grid, Quantum, snapped

__all__ = [
    "Bound",
    "Estimate",
    "Grid",
    "Quantum",
    "cramer_rao",
    "entry_noise",
    "estimate",
    "fisher_matrix",
    "joint_answer",
    "noise_of",
    "snapped",
    "with_arithmetic",
]
