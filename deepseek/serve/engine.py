"""The engine: many requests, one model, one ``step`` at a time.

    engine = Engine.load("runs/quickstart")
    engine.add(Request("a", tuple(engine.tokenizer.prompt("def main("))))
    while engine.has_work:
        for output in engine.step():
            print(output.text, end="")

``step`` schedules, runs the model over the scheduled rows, samples, and tells what each request gained. Where the next
step can be launched before this one's tokens are known, it is (``serve.ahead``), and stays in flight between two calls.
The engine owns no thread and no socket; ``serve.worker`` puts it in a process of its own.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from deepseek.assemble import Loaded, pick_device
from deepseek.assemble import load as load_model
from deepseek.data import Tokenizer
from deepseek.errors import ConfigError, EngineError, RequestError
from deepseek.precision import choose
from deepseek.serve.adapters import AdapterBank, load_adapter
from deepseek.serve.ahead import InFlight
from deepseek.serve.answer import Answer, Traces, Wordless, completion, output_of, saying
from deepseek.serve.budget import FeedbackBudget
from deepseek.serve.decoder import Decoder, cache_dtype, compute_dtype
from deepseek.serve.engine_config import EngineConfig, default_running
from deepseek.serve.generate import Completion
from deepseek.serve.grammar import PARAM, Grammars, GrammarState
from deepseek.serve.graphs import DecodeGraphs, Size
from deepseek.serve.launcher import Launcher
from deepseek.serve.memory import cache_budget
from deepseek.serve.pages import PageLayout, Pages, share_memory
from deepseek.serve.request import (
    EngineStats,
    FinishReason,
    ModelInfo,
    Output,
    Request,
)
from deepseek.serve.sampler import SamplingConfig
from deepseek.serve.sampling import Sampled, SamplingState
from deepseek.serve.scheduler import Scheduled, Scheduler, StaticBudget, Work, rows_of
from deepseek.serve.speculative import NgramProposer
from deepseek.serve.text import TextStream, begins_text
from deepseek.weights.gguf_parts import model_name


class Engine:
    """A model, its cache, and the requests on their way."""

    def __init__(self, loaded: Loaded, config: EngineConfig = EngineConfig()) -> None:  # noqa: B008
        self.config, self.device = config, pick_device(config.device)
        self.format = _format(config, self.device)
        self.path, self.training_step, self._tokenizer = loaded.path, loaded.step, loaded.tokenizer
        self.parameters = sum(p.numel() for p in loaded.model.parameters())
        shape = self.shape = loaded.model.config
        self.max_length = min(config.max_length or shape.max_length, shape.max_length)
        if self.max_length < 2:
            raise ConfigError(
                f"max_length={self.max_length} has no room for a prompt and an answer: at least 2"
            )
        cpu = self.device.type == "cpu"
        running = config.max_running or default_running(cpu)
        step = max(config.max_step_tokens or (512 if cpu else 4096), running)
        dtype = compute_dtype(self.format, self.device)
        layout = PageLayout.of(shape, cache_dtype(self.format).itemsize, config.page)
        self.decoder = Decoder(
            loaded.model, layout, format=self.format, device=self.device, max_running=running,
            max_length=self.max_length, exact=config.deterministic,
        )  # fmt: skip
        budget = cache_budget(self.device, config.memory_gib)  # of what the weights leave
        counts = share_memory(layout, budget, running, step, self.max_length)
        self.decoder.allocate(counts)
        self.pages = Pages(layout, *counts, prefix_cache=config.prefix_cache)
        low = min(16, step)
        self.feedback = (
            FeedbackBudget(config.step_goal, min(256, step), low, step) if config.step_goal else None
        )
        self.scheduler = Scheduler(
            self.pages, max_running=running, budget=self.feedback or StaticBudget(step)
        )
        self.vocabulary = min(
            loaded.tokenizer.vocab_size if loaded.tokenizer else shape.vocab_size, shape.vocab_size
        )
        adapters = {name: load_adapter(place, shape) for name, place in config.adapters.items()}
        kept = "bf16" if dtype == torch.bfloat16 else "fp32"
        self.bank = AdapterBank(adapters, kept, self.device, exact=config.deterministic)
        captured = config.graphs and self.device.type == "cuda"
        most = Size(running, self.decoder.tables.width)
        graphs = DecodeGraphs(self.decoder, most, self.vocabulary) if captured else None
        self.launcher = Launcher(self.decoder, self.vocabulary, graphs, self.bank)
        self.ahead = captured if config.ahead is None else config.ahead
        self._flight: InFlight | None = None
        self._read_at = 0.0  #: when the last step was read
        self.grammars = Grammars(self._tokenizer, self.vocabulary) if self._tokenizer else None
        self._words = self._tokenizer or cast(Tokenizer, Wordless())
        self._live: dict[str, Scheduled] = {}
        self._timed: dict[str, Scheduled] = {}  #: those of them that have a deadline
        self._totals: dict[str, Any] = defaultdict(int)

    @classmethod
    def load(cls, path: Path | str, config: EngineConfig = EngineConfig()) -> Engine:  # noqa: B008
        """An engine for a run, a checkpoint, a Hugging Face directory or a GGUF file.

        Raises:
            RunError, CheckpointError, WeightsError: what was found instead. ConfigError: it does not fit in memory.
        """
        return cls(load_model(path, dtype="kept"), config)

    # --- what a front end asks ---------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ``EngineError`` when the model came without one."""
        if self._tokenizer is None:
            raise EngineError(f"{self.path} has no tokenizer.json: prompts must be token ids")
        return self._tokenizer

    @property
    def info(self) -> ModelInfo:
        shape, path = self.shape, self.path
        return ModelInfo(
            name=self.config.name or model_name(path), path=str(path), max_length=self.max_length,
            vocab_size=self.vocabulary, hidden=shape.hidden,
            parameters=self.parameters, step=self.training_step,
            adapters=self.bank.names, experts=shape.moe.experts,
            expert_layers=tuple(i for i, kind in enumerate(shape.ffn_kinds) if kind == "E"),
            hybrid_layers=tuple(i for i, kind in enumerate(shape.kinds) if kind == "H"),
        )  # fmt: skip

    def add(self, request: Request) -> None:
        """Let a request wait its turn.

        Raises:
            RequestError: it can never be served.
        """
        self._check(request)
        sampling = request.sampling
        room = min(sampling.max_tokens, self.max_length - len(request.prompt))
        if room < sampling.max_tokens:
            least = min(sampling.min_tokens, room)
            sampling = replace(sampling, max_tokens=max(room, 1), min_tokens=least)
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        tokenizer = self._tokenizer
        ends = tokenizer.end_ids if tokenizer is not None else ()
        state = SamplingState(
            sampling, request.prompt, seed, self.vocabulary, self._grammar(request), end_ids=ends
        )
        proposer = NgramProposer() if self.config.speculate else None
        if proposer is not None:
            proposer.extend(request.prompt)
        words = self._words
        answer = Answer(
            state, TextStream(words, sampling, ends, first=begins_text(words, request.prompt)), room, proposer,
            self.bank.index(request.adapter),
            [] if sampling.prompt_logprobs is not None else None,
            more=sampling.logprobs is not None or request.trace,
        )  # fmt: skip
        salt = b"" if request.adapter is None else request.adapter.encode()
        most = len(request.prompt) + sampling.max_tokens
        sequence = Scheduled(request, list(request.prompt), salt=salt, engine=answer, most=most)
        self._live[request.id] = sequence
        if request.deadline is not None:
            self._timed[request.id] = sequence
        self.scheduler.add(sequence)

    def prepared(self, request: Request) -> bool:
        """Whether ``add`` takes no time worth mentioning; if not, ``prepare`` first, in another thread."""
        grammar = request.sampling.grammar
        return grammar is None or self.grammars is None or self.grammars.knows(grammar)

    def prepare(self, request: Request) -> None:
        """Compile the grammar of a request; what is wrong with it, ``add`` will say."""
        with contextlib.suppress(RequestError):
            self._grammar(request)

    def abort(self, id: str, reason: FinishReason = "abort") -> bool:
        """Forget a request, wherever it is; whether it was there."""
        sequence = self._live.get(id)
        if sequence is not None:
            self._drop(sequence)
        return sequence is not None

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do, if only to read what is in flight."""
        return self._flight is not None or self.scheduler.has_work

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running), waiting=len(scheduler.waiting),
            pages_total=self.pages.total, pages_used=self.pages.used, preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries, prefix_hits=scheduler.prefix_hits,
            prompt_rows=scheduler.prompt_rows, rows=scheduler.rows, **self._totals,
        )  # fmt: skip

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Schedule, run, sample; what the step adds that was read. Running ahead, another one is in flight by then.

        A request that goes wrong ends with ``finish='error'`` and hurts nobody else.
        """
        outputs = self._expire()
        flight = self._flight or self._start()
        if flight is None:
            return outputs
        self._flight = self._follow(flight) if self.ahead else None
        outputs += self._read(flight)
        if self.ahead and self._flight is None:
            self._flight = self._start()  # planning it took the tokens; what is done with them can wait
        return outputs

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: SamplingConfig | None = None
    ) -> list[Completion]:
        """The continuation of every prompt, all at once; the convenient way when no server is needed.

        Raises:
            RequestError: a prompt can never be served; then none is. EngineError: others' requests are on their way,
                whose outputs would be lost, or an answer failed.
        """
        if self._live:
            raise EngineError(f"{len(self._live)} requests are on their way: step until has_work is false")
        done: dict[str, list[Output]] = {}
        began = time.perf_counter()
        try:
            for index, prompt in enumerate(prompts):
                ids = self.tokenizer.prompt(prompt) if isinstance(prompt, str) else prompt
                request = Request(f"generate-{index}", tuple(ids), sampling or SamplingConfig())
                self.add(request)
                done[request.id] = []
        except Exception:
            for name in done:
                self.abort(name)
            raise
        while self.has_work:
            for output in self.step():
                done[output.id].append(output)
        seconds = time.perf_counter() - began
        for outputs in done.values():
            if outputs[-1].finish == "error":
                raise EngineError(outputs[-1].error)
        return [completion(outputs, seconds) for outputs in done.values()]

    # --- parts of a step ----------------------------------------------------------------------------------------------

    def _start(self) -> InFlight | None:
        """Plan a step from all that is known, and launch it."""
        began = time.perf_counter()
        self._propose()
        plan = self.scheduler.plan()
        for sequence in plan.preempted:
            self.decoder.tables.leave(sequence)
        if not plan.work:
            return None
        work = plan.work
        if rows_of(work) > len(work):
            work.sort(key=lambda w: w.rows != 1)
        flight = self.launcher.start(work, began)
        flight.follows = (
            self.ahead
            and flight.simple
            and len(flight.sampling) == len(work) == len(self.scheduler.running)
            and all(w.sequence.engine.state.foreseeable for w in work)
        )
        return flight

    def _follow(self, flight: InFlight) -> InFlight | None:
        """Launch the step after ``flight``, whose tokens nobody has seen, as if all went on but for the ends in sight.

        ``None`` where that takes the host: see ``InFlight.follows`` and ``Scheduler.follow``.
        """
        began = time.perf_counter()
        if len(flight.counting) != len(self.scheduler.running):
            return None
        work = self.scheduler.follow(flight.going())
        return self.launcher.follow(work, flight, began) if work else None

    def _read(self, flight: InFlight) -> list[Output]:
        """Wait for a step's tokens; what follows from them, and from its prompts."""
        tokens = flight.tokens()
        drawn = iter(flight.read() if tokens is None else ())
        for sequence in flight.redrawn:
            self._discard(sequence)
        outputs = list[Output]()
        if tokens is not None:
            outputs = self._append(flight, tokens)
            self._time(flight)
            return outputs
        traces = Traces(flight.traced) if flight.traced is not None else None
        end = 0
        for w, samples in zip(flight.work, flight.samples):
            first, end = end, end + w.rows
            sampled = next(drawn) if samples else None
            if not flight.counts(w):
                continue
            answer: Answer = w.sequence.engine
            if w.sequence.request.embed:
                self.scheduler.advance(w, w.rows)  # before its end, which gives its pages back
                outputs += self._embed(w, flight.hidden[first:end])
                continue
            if answer.reads(w):
                answer.read_prompt(w, flight.hidden[first:end], self.launcher.logits)
            if sampled is None:
                self.scheduler.advance(w, w.rows)
            else:
                outputs.append(self._extend(w, sampled, traces, end - w.drafts - 1))
        self._time(flight)
        return outputs

    def _append(self, flight: InFlight, tokens: list[int]) -> list[Output]:
        """``_read`` where every sequence that drew has one token, and most have nothing else to tell."""
        going, drawn = flight.counting, list(zip(flight.sampling, tokens, flight.logprobs() or repeat(None)))
        if len(going) < len(flight.work):
            drawn = [one for one in drawn if flight.counts(one[0])]
        self.scheduler.advance_all(going)
        self._totals["generated_tokens"] += len(drawn)
        outputs = list[Output]()
        for (sequence, *_), token, logprobs in drawn:
            answer: Answer = sequence.engine
            sequence.tokens.append(token)
            answer.state.accept(token)
            text = answer.text.push(token)
            if answer.said is not None and not (answer.more or answer.text.finish):
                outputs.append(output_of(answer.said, text, (token,)))
            else:
                outputs.append(self._tell(sequence, text, [Sampled(token, logprobs)]))
        return outputs

    def _extend(self, work: Work, sampled: list[Sampled], traces: Traces | None, row: int) -> Output:
        """Append what was sampled, as far as the answer goes on, and say so."""
        sequence, answer, totals = work.sequence, work.sequence.engine, self._totals
        kept, text = answer.extend(sampled)
        if not kept:
            return self._end(sequence, "error", error=f"{sampled[0].error}; {self._advice()}")
        sequence.tokens += kept
        sequence.draft = []
        totals["generated_tokens"] += len(kept)
        totals["drafted"] += work.drafts
        totals["accepted"] += len(kept) - 1
        # Rows whose token came out as drafted are final; the token sampled last has not been computed.
        self.scheduler.advance(work, work.rows - work.drafts + len(kept) - 1)
        if answer.proposer is not None:
            answer.proposer.extend(kept)
            if work.drafts:
                answer.proposer.learn(work.drafts, len(kept) - 1)
        return self._tell(sequence, text, sampled[: len(kept)], traces, row)

    def _tell(
        self, sequence: Scheduled, text: str, sampled: Sequence[Sampled], traces: Traces | None = None, row: int = 0
    ) -> Output:  # fmt: skip
        """The output that says what was appended; the end, if it is one."""
        answer: Answer = sequence.engine
        more: dict[str, Any] = {}
        if answer.said is None:
            same = Output(
                sequence.request.id, prompt_tokens=sequence.prompt_length, cached_tokens=sequence.cached,
                queued=sequence.queued,
            )  # fmt: skip
            answer.said = saying(same)
            self._totals["prompt_tokens"] += sequence.prompt_length
            if answer.prompt_logprobs is not None:
                more["prompt_logprobs"] = tuple(answer.prompt_logprobs)
        if sequence.request.sampling.logprobs is not None:
            more["logprobs"] = tuple(s.logprobs for s in sampled)
        if traces is not None and sequence.request.trace:
            more["traces"] = tuple(traces.at(row + i) for i in range(len(sampled)))
        if answer.text.finish:
            more |= {"finish": answer.text.finish, "stop": answer.text.stop}
            self._drop(sequence)
        return output_of({**answer.said, **more}, text, tuple(s.token for s in sampled))

    def _time(self, flight: InFlight) -> None:
        """The seconds that a step took: from its beginning, or from the end of the step before, to now."""
        now = time.perf_counter()
        seconds = now - max(flight.began, self._read_at)
        self._read_at = now
        self._totals["steps"] += 1
        self._totals["step_seconds"] += seconds
        if self.feedback is not None:
            answers = sum(w.rows for w in flight.work if w.start >= w.sequence.prompt_length)
            self.feedback.observe(seconds, answers, rows_of(flight.work) - answers)

    def _embed(self, work: Work, hidden_NC: Tensor) -> list[Output]:
        """The embedding, once the prompt is read to its end."""
        sequence, answer = work.sequence, work.sequence.engine
        mean = answer.embed(work, hidden_NC)
        if mean is None:
            return []
        if not bool(torch.isfinite(mean).all()):
            error = f"the hidden states of the prompt are not finite; {self._advice()}"
            return [self._end(sequence, "error", error=error)]
        self._totals["prompt_tokens"] += sequence.prompt_length
        return [self._end(sequence, "stop", embedding=tuple(mean.float().tolist()))]

    def _propose(self) -> None:
        if not self.config.speculate:
            return
        for sequence in self.scheduler.running:
            answer: Answer = sequence.engine
            if sequence.decoding and answer.proposer is not None:
                most = min(self.config.speculate, answer.room - len(answer.state.tokens) - 1)
                sequence.draft = answer.proposer.propose(most) if most > 0 else []

    def _expire(self) -> list[Output]:
        """End what is past its deadline."""
        if not self._timed:
            return []
        now, late = time.monotonic(), list[Scheduled]()
        for sequence in self._timed.values():
            deadline = sequence.request.deadline
            if deadline is not None and now - sequence.arrival > deadline:
                late.append(sequence)
        return [self._end(sequence, "timeout") for sequence in late]

    def _end(
        self, sequence: Scheduled, reason: FinishReason, *, error: str = "", embedding: tuple[float, ...] | None = None
    ) -> Output:  # fmt: skip
        tail = sequence.engine.text.close(reason)
        self._drop(sequence)
        return Output(
            sequence.request.id, text=tail, embedding=embedding, finish=reason, error=error,
            prompt_tokens=sequence.prompt_length, cached_tokens=sequence.cached,
        )  # fmt: skip

    def _drop(self, sequence: Scheduled) -> None:
        """Forget a sequence."""
        self._live.pop(sequence.request.id, None)
        self._timed.pop(sequence.request.id, None)
        self._discard(sequence)
        self.scheduler.remove(sequence)
        self.decoder.tables.leave(sequence)

    def _discard(self, sequence: Scheduled) -> None:
        """What is in flight for a sequence counts for nothing."""
        if self._flight is not None:
            self._flight.drop(sequence)
            if not self._flight.alive:
                self._flight = None

    def _advice(self) -> str:
        return (
            f"the weights of {self.path} are bad, or {self.format} is too narrow for them; "
            "try an earlier checkpoint or precision='fp32'"
        )

    def _grammar(self, request: Request) -> GrammarState | None:
        if request.sampling.grammar is None:
            return None
        if self.grammars is None:
            raise RequestError("a grammar needs a tokenizer, and the model came without one", PARAM)
        return self.grammars.state(request.sampling.grammar)

    def _check(self, request: Request) -> None:
        if request.id in self._live:
            raise RequestError(f"a request with the id {request.id!r} is on its way already")
        length, top = len(request.prompt), self.vocabulary
        if not length:
            raise RequestError(
                "an empty prompt has nothing to continue; give at least the start token", "prompt"
            )
        if bad := [i for i in request.prompt if not 0 <= i < top]:
            raise RequestError(f"token id {bad[0]} is outside the vocabulary of {top}", "prompt")
        if length > self.max_length - (0 if request.embed else 1):
            raise RequestError(
                f"the prompt has {length} tokens; with one token of answer there is room for {self.max_length - 1}",
                "prompt",
            )
        self.bank.index(request.adapter)
        sampling = request.sampling
        for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            if outside := [i for i in ids if not 0 <= i < top]:
                raise RequestError(f"token id {outside[0]} is outside the vocabulary of {top}", name)
        if sampling.stop and self._tokenizer is None:
            raise RequestError("stop texts need a tokenizer, and the model came without one", "stop")


def _format(config: EngineConfig, device: torch.device) -> str:
    """The weight format: as configured, or measured."""
    if config.precision == "int8" and device.type != "cpu":
        raise ConfigError("precision='int8' serves on a CPU; on an accelerator use 'bf16'")
    if config.deterministic and device.type == "cpu":
        if config.precision not in ("auto", "fp32"):
            raise ConfigError(f"deterministic=true needs precision='fp32' on a CPU, not {config.precision!r}")
        return "fp32"
    return config.precision if config.precision == "int8" else choose(config.precision, device).name
