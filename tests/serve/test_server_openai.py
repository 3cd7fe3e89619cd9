"""What openai-python, which nobody here wrote, makes of the server: every route, streamed and not, and every error."""

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from fake_client import ADMIN, KEY, TEXT, FakeClient, Served, keyring, serving
from openai import AsyncOpenAI, OpenAI

from deepseek.serve.request import Request


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(keys=keyring()) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as found:
        yield found


def hello(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], **more}


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["fake", "polite"]
    assert client.models.retrieve("fake").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"
    assert "there are: fake, polite" in str(caught.value)


def test_a_completion_of_text_and_of_ids(client: OpenAI, server: Served) -> None:
    told = client.completions.create(model="fake", prompt="Say hello", max_tokens=200)
    assert told.choices[0].text == TEXT
    assert told.choices[0].finish_reason == "stop"
    assert told.usage is not None
    encoded = server.client.tokenizer.prompt("Say hello")
    assert told.usage.prompt_tokens == len(encoded)
    assert told.usage.total_tokens == told.usage.prompt_tokens + told.usage.completion_tokens
    many = client.completions.create(model="fake", prompt=[[5, 6, 7], [8, 9]], max_tokens=2, n=2)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert [r.prompt for r in server.client.seen[-4:]] == [(5, 6, 7), (5, 6, 7), (8, 9), (8, 9)]
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (5, 8)
    assert {c.finish_reason for c in many.choices} == {"length"}


def test_every_option_reaches_the_engine(client: OpenAI, server: Served) -> None:
    client.completions.create(
        model="polite", prompt="x", max_tokens=3, temperature=0.5, top_p=0.9, seed=-1, stop=["a", "b"], n=2,
        presence_penalty=1, frequency_penalty=-1, logit_bias={"7": -100}, user="u",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "min_tokens": 1,
                    "stop_token_ids": [9], "include_stop_str_in_output": True, "priority": -3, "timeout": 500},
    )  # fmt: skip
    first, second = server.client.seen[-2:]
    assert (first.adapter, first.priority) == ("polite", -3)
    assert first.deadline is not None
    assert 400 < first.deadline <= 500
    s = first.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.max_tokens, s.min_tokens) == (0.5, 0.9, 5, 0.1, 3, 1)
    assert (s.stop, s.stop_token_ids, s.include_stop, s.ignore_eos) == (("a", "b"), (9,), True, True)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (1, -1, 1.2)
    assert s.logit_bias == {7: -100}
    assert s.seed == 2**63 - 1
    assert second.sampling.seed == 0


def test_echo_and_logprobs_in_the_old_shape(client: OpenAI, server: Served) -> None:
    told = client.completions.create(
        model="fake", prompt="the fox", echo=True, logprobs=2, max_tokens=3, temperature=0
    )
    choice = told.choices[0]
    assert choice.text.startswith("the fox")
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    sizes = {len(found.tokens), len(found.token_logprobs), len(found.top_logprobs), len(found.text_offset)}
    ids = server.client.tokenizer.prompt("the fox")
    assert sizes == {len(ids) + 3}
    assert (found.token_logprobs[0], found.token_logprobs[1]) == (None, -0.5)
    for token, offset in zip(found.tokens, found.text_offset):
        assert token in ("<|endoftext|>",) or choice.text[offset:].startswith(token)
    assert all(t in top for t, top in zip(found.tokens[1:], found.top_logprobs[1:]))


def test_logprobs_of_a_prompt_without_an_answer(client: OpenAI) -> None:
    told = client.completions.create(model="fake", prompt=[5, 80, 90], echo=True, logprobs=1, max_tokens=0)
    choice = told.choices[0]
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert told.usage is not None
    assert told.usage.completion_tokens == 0


def test_best_of_returns_the_most_likely(client: OpenAI, server: Served) -> None:
    told = client.completions.create(model="fake", prompt="x", best_of=3, n=1, max_tokens=2)
    assert len(told.choices) == 1
    assert told.usage is not None
    assert told.usage.completion_tokens == 6
    assert server.client.seen[-1].sampling.logprobs == 0
    with pytest.raises(openai.BadRequestError, match="must be at least n=4"):
        client.completions.create(model="fake", prompt="x", best_of=3, n=4)


