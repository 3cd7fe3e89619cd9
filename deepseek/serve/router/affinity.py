"""``prefix_key``: what two requests have in common when the prefix cache of one helps the other.

Of a chat that is everything up to the first message of the user, so that a conversation stays where it began; of a
completion the beginning of its prompt. The model belongs to it, since an adapter changes what is cached.
"""

from __future__ import annotations

import hashlib
from typing import Any

LONGEST = 1 << 20  #: bytes of a body that is parsed for this; a longer one is known by its first bytes


def prefix_key(body: bytes, characters: int) -> bytes | None:
    """16 bytes that equal prefixes share, or ``None`` for a request without a prompt.

    Args:
        body: of the request, JSON in the form of the OpenAI API.
        characters: of the prompt that count; 0: no key.
    """
    if not characters or not body:
        return None
    import orjson

    if len(body) > LONGEST:
        return _digest(body[:characters])
    try:
        asked = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(asked, dict):
        return None
    prompt = asked.get("prompt")
    if isinstance(asked.get("messages"), list):
        prompt = _opening(asked["messages"])
    elif prompt is None:
        return None
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # the first of several prompts
    if isinstance(prompt, list):
        prompt = prompt[:characters]  # token ids
    try:
        text = prompt if isinstance(prompt, str) else orjson.dumps(prompt).decode()
    except orjson.JSONEncodeError:  # nested deeper than it writes, but not than it reads
        return None
    return _digest(f"{asked.get('model')}\0{text[:characters]}".encode("utf-8", "replace"))


def _opening(messages: list[Any]) -> list[Any]:
    """The messages up to the first that the user wrote."""
    for count, message in enumerate(messages, 1):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[:count]
    return messages


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
