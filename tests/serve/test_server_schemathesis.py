"""Schemathesis, which nobody here wrote, against ``/openapi.json`` and all routes: no 5xx, no lie in the description.

A few hundred cases; ``benchmarks/robust_serve.py fuzz`` runs ten thousand. ``positive_data_acceptance`` is left out:
some rules span several fields (``best_of`` and ``n``), which a schema cannot say.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fake_client import ADMIN, Served, keyring, serving


def fuzz(server: Served, folder: Path, *arguments: str) -> tuple[int, str]:
    """Schemathesis' exit status and report."""
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json",
        "-H", f"Authorization: Bearer {ADMIN}", "--checks", "all", "--exclude-checks", "positive_data_acceptance",
        "--continue-on-failure", "--no-shrink", "--suppress-health-check", "all", "--seed", "1", "--warnings", "off",
        "--request-timeout", "30", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout[-6000:]


def statuses(server: Served) -> Counter[str]:
    found: Counter[str] = Counter()
    for (_, _, status), count in server.front.metrics.http._values.items():
        found[status] += int(count)
    return found


@pytest.mark.parametrize(
    ("phases", "arguments"),
    [
        ("examples,fuzzing,stateful", ["--max-examples", "8"]),
        pytest.param(
            "coverage",
            ["--exclude-path", "/v1/chat/completions", "--exclude-path", "/v1/completions"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fuzzing", "coverage"],
)
def test_schemathesis_finds_nothing(tmp_path: Path, phases: str, arguments: list[str]) -> None:
    with serving(keys=keyring()) as server:
        status, report = fuzz(server, tmp_path, "--phases", phases, *arguments)
        found = statuses(server)
    assert status == 0, report
    assert sum(found.values()) > 100
    assert found["200"] > 20
    assert not [s for s in found if s.startswith("5")], found


def test_the_description_names_every_route_and_status() -> None:
    import httpx2

    with serving(keys=keyring()) as server:
        told = httpx2.get(
            f"{server.url}/openapi.json", headers={"authorization": f"Bearer {ADMIN}"}, timeout=60
        ).json()
    assert told["openapi"] == "3.1.0"
    served = {
        "/v1/models", "/v1/models/{model}", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize",
        "/detokenize", "/health", "/ready", "/metrics", "/version", "/admin/reload", "/openapi.json",
    }  # fmt: skip
    assert set(told["paths"]) == served
    chat = told["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {
        "200", "400", "401", "403", "404", "405", "408", "413", "415", "429", "500", "503", "504",
    }  # fmt: skip
    assert chat["security"] == [{"key": []}]
    assert "security" not in told["paths"]["/health"]["get"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert body["properties"]["model"]["enum"] == ["fake", "polite", None]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)))
    assert references <= set(told["components"]["schemas"])
