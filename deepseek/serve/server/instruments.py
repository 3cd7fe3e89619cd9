"""The metrics of a serving front end: those of vLLM's server by name and type, and those of HTTP.

Gauges and counters of the engine are read from its ``EngineStats``; times are measured here, where the client's wait is
felt. ``iteration_tokens_total`` is told from the engine's counters once a second, as the mean over the steps between.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from deepseek.serve.request import EngineStats, Output
from deepseek.serve.server.access_log import Record
from deepseek.serve.server.metrics import Family, render

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
           160.0)  # fmt: skip
BETWEEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
)
LONG = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
TOKENS = (
    1,
    2,
    5,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
REASONS = ("stop", "length", "abort", "timeout", "error")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
MODEL = ("model_name",)


def _gauge(name: str, about: str) -> Family:
    return Family(f"vllm:{name}", about, "gauge", MODEL)


def _counter(name: str, about: str) -> Family:
    return Family(f"vllm:{name}_total", about, "counter", MODEL)


def _histogram(name: str, about: str, bounds: tuple[float, ...]) -> Family:
    return Family(f"vllm:{name}", about, "histogram", MODEL, bounds)


@dataclass
class Progress:
    """One sequence's times, from which its histograms come. ``time.monotonic`` seconds."""

    began: float
    queued: float = 0.0
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish: str = ""


