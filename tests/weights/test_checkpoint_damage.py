"""Damaged, foreign and impossible checkpoints are refused by name; a full disk spoils nothing."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.errors import CheckpointError, RunError
from deepseek.weights import checkpoint as module
from deepseek.weights.checkpoint import CheckpointConfig, Checkpointer, latest, list_checkpoints, load
from deepseek.weights.manifest import _text

FILES = ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"]


def make(run: Path, *steps: int) -> Path:
    with Checkpointer(run, CheckpointConfig(keep_last=0, asynchronous=False)) as writer:
        for step in steps:
            tensors = {"model": {"w": torch.full((5,), float(step))}, "optimizer": {"m": torch.ones(3)}}
            writer.save(step, tensors=tensors, state={"step": step, "text": "x" * 20})
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("damage") / "run", 400, 500)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_changed_byte_is_refused(whole: Path, data: st.DataObject, name: str) -> None:
    path = whole / "step-000500" / name
    good = path.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "swap", "gone"]))
    place = data.draw(st.integers(0, len(good) - 1))
    bad = {
        "flip": good[:place] + bytes([good[place] ^ data.draw(st.integers(1, 255))]) + good[place + 1 :],
        "cut": good[:place],
        "grow": good[:place] + data.draw(st.binary(min_size=1, max_size=9)) + good[place:],
        "swap": bytes(reversed(good)),
        "gone": None,
    }[kind]
    try:
        if bad is None:
            path.unlink()
        else:
            path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"--from 400"):
            load(whole)
        with contextlib.suppress(CheckpointError):  # without hashes a changed number passes, and no more
            load(whole, verify=False)
    finally:
        path.write_bytes(good)
    assert load(whole).model["w"][0] == 500


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    st.sampled_from(["step", "time", "parent", "metric", "world", "code", "groups", "files", "format"]),
)
def test_a_manifest_with_a_right_hash_and_wrong_content_is_refused_or_harmless(
    whole: Path, value: Any, key: str
) -> None:
    path = whole / "step-000500" / "manifest.json"
    good = path.read_bytes()
    try:
        path.write_bytes(_text({**json.loads(good)["manifest"], key: value}))
        with contextlib.suppress(CheckpointError):
            assert load(whole).model["w"][0] == 500
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), r"model.safetensors \(\d+ bytes\) is missing"),
        (
            lambda d: os.truncate(d / "model.safetensors", 50),
            r"model.safetensors is damaged: it has 50 bytes",
        ),
        (lambda d: (d / "extra.pt").write_bytes(b"x"), r"extra.pt does not belong to this checkpoint"),
        (lambda d: (d / "manifest.json").unlink(), r"has no manifest.json"),
        (
            lambda d: (d / "manifest.json").write_bytes(_text({"format": 7})),
            r"has format 7; this version .* reads 1",
        ),
        (lambda d: (d / "manifest.json").write_bytes(b"[" * 100_000), "not a checkpoint manifest"),
        (lambda d: shutil.copy(d.parent / "step-000400" / "manifest.json", d), "holds step 400"),
    ],
)
def test_the_message_says_what_is_wrong_and_what_to_do(tmp_path: Path, change: Any, message: str) -> None:
    run = make(tmp_path / "run", 300, 400, 500)
    change(run / "step-000500")
    for place in (run, run / "step-000500"):
        with pytest.raises(CheckpointError, match=message + r".*newest intact checkpoint is step-000400"):
            load(place)
    assert latest(run) == run / "step-000500"
    (run / "step-000400" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"--from 300"):
        load(run)
    assert load(run / "step-000300").step == 300


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    directory = make(tmp_path / "run", 1) / "step-000001"
    (directory / "model.safetensors").rename(tmp_path / "elsewhere")
    (directory / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="no other intact checkpoint"):
        load(directory)


def test_wrong_places_are_named(tmp_path: Path) -> None:
    make(tmp_path / "foo2", 1)
    (tmp_path / "foo").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"foo is not a run directory: it has no checkpoints; did you mean .*foo2\?"
    ):
        load(tmp_path / "foo")
    with pytest.raises(
        RunError, match=r"fo2 is not a run directory: it does not exist; did you mean .*foo2\?"
    ):
        load(tmp_path / "fo2")
    with pytest.raises(RunError, match="it is a file"):
        load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="no checkpoint of step 2; it has: step-000001"):
        load(tmp_path / "foo2" / "step-000002")
    assert list_checkpoints(tmp_path / "nothing") == []
    assert latest(tmp_path / "foo") is None
    moved = (tmp_path / "foo2" / "step-000001").rename(tmp_path / "mine")  # a copy under another name loads
    assert load(moved).step == 1


class TestDiskFull:
    def check(self, run: Path, message: str) -> None:
        before = sorted(p.name for p in run.iterdir())
        tensors = {"model": {"w": torch.ones(1_000_000)}}
        for asynchronous in (True, False):
            config = CheckpointConfig(asynchronous=asynchronous)
            with pytest.raises(CheckpointError, match=message), Checkpointer(run, config) as writer:
                writer.save(2, tensors=tensors, state={})
        assert sorted(p.name for p in run.iterdir()) == before
        assert load(run).step == 1

    def test_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = make(tmp_path / "run", 1)
        usage = shutil.disk_usage(run)._replace(free=3_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        self.check(run, r"disk full: step-000002 needs 5\.\d MB and .* has 3\.0 MB free")

    def test_while_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run, write = make(tmp_path / "run", 1), module.write_group

        def full(*args: Any) -> Any:
            write(*args)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, "write_group", full)
        self.check(run, r"disk full: step-000002 needs 4\.0 MB and .* free")

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Iterator[Path]:
        place = tmp_path / "tiny"
        place.mkdir()
        try:
            command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
            if subprocess.run(command, capture_output=True).returncode != 0:
                pytest.skip("mounting a small file system needs root")
        except FileNotFoundError:
            pytest.skip("no mount command")
        yield place
        subprocess.run(["umount", str(place)], check=True)

    @pytest.mark.parametrize("checked", [True, False])
    def test_on_a_really_full_disk(self, tiny: Path, monkeypatch: pytest.MonkeyPatch, checked: bool) -> None:
        run = make(tiny / "run", 1)
        if not checked:
            monkeypatch.setattr(Checkpointer, "_check_space", lambda self, job: None)
        self.check(run, r"disk full: step-000002 needs \d\.\d MB and .* has \d.* free")