def test_a_streamed_completion_adds_up(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="fake",
            prompt="Say",
            stream=True,
            max_tokens=100,
            n=2,
            stream_options={"include_usage": True},
        )
    )
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: TEXT, 1: TEXT}
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 20


def test_a_chat_in_one_piece(client: OpenAI, server: Served) -> None:
    told = client.chat.completions.create(
        **hello(max_completion_tokens=200, seed=5, metadata={"a": "b"}, store=False)
    )
    message = told.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", TEXT, None)
    assert told.choices[0].finish_reason == "stop"
    assert told.system_fingerprint
    assert told.system_fingerprint.startswith("fp_")
    assert server.client.seen[-1].sampling.seed == 5
    free = client.chat.completions.create(**hello())
    assert free.choices[0].message.content == TEXT
    asked = server.client.seen[-1]
    assert asked.sampling.max_tokens == 512 - len(asked.prompt)


def test_a_chat_streams_role_text_end_and_usage_in_this_order(server: Served) -> None:
    import httpx2

    body = hello(stream=True, max_tokens=3, stream_options={"include_usage": True})
    with httpx2.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    choices = [c["choices"][0] for c in chunks[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(c["delta"]) == {"content"} for c in choices[1:-1])
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]
    assert choices[-1]["delta"] == {}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert "usage" not in chunks[0]
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1


def test_a_streamed_chat_of_two_answers_with_logprobs(client: OpenAI) -> None:
    texts, tokens = {0: "", 1: ""}, {0: 0, 1: 0}
    with client.chat.completions.create(**hello(stream=True, n=2, logprobs=True, top_logprobs=2)) as stream:
        for chunk in stream:
            choice = chunk.choices[0]
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                for entry in choice.logprobs.content or []:
                    tokens[choice.index] += 1
                    assert len(entry.top_logprobs) == 2
                    assert bytes(entry.bytes or []).decode("utf-8", "replace") or entry.token
    assert texts == {0: TEXT, 1: TEXT}
    assert tokens[0] == tokens[1] > 20


def test_the_stream_helper_of_the_library_reads_it(client: OpenAI) -> None:
    with client.chat.completions.stream(**hello(stream_options={"include_usage": True})) as stream:
        for _ in stream:
            pass
        done = stream.get_final_completion()
    assert done.choices[0].message.content == TEXT


TOOL: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


def answers(request: Request) -> str:
    grammar = request.sampling.grammar
    if grammar is None:
        return CALL
    if "anyOf" in grammar.text:
        return '[{"name": "weather", "arguments": {"city": "Bern"}}]'
    return '{"city": "Bern"}'


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "weather"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_tools(choice: Any, stream: bool) -> None:
    with serving(FakeClient(text=answers)) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        body = hello(tools=[TOOL], tool_choice=choice)
        named = isinstance(choice, dict)
        if stream:
            with client.chat.completions.stream(**body) as found:
                for _ in found:
                    pass
                told = found.get_final_completion()
        else:
            told = client.chat.completions.create(**body)  # type: ignore[assignment]
        calls = told.choices[0].message.tool_calls
        assert calls is not None
        assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
            ("function", "weather", {"city": "Bern"})
        ]
        assert told.choices[0].finish_reason == ("stop" if named else "tool_calls")
        again = body["messages"] + [
            told.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"}),
            {"role": "tool", "tool_call_id": calls[0].id, "content": "4 degrees"},
        ]
        for call in again[1]["tool_calls"]:
            call["function"].pop("parsed_arguments", None)
        again[1].setdefault("content", None)
        client.chat.completions.create(**hello(messages=again, tools=[TOOL], tool_choice="none"))
        assert server.client.seen[-1].sampling.grammar is None
        client.close()


