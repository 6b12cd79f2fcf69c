"""The GPU benchmarks on the CPU: what they time is right, and the least work they claim is what it is."""

from __future__ import annotations

import importlib
import json
import sys
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
bench, build, gpu, large = (
    importlib.import_module(name) for name in ("bench", "entries_builders", "entries_gpu", "entries_large")
)
SIZES = [(4, 9, 3, 1, 1), (3, 10, 5, 2, 2), (2, 11, 4, 3, 0)]  # filters, side, kernel, stride, padding


def n_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.limits_of.cache_clear()
    monkeypatch.setattr(gpu, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(gpu, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 0.001)


def test_names_are_unique_and_the_published_ones_remain() -> None:
    on_cpu = [entry.name for entry in importlib.import_module("run").discover() if "/cuda/" not in entry.name]
    names = [entry.name for entry in gpu.gpu_set("cpu")]
    assert len(set(names)) == len(names)
    assert all("/cpu/" in name for name in names)
    assert len(set(on_cpu)) == len(on_cpu)
    for file in ("builders", "large", "batch", "heads"):
        results = json.loads((BENCHMARKS / "results" / f"{file}.json").read_text())["results"]
        assert {r["name"] for r in results} <= set(on_cpu)


@pytest.mark.parametrize("size", SIZES)
def test_every_builder_builds_the_same_matrix(size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = build.gradient_case(size, "cpu", dtype)
    ours = build.ours_gradient(case)
    assert ours.dtype == dtype
    wide = gpu.ours_wide(gpu.widened(case, build.gradient_layout))
    assert wide.col_indices().dtype == wide.crow_indices().dtype == torch.int64
    theirs = [build.torch_unfold_coo(case), wide]
    assert all(torch.equal(matrix.to_dense(), ours.to_dense()) for matrix in theirs)
    assert (build.scipy_coo(case) != to_scipy(ours)).nnz == 0


@pytest.mark.parametrize("size", SIZES)
def test_a_weight_matrix_wide_and_masked(size: tuple[int, ...], dtype: torch.dtype) -> None:
    case = build.weight_case((2, *size), "cpu", dtype)
    full = build.ours_weight(case).to_dense()
    assert torch.equal(gpu.ours_wide(gpu.widened(case, gpu.weight_layout)).to_dense(), full)
    masked = gpu.half_known(case)
    assert torch.equal(build.ours_weight(masked).to_dense(), full[masked.mask.flatten()])


def test_each_builder_stands_beside_a_copy_of_its_own_bytes(dtype: torch.dtype) -> None:
    entries = gpu.gradient_builders(SIZES[0], dtype, "cpu") + gpu.weight_builders((2, *SIZES[0]), dtype, "cpu")
    for entry in entries:
        case = entry.setup()
        assert len(entry.references[gpu.COPY](case)) == build.csr_bytes(entry.run(case)) > 0


@pytest.mark.parametrize("relu", [False, True])
def test_both_systems_stacked_give_the_input(relu: bool) -> None:
    given = large.layer(12, 24, 3, 1, 1, relu=relu)
    system = gpu.stacked(given)
    norms = gpu.column_squares(system.matrix)
    assert torch.allclose(norms, torch.ones_like(norms))
    found = gpu.lsmr(scipy.sparse.linalg, to_scipy(system.matrix), system.rhs.numpy())
    x = (torch.from_numpy(found) * system.scale).view_as(given.x)
    assert float((x - given.x).abs().max()) < 1e-9
    assert torch.allclose(large.plain(given)[0], x, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_builder_work_is_the_bytes_of_the_matrix(size: tuple[int, ...], dtype: torch.dtype) -> None:
    for stage in (gpu.gradient_stage(size, dtype), gpu.weight_stage((2, *size), dtype)):
        case = stage.setup("cpu")
        matrix = stage.run(case)
        assert stage.work(case, matrix).bytes == build.csr_bytes(matrix) + n_bytes(case.source)


def test_product_work_is_the_bytes_of_the_arrays(dtype: torch.dtype) -> None:
    given = gpu.hybrid(16, dtype, "cpu")
    gradient, weight = given.system.blocks
    system = gradient.grad_output, weight.weight, weight.row_weight
    work = gpu.product_work(given)
    assert work.bytes == n_bytes(given.x, *system, *gpu.apply(given))
    assert work.bytes == n_bytes(*given.y, *system, gpu.adjoint(given))
    case = build.Case(weight.weight, 16, 7, 2, 3, (torch.empty(0), torch.empty(0)))
    assert work.flops == 2 * 2 * build.ours_weight(case).values().numel()


def test_iteration_work_counts_every_vector(dtype: torch.dtype) -> None:
    given = gpu.hybrid(16, dtype, "cpu")
    result = gpu.iterate(given)
    work, product = gpu.iteration_work(given, result), gpu.product_work(given)
    assert work.times == result.iterations + 1 == gpu.ITERATIONS + 1
    assert work.bytes == 2 * product.bytes + 9 * n_bytes(given.x) + 4 * n_bytes(*given.y)


def test_direct_work_is_that_of_its_matrices() -> None:
    given = gpu.direct(2, 40, 9, 3, 2, 1, "cpu")
    solution = gpu.solve_direct(given)
    assert solution.solver == "phase-cholesky"
    rows, solves = given.rows, 1 + solution.iterations
    h = gram.output_gram(rows.grad_output)
    grams = [gram.phase_gram(rows.geometry, phase, h) for phase in rows.geometry.phases]
    each_solve = 2 * n_bytes(*grams) + 2 * n_bytes(solution.x, rows.grad_output, rows.rhs)
    work = gpu.direct_work(given, solution)
    assert work.bytes == (1 + len(grams)) * n_bytes(h) + 3 * n_bytes(*grams) + solves * each_solve
    factorisations = sum(len(g) ** 3 // 3 for g in grams)
    assert work.flops > factorisations + 2 * 40 * h.numel() + solves * 4 * sum(g.numel() for g in grams)


def test_shares_of_the_limits() -> None:
    limits = gpu.Limits(100.0, {torch.float32: 10.0})
    facts = gpu.shares(gpu.Work(200, 60, torch.float32), 12.0, limits)
    assert facts["seconds at the bandwidth limit"] == 2.0
    assert facts["seconds at the flop limit"] == 6.0
    assert facts["share of the limit reached"] == 0.5


def test_everything_of_a_case_moves() -> None:
    given = large.layer(8, 4, 3, 1, 1, relu=True).to("meta")
    assert all(v.is_meta for v in vars(given).values() if isinstance(v, Tensor))
    photo = large.Photo(nn.Sequential(nn.Linear(2, 2)), torch.ones(2), {"weight": torch.ones(2)}, [given]).to("meta")
    moved = [photo.x, *photo.gradients.values(), *photo.model.parameters(), photo.layers[0].x]
    assert all(t.is_meta for t in moved)
    model, x, gradients = gpu.batch.setup("relu", 4, 1, torch.float32, "meta")
    assert all(t.is_meta for t in (x, *gradients.values(), *model.parameters()))


def test_an_attack_runs_on_both_and_beside_others() -> None:
    calls: list[Any] = []
    entry = gpu.attack_entry(
        "x/cpu/y", lambda d: [d], calls.append, lambda _: {"psnr": 1.0}, "meta", others={"o": len}, once=True
    )
    result = bench.run_entry(entry, min_run_time=0.0)
    assert calls == [["meta"], ["meta"], ["cpu"]]  # the first is the warm-up
    assert set(result["references"]) == {"the same on the CPU", "o"}
    assert not any(r["error"] for r in result["references"].values())


def test_tables_of_measured_entries() -> None:
    publish = importlib.import_module("publish")
    system = gpu.Stage(
        lambda device: gpu.hybrid(16, torch.float64, device), gpu.apply, lambda g, _: gpu.product_work(g)
    )
    entries = [
        gpu.attacks("cpu")[-1],
        *gpu.gradient_builders(SIZES[0], torch.float64, "cpu"),
        gpu.parts(SIZES[0], "cpu"),
        gpu.roofline("system-apply", system, "cpu", quick=False),
    ]
    results = [bench.run_entry(entry, min_run_time=0.001) for entry in entries]
    for r in results:
        errors = {name: timing["error"] for name, timing in r["references"].items() if timing["error"]}
        assert all("cupy must be installed" in error for error in errors.values()), errors
        assert r["ours"]["error"] is None
    assert results[0]["record"]["verified"]
    results[1]["references"] |= {
        "device copy of the same bytes, replayed": {"median": 7e-6},
        "ours, replayed": {"median": 4e-6},
    }
    text = publish.of_gpu(results)
    assert " 1.75 |" in text
    assert len(text.splitlines()) == 3 * 2 + len(entries) + 2
    assert all(len(line.split("|")) in (9, 10, 11) for line in text.splitlines() if line)
    assert publish.of_roofline(results[-1:]) in text
