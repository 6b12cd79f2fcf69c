"""A result as one self-contained HTML page: style and pictures inside, nothing from a network, no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

from rconv_fast.report import pictures, png
from rconv_fast.report.payload import plain
from rconv_fast.report.style import STYLE

if TYPE_CHECKING:
    from rconv_fast.result import Inversion


@dataclass(frozen=True)
class Kind:
    """What a kind of page is called, what it opens with, and how its verdicts are meant.

    Attributes
    ----------
    title, lead : str
        Heading, and the sentence below it.
    verdicts : mapping of str to (str, str)
        Verdict -> its colour (a class of the style: "bad" leaks, "warn", "good") and what it means.
    """

    title: str
    lead: str
    verdicts: Mapping[str, tuple[str, str]]


KINDS = {
    "inversion": Kind(
        "Gradient inversion",
        "What the gradients that a client shared give away of its private batch.",
        {
            "exact": ("bad", "The inputs are recovered, and the equations leave no other answer, up to the noise."),
            "approximate": ("bad", "Inputs are recovered with error bars; they are not proven to be the only ones."),
            "partial": ("bad", "Some samples or values are proven; the rest is not known."),
            "features": ("warn", "No inputs, but features, labels, tokens or counts are recovered."),
            "nothing": ("good", "This method recovered nothing here. It is no proof that nothing leaks."),
        },
    ),
    "audit": Kind(
        "Audit of a model",
        "What gradients of this model would give away, judged without private data.",
        {
            "exact": ("bad", "A client's batch can be recovered exactly from its gradients."),
            "partial": ("bad", "Some values of a client's batch can be recovered exactly."),
            "features only": ("warn", "Labels and features can be recovered, inputs not by this method."),
            "none found": ("good", "No exact recovery was found. It is no proof that nothing leaks."),
            "not covered": ("warn", "This package has no exact method for a layer. That does not mean safe."),
        },
    ),
}
KINDS["check"] = replace(
    KINDS["audit"],
    title="Equations of a model",
    lead="How many equations gradients of this model hold for the input of each layer, beside its unknowns.",
)

KINDS["sweep"] = Kind("Sweep", "What came back from the gradients of many pictures, models and defences.", {})

# Keys with a place of their own, in this order; other keys follow by what they hold.
_OWN = ("schema", "verdict", "pictures", "notes", "advice", "assumptions", "settings", "environment", "sha256")
_IN_VERDICT = ("verified", "stops_at", "reason")
_LISTS = {"notes": "Notes", "advice": "What would break the recovery", "assumptions": "What was assumed"}
_PAIRS = {"settings": "Settings", "sha256": "SHA-256 of the tensors", "environment": "Versions"}


def render(kind: str, payload: Mapping[str, Any]) -> str:
    """The page of a payload.

    Parameters
    ----------
    kind : {"inversion", "audit", "check", "sweep"}
        See `KINDS`.
    payload : mapping
        Plain values. ``verdict``; ``pictures``: list of mappings with ``title``, ``uri`` (of an image) and, if wanted,
        ``caption``; ``notes``, ``advice``, ``assumptions``: lists of sentences; ``settings``, ``sha256``,
        ``environment``: names to values. Of what else it holds, numbers and texts become facts, lists of mappings
        tables, mappings tables of two columns. None and empty values are left out.

    Returns
    -------
    str
        HTML. All texts are escaped.
    """
    page, data = KINDS[kind], {key: value for key, value in plain(payload).items() if not _is_empty(value)}
    rest = {key: value for key, value in data.items() if key not in _OWN}
    facts = {key: value for key, value in rest.items() if not _is_table(value) and not isinstance(value, Mapping)}
    parts = [
        f"<h1>{escape(page.title)}</h1><p class=lead>{escape(page.lead)}</p>",
        _verdict(page, data),
        _definitions(facts),
        _pictures(data.get("pictures", [])),
        *(_section(head, _bullets(data[key])) for key, head in _LISTS.items() if key in data),
        *(_section(_words(key).capitalize(), _table(value)) for key, value in rest.items() if _is_table(value)),
        *(
            _section(_words(key).capitalize(), _definitions(value))
            for key, value in rest.items()
            if isinstance(value, Mapping)
        ),
        *(_section(head, _definitions(data[key])) for key, head in _PAIRS.items() if key in data),
    ]
    body = "\n".join(filter(None, parts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(': '.join(filter(None, (page.title, str(data.get('verdict', ''))))))}</title>"
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n"
        f"<footer>{escape(str(data.get('schema', 'rconv_fast')))}, made by rconv_fast. This page may hold "
        "personal data: it shows what the gradients gave away.</footer></main></body></html>\n"
    )


def inversion_pictures(inversion: Inversion) -> list[dict[str, str]]:
    """The samples of an `Inversion` as the ``pictures`` of its page; samples that are no images have none."""
    if inversion.inputs is None or not pictures.is_image(inversion.inputs[0]):
        return []
    determined = inversion.determined
    return [
        {
            "title": pictures.title(inversion, i),
            "uri": png.data_uri(pictures.pixels(sample, None if determined is None else determined[i])),
        }
        for i, sample in enumerate(inversion.inputs[: pictures.MAX_SAMPLES])
    ]


def _verdict(page: Kind, data: Mapping[str, Any]) -> str:
    verdict = data.get("verdict")
    if verdict is None:
        return ""
    colour, meaning = page.verdicts.get(verdict, ("warn", ""))
    proof = {True: "verified", False: "not verified"}.get(data.get("verified", ""), "")
    stop = f"It stops at <b>{escape(str(data['stops_at']))}</b>: " if "stops_at" in data else ""
    reason = escape(str(data.get("reason", "")))
    return (
        f'<div class="verdict {colour}"><strong>{escape(str(verdict))}</strong> <span>{proof}</span>'
        f"<p>{escape(meaning)}</p>{f'<p>{stop}{reason}</p>' if stop or reason else ''}</div>"
    )


def _pictures(entries: Sequence[Mapping[str, str]]) -> str:
    figures = [
        f'<figure><img src="{escape(entry["uri"])}" alt="{escape(entry["title"])}">'
        f"<figcaption>{escape(entry['title'])}"
        f"{'<br>' + escape(entry['caption']) if entry.get('caption') else ''}</figcaption></figure>"
        for entry in entries
    ]
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def _bullets(sentences: Sequence[Any]) -> str:
    return f"<ul>{''.join(f'<li>{escape(_text(s))}</li>' for s in sentences)}</ul>"


def _definitions(pairs: Mapping[str, Any]) -> str:
    rows = [
        f"<dt>{escape(_words(key))}</dt><dd>{escape(_text(value))}</dd>"
        for key, value in pairs.items()
        if key not in _IN_VERDICT and not _is_empty(value)
    ]
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns = [column for column in columns if any(not _is_empty(row.get(column)) for row in rows)]
    head = "".join(f"<th>{escape(_words(column))}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(column)) for column in columns)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    counted = isinstance(value, int | float) and not isinstance(value, bool)
    kind = ' class="number"' if counted or (isinstance(value, str) and value.isdigit()) else ""
    return f"<td{kind}>{escape(_text(value))}</td>"


def _text(value: Any) -> str:
    """A value as it is read best."""
    said: dict[type, Callable[[Any], str]] = {
        bool: lambda v: "yes" if v else "no",
        float: lambda v: f"{v:.3g}",
        list: lambda v: ", ".join(map(_text, v[:30])) + (f", ... {len(v) - 30} more" if len(v) > 30 else ""),
        dict: lambda v: "; ".join(f"{_words(k)} {_text(x)}" for k, x in v.items()),
        type(None): lambda _: "-",
    }
    return said.get(type(value), str)(value)


def _words(key: str) -> str:
    return str(key).replace("_", " ")


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | dict | str) and not value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)