def test_calls_as_models_write_them_are_what_openai_python_reads() -> None:
    """Streamed, a token at a time, the client puts them together as the answer in one piece says them."""
    written = [
        CALL, "Let me see.\n" + CALL + "\n" + CALL,
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern"}}]',
        'Yes. [TOOL_CALLS]weather[ARGS]{"city": "Bern"}[TOOL_CALLS]weather[ARGS]{"city": "Bern"}',
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Bern"}}',
        '{"name": "weather", "parameters": {"city": "Bern"}}; {"name": "weather", "parameters": {"city": "Bern"}}',
        "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n</function>\n</tool_call>",
    ]  # fmt: skip
    client = FakeClient()
    with serving(client) as server:
        openai_client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for text in written:
            client.text = text
            body = hello(tools=[TOOL], n=2)
            with openai_client.chat.completions.stream(**body) as found:
                for _ in found:
                    pass
                streamed = found.get_final_completion()
            whole = openai_client.chat.completions.create(**body)
            for choice in (*streamed.choices, *whole.choices):
                calls = choice.message.tool_calls
                assert calls
                assert len(calls) == max(1, text.count("Bern"))
                assert len({call.id for call in calls}) == len(calls)
                assert choice.finish_reason == "tool_calls"
                for call in calls:
                    assert call.type == "function"
                    assert (call.function.name, json.loads(call.function.arguments)) == (
                        "weather",
                        {"city": "Bern"},
                    )
                assert (choice.message.content or "").strip() in ("", "Let me see.", "Yes.")
        openai_client.close()


