"""``rconv-fast invert``: files of every kind, and one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from command_line import FakeInversion, Run, error_line, report_of
from rconv_fast import models
from rconv_fast.metrics import psnr
from results import exact


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
