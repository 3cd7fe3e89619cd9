"""The command line, as a user meets it: in processes of its own, on a corpus of a few kilobytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = "\n\n".join(f"Chapter {i}. " + "The quick brown fox jumps over the lazy dog. " * 40 for i in range(40))

CONFIG = """
[model]
preset = "tiny"
hidden = 32
layers = 2
pattern = "LH"
max_length = 128
[model.attention]
heads = 2
kv_heads = 1
head_dim = 16
window = 16
[model.moe]
experts = 4
expert_ffn = 32
[data]
vocab_size = 300
held_out = 0.2
[[data.sources]]
kind = "text"
path = "TEXT"
[train]
steps = 6
batch_tokens = 256
length = 64
[checkpoint]
every = 2
"""


def deepseek(*args: str, cwd: Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "deepseek", *args],
        cwd=cwd,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a config, and a finished run 'mine'."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpus.txt").write_text(TEXT)
    (folder / "mine.toml").write_text(CONFIG.replace("TEXT", str(folder / "corpus.txt")))
    done = deepseek("pretrain", "mine.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_pretrain_leaves_a_run(place: Path) -> None:
    run = place / "runs/mine"
    assert (run / "config.toml").is_file()
    assert (run / "step-000006/manifest.json").is_file()
    steps = [
        e["step"]
        for e in map(json.loads, (run / "events.jsonl").read_text().splitlines())
        if e["event"] == "train"
    ]
    assert steps[:6] == [1, 2, 3, 4, 5, 6]  # another test may have gone on with it


def test_output_without_a_terminal_has_no_control_codes(place: Path) -> None:
    done = deepseek("resume", "mine", "--train.steps=7", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "step 7/7" in done.stdout


def test_generate_is_repeatable_and_json_is_json(place: Path) -> None:
    args = ("generate", "mine", "The quick", "--seed", "3", "--max-tokens", "12")
    first, second = deepseek(*args, cwd=place), deepseek(*args, cwd=place)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("The quick")
    assert first.stdout == second.stdout
    answer = json.loads(deepseek(*args, "--json", cwd=place).stdout)
    assert first.stdout == "The quick" + answer["text"] + "\n"
    assert (
        deepseek("generate", "mine", "--seed", "3", "--max-tokens", "12", cwd=place, stdin="The quick").stdout
        == first.stdout
    )


def test_chat_answers_until_the_input_ends(place: Path) -> None:
    done = deepseek("chat", "mine", "--max-tokens", "5", "--seed", "1", cwd=place, stdin="hello\nagain\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model> ") == 2


def test_evaluate_compares_with_compressors(place: Path) -> None:
    found = json.loads(deepseek("evaluate", "mine", "--json", cwd=place).stdout)
    assert {c["name"] for c in found["compressors"]} == {"gzip -9", "xz -9"}
    assert 0 < found["model"]["bits_per_byte"] < 8


def test_export_reads_back_equal(place: Path) -> None:
    found = json.loads(deepseek("export", "mine", "--json", cwd=place).stdout)
    assert found["model_type"] == "deepseek_hybrid"
    assert found["max_logit_difference"] <= 1e-5
    again = deepseek("generate", found["path"], "The quick", "--seed", "3", "--max-tokens", "12", cwd=place)
    assert (
        again.stdout
        == deepseek("generate", "mine", "The quick", "--seed", "3", "--max-tokens", "12", cwd=place).stdout
    )


def test_runs_report_and_doctor(place: Path) -> None:
    listed = json.loads(deepseek("runs", "--json", cwd=place).stdout)
    assert ("mine", "finished") in [(r["name"], r["status"]) for r in listed]
    page = Path(deepseek("report", "mine", cwd=place).stdout.strip())
    assert (place / page).read_text().lower().startswith("<!doctype html>")
    found = json.loads(deepseek("doctor", "--json", cwd=place).stdout)
    assert {"machine", "number formats", "operations", "optional packages"} <= set(found)


def test_dry_run_starts_nothing(place: Path) -> None:
    facts = json.loads(
        deepseek("pretrain", "moe_64x2", "--dry-run", "--json", "--run", "runs/never", cwd=place).stdout
    )
    assert (
        facts["parameters"]["total"] == 2_530_543_616 or abs(facts["parameters"]["total"] / 2.53e9 - 1) < 0.01
    )
    assert abs(facts["parameters"]["active"] / 152e6 - 1) < 0.01
    assert not (place / "runs/never").exists()


def test_booleans_are_written_as_in_toml_too() -> None:
    from deepseek import PretrainConfig
    from deepseek.cli.options import overridden

    config = overridden(PretrainConfig(), ["--train.compile=true", "--model.attention.full-rope", "false"])
    config = overridden(config, ["--train.cuda_graph=True", "--data.tokenizer=true"])
    assert [config.train.compile, config.train.cuda_graph, config.model.attention.full_rope] == [
        True,
        True,
        False,
    ]
    assert config.data.tokenizer == "true"


def test_explain_gives_reasons(place: Path) -> None:
    text = deepseek("pretrain", "mine.toml", "--explain", "--dry-run", cwd=place).stdout
    assert re.search(r"rows per step +4 +train\.batch_tokens / train\.length", text)


BAD = {
    "unknown command": (("pretran", "mine.toml"), "no command 'pretran' (did you mean 'pretrain'?)"),
    "no config": (("pretrain", "nowhere.toml"), "error: no config file nowhere.toml"),
    "near config": (("pretrain", "mime.toml"), "did you mean 'mine.toml'"),
    "unknown preset": (("pretrain", "tinny"), "did you mean 'tiny'"),
    "unknown option": (("pretrain", "mine.toml", "--train.stepz=3"), "--train.stepz"),
    "bad value": (("pretrain", "mine.toml", "--train.steps=many"), "many"),
    "negative": (("pretrain", "mine.toml", "--run=runs/x", "--train.steps=-3"), "train.steps=-3 must not be negative"),
    "existing run": (("pretrain", "mine.toml"), "already has checkpoints"),
    "layout": (("pretrain", "mine.toml", "--run=runs/x", "--parallel.tp=3"), "tp=3 does not divide 2 attention heads"),
    "device": (("pretrain", "mine.toml", "--run=runs/x", "--train.device=warp"), "'warp' is not"),
    "missing corpus": (("pretrain", "mine.toml", "--run=runs/x", "--data.tokenizer=/nowhere"), "/nowhere"),
    "wrong run": (("resume", "mein"), "did you mean 'mine'"),
    "not a run": (("generate", ".", "x"), "is not a run directory"),
    "format": (("export", "mine", "--format", "gguf"), "'gguf' is not known"),
    "temperature": (("generate", "mine", "x", "--temperature", "-1"), "temperature=-1"),
    "step": (("resume", "mine", "--from", "3"), "no checkpoint of step 3; it has: step-"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(place: Path, case: str) -> None:
    args, message = BAD[case]
    done = deepseek(*args, cwd=place)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if done.stderr.startswith("error: "):
        assert len(done.stderr.strip().splitlines()) == 1


def test_damaged_checkpoint_is_refused_by_name(place: Path) -> None:
    weights = sorted((place / "runs/mine").glob("step-*"))[-1] / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-10])
    try:
        done = deepseek("generate", "mine", "x", cwd=place)
        assert done.returncode == 1
        assert str(weights.name) in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        weights.write_bytes(kept)


def test_unknown_key_in_the_file(place: Path) -> None:
    (place / "typo.toml").write_text((place / "mine.toml").read_text().replace("experts = 4", "expert = 4"))
    done = deepseek("pretrain", "typo.toml", cwd=place)
    assert "unknown key 'expert' in model.moe (did you mean 'experts'?)" in done.stderr


@pytest.mark.slow
def test_quickstart_end_to_end(tmp_path: Path) -> None:
    """The whole of it, with a few seconds of training."""
    done = deepseek("quickstart", "--seconds", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "runs/quickstart"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    pids = {e["pid"] for e in events if e["event"] == "run"}
    resumed = next(e for e in events if e["event"] == "resume")
    assert len(pids) == 2
    assert abs(resumed["probe_before"] - resumed["probe_after"]) < 1e-6
    exported = next(e for e in events if e["event"] == "export" and "max_logit_difference" in e)
    assert exported["max_logit_difference"] <= 1e-5
    assert (run / "report.html").stat().st_size > 50_000
    assert "Try next:" in done.stdout
