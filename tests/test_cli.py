"""The command line: exit codes, files, one-line errors. The inversion itself is a stand-in here."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rconv_fast
from command_line import FakeInversion, Run, error_line, report_of
from rconv_fast import cli, models
from rconv_fast.cli import photos
from rconv_fast.errors import InterruptedInversionError
from rconv_fast.metrics import psnr
from rconv_fast.report.files import RUN_FILES
from results import exact, features


def test_demo_writes_pictures_and_reports_that_nobody_else_reads(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = exact(photos.load(None, 32, 1))
    folder = tmp_path / "made" / "here"
    done = run("demo", "--out", folder)
    assert done.exit_code == 0, done.errors
    names = ["comparison.png", "inputs.safetensors", "report.html", "report.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert set(names) <= set(RUN_FILES)
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    report = report_of(folder)
    assert report["verdict"] == "exact"
    assert report["verified"] is True
    assert report["mse"] == 0
    assert report["layers"][0]["proof"] == "cholesky"
    assert report["settings"]["model"] == "cnn3"
    assert len(report["sha256"]["gradients"]) == 64
    assert report["assumptions"]
    assert report["environment"]["torch"] == torch.__version__
    assert "exact, verified" in done.output
    assert "labels [0]" in done.output
    assert all(str(folder / name) in done.output for name in names)


def test_without_a_terminal_there_is_a_log_line_a_layer(
    run: Run, fake: FakeInversion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake.result = exact(photos.load(None, 32, 1))
    with caplog.at_level(logging.INFO, "rconv_fast"):
        run("demo", "--out", tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.name == "rconv_fast"]
    assert len(lines) == 2
    assert re.fullmatch(r"fc: separate, \d+\.\d\d s", lines[0])
    assert re.fullmatch(r"conv1: solve, 7 iterations, residual 1\.0e-03, \d+\.\d\d s", lines[1])


def test_an_earlier_run_is_not_overwritten_unless_asked(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = exact(photos.load(None, 32, 1))
    run("demo", "--out", tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    assert "--out must hold no earlier run (--overwrite removes it)" in error_line(run("demo", "--out", tmp_path))
    assert (tmp_path / "report.json").read_bytes() == before
    (tmp_path / "mine.txt").write_text("kept")
    fake.result = features()
    assert run("demo", "--out", tmp_path, "--overwrite").exit_code == 1
    # Nothing stale: the earlier pictures and inputs are gone, other files are left alone.
    assert {p.name for p in tmp_path.iterdir()} == {"mine.txt", "features.safetensors", "report.html", "report.json"}


def test_demo_hands_over_gradients_and_nothing_else(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = exact(photos.load(None, 32, 1))
    run("demo", "--out", tmp_path, "--activation", "sigmoid", "--dtype", "float32", "--seed", "3")
    (call,) = fake.calls
    assert set(call) == {"model", "gradients", "input_shape", "progress"}
    assert call["input_shape"] == (3, 32, 32)
    expected = models.cnn3("sigmoid", dtype=torch.float32, seed=3).state_dict()
    assert all(torch.equal(call["model"].state_dict()[n], p) for n, p in expected.items())
    for name, parameter in call["model"].named_parameters():
        assert call["gradients"][name].shape == parameter.shape
        assert call["gradients"][name].dtype == torch.float32
        assert not call["gradients"][name].requires_grad
        assert parameter.grad is None


def test_the_demos_noise_is_on_the_gradients_and_said(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = exact(photos.load(None, 32, 1))
    run("demo", "--out", tmp_path / "a")
    run("demo", "--out", tmp_path / "b", "--noise", "0.01")
    clean, noisy = (call["gradients"] for call in fake.calls)
    off = (noisy["conv1.weight"] - clean["conv1.weight"]).norm() / clean["conv1.weight"].norm()
    assert 0.008 < float(off) < 0.012
    assert noisy.noise is not None
    assert report_of(tmp_path / "b")["settings"]["noise"] == 0.01


def test_demo_measures_a_batch_in_the_right_order(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    originals = photos.load(None, 32, 3)
    fake.result = exact(originals[[2, 0, 1]] + 1e-6)
    assert run("demo", "--batch", 3, "--out", tmp_path).exit_code == 0
    report = report_of(tmp_path)
    assert report["psnr"] == pytest.approx(120, abs=0.1)
    assert report["psnr_per_sample"] == pytest.approx([120] * 3, abs=0.1)


def test_exit_code_says_that_it_is_not_verified(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = exact(torch.rand(1, 3, 32, 32), verdict="approximate", verified=False)
    done = run("demo", "--out", tmp_path)
    assert done.exit_code == 1
    assert "approximate, NOT verified" in done.output
    assert report_of(tmp_path)["verified"] is False


def test_a_lost_sample_is_said(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = exact(photos.load(None, 32, 1), verified=False, verdict="partial")
    done = run("demo", "--batch", 2, "--out", tmp_path)
    assert done.exit_code == 1
    assert "1 photos found, 2 were there" in done.output
    assert (tmp_path / "recovered.png").exists()


def test_what_leaked_without_inputs_is_shown_and_kept(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = features()
    done = run("demo", "--out", tmp_path)
    assert done.exit_code == 1
    assert done.errors == "" or "rconv_fast" in done.errors
    assert "features, NOT verified" in done.output
    assert "labels [3]" in done.output
    assert "stops at pool: a maximum hides" in done.output
    assert "the inputs of: fc (1, 8)" in done.output
    kept = load_file(tmp_path / "features.safetensors")
    assert torch.equal(kept["input of fc"], fake.result.features["fc"])
    assert kept["labels"].tolist() == [3]


def test_own_photo_is_cropped_and_shrunk(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    picture = Image.new("RGB", (90, 60), (0, 255, 0))
    picture.paste((255, 0, 0), (0, 0, 10, 60))  # left of the centre square: must not be seen
    picture.save(tmp_path / "mine.png")
    green = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    fake.result = exact(green)
    assert run("demo", "--image", tmp_path / "mine.png", "--out", tmp_path / "o").exit_code == 0
    assert report_of(tmp_path / "o")["mse"] == 0


@pytest.mark.parametrize("size", [32, 224])
def test_shipped_photos_are_real_and_different(size: int) -> None:
    loaded = photos.load(None, size, len(photos.PHOTOS))
    assert loaded.shape == (len(photos.PHOTOS), 3, size, size)
    assert loaded.dtype == torch.float64
    assert loaded.min() >= 0
    assert loaded.max() <= 1
    assert loaded.flatten(1).std(dim=1).min() > 0.02
    pairs = [psnr(a, b) for i, a in enumerate(loaded) for b in loaded[:i]]
    assert max(pairs) < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--size", 64], "demo: --size must be 32 or 224, got 64"),
        (["demo", "--batch", 0], "demo: --batch must be >= 1, got 0"),
        (["demo", "--batch", 99], "demo: --batch must be <= 8"),
        (["demo", "--activation", "rellu"], "cnn3: activation must be one of relu"),
        (["demo", "--image", "absent.png"], "demo: --image must be a file, got absent.png"),
        (["demo", "--image", __file__], "demo: --image must be a picture that Pillow reads"),
        (["demo", "--model", "alexnet"], "demo: --model must be one of lenet, "),
        (["demo", "--noise", -1], "demo: --noise must be >= 0, got -1.0"),
        (["demo", "--out", __file__], "--out must be a folder that can be made"),
        (["demo", "--bogus"], "No such option"),
        (["demo", "--size", "big"], "Invalid value for '--size'"),
        (["nonsense"], "No such command"),
        (["invert"], "Missing option"),
        (["check", "--model", "cnn3", "--input-shape", "3x32x32", "--batch", "4,"], "check: --batch must be positive"),
        (["check", "--model", "cnn3", "--input-shape", "3x32x32", "--fail-on", "bad"], "--fail-on must be one of"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_bad_input_and_bad_usage_are_one_line(run: Run, arguments: list[object], message: str) -> None:
    assert message in error_line(run(*arguments))


def test_interrupt_is_exit_code_130(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = KeyboardInterrupt()
    done = run("demo", "--out", tmp_path)
    assert done.exit_code == 130
    assert done.errors.splitlines()[-1] == "interrupted"


def test_an_interrupted_inversion_keeps_what_it_knew(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    known = features(features={"fc": torch.ones(1, 3)}, stops_at="conv1", reason="interrupted")
    fake.result = InterruptedInversionError(known)
    done = run("demo", "--out", tmp_path)
    assert done.exit_code == 130
    assert load_file(tmp_path / "features.safetensors")["input of fc"].tolist() == [[1.0, 1.0, 1.0]]
    report = report_of(tmp_path)
    assert (report["interrupted"], report["stops_at"]) == (True, "conv1")


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("info", "typer", "cli"),
        ("info", "rich", "cli"),
        ("demo", "matplotlib", "demo"),
        ("demo", "skimage.data", "demo"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command(
    run: Run, command: str, missing: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    line = error_line(run(command))
    assert line.endswith(f'{missing} must be installed, got none: pip install "rconv-fast[{extra}]"')
    assert list(tmp_path.iterdir()) == []


def test_info_says_what_was_built(run: Run) -> None:
    done = run("info")
    assert done.exit_code == 0
    assert torch.__version__ in done.output
    assert "cuda" in done.output.lower()


def test_version(run: Run) -> None:
    done = run("--version")
    assert (done.exit_code, done.output) == (0, f"rconv-fast {rconv_fast.__version__}\n")


def test_a_bug_has_an_exit_code_of_its_own(run: Run, fake: FakeInversion, tmp_path: Path) -> None:
    fake.result = ZeroDivisionError("our own mistake")
    done = run("demo", "--out", tmp_path)
    assert done.exit_code == 70
    assert "Traceback" in done.errors


def test_module_runs_from_a_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rconv_fast", "demo", "--size", "31"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "error: demo: --size must be 32 or 224, got 31\n")
    assert list(tmp_path.iterdir()) == []


# --- Without the stand-in --------------------------------------------------------------------------------


def test_demo_recovers_a_real_photo(run: Run, tmp_path: Path) -> None:
    done = run("demo", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    report = report_of(tmp_path)
    assert report["verified"]
    assert report["psnr"] >= 200
    assert [layer["name"] for layer in report["layers"]] == ["conv3", "conv2", "conv1"]


@pytest.mark.parametrize(("load", "threads"), [(0.1, 4), (1.6, 2), (9.0, 1)])
def test_threads_are_the_cores_that_nobody_uses(load: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    assert cli.idle_cores() == threads
