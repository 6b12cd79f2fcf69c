"""Write tables of BENCHMARKS.md and README.md, and plots of docs/: ``python benchmarks/publish.py``.

No figure is typed in by hand: what stands between ``<!-- results: NAME -->`` and ``<!-- end -->`` is made here from
``benchmarks/results/NAME.json``, which ``run.py`` or ``entries_attack.py`` wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
PAGES = HERE.parent / "BENCHMARKS.md", HERE.parent / "README.md"

Result = dict[str, Any]


def seconds(value: float | None) -> str:
    """A time with its unit; a dash where the measurement failed."""
    if value is None:
        return "-"
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def of_attack(results: list[Result]) -> str:
    rows = [
        [
            r["name"].removeprefix("attack/cpu/"),
            seconds(r["ours"]["seconds"]),
            f"{r['ours']['psnr']:.0f} dB",
            "yes" if r["ours"]["verified"] else "no",
            seconds(r["rrconv"]["seconds"]),
            f"{r['rrconv']['psnr']:.0f} dB",
            f"{r['ratio']:.0f}x",
            f"{min(r['rrconv']['all_seconds']) / min(r['ours']['all_seconds']):.0f}x",
        ]
        for r in results
    ]
    header = ["network", "ours", "PSNR", "verified", "authors' code", "PSNR", "ratio", "of the fastest runs"]
    return table(header, rows)


def of_builders(results: list[Result]) -> str:
    names = list(results[0]["references"])
    rows = []
    for r in results:
        ratios = [f"{r['references'][n]['ratio']:.2f}x" for n in names]
        name = r["name"].removeprefix("gradient/cpu/")
        rows.append([name, seconds(r["ours"]["median"]), f"{r['gb_per_s']:.1f} GB/s", *ratios])
    return table(["F, H, k, s, p", "ours", "written", *names], rows)


def of_large(results: list[Result]) -> str:
    rows = []
    for r in results:
        facts = r["record"]
        plain = next(iter(r["references"].values()), {})
        rows.append(
            [
                r["name"].removeprefix("large/"),
                seconds(r["ours"]["median"]),
                f"{facts['psnr']:.0f} dB",
                f"{facts['determined']:.1%}" if "determined" in facts else ("verified" if facts["verified"] else "no"),
                f"{facts['peak MiB of the process']:.0f} MiB",
                seconds(plain.get("median")),
                f"{plain['ratio']:.1f}x" if "ratio" in plain else "-",
            ]
        )
    header = ["case", "ours", "PSNR", "determined", "peak of the process so far", "plain Jacobi-CG", "ratio"]
    return table(header, rows)


def of_batch(results: list[Result]) -> str:
    rows = [
        [
            r["name"].removeprefix("batch/"),
            seconds(r["ours"]["median"]),
            f"{r['record']['worst psnr']:.0f} dB",
            "yes" if r["record"]["verified"] else "no",
            r["record"]["tightest layer"],
        ]
        for r in results
        if "record" in r
    ]
    return table(
        ["network, samples, gradients", "ours", "worst PSNR", "verified", "tightest layer, or what stops it"], rows
    )


def of_heads(results: list[Result]) -> str:
    rows = []
    for r in results:
        facts = r["record"]
        error = f"{facts['error']:.0e}" if "error" in facts else "-"
        found = f"{facts['found']} of {facts['batch']}"
        rows.append([r["name"], seconds(r["ours"]["median"]), found, error, str(facts.get("wrong_labels", "-"))])
    return table(["head", "ours", "found", "largest relative error", "wrong labels"], rows)


def beside(references: dict[str, Result]) -> str:
    """All competitors with their times and how many times longer they take, in one cell."""
    cells = [
        f"{name}: {seconds(r['median'])} ({r['ratio']:.1f}x)" if "ratio" in r else f"{name}: failed"
        for name, r in references.items()
    ]
    return "; ".join(cells) or "-"


def of_gpu(results: list[Result]) -> str:
    """Attacks, builders and stages, a table each."""
    kinds: dict[str, list[Result]] = {"builders": [], "roofline": [], "attacks": []}
    for r in results:
        kind = r["name"].split("/")[0]
        kinds[kind if kind in kinds else "attacks"].append(r)
    tables = of_gpu_attacks(kinds["attacks"]), of_gpu_builders(kinds["builders"]), of_roofline(kinds["roofline"])
    return "\n\n".join(tables)


def of_gpu_attacks(results: list[Result]) -> str:
    rows = []
    for r in results:
        facts, on_cpu = r.get("record", {}), r["references"]["the same on the CPU"]
        psnr = facts.get("psnr", facts.get("worst psnr"))
        others = {name: other for name, other in r["references"].items() if other is not on_cpu}
        rows.append(
            [
                r["name"].replace("/cuda/", " "),
                seconds(r["ours"]["median"]),
                "-" if psnr is None else f"{psnr:.0f} dB",
                {True: "yes", False: "no"}.get(facts.get("verified"), "-"),
                seconds(on_cpu["median"]),
                f"{on_cpu['ratio']:.1f}x" if "ratio" in on_cpu else "-",
                beside(others),
            ]
        )
    return table(["case", "ours", "PSNR", "verified", "the same on the CPU", "ratio", "others on the GPU"], rows)


def of_gpu_builders(results: list[Result]) -> str:
    """A copy reads what it writes: of equal bytes written, it moves twice as many. A replay leaves out the host."""
    rows = []
    for r in results:
        _, _, matrix, size = r["name"].split("/")
        others = dict(r["references"])
        ratio = others.pop("device copy of the same bytes", {}).get("ratio")
        replayed = [
            others.pop(f"{what}, replayed", {}).get("median") for what in ("device copy of the same bytes", "ours")
        ]
        rows.append(
            [
                matrix,
                size,
                seconds(r["ours"]["median"]),
                f"{r['gb_per_s']:.0f} GB/s" if "gb_per_s" in r else "-",
                "-" if ratio is None else f"{ratio:.2f}",
                "-" if ratio is None else f"{ratio / 2:.2f}",
                f"{replayed[0] / replayed[1]:.2f}" if all(replayed) else "-",
                beside(others),
            ]
        )
    shares = ["bytes written / a copy's", "bytes moved / a copy's", "written / a copy's, both replayed"]
    return table(["matrix", "size", "ours", "written", *shares, "others"], rows)


def of_roofline(results: list[Result]) -> str:
    rows = []
    for r in results:
        if "record" not in r:
            continue
        facts = r["record"]
        rows.append(
            [
                r["name"].removeprefix("roofline/"),
                f"{facts['bytes'] / 1e6:.1f} MB",
                f"{facts['flops'] / 1e9:.2f} Gflop",
                seconds(facts["seconds"]),
                seconds(facts["seconds at the bandwidth limit"]),
                seconds(facts["seconds at the flop limit"]),
                f"{facts['copy GB/s']:.0f} GB/s",
                f"{facts['matrix product Gflop/s']:.0f} Gflop/s",
                f"{facts['share of the limit reached']:.0%}",
            ]
        )
    header = ["stage", "bytes", "flops", "measured", "at the bandwidth", "at the flops", "copy", "matrix product"]
    return table([*header, "share of the limit"], rows)


TABLES: dict[str, Callable[[list[Result]], str]] = {
    "attack": of_attack,
    "builders": of_builders,
    "large": of_large,
    "batch": of_batch,
    "heads": of_heads,
    "gpu": of_gpu,
    "roofline": of_roofline,
}


def machine(facts: Result) -> str:
    gpus = "".join(f"{name}, " for name in facts["devices"])
    return (
        f"{gpus}{facts['cpu']}, {facts['threads']} thread(s), torch {facts['torch']}, numpy {facts['numpy']}, "
        f"scipy {facts['scipy']}; {facts['time'][:10]}, commit {facts['commit']}."
    )


def fill(page: str, name: str) -> str:
    """The page with one table made anew; as it was where nothing has been measured."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return page
    loaded = json.loads(path.read_text())
    text = f"{machine(loaded['machine'])}\n\n{TABLES[name](loaded['results'])}"
    region = re.compile(rf"(<!-- results: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return region.sub(lambda m: m[1] + text + m[2], page)


def plot(name: str, prefix: str, label: str, picture: str, per: Callable[[float], float]) -> None:
    """Draw time over the last number in the names of a group of results, and time per unit of work."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return
    groups: dict[str, list[tuple[float, float]]] = {}
    for r in json.loads(path.read_text())["results"]:
        match = re.fullmatch(rf"{prefix}(?:/([^/]+))?/(\d+)(?:/float64)?", r["name"])
        if match and r["ours"]["median"] and "224" not in r["name"]:
            groups.setdefault(match[1] or "", []).append((float(match[2]), r["ours"]["median"]))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    curves = {group: sorted(points) for group, points in groups.items() if len(points) > 2}
    for group, points in curves.items():
        x, y = zip(*points, strict=True)
        left.loglog(x, y, "o-", label=group)
        right.semilogx(x, [1e6 * t / per(n) for n, t in zip(x, y, strict=True)], "o-", label=group)
    ticks = sorted({n for points in curves.values() for n, _ in points})
    for axes in (left, right):
        axes.set_xticks(ticks, [f"{n:.0f}" for n in ticks])
        axes.minorticks_off()
    left.set(xlabel=label, ylabel="seconds")
    right.set(xlabel=label, ylabel="microseconds per unknown value", ylim=(0, None))
    if any(curves):
        left.legend()
    figure.savefig(DOCS / picture, dpi=120)


def main() -> None:
    for path in PAGES:
        page = path.read_text()
        for name in TABLES:
            page = fill(page, name)
        path.write_text(page)
    plot("large", "large/growth", "pixels of an edge", "growth.png", lambda n: 3 * n * n)
    plot("batch", "batch", "samples in the batch", "batch.png", lambda n: 3072 * n)


if __name__ == "__main__":
    main()
