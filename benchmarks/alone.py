"""One case of a rate in a process of its own: ``python benchmarks/alone.py RATE CASE CLOCK``, for `bench.run_alone`.

Prints, as JSON, what it took, how it came out, and the peak memory of the process with all imports and the inputs.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, replace

import torch

from bench import Rate, Target, run_case
from run import discover


def main() -> None:
    name, case, clock = sys.argv[1:]
    device, dtype = name.rpartition("/")[2].split("-")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as in run.py
    rate = next(e for e in discover(Target(device, getattr(torch, dtype))) if e.name == name)
    assert isinstance(rate, Rate)
    finished = run_case(rate, case, getattr(time, clock))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(asdict(replace(finished, peak=peak))))


if __name__ == "__main__":
    main()
