"""Judge a model before anything is shared: what its gradients would give away, and what would stop it."""

from __future__ import annotations

from rconv_fast.audit.rank import LayerRank, PhaseRank, rank_analysis

__all__ = ["LayerRank", "PhaseRank", "rank_analysis"]
