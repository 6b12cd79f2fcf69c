"""As much of JSON Schema 2020-12 as the package's schemas use; a keyword beyond that is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

ANNOTATIONS = {"$schema", "$id", "$defs", "title", "description"}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def violations(value: Any, schema: Any, root: Mapping[str, Any], place: str = "$") -> Iterator[str]:
    """Each place that breaks a rule, with the rule."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{place}: not foreseen"
        return
    for keyword, rule in schema.items():
        if keyword not in ANNOTATIONS and not _holds(keyword, rule, value, root):
            yield f"{place}: {keyword} {rule}, got {value!r:.80}"
    if isinstance(value, dict):
        named = schema.get("properties", {})
        for name, entry in value.items():
            yield from violations(
                entry, named.get(name, schema.get("additionalProperties", True)), root, f"{place}.{name}"
            )
    if isinstance(value, list):
        for i, entry in enumerate(value):
            yield from violations(entry, schema.get("items", True), root, f"{place}[{i}]")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _holds(keyword: str, rule: Any, value: Any, root: Mapping[str, Any]) -> bool:
    match keyword:
        case "properties" | "additionalProperties" | "items":
            return True  # their own places
        case "type":
            return any(_is(value, name) for name in ([rule] if isinstance(rule, str) else rule))
        case "const":
            return bool(value == rule)
        case "enum":
            return value in rule
        case "required":
            return not isinstance(value, dict) or set(rule) <= set(value)
        case "minItems":
            return not isinstance(value, list) or len(value) >= rule
        case "minimum":
            return not _is(value, "number") or value >= rule
        case "maximum":
            return not _is(value, "number") or value <= rule
        case "pattern":
            return not isinstance(value, str) or re.search(rule, value) is not None
        case "anyOf":
            return any(not list(violations(value, one, root)) for one in rule)
        case "$ref":
            return not list(violations(value, root["$defs"][rule.removeprefix("#/$defs/")], root))
        case _:
            raise NotImplementedError(keyword)
