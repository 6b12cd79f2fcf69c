"""Write tables of BENCHMARKS.md and README.md, and plots of docs/: ``python benchmarks/publish.py``.

No figure is typed in by hand: what stands between ``<!-- results: NAME -->`` and ``<!-- end -->`` is made here from
all files ``benchmarks/results/NAME*.json``, which ``run.py``, ``beside_rrconv.py`` or ``paper_tables.py`` wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
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


def times(ratio: float) -> str:
    """How many times longer; below ten with a digit more."""
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def decibels(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.0f} dB"


def between(ends: list[float] | None) -> str:
    return "-" if ends is None else " to ".join(dict.fromkeys(f"{end:.2f}" for end in ends))


def with_case(value: str, case: str | None) -> str:
    """A figure and whose it is."""
    return f"{value} ({case})" if case else value


def yes_or_no(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, "-")


def short(name: str) -> str:
    """An entry's name without its suite."""
    return name.partition("/")[2]


def beside(references: dict[str, Result]) -> str:
    """All competitors with their times and how many times longer they take, in one cell."""
    cells = [
        f"{name}: {seconds(r['median'])} ({r['ratio']:.1f}x)" if "ratio" in r else f"{name}: failed"
        for name, r in references.items()
    ]
    return "; ".join(cells) or "-"


# --- One table a kind of result -----------------------------------------------------------------------------


def of_rates(results: list[Result]) -> str:
    rows = []
    for r in results:
        facts, slowest = r["record"], r["record"].get("slowest")
        failed = "; ".join(f"{name}: {why}" for name, why in facts["failures"].items()) or "none"
        rows.append(
            [
                short(r["name"]),
                f"{facts['successes']} of {facts['cases']}",
                str(facts["verified"]),
                decibels(facts["median psnr"]),
                with_case(decibels(facts["least psnr"]), facts.get("worst")),
                seconds(r["ours"]["median"]),
                with_case(seconds(slowest[1]), slowest[0]) if slowest else "-",
                f"{facts['peak MiB']:.0f} MiB" if facts.get("peak MiB") else "-",
                "-".join(map(str, sorted(set(facts.get("iterations") or ["-"])))),
                between(facts.get("rows per unknown")),
                failed.replace("|", "/"),
            ]
        )
    header = ["cases", "recovered", "verified", "median PSNR", "least PSNR", "median time", "longest", "largest peak"]
    return table([*header, "iterations", "rows per value", "failures"], rows)


def of_attacks(results: list[Result]) -> str:
    rows = [
        [
            short(r["name"]),
            seconds(r["ours"]["median"]),
            decibels(r["record"]["worst psnr"]),
            yes_or_no(r["record"]["verified"]),
            r["record"].get("tightest layer", "-"),
            beside(r["references"]),
        ]
        for r in results
    ]
    return table(["case", "ours", "worst PSNR", "verified", "tightest layer, or what stops it", "others"], rows)


def of_layers(results: list[Result]) -> str:
    rows = [
        [
            short(r["name"]),
            seconds(r["ours"]["median"]),
            decibels(r["record"]["psnr"]),
            f"{r['record']['determined']:.1%}",
            f"{r['record']['peak MiB of the process']:.0f} MiB",
            beside(r["references"]),
        ]
        for r in results
    ]
    return table(["layer", "ours", "PSNR", "determined", "peak of the process so far", "others"], rows)


def of_heads(results: list[Result]) -> str:
    rows = []
    for r in results:
        facts = r["record"]
        error = f"{facts['error']:.0e}" if "error" in facts else "-"
        found = f"{facts['found']} of {facts['batch']}"
        rows.append([short(r["name"]), seconds(r["ours"]["median"]), found, error, str(facts.get("wrong_labels", "-"))])
    return table(["head", "ours", "found", "largest relative error", "wrong labels"], rows)


def of_builders(results: list[Result]) -> str:
    """Bytes written a second, as a share of what a copy writes, which reads as many; replays leave out the host."""
    copy = "device copy of the same bytes"
    rows = []
    for r in results:
        others = dict(r["references"])
        ratio = others.pop(copy, {}).get("ratio")
        replayed = [others.pop(f"{what}, replayed", {}).get("median") for what in (copy, "ours")]
        rows.append(
            [
                short(r["name"]),
                seconds(r["ours"]["median"]),
                f"{r['gb_per_s']:.1f} GB/s",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{replayed[0] / replayed[1]:.2f}" if all(replayed) else "-",
                beside(others),
            ]
        )
    header = ["matrix, F, H, k, s, p", "ours", "written", "written / a copy's", "both replayed", "others"]
    return table(header, rows)


