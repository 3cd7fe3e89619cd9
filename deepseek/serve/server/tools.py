"""Function calls: what the model is told of the tools, what its answer must match, and how calls are read out of it.

Three ways, by ``tool_choice``:

- *named*: a grammar makes the whole answer the arguments of that function;
- *required*: a grammar makes it a JSON list of ``{"name", "arguments"}``;
- *auto*: the model writes what it likes, and calls are found in the forms of ``server.call_formats``.

What is not a call after all is given back as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from deepseek.serve.sampler import Grammar
from deepseek.serve.server.call_formats import (
    Call,
    Format,
    bare_calls,
    beginning_of_any,
    first_format,
    json_call,
    may_be_bare,
)
from deepseek.serve.server.errors import ApiError

TOLD = (
    "You may call functions to answer. They are, as JSON schemas:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write a JSON object with its name and its arguments between tags, and nothing else:\n"
    '<tool_call>\n{{"name": "…", "arguments": {{…}}}}\n</tool_call>'
)


@dataclass(frozen=True)
class Event:
    """A piece of an answer: ``text`` of it; a ``call`` that begins; ``arguments`` of the call that began last."""

    kind: Literal["text", "call", "arguments"]
    text: str


@dataclass(frozen=True)
class ToolPlan:
    """What ``tools`` and ``tool_choice`` of a chat come to. ``name``: the function that must be called."""

    mode: Literal["none", "auto", "required", "named"] = "none"
    tools: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    parallel: bool = True

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> ToolPlan:
        """Raises ``ApiError`` where they contradict each other."""
        tools, choice = body["tools"] or [], body["tool_choice"]
        names = [tool["function"]["name"] for tool in tools]
        if len(set(names)) < len(names):
            raise ApiError("two tools have the same name", param="tools")
        if isinstance(choice, dict):
            name = choice["function"]["name"]
            if name not in names:
                raise ApiError(
                    f"tool_choice names {name!r}; tools are: {', '.join(names) or 'none'}",
                    param="tool_choice",
                )
            return cls("named", _told(tools), name)
        if choice in ("auto", "required") and not tools:
            raise ApiError(f"tool_choice={choice!r} needs tools", param="tool_choice")
        mode: Any = choice or ("auto" if tools else "none")
        return cls(mode, _told(tools) if mode != "none" else (), parallel=body["parallel_tool_calls"])

    def grammar(self) -> Grammar | None:
        """What the answer must match, if the choice forces a call."""
        if self.mode == "named":
            schema = next(_parameters(t) for t in self.tools if t["function"]["name"] == self.name)
            return Grammar(kind="json_schema", text=orjson.dumps(schema).decode())
        if self.mode != "required":
            return None
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": _lifted(_parameters(tool), i),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for i, tool in enumerate(self.tools)
        ]
        found: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        found |= {} if self.parallel else {"maxItems": 1}
        return Grammar(kind="json_schema", text=orjson.dumps(_with_definitions(found, self.tools)).decode())

    def message(self) -> dict[str, Any]:
        """A system message that tells the model of its tools, where its template does not."""
        listed = "\n".join(orjson.dumps(tool).decode() for tool in self.tools)
        return {"role": "system", "content": TOLD.format(tools=listed)}

    def parser(self) -> Parser:
        if self.mode == "named":
            return NamedCall(self.name)
        if self.mode == "required":
            return ListedCalls()
        return WrittenCalls(self.schemas) if self.mode == "auto" else Parser()

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """The parameters' JSON schema of each function."""
        return {tool["function"]["name"]: _parameters(tool) for tool in self.tools}


