"""What each route takes: the bodies of the OpenAI API, with the further fields that vLLM's server knows.

A field is here if it does what it says, or is harmless to ignore (``IGNORED``). One that would change the answer and is
not supported is unknown, and refused by name.
"""

from __future__ import annotations

from typing import Any

from deepseek.serve.server.shapes import (
    Anything,
    Field,
    Flag,
    Integer,
    ListOf,
    MapOf,
    Number,
    Record,
    Shape,
    Text,
    either,
    needed,
    optional,
    tagged,
    wrong,
)

TOP_LOGPROBS = 20
LONGEST_NAME = 256
MOST_PROMPTS = 2048
MOST_CHOICES = 128
LAST_SEED = 2**63 - 1

SEED = Integer(-(2**63), LAST_SEED)
COUNT = Integer(0, 2**31 - 1)


class Prompt(Shape):
    """A text, a list of texts, token ids, or a list of lists of token ids; read as a list of texts and lists."""

    def __init__(self, most: int = MOST_PROMPTS) -> None:
        ids = ListOf(Integer(0, 2**31 - 1), 1)
        self._shape = either(
            "a string, a list of strings, a list of token ids or a list of such lists",
            Text(), ids, ListOf(Text(), 1, most), ListOf(ids, 1, most),
        )  # fmt: skip

    def read(self, value: Any, at: str) -> list[str | list[int]]:
        found = self._shape.read(value, at)
        alone = isinstance(found, str) or isinstance(found[0], int)
        return [found] if alone else found

    def schema(self) -> dict[str, Any]:
        return self._shape.schema()


class Stop(Shape):
    """A text or a list of texts; read as a tuple."""

    _shape = either("a string or a list of strings", Text(1, 1000), ListOf(Text(1, 1000), 0, 16))

    def read(self, value: Any, at: str) -> tuple[str, ...]:
        found = self._shape.read(value, at)
        return (found,) if isinstance(found, str) else tuple(found)

    def schema(self) -> dict[str, Any]:
        return self._shape.schema()


