"""The metrics page as Prometheus' own parser and linter read it; the access log."""

import json
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fake_client import KEY, TEXT, FakeClient, keyring, serving
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from deepseek.serve.server.metrics import Family, render

#: What vLLM's dashboards ask for.
VLLM = {
    "num_requests_running": "gauge", "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge",
    "gpu_cache_usage_perc": "gauge", "prefix_cache_queries": "counter", "prefix_cache_hits": "counter",
    "num_preemptions": "counter", "prompt_tokens": "counter", "generation_tokens": "counter",
    "request_success": "counter", "spec_decode_num_draft_tokens": "counter",
    "spec_decode_num_accepted_tokens": "counter", "time_to_first_token_seconds": "histogram",
    "time_per_output_token_seconds": "histogram", "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram", "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram", "request_decode_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram", "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram", "iteration_tokens_total": "histogram",
    "request_params_max_tokens": "histogram", "request_params_n": "histogram",
}  # fmt: skip


def fetch(url: str, key: str = "") -> bytes:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def test_metrics_under_vllms_names_with_right_values(tmp_path: Path) -> None:
    name = 'odd "name"\\ of\nmine'
    with serving(FakeClient(delay=0.002), name=name) as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            for stop in range(1, 4):
                client.completions.create(model=name, prompt="the fox", max_tokens=5 * stop)
            client.completions.create(model=name, prompt="the fox", max_tokens=500)
        text = fetch(f"{server.url}/metrics").decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    for short, kind in VLLM.items():
        family = families[f"vllm:{short}"]
        assert family.type == kind, short
        assert all(s.labels["model_name"] == name for s in family.samples), short

    def sample(name: str, **labels: str) -> float:
        found = [s for f in families.values() for s in f.samples
                 if s.name == name and labels.items() <= s.labels.items()]  # fmt: skip
        assert len(found) == 1, (name, labels)
        return float(found[0].value)

    size = len(server.client.tokenizer.encode(TEXT)) + 1
    prompt = len(server.client.tokenizer.prompt("the fox"))
    assert sample("vllm:generation_tokens_total") == 5 + 10 + 15 + size
    assert sample("vllm:prompt_tokens_total") == 4 * prompt
    assert sample("vllm:request_success_total", finished_reason="length") == 3
    assert sample("vllm:request_success_total", finished_reason="stop") == 1
    assert sample("vllm:request_generation_tokens_sum") == 30 + size
    assert sample("vllm:request_generation_tokens_bucket", le="10.0") == 2
    assert sample("vllm:time_to_first_token_seconds_count") == 4
    assert sample("vllm:inter_token_latency_seconds_count") == 30 + size - 4
    assert sample("vllm:inter_token_latency_seconds_sum") >= 0.002 * (30 + size - 4)
    assert sample("http_requests_total", handler="/v1/completions", status="200") == 4
    for family in families.values():
        if family.type == "histogram":
            buckets = [s.value for s in family.samples if s.name.endswith("_bucket")]
            assert buckets, family.name


def test_promtool_finds_no_fault(tmp_path: Path) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed")
    with serving() as server:
        text = fetch(f"{server.url}/metrics")
    done = subprocess.run([tool, "check", "metrics"], input=text, capture_output=True, timeout=60)
    complaints = [
        line for line in done.stderr.decode().splitlines()
        # vLLM's names are given: a colon, and a histogram that ends in _total.
        if "contain ':'" not in line and "iteration_tokens_total" not in line
    ]  # fmt: skip
    assert complaints == []
    assert done.returncode in (0, 3)


def test_a_histogram_counts_what_lies_on_a_bound_below_it() -> None:
    family = Family("x", "a\\b\nc", "histogram", (), (1, 2.5))
    for value in (0.5, 1, 2.5, 3):
        family.observe(value)
    assert render([family]).decode().splitlines() == [
        "# HELP x a\\\\b\\nc", "# TYPE x histogram", 'x_bucket{le="1.0"} 2', 'x_bucket{le="2.5"} 3',
        'x_bucket{le="+Inf"} 4', "x_sum 7", "x_count 4",
    ]  # fmt: skip


def test_the_log_tells_sizes_and_times_and_not_a_word_of_what_was_said(tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    with serving(keys=keyring(), log=str(file)) as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            client.completions.create(model="fake", prompt="a secret prompt", max_tokens=3)
        fetch(f"{server.url}/health")
    lines: list[Any] = [json.loads(line) for line in file.read_text().splitlines()]
    done, health = lines
    assert done["key"] == "alice"
    assert (done["method"], done["route"], done["status"]) == ("POST", "/v1/completions", 200)
    assert (done["model"], done["generated_tokens"], done["finish"]) == ("fake", 3, "length")
    assert done["prompt_tokens"] == len(server.client.tokenizer.prompt("a secret prompt"))
    assert done["cached_tokens"] == done["prompt_tokens"] // 2
    assert 0 <= done["ttft"] <= done["seconds"]
    assert health["route"] == "/health"
    assert "secret" not in file.read_text()
    assert "Hello" not in file.read_text()
    assert KEY not in file.read_text()
