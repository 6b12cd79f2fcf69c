"""What the simulated GPU refuses and counts, and how much the package asks of it."""

from __future__ import annotations

import sys

import pytest
import torch

from attacks import gradients_of, photo, some_labels
from rconv_fast import invert, models

simulation = sys.modules.get("simulated_gpu")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(simulation is None, reason="about the simulated GPU: make simulated-gpu"),
]


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_devices_do_not_mix(other: str) -> None:
    a, b = torch.ones(3, device="cuda:0"), torch.ones(3, device=other)
    with pytest.raises(RuntimeError, match="same device"):
        a @ b
    with pytest.raises(RuntimeError, match="same device"):
        torch.linalg.solve_triangular(a.diag(), b.diag(), upper=True)


def test_results_stay_on_the_device_of_the_arguments() -> None:
    a = torch.ones(3, 3, device="cuda:1")
    for result in (a + 1, a.T @ a, torch.linalg.qr(a).R, a[0].cumsum(0), a.to_sparse_csr(), torch.zeros_like(a)):
        assert result.device == a.device
    assert a.cpu().device.type == "cpu"
    a[0].mul_(5)
    assert a.sum().item() == 21


def test_waits_are_refused() -> None:
    a = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        a += 1
        for wait in (lambda: a[0].item(), lambda: a[a > 0], lambda: a.cpu(), lambda: torch.nonzero(a)):
            with pytest.raises(RuntimeError, match="synchronizing"):
                wait()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_attack_needs_few_launches(activation: str) -> None:
    """A launch takes a GPU's host some 5 microseconds, a wait more: the sum bounds the time of a small network."""
    model, x = models.lenet_o(activation), photo(32)
    shared = {name: g.cuda() for name, g in gradients_of(model, x, some_labels(1)).items()}
    model = model.cuda()
    found = invert(model, shared, x.shape[1:])  # what is cached for a geometry is cached now
    launches, waits = simulation.launches(), simulation.waits()
    invert(model, shared, x.shape[1:])
    assert found.verified
    assert simulation.launches() - launches < 3000
    # Two probes of uniqueness, a condition number bounded from above, rules checked: what a verdict now rests on.
    assert simulation.waits() - waits < 480
