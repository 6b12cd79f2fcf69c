"""The command line: exit codes, files, one-line errors. The inversion itself is a stand-in here."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import rconv_fast
from json_schema import violations
from rconv_fast import cli, models
from rconv_fast.cli import photos
from rconv_fast.errors import InterruptedInversionError
from rconv_fast.metrics import psnr
from rconv_fast.progress import Event
from rconv_fast.report.files import RUN_FILES
from rconv_fast.report.payload import schema_of
from rconv_fast.sweep import read_rows
from rconv_fast.verdict import Inversion
from results import exact, features


class FakeInversion:
    """What ``invert`` returns, with the result given; the calls are recorded."""

    def __init__(self) -> None:
        self.result: Inversion | BaseException = exact(torch.zeros(1, 1))
        self.calls: list[dict[str, Any]] = []

    def __call__(self, model: torch.nn.Module, gradients: Any, input_shape: tuple[int, ...], **options: Any) -> Any:
        self.calls.append({"model": model, "gradients": gradients, "input_shape": input_shape, **options})
        for event in (Event("fc", "separate"), Event("conv1", "solve", 7, 9, 1e-3)):
            options["progress"](event)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeInversion:
    fake = FakeInversion()
    monkeypatch.setattr(rconv_fast, "invert", fake, raising=False)
    return fake


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    exit_code: int
    output: str
    errors: str


Run = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    logging.getLogger("rconv_fast").propagate = True

    def run(*arguments: object) -> Done:
        code = cli.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


def error_line(done: Done) -> str:
    assert done.exit_code == 2
    lines = done.errors.strip().splitlines()
    assert len(lines) == 1, done.errors
    assert lines[0].startswith("error: ")
    return lines[0]


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    schema = schema_of(report["schema"])
    assert not list(violations(report, schema, schema))
    return report


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


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Tensor]]:
    """A folder with a model's source, its state and gradients, as a user would have it."""
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))\n"
        "def broken():\n"
        "    raise RuntimeError('no weights\\nat all')\n"
        "def number():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_net

    model = my_net.build().double()
    gradients = {n: torch.randn_like(p).detach() for n, p in model.named_parameters()}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "state.safetensors")
    torch.save(gradients, tmp_path / "gradients.pt")
    return tmp_path, gradients


def options(folder: Path, **changes: object) -> list[object]:
    given = {
        "model": "my_net:build",
        "state": folder / "state.safetensors",
        "gradients": folder / "gradients.pt",
        "input-shape": "1x8x8",
        "out": folder / "out",
    } | {k.replace("_", "-"): v for k, v in changes.items()}
    return ["invert", *(part for name, value in given.items() for part in (f"--{name}", value))]


