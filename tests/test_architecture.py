"""The map in CONTRIBUTING is the house: every room is on it, and imports go down it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "rconv_fast"


def rooms_of(text: str) -> list[str]:
    return re.findall(r"`([\w.]+?)(?:/|\.py)`", text)


def read_map() -> tuple[dict[str, int], set[str]]:
    """The line of each room in the table (0 is the top), and what stands beside."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Where things are") : text.index("## What to run")]
    lines = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    levels = {room: level for level, line in enumerate(lines) for room in rooms_of(line)}
    return levels, set(rooms_of(section[section.index("Beside that") :]))


def imports() -> Iterator[tuple[Path, str, str]]:
    """Every import of the package when a module is loaded: the file, its room, the room it imports."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rconv_fast":
                deeper = (node.module or "").split(".")[1:]
                for other in deeper[:1] or [alias.name for alias in node.names]:
                    yield path, room, other


LEVELS, BESIDE = read_map()
IMPORTS = list(imports())


def test_every_room_is_on_the_map_once() -> None:
    rooms = {path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir() if is_room(path)}
    assert rooms == (set(LEVELS) | BESIDE) - {"csrc"}
    assert not set(LEVELS) & BESIDE


def is_room(path: Path) -> bool:
    return path.suffix == ".py" or (path / "__init__.py").exists()


@pytest.mark.parametrize("room", sorted(set(LEVELS) - {"csrc"} | BESIDE))
def test_imports_go_down(room: str) -> None:
    for path, importing, imported in IMPORTS:
        if importing != room or imported in (room, "__version__"):
            continue
        where = f"{path.relative_to(ROOT)} imports {imported}"
        if room in BESIDE:
            assert imported in BESIDE, where
        else:
            assert imported in BESIDE or LEVELS[imported] >= LEVELS[room], where
