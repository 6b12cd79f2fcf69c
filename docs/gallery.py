"""Runs the examples and keeps what they print and draw in docs/gallery, for the pages to show.

    python docs/gallery.py [NAME...]

An example whose extra is not installed keeps what it printed last.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "gallery"


def run(example: Path) -> None:
    """Keep one example's output and pictures."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(example)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
        if done.stdout.startswith("SKIPPED"):
            print(f"{example.name}: {done.stdout.strip()}", file=sys.stderr)
            return
        (KEPT / f"{example.stem}.txt").write_text(done.stdout)
        for picture in Path(folder).glob("*.png"):
            shutil.copyfile(picture, KEPT / picture.name)


def main() -> None:
    """All examples, or those that are named."""
    KEPT.mkdir(exist_ok=True)
    for example in sorted((ROOT / "examples").glob("*.py")):
        if not sys.argv[1:] or example.stem in sys.argv[1:]:
            run(example)


if __name__ == "__main__":
    main()