def test_invert_reads_files_and_writes_only_into_its_folder(
    run: Run, fake: FakeInversion, client: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, gradients = client
    before = {p for p in folder.rglob("*") if "__pycache__" not in p.parts}
    inputs = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    fake.result = exact(inputs)
    done = run(*options(folder, batch=2, loss="mse", scale="unknown", quantum="1/255"))
    assert done.exit_code == 0, done.errors
    (call,) = fake.calls
    assert (call["input_shape"], call["batch_size"], call["loss"]) == ((1, 8, 8), 2, "mse")
    assert call["scale"] is None
    assert call["quantum"] == 1 / 255
    assert "noise" not in call
    assert not call["model"].training
    state = load_file(folder / "state.safetensors")
    assert all(torch.equal(call["model"].state_dict()[n], t) for n, t in state.items())
    assert all(torch.equal(call["gradients"][n], g) for n, g in gradients.items())
    new = {p for p in folder.rglob("*") if "__pycache__" not in p.parts} - before
    names = ["inputs.safetensors", "recovered.png", "report.html", "report.json"]
    assert {str(p.relative_to(folder)) for p in new} == {"out", *(f"out/{name}" for name in names)}
    kept = load_file(folder / "out" / "inputs.safetensors")
    assert torch.equal(kept["inputs"], inputs)
    assert bool(kept["determined"].all())
    report = report_of(folder / "out")
    assert report["settings"]["loss"] == "mse"
    assert report["sha256"]["state"] != report["sha256"]["gradients"]


@pytest.mark.parametrize("options_given", [["--steps", "1"], ["--steps", "3", "--momentum", "0.5"]])
def test_invert_takes_an_update(
    run: Run, fake: FakeInversion, client: tuple[Path, dict[str, Tensor]], options_given: list[str]
) -> None:
    folder, gradients = client
    state = load_file(folder / "state.safetensors")
    after = {n: t - 0.5 * gradients[n] if n in gradients else t for n, t in state.items()}
    torch.save({"epoch": 1, "state_dict": {f"module.{n}": t for n, t in after.items()}}, folder / "after.pt")
    arguments = [*options(folder), "--after", folder / "after.pt", "--lr", 0.5, *options_given]
    place = arguments.index("--gradients")
    fake.result = exact(torch.rand(1, 1, 8, 8))
    done = run(*arguments[:place], *arguments[place + 2 :])
    assert done.exit_code == 0, done.errors
    shared = fake.calls[0]["gradients"]
    assert shared.steps == int(options_given[1])
    assert shared.noise is not None
    if shared.steps == 1:
        torch.testing.assert_close(shared["3.weight"], gradients["3.weight"], rtol=1e-10, atol=1e-12)
    assert "update, lr 0.5" in report_of(folder / "out")["assumptions"][1]


@pytest.mark.parametrize("kind", ["npz", "npz without names", "nested", "list"])
def test_files_of_every_kind(run: Run, fake: FakeInversion, client: tuple[Path, dict[str, Tensor]], kind: str) -> None:
    folder, gradients = client
    state = load_file(folder / "state.safetensors")
    if kind == "npz":
        np.savez(folder / "s.npz", **{n: t.numpy() for n, t in state.items()})
        np.savez(folder / "g.npz", **{n: t.numpy() for n, t in gradients.items()})
    elif kind == "npz without names":
        order = list(fake_model(folder).state_dict())
        np.savez(folder / "s.npz", *[state[n].numpy() for n in order])
        np.savez(folder / "g.npz", *[gradients[n].numpy() for n in gradients])
    elif kind == "nested":
        torch.save({"model": state, "epoch": 3}, folder / "s.pt")
        torch.save({"gradients": gradients}, folder / "g.pt")
    else:
        torch.save([state[n] for n in fake_model(folder).state_dict()], folder / "s.pt")
        torch.save(list(gradients.values()), folder / "g.pt")
    end = "npz" if kind.startswith("npz") else "pt"
    fake.result = exact(torch.rand(1, 1, 8, 8))
    done = run(*options(folder, state=folder / f"s.{end}", gradients=folder / f"g.{end}"))
    assert done.exit_code == 0, done.errors
    assert all(torch.equal(fake.calls[0]["gradients"][n], g) for n, g in gradients.items())
    assert all(torch.equal(fake.calls[0]["model"].state_dict()[n], t) for n, t in state.items())


def fake_model(folder: Path) -> torch.nn.Module:
    from rconv_fast.cli.options import build_model

    return build_model("test", f"{folder / 'my_net.py'}:build")


def test_a_model_is_named_by_a_file_a_module_or_its_own_name(client: tuple[Path, dict[str, Tensor]]) -> None:
    from rconv_fast.cli.options import build_model

    folder, _ = client
    (folder / "deep.py").write_text("import my_net\nclass Nets:\n    ready = my_net.build()\n")
    assert isinstance(fake_model(folder), torch.nn.Sequential)
    assert isinstance(build_model("test", f"{folder / 'deep.py'}:Nets.ready"), torch.nn.Sequential)
    assert build_model("test", "cnn3").fc.out_features == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "my_net"}, "--model must look like PKG.MODULE:FACTORY or file.py:FACTORY, or be one of lenet"),
        ({"model": "no_such_net:build"}, "ModuleNotFoundError: No module named 'no_such_net'"),
        ({"model": "no/such/net.py:build"}, "FileNotFoundError: no file no/such/net.py"),
        ({"model": "my_net:absent"}, "has no attribute 'absent'"),
        ({"model": "my_net:broken"}, "RuntimeError: no weights"),
        ({"model": "my_net:number"}, "--model must return a torch.nn.Module, got int"),
        ({"input_shape": "3,32,32"}, "--input-shape must look like 3x32x32, got '3,32,32'"),
        ({"input_shape": "0x8x8"}, "--input-shape must look like 3x32x32"),
        ({"state": "absent.pt"}, "--state must be a file, got absent.pt"),
        ({"gradients": __file__}, "--gradients must be safetensors, npz or loadable"),
        ({"after": "absent.pt"}, "--gradients must be given, or --after, got both or none"),
        ({"batch": 0}, "--batch must be >= 1, got 0"),
        ({"loss": "hinge"}, "loss must be one of cross_entropy"),
        ({"quantum": "1/0"}, "--quantum must be a number, as in 1/255, got '1/0'"),
        ({"scale": "big"}, "--scale must be a number or unknown, got 'big'"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_invert_names_what_is_wrong(
    run: Run, client: tuple[Path, dict[str, Tensor]], changes: dict[str, object], message: str
) -> None:
    assert message in error_line(run(*options(client[0], **changes)))
    assert not (client[0] / "out").exists()


@pytest.mark.usefixtures("fake")
def test_state_must_fit_the_model(run: Run, client: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = client
    save_file({"0.weight": torch.zeros(1)}, folder / "state.safetensors")
    line = error_line(run(*options(folder)))
    assert line.startswith("error: invert: --state must fit the model, got Missing key(s)")


def test_check_counts_without_gradients_and_fails_on_what_it_is_told_to(run: Run, tmp_path: Path) -> None:
    given = ["check", "--model", "cnn3", "--input-shape", "3x32x32", "--batch", "1,4"]
    done = run(*given, "--json", tmp_path / "c.json", "--html", tmp_path / "c.html")
    assert done.exit_code == 0, done.errors
    assert "batch size 4: exact. every layer has at least as many" in done.output
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["verdict"] == "exact"
    assert report["batches"]["4"]["verdict"] == "exact"
    assert [layer["name"] for layer in report["layers"]["4"]] == ["conv1", "conv2", "conv3", "fc"]
    Page().feed((tmp_path / "c.html").read_text())
    assert run(*given, "--fail-on", "exact").exit_code == 1
    assert run(*given, "--fail-on", "none found").exit_code == 1


class Page(HTMLParser):
    """Reads a page, and refuses anything that would be fetched."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            assert name not in ("src", "href") or (value or "").startswith("data:")


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


def test_invert_recovers_a_sample_from_files(tmp_path: Path) -> None:
    model = models.lenet_o(n_classes=10, in_channels=1, image_size=16)
    sample = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    torch.nn.functional.cross_entropy(model(sample), torch.tensor([6])).backward()
    (tmp_path / "grey_net.py").write_text(
        "from rconv_fast.models import lenet_o\n"
        "def build():\n"
        "    return lenet_o(n_classes=10, in_channels=1, image_size=16, seed=99)\n"
    )
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    torch.save([p.grad for p in model.parameters()], tmp_path / "gradients.pt")
    command = [
        sys.executable,
        "-m",
        "rconv_fast",
        *map(str, options(Path(), model="grey_net.py:build", input_shape="1x16x16")),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out" / "inputs.safetensors")
    assert psnr(found["inputs"], sample) >= 150
    assert found["labels"].tolist() == [6]
    assert any(line.startswith("rconv_fast: conv1: ") for line in done.stderr.splitlines())


def test_sweep_writes_a_table_and_goes_on_with_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "linear_net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12)).double()\n"
    )
    (tmp_path / "pictures").mkdir()
    for i, photo in enumerate(photos.load(None, 32, 2)):
        image = (255 * photo).byte().permute(1, 2, 0).numpy()
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i}.png")
    given = ["sweep", "--model", f"{tmp_path / 'linear_net.py'}:build", "--images", tmp_path / "pictures"]
    given += ["--input-shape", "3x8x8", "--batch", "1,2", "--out", tmp_path / "t.parquet"]
    done = run(*given)
    assert done.exit_code == 0, done.errors
    assert sum("linear_net" in line for line in done.output.splitlines()) == 2  # a line a batch size
    rows = read_rows(tmp_path / "t.parquet")
    assert sorted((row["batch_size"], row["verified"]) for row in rows) == [(1, True), (1, True), (2, True)]
    assert "linear_net" in (tmp_path / "t.parquet.html").read_text()
    assert run(*given).exit_code == 0
    assert "--attack must be one of aono" in error_line(run(*given, "--attack", "i2f_bound"))


def test_a_model_that_cannot_be_read_is_not_covered_and_no_bad_usage(run: Run, tmp_path: Path) -> None:
    (tmp_path / "dynamic.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.fc(2 * x if x.sum() > 0 else x)\n"
    )
    given = ["check", "--model", f"{tmp_path / 'dynamic.py'}:Net", "--input-shape", "4"]
    done = run(*given)
    assert done.exit_code == 0
    assert "not covered" in done.output
    assert "control flow" in done.output
    assert run(*given, "--fail-on", "not covered").exit_code == 1


def test_audit_writes_its_report_and_fails_on_what_it_is_told_to(run: Run, tmp_path: Path) -> None:
    (tmp_path / "audited.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6)).double()\n"
    )
    given = ["audit", "--model", f"{tmp_path / 'audited.py'}:build", "--input-shape", "3x4x4"]
    written = {name: tmp_path / f"a.{name}" for name in ("json", "html", "markdown")}
    done = run(*given, *(x for name, path in written.items() for x in (f"--{name}", path)), "--fail-on", "exact")
    assert done.exit_code == 1, done.errors
    assert done.output.startswith("exact: ")
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["verdict"] == "exact"
    assert not list(violations(report, schema_of(report["schema"]), schema_of(report["schema"])))
    Page().feed((tmp_path / "a.html").read_text())
    assert written["markdown"].read_text().startswith("## Gradient leakage of Sequential")
    assert {path.stat().st_mode & 0o777 for path in written.values()} == {0o600}
    assert run(*given).exit_code == 0


@pytest.mark.parametrize(("load", "threads"), [(0.1, 4), (1.6, 2), (9.0, 1)])
def test_threads_are_the_cores_that_nobody_uses(load: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    assert cli.idle_cores() == threads
