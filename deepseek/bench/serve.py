"""``deepseek bench serve``: decoding by our engine and by peers, the same requests in one run.

Every stack gets the same weights (a Hugging Face directory written for the run, or the one named), the same prompts as
token ids and the same number of tokens to answer, greedily and without end tokens. A stack runs in a process of its
own, one after the other, with all the cores. Counted are seconds until the first request can be taken (imports and
loading included), time to first token, and tokens per second of all streams together; ours also says which share of the
copy bandwidth, measured in the same run, the bytes it had to read make up (MBU).

Peers: ``transformers`` (``generate`` with its best cache; ``generate_batch``, its continuous batching, on a GPU) and
``vllm``, which wants an environment of its own: ``--vllm-python PATH``. A peer that does not run is noted with its
reason.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek.assemble import load as load_model
from deepseek.bench.ceilings import copy_tb_per_s
from deepseek.bench.report import BenchOptions, Report
from deepseek.config import replace
from deepseek.errors import ConfigError, did_you_mean
from deepseek.models import PRESETS, ModelConfig, Transformer
from deepseek.nn.attention import AttentionConfig
from deepseek.nn.moe import MoEConfig
from deepseek.serve.engine import Engine
from deepseek.serve.engine_config import EngineConfig, Precision, step_environment
from deepseek.serve.request import Request
from deepseek.serve.sampler import SamplingConfig
from deepseek.weights.convert import save_hf

STACKS = ("ours", "transformers", "vllm")


def small_moe() -> ModelConfig:
    """What the CPU comparison serves: Qwen3-MoE's shape, 16 experts, top-2; 64M parameters, 20M active."""
    return ModelConfig(
        vocab_size=8192, hidden=512, layers=8, ffn=1536, pattern="F", max_length=2048, tie_embeddings=False,
        attention=AttentionConfig(heads=8, kv_heads=2, head_dim=64, qk_norm=True),
        moe=MoEConfig(experts=16, top_k=2, expert_ffn=256),
    )  # fmt: skip


def small_window() -> ModelConfig:
    """A sliding-window model of Mistral's shape, for a CPU."""
    return replace(
        small_moe(), pattern="L", moe=MoEConfig(),
        attention=AttentionConfig(heads=8, kv_heads=2, head_dim=64, window=128),
    )  # fmt: skip


def window_856m() -> ModelConfig:
    """``dense_856m`` with a window of 1,024 in every layer."""
    dense = PRESETS["dense_856m"](pattern="L")
    return replace(dense, attention=replace(dense.attention, window=1024))


