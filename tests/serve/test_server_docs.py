"""The examples of docs/serving.md, run as they stand."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fake_client import KEY, keyring, serving

from deepseek.config import from_dict
from deepseek.serve.server import schemas
from deepseek.serve.server.keys import KeyConfig, Keyring

PAGE = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize("command", blocks("sh"), ids=lambda c: c.split()[1][-20:])
def test_the_commands_work(command: str) -> None:
    with serving(keys=keyring()) as server:
        done = subprocess.run(
            ["bash", "-euc", command.replace(ADDRESS, server.url)], env={**os.environ, "KEY": KEY},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "data: " in done.stdout:
        assert done.stdout.rstrip().endswith("data: [DONE]")
        assert '"completion_tokens"' in done.stdout
    else:
        assert "error" not in json.loads(done.stdout)


def test_the_python_works(capsys: Any) -> None:
    (code,) = blocks("python")
    with serving(keys=keyring()) as server:
        space: dict[str, Any] = {"KEY": KEY}
        exec(code.replace(ADDRESS, server.url), space)
        space["client"].close()
    assert capsys.readouterr().out.strip()


def test_the_keys_file_is_one(tmp_path: Path) -> None:
    (text,) = blocks('toml title="keys.toml"')
    file = tmp_path / "keys.toml"
    file.write_text(text.replace("sk-…", "sk-alice-0123456789", 1).replace("sk-…", "sk-oper-0123456789"))
    assert [k.name for k in Keyring.load(file, {}).keys] == ["alice", "operator"]
    assert from_dict(KeyConfig, {"key": "sk-alice-0123456789"}).admin is False


def test_every_field_has_a_row() -> None:
    told = set(re.findall(r"`(\w+)`", PAGE))
    taken = {*schemas.COMPLETION.fields, *schemas.CHAT.fields, *schemas.EMBEDDING.fields}
    silent = {
        "model", "prompt_cache_retention", "reasoning_effort", "verbosity", "modalities",
    }  # fmt: skip
    assert taken - told - silent == set()
    assert not {"suffix", "audio", "prediction", "web_search_options", "functions"} & taken