class ServerMetrics:
    """All families of one server, and how they change."""

    def __init__(self) -> None:
        self.http = Family(
            "http_requests_total", "HTTP requests answered.", "counter", ("method", "handler", "status")
        )
        self.http_seconds = Family("http_request_duration_seconds", "Seconds until the end of an answer.",
                                   "histogram", ("method", "handler"), LONG)  # fmt: skip
        self.running = _gauge("num_requests_running", "Sequences being computed.")
        self.waiting = _gauge("num_requests_waiting", "Sequences waiting to be computed.")
        self.inside = _gauge("num_requests_admitted", "Sequences let in and not finished.")
        self.left = Family("deepseek_prompt_tokens_left", "Prompt tokens left to compute, of waiting and running "
                           "sequences.", "gauge", MODEL)  # fmt: skip
        self.cache = _gauge("kv_cache_usage_perc", "Share of the cache's pages in use; 1 is all.")
        self.cache_old = _gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc.")
        self.queries = _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.hits = _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.preemptions = _counter("num_preemptions", "Sequences put back for want of memory.")
        self.drafted = _counter("spec_decode_num_draft_tokens", "Tokens proposed by speculation.")
        self.accepted = _counter("spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.")
        self.prompt = _counter("prompt_tokens", "Prompt tokens of finished prefills.")
        self.generated = _counter("generation_tokens", "Tokens generated.")
        self.success = Family("vllm:request_success_total", "Sequences finished, by reason.", "counter",
                              ("model_name", "finished_reason"))  # fmt: skip
        self.first = _histogram("time_to_first_token_seconds", "Seconds until the first token.", SECONDS)
        self.between = _histogram("inter_token_latency_seconds", "Seconds between two tokens.", BETWEEN)
        self.between_old = _histogram(
            "time_per_output_token_seconds", "Older name of inter_token_latency_seconds.", BETWEEN
        )
        self.mean = _histogram(
            "request_time_per_output_token_seconds", "A sequence's mean seconds per token.", BETWEEN
        )
        self.whole = _histogram(
            "e2e_request_latency_seconds", "Seconds from a request's arrival to its end.", LONG
        )
        self.queue = _histogram("request_queue_time_seconds", "Seconds in the queue.", LONG)
        self.prefill = _histogram(
            "request_prefill_time_seconds", "Seconds from the queue to the first token.", LONG
        )
        self.decode = _histogram(
            "request_decode_time_seconds", "Seconds from the first token to the last.", LONG
        )
        self.inference = _histogram(
            "request_inference_time_seconds", "Seconds from the queue to the last token.", LONG
        )
        self.prompt_sizes = _histogram("request_prompt_tokens", "Prompt tokens of a sequence.", TOKENS)
        self.answer_sizes = _histogram("request_generation_tokens", "Generated tokens of a sequence.", TOKENS)
        self.most = _histogram("request_params_max_tokens", "max_tokens of a sequence.", TOKENS)
        self.n = _histogram("request_params_n", "n of a request.", (1, 2, 5, 10, 20))
        self.steps = _histogram("iteration_tokens_total", "Tokens computed by a step.", STEP)
        self._stats = EngineStats()
        self._model = ""

    def answered(self, record: Record) -> None:
        method = record.method if record.method in METHODS else "other"
        self.http.add(1, method, record.route, str(record.status))
        self.http_seconds.observe(time.monotonic() - record.began, method, record.route)

    def progress(self, model: str, progress: Progress, output: Output, now: float) -> None:
        """A sequence gained ``output``."""
        count = len(output.tokens)
        progress.prompt_tokens = output.prompt_tokens or progress.prompt_tokens
        progress.cached_tokens = output.cached_tokens or progress.cached_tokens
        progress.queued = output.queued or progress.queued
        if count:
            if progress.first is None:
                progress.first = now
                self.first.observe(now - progress.began, model)
                self.prompt.add(progress.prompt_tokens, model)
            else:
                each = (now - progress.last) / count
                self.between.observe(each, model, times=count)
                self.between_old.observe(each, model, times=count)
            progress.last = now
            progress.tokens += count
            self.generated.add(count, model)
        if output.finish is not None:
            self.ended(model, progress, output.finish, now)

    def ended(self, model: str, progress: Progress, reason: str, now: float) -> None:
        """A sequence is over, once."""
        if progress.finish:
            return
        progress.finish = reason
        self.success.add(1, model, reason if reason in REASONS else "error")
        if reason not in ("stop", "length"):
            return
        self.whole.observe(now - progress.began, model)
        self.prompt_sizes.observe(progress.prompt_tokens, model)
        self.answer_sizes.observe(progress.tokens, model)
        self.queue.observe(progress.queued, model)
        if progress.first is not None:
            self.prefill.observe(max(0.0, progress.first - progress.began - progress.queued), model)
            self.decode.observe(progress.last - progress.first, model)
            self.inference.observe(max(0.0, progress.last - progress.began - progress.queued), model)
            if progress.tokens > 1:
                self.mean.observe((progress.last - progress.first) / (progress.tokens - 1), model)

    def look(self, model: str, stats: EngineStats) -> None:
        """Once a second: the tokens of the steps since the last look, as that many steps of equal size."""
        before, self._stats = self._stats, stats
        steps = stats.steps - before.steps
        tokens = (stats.prompt_tokens + stats.generated_tokens) - (
            before.prompt_tokens + before.generated_tokens
        )
        if steps > 0 and tokens >= 0:
            self.steps.observe(tokens / steps, model, times=steps)

    def render(self, model: str, stats: EngineStats, inside: int) -> bytes:
        """All of it as text."""
        if model != self._model:
            self._model = model
            for family in self._families():
                if family.labels == MODEL:
                    family.touch(model)
            for reason in REASONS:
                self.success.touch(model, reason)
        usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        read = {
            self.running: stats.running, self.waiting: stats.waiting, self.inside: inside, self.cache: usage,
            self.left: stats.prompt_rows,
            self.cache_old: usage, self.queries: stats.prefix_queries, self.hits: stats.prefix_hits,
            self.preemptions: stats.preemptions, self.drafted: stats.drafted, self.accepted: stats.accepted,
        }  # fmt: skip
        for family, value in read.items():
            family.only(value, model)
        return render(self._families())

    def _families(self) -> list[Family]:
        return [value for value in vars(self).values() if isinstance(value, Family)]