def _told(tools: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """As templates want them: without members that were left out."""
    return tuple(
        {"type": "function", "function": {k: v for k, v in tool["function"].items() if v is not None}}
        for tool in tools
    )


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object", "properties": {}}


DEFINITIONS = ("$defs", "definitions")


def _lifted(schema: dict[str, Any], number: int) -> dict[str, Any]:
    """A tool's schema inside a larger one: its ``$ref`` point to its own definitions, which move to the top."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                k: (_moved_reference(v, number) if k == "$ref" and isinstance(v, str) else moved(v))
                for k, v in value.items()
            }
        return [moved(v) for v in value] if isinstance(value, list) else value

    return {k: moved(v) for k, v in schema.items() if k not in DEFINITIONS}


def _moved_reference(reference: str, number: int) -> str:
    for place in DEFINITIONS:
        if reference.startswith(f"#/{place}/"):
            return f"#/$defs/{number}.{reference.removeprefix(f'#/{place}/')}"
    return reference


def _with_definitions(schema: dict[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        for place in DEFINITIONS:
            given = _parameters(tool).get(place)
            if isinstance(given, dict):
                found |= {f"{i}.{k}": _lifted(v, i) if isinstance(v, dict) else v for k, v in given.items()}
    return {**schema, "$defs": found} if found else schema


class Parser:
    """Reads an answer as it grows; this one finds text only."""

    def push(self, text: str) -> list[Event]:
        """What ``text``, the next piece of the answer, makes certain."""
        return [Event("text", text)] if text else []

    def finish(self) -> list[Event]:
        """What is left at the end of the answer."""
        return []


class NamedCall(Parser):
    """The whole answer is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self.name, self._begun = name, False

    def push(self, text: str) -> list[Event]:
        if not text:
            return []
        begun, self._begun = self._begun, True
        return [Event("arguments", text)] if begun else [Event("call", self.name), Event("arguments", text)]


class ListedCalls(Parser):
    """The answer is a JSON list of calls; each is told when it is complete."""

    def __init__(self) -> None:
        self._held, self._depth, self._quoted, self._escaped = "", 0, False, False

    def push(self, text: str) -> list[Event]:
        found: list[Event] = []
        for character in text:
            if self._depth:
                self._held += character
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = self._depth > 0
            elif character == "{":
                self._held = self._held if self._depth else "{"
                self._depth += 1
            elif character == "}" and self._depth:
                self._depth -= 1
                if not self._depth:
                    call = json_call(self._held)
                    found += _events([call]) if call else [Event("text", self._held)]
                    self._held = ""
        return found

    def finish(self) -> list[Event]:
        """An answer cut off in a call: what there is of it is no call."""
        held, self._held = self._held, ""
        return [Event("text", held)] if held else []


class WrittenCalls(Parser):
    """Text, and calls in one of the forms that models write.

    What may become a mark of a call is held back, and so are blanks that may precede a call.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._held = ""
        self._format: Format | None = None
        self._called, self._open, self._searched = False, False, 0
        self._bare: bool | None = None  # the answer may be JSON and nothing else; not known at first

    def push(self, text: str) -> list[Event]:
        self._held += text
        if self._bare is None and (start := self._held.lstrip()):
            self._bare = may_be_bare(start)
        if self._bare or self._bare is None:
            return []
        found: list[Event] = []
        while (cut := self._cut()) is not None:
            before, self._held, self._format, was = *cut, self._format
            self._searched = 0
            found += self._text(before) if was is None else self._read(was, before, closed=True)
        if self._format is None:
            keep = len(self._held) - beginning_of_any(self._held)
            shown = self._text(self._held[:keep])
            self._held = self._held[keep:] if shown or not self._held[:keep] else self._held
            found += shown
        return found

    def finish(self) -> list[Event]:
        held, self._held = self._held, ""
        if self._format is not None:  # the end mark may be the model's end token, which is no text
            return self._read(self._format, held, closed=False)
        if self._bare is not False and held.strip():
            calls = bare_calls(held, self._schemas)
            return _events(calls) if calls else [Event("text", held)]
        return [Event("text", held)] if held.strip() or (held and not self._called) else []

    def _cut(self) -> tuple[str, str, Format | None] | None:
        """What comes before the next mark, what comes after it, and the form that it begins; ``None``: no mark yet."""
        if self._format is None:
            if (found := first_format(self._held)) is None:
                return None
            at, begun = found
            return self._held[:at], self._held[at + len(begun.open) :], begun
        mark = self._format.close or self._format.open  # without an end, the next one's beginning is the end
        at = self._held.find(mark, self._searched)
        if at < 0:
            self._searched = max(0, len(self._held) - len(mark) + 1)
            return None
        return self._held[:at], self._held[at + len(mark) :], None if self._format.close else self._format

    def _text(self, text: str) -> list[Event]:
        if not text or not (self._open or text.strip()):
            return []
        self._open = True
        return [Event("text", text)]

    def _read(self, form: Format, inner: str, *, closed: bool) -> list[Event]:
        calls, text = form.calls(inner, self._schemas, closed)
        self._called, self._open = self._called or bool(calls), not calls
        return _events(calls) + self._text(text)


def _events(calls: Sequence[Call]) -> list[Event]:
    return [e for call in calls for e in (Event("call", call.name), Event("arguments", call.arguments))]
