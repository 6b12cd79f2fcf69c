"""Whether a classification explains a gradient that was read as a regression's: free targets explain any gradient."""

from __future__ import annotations

import torch
from torch import Tensor

# In units of rounding, relative to the gradient: far above what a head's input is off. Not above what one regression
# in thousands reaches by chance, unless the values themselves are coarser.
AGREES, CHANCE, COARSE = 1e6, 1e-3, 4.0


def other_loss(logits: Tensor, grad_logits: Tensor, rounding: float) -> str | None:
    """The classification of one sample whose gradient this is, with nothing free but the class.

    Parameters
    ----------
    logits, grad_logits : Tensor, shape (1, n)
        Of the sample, ``dL/dlogits`` included.
    rounding : float
        Relative spacing of the gradients' values.

    Returns
    -------
    str or None
        As a reader passes it: ``loss='cross_entropy' (label 3)``.
    """
    bar = max(min(AGREES * rounding, CHANCE), COARSE * rounding) * float(grad_logits.norm())
    n = logits.shape[1]
    if n > 1:  # delta = softmax - e_y
        one_hot = torch.softmax(logits, 1) - grad_logits
        label = int(one_hot.argmax())
        if float((one_hot - torch.nn.functional.one_hot(one_hot.argmax(1), n)).norm()) <= bar:
            return f"loss='cross_entropy' (label {label})"
    targets = torch.sigmoid(logits) - n * grad_logits  # delta = (sigmoid - t) / n
    binary = targets.round().clamp(0, 1)
    if float((targets - binary).norm()) <= n * bar:
        return f"loss='binary_cross_entropy_with_logits' (targets {binary.long().flatten().tolist()})"
    return None
