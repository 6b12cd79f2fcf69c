"""The command line: exit codes, files, one-line errors. The inversion itself is a stand-in here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import rconv_fast
from rconv_fast import cli, models
from rconv_fast.errors import UnsupportedModelError
from rconv_fast.metrics import psnr

LAYER = SimpleNamespace(
    name="conv1",
    kind="conv2d",
    rows=7,
    unknowns=5,
    rank=5,
    condition=3.0,
    residual=1e-15,
    solver="direct",
    seconds=0.1,
)


class FakeInversion:
    """What ``invert`` returns, with the inputs given; the calls are recorded."""

    def __init__(self) -> None:
        self.inputs = torch.zeros(1)
        self.verified = True
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def __call__(self, model: torch.nn.Module, gradients: Any, input_shape: tuple[int, ...], **options: Any) -> Any:
        self.calls.append({"model": model, "gradients": gradients, "input_shape": input_shape, **options})
        if self.error is not None:
            raise self.error
        return SimpleNamespace(
            inputs=self.inputs,
            labels=torch.zeros(len(self.inputs), dtype=torch.int64),
            layers=[LAYER],
            gradient_residual=1e-15 if self.verified else 0.3,
            verified=self.verified,
            determined=torch.ones_like(self.inputs, dtype=torch.bool),
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeInversion:
    fake = FakeInversion()
    monkeypatch.setattr(rconv_fast, "invert", fake, raising=False)
    return fake


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def error_line(result: Result) -> str:
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_demo_writes_picture_and_report(fake: FakeInversion, tmp_path: Path) -> None:
    fake.inputs = cli._photos(None, 32, 1)
    result = run("demo", "--out", tmp_path / "made" / "here")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "made" / "here").iterdir()) == ["comparison.png", "report.json"]
    report = json.loads((tmp_path / "made" / "here" / "report.json").read_text())
    assert {"psnr", "mse", "gradient_residual", "verified", "seconds", "layers"} <= set(report)
    assert report["verified"] is True
    assert report["mse"] == 0
    assert report["layers"][0]["name"] == "conv1"
    assert str(tmp_path / "made" / "here" / "comparison.png") in result.output


def test_demo_hands_over_gradients_and_nothing_else(fake: FakeInversion, tmp_path: Path) -> None:
    fake.inputs = cli._photos(None, 32, 1)
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


def test_demo_measures_a_batch_in_the_right_order(fake: FakeInversion, tmp_path: Path) -> None:
    photos = cli._photos(None, 32, 3)
    fake.inputs = photos[[2, 0, 1]] + 1e-6
    assert run("demo", "--batch", 3, "--out", tmp_path).exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["psnr"] == pytest.approx(120, abs=0.1)
    assert report["psnr_per_sample"] == pytest.approx([120] * 3, abs=0.1)


def test_exit_code_says_that_it_is_not_verified(fake: FakeInversion, tmp_path: Path) -> None:
    fake.inputs, fake.verified = torch.rand(1, 3, 32, 32), False
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 1
    assert "not verified" in result.output
    assert json.loads((tmp_path / "report.json").read_text())["verified"] is False


def test_a_lost_sample_is_not_a_success(fake: FakeInversion, tmp_path: Path) -> None:
    fake.inputs = cli._photos(None, 32, 1)
    result = run("demo", "--batch", 2, "--out", tmp_path)
    assert result.exit_code == 1
    assert "1 samples found, 2 were there" in result.output


def test_own_photo_is_cropped_and_shrunk(fake: FakeInversion, tmp_path: Path) -> None:
    picture = Image.new("RGB", (90, 60), (0, 255, 0))
    picture.paste((255, 0, 0), (0, 0, 10, 60))  # left of the centre square: must not be seen
    picture.save(tmp_path / "mine.png")
    fake.inputs = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert run("demo", "--image", tmp_path / "mine.png", "--out", tmp_path / "o").exit_code == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["mse"] == 0


@pytest.mark.parametrize("size", [32, 224])
def test_shipped_photos_are_real_and_different(size: int) -> None:
    photos = cli._photos(None, size, len(cli._PHOTOS))
    assert photos.shape == (len(cli._PHOTOS), 3, size, size)
    assert photos.dtype == torch.float64
    assert photos.min() >= 0
    assert photos.max() <= 1
    assert photos.flatten(1).std(dim=1).min() > 0.02
    pairs = [psnr(a, b) for i, a in enumerate(photos) for b in photos[:i]]
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
        (["demo", "--out", __file__], "--out must be a folder that can be made"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_bad_input_is_one_line(arguments: list[object], message: str) -> None:
    assert message in error_line(run(*arguments))


@pytest.mark.parametrize("arguments", [["demo", "--bogus"], ["demo", "--size", "big"], ["nonsense"], ["invert"]])
def test_bad_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_package_errors_become_one_line(fake: FakeInversion, tmp_path: Path) -> None:
    fake.error = UnsupportedModelError("pool", "max pooling\nover 2x2")
    assert "must be readable at 'pool'" in error_line(run("demo", "--out", tmp_path))


def test_interrupt_is_exit_code_130(fake: FakeInversion, tmp_path: Path) -> None:
    fake.error = KeyboardInterrupt()
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


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
    fake: FakeInversion, client: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, gradients = client
    before = {p for p in folder.rglob("*") if "__pycache__" not in p.parts}
    fake.inputs = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    result = run(*options(folder, batch=2, loss="mse"))
    assert result.exit_code == 0, result.output
    (call,) = fake.calls
    assert (call["input_shape"], call["batch_size"], call["loss"]) == ((1, 8, 8), 2, "mse")
    assert not call["model"].training
    state = load_file(folder / "state.safetensors")
    assert all(torch.equal(call["model"].state_dict()[n], t) for n, t in state.items())
    assert all(torch.equal(call["gradients"][n], g) for n, g in gradients.items())
    new = {p for p in folder.rglob("*") if "__pycache__" not in p.parts} - before
    assert {str(p.relative_to(folder)) for p in new} == {
        "out",
        "out/recovered.png",
        "out/inputs.safetensors",
        "out/report.json",
    }
    assert torch.equal(load_file(folder / "out" / "inputs.safetensors")["inputs"], fake.inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "my_net"}, "--model must look like PKG.MODULE:FACTORY, got 'my_net'"),
        ({"model": "no_such_net:build"}, "ModuleNotFoundError: No module named 'no_such_net'"),
        ({"model": "my_net:absent"}, "has no attribute 'absent'"),
        ({"model": "my_net:broken"}, "RuntimeError: no weights"),
        ({"model": "my_net:number"}, "--model must return a torch.nn.Module, got int"),
        ({"input_shape": "3,32,32"}, "--input-shape must look like 3x32x32, got '3,32,32'"),
        ({"input_shape": "0x8x8"}, "--input-shape must look like 3x32x32"),
        ({"state": "absent.pt"}, "--state must be a file, got absent.pt"),
        ({"gradients": __file__}, "--gradients must be safetensors or loadable"),
        ({"batch": 0}, "--batch must be >= 1, got 0"),
    ],
)
@pytest.mark.usefixtures("fake")
def test_invert_names_what_is_wrong(
    client: tuple[Path, dict[str, Tensor]], changes: dict[str, object], message: str
) -> None:
    assert message in error_line(run(*options(client[0], **changes)))


@pytest.mark.usefixtures("fake")
def test_state_must_fit_the_model(client: tuple[Path, dict[str, Tensor]]) -> None:
    folder, _ = client
    save_file({"0.weight": torch.zeros(1)}, folder / "state.safetensors")
    line = error_line(run(*options(folder)))
    assert line.startswith("error: invert: --state must fit the model, got Missing key(s)")


def test_info_says_what_was_built() -> None:
    result = run("info")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert "cuda" in result.output.lower()


def test_a_bug_has_an_exit_code_of_its_own(fake: FakeInversion, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.error = ZeroDivisionError("our own mistake")
    monkeypatch.setattr(sys, "argv", ["rconv-fast", "demo", "--out", "out/never"])
    monkeypatch.setattr(cli, "_make_folder", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 70


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


def test_demo_recovers_a_real_photo(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
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
        *map(str, options(Path(), model="grey_net:build", input_shape="1x16x16")),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out" / "inputs.safetensors")
    assert psnr(found["inputs"], sample) >= 150
    assert found["labels"].tolist() == [6]
