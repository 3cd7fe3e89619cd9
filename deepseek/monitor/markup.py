"""HTML that cannot forget to escape: ``tag("p", text, class_="note")`` escapes everything that is not
``Html``."""

from __future__ import annotations

import html
import json
from typing import Any

VOID = {"meta", "br", "hr", "img", "link"}


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """``value`` as text for HTML, in content and in quoted attributes; ``Html`` stays as it is."""
    if isinstance(value, Html):
        return value
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return Html(html.escape(text, quote=True))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """One element. Children may be text, ``Html``, ``None`` or lists of them; ``class_`` and ``aria_label``
    become ``class`` and ``aria-label``; an attribute that is ``None`` is left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Any) -> Html:
    """Children one after another, ``None`` left out, nested lists flattened."""
    if children is None:
        return Html("")
    if isinstance(children, (list, tuple)):
        return Html("".join(join(child) for child in children))
    return escape(children)


def data_block(value: Any) -> Html:
    """``value`` as a JSON data block that no text in it can end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json">{text}</script>')
