"""Run the benchmarks: ``python benchmarks/run.py [--suite NAME] [--device cuda] [--dtype float32] [--out FILE.json]``.

Finds every ``entries_*.py`` beside this file and calls its ``entries(target)``. Prints every entry and every
reference, failures too. A ratio says how many times longer the reference takes than ours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch

from bench import Entry, Rate, Target, beside_the_cpu, run_entry
from rconv_fast._build_info import build_info

HERE = Path(__file__).resolve().parent


SUITES = ("build", "layer", "invert", "batch", "patterns", "noise", "trained", "training", "audit", "scale")


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def discover(target: Target) -> list[Entry | Rate]:
    """All entries for a device and a precision; on another device those that ask for it stand beside the CPU's."""
    found: list[Entry | Rate] = []
    for path in sorted(HERE.glob("entries_*.py")):
        entries_of = importlib.import_module(path.stem).entries
        entries = entries_of(target)
        if target.device != "cpu" and any(isinstance(e, Entry) and e.on_cpu for e in entries):
            beside_the_cpu(entries, entries_of(Target("cpu", target.dtype)))
        found += entries
    return found


def suite_of(name: str) -> str:
    return name.partition("/")[0]


def machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = f"{names[0]} ({len(names)} threads)" if names else model
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": model,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "commit": commit or "none",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **build_info(),
    }


def milliseconds(timing: dict[str, Any]) -> str:
    if timing["error"]:
        return f"failed: {timing['error']}"
    return f"{timing['median'] * 1e3:10.3f} ms  ±{timing['iqr'] * 1e3:.3f}"


def show(result: dict[str, Any]) -> None:
    rate = f"  {result['gb_per_s']:.1f} GB/s" if "gb_per_s" in result else ""
    print(f"{result['name']}\n  {'ours':<34} {milliseconds(result['ours'])}{rate}")
    for name, timing in result["references"].items():
        ratio = f"  {timing['ratio']:.2f}x" if "ratio" in timing else ""
        print(f"  {name:<34} {milliseconds(timing)}{ratio}")
    for name, value in result.get("record", {}).items():
        print(f"  {name:<34} {value:>10.6g}" if isinstance(value, float) else f"  {name:<34} {value!s:>10}")
    sys.stdout.flush()


def save(out: Path, target: Target, facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Everything in one JSON file, or one file a suite in a folder."""
    if out.suffix == ".json":
        files = {out: results}
    else:
        files = {
            out / f"{suite}-{target.name}.json": [r for r in results if suite_of(r["name"]) == suite]
            for suite in dict.fromkeys(suite_of(r["name"]) for r in results)
        }
    for path, found in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": facts, "results": found}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, action="append", help="only this suite; may be repeated")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32"), help="precision of what is given")
    parser.add_argument("--filter", default="", help="only entries whose name contains this text")
    parser.add_argument("--quick", action="store_true", help="the small entries, briefly: a smoke test")
    parser.add_argument("--long", action="store_true", help="those too that take minutes each")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: on a CPU that others use too")
    parser.add_argument("--rate-limit", type=float, default=math.inf, help="no further case of a rate after so many s")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time a measurement takes")
    parser.add_argument("--out", type=Path, help="a JSON file, or a folder for one file a suite")
    arguments = parser.parse_args()

    # Float32 with all its bits, without which the solver iterates in float64.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    suites = arguments.suite or SUITES
    target = Target(arguments.device, getattr(torch, arguments.dtype))
    chosen = [
        e
        for e in discover(target)
        if suite_of(e.name) in suites
        and arguments.filter in e.name
        and (e.quick or not arguments.quick)
        and (arguments.long or not e.long)
    ]
    if not chosen:
        parser.error(f"no entry of {', '.join(suites)} matches --filter {arguments.filter!r}")
    facts = {**machine(), "clock": f"{arguments.clock} time"}
    for key, value in facts.items():
        print(f"{key:<20} {value}")
    print()
    clock = CLOCKS[arguments.clock]
    results, least, begun = [], 0.05 if arguments.quick else arguments.seconds, time.perf_counter()
    for entry in chosen:
        results.append(run_entry(entry, min_run_time=least, clock=clock, rate_limit=arguments.rate_limit))
        show(results[-1])
        if arguments.out:  # an interrupted run keeps what it has
            save(arguments.out, target, facts, results)
    facts["whole run"] = f"{time.perf_counter() - begun:.0f} s, {time.process_time():.0f} s of the process"
    print(f"\n{'whole run':<20} {facts['whole run']}")
    if arguments.out:
        save(arguments.out, target, facts, results)
    failed = [r["name"] for r in results if r["ours"]["error"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
