"""``rconv-fast check``, ``audit`` and ``sweep``: reports and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from command_line import Page, Run, error_line
from json_schema import violations
from rconv_fast.cli import photos
from rconv_fast.report.payload import schema_of
from rconv_fast.sweep import read_rows


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
