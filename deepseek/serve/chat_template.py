"""A conversation as token ids, through the model's own chat template (Jinja) or ours.

Ids are those of ``transformers``' ``apply_chat_template``, with one difference: a template's text may hold control
tokens, a message may not. ``<|im_end|>`` in what a user wrote stays text; otherwise anybody could end their turn and
speak as the system.

So, before rendering, what could become a control token in a message is masked: the token written out, and a beginning
or end of one at the message's border, become a mark of private characters and random digits. The rest of the message
stays as it is, so that templates that trim it, split it or look into it do as always. Afterwards only what stands
between marks is read for control tokens, and marks are replaced by what they stand for.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from deepseek.data import Tokenizer
from deepseek.errors import RequestError, WeightsError
from deepseek.serve.chat_sandbox import Program, failures
from deepseek.weights.hf_tokenizer import CHAT_TEMPLATE, ROLES

#: Templates write a role as it is, so it must be none of a client's making.
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
MOST_MESSAGES = 10_000
MOST_CHARACTERS = 16 << 20  #: of a rendered conversation
MOST_DEPTH = 64
RESERVED = (
    "self",
    "messages",
    "tools",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
)
#: Written by models, and split at by templates; they control nothing.
THOUGHTS = ("<think>", "</think>")
FIRST, LAST = "\ue000", "\ue001"  # the private characters around a mark


class ChatTemplate:
    """The chat template of one model. Its methods may be called by several threads.

    Args:
        tokenizer: of the model; also brings the templates.
        templates: Jinja text by name instead; ``default``, and ``tool_use`` where tools are given.

    Raises:
        WeightsError: a template is not Jinja. MissingExtraError: Jinja is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, templates: Mapping[str, str] | None = None) -> None:
        self.tokenizer = tokenizer
        texts = dict(templates if templates is not None else tokenizer.chat_templates)
        self.ours = not texts
        if self.ours:
            texts = {"default": CHAT_TEMPLATE}
        if "default" not in texts and len(texts) == 1:
            texts = {"default": next(iter(texts.values()))}
        if "default" not in texts:
            raise WeightsError(
                f"the model has chat templates {', '.join(sorted(texts))}, but none is 'default'"
            )
        self._texts = texts
        self._programs = {name: Program(text, f"chat template {name!r}") for name, text in texts.items()}
        tokenizer.encode("", special=True)  # builds what that needs, so that no request waits for it

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> ChatTemplate | None:
        """``None`` for a model that has no template, and whose tokenizer has not our chat tokens."""
        if tokenizer is None or not (tokenizer.chat_templates or speaks(tokenizer)):
            return None
        return cls(tokenizer)

    @property
    def takes_tools(self) -> bool:
        """Whether the template itself tells the model of tools."""
        return "tool_use" in self._texts or "tools" in self._texts["default"]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """The ids of a conversation.

        Args:
            messages: OpenAI's: ``role``, ``content`` (text, or a list of parts of type 'text'), ``tool_calls``, ….
            tools: OpenAI's, where the template takes them.
            add_generation_prompt: end with the beginning of the assistant's answer.
            continue_final_message: end within the last message, for the model to go on.
            variables: more for the template, e.g. ``enable_thinking``.

        Raises:
            RequestError: the messages are malformed, or the template refuses them, or needs too much for them.
        """
        return self._ids(messages, tools, add_generation_prompt, continue_final_message, variables)

    def _ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> list[int]:
        masks = _Masks(self._controls)
        text = self._text(masks, messages, tools, add_generation_prompt, continue_final_message, variables)
        if not masks.masked:
            return self.tokenizer.encode(text, special=True)
        ids: list[int] = []
        for piece, control in masks.pieces(text):
            ids += [self.tokenizer.token_id(piece)] if control else self.tokenizer.encode(piece)
        return ids

    def ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """``render`` as the HTTP server calls it; ``tokenizer`` is the template's own."""
        return self._ids(messages, tools, add_generation_prompt, continue_final_message, variables or {})

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """What ``render`` makes ids of, to look at."""
        masks = _Masks(self._controls)
        return masks.restored(self._text(masks, messages, tools, add_generation_prompt, False, variables))

    @cached_property
    def _controls(self) -> tuple[str, ...]:
        names = (self.tokenizer.text_of(i) for i in self.tokenizer.special_ids)
        return tuple(sorted((n for n in names if n and n not in THOUGHTS), key=len, reverse=True))

    def _text(
        self,
        masks: _Masks,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any],
    ) -> str:
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        plain = self._messages(messages)
        told = [masks.inside(_checked_depth(tool, "tools")) for tool in tools] if tools else None
        masked = [masks.message(message) for message in plain]
        if bad := [k for k in variables if k in RESERVED or not k.isidentifier()]:
            raise RequestError(f"{bad[0]!r} is no variable that can be given to a chat template", bad[0])
        given = {k: masks.inside(_checked_depth(v, k)) for k, v in variables.items()}
        name = "tool_use" if told and "tool_use" in self._programs else "default"
        text = self._run(name, masked, told, add_generation_prompt, given)
        return _cut_after(text, masked[-1]["content"]) if continue_final_message else text

    def _run(
        self,
        name: str,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
    ) -> str:
        tokenizer = self.tokenizer
        special = {
            "bos_token": tokenizer.text_of(tokenizer.bos_id), "eos_token": tokenizer.text_of(tokenizer.eos_id),
            "pad_token": tokenizer.text_of(tokenizer.pad_id),
        }  # fmt: skip
        try:
            return self._programs[name].render(
                {
                    "documents": None,
                    **variables,
                    **{key: text for key, text in special.items() if text},
                    "messages": messages,
                    "tools": tools,
                    "add_generation_prompt": add_generation_prompt,
                },
                MOST_CHARACTERS,
            )
        except failures() as error:
            why = " ".join((str(error) or type(error).__name__).split())[:300]
            why = re.sub(f"{FIRST}\\d+{LAST}", "…", why)
            raise RequestError(
                f"the model's chat template refuses this conversation: {why}", "messages"
            ) from None

    def _messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if not messages or len(messages) > MOST_MESSAGES:
            raise RequestError(
                f"a conversation has 1 to {MOST_MESSAGES} messages, not {len(messages)}", "messages"
            )
        return [self._message(m, f"messages[{i}]") for i, m in enumerate(messages)]

    def _message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} is {type(message).__name__}, not an object", where)
        roles = ROLES if self.ours else KNOWN_ROLES
        role = message.get("role")
        if role not in roles:
            raise RequestError(
                f"{where}.role is {role!r}; this model knows {', '.join(roles)}", f"{where}.role"
            )
        plain = {str(k): _checked_depth(v, where) for k, v in message.items() if v is not None}
        calls = plain.get("tool_calls")
        if calls is not None:
            plain["tool_calls"] = [_with_arguments(call) for call in calls] if isinstance(calls, list) else []
        return {**plain, "role": role, "content": _content(message.get("content"), f"{where}.content")}


