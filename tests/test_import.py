"""Importing where something is missing: cupy, the compiled module, CUDA. Each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rconv_fast._build_info import build_info
from rconv_fast.constraints import backends
from rconv_fast.errors import BuildError


def run(code: str, *blocked: str) -> str:
    block = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    command = [sys.executable, "-W", "error", "-c", block + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_silent_without_cupy() -> None:
    assert run("import rconv_fast, rconv_fast.constraints.ops, rconv_fast.constraints.sparse", "cupy", "cupyx") == ""


EXTRAS = ("typer", "rich", "matplotlib", "PIL", "jinja2", "skimage", "pyarrow", "ray", "flwr", "opacus", "torchvision")


def test_the_library_loads_torch_numpy_scipy_and_nothing_else() -> None:
    loaded = run(
        """
        import torch, numpy, scipy.sparse.linalg, scipy.optimize, torch.fx
        before = {name.partition(".")[0] for name in sys.modules}
        import rconv_fast
        after = {name.partition(".")[0] for name in sys.modules}
        print(*sorted(after - before - sys.stdlib_module_names))
        assert "torch._dynamo" not in sys.modules  # twice the time of everything else
        """,
        *EXTRAS,
    )
    assert loaded.split() == ["rconv_fast"]


def test_all_but_the_command_line_works_without_the_extras(tmp_path: Path) -> None:
    run(
        f"""
        import importlib, pkgutil, rconv_fast, torch
        for module in pkgutil.walk_packages(rconv_fast.__path__, "rconv_fast."):
            if not module.name.startswith(("rconv_fast.cli.", "rconv_fast.__main__", "rconv_fast.integrations")):
                importlib.import_module(module.name)
        found = rconv_fast.verdict.Inversion("partial", inputs=torch.rand(1, 3, 4, 4))
        print(found.summary(), found.to_json())
        found.to_html({str(tmp_path / "r.html")!r})
        """,
        *EXTRAS,
    )
    assert "data:image/png" in (tmp_path / "r.html").read_text()


def test_the_reference_stands_in_for_the_compiled_module() -> None:
    output = run(
        """
        import warnings, torch
        import rconv_fast.constraints.ops as ops
        from rconv_fast.constraints import backends, reference
        from rconv_fast._build_info import build_info
        assert backends._CPU is reference
        assert not build_info()["compiled"] and "_core" in build_info()["load_error"]
        warnings.simplefilter("ignore", UserWarning)  # torch: sparse CSR is in beta
        g = torch.arange(8.0).reshape(1, 2, 4)
        print(ops.gradient_constraints(g, 4, 3, padding=1, drop_zeros=True).to_dense().sum().item())
        w = torch.ones(2, 1, 3, requires_grad=True)
        mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
        a = ops.weight_constraints(w, 4, padding=1, mask=mask)
        a.values().sum().backward()
        print(tuple(a.shape), a._nnz(), w.grad.flatten().tolist())
        """,
        "rconv_fast._core",
    )
    assert output.splitlines() == ["70.0", "(3, 4) 7 [1.0, 2.0, 1.0, 1.0, 1.0, 1.0]"]


def test_a_gpu_tensor_on_a_build_without_cuda_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_CUDA", None)
    with pytest.raises(BuildError, match=r"got a build without; .* -Ccmake.define.RCONV_CUDA=ON"):
        backends.backend_for(torch.device("cuda"))
    with pytest.raises(BuildError, match=r"must be on cpu or cuda, got xpu"):
        backends.backend_for(torch.device("xpu"))


def test_build_info_is_plain_and_complete() -> None:
    info = build_info()
    assert set(info) == {
        "version", "python", "torch", "compiled", "load_error", "openmp", "cuda", "cuda_toolkit", "cuda_architectures",
        "torch_cuda", "cupy", "threads", "devices",
    }  # fmt: skip
    assert info["torch"] == torch.__version__


def test_the_module_links_no_torch_and_no_cuda_library() -> None:
    if backends._core is None or sys.platform != "linux":
        pytest.skip("needs the compiled module on Linux")
    # Loaded alone in a fresh process, by path, the module maps nothing of torch or CUDA.
    output = run(
        f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("_core", {backends._core.__file__!r})
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        print(*{{line.split("/")[-1] for line in open("/proc/self/maps").read().split() if ".so" in line}})
        """
    )
    assert "gomp" in output or not backends._core.has_openmp
    for library in ("torch", "cudart", "cublas", "cusparse", "cusolver"):
        assert library not in output


def test_rooms_are_attributes_and_loaded_when_asked_for() -> None:
    output = run(
        """
        import rconv_fast
        before = [name for name in ("baselines", "sweep") if f"rconv_fast.{name}" in sys.modules]
        print(before, callable(rconv_fast.baselines.dlg), callable(rconv_fast.defenses.gaussian))
        """
    )
    assert output == "[] True True\n"


def test_audit_does_not_wait_for_torchs_compiler() -> None:
    """Torch's meta functions import it, for more than a second: the shapes of usual layers are worked out here."""
    code = """
        import sys
        from rconv_fast import audit, models
        assert audit(models.cnn3(), (3, 32, 32)).verdict == "exact"
        print("torch._dynamo" in sys.modules)
    """
    assert run(code).strip() == "False"


def test_audits_and_inversions_of_noise_make_no_sparse_csr_tensor() -> None:
    """Torch warns of that layout once a process: only who asks for such a matrix should read it."""
    code = """
        import warnings
        import torch
        import rconv_fast
        from rconv_fast import defenses

        # What else torch says of itself differs from version to version.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "Sparse CSR")
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(1, 12, 3, 2, 1), torch.nn.LeakyReLU(), torch.nn.Flatten(), torch.nn.Linear(192, 10)
        ).double()
        found = rconv_fast.audit(model, (1, 8, 8), noise=1e-3)
        x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([1]))
        names, parameters = zip(*model.named_parameters())
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters)))
        rconv_fast.invert(model, defenses.gaussian(gradients, 1e-4), (1, 8, 8))
        rconv_fast.invert(model, defenses.gaussian(gradients, 1e-4), (1, 8, 8), noise=1e-4)
    """
    assert run(code) == ""
