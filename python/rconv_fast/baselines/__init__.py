"""Attacks of others behind the call and the result of ``rconv_fast.invert``, written from their papers.

They say how the attack one has read about does on one's own model. Each takes ``(model, gradients, input_shape)`` and
the options of ``rconv_fast.baselines.problem.Options``, and returns an ``Inversion`` that is never `verified`.

>>> import torch, rconv_fast.baselines
>>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).double()
>>> x = torch.rand(1, 3, 2, 2, dtype=torch.float64)
>>> loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([3]))
>>> gradients = torch.autograd.grad(loss, list(model.parameters()))
>>> found = rconv_fast.baselines.aono(model, gradients, (3, 2, 2))
>>> found.verdict, bool((found.inputs - x).abs().max() < 1e-10)
('approximate', True)
"""

from __future__ import annotations

from rconv_fast.baselines.aono import aono
from rconv_fast.baselines.copa import copa
from rconv_fast.baselines.dlg import dlg, idlg
from rconv_fast.baselines.i2f import i2f_bound
from rconv_fast.baselines.inverting_gradients import inverting_gradients
from rconv_fast.baselines.rgap import rgap

__all__ = ["aono", "copa", "dlg", "i2f_bound", "idlg", "inverting_gradients", "rgap"]
