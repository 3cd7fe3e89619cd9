"""How models write calls of functions in an answer that nothing forces, as one table (``FORMATS``).

    <tool_call>{"name": …, "arguments": {…}}</tool_call>      Hermes 2 Pro, Qwen 2.5 and 3, SmolLM2
    <tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>      Qwen3-Coder
    <function=NAME>…</function>                               the same without its frame; Llama 3.1, with JSON inside
    [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]           Mistral, up to 2409
    [TOOL_CALLS]NAME[ARGS]{…}[TOOL_CALLS]…                    Mistral, from 2503 on
    <|python_tag|>{"name": …, "parameters": {…}}; …           Llama 3.1 and later
    {"name": …, "parameters": {…}}                            the same as the whole answer

Sources: the chat templates of these models. A call is one only if its name is that of a function that was offered.
Some marks are special tokens, which stand for no text otherwise (``MARKS``, ``SamplingConfig.shown_ids``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Schemas = Mapping[str, Mapping[str, Any]]  #: parameters of each function, as a JSON schema

ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"
FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END = "<function=", "</function>", "<parameter=", "</parameter>"


class Call(NamedTuple):
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Format:
    """Calls stand between ``open`` and ``close``; without a ``close``, up to the next ``open`` or the end.

    Attributes:
        read: the calls of what stands there, and the text that follows them. Raises ``ValueError``: it is no call.
    """

    open: str
    close: str
    read: Callable[[str, Schemas], tuple[list[Call], str]]

    def calls(self, inner: str, schemas: Schemas, closed: bool) -> tuple[list[Call], str]:
        """The calls, and what is text after all: all of it where there is no call, but no mark that is no text."""
        try:
            return self.read(inner, schemas)
        except (ValueError, RecursionError):
            return [], f"{self.open}{inner}{self.close if closed else ''}" if self.close else inner


def json_call(text: str, schemas: Schemas | None = None) -> Call | None:
    """The call that a JSON object is, or ``None``. Without ``schemas`` every name will do."""
    try:
        return _call(_DECODER.decode(text), schemas)
    except (ValueError, RecursionError):
        return None


def bare_calls(text: str, schemas: Schemas) -> list[Call]:
    """An answer that is calls and nothing else: objects, or a list of them, with ``;`` between. Else no calls."""
    try:
        calls, rest = _leading_calls(text, schemas)
    except (ValueError, RecursionError):
        return []
    return [] if rest.strip() else calls


def may_be_bare(start: str) -> bool | None:
    """Whether an answer that begins with ``start`` may be calls and nothing else; ``None``: that is still open."""
    if any(len(start) < len(f.open) and f.open.startswith(start) for f in FORMATS):
        return None
    if start.startswith("[") and (start := start[1:].lstrip()) == "":
        return None
    if not start.startswith("{"):
        return False
    first = start[1:].lstrip()
    return first[0] == '"' if first else None


def first_format(text: str) -> tuple[int, Format] | None:
    """The first beginning of calls in ``text``: where, and of which form."""
    found = [(at, i) for i, f in enumerate(FORMATS) if (at := text.find(f.open)) >= 0]
    if not found:
        return None
    at, number = min(found)
    return at, FORMATS[number]


def beginning_of_any(text: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of a mark."""
    return max(_beginning_of(f.open, text) for f in FORMATS)


def _beginning_of(mark: str, text: str) -> int:
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _tagged(text: str, schemas: Schemas) -> tuple[list[Call], str]:
    if text.lstrip().startswith(FUNCTION):
        return [_function(part, schemas) for part in text.split(FUNCTION)[1:]], ""
    return [_call(_DECODER.decode(text), schemas)], ""


def _framed(text: str, schemas: Schemas) -> tuple[list[Call], str]:
    return [_function(text, schemas)], ""


def _marked(text: str, schemas: Schemas) -> tuple[list[Call], str]:
    """Mistral's and Llama's, whose mark is a token of its own and has no end."""
    start = text.lstrip()
    if start[:1] in ("{", "["):
        return _leading_calls(start, schemas)
    head = start.partition("{")[0]
    name = head.partition(CALL_ID)[0].partition(ARGUMENTS)[0]
    value, end = _DECODER.raw_decode(start, len(head))
    return [_call({"name": name.strip(), "arguments": value}, schemas)], start[end:]


def _function(text: str, schemas: Schemas) -> Call:
    """``NAME>…``: what follows ``<function=``; parameters by name, or one JSON object."""
    name, closed, body = text.partition(">")
    first, *parts = body.partition(FUNCTION_END)[0].split(PARAMETER)
    if not closed or (parts and first.strip()):
        raise ValueError("no parameters")
    if first.strip():
        if not isinstance(found := _DECODER.decode(first), dict):
            raise ValueError("no arguments")
        return _call({"name": name.strip(), "arguments": found}, schemas)
    known = schemas.get(name.strip(), {}).get("properties")
    arguments: dict[str, Any] = {}
    for part in parts:
        key, closed, value = part.partition(">")
        if not closed:
            raise ValueError("a parameter without a value")
        value = value.partition(PARAMETER_END)[0].removeprefix("\n").removesuffix("\n")
        schema = known.get(key.strip()) if isinstance(known, dict) else None
        arguments[key.strip()] = _typed(value, _kinds(schema))
    return _call({"name": name.strip(), "arguments": arguments}, schemas)


def _typed(text: str, kinds: set[str]) -> Any:
    """A parameter's text as the value that its schema wants; as it is written, where a string may stand."""
    word = text.strip().lower()
    if "null" in kinds and word in ("null", "none"):
        return None
    if not kinds or "string" in kinds:
        return text
    if "boolean" in kinds and word in ("true", "false"):
        return word == "true"
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def _kinds(schema: Any) -> set[str]:
    """The JSON types that a schema allows; empty: it does not say."""
    if not isinstance(schema, dict):
        return set()
    kind = schema.get("type")
    found = {k for k in (kind if isinstance(kind, list) else [kind]) if isinstance(k, str)}
    for several in (schema.get("anyOf"), schema.get("oneOf")):
        for option in several if isinstance(several, list) else []:
            found |= _kinds(option)
    return found


def _leading_calls(text: str, schemas: Schemas) -> tuple[list[Call], str]:
    """The calls that ``text`` begins with, and what follows them."""
    calls, at = list[Call](), 0
    while True:
        begin = len(text) - len(text[at:].lstrip(" \t\r\n;"))
        if text[begin : begin + 1] not in ("{", "["):
            if not calls:
                raise ValueError("no call")
            return calls, text[at:]
        value, at = _DECODER.raw_decode(text, begin)
        calls += [_call(item, schemas) for item in (value if isinstance(value, list) else [value])]


def _call(value: Any, schemas: Schemas | None) -> Call:
    """Raises ``ValueError`` unless ``value`` is a call of a function that is known."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")
    if schemas is not None and value["name"] not in schemas:
        raise ValueError("no function of that name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    text = json.dumps(arguments, ensure_ascii=False)
    if any("\ud800" <= c <= "\udfff" for c in text):  # half a character, which only an escape can tell of
        text = json.dumps(arguments)
    return Call(value["name"], text)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)

FORMATS = (
    Format("<tool_call>", "</tool_call>", _tagged),
    Format(FUNCTION, FUNCTION_END, _framed),
    Format("[TOOL_CALLS]", "", _marked),
    Format("<|python_tag|>", "", _marked),
)
#: Texts of special tokens that have to be seen for this.
MARKS = (*(text for f in FORMATS for text in (f.open, f.close) if text), ARGUMENTS, CALL_ID)
