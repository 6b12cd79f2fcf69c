"""Judge a model before anything is shared: what its gradients would give away, and what would stop it."""

from __future__ import annotations

from rconv_fast.audit.advice import Advice
from rconv_fast.audit.judge import audit
from rconv_fast.audit.rank import LayerRank, rank_analysis
from rconv_fast.audit.report import AuditReport
from rconv_fast.audit.tally import PhaseRank

__all__ = ["Advice", "AuditReport", "LayerRank", "PhaseRank", "audit", "rank_analysis"]