def test_formats_become_grammars(client: OpenAI, server: Served) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "integer"}}}
    client.chat.completions.create(**hello(response_format={"type": "json_object"}))
    assert server.client.seen[-1].sampling.grammar is not None
    assert server.client.seen[-1].sampling.grammar.kind == "json"
    client.chat.completions.create(
        **hello(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    )
    grammar = server.client.seen[-1].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", schema)
    for given, kind, text in [
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"json": schema}, "json_schema", json.dumps(schema, separators=(",", ":"))),
    ]:
        client.completions.create(model="fake", prompt="x", extra_body={"structured_outputs": given})
        grammar = server.client.seen[-1].sampling.grammar
        assert grammar is not None
        assert (grammar.kind, grammar.text) == (kind, text)
    with pytest.raises(openai.BadRequestError, match="both say"):
        client.chat.completions.create(
            **hello(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"})
        )


def test_embeddings_as_numbers_and_as_base64(client: OpenAI, server: Served) -> None:
    told = client.embeddings.create(model="fake", input=["a", "b c"])  # asks for base64, and decodes it
    assert [d.index for d in told.data] == [0, 1]
    plain = client.embeddings.create(model="fake", input="a", encoding_format="float")
    assert plain.data[0].embedding == told.data[0].embedding
    raw = client.post("/embeddings", body={"input": [1, 2], "encoding_format": "base64"}, cast_to=object)  # type: ignore[call-overload]
    decoded = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    assert decoded.shape == (8,)
    assert told.usage.prompt_tokens == sum(len(server.client.tokenizer.prompt(t)) for t in ("a", "b c"))
    with pytest.raises(openai.BadRequestError, match="have 8 and cannot be cut"):
        client.embeddings.create(model="fake", input="a", dimensions=4)
    with pytest.raises(openai.BadRequestError, match="items of input are 300 sequences") as caught:
        client.embeddings.create(model="fake", input=["a"] * 300)
    assert caught.value.param == "input"


def test_tokenize_and_back(client: OpenAI) -> None:
    url = str(client.base_url).removesuffix("v1/")
    told: Any = client.post(
        f"{url}tokenize", body={"prompt": "the fox é", "return_token_strs": True}, cast_to=object
    )
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    back: Any = client.post(f"{url}detokenize", body={"tokens": told["tokens"][1:]}, cast_to=object)
    assert back == {"prompt": "the fox é"}
    chat: Any = client.post(f"{url}tokenize", body={"messages": hello()["messages"]}, cast_to=object)
    assert chat["count"] > 3


def test_traces_for_the_chat_page(client: OpenAI) -> None:
    told = client.chat.completions.create(**hello(max_tokens=2), extra_body={"trace": True})
    trace: Any = told.choices[0].trace  # type: ignore[attr-defined]
    assert len(trace) == 2
    assert trace[0]["experts"] == [[1, [[3, 0.75], [0, 0.25]]]]
    assert trace[0]["gates"] == [[0, 0.5]]
    seen = 0
    for chunk in client.chat.completions.create(
        **hello(stream=True, max_tokens=2), extra_body={"trace": True}
    ):
        seen += len(chunk.choices[0].trace)  # type: ignore[attr-defined]
    assert seen == 2


def test_the_asynchronous_client_with_many_at_once(server: Served) -> None:
    async def work() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            told = await asyncio.gather(*(client.chat.completions.create(**hello()) for _ in range(20)))
            assert {t.choices[0].message.content for t in told} == {TEXT}
            text = ""
            async for chunk in await client.chat.completions.create(**hello(stream=True)):
                text += chunk.choices[0].delta.content or ""
            assert text == TEXT

    asyncio.run(work())


def test_the_raw_response_shows_the_request_id(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **hello(max_tokens=1), extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().id == "chatcmpl-mine-1"
    odd = client.models.with_raw_response.list(extra_headers={"X-Request-Id": "no good"})
    assert odd.headers["x-request-id"] != "no good"


@pytest.mark.parametrize(
    ("error", "status", "code", "body"),
    [
        (openai.NotFoundError, 404, "model_not_found", hello(model="gpt-5")),
        (openai.BadRequestError, 400, None, hello(temperature=3)),
        (openai.BadRequestError, 400, "unknown_field", hello(extra_body={"prompt": "x"})),
        (openai.BadRequestError, 400, "context_length_exceeded",
         hello(messages=[{"role": "user", "content": "word " * 3000}])),
        (openai.BadRequestError, 400, None, hello(top_logprobs=2)),
        (openai.BadRequestError, 400, None, hello(stream_options={"include_usage": True})),
    ],
)  # fmt: skip
def test_errors_are_the_classes_of_the_library(
    client: OpenAI, error: Any, status: int, code: str, body: Any
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**body)
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_keys(server: Served) -> None:
    for key in ("wrong-key", KEY + "x"):
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            stranger.models.list()
        assert caught.value.code == "invalid_api_key"
        assert key not in str(caught.value)


def test_an_engine_that_dies_is_a_503_before_and_an_error_event_after_the_first_word() -> None:
    with serving(FakeClient(fail_after=0)) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**hello(stream=True))
        assert caught.value.status_code == 503
        server.client.fail_after = 2
        text = ""
        stream = client.chat.completions.create(**hello(stream=True))
        with pytest.raises(openai.APIError, match="step process died") as after:  # noqa: PT012
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text
        assert TEXT.startswith(text)
        assert after.value.code == "engine_unavailable"
        client.close()


def test_what_the_engine_refuses_is_a_400_also_for_a_stream() -> None:
    with serving(FakeClient(refuse="the grammar does not compile")) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="does not compile"):
                client.chat.completions.create(**hello(stream=stream))
        client.close()


def test_reload_needs_an_admin_and_serves_the_new_model(server: Served, tmp_path: Any) -> None:
    url = f"{server.url}/admin/reload"
    with (
        OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client,
        pytest.raises(openai.PermissionDeniedError),
    ):
        client.post(url, body={"path": str(tmp_path)}, cast_to=object)
    with OpenAI(base_url=server.url, api_key=ADMIN, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match="nothing at"):
            client.post(url, body={"path": "/nowhere"}, cast_to=object)
        before: Any = client.get("/v1/models/fake", cast_to=object)
        told: Any = client.post(url, body={"path": str(tmp_path)}, cast_to=object)
        assert told["model"]["root"] == tmp_path.name
        assert told["model"]["step"] == before["step"] + 1
        after: Any = client.get("/v1/models/fake", cast_to=object)
        assert after == told["model"]
