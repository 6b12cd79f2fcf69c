"""Teach the recursion an activation that it does not know, and recover a picture through it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rconv_fast
from rconv_fast.layers.base import Operands, Rule
from rconv_fast.layers.knowledge import Knowledge
from rconv_fast.layers.registry import register_rule


class Asinh(nn.Module):
    """``y = asinh(x)``: no rule comes with the package."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x)


class AsinhRule(Rule):
    """``x = sinh(y)`` and ``dy/dx = 1 / sqrt(1 + x^2) = 1 / cosh(y)``: both follow from the output."""

    kind = "Asinh"
    needs_output = True

    def pull_gradient(self, grad: Tensor, y: Tensor | None, operand: int, shape: torch.Size) -> Tensor:
        assert y is not None
        return grad / y.cosh()

    def pull_value(self, y: Knowledge, operand: int, x: Operands) -> Knowledge:
        # Inverting multiplies the error of y by cosh(y): that much less the value is worth.
        return Knowledge(y.value.sinh(), y.weight / y.value.cosh())


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), Asinh(), nn.Flatten(), nn.Linear(12 * 16, 10)).double()
    x, y = torch.rand(1, 1, 8, 8, dtype=torch.float64), torch.tensor([3])
    nn.functional.cross_entropy(model(x), y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = rconv_fast.invert(model, gradients, (1, 8, 8))
    print(f"without a rule: {found.verdict}; {found.stops_at}: {found.reason}")

    register_rule(Asinh, lambda module, call: AsinhRule())
    found = rconv_fast.invert(model, gradients, (1, 8, 8))
    print(f"with one: {found.verdict}, verified {found.verified}, PSNR {rconv_fast.psnr(found.inputs, x):.0f} dB")


if __name__ == "__main__":
    main()
