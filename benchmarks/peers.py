"""A peer's code in a process of its own, and what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent


def run_peer(peer: str, checkout: Path, photo: Tensor, threads: int, *more: str) -> dict[str, Any]:
    """Run it once on a photo (C, H, W); see ``run_peer.py``. Raises RuntimeError with its last line if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "photo.pt", Path(folder) / "result.pt"
        torch.save(photo, given)
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        command = [sys.executable, str(HERE / "run_peer.py"), peer, str(checkout.resolve()), str(given), str(result)]
        done = subprocess.run([*command, *more], env=os.environ | limits, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{peer}: the peer's code failed: {done.stderr.strip().splitlines()[-1]}")
        loaded: dict[str, Any] = torch.load(result, weights_only=True)
        return loaded


def commit_of(checkout: Path) -> str:
    git = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
