"""What a reader meets first is true: links lead somewhere, configs load, both READMEs say the same."""

import ast
import re
from pathlib import Path

import pytest

import deepseek as ds
from deepseek import cli
from deepseek.recipes.pretrain import read_config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READMES = ("README.md", "README.zh-CN.md")
STATES = {
    "**works**": "works",
    "partly": "partly",
    "not yet": "no",
    "**可用**": "works",
    "部分": "partly",
    "尚无": "no",
}


def features(name: str) -> dict[str, str]:
    """State by feature, as the table of a README has it."""
    rows = re.findall(r"^\| (F\d\d) \| [^|]+ \| ([^|]+) \|", (ROOT / name).read_text(encoding="utf-8"), re.M)
    assert len(rows) == len(dict(rows))
    return {feature: STATES[state] for feature, state in rows}


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced block of ``language`` in every page, with the page's name; indented ones are left out."""
    found = []
    for page in PAGES:
        for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            found.append((page.name, text))
    return found


@pytest.mark.parametrize("name", READMES)
def test_every_feature_has_a_state(name: str) -> None:
    assert list(features(name)) == [f"F{n:02}" for n in range(1, 61)]


def test_both_languages_claim_the_same() -> None:
    assert features(READMES[0]) == features(READMES[1])


@pytest.mark.parametrize("name", READMES)
def test_the_command_table_is_complete(name: str) -> None:
    told = re.findall(r"^\| `deepseek (\w+)", (ROOT / name).read_text(encoding="utf-8"), re.M)
    assert told == [*dict.fromkeys(told)]
    assert set(told) == set(cli.COMMANDS)


def test_fifty_claims_and_no_verdict_without_a_figure() -> None:
    rows = re.findall(
        r"^\| (C\d\d) \| S\d \| .+ \| (.+) \| (.+) \|$", (ROOT / "docs/claims.md").read_text("utf-8"), re.M
    )
    assert [row[0] for row in rows] == [f"C{n:02}" for n in range(1, 51)]
    assert all((figure == "not measured yet") == (verdict == "–") for _, figure, verdict in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose)
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.toml"), *ROOT.glob("examples/*.toml")]), ids=lambda p: p.name
)
def test_shipped_configs_load(path: Path) -> None:
    read_config(path)


def test_configs_in_the_documentation_load(tmp_path: Path) -> None:
    found = blocks("toml")
    assert len(found) >= 4
    for number, (page, text) in enumerate(found):
        path = tmp_path / f"{number}-{page}.toml"
        path.write_text(text, encoding="utf-8")
        read_config(path)


def test_python_in_the_documentation_parses_and_uses_names_that_exist() -> None:
    found = blocks("python")
    assert len(found) >= 8
    for page, text in found:
        for node in ast.walk(ast.parse(text, page)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ds":
                assert hasattr(ds, node.attr), f"{page}: ds.{node.attr}"
