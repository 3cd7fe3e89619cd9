"""``deepseek serve`` as a process: a real engine on a tiny model, its address, its end; and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_client import ADMIN, KEY, tokenizer
from openai import OpenAI

from deepseek.cli import main
from deepseek.models import ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.weights.convert import save_hf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    words = tokenizer()
    words.save(place / "tokenizer")
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=words.vocab_size, hidden=32, layers=2, ffn=48, pattern="HF", max_length=256,
        attention=AttentionConfig(heads=2, kv_heads=1, head_dim=16, window=32, block=16, stride=16),
        moe=MoEConfig(experts=4, top_k=2, expert_ffn=16),
    )  # fmt: skip
    save_hf(Transformer(config).eval(), place / "tiny", place / "tokenizer")
    return place / "tiny"


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``deepseek serve`` and its address."""
    command = [sys.executable, "-m", "deepseek", "serve", *arguments, "--port", "0", "--memory-gib", "0.1"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert "is served at http://127.0.0.1:" in line, running.communicate(timeout=120)
        yield running, line.split()[-1]
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate(timeout=120)


@pytest.mark.slow
def test_a_real_model_is_served_and_ends_politely(model: Path) -> None:
    with process(str(model), DEEPSEEK_API_KEYS=f"alice={KEY}") as (running, url):
        client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)
        (card,) = client.models.list().data
        assert card.id == "tiny"
        one = client.completions.create(
            model="tiny", prompt="the fox", max_tokens=8, temperature=0, logprobs=2
        )
        ids = client.completions.create(model="tiny", prompt=["the fox"] * 3, max_tokens=8, temperature=0)
        assert {c.text for c in ids.choices} == {one.choices[0].text}
        echoed = client.completions.create(
            model="tiny", prompt="the fox", max_tokens=0, echo=True, logprobs=1
        )
        found = echoed.choices[0].logprobs
        assert found is not None
        assert found.token_logprobs is not None
        assert found.token_logprobs[0] is None
        assert all(p is not None and p < 0 for p in found.token_logprobs[1:])
        chosen = client.completions.create(
            model="tiny",
            prompt="x",
            max_tokens=20,
            extra_body={"structured_outputs": {"choice": ["fox", "dog"]}},
        )
        assert chosen.choices[0].text in ("fox", "dog")
        messages: Any = [{"role": "user", "content": "Hi"}]
        text = ""
        for chunk in client.chat.completions.create(
            model="tiny", messages=messages, stream=True, max_tokens=12, seed=1, extra_body={"trace": True}
        ):
            text += chunk.choices[0].delta.content or ""
        again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, seed=1)
        assert again.choices[0].message.content == text
        vectors = client.embeddings.create(model="tiny", input=["the fox", "the dog"])
        assert abs(sum(x * x for x in vectors.data[0].embedding) - 1) < 1e-3
        with pytest.raises(Exception, match=r"does not compile|grammar|regex"):
            client.completions.create(
                model="tiny", prompt="x", extra_body={"structured_outputs": {"regex": "(("}}
            )
        request = urllib.request.Request(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"})
        end, usage = time.monotonic() + 60, ""
        while usage != "0":  # which the step process tells after its answers
            assert time.monotonic() < end, usage
            with urllib.request.urlopen(request, timeout=120) as answer:
                usage = (
                    answer.read().decode().split('vllm:kv_cache_usage_perc{model_name="tiny"} ')[1].split()[0]
                )
        client.close()
        running.send_signal(signal.SIGTERM)
        _, log = running.communicate(timeout=120)
        assert running.returncode == 0, log
        lines = [json.loads(line) for line in log.splitlines()]
        assert {line["key"] for line in lines} == {"alice"}
        assert "fox" not in log


@pytest.mark.slow
def test_a_reload_drops_nothing(model: Path) -> None:
    with process(str(model), "--log", "", DEEPSEEK_ADMIN_KEYS=ADMIN) as (running, url):
        client = OpenAI(base_url=f"{url}/v1", api_key=ADMIN, max_retries=0, timeout=120)
        stream = client.completions.create(
            model="tiny",
            prompt="the fox",
            max_tokens=200,
            stream=True,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        chunks = [next(stream)]
        told: Any = client.post(f"{url}/admin/reload", body={"path": str(model)}, cast_to=object)
        assert told["model"]["id"] == "tiny"
        after = client.completions.create(
            model="tiny", prompt="the fox", max_tokens=200, temperature=0, extra_body={"ignore_eos": True}
        )
        chunks += list(stream)
        assert "".join(c.choices[0].text for c in chunks) == after.choices[0].text
        with pytest.raises(Exception, match="nothing at"):
            client.post(f"{url}/admin/reload", body={"path": "/nowhere"}, cast_to=object)
        client.close()
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nowhere"], 2, "there is no model at nowhere"),
        (["{model}", "--host", "0.0.0.0"], 2, "give --keys-file FILE"),
        (["{model}", "--keys-file", "none.toml"], 2, "no config file none.toml"),
        (["{model}", "--adapter", "polite"], 2, "must be NAME=DIRECTORY"),
        (["{model}", "--adapter", "a=x", "a=y"], 2, "x and y are both named 'a'"),
        (["{model}", "--adapter", "a=x", "tiny=y"], 2, "'tiny=y' has the name of the model itself"),
        (["{model}", "--name", "a", "--adapter", "a=x"], 2, "'a=x' has the name of the model itself"),
        (["{model}", "--adapter", "a\nb=x"], 2, "printable"),
        (["{model}", "--adapter", "a=x", "--adapter", "b=x"], 2, "--adapter is given 2 times"),
        (["{model}", "--max-waiting", "-1"], 2, "max_waiting=-1"),
        (["{model}", "--speculate", "1000"], 2, "speculate=1000"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(
    model: Path, capsys: Any, monkeypatch: Any, arguments: list[str], status: int, words: str
) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEYS", raising=False)
    assert main(["serve", *(a.format(model=model) for a in arguments)]) == status
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "deepseek", "serve", str(tmp_path), "--port", "0"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
