"""The benchmarks on the CPU: what they time is right, the least work they claim is what it is, nothing is left out."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

from rconv_fast.constraints.sparse import to_scipy
from rconv_fast.solve.phases import gram

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
bench, builders, others, build, leaks, publish, roofline, run = (
    importlib.import_module(name)
    for name in ("bench", "builders", "builders_others", "entries_build", "leaks", "publish", "roofline", "run")
)
layers, rivals, fewest = (importlib.import_module(name) for name in ("single_layers", "single_layers_others", "fewest"))
SIZES = [(4, 9, 3, 1, 1), (3, 10, 5, 2, 2), (2, 11, 4, 3, 0)]  # filters, side, kernel, stride, padding


def n_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    roofline.limits_of.cache_clear()
    monkeypatch.setattr(roofline, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(roofline, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "LIMIT_SECONDS", 0.001)


# --- Entries and suites -----------------------------------------------------------------------------------


def test_every_entry_is_of_a_suite_and_has_a_name_of_its_own() -> None:
    seen: set[str] = set()
    for target in (bench.Target(), bench.Target("cpu", torch.float32)):
        names = [entry.name for entry in run.discover(target)]
        assert len(set(names)) == len(names)
        assert {run.suite_of(name) for name in names} <= set(run.SUITES)
        assert all(name.endswith(f"/{target.name}") for name in names)
        assert not seen & set(names)
        seen |= set(names)
    for path in (BENCHMARKS / "results").glob("*.json"):
        if path.stem.partition("-")[0] in run.SUITES:
            published = {r["name"] for r in json.loads(path.read_text())["results"]}
            assert {name for name in published if "/cuda" not in name} <= seen, path.name


def test_another_device_has_the_same_entries_beside_the_cpu() -> None:
    here, there = run.discover(bench.Target()), run.discover(bench.Target("meta"))
    names = {entry.name.replace("cpu-", "") for entry in here}
    assert {entry.name.replace("meta-", "") for entry in there} <= names
    beside = [entry for entry in there if isinstance(entry, bench.Entry) and entry.on_cpu]
    assert beside
    assert all("the same on the CPU" in entry.references for entry in beside)


def test_a_twin_runs_once_on_the_cpu_and_what_runs_once_is_warmed_up() -> None:
    calls: list[str] = []

    def entry(device: str) -> Any:
        return bench.Entry("x/y", lambda: [device], lambda given: calls.append(given[0]), once=True, on_cpu=True)

    here = entry("cuda")
    bench.beside_the_cpu([here], [entry("cpu")])
    result = bench.run_entry(here, min_run_time=0.0)
    assert calls == ["cuda", "cuda", "cpu"]  # the first is the warm-up
    assert list(result["references"]) == ["the same on the CPU"]
    assert result["ours"]["error"] is None


def test_a_case_runs_in_a_process_of_its_own_and_its_peak_is_measured() -> None:
    found = bench.run_alone("layer/rate-square-3-12-k5-s2/64/cpu-float64", "seed 0", time.process_time)
    assert found.outcome.success
    assert found.outcome.verified
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.peak is not None
    assert 50 < found.peak < 5000
    missing = bench.run_alone("layer/rate-square-3-12-k5-s2/64/cpu-float64", "seed -1", time.process_time)
    assert missing.seconds is None
    assert "KeyError" in missing.outcome.why


def test_a_rate_names_its_failures() -> None:
    def setup() -> Any:
        raise ValueError("no photo")

    good = bench.Outcome(True, 200.0, verified=True, rows=1.5, iterations=3)
    far = bench.Outcome(False, 20.0, "open", rows=0.5, iterations=5)
    rate = bench.Rate("x/rate", {"a": lambda: good, "b": lambda: far, "c": setup}, lambda o: o, lambda o: o)
    result = bench.run_entry(rate, min_run_time=0.0)
    assert result["record"].pop("slowest")[0] in ("a", "b")
    assert result["record"] == {
        "cases": 3,
        "successes": 1,
        "verified": 1,
        "median psnr": 110.0,
        "least psnr": 20.0,
        "worst": "b",
        "peak MiB": None,
        "iterations": [3, 5],
        "rows per unknown": [0.5, 1.5],
        "failures": {"b": "open", "c": "ValueError: no photo"},
    }
    assert result["ours"]["n"] == 2
    assert bench.run_entry(rate, min_run_time=0.0, rate_limit=0.0)["record"]["cases"] == 1


def test_what_is_verified_and_wrong_is_a_failure_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    given = leaks.leak(model, torch.rand(1, 3, 2, 2), torch.tensor([3]), bench.Target())
    assert leaks.judge(leaks.ours(given)).success
    given.x = given.x + 0.1
    outcome = leaks.judge(leaks.ours(given))
    assert (outcome.success, outcome.why) == (False, "WRONG but verified (20 dB)")


def test_everything_of_a_case_moves() -> None:
    given = layers.layer(8, 4, 3, 1, 1, relu=True).to("meta")
    assert all(v.is_meta for v in vars(given).values() if isinstance(v, Tensor))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    leak = leaks.leak(model, torch.rand(1, 3, 2, 2), torch.tensor([3]), bench.Target("meta", torch.float32))
    assert all(t.is_meta for t in (leak.x, leak.labels, *leak.gradients.values(), *leak.model.parameters()))
    assert {g.dtype for g in leak.gradients.values()} == {torch.float32}


# --- What is timed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_builder_builds_the_same_matrix(size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = builders.gradient_case(size, "cpu", dtype)
    ours = builders.ours_gradient(case)
    assert ours.dtype == dtype
    wide = builders.ours_wide(builders.widened(case, builders.gradient_layout))
    assert wide.col_indices().dtype == wide.crow_indices().dtype == torch.int64
    assert all(torch.equal(matrix.to_dense(), ours.to_dense()) for matrix in (others.torch_unfold_coo(case), wide))
    assert (others.scipy_coo(case) != to_scipy(ours)).nnz == 0
    if dtype == torch.float64:
        assert (others.numpy_by_hand(case) != to_scipy(ours)).nnz == 0


@pytest.mark.parametrize("size", SIZES)
def test_a_weight_matrix_wide_and_masked(size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = builders.weight_case((2, *size), "cpu", dtype)
    full = builders.ours_weight(case).to_dense()
    assert torch.equal(builders.ours_wide(builders.widened(case, builders.weight_layout)).to_dense(), full)
    masked = builders.half_known(case)
    assert torch.equal(builders.ours_weight(masked).to_dense(), full[masked.mask.flatten()])


def test_each_builder_stands_beside_a_copy_of_its_own_bytes(dtype: torch.dtype) -> None:
    target = bench.Target("cpu", dtype)
    entries = build.of_gradient(SIZES[0], target)[:3] + build.of_weight((2, *SIZES[0]), target)
    for entry in entries:
        case = entry.setup()
        assert len(entry.references[build.COPY](case)) == builders.csr_bytes(entry.run(case)) > 0


@pytest.mark.parametrize("relu", [False, True])
def test_both_systems_stacked_give_the_input(relu: bool) -> None:
    given = layers.layer(12, 24, 3, 1, 1, relu=relu)
    system = rivals.stacked(given)
    norms = rivals.column_squares(system.matrix)
    assert torch.allclose(norms, torch.ones_like(norms))
    found = rivals.lsmr(scipy.sparse.linalg, to_scipy(system.matrix), system.rhs.numpy())
    x = (torch.from_numpy(found) * system.scale).view_as(given.x)
    assert float((x - given.x).abs().max()) < 1e-9
    assert torch.allclose(rivals.plain(given)[0], x, atol=1e-9)


def test_layers_of_a_network_hold_what_their_equations_say() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double()
    (given,) = layers.layers_of(model, layers.photo(8))
    output = nn.functional.conv2d(given.x, given.weight, stride=2, padding=1)
    assert torch.allclose(output, given.output)
    gradient = torch.nn.grad.conv2d_weight(given.x, given.weight.shape, given.grad_output, stride=2, padding=1)
    assert torch.allclose(gradient, given.grad_weight)


# --- Least work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_builder_work_is_the_bytes_of_the_matrix(size: tuple[int, ...], dtype: torch.dtype) -> None:
    for stage in (roofline.gradient_stage(size, dtype), roofline.weight_stage((2, *size), dtype)):
        case = stage.setup("cpu")
        matrix = stage.run(case)
        assert stage.work(case, matrix).bytes == builders.csr_bytes(matrix) + n_bytes(case.source)


def test_product_work_is_the_bytes_of_the_arrays(dtype: torch.dtype) -> None:
    given = roofline.hybrid(16, dtype, "cpu")
    gradient, weight = given.system.blocks
    system = gradient.grad_output, weight.weight, weight.row_weight
    work = roofline.product_work(given)
    assert work.bytes == n_bytes(given.x, *system, *roofline.apply(given))
    assert work.bytes == n_bytes(*given.y, *system, roofline.adjoint(given))
    case = builders.Case(weight.weight, 16, 7, 2, 3, (torch.empty(0), torch.empty(0)))
    assert work.flops == 2 * 2 * builders.ours_weight(case).values().numel()


def test_iteration_work_counts_every_vector(dtype: torch.dtype) -> None:
    given = roofline.hybrid(16, dtype, "cpu")
    result = roofline.iterate(given)
    work, product = roofline.iteration_work(given, result), roofline.product_work(given)
    assert work.times == result.iterations + 1 == roofline.ITERATIONS + 1
    assert work.bytes == 2 * product.bytes + 9 * n_bytes(given.x) + 4 * n_bytes(*given.y)


def test_direct_work_is_that_of_its_matrices() -> None:
    given = roofline.direct(2, 40, 9, 3, 2, 1, "cpu")
    solution = roofline.solve_direct(given)
    assert solution.solver == "phase-cholesky"
    rows, solves = given.rows, 1 + solution.iterations
    h = gram.output_gram(rows.grad_output)
    grams = [gram.phase_gram(rows.geometry, phase, h) for phase in rows.geometry.phases]
    each_solve = 2 * n_bytes(*grams) + 2 * n_bytes(solution.x, rows.grad_output, rows.rhs)
    work = roofline.direct_work(given, solution)
    assert work.bytes == (1 + len(grams)) * n_bytes(h) + 3 * n_bytes(*grams) + solves * each_solve
    factorisations = sum(len(g) ** 3 // 3 for g in grams)
    assert work.flops > factorisations + 2 * 40 * h.numel() + solves * 4 * sum(g.numel() for g in grams)


def test_shares_of_the_limits() -> None:
    limits = roofline.Limits(100.0, {torch.float32: 10.0})
    facts = roofline.shares(roofline.Work(200, 60, torch.float32), 12.0, limits)
    assert facts["seconds at the bandwidth limit"] == 2.0
    assert facts["seconds at the flop limit"] == 6.0
    assert facts["share of the limit reached"] == 0.5


# --- Tables -----------------------------------------------------------------------------------------------


def test_the_fewest_constraints_are_enough_and_one_filter_less_is_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(96, 5)).double()
    given = leaks.leak(model, torch.rand(1, 1, 4, 4, dtype=torch.float64), torch.tensor([2]), bench.Target())
    assert fewest.fewest(given) == {"0": "18 of 150 (12.0%)"}  # 2 filters of 9 for 16 values, of 96 + 54


def test_every_kind_of_result_becomes_a_table() -> None:
    target = bench.Target()
    system = roofline.Stage(
        lambda device: roofline.hybrid(16, torch.float64, device), roofline.apply, lambda g, _: roofline.product_work(g)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    setup = lambda: leaks.leak(model, torch.rand(1, 3, 2, 2), torch.tensor([3]), target)  # noqa: E731
    entries = [
        bench.Entry(f"invert/mlp/{target.name}", setup, leaks.ours, record=leaks.facts, once=True),
        bench.Rate(f"invert/rate/{target.name}", {"one": setup}, leaks.ours, leaks.judge),
        bench.Entry(
            "layer/a", lambda: layers.layer(12, 8, 3, 1, 1, relu=True), layers.ours, record=layers.record, once=True
        ),
        *build.of_gradient(SIZES[0], target),
        roofline.roofline("system-apply", system, target, quick=False),
    ]
    results = [bench.run_entry(entry, min_run_time=0.001) for entry in entries]
    for r in results:
        assert r["ours"]["error"] is None, r
        assert not [t["error"] for t in r["references"].values() if t["error"]], r
    assert results[0]["record"]["verified"]
    results[3]["references"] |= {f"{build.COPY}, replayed": {"median": 7e-6}, "ours, replayed": {"median": 4e-6}}
    text = publish.tables(results)
    assert " 1.75 |" in text
    assert "| 1 of 1 | 1 |" in text
    assert len(text.split("\n\n")) == 6  # attacks, rates, a layer, builders, the roofline, and the values alone
    for part in text.split("\n\n"):
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_a_page_keeps_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    page = "a\n<!-- results: noise -->\nold\n<!-- end -->\nb\n<!-- results: audit -->\nold\n<!-- end -->\n"
    facts = {name: "?" for name in ("cpu", "threads", "torch", "numpy", "scipy", "time", "commit")} | {"devices": []}
    found = {"name": "audit/rank", "ours": {"median": 2.0}, "references": {}, "record": {"layers": 3}}
    (tmp_path / "audit-cpu-float64.json").write_text(json.dumps({"machine": facts, "results": [found]}))
    filled = publish.fill(page)
    assert filled.startswith(page[: page.index("b\n")])
    assert "| rank | 2 s | layers 3 | - |" in filled
