"""Labels read from the gradient of the last layer, as the optimisation attacks need them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rconv_fast.baselines.problem import Problem
from rconv_fast.errors import require

# Inputs over which the probabilities of an untrained model are averaged.
PROBES = 16


def last_layer(problem: Problem) -> tuple[str, nn.Linear] | None:
    """Name and module of the last linear layer whose weight gradient was seen."""
    seen = problem.observation.gradients
    layers = [(n, m) for n, m in problem.model.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" in seen]
    return layers[-1] if layers else None


def given_or_read(problem: Problem) -> Tensor:
    """The labels that were given, else those that the last layer's gradient tells.

    Raises
    ------
    ArgumentError
        Where they must be given: another loss than cross-entropy, or a last layer that was not seen.
    """
    if problem.labels is not None:
        return problem.labels
    found = last_layer(problem)
    readable = found is not None and problem.observation.loss.takes_labels
    told = "be given where the last layer does not tell them"
    require(readable, problem.function, "labels", told, None)
    assert found is not None
    name, _ = found
    weight = problem.observation.gradients[f"{name}.weight"]
    bias = problem.observation.gradients.get(f"{name}.bias")
    if problem.batch_size == 1:
        return label_of_one(weight, bias)
    require(bias is not None, problem.function, "labels", told, "a batch behind a layer without bias")
    assert bias is not None
    size = problem.observation.factor * (problem.batch_size if problem.observation.loss.reduction == "sum" else 1)
    return labels_of_batch(bias / size, mean_probabilities(problem), problem.batch_size)


def label_of_one(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The label of one sample, of shape (1,): the only class with a negative logit gradient.

    With ``g_j = p_j - [j = y]`` the gradient of the logits, ``db_j = g_j`` and ``dW_j = g_j h``. Without a bias
    ``<dW_i, dW_y> = g_i g_y ||h||^2 <= 0`` for all ``i != y`` [1]_. (Two classes without a bias have it for both;
    then features that are mostly positive, as behind a ReLU, decide.)

    References
    ----------
    .. [1] Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020, section 3.1.
    """
    if bias is not None:
        return bias.argmin().reshape(1)
    if len(weight) == 2:
        return weight.sum(1).argmin().reshape(1)
    products = weight @ weight.T
    products.fill_diagonal_(-torch.inf)
    return products.amax(1).argmin().reshape(1)


def labels_of_batch(gradient: Tensor, probabilities: Tensor, batch: int) -> Tensor:
    """Labels of a batch from the bias' gradient: ``db_j = mean_i p_ij - K_j / B``, so ``K_j = B (p_j - db_j)`` [1]_.

    Parameters
    ----------
    gradient : Tensor, shape (n,)
        Of the bias, averaged over the batch.
    probabilities : Tensor, shape (n,)
        About the mean of the model's probabilities over the batch; near those of any input while it is untrained.
    batch : int
        Samples B, shared out to the classes with the largest ``K_j`` left.

    References
    ----------
    .. [1] Ma, Sun, Cui, Li, Guo, Xiong, "Instance-wise Batch Label Restoration via Gradients in Federated Learning",
       ICLR 2023.
    """
    left = batch * (probabilities - gradient).double()
    found = []
    for _ in range(batch):
        found.append(int(left.argmax()))
        left[found[-1]] -= 1
    return torch.tensor(sorted(found), device=gradient.device)


def mean_probabilities(problem: Problem) -> Tensor:
    """Of the model's classes, over standard normal inputs."""
    generator = torch.Generator().manual_seed(problem.seed)
    outputs = problem.outputs(problem.normal((PROBES, *problem.input_shape), generator))
    return outputs.softmax(1).mean(0)
