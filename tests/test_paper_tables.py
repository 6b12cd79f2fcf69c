"""The script of the paper's tables: every attack gets the same picture, and what did not come back says why."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
paper, publish = importlib.import_module("paper_tables"), importlib.import_module("publish")


def test_every_figure_of_the_paper_has_its_lines() -> None:
    found = paper.lines(1.0)
    pairs = {(line.network, line.attack) for line in found}
    assert {("lenet_o", "ours"), ("lenet", "DLG"), ("cnn6_o", "ours"), ("cnn6", "R-GAP")} <= pairs
    assert {line.data for line in found} == set(paper.FIGURES)
    assert {line.activation for line in found if line.attack == "DLG"} == {"sigmoid", "relu"}


@pytest.mark.parametrize(("activation", "recovered"), [("leaky_relu", True), ("relu", False)])
def test_a_line_is_measured_and_becomes_a_row(activation: str, recovered: bool, tmp_path: Path) -> None:
    (line,) = [a for a in paper.lines(1.0) if (a.attack, a.activation) == ("R-GAP", activation)]
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcome = paper.attacked(line, 60.0, picture)
    made = paper.result(line.name, line.attack, [picture], [outcome])
    row = publish.tables([made]).splitlines()[2]
    if recovered:
        assert made["psnr"]["mean"] > 150
        assert f"| {made['psnr']['mean'] + 48.13:.1f} |" in row  # the paper's peak is 255
    else:
        assert outcome.picture is None
        assert "ReLU is not invertible" in row
    paper.save_grid(tmp_path / "grid.png", [picture], {"R-GAP": [outcome]})
    assert (tmp_path / "grid.png").stat().st_size > 1000