def speaks(tokenizer: Tokenizer) -> bool:
    """Whether it has the tokens of our own chat template."""
    names = {tokenizer.text_of(i) for i in tokenizer.special_ids}
    return {"<|end|>", *(f"<|{role}|>" for role in ROLES)} <= names


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{where} is {type(content).__name__}; it must be text or a list of parts", where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{i}] is of type {kind!r}; this model reads 'text' only", where)
        texts.append(part["text"])
    return "".join(texts)


def _with_arguments(call: Any) -> Any:
    """A call whose arguments are an object, as templates want them; OpenAI's clients send JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        read = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": read}} if isinstance(read, dict) else call


def _checked_depth(value: Any, where: str, depth: int = 0) -> Any:
    if depth > MOST_DEPTH:
        raise RequestError(f"{where} is nested more than {MOST_DEPTH} deep", where)
    if isinstance(value, Mapping):
        return {str(k): _checked_depth(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_checked_depth(v, where, depth + 1) for v in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise RequestError(f"{where} holds a {type(value).__name__}, which is no JSON", where)


def _cut_after(text: str, content: str) -> str:
    """``text`` up to the end of the last message's content, as it stands there (perhaps trimmed)."""
    for form in (content, content.rstrip(), content.strip()):
        at = text.rfind(form) if form else -1
        if at >= 0:
            return text[: at + len(form)]
    raise RequestError(
        "continue_final_message: the chat template leaves the last message's content out, or changes it",
        "continue_final_message",
    )


class _Masks:
    """Marks for one rendering, and what each stands for."""

    def __init__(self, controls: tuple[str, ...]) -> None:
        self._controls, self._nonce = controls, str(secrets.randbelow(10**18)).zfill(18)
        self._any = re.compile("|".join(map(re.escape, controls))) if controls else None
        self._texts: list[str] = []

    @property
    def masked(self) -> bool:
        return bool(self._texts)

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        own = {
            key: self._part(message[key]) for key in ("name", "content") if isinstance(message.get(key), str)
        }
        rest = {key: self.inside(value) for key, value in message.items() if key not in (*own, "role")}
        return {"role": message["role"], **own, **rest}

    def inside(self, value: Any) -> Any:
        """A JSON value with every text in it masked, names of members too."""
        return _mapped(value, self._border)

    def _part(self, text: str) -> str:
        """``_border``, and a text that is a part of a token is masked whole: ``<|`` and ``|>`` may stand around it."""
        inner = text and any(text in control for control in self._controls)
        return self._mark(text) if inner else self._border(text)

    def _border(self, text: str) -> str:
        """Masks tokens in ``text``, and a part of one at either end, which the template's text might complete."""
        if self._any is None or not text:
            return text
        text = self._any.sub(lambda found: self._mark(found[0]), text)
        start, end = self._ends(text)
        tail = text[len(text) - end :] if end else ""
        middle = text[start : len(text) - end]
        return (self._mark(text[:start]) if start else "") + middle + (self._mark(tail) if tail else "")

    def _ends(self, text: str) -> tuple[int, int]:
        """How much of the beginning ends a token, and how much of the end begins one."""
        start = end = 0
        for control in self._controls:
            for n in range(len(control) - 1, 0, -1):
                if n > end and text.endswith(control[:n]):
                    end = n
                if n > start and text.startswith(control[-n:]):
                    start = n
        return (len(text), 0) if start + end > len(text) else (start, end)

    def _mark(self, text: str) -> str:
        self._texts.append(text)
        return f"{FIRST}{self._nonce}{len(self._texts) - 1:09d}{LAST}"

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return re.compile(f"{FIRST}{self._nonce}(\\d{{9}}){LAST}")

    def restored(self, text: str) -> str:
        """``text`` with what the marks stand for."""
        return self._marks.sub(lambda found: self._original(found), text)

    def _original(self, found: re.Match[str]) -> str:
        number = int(found[1])
        return self.restored(self._texts[number]) if number < len(self._texts) else ""

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """``text`` in order: control tokens of the template (true), and restored text between them (false)."""
        assert self._any is not None
        found: list[tuple[str, bool]] = []
        at = 0
        for control in self._any.finditer(text):
            found += [(self.restored(text[at : control.start()]), False), (control[0], True)]
            at = control.end()
        found.append((self.restored(text[at:]), False))
        return [(piece, control) for piece, control in found if piece]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(k): _mapped(v, change) for k, v in value.items()}
    return [_mapped(v, change) for v in value] if isinstance(value, list) else value
