"""Everything that crosses the border arrives as it was; frames survive any cut; the heartbeat is shared memory."""

from __future__ import annotations

import math
import os
import random
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepseek import errors
from deepseek.errors import (
    CheckpointError,
    ConfigError,
    DeepseekError,
    EngineError,
    MissingExtraError,
    RequestError,
)
from deepseek.serve import wire
from deepseek.serve.answer import output_of, saying
from deepseek.serve.client import EngineDraining
from deepseek.serve.request import EngineStats, ModelInfo, Output, Request, TokenLogprobs, TokenTrace
from deepseek.serve.sampler import Grammar, SamplingConfig
from deepseek.serve.wire import Channel, Heartbeat


@pytest.fixture
def pair():
    ends = [Channel(s) for s in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


def through(pair: list[Channel], message: wire.Message) -> wire.Message:
    pair[0].send(message)
    (got,) = pair[1].receive()
    return got


REQUESTS = [
    Request("a", (1, 2, 3)),
    Request("b", (5,), SamplingConfig(temperature=0, stop=("x", "né"), logit_bias={7: -100.0}, logprobs=3),
            adapter="lora", priority=-1, deadline=2.5, trace=True),
    Request("c", tuple(range(5000)), SamplingConfig(grammar=Grammar(kind="regex", text="a+"), seed=2**62)),
]  # fmt: skip
OUTPUTS = [
    Output("a", "naïve 🙂", (1, 2), prompt_tokens=3, cached_tokens=2),
    Output("b", finish="stop", stop="x"),
    Output(
        "c", "t", (4,), (TokenLogprobs(4, -0.5, 1, ((4, -0.5), (9, -math.inf))),), (None, TokenLogprobs(2, -3.0, 7)),
        (TokenTrace(((1, ((0, 0.75), (3, 0.25))),), ((2, 0.5),)),), stop=4, finish="stop",
    ),
    Output("d", embedding=(0.1, -2.0), finish="stop"),
    Output("e", finish="error", error="no", prompt_logprobs=()),
    output_of({**saying(Output("f", prompt_tokens=3)), "finish": "stop", "logprobs": ()}, "x", (7,)),
    replace(Output("g", "x", (1,)), tokens=(2, 3), finish="length"),
]  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.id)
def test_requests_arrive_as_they_were(request_: Request, pair: list[Channel]) -> None:
    assert wire.unpack_request(through(pair, wire.pack_request(request_))) == request_


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda o: o.id)
def test_outputs_arrive_as_they_were(output: Output, pair: list[Channel]) -> None:
    assert wire.unpack_output(through(pair, wire.pack_output(output))) == output


class Number(int):
    """Not exactly an int."""


def test_numbers_of_other_types_arrive_as_plain_ones(pair: list[Channel]) -> None:
    output = Output("a", tokens=(Number(5),), logprobs=(TokenLogprobs(Number(5), -0.5, 1),))
    got = wire.unpack_output(through(pair, wire.pack_output(output)))
    assert got == Output("a", tokens=(5,), logprobs=(TokenLogprobs(5, -0.5, 1),))
    assert type(got.tokens[0]) is int
    request = Request("a", tuple(np.arange(3)))
    assert wire.unpack_request(through(pair, wire.pack_request(request))).prompt == (0, 1, 2)


def test_info_arrives_as_it_was(pair: list[Channel]) -> None:
    info = ModelInfo("m", "/p", 128, 1000, 64, 10**9, step=5, adapters=("a",), expert_layers=(1, 3))
    assert wire.unpack_info(through(pair, wire.pack_info(info))) == info


@pytest.mark.parametrize(
    "error",
    [RequestError("too long", "prompt"), MissingExtraError("p", "serve", "a"), CheckpointError("bad"), ConfigError("x"),
     CheckpointError(2, "no such file")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_errors_arrive_as_they_were(error: DeepseekError, pair: list[Channel]) -> None:
    got = wire.unpack_error(through(pair, wire.pack_error(error)))
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert getattr(got, "param", None) == getattr(error, "param", None)


def test_every_error_of_the_tree_can_cross(pair: list[Channel]) -> None:
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, DeepseekError) and cls is not MissingExtraError:
            assert type(wire.unpack_error(through(pair, wire.pack_error(cls("text"))))) is cls, name


def test_other_errors_arrive_as_the_nearest_of_ours(pair: list[Channel]) -> None:
    got = wire.unpack_error(through(pair, wire.pack_error(MemoryError("out of it"))))
    assert type(got) is EngineError
    assert "MemoryError: out of it" in str(got)
    assert type(wire.unpack_error(wire.pack_error(EngineDraining("x")))) is EngineError


def test_frames_survive_any_cut() -> None:
    rng = random.Random(0)
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    sent = [("m", i, "x" * rng.choice([0, 1, 7, 3000])) for i in range(50)]
    other = Channel(ours)
    for message in sent:
        other._out += wire._HEAD.pack(len(body := __import__("marshal").dumps(message))) + body
    stream, got = bytes(other._out), []
    while stream:
        n = rng.choice([1, 2, 3, 5, 100, 4096])
        ours.sendall(stream[:n])
        stream = stream[n:]
        got += channel.receive()
    assert got == sent
    ours.close()
    assert channel.receive() == []
    assert channel.closed
    channel.close()


def test_a_side_that_does_not_read_holds_nobody_up(pair: list[Channel]) -> None:
    for i in range(2000):
        pair[0].send(("big", i, "x" * 1000))
    assert pair[0].backlog > 1_000_000
    got = []
    while len(got) < 2000:
        got += pair[1].receive(chunks=1)
        pair[0].flush()
    assert [m[1] for m in got] == list(range(2000))
    assert pair[0].backlog == 0


def test_sending_to_one_that_has_gone_is_no_error(pair: list[Channel]) -> None:
    pair[1].close()
    for _ in range(3):
        pair[0].send(("x",) * 1000)
    assert pair[0].closed
    assert pair[0].backlog == 0


def test_the_heartbeat_is_seen_by_another_mapping(tmp_path: Path) -> None:
    fd = Heartbeat.file()
    ours, theirs = Heartbeat(fd), Heartbeat(fd)
    os.close(fd)
    assert theirs.age == math.inf
    stats = EngineStats(running=3, waiting=2, generated_tokens=2**40 + 1, step_seconds=1.25)
    assert theirs.written == 0
    ours.write(17, stats, 5)
    assert theirs.stats() == stats
    assert theirs.steps == 17
    assert theirs.taken == 5
    written = theirs.written
    ours.touch()
    assert theirs.written == written > 0
    assert 0 <= theirs.age < 5
    ours.close()
    theirs.close()
