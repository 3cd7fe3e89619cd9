"""Sources: determinism, cursors, bad records, and the held-out split."""

from __future__ import annotations

import gzip
import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.data import BadRecords, Document, SourceConfig, is_held_out, open_source
from deepseek.data.source import Source
from deepseek.errors import ConfigError, DataError
from deepseek.events import MemorySink, attached

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data is absent: {path}")
    return path


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def sources(folder: Path) -> dict[str, SourceConfig]:
    """One source of every kind, each with more than one document."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    texts = [f"document {i} " + "word " * i for i in range(7)]
    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        (folder / "texts" / f"{i}.txt").write_text(text)
    (folder / "one.txt").write_text("\n\n".join(texts))
    write_jsonl(folder / "a.jsonl", texts)
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write((folder / "a.jsonl").read_text())
    table = pyarrow.table({"n": list(range(7)), "text": texts})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=3)
    datasets.Dataset(table).save_to_disk(str(folder / "hf"))
    return {
        "text": SourceConfig(kind="text", path=str(folder / "texts")),
        "paragraph": SourceConfig(kind="text", path=str(folder / "one.txt"), split="paragraph"),
        "glob": SourceConfig(kind="text", path=str(folder / "texts" / "[0-4].txt")),
        "jsonl": SourceConfig(kind="jsonl", path=str(folder / "a.jsonl")),
        "gzip": SourceConfig(kind="jsonl", path=str(folder / "a.jsonl.gz")),
        "parquet": SourceConfig(kind="parquet", path=str(folder / "a.parquet")),
        "datasets": SourceConfig(kind="datasets", path=str(folder / "hf")),
    }


@pytest.mark.parametrize("kind", ["text", "paragraph", "glob", "jsonl", "gzip", "parquet", "datasets"])
def test_a_cursor_goes_on_with_the_next_document(tmp_path: Path, kind: str) -> None:
    config = sources(tmp_path)[kind]
    whole = list(open_source(config))
    assert len(whole) == (5 if kind == "glob" else 7)
    assert len({d.id for d in whole}) == len(whole)
    assert whole[3].text.strip() == "document 3 word word word"
    for cut in range(len(whole) + 1):
        first = open_source(config)
        walk = iter(first)
        head = [next(walk) for _ in range(cut)]
        state = json.loads(json.dumps(first.state_dict()))
        second = open_source(config)
        second.load_state_dict(state)
        assert head + list(second) == whole


def test_a_cursor_of_other_files_is_refused(tmp_path: Path) -> None:
    config = sources(tmp_path)["text"]
    state = open_source(config).state_dict()
    (tmp_path / "texts" / "00.txt").write_text("new")
    with pytest.raises(DataError, match="8 files"):
        open_source(config).load_state_dict(state)


def test_stdlib_is_sorted_python_without_tests() -> None:
    documents = list(open_source(SourceConfig()))
    paths = [d.path for d in documents]
    root = Path(sysconfig.get_path("stdlib"))
    assert paths == sorted(paths)
    assert len(paths) > 300
    assert "json/decoder.py" in paths
    assert not [p for p in paths if {"test", "tests", "site-packages", "idle_test"} & set(p.split("/"))]
    assert next(d for d in documents if d.path == "ast.py").text == (root / "ast.py").read_bytes().decode()


def test_pieces_of_a_single_file_join_to_the_file() -> None:
    path = shared("tinyshakespeare/input.txt")
    documents = list(open_source(SourceConfig(kind="text", path=str(path))))
    assert "".join(d.text for d in documents).encode() == path.read_bytes()
    assert len(documents) > 100
    assert all(path.read_bytes()[d.offset :].startswith(d.text.encode()) for d in documents)


def test_real_records() -> None:
    path = shared("gsm8k/train.jsonl")
    documents = list(open_source(SourceConfig(kind="jsonl", path=str(path), field="question")))
    assert [d.text for d in documents] == [json.loads(x)["question"] for x in path.read_text().splitlines()]
    packed = shared("hh_rlhf/harmless-base.jsonl.gz")
    found = list(open_source(SourceConfig(kind="jsonl", path=str(packed), field="chosen")))
    with gzip.open(packed, "rt", encoding="utf-8") as file:
        assert [d.text for d in found] == [json.loads(line)["chosen"] for line in file]


def bad_jsonl(path: Path) -> None:
    path.write_bytes(
        b'{"text": "good one"}\n'
        b'{"text": "cut of\n'
        b'{"other": 1}\n'
        b'{"text": 5}\n'
        b'{"text": "\xff\xfe"}\n'
        b'{"text": "\\u0000\\u0000"}\n'
        b'{"text": "\\ud800"}\n'
        b'{"text": "   "}\n'
        b"[1, 2]\n" + b"[" * 100_000 + b"\n"
        b'{"text": "good two"}\n'
    )


def test_bad_records_are_counted_located_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad_jsonl(path)
    bad, sink = BadRecords(), MemorySink()
    with attached(sink):
        texts = [d.text for d in open_source(SourceConfig(kind="jsonl", path=str(path)), bad)]
    assert texts == ["good one", "good two"]
    assert bad.counts == {
        "bad_json": 2,
        "missing_field": 2,
        "not_text": 1,
        "undecodable": 2,
        "nul_only": 1,
        "empty": 1,
    }
    data = path.read_bytes()
    first = next(e for e in bad.examples if e.kind == "missing_field")
    assert data[first.offset :].startswith(b'{"other"')
    assert len(sink.series("bad_record", "offset")) == 8
    assert bad.total == 9  # an empty file is counted, and no news
    assert set(sink.series("bad_record", "path")) == {"a.jsonl"}


def test_a_truncated_archive_gives_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = "".join(json.dumps({"text": f"{i} " + str(hash(str(i)))}) + "\n" for i in range(20_000))
    whole = gzip.compress(lines.encode())
    path.write_bytes(whole[: len(whole) // 2])
    bad = BadRecords()
    found = list(open_source(SourceConfig(kind="jsonl", path=str(path)), bad))
    assert 0 < len(found) < 20_000
    assert bad.counts["truncated"] == 1


def test_a_bad_text_file_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_bytes(b"\0" * 100)
    (tmp_path / "d.txt").write_bytes("fine ü".encode())
    bad = BadRecords()
    found = [d.text for d in open_source(SourceConfig(kind="text", path=str(tmp_path)), bad)]
    assert found == ["ok", "fine ü"]
    assert bad.counts == {"undecodable": 1, "nul_only": 1}
    assert (bad.examples[0].path, bad.examples[0].offset) == ("b.txt", 3)


def test_links_that_leave_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "secret.txt")
    bad = BadRecords()
    source = open_source(SourceConfig(kind="text", path=str(tmp_path / "in")), bad)
    assert [d.text for d in source] == ["a"]
    assert bad.counts == {"outside_root": 1}


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "datasets"])
def test_missing_and_empty_sources_are_one_line(tmp_path: Path, kind: str) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError) as error:
            open_source(SourceConfig(kind=kind, path=str(path)))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="needs a path"):
        SourceConfig(kind=kind)


def test_a_wrong_column_names_those_there_are(tmp_path: Path) -> None:
    for kind in ("parquet", "datasets"):
        folder = tmp_path / kind
        folder.mkdir()
        config = sources(folder)[kind]
        bad = BadRecords()
        wrong = SourceConfig(kind=config.kind, path=config.path, field="content")
        assert list(open_source(wrong, bad)) == []
        assert "it has: n, text" in bad.examples[0].detail


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), kind=st.sampled_from(["text", "jsonl", "jsonl.gz", "parquet"]))
def test_no_bytes_raise_anything(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / f"fuzz.{kind}"
    path.write_bytes(data)
    config = SourceConfig(kind=kind.split(".")[0], path=str(path))
    for document in open_source(config):
        document.text.encode()


def test_the_held_out_split_is_stable_and_of_the_right_size(tmp_path: Path) -> None:
    documents = [Document("x", "s", f"dir/{i}.py", 0) for i in range(20_000)]
    share = sum(is_held_out(d, 0.05) for d in documents) / len(documents)
    assert abs(share - 0.05) < 0.005
    assert not any(is_held_out(d, 0.0) for d in documents)
    # blake2b of "dir/0.py\0" "0", computed with b2sum: the split must never move between releases
    import hashlib

    for d in documents[:50]:
        word = hashlib.blake2b(d.path.encode() + b"\0" + b"0", digest_size=8).hexdigest()
        assert is_held_out(d, 0.3) == (int(word, 16) / 2**64 < 0.3)
    smaller = {d.path for d in documents if is_held_out(d, 0.01)}
    assert smaller <= {d.path for d in documents if is_held_out(d, 0.05)}


def test_samples_are_spread_over_the_files() -> None:
    source: Source = open_source(SourceConfig())
    documents = list(source.sample(1_000_000))
    size = sum(len(d.text.encode()) for d in documents)
    assert 1_000_000 <= size < 1_500_000
    positions = [i for i, p in enumerate(source.files) if source.relative(p) in {d.path for d in documents}]
    assert min(positions) < len(source.files) * 0.1
    assert max(positions) > len(source.files) * 0.9
