"""The command line: ``rconv-fast demo``, ``check``, ``audit``, ``invert``, ``sweep``, ``info``.

Exit codes: 0 done and verified (``check``, ``audit``: nothing as bad as ``--fail-on``), 1 ran, less than that, 2 bad
usage or input, 70 a bug (with its traceback), 130 interrupted. Everything on bad input is one line on standard error.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

import torch

from rconv_fast.errors import RconvError, optional

DONE, LESS, BAD_INPUT, BUG, INTERRUPTED = 0, 1, 2, 70, 130


def main() -> NoReturn:
    """Run the command line, as the script ``rconv-fast`` does."""
    # Without this a model of the user's own folder cannot be named: an installed script doesn't look there.
    if "" not in sys.path:
        sys.path.insert(0, "")
    if "OMP_NUM_THREADS" not in os.environ:  # this process is ours; a library would not touch its caller's threads
        torch.set_num_threads(idle_cores())
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")  # torch says so once a process
    sys.exit(run())


def idle_cores() -> int:
    """Cores that nobody else uses, at least one.

    A small system is solved in thousands of short parallel steps: where threads share a core with another process, they
    spend their time waiting for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, cores - round(busy))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process unless given."""
    try:
        for module in ("typer", "rich"):
            optional(module, "cli", "rconv-fast")
        from rconv_fast.cli.app import app

        _log_to_standard_error()
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        return _say("interrupted", INTERRUPTED) if code == INTERRUPTED else int(code or DONE)
    except (RconvError, OSError) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        return _say(str(error), INTERRUPTED if interrupted else BAD_INPUT)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except Exception as error:
        if type(error).__name__ == "Abort":  # what typer makes of Ctrl-C
            return _say("interrupted", INTERRUPTED)
        if hasattr(error, "format_message"):  # typer's usage errors, whichever click they come from
            return _say(error.format_message(), BAD_INPUT)
        traceback.print_exc()  # Python's own exit code 1 would read as "not verified"
        return BUG


def _say(message: str, code: int) -> int:
    line = " ".join(message.split())
    if line:
        print(line if code == INTERRUPTED else f"error: {line}", file=sys.stderr)
    return code


def _log_to_standard_error() -> None:
    """Show the lines of the logger ``rconv_fast``, once, unless the process has its own way with it."""
    logger = logging.getLogger("rconv_fast")
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
