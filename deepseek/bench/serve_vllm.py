"""vLLM's part of ``deepseek bench serve``, run by an interpreter that has it; imports nothing of ours."""

import json
import os
import sys
import time


def main() -> None:
    began = float(os.environ.get("DEEPSEEK_BENCH_BEGAN", time.time()))
    job = json.loads(sys.stdin.read())
    import torch
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    # On a CPU this is a share of the host's memory, of which others may have taken some; its default asks for all.
    share = 0.9 if torch.cuda.is_available() else 0.3
    dtype = "float32" if job["precision"] == "fp32" else "bfloat16"
    model = LLM(
        model=job["directory"], skip_tokenizer_init=True, dtype=dtype, seed=job["seed"], enforce_eager=False,
        max_num_seqs=max(job["streams"]), enable_prefix_caching=False,
        max_model_len=min(2048, job["prompt"] + job["answer"] + 64), disable_log_stats=True,
        gpu_memory_utilization=share,
    )  # fmt: skip
    start = time.time() - began
    for streams in job["streams"]:
        best = None
        for repeat in range(job["repeats"] + 1):
            ids = job["prompts"][str(streams)][repeat]
            seconds = []
            for tokens in (1, job["answer"]):
                sampling = SamplingParams(
                    temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
                )
                at = time.perf_counter()
                model.generate([{"prompt_token_ids": x} for x in ids], sampling, use_tqdm=False)
                seconds.append(time.perf_counter() - at)
            if repeat and (best is None or seconds[1] - seconds[0] < best[0]):
                best = seconds[1] - seconds[0], seconds[0]
        assert best is not None
        row = {
            "streams": streams, "start s": start, "first token ms": 1e3 * best[1],
            "tokens/s": streams * (job["answer"] - 1) / best[0], "format": dtype,
        }  # fmt: skip
        print("row " + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
