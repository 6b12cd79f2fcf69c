"""Everything that the documentation shows runs, and everything that it points to exists."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rconv_fast

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MODULES = [m.name for m in pkgutil.walk_packages(rconv_fast.__path__, "rconv_fast.") if "_core" not in m.name]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Code blocks of a page, with the line each begins at."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, m.start()) + 2, m.group(1)) for m in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_snippets_of_a_page_run_in_order(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for line, code in blocks(page, "python"):
        # Blank lines in front, so that a traceback has the page's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    capsys.readouterr()


def test_readme_has_a_snippet() -> None:
    assert blocks(ROOT / "README.md", "python")


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    # One thread: on a busy machine two OpenMP threads spin against each other for minutes.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(example)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("SKIPPED"):  # an extra that is not installed
        pytest.skip(done.stdout.strip())
    assert "PSNR" in done.stdout
    decibels = [int(number) for number in re.findall(r"PSNR (-?\d+) dB", done.stdout)]
    assert decibels
    assert min(decibels) >= 60, done.stdout


def test_every_example_is_in_the_gallery_with_its_output() -> None:
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f"../examples/{example.name}\n" in gallery
        assert f"gallery/{example.stem}.txt\n" in gallery
        assert (ROOT / "docs" / "gallery" / f"{example.stem}.txt").stat().st_size


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_are_true(name: str) -> None:
    if name.endswith("__main__"):
        pytest.skip("running it is its only content")
    try:
        module = importlib.import_module(name)
    except rconv_fast.errors.MissingDependencyError as error:
        pytest.skip(str(error))
    namespace = {"torch": torch, "rconv_fast": rconv_fast, **vars(module)}
    result = doctest.testmod(module, extraglobs=namespace, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (page.parent / path if path else page).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [
        c for _, block in blocks(page, "") for c in re.findall(r"^make ([a-z -]+?)(?:\s+#.*)?$", block, re.MULTILINE)
    ]
    commands += re.findall(r"`make ([a-z-]+)", page.read_text())
    mentioned = {word for command in commands for word in command.split()}
    assert mentioned <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_of_the_command_line_exist(page: Path) -> None:
    from typer.main import get_command

    from rconv_fast.cli.app import app

    command = get_command(app)
    known = {"": set(command.params[0].opts)} | {
        name: {option for parameter in each.params for option in parameter.opts}
        for name, each in command.commands.items()
    }
    for _, block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("rconv-fast "):
                name = line.split()[1].lstrip("-") if line.split()[1] in known else ""
                options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line))
                assert options <= known[name], line


def test_every_command_is_explained() -> None:
    from typer.main import get_command

    from rconv_fast.cli.app import app

    text = (ROOT / "docs" / "command-line.md").read_text()
    for name, command in get_command(app).commands.items():
        assert f"## {name}" in text
        for parameter in command.params:
            assert f"`{parameter.opts[0]}`" in text, f"{name} {parameter.opts[0]}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_picture_is_there_and_small() -> None:
    picture = ROOT / "docs" / "demo.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size < 200_000
