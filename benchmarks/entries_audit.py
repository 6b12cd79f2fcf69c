"""Suite `audit`: what it costs to judge a model without any private data, beside attacking it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from bench import Entry, Target
from entries_invert import attack
from fewest import fewest
from rconv_fast import models
from rconv_fast.audit import AuditReport, audit, rank_analysis

NETWORKS = {"lenet_o": (3, 32, 32), "cnn6": (3, 32, 32), "cnn3": (3, 32, 32), "cnn4_224": (3, 224, 224)}

FEWEST = (("lenet_o", "relu"), ("cnn6_o", "relu"), ("cnn6", "leaky_relu"), ("cnn3", "relu"))


def analyse(shape: tuple[int, ...], batch: int, model: nn.Module) -> Any:
    return rank_analysis(model, shape, batch_size=batch)


def judge(shape: tuple[int, ...], model: nn.Module) -> AuditReport:
    return audit(model, shape)


def facts(layers: Any) -> dict[str, Any]:
    return {
        "layers": len(layers),
        "determined": sum(layer.determined for layer in layers),
        "the papers say": sum(layer.paper_says for layer in layers),
    }


def judged(report: AuditReport) -> dict[str, Any]:
    return {"verdict": report.verdict, "largest batch": report.max_batch_size}


def entries(target: Target) -> list[Entry]:
    """The analysis is of the structure: it has no device and no precision."""
    if target != Target():
        return []
    whole = [
        Entry(
            f"audit/whole-{name}/1/{target.name}",
            models.MODELS[name],
            partial(judge, NETWORKS[name]),
            record=judged,
            once=True,
        )
        for name in ("lenet_o", "cnn3")
    ]
    few = [
        Entry(
            f"audit/fewest-constraints-{network}-{activation}/1/{target.name}",
            partial(attack, network, activation, target),
            fewest,
            record=dict,
            once=True,
        )
        for network, activation in FEWEST
    ]
    return (
        whole
        + few
        + [
            Entry(
                f"audit/rank-{name}/{batch}/{target.name}",
                models.MODELS[name],
                partial(analyse, shape, batch),
                record=facts,
                quick=name == "lenet_o",
            )
            for name, shape in NETWORKS.items()
            for batch in (1, 8)
        ]
    )
