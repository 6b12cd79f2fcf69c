"""The joint estimate: all gradients at once, weighted by their noise, with error bars."""

from rconv_fast.estimate.bounds import Bound, cramer_rao, fisher_matrix

__all__ = ["Bound", "cramer_rao", "fisher_matrix"]
