"""Suite `batch`: splitting heads, seconds and accuracy against classes and batch. No peer splits a softmax head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bench import Entry, Target
from rconv_fast import HeadSeparation, peel_relu_batch, separate_softmax_batch

# (classes, features, batch)
HEADS = [(10, 192, 1), (10, 192, 4), (10, 192, 8), (100, 192, 8), (100, 192, 24), (100, 192, 48), (200, 512, 64),
         (1000, 2048, 1), (1000, 2048, 64)]  # fmt: skip
# (batch, features, width, how far the biases are moved down)
STACKS = [(16, 64, 1024, 0.0), (64, 256, 2048, 0.5), (128, 256, 2048, 0.8)]


def head_inputs(n: int, d: int, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """PyTorch's initialisation behind a ReLU, labels at random."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = ((torch.rand(*s, generator=generator, dtype=torch.float64) * 2 - 1) / d**0.5 for s in ((n, d), (n,)))
    inputs = torch.randn(batch, d, generator=generator, dtype=torch.float64).relu()
    labels = torch.randint(n, (batch,), generator=generator)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    grads = torch.autograd.grad(F.cross_entropy(F.linear(inputs, *leaves), labels), leaves)
    head = [g.to(dtype) for g in grads] + [weight.detach(), bias.detach()]
    return {"head": head, "inputs": inputs, "labels": labels}


def stack_inputs(batch: int, d: int, width: int, shift: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(width, d), (width,), (10, width), (10,)]
    bounds = [d**-0.5, d**-0.5, width**-0.5, width**-0.5]
    leaves = [
        (torch.rand(*s, generator=generator, dtype=torch.float64) * 2 - 1) * b
        for s, b in zip(shapes, bounds, strict=True)
    ]
    leaves[1] -= shift
    for leaf in leaves:
        leaf.requires_grad_()
    inputs = torch.randn(batch, d, generator=generator, dtype=torch.float64).relu()
    labels = torch.randint(10, (batch,), generator=generator)
    logits = F.linear(F.linear(inputs, leaves[0], leaves[1]).relu(), leaves[2], leaves[3])
    grads = torch.autograd.grad(F.cross_entropy(logits, labels), leaves)
    layers = [(leaves[0].detach(), leaves[1].detach()), (leaves[2].detach(), leaves[3].detach())]
    return {"layers": layers, "grads": [grads[:2], grads[2:]], "inputs": inputs, "labels": labels}


def facts(inputs: dict[str, Any]) -> Any:
    """Record how many samples came back, and the largest relative error and wrong label among them."""

    def record(result: HeadSeparation) -> dict[str, Any]:
        truth = inputs["inputs"]
        found: dict[str, Any] = {"complete": result.complete, "found": len(result.inputs), "batch": len(truth)}
        if len(result.inputs):
            distance = (result.inputs.double()[:, None] - truth[None]).norm(dim=2)
            nearest = distance.argmin(1)
            found["error"] = float((distance.amin(1) / truth[nearest].norm(dim=1)).max())
            found["wrong_labels"] = int((result.labels != inputs["labels"][nearest]).sum())
        return found

    return record


def head_entry(n: int, d: int, batch: int, dtype: torch.dtype) -> Entry:
    kept: dict[str, Any] = {}

    def setup() -> dict[str, Any]:
        kept.update(head_inputs(n, d, batch, dtype))
        return kept

    name = f"batch/head/n={n} d={d} B={batch}/{Target(dtype=dtype).name}"
    run = lambda inputs: separate_softmax_batch(*inputs["head"])  # noqa: E731
    return Entry(name, setup, run, record=lambda r: facts(kept)(r), once=n == 1000 and batch > 1, quick=n <= 100)


def stack_entry(batch: int, d: int, width: int, shift: float) -> Entry:
    kept: dict[str, Any] = {}

    def setup() -> dict[str, Any]:
        kept.update(stack_inputs(batch, d, width, shift))
        return kept

    run = lambda inputs: peel_relu_batch(inputs["layers"], inputs["grads"])  # noqa: E731
    name = f"batch/peeling/d={d} width={width} B={batch}/{Target().name}"
    return Entry(name, setup, run, record=lambda r: facts(kept)(r), quick=batch <= 16)


def entries(target: Target) -> list[Entry]:
    """Heads on the CPU, peeling in float64."""
    if target.device != "cpu":
        return []
    heads = [head_entry(*size, target.dtype) for size in HEADS]
    return heads + ([stack_entry(*size) for size in STACKS] if target.dtype == torch.float64 else [])
