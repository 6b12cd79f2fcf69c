"""What is public is what the reference pages name; it changes on purpose only.

`tests/public_api.txt` lists it with signatures. After a change that is meant::

    python tests/test_public_api.py
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

import rconv_fast

HERE = Path(__file__)
LISTING = HERE.with_name("public_api.txt")
REFERENCE = sorted((HERE.parents[1] / "docs" / "reference").glob("*.md"))
REGENERATE = f"if that is meant, run: python {HERE.parent.name}/{HERE.name}"


def named_by_the_reference() -> dict[str, list[str]]:
    """Module to names, from the pages' directives."""
    found: dict[str, list[str]] = {}
    for page in REFERENCE:
        module = ""
        for kind, name in re.findall(r"^\.\. (currentmodule|auto\w+):: (\S+)$", page.read_text(), re.MULTILINE):
            if kind == "currentmodule":
                module = name
            elif kind != "automodule":
                found.setdefault(module, []).append(name)
    return {module: sorted(found[module]) for module in sorted(found)}


PUBLIC = named_by_the_reference()


class Bare(str):
    """Text that shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def lines_of(name: str, thing: Any) -> Iterator[str]:
    """A function's signature; of a class also its fields, methods and properties."""
    if not inspect.isclass(thing):
        yield f"{name}{signature_of(thing)}"
        return
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    yield f"class {name}({bases})"
    fields = fields_of(thing)
    yield from (f"    {field}: {text}" for field, text in fields.items())
    for member, value in sorted(vars(thing).items()):
        constructor = member == "__init__" and not fields and inspect.isfunction(value)
        if member in fields or (member.startswith("_") and not constructor):
            continue
        if isinstance(value, property | cached_property):
            yield f"    {member}: property"
        elif callable(function := getattr(value, "__func__", value)):
            yield f"    {member}{signature_of(function)}"


def fields_of(thing: type) -> dict[str, str]:
    """Type and default of the fields of a dataclass, a named tuple or a typed dictionary; empty for other classes."""
    if dataclasses.is_dataclass(thing):
        return {field.name: f"{field.type}{default_of(field)}" for field in dataclasses.fields(thing)}
    if hasattr(thing, "_fields") or hasattr(thing, "__total__"):
        return {name: getattr(kind, "__forward_arg__", str(kind)) for name, kind in thing.__annotations__.items()}
    return {}


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return " = ..."
    return "" if field.default is dataclasses.MISSING else f" = {bare_default(field.default)!r}"


def bare_default(default: Any) -> Any:
    """A default; dots for a function, whose text is an address."""
    return Bare("...") if inspect.isroutine(default) else default


def signature_of(thing: Any) -> str:
    """As it is written."""
    signature = inspect.signature(thing)
    parameters = [
        p.replace(default=bare_default(p.default), annotation=bare(p.annotation)) for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=bare(signature.return_annotation)))


def bare(annotation: Any) -> Any:
    return Bare(annotation) if isinstance(annotation, str) else annotation


def section(module: str) -> str:
    """The listing of one module; MissingDependencyError where an extra is not installed."""
    found = importlib.import_module(module)
    return "\n".join(line for name in PUBLIC[module] for line in lines_of(name, getattr(found, name)))


def committed() -> dict[str, str]:
    parts = re.split(r"^# (\S+)\n", LISTING.read_text(), flags=re.MULTILINE)
    return {module: text.strip("\n") for module, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_everything_at_the_top_is_in_the_reference() -> None:
    named = {name for names in PUBLIC.values() for name in names}
    assert set(PUBLIC["rconv_fast"]) <= set(rconv_fast.__all__) <= named


def test_the_listing_has_the_modules_of_the_reference() -> None:
    assert list(committed()) == list(PUBLIC), REGENERATE


@pytest.mark.filterwarnings("default")  # frameworks warn while they are imported
@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_and_signatures_are_the_listed_ones(module: str) -> None:
    try:
        now = section(module)
    except rconv_fast.errors.MissingDependencyError as error:
        pytest.skip(str(error))
    assert now == committed().get(module), f"the public API has changed; {REGENERATE}"


def main() -> None:
    """Write the listing; what needs an extra that is not installed stays as it was."""
    before = committed() if LISTING.exists() else {}
    out = []
    for module in PUBLIC:
        try:
            text = section(module)
        except rconv_fast.errors.MissingDependencyError as error:
            print(f"left as it was: {module} ({error})", file=sys.stderr)
            text = before.get(module, "")
        out.append(f"# {module}\n{text}\n")
    LISTING.write_text("\n".join(out))


if __name__ == "__main__":
    main()
