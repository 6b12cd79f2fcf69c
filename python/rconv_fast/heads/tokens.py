"""The ids that the gradient of an embedding lists: a row is not zero where its id was in the batch."""

from __future__ import annotations

from torch import Tensor


def token_ids(grad_weight: Tensor) -> Tensor:
    """Ids that occur in the batch, from the gradient of an embedding's weight.

    Parameters
    ----------
    grad_weight : Tensor, shape (vocabulary, width)
        Dense or sparse.

    Returns
    -------
    Tensor, shape (k,), int64
        In ascending order; a padding id has no gradient. Every id where the weight is shared with another layer.

    References
    ----------
    Melis et al., Exploiting unintended feature leakage in collaborative learning (S&P 2019).
    """
    if grad_weight.is_sparse:
        grad = grad_weight.coalesce()
        return grad.indices()[0][grad.values().ne(0).any(1)]
    return grad_weight.ne(0).any(1).nonzero()[:, 0]
