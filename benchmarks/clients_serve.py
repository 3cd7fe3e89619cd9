"""Clients that nobody here wrote, against a real server: lm-eval and guidellm, each from an environment of its own.

    python benchmarks/clients_serve.py --model EXPORT --questions DIR \
        --lm-eval ENV/bin/lm_eval --guidellm ENV/bin/guidellm

``--model`` is a Hugging Face directory with a tokenizer, so that lm-eval can also run it in its own process. Both
must give the same scores, and the same log-likelihoods to 1e-2 nats: fp32 on both sides. ``--questions`` holds CSV
files with the columns question, choice0 … choice3, answer. guidellm asks in parallel for a while and must end with no
request failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TASK = """\
task: local_questions
dataset_path: csv
dataset_kwargs:
  data_files: {{test: {files}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{[choice0, choice1, choice2, choice3]}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@contextmanager
def server(model: Path) -> Iterator[str]:
    """``deepseek serve`` in fp32 on a free port; yields its address."""
    command = [sys.executable, "-m", "deepseek", "serve", str(model), "--precision", "fp32", "--port", "0",
               "--name", "model", "--log", "", "--max-length", "2048", "--max-waiting", "100000"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                yield found.group()
                break
        else:
            raise SystemExit("the server ended before it was ready")
    finally:
        process.terminate()
        process.wait(60)


def lm_eval(program: str, model: Path, address: str, questions: Path, limit: int) -> None:
    files = sorted(str(p.resolve()) for p in questions.glob("*.csv"))
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "local_questions.yaml").write_text(TASK.format(files=json.dumps(files)))
        there = f"model=model,base_url={address}/v1/completions,tokenizer={model},num_concurrent=4"
        here = f"pretrained={model},dtype=float32"
        found = {}
        for name, kind, arguments in (("in process", "hf", here), ("server", "local-completions", there)):
            out = Path(scratch) / kind
            command = [program, "run", "--model", kind, "--model_args", arguments, "--tasks", "local_questions",
                       "--include_path", scratch, "--limit", str(limit), "--output_path", str(out), "--log_samples",
                       "--device", "cpu", "--batch_size", "4"]  # fmt: skip
            environment = {
                **os.environ,
                "HF_DATASETS_OFFLINE": "1",
                "HF_HUB_OFFLINE": "1",
                "HF_HOME": scratch,
            }
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"lm-eval ({name}) failed:\n{done.stderr[-3000:]}")
            found[name] = read(out)
    (scores, samples), (theirs, others) = found["server"], found["in process"]
    worst = max(abs(a - b) for a, b in zip(samples, others, strict=True))
    for metric, value in scores.items():
        print(f"lm-eval {metric}: server {value:.4f}, in process {theirs[metric]:.4f}")
    print(f"lm-eval: {len(samples)} log-likelihoods, largest difference {worst:.2g} nats")
    if scores != theirs or not worst < 1e-2 or not math.isfinite(worst):
        raise SystemExit("lm-eval: the server's scores are not those of the model in lm-eval's own process")


def read(out: Path) -> tuple[dict[str, float], list[float]]:
    """Scores, and the log-likelihood of every choice in order."""
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]["local_questions"]
    scores = {k: v for k, v in results.items() if k.startswith("acc") and "stderr" not in k}
    lines = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
    documents = sorted((json.loads(line) for line in lines), key=lambda d: d["doc_id"])
    return scores, [float(r[0]) for d in documents for r in d["filtered_resps"]]


def guidellm(program: str, model: Path, address: str, seconds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [program, "run", "--backend", f"kind=openai_http,target={address}/v1,model=model",
                   "--profile", "kind=sweep,sweep_size=4", "--constraint", f"kind=max_duration,seconds={seconds}",
                   "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=24",
                   "--tokenizer", f"kind=hf_auto,model={model}", "--output", f"kind=json,path={report}",
                   "--disable-console-interactive"]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not report.is_file():
            raise SystemExit(f"guidellm failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        failed = 0
        for benchmark in json.loads(report.read_text())["benchmarks"]:
            totals = benchmark["metrics"]["request_totals"]
            failed += totals["errored"]
            strategy = benchmark["config"]["strategy"]
            print(f"guidellm {strategy.get('kind', strategy.get('type_', '?'))}: {totals}")
    if failed:
        raise SystemExit(f"guidellm: {failed} requests failed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--lm-eval", default="")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--limit", type=int, default=50, help="questions")
    parser.add_argument("--guidellm", default="")
    parser.add_argument("--seconds", type=int, default=15, help="of each of guidellm's strategies")
    options = parser.parse_args()
    with server(options.model) as address:
        if options.lm_eval:
            lm_eval(options.lm_eval, options.model.resolve(), address, options.questions, options.limit)
        if options.guidellm:
            guidellm(options.guidellm, options.model.resolve(), address, options.seconds)


if __name__ == "__main__":
    main()