def of_roofline(results: list[Result]) -> str:
    rows = []
    for r in results:
        facts = r["record"]
        rows.append(
            [
                short(r["name"]).removeprefix("roofline/"),
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


def of_beside(results: list[Result]) -> str:
    """Ours and the R-CONV authors' code in turn."""
    rows = [
        [
            short(r["name"]),
            seconds(r["ours"]["seconds"]),
            decibels(r["ours"]["worst psnr"]),
            yes_or_no(r["ours"]["verified"]),
            seconds(r["rrconv"]["seconds"]),
            decibels(r["rrconv"]["psnr"]),
            f"{r['ratio']:.0f}x",
            f"{min(r['rrconv']['all_seconds']) / min(r['ours']['all_seconds']):.0f}x",
        ]
        for r in results
    ]
    header = ["network", "ours", "PSNR", "verified", "authors' code", "PSNR", "ratio", "of the fastest runs"]
    return table(header, rows)


def of_paper(results: list[Result]) -> str:
    """One line an attack on a network, beside the time that ours took on the same network in the same run."""
    ours = {r["network"]: r["time"]["mean"] for r in results if r["attack"] == "ours"}
    rows = []
    for r in results:
        mse, psnr, time = r["mse"], r["psnr"], r["time"]
        other = r["attack"] != "ours" and time["mean"] is not None and ours.get(r["network"])
        none, many = psnr["mean"] is None, r["images"] > 1
        failed = ", ".join(f"{i} ({decibels(value)})" for i, value in r["failures"].items())
        failed = "all" if r["recovered"] == 0 and none else failed
        rows.append(
            [
                r["network"],
                r["attack"],
                f"{r['recovered']} of {r['images']}",
                "-" if none else f"{mse['mean']:.1e}" + f" ± {mse['deviation']:.1e}" * many,
                "-" if none else f"{psnr['mean']:.1f}" + f" ± {psnr['deviation']:.1f}" * many,
                decibels(r["least psnr"]),
                "-" if none else f"{psnr['mean'] + PEAK_255:.1f}",
                seconds(time["mean"]) + f" ± {seconds(time['deviation'])}" * (many and time["mean"] is not None),
                times(time["mean"] / ours[r["network"]]) if other else "-",
                r["note"] or "-",
                failed or "none",
            ]
        )
    header = ["network, images of", "attack", "recovered", "MSE", "PSNR, peak 1", "least", "PSNR, peak 255", "time"]
    return table([*header, "beside ours", "note", "images that failed"], rows)


def of_bounds(results: list[Result]) -> str:
    """One line a network: what answers under noise reach of the Cramer-Rao bound; the last line is all of them."""
    networks = {name: [r for r in results if r["name"] == name] for name in dict.fromkeys(r["name"] for r in results)}
    rows = []
    for name, found in {**networks, "bound/all": results}.items():
        answers = [a for r in found for a in r["reached"]]
        gaps, lawful = [a["bound"] - a["psnr"] for a in answers], [abs(a["z"]) <= LAW for a in answers]
        covered = [a["within_two"] for a in answers if a["within_two"] == a["within_two"]]
        by_noise = []
        for r in found:
            bound, reached = (median(a[key] for a in r["reached"]) for key in ("bound", "psnr"))
            by_noise.append(f"{r['sigma']:g}: {bound:.1f} / {reached:.1f}")
        rows.append(
            [
                short(name),
                "-" if found is results else ", ".join(by_noise),
                f"{median(gaps):+.2f} dB",
                f"{max(gaps):+.2f} dB",
                f"{sum(covered) / len(covered):.3f} of {len(covered)} answers",
                f"{sum(lawful)} of {len(lawful)}",
                f"{sum(a['verified'] for a in answers)} of {len(answers)}",
                f"{seconds(median(a['seconds'] for a in answers))}, {seconds(max(a['seconds'] for a in answers))}",
            ]
        )
    header = ["network", "noise: bound / reached, dB", "median gap", "largest", "values within two error bars"]
    return table([*header, "chi-square within 3 deviations", "verified", "time: median, longest"], rows)


def of_others(results: list[Result]) -> str:
    rows = []
    for r in results:
        facts = ", ".join(f"{name} {value}" for name, value in r.get("record", {}).items()) or "-"
        rows.append([short(r["name"]), seconds(r["ours"]["median"]), facts, beside(r["references"])])
    return table(["case", "ours", "found", "others"], rows)


# The chi-square of a right answer is within so many deviations in 99 % of cases.
LAW = 3.0
# What the paper's PSNR adds: 20 log10 255.
PEAK_255 = 48.13

# The first whose mark a result has says what table it goes into.
KINDS: list[tuple[Callable[[Result], bool], Callable[[list[Result]], str]]] = [
    (lambda r: "attack" in r, of_paper),
    (lambda r: "reached" in r, of_bounds),
    (lambda r: "rrconv" in r, of_beside),
    (lambda r: "gb_per_s" in r, of_builders),
    (lambda r: "failures" in r.get("record", {}), of_rates),
    (lambda r: "worst psnr" in r.get("record", {}), of_attacks),
    (lambda r: "determined" in r.get("record", {}) and "psnr" in r["record"], of_layers),
    (lambda r: "share of the limit reached" in r.get("record", {}), of_roofline),
    (lambda r: "found" in r.get("record", {}), of_heads),
    (bool, of_others),
]


def tables(results: list[Result]) -> str:
    """One table for each kind of result that there is."""
    groups: dict[int, list[Result]] = {}
    for r in results:
        kind = next(i for i, (has_mark, _) in enumerate(KINDS) if has_mark(r))
        groups.setdefault(kind, []).append(r)
    return "\n\n".join(KINDS[kind][1](group) for kind, group in sorted(groups.items()))


def machine(facts: Result) -> str:
    gpus = "".join(f"{name}, " for name in facts["devices"])
    return (
        f"{gpus}{facts['cpu']}, {facts['threads']} thread(s), torch {facts['torch']}, numpy {facts['numpy']}, "
        f"scipy {facts['scipy']}; {facts.get('clock', 'wall time')}; {facts['time'][:10]}, commit {facts['commit']}."
    )


def files_of(name: str) -> list[Path]:
    return sorted(path for path in RESULTS.glob(f"{name}*.json") if re.split(r"[-.]", path.name)[0] == name)


def fill(page: str) -> str:
    """The page with all its tables made anew; as they were where nothing has been measured."""

    def made(region: re.Match[str]) -> str:
        loaded = [json.loads(path.read_text()) for path in files_of(region[1])]
        parts = [f"{machine(one['machine'])}\n\n{tables(one['results'])}" for one in loaded]
        return f"<!-- results: {region[1]} -->\n" + ("\n\n".join(parts) or region[2]) + "\n<!-- end -->"

    return re.sub(r"<!-- results: (\w+) -->\n(.*?)\n<!-- end -->", made, page, flags=re.DOTALL)


def plot(name: str, pattern: str, label: str, picture: str, per: Callable[[float], float]) -> None:
    """Draw time over the size in the names of a group of results, and time per unit of work.

    `pattern` has two groups: the name of the curve, and the size.
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for path in files_of(name):
        for r in json.loads(path.read_text())["results"]:
            match = re.fullmatch(pattern, r["name"])
            if match and r["ours"]["median"]:
                groups.setdefault(match[1], []).append((float(match[2]), r["ours"]["median"]))
    curves = {group: sorted(points) for group, points in groups.items() if len(points) > 2}
    if not curves:
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
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
    left.legend()
    figure.savefig(DOCS / picture, dpi=120)


def plot_bounds() -> None:
    """Draw what answers under noise reach over the Cramer-Rao bound."""
    figure, axes = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    found = [r for path in files_of("bound") for r in json.loads(path.read_text())["results"] if "reached" in r]
    if not found:
        return
    for name in dict.fromkeys(r["name"] for r in found):
        answers = [a for r in found if r["name"] == name for a in r["reached"]]
        axes.plot([a["bound"] for a in answers], [a["psnr"] for a in answers], ".", label=short(name))
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], "k-", linewidth=0.7)
    axes.set(xlabel="Cramér-Rao bound, dB", ylabel="reached, dB")
    axes.legend(fontsize=7)
    figure.savefig(DOCS / "bound.png", dpi=120)


def main() -> None:
    plot_bounds()
    for path in PAGES:
        path.write_text(fill(path.read_text()))
    plot("scale", r"scale/(vgg-stem)/(\d+)/cpu-float64", "pixels of an edge", "growth.png", lambda n: 3 * n * n)
    plot("batch", r"batch/(\w+-\d+)/(\d+)/cpu-float64", "samples in the batch", "batch.png", lambda n: 3072 * n)


if __name__ == "__main__":
    main()
