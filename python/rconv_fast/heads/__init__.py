"""The last layer: its gradient taken apart into samples, labels and the gradients of their logits."""

from rconv_fast.heads.candidates import HeadCandidate, HeadOutcome, head_candidates
from rconv_fast.heads.peeling import peel_relu_batch
from rconv_fast.heads.separation import HeadSeparation, recover_linear_input
from rconv_fast.heads.softmax import separate_softmax_batch

__all__ = [
    "HeadCandidate",
    "HeadOutcome",
    "HeadSeparation",
    "head_candidates",
    "peel_relu_batch",
    "recover_linear_input",
    "separate_softmax_batch",
]
