import hashlib
import os
from pathlib import Path

import pytest

from deepseek.files import NEW, InUse, claimed, clean, hash_file, staged, write_atomic, write_file


def tree(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.name != ".lock")


def test_a_staged_directory_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "a"
    with staged(final) as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "x").write_text("1")
        assert not final.exists()
        assert temp.name.startswith(".")
    assert tree(tmp_path) == ["a", "a/sub", "a/sub/x"]


def test_a_staged_directory_replaces_and_a_failed_one_does_not(tmp_path: Path) -> None:
    final = tmp_path / "a"
    for name in ("old", "new"):
        with staged(final) as temp:
            (temp / name).write_text(name)
    assert tree(tmp_path) == ["a", "a/new"]
    with pytest.raises(FileNotFoundError), staged(final) as temp:
        (temp / "missing" / "bad").write_text("")
    assert tree(tmp_path) == ["a", "a/new"]


def test_clean_spares_the_living_and_removes_the_dead(tmp_path: Path) -> None:
    for dead in (".tmp-dead-1", ".trash-gone-2", ".tmp-lockless-3"):
        (tmp_path / dead / "deep").mkdir(parents=True)
    (tmp_path / ".tmp-dead-1.lock").touch()
    (tmp_path / ".other").mkdir()
    with staged(tmp_path / "alive") as temp:
        (temp / "x").write_text("1")
        assert len(clean(tmp_path)) == 4
        assert (temp / "x").exists()
    assert tree(tmp_path) == [".other", "alive", "alive/x"]
    assert clean(tmp_path) == []


def test_clean_finishes_an_interrupted_replacement(tmp_path: Path) -> None:
    for name, content in (("a", "old"), ("a" + NEW, "new"), ("b" + NEW, "only")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(content)
    clean(tmp_path)
    assert tree(tmp_path) == ["a", "a/x", "b", "b/x"]
    assert (tmp_path / "a" / "x").read_text() == "new"


def test_write_atomic_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    monkeypatch.setattr("deepseek.files.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, "three")
    assert path.read_bytes() == b"two"
    assert tree(tmp_path) == ["f"]


def test_records_are_sizes_and_hashes(tmp_path: Path) -> None:
    parts = [b"a" * (9 << 20), memoryview(b"bc"), b""]
    whole = b"".join(bytes(p) for p in parts)
    record = write_file(tmp_path / "f", parts)
    assert (tmp_path / "f").read_bytes() == whole
    assert (
        record
        == hash_file(tmp_path / "f")
        == (len(whole), hashlib.blake2b(whole, digest_size=32).hexdigest())
    )


def test_a_claim_names_its_holder_and_ends_with_the_block(tmp_path: Path) -> None:
    with claimed(tmp_path / "claim"):
        assert (tmp_path / "claim").read_text() == f"{os.getpid()}\n"
        with pytest.raises(InUse, match=str(os.getpid())), claimed(tmp_path / "claim"):
            pass
    with claimed(tmp_path / "claim"):
        pass
    with pytest.raises(KeyError), claimed(tmp_path / "claim"):
        raise KeyError
    with claimed(tmp_path / "claim"):
        pass
