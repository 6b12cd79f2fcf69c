"""Differential privacy beside the leak: epsilon, the bound on any reconstruction, the PSNR predicted at that noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rconv_fast.audit.noise import bound_of
from rconv_fast.audit.probe import Probe, make_probe
from rconv_fast.audit.structure import checked_shape, read_structure
from rconv_fast.errors import optional, require
from rconv_fast.losses import Loss
from rconv_fast.wrappers import unwrap

# Orders of the Renyi divergences over which the least bound is taken: small ones for little noise, large for much.
ORDERS = [1 + x / 20 for x in range(1, 100)] + list(range(6, 64)) + [2**k for k in range(6, 12)]


@dataclass(frozen=True)
class DpSgd:
    """Parameters of DP-SGD.

    Attributes
    ----------
    clip : float
        Largest norm of one sample's gradient.
    batch_size : int
        Expected samples a step: what the sum is divided by.
    sample_rate : float
        Probability of a sample to be in a step (Poisson sampling); 1: always.
    steps : int
    delta : float
    """

    clip: float
    batch_size: int = 1
    sample_rate: float = 1.0
    steps: int = 1
    delta: float = 1e-5

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("batch_size", self.batch_size), ("steps", self.steps)):
            require(value > 0, "DpSgd", name, "be positive", value)
        require(0 < self.sample_rate <= 1, "DpSgd", "sample_rate", "be in (0, 1]", self.sample_rate)
        require(0 < self.delta < 1, "DpSgd", "delta", "be in (0, 1)", self.delta)


@dataclass(frozen=True)
class PrivacyRow:
    """One strength of noise.

    Attributes
    ----------
    noise_multiplier : float
        Standard deviation of the noise on the sum, in units of the clipping norm.
    epsilon : float
        Of (epsilon, delta)-differential privacy after all steps.
    reconstruction : float
        No attack recovers a sample with a higher probability, given that of a guess (ReRo).
    predicted_psnr : float or None
        No unbiased estimate from one step's gradient is better (Cramer-Rao, of the probe).
    """

    noise_multiplier: float
    epsilon: float
    reconstruction: float
    predicted_psnr: float | None


def epsilon(noise_multiplier: float, training: DpSgd) -> float:
    """Epsilon after all steps, by Opacus' accountant of Renyi divergences (extra ``opacus``)."""
    accountant = optional("opacus.accountants", "opacus", "epsilon").RDPAccountant()
    accountant.history = [(noise_multiplier, training.sample_rate, training.steps)]
    return float(accountant.get_epsilon(training.delta, alphas=ORDERS))


def reconstruction_bound(noise_multiplier: float, training: DpSgd, prior: float) -> float:
    r"""The highest probability of any reconstruction, where a guess without the gradients succeeds with `prior`.

    Without subsampling the mechanism's trade-off is Gaussian, and the bound is tight (theirs):
    ``Phi(Phi^-1(prior) + sqrt(steps) / noise_multiplier)``. With subsampling, from the Renyi divergences eps_a of
    Opacus' accountant: the least of ``(prior e^eps_a)^((a - 1) / a)`` over the orders a. Neighbours are data sets
    with and without one sample.

    References
    ----------
    Kaissis, Hayes, Ziller, Rueckert. Bounding data reconstruction attacks with the hypothesis testing interpretation
    of differential privacy. arXiv 2307.03928. Balle, Cherubin, Hayes. Reconstructing training data with informed
    adversaries. IEEE S&P 2022, theorem 3.
    """
    require(noise_multiplier > 0, "reconstruction_bound", "noise_multiplier", "be positive", noise_multiplier)
    require(0 < prior < 1, "reconstruction_bound", "prior", "be in (0, 1)", prior)
    if training.sample_rate == 1:
        normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
        shift = math.sqrt(training.steps) / noise_multiplier
        return float(normal.cdf(normal.icdf(torch.tensor(prior, dtype=torch.float64)) + shift))
    rdp = optional("opacus.accountants.analysis.rdp", "opacus", "reconstruction_bound")
    divergences = rdp.compute_rdp(
        q=training.sample_rate, noise_multiplier=noise_multiplier, steps=training.steps, orders=ORDERS
    )
    logs = ((a - 1) / a * (math.log(prior) + float(e)) for a, e in zip(ORDERS, divergences, strict=True))
    return math.exp(min(0.0, *logs))


def privacy_table(
    model: nn.Module,
    input_shape: Sequence[int],
    noise_multipliers: Sequence[float],
    training: DpSgd,
    *,
    prior: float = 0.01,
    loss: str = "cross_entropy",
    probe: Tensor | tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> list[PrivacyRow]:
    """What differential privacy promises beside what the gradients of one step would show of one sample.

    Parameters
    ----------
    model, input_shape, loss, probe, seed
        As in `audit`; the probe is one sample.
    noise_multipliers : sequence of float
        One row each.
    training : DpSgd
        The rest of the mechanism.
    prior : float
        Probability of a right guess without the gradients.

    Returns
    -------
    list of PrivacyRow
        The bound on the PSNR is for an observer who knows the rest of the batch and the clipping's factor.
    """
    shape = checked_shape("privacy_table", model, input_shape)
    model, objective = unwrap(model), Loss(loss)
    batch = make_probe(read_structure(model, shape), model, shape, 1, objective, probe, seed)
    gradients = batch.gradients(model, objective)
    length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    factor = min(1.0, training.clip / length) if length > 0 else 1.0
    return [_row(model, objective, batch, gradients, factor, z, training, prior) for z in noise_multipliers]


def _row(
    model: nn.Module,
    loss: Loss,
    probe: Probe,
    gradients: dict[str, Tensor],
    factor: float,
    noise_multiplier: float,
    training: DpSgd,
    prior: float,
) -> PrivacyRow:
    """The sum holds ``factor g`` of the sample and noise ``z clip``: g with noise ``z clip / factor``."""
    sigma = noise_multiplier * training.clip / factor
    bound = bound_of(model, loss, probe, dict.fromkeys(gradients, sigma))
    return PrivacyRow(
        noise_multiplier,
        epsilon(noise_multiplier, training),
        reconstruction_bound(noise_multiplier, training, prior),
        bound.psnr,
    )


def to_markdown(rows: Sequence[PrivacyRow]) -> str:
    """The table for a report."""
    lines = ["| noise multiplier | epsilon | reconstruction at most | predicted, dB |", "|---|---|---|---|"]
    for row in rows:
        predicted = "-" if row.predicted_psnr is None else f"{row.predicted_psnr:.1f}"
        lines.append(f"| {row.noise_multiplier:g} | {row.epsilon:.2f} | {row.reconstruction:.1%} | {predicted} |")
    return "\n".join(lines) + "\n"
