"""A result as text on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rconv_fast.verdict import Inversion


def summarise(inversion: Inversion) -> str:
    """The verdict, then one line a layer, then the notes."""
    lines = [_headline(inversion)]
    if inversion.stops_at is not None:
        lines.append(f"stops at {inversion.stops_at}: {inversion.reason}")
    if inversion.layers:
        lines.append(
            f"{'layer':24} {'kind':12} {'rows':>9} {'unknowns':>9} {'rank':>9} {'cond':>8} {'residual':>9} "
            f"{'proof':>11} {'seconds':>8}  solver"
        )
    lines += [
        f"{r.name[:24]:24} {r.kind[:12]:12} {r.rows:9d} {r.unknowns:9d} {r.rank:9d} {r.condition:8.1e} "
        f"{r.residual:9.1e} {r.proof:>11} {r.seconds:8.3f}  {r.solver}"
        for r in inversion.layers
    ]
    return "\n".join(lines + [f"note: {note}" for note in inversion.notes])


def _headline(inversion: Inversion) -> str:
    verified = "verified" if inversion.verified else "NOT verified"
    size = "unknown number of" if inversion.batch_size is None else str(inversion.batch_size)
    labels = "unknown" if inversion.labels is None else str(inversion.labels.tolist())
    line = f"{inversion.verdict}: {size} sample(s), labels {labels}: {verified}"
    if inversion.determined is not None:
        share = float(inversion.determined.double().mean())
        line += f", gradient residual {inversion.gradient_residual:.1e}, {share:.1%} of the values determined"
    return line
