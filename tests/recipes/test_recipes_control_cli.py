"""Actions as a person meets them: a run in one process, the command line in another."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest
from recipe_runs import checkpointed, smallest, start, write_config, write_corpus

from deepseek.cli import main
from deepseek.data.quarantine import read_quarantine
from deepseek.monitor.control import parse_document, trainer
from deepseek.weights import checkpoint

pytestmark = pytest.mark.slow

TRAIN = """
import sys, torch
torch.set_num_threads(1)
from deepseek.recipes.pretrain import pretrain, read_config
done = pretrain(read_config(sys.argv[1]), sys.argv[2])
print(done.step, done.finished)
"""


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Path, Popen[str]]]:
    """A run that would go on for long, in a process of its own."""
    config = smallest(
        write_corpus(tmp_path / "corpus"), data={"cache": str(tmp_path / "cache")}, train={"steps": 1_000_000}
    )
    run = tmp_path / "run"
    process = start(TRAIN, write_config(checkpointed(config, 20), tmp_path / "c.toml"), run)
    try:
        while len(checkpoint.list_checkpoints(run)) < 2:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        yield run, process
    finally:
        process.kill()
        process.wait()


def told(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, object]:
    assert main([*map(str, args), "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_a_person_finds_the_sample_and_gets_rid_of_it(
    live: tuple[Path, Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, process = live
    assert trainer(run) == str(process.pid)
    assert main(["act", str(run), "pause"]) == 0
    at = int(capsys.readouterr().out.split()[-1])  # paused after step N
    assert main(["replay", str(run), "--step", str(at), "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert f"step {at} with the weights of step" in shown
    guilty = told(capsys, "replay", run, "--step", at)["documents"][0]  # type: ignore[index]
    name = f"{guilty['source']}:{guilty['path']}:{guilty['offset']}"
    assert name in shown.replace("\n", "")
    assert main(["act", str(run), "quarantine", "--document", name, "--reason", "noise"]) == 0
    assert "1 documents are left out" in capsys.readouterr().out
    assert [(q.path, q.from_step) for q in read_quarantine(run / "quarantine.jsonl")] == [
        (guilty["path"], at + 1)
    ]
    assert main(["act", str(run), "rollback_skip", "--skip", f"{at}:{at}"]) == 0  # ends the pause, too
    assert f"the batches that steps {at} to {at} had are left out" in capsys.readouterr().out
    assert main(["act", str(run), "rollback_skip", "--skip", "1:1"]) == 1
    assert "no checkpoint before step 1" in capsys.readouterr().err
    assert main(["act", str(run), "stop"]) == 0
    out, _ = process.communicate(timeout=120)
    assert out.split()[1] == "False"
    assert main(["act", str(run), "pause"]) == 1
    assert f"Go on with: deepseek resume {run}" in capsys.readouterr().err
    at = int(out.split()[0])
    more = ["resume", str(run), "--skip", f"{at - 1}:{at}", f"--train.steps={at + 3}", "--quiet"]
    assert main(more) == 0
    assert checkpoint.load(run).step == at + 3


def test_documents_are_named_as_they_are_shown() -> None:
    assert parse_document("web:a/b.jsonl:17") == {"source": "web", "path": "a/b.jsonl", "offset": 17}
    assert parse_document("web:a:b/c.txt:0") == {"source": "web", "path": "a:b/c.txt", "offset": 0}
    assert parse_document("web:a/b.txt") == {"source": "web", "path": "a/b.txt", "offset": None}
