"""What do the gradients that a client shares give away? Exact inputs, or a proof of what is not determined.

>>> import torch, rconv_fast
>>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).double()
>>> x = torch.rand(1, 3, 2, 2, dtype=torch.float64)
>>> torch.nn.functional.cross_entropy(model(x), torch.tensor([3])).backward()
>>> result = rconv_fast.invert(model, {n: p.grad for n, p in model.named_parameters()}, (3, 2, 2))
>>> result.verified, bool((result.inputs - x).abs().max() < 1e-10)
(True, True)
"""

from __future__ import annotations

import importlib
from types import ModuleType

from rconv_fast._build_info import version
from rconv_fast.audit import AuditReport, LayerRank, audit, rank_analysis
from rconv_fast.constraints.ops import gradient_constraints, weight_constraints
from rconv_fast.errors import RconvError, UnsupportedModelError
from rconv_fast.heads import HeadSeparation, peel_relu_batch, recover_linear_input, separate_softmax_batch
from rconv_fast.invert import invert
from rconv_fast.metrics import match_samples, mse, psnr, ssim
from rconv_fast.observation import SharedGradients
from rconv_fast.recover import ConvRecovery, constraint_operator, recover_conv_input
from rconv_fast.result import Inversion, Sample
from rconv_fast.updates import gradients_from_update
from rconv_fast.walk.report import LayerReport

__version__ = version()

__all__ = [
    "AuditReport",
    "ConvRecovery",
    "HeadSeparation",
    "Inversion",
    "LayerRank",
    "LayerReport",
    "RconvError",
    "Sample",
    "SharedGradients",
    "UnsupportedModelError",
    "audit",
    "constraint_operator",
    "gradient_constraints",
    "gradients_from_update",
    "invert",
    "match_samples",
    "mse",
    "peel_relu_batch",
    "psnr",
    "rank_analysis",
    "recover_conv_input",
    "recover_linear_input",
    "separate_softmax_batch",
    "ssim",
    "weight_constraints",
]

_ROOMS = ("baselines", "data", "defenses", "models", "sweep")


def __getattr__(name: str) -> ModuleType:
    """Rooms that few need, as attributes without an import of their own."""
    if name in _ROOMS:
        return importlib.import_module(f"rconv_fast.{name}")
    raise AttributeError(f"module 'rconv_fast' has no attribute {name!r}")
