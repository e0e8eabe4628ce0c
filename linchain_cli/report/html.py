"""HTML that is escaped unless it was built here: the only way to get markup into a page is `tag`."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from linchain_cli.report.figures import Picture
from linchain_cli.report.style import STYLE, TABLES

# Nothing may be fetched and no script may run, whatever text got into the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_VOID = ("img", "br", "meta")


class Markup(str):
    """Text that is HTML already."""


def escaped(content: Any) -> Markup:
    """Anything as HTML: markup as it is, sequences joined, every other value as escaped text."""
    if isinstance(content, Markup):
        return content
    if isinstance(content, (list, tuple)):
        return Markup("".join(escaped(part) for part in content))
    return Markup(html.escape("" if content is None else str(content)).translate(_VISIBLE))


# Characters that HTML forbids or that change the reading direction of what follows, shown by their code.
_HIDDEN = [
    *range(0x00, 0x09),
    0x0B,
    0x0C,
    *range(0x0E, 0x20),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
_VISIBLE = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _HIDDEN} | {
    code: "\ufffd" for code in range(0xD800, 0xE000)
}


def tag(name: str, /, *content: Any, **attributes: Any) -> Markup:
    """`<name attributes>content</name>`. `class_` and the like lose their underscore, other ones become
    hyphens.

    Attributes that are None or False are left out, True stands alone.
    """
    text = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        text += f" {key}" if value is True else f' {key}="{escaped(value)}"'
    if name in _VOID:
        return Markup(f"<{name}{text}>")
    return Markup(f"<{name}{text}>{escaped(content)}</{name}>")


def figure(drawn: Picture | None) -> Markup:
    """A figure with its caption and its text alternative; nothing of None."""
    if drawn is None:
        return Markup("")
    source = "data:image/svg+xml;base64," + base64.b64encode(drawn.svg).decode()
    return tag("figure", tag("img", src=source, alt=drawn.alt), tag("figcaption", drawn.caption))


def table(rows: Sequence[Mapping[str, Any]], caption: str) -> Markup:
    """A table with a header row; on a narrow screen every line becomes a block with the headers in it.

    `rows` all have the same keys, which are the headers; the first column names its line.
    """
    if not rows:
        return Markup("")
    heads = list(rows[0])
    head = tag("tr", [tag("th", name, scope="col", role="columnheader") for name in heads], role="row")
    body = []
    for row in rows:
        first, *others = heads
        cells = [tag("th", row[first], scope="row", role="rowheader")]
        # An empty cell would leave its header alone in a narrow block.
        cells += [
            tag(
                "td",
                row[name],
                data_label=name,
                role="cell",
                class_="empty" if row[name] in ("", None) else None,
            )
            for name in others
        ]
        body.append(tag("tr", cells, role="row"))
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", head, role="rowgroup"),
        tag("tbody", body, role="rowgroup"),
        role="table",
        class_=next(name for name, most, _ in TABLES if len(heads) <= most),
    )


def facts(pairs: Iterable[tuple[str, Any]]) -> Markup:
    """Names with their values, those without one left out."""
    shown = [
        tag("div", tag("dt", name), tag("dd", value))
        for name, value in pairs
        if value not in (None, "", [], {})
    ]
    return tag("dl", shown) if shown else Markup("")


def section(title: str, *content: Any) -> Markup:
    """A titled part of the page; nothing if it is empty."""
    inner = escaped(content)
    return tag("section", tag("h2", title), inner) if inner else Markup("")


# By which a page is known for one, near its beginning.
GENERATOR = tag("meta", name="generator", content="linchain report")


def page(title: str, *content: Any) -> str:
    """The whole document: one file that needs no other."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        GENERATOR,
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    body = tag("body", tag("main", tag("h1", title), content))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"