class TokenId(Shape):
    """A token id as the name of a member; read as an integer."""

    def read(self, value: Any, at: str) -> int:
        if not isinstance(value, str) or not value.isascii() or not value.isdecimal() or len(value) > 9:
            raise wrong(at, "a token id", value)
        return int(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^[0-9]{1,9}$"}


STRUCTURES = Record(
    {
        "json": optional(
            either("a JSON schema, as an object or as text", Anything(object_only=True), Text())
        ),
        "regex": optional(Text(1, 10_000)),
        "choice": optional(ListOf(Text(1, 1000), 1, 500)),
        "grammar": optional(Text(1, 100_000), about="in llguidance's Lark dialect"),
        "json_object": optional(Flag()),
    },
    about="exactly one of them: what the answer must match",
)

STREAM_OPTIONS = Record(
    {
        "include_usage": optional(Flag(), False, "a last chunk, without choices, that tells the usage"),
        "continuous_usage_stats": optional(Flag(), False, "the usage so far in every chunk"),
        "include_obfuscation": optional(Flag(), about="ignored"),
    }
)

#: Fields that say nothing about the answer; taken and ignored.
IGNORED: dict[str, Field] = {
    "user": optional(Text(0, 1000), about="ignored"),
    "metadata": optional(MapOf(Text(0, 512), Text(0, 64), most=16), about="ignored"),
    "store": optional(Flag(), about="ignored"),
    "service_tier": optional(Text(0, 64), about="ignored"),
    "safety_identifier": optional(Text(0, 512), about="ignored"),
    "prompt_cache_key": optional(Text(0, 512), about="ignored: every prompt's prefix is cached"),
    "prompt_cache_retention": optional(Text(0, 64), about="ignored"),
}

MODEL = optional(Text(1, LONGEST_NAME), about="a name of /v1/models; the served model unless told")

#: What decides how tokens are drawn and where the answer ends; for completions and chat alike.
SAMPLING: dict[str, Field] = {
    "temperature": optional(Number(0, 2), 1.0, "0: the most likely token"),
    "top_p": optional(Number(0, 1, above=True), 1.0),
    "top_k": optional(Integer(-1, 2**31 - 1), 0, "0 or -1: all"),
    "min_p": optional(Number(0, 1), 0.0),
    "seed": optional(SEED, about="equal seeds give equal answers, whatever else is running"),
    "stop": optional(Stop(), ()),
    "stop_token_ids": optional(ListOf(Integer(0, 2**31 - 1), 0, 64), ()),
    "include_stop_str_in_output": optional(Flag(), False),
    "ignore_eos": optional(Flag(), False),
    "min_tokens": optional(COUNT, 0, "end tokens and stop texts are ignored before"),
    "presence_penalty": optional(Number(-2, 2), 0.0),
    "frequency_penalty": optional(Number(-2, 2), 0.0),
    "repetition_penalty": optional(Number(0, 10, above=True), 1.0),
    "logit_bias": optional(MapOf(Number(-100, 100), TokenId(), "^[0-9]{1,9}$", 1024)),
    "structured_outputs": optional(STRUCTURES),
    "priority": optional(Integer(-(2**31), 2**31 - 1), 0, "smaller ones run first"),
    "timeout": optional(Number(1, 86_400), about="seconds; then the answer is 504"),
    "trace": optional(Flag(), False, "also tell the experts and branches that every token used"),
    "stream": optional(Flag(), False),
    "stream_options": optional(STREAM_OPTIONS),
}

COMPLETION = Record(
    {
        "model": MODEL,
        "prompt": needed(Prompt()),
        "max_tokens": optional(COUNT, 16, "an upper bound; the model's room is another"),
        "n": optional(Integer(1, MOST_CHOICES), 1),
        "best_of": optional(
            Integer(1, MOST_CHOICES), about="draw so many, return the n most likely per token"
        ),
        "echo": optional(Flag(), False, "put the prompt in front of the answer"),
        "logprobs": optional(Integer(0, TOP_LOGPROBS)),
        "prompt_logprobs": optional(Integer(0, TOP_LOGPROBS)),
        **SAMPLING,
        **IGNORED,
    }
)

FUNCTION = Record(
    {
        "name": needed(Text(1, 64)),
        "description": optional(Text(0, 10_000)),
        "parameters": optional(Anything(object_only=True), about="a JSON schema"),
        "strict": optional(Flag()),
    }
)
NAMED = Record({"name": needed(Text(1, 64))})
TOOL = Record({"type": needed(Text(choices=("function",))), "function": needed(FUNCTION)})
TOOL_CALL = Record(
    {
        "id": optional(Text(0, 200)),
        "type": optional(Text(choices=("function",)), "function"),
        "index": optional(COUNT),
        "function": needed(Record({"name": needed(Text(1, 64)), "arguments": needed(Text())})),
    }
)
CONTENT = either(
    "a string or a list of text parts",
    Text(),
    ListOf(
        Record({"type": needed(Text(choices=("text",))), "text": needed(Text())}),
        1,
        1000,
    ),
)

_NAME = {"name": optional(Text(0, LONGEST_NAME)), "type": optional(Text(choices=("text",)), about="ignored")}
MESSAGE = tagged(
    "role",
    {
        "system": {"content": needed(CONTENT), **_NAME},
        "developer": {"content": needed(CONTENT), **_NAME},
        "user": {"content": needed(CONTENT), **_NAME},
        "assistant": {
            "content": optional(CONTENT),
            "tool_calls": optional(ListOf(TOOL_CALL, 0, 128)),
            "refusal": optional(Text()),
            "reasoning_content": optional(Text(), about="ignored"),
            "audio": optional(Record({}), about="null"),
            "function_call": optional(Record({}), about="null"),
            "annotations": optional(ListOf(Anything(), 0, 100), about="ignored"),
            **_NAME,
        },
        "tool": {"content": needed(CONTENT), "tool_call_id": needed(Text(0, 200)), **_NAME},
    },
)

RESPONSE_FORMAT = tagged(
    "type",
    {
        "text": {},
        "json_object": {},
        "json_schema": {
            "json_schema": needed(
                Record(
                    {
                        "name": needed(Text(1, 64)),
                        "description": optional(Text(0, 10_000)),
                        "schema": optional(Anything(object_only=True)),
                        "strict": optional(Flag()),
                    }
                )
            )
        },
    },
)

TEMPLATE: dict[str, Field] = {
    "add_generation_prompt": optional(Flag(), about="true unless continue_final_message is"),
    "continue_final_message": optional(Flag(), False),
    "chat_template_kwargs": optional(Anything(object_only=True), about="further variables of the template"),
}

MESSAGES = ListOf(MESSAGE, 1, 4096)

CHAT = Record(
    {
        "model": MODEL,
        "messages": needed(MESSAGES),
        "max_tokens": optional(Integer(1, 2**31 - 1), about="older name of max_completion_tokens"),
        "max_completion_tokens": optional(
            Integer(1, 2**31 - 1), about="an upper bound; the model's room unless told"
        ),
        "n": optional(Integer(1, MOST_CHOICES), 1),
        "logprobs": optional(Flag(), False),
        "top_logprobs": optional(Integer(0, TOP_LOGPROBS)),
        "tools": optional(ListOf(TOOL, 0, 128)),
        "tool_choice": optional(
            either(
                "'none', 'auto', 'required' or a function's name",
                Text(choices=("none", "auto", "required")),
                Record({"type": needed(Text(choices=("function",))), "function": needed(NAMED)}),
            )
        ),
        "parallel_tool_calls": optional(Flag(), True),
        "response_format": optional(RESPONSE_FORMAT),
        "reasoning_effort": optional(Text(0, 64), about="ignored"),
        "verbosity": optional(Text(0, 64), about="ignored"),
        "modalities": optional(ListOf(Text(choices=("text",)), 1, 1)),
        **TEMPLATE,
        **SAMPLING,
        **IGNORED,
    }
)
EMBEDDING = Record(
    {
        "model": MODEL,
        "input": needed(Prompt()),
        "encoding_format": optional(Text(choices=("float", "base64")), "float"),
        "dimensions": optional(Integer(1, 2**31 - 1), about="must be the model's own"),
        "priority": optional(Integer(-(2**31), 2**31 - 1), 0),
        "timeout": optional(Number(1, 86_400)),
        "user": IGNORED["user"],
    }
)

TOKENIZE = Record(
    {
        "model": MODEL,
        "prompt": optional(Text(), about="either this or messages"),
        "messages": optional(MESSAGES),
        "tools": optional(ListOf(TOOL, 0, 128)),
        "add_special_tokens": optional(Flag(), True, "the document start, where the model has one"),
        "return_token_strs": optional(Flag(), False),
        **TEMPLATE,
    }
)
DETOKENIZE = Record({"model": MODEL, "tokens": needed(ListOf(Integer(0, 2**31 - 1), 0, 1_000_000))})
RELOAD = Record(
    {"path": needed(Text(1, 4096), "a run, a checkpoint, a Hugging Face directory or a GGUF file")}
)