SHAPES: dict[str, Callable[[], ModelConfig]] = {
    "small_moe": small_moe, "small_window": small_window, "window_856m": window_856m,
    "dense_856m": PRESETS["dense_856m"], "moe_64x2": PRESETS["moe_64x2"],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """Decoding speed of serving stacks, side by side."""

    model: str = (
        "small_moe"  # a shape (small_moe, small_window, window_856m, dense_856m, moe_64x2) or a directory
    )
    streams: tuple[int, ...] = (1, 32)  # requests at once
    prompt: int = 128  # tokens of every prompt
    answer: int = 128  # tokens of every answer
    stacks: tuple[str, ...] = ("ours", "transformers")
    vllm_python: str = ""  # the interpreter of an environment that has vllm; adds the stack 'vllm'
    precision: Precision = "auto"  # of ours; peers take bf16 unless it is fp32
    repeats: int = 3
    speculate: int = 0
    limit: float = 900.0  # seconds a stack may take for everything; what it has found by then counts
    ahead: bool = True  # of ours, on a GPU: the next step is launched before the last one's tokens are read

    def check(self) -> None:
        for stack in self.stacks:
            if stack not in STACKS:
                raise ConfigError(
                    f"no stack {stack!r}{did_you_mean(stack, STACKS)}; there are: {', '.join(STACKS)}"
                )


@dataclass(frozen=True)
class Job:
    """What a stack's process is told."""

    directory: str
    streams: tuple[int, ...]
    prompt: int
    answer: int
    vocabulary: int
    precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0
    repeats: int = 1
    speculate: int = 0
    ahead: bool = True

    def prompts(self, streams: int, repeat: int) -> list[list[int]]:
        """Different ones every time: nothing is found in a prefix cache."""
        g = torch.Generator().manual_seed(self.seed * 1000 + repeat * 100 + streams)
        return torch.randint(10, self.vocabulary - 10, (streams, self.prompt), generator=g).tolist()


def run(options: Options) -> Report:
    """Every stack on every number of streams."""
    options.check()
    device = options.torch_device
    streams = (1, 4) if options.quick else options.streams
    prompt, answer = (16, 8) if options.quick else (options.prompt, options.answer)
    report = Report("serve", device, options, options.json)
    size = 2**20 if options.quick else 2**27 if device.type == "cpu" else 2**30
    bandwidth = report.ceiling("copy TB/s", copy_tb_per_s(device, size))
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_directory(options, Path(scratch), device)
        config = load_model(directory).model.config
        job = Job(str(directory), streams, prompt, answer, config.vocab_size, options.precision, options.device,
                  options.seed, 1 if options.quick else options.repeats, options.speculate, options.ahead)  # fmt: skip
        stacks = [*options.stacks, *(["vllm"] if options.vllm_python else [])]
        for stack in dict.fromkeys(stacks):
            _one(report, stack, job, options, bandwidth)
    report.show("decoding")
    return report.close()


def _one(report: Report, stack: str, job: Job, options: Options, bandwidth: float) -> None:
    rows, problem = _in_a_process(stack, job, options.vllm_python, options.limit)
    if problem:
        report.note(f"{stack} did not run: {problem}")
    for row in rows:
        if "bytes" in row:
            row["MBU"] = row.pop("bytes") * row["steps/s"] / (bandwidth * 1e12)
        report.keep("decoding", {"stack": stack, **row})


def model_directory(options: Options, scratch: Path, device: torch.device) -> Path:
    """The model to serve, as a Hugging Face directory that every stack can read; drawn on ``device``."""
    if options.model not in SHAPES:
        return Path(options.model)
    config = SHAPES[options.model]()
    if options.quick:
        config = replace(config, hidden=64, layers=2, ffn=96, vocab_size=512)
    torch.manual_seed(options.seed)
    with torch.device(device), torch.no_grad():
        model = Transformer(config)
        for name, p in model.named_parameters():
            if not name.endswith("norm.weight"):
                p.normal_(std=0.02)
    save_hf(model.cpu(), scratch / "model", dtype=torch.bfloat16)
    return scratch / "model"


def _in_a_process(stack: str, job: Job, vllm_python: str, limit: float) -> tuple[list[dict[str, Any]], str]:
    """The rows a stack reports, and why there are not more."""
    program = [sys.executable, "-m", "deepseek.bench.serve"]
    if stack == "vllm":
        # As text: as a file, this directory would be searched first, and modules here have others' names.
        program = [vllm_python or sys.executable, "-c", Path(__file__).with_name("serve_vllm.py").read_text()]
    ours = step_environment() if stack == "ours" else os.environ
    environment = {**ours, "DEEPSEEK_BENCH_BEGAN": str(time.time())}
    told = {"stack": stack, **job.__dict__}
    if stack == "vllm":  # which cannot ask ``Job``
        told["prompts"] = {
            s: [job.prompts(s, repeat) for repeat in range(job.repeats + 1)] for s in job.streams
        }
    try:
        done = subprocess.run(
            program,
            input=json.dumps(told),
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout
        return _rows(printed or ""), f"it took longer than {limit:.0f} s"
    except OSError as error:
        return [], str(error)
    return _rows(done.stdout), "" if done.returncode == 0 else _cause(
        f"{done.stdout}\n{done.stderr}"
    ) or f"exit code {done.returncode}"


def _rows(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line[4:]) for line in printed.splitlines() if line.startswith("row ")]


def _cause(printed: str) -> str:
    """The first line that names an exception: what comes later is its consequence."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\b[A-Za-z.]*(Error|Exception): ", line)]
    return (named or lines[-1:] or [""])[0][-400:]


# --- in the stack's process -----------------------------------------------------------------------------------------


def since_start() -> float:
    """Seconds since the process was asked for."""
    return time.time() - float(os.environ.get("DEEPSEEK_BENCH_BEGAN", time.time()))


def tell(streams: int, start: float, firsts: list[float], seconds: float, job: Job, **more: Any) -> None:
    """Print a row: ``firsts`` are times to first token, ``seconds`` from the first token to the last."""
    row = {
        "streams": streams, "start s": start, "first token ms": 1e3 * sorted(firsts)[len(firsts) // 2],
        "tokens/s": streams * (job.answer - 1) / seconds, **more,
    }  # fmt: skip
    print("row " + json.dumps(row), flush=True)


def serve_ours(job: Job) -> None:
    """Our engine, stepped here."""
    config = EngineConfig(
        device=job.device, precision=job.precision, max_running=max(job.streams), speculate=job.speculate,
        max_length=min(2048, job.prompt + job.answer + 64), ahead=None if job.ahead else False,
    )  # fmt: skip
    engine = Engine.load(job.directory, config)
    start = since_start()
    for streams in job.streams:
        best: tuple[float, list[float]] | None = None
        for repeat in range(job.repeats + 1):  # the first warms up
            sampling = SamplingConfig(temperature=0, max_tokens=job.answer, ignore_eos=True)
            began = time.perf_counter()
            for i, prompt in enumerate(job.prompts(streams, repeat)):
                engine.add(Request(f"{repeat}-{i}", tuple(prompt), sampling))
            firsts: dict[str, float] = {}
            while engine.has_work:
                for output in engine.step():
                    if output.tokens:
                        firsts.setdefault(output.id, time.perf_counter() - began)
            seconds = time.perf_counter() - began - max(firsts.values())
            if repeat and (best is None or seconds < best[0]):
                best = seconds, list(firsts.values())
        assert best is not None
        steps = (job.answer - 1) / best[0]
        more = {"format": engine.format, "steps/s": steps, "bytes": engine.decoder.bytes_read(streams)}
        tell(streams, start, best[1], best[0], job, **more)


def serve_transformers(job: Job) -> None:
    """``generate`` on a batch; prompts have one length, so nothing is lost to padding."""
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() and job.device in ("auto", "cuda") else "cpu")
    dtype = torch.float32 if device.type == "cpu" and job.precision == "fp32" else torch.bfloat16
    model: Any = (
        transformers.AutoModelForCausalLM.from_pretrained(job.directory, dtype=dtype).to(device).eval()
    )
    start = since_start()
    for streams in job.streams:
        best = None
        for repeat in range(job.repeats + 1):
            ids = torch.tensor(job.prompts(streams, repeat), device=device)

            def answer(tokens: int, ids: torch.Tensor = ids) -> float:
                began = time.perf_counter()
                model.generate(
                    ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
                    attention_mask=torch.ones_like(ids),
                )  # fmt: skip
                if device.type == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - began

            first, whole = answer(1), answer(job.answer)
            if repeat and (best is None or whole - first < best[0]):
                best = whole - first, first
        assert best is not None
        tell(streams, start, [best[1]], best[0], job, format=str(dtype).removeprefix("torch."))
    if device.type == "cuda":
        _generate_batch(model, job, start)


def _generate_batch(model: Any, job: Job, start: float) -> None:
    """Its continuous batching, judged by the time of everything less that of the first tokens."""
    import transformers

    for streams in job.streams:
        seconds = []
        for tokens in (1, job.answer):
            best = float("inf")
            for repeat in range(job.repeats + 1):
                config = transformers.GenerationConfig(
                    max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
                )  # fmt: skip
                began = time.perf_counter()
                model.generate_batch(inputs=job.prompts(streams, repeat), generation_config=config)
                torch.cuda.synchronize()
                if repeat:
                    best = min(best, time.perf_counter() - began)
            seconds.append(best)
        tell(streams, start, [seconds[0]], seconds[1] - seconds[0], job, format="generate_batch")


def main() -> None:
    told = json.loads(sys.stdin.read())
    stack = told.pop("stack")
    job = Job(**{**told, "streams": tuple(told["streams"])})
    {"ours": serve_ours, "transformers": serve_transformers}[stack](job)


if __name__ == "__main__":
    main()
