"""``/openapi.json``: the routes as OpenAPI 3.1 describes them, made from what they check and what they answer.

The request schemas are those of the shapes that read the requests, so that they cannot disagree. Answers are described
here, and tests hold the server to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepseek.serve.server.exchange import Operation

TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
NUMBER: dict[str, Any] = {"type": "number"}


def ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def obj(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these members and no others."""
    return {
        "type": "object", "properties": {**required, **(optional or {})}, "required": list(required),
        "additionalProperties": False,
    }  # fmt: skip


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def nullable(rule: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [rule, {"type": "null"}]}


LOGPROB = obj({"token": TEXT, "logprob": NUMBER, "bytes": listed(COUNT)})
TRACE = listed(
    obj(
        {"id": COUNT, "token": TEXT, "experts": listed({"type": "array"}), "gates": listed({"type": "array"})}
    )
)
STOPPED = nullable({"type": ["string", "integer"]})
FINISH = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
CHAT_LOGPROBS = nullable(
    obj(
        {
            "content": listed(
                {**LOGPROB, "properties": {**LOGPROB["properties"], "top_logprobs": listed(LOGPROB)}}
            ),
            "refusal": {"type": "null"},
        }
    )
)

SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": obj(
        {"error": obj({"message": TEXT, "type": TEXT, "param": nullable(TEXT), "code": nullable(TEXT)})}
    ),
    "Usage": obj(
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "prompt_tokens_details": obj({"cached_tokens": COUNT}),
        }
    ),
    "Model": obj(
        {
            "id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT, "root": TEXT,
            "parent": nullable(TEXT), "max_model_len": COUNT, "vocab_size": COUNT, "hidden_size": COUNT,
            "parameters": COUNT, "step": nullable(COUNT), "experts": COUNT, "expert_layers": listed(COUNT),
            "hybrid_layers": listed(COUNT), "chat": {"type": "boolean"},
        }
    ),
    "Models": obj({"object": {"const": "list"}, "data": listed(ref("Model"))}),
    "Completion": obj(
        {
            "id": TEXT, "object": {"const": "text_completion"}, "created": COUNT, "model": TEXT,
            "system_fingerprint": TEXT, "usage": ref("Usage"),
            "choices": listed(
                obj(
                    {
                        "index": COUNT, "text": TEXT, "finish_reason": FINISH, "stop_reason": STOPPED,
                        "logprobs": nullable(
                            obj(
                                {
                                    "tokens": listed(TEXT),
                                    "token_logprobs": listed(nullable(NUMBER)),
                                    "top_logprobs": listed(
                                        nullable({"type": "object", "additionalProperties": NUMBER})
                                    ),
                                    "text_offset": listed(COUNT),
                                }
                            )
                        ),
                    },
                    {"prompt_logprobs": listed(nullable({"type": "object"})), "trace": TRACE},
                )
            ),
        }
    ),
    "ChatCompletion": obj(
        {
            "id": TEXT, "object": {"const": "chat.completion"}, "created": COUNT, "model": TEXT,
            "system_fingerprint": TEXT, "usage": ref("Usage"),
            "choices": listed(
                obj(
                    {
                        "index": COUNT, "finish_reason": FINISH, "stop_reason": STOPPED, "logprobs": CHAT_LOGPROBS,
                        "message": obj(
                            {"role": {"const": "assistant"}, "content": nullable(TEXT), "refusal": {"type": "null"}},
                            {
                                "tool_calls": listed(
                                    obj(
                                        {
                                            "id": TEXT,
                                            "type": {"const": "function"},
                                            "function": obj({"name": TEXT, "arguments": TEXT}),
                                        }
                                    )
                                )
                            },
                        ),
                    },
                    {"trace": TRACE},
                )
            ),
        }
    ),
    "Embeddings": obj(
        {
            "object": {"const": "list"}, "model": TEXT,
            "data": listed(
                obj({"object": {"const": "embedding"}, "index": COUNT,
                     "embedding": {"anyOf": [listed(NUMBER), {**TEXT, "contentEncoding": "base64"}]}})
            ),
            "usage": obj({"prompt_tokens": COUNT, "total_tokens": COUNT}),
        }
    ),
    "Tokens": obj(
        {"count": COUNT, "max_model_len": COUNT, "tokens": listed(COUNT)}, {"token_strs": listed(TEXT)}
    ),
    "Prompt": obj({"prompt": TEXT}),
    "Status": obj({"status": TEXT}, {"reason": TEXT}),
    "Version": obj({"version": TEXT}),
    "Reloaded": obj({"object": {"const": "model.reload"}, "model": ref("Model")}),
    "OpenApi": {"type": "object", "required": ["openapi", "info", "paths"]},
}  # fmt: skip

MEANINGS = {
    200: "the answer", 400: "a field is wrong; `param` names it", 401: "no key, or an unknown one",
    403: "not with this key, or not from there", 404: "no such model or route", 405: "not with this method",
    408: "the body did not arrive in time", 409: "a reload is under way", 413: "the body is too large",
    415: "the body is no plain JSON",
    429: "the queue or a limit of the key is full; `Retry-After` says when to come back",
    500: "a fault of the server", 503: "not ready, or shutting down; `Retry-After` says when to come back",
    504: "the request's time is over",
}  # fmt: skip


def document(
    operations: Sequence[Operation], version: str, secured: bool, names: Sequence[str] = ()
) -> dict[str, Any]:
    """The whole description. ``names``: of the models that are served now."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, secured, names)
    return {
        "openapi": "3.1.0",
        "info": {"title": "deepseek serve", "version": version},
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation, secured: bool, names: Sequence[str]) -> dict[str, Any]:
    statuses = [403, 405] if not operation.secured else [401, 403, 405]
    if operation.path not in ("/health", "/version", "/openapi.json", "/metrics"):
        statuses += [503]
    if operation.body is not None:
        statuses += [400, 404, 408, 413, 415]
    if operation.admin:
        statuses += [409]
    if operation.generates:
        statuses += [429, 500, 504]
    if "{" in operation.path:
        statuses += [404]
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.about,
        "responses": {
            str(status): _answer(operation, status) for status in sorted({*operation.answers, *statuses})
        },
    }
    if operation.secured and secured:
        found["security"] = [{"key": []}]
    if "{" in operation.path:
        name = operation.path.partition("{")[2].partition("}")[0]
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    if operation.body is not None:
        schema = operation.body.schema()
        if names and "model" in schema["properties"]:
            schema["properties"]["model"] = {**schema["properties"]["model"], "enum": [*names, None]}
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return found


def _answer(operation: Operation, status: int) -> dict[str, Any]:
    schema = operation.answers.get(status, ref("Error"))
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if status == 200 and operation.media != ("application/json",):
        content = {m: {"schema": schema if "json" in m else TEXT} for m in operation.media}
    told: dict[str, Any] = {"description": MEANINGS[status], "content": content}
    if status == 200 and operation.links:
        told["links"] = operation.links
    return told
