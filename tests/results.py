"""Inversions made by hand, for the tests of what shows them."""

from __future__ import annotations

from typing import Any

import torch

from rconv_fast.result import Inversion, Sample
from rconv_fast.solve import Evidence
from rconv_fast.walk.report import LayerReport

EVIDENCE = Evidence(
    rank=5, unknowns=5, rows=7, residual=1e-15, condition=3.0, solver="phase-cholesky", proof="cholesky"
)
LAYER = LayerReport("conv1", "Conv2d", EVIDENCE, 0.1)


def exact(inputs: torch.Tensor, **changes: Any) -> Inversion:
    """Everything proven."""
    size = len(inputs)
    found = {
        "verdict": "exact",
        "verified": True,
        "inputs": inputs,
        "labels": torch.arange(size),
        "layers": [LAYER],
        "gradient_residual": 1e-15,
        "noise_ratio": 0.9,
        "determined": torch.ones_like(inputs, dtype=torch.bool),
        "uncertainty": torch.full_like(inputs, 1e-12),
        "samples": [Sample(i, 1e-15) for i in range(size)],
        "batch_size": size,
    }
    return Inversion(**{**found, **changes})


def features(**changes: Any) -> Inversion:
    """No inputs: one layer could not be passed."""
    found = {
        "verdict": "features",
        "labels": torch.tensor([3]),
        "batch_size": 1,
        "label_counts": torch.tensor([0, 0, 0, 1]),
        "features": {"fc": torch.rand(1, 8)},
        "stops_at": "pool",
        "reason": "a maximum hides where its values came from",
        "notes": ["fc is exact. Take its input as what leaked."],
    }
    return Inversion(**{**found, **changes})
