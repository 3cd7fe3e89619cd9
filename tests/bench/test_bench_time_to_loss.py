"""Time to loss: an epoch covers the corpus, bits per byte are what they are said to be, schedules end on time."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek.batch import Batch
from deepseek.bench import time_to_loss as bench
from deepseek.bench.time_to_loss import (
    HeldOut,
    Job,
    Options,
    Ours,
    Peer,
    Rows,
    Stack,
    made_up,
    minutes_to,
    quick,
)
from deepseek.config import replace as changed
from deepseek.errors import ConfigError

CPU = torch.device("cpu")


def small(**changes: Any) -> Options:
    return quick(Options(quick=True, device="cpu", corpus="nowhere", **changes))


def test_an_epoch_sees_every_target_once() -> None:
    rows = Rows(torch.arange(1000), 64, seed=3)
    seen = rows.next(len(rows._starts))
    assert (seen.diff(dim=1) == 1).all()  # contiguous
    targets = seen[:, 1:].flatten()
    assert len(targets.unique()) == len(targets) >= 1000 - 2 * 64
    assert rows.epoch == 0
    again = rows.next(3)
    assert rows.epoch == 1
    assert set(again[:, 0].tolist()).isdisjoint(seen[:, 0].tolist())  # cut elsewhere


def test_the_order_does_not_depend_on_the_batch() -> None:
    tokens = torch.arange(1000)
    one, other = Rows(tokens, 32, seed=1), Rows(tokens, 32, seed=1)
    assert torch.equal(
        torch.cat([one.next(4) for _ in range(15)]), torch.cat([other.next(10) for _ in range(6)])
    )
    assert not torch.equal(Rows(tokens, 32, seed=2).next(8), Rows(tokens, 32, seed=1).next(8))


def test_rows_need_tokens() -> None:
    with pytest.raises(ConfigError, match="no two rows of 64"):
        Rows(torch.arange(100), 64, seed=0)


class Uniform:
    """Knows nothing; remembers the factors."""

    def __init__(self, vocab: int, after: Callable[[], None] = lambda: None) -> None:
        self.vocab, self.after, self.factors = vocab, after, list[float]()

    def step(self, batch: Batch, factor: float) -> Tensor:
        self.factors.append(factor)
        self.after()
        return torch.tensor(math.log(self.vocab))

    def nats(self, batch: Batch) -> Tensor:
        self.after()
        return torch.tensor(batch.targets.numel() * math.log(self.vocab))


def test_bits_per_byte_of_a_uniform_guess() -> None:
    tokens = replace(made_up(0), token_bytes=made_up(0).token_bytes * 4)
    held_out = HeldOut.of(tokens, 100, 700, CPU)
    assert held_out.rows.shape == (7, 101)
    assert held_out.n_bytes == 4 * 700
    assert held_out.bits_per_byte(Uniform(256)) == pytest.approx(8 / 4)


def test_the_schedule_follows_the_clock_and_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def second() -> None:
        now[0] += 1.0

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    options = small(marks=4)
    options = replace(options, marks=4)
    stack, trainer = replace(options.dense, batch_tokens=256), Uniform(256, second)
    found = bench.train(trainer, Job("dense", stack, 1e-3, minutes=2.0), options, made_up(0), started=0.0)
    # 120 steps of a second each on the clock, three before it; evaluations take seconds too and are not on it.
    assert found["clock_seconds"] == 120
    assert found["steps"] == 123
    assert [m["minutes"] for m in found["marks"]] == [0, 0.5, 1.0, 1.5, 2.0]
    assert [m["tokens"] for m in found["marks"]] == [0, 33 * 256, 63 * 256, 93 * 256, 123 * 256]
    assert found["tokens_per_second"] == pytest.approx(256)
    factors = trainer.factors
    assert factors[:3] == [factors[3]] * 3  # the first steps are at the start of the warm-up
    assert max(factors) == 1.0
    decay = 1 - 0.3  # the last 30% of the time fall linearly to 2%
    expected = [0.02 + 0.98 * (1 - (s / 120 - decay) / 0.3) for s in range(90, 120)]
    assert factors[-30:] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_peer_steps_and_evaluates_as_plain_torch_does(weights: Any) -> None:
    options = small()
    config = changed(options.peer.model, vocab_size=256, max_length=64)
    batch = Batch.from_rows(torch.randint(0, 256, (5, 65), generator=torch.Generator().manual_seed(0)))
    peer = Peer(Job("peer", replace(options.peer, weights=weights), 1e-2, 1.0), options, config, micro_rows=2)
    with torch.no_grad():
        logits = peer.model(input_ids=batch.tokens).logits
    expected = F.cross_entropy(logits.double().flatten(0, 1), batch.targets.flatten(), reduction="sum")
    with torch.no_grad():
        assert float(peer.nats(batch)) == pytest.approx(float(expected), rel=1e-5)
    assert float(peer.step(batch, 1.0)) == pytest.approx(
        float(expected) / 320, rel=1e-5
    )  # 5 rows, 2 at a time
    with torch.no_grad():
        after = float(peer.nats(batch))
    assert after < float(expected)
    before = [p.detach().clone() for p in peer.parameters]
    peer.step(batch, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, peer.parameters))  # the factor counts


def test_ours_evaluates_the_whole_distribution() -> None:
    options = small()
    config = changed(options.moe.model, vocab_size=256, max_length=64)
    trainer = Ours(Job("moe", options.moe, 3e-3, 1.0), options, config, micro_rows=2)
    batch = Batch.from_rows(torch.randint(0, 256, (3, 65), generator=torch.Generator().manual_seed(0)))
    trainer.step(batch, 1.0)
    with torch.no_grad():
        found = float(trainer.nats(batch))
        trainer.model.eval()
        logits = trainer.model.logits(trainer.model(batch.tokens).hidden)
    expected = -logits.double().log_softmax(-1).gather(-1, batch.targets[..., None]).sum()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_every_stack_runs_and_later_calls_add_to_the_plot(tmp_path: Path) -> None:
    base = {"quick": True, "device": "cpu", "corpus": "nowhere", "out": str(tmp_path), "minutes": 0.005}
    bench.run(Options(stacks="moe", **base))
    report = bench.run(
        Options(stacks="dense,peer", peer=Stack(kind="transformers", lrs=(1e-3, 3e-3)), **base)
    )
    rows = report.tables[bench.TITLE]
    assert len(rows) == 4  # of both calls, both learning rates of the peer
    assert sorted(row["bits/byte"] for row in rows) == [row["bits/byte"] for row in rows]
    found = json.loads((tmp_path / "time_to_loss.json").read_text())
    assert [r["bits_per_byte"] for r in found["runs"]] == [row["bits/byte"] for row in rows]
    assert all(len(r["marks"]) == 4 and not r["problem"] for r in found["runs"])
    best = min(r["bits_per_byte"] for r in found["runs"] if r["name"] == "peer")
    assert {row["to best peer %"] for row in rows if row["stack"] == "peer"} >= {0.0}
    assert rows[0]["to best peer %"] == pytest.approx(100 * (rows[0]["bits/byte"] / best - 1))
    drawn = ElementTree.fromstring((tmp_path / "time_to_loss.svg").read_text())
    paths = [p.get("class") for p in drawn.iter("{http://www.w3.org/2000/svg}path")]
    assert paths.count("faint") == 1  # the learning rate of the peer that lost
    assert len(bench.run(Options(stacks="", **base)).tables[bench.TITLE]) == 4
    with pytest.raises(ConfigError, match="do not compare"):
        bench.run(Options(stacks="dense", **{**base, "minutes": 0.01}))


def test_tuning_picks_the_best_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[float, float, bool]] = []

    def execute(job: Job, options: Options) -> dict[str, Any]:
        ran.append((job.lr, round(60 * job.minutes, 6), job.tuning))
        bits = abs(job.lr - 2e-3) + 1  # 2e-3 is best
        marks = [
            {"minutes": m, "tokens": 1, "bits_per_byte": bits + 1 - m / job.minutes}
            for m in (0.0, job.minutes)
        ]
        return {
            "name": job.name, "label": "", "lr": job.lr, "minutes": job.minutes, "tuning": job.tuning, "problem": "",
            "bits_per_byte": bits, "marks": marks, "corpus": "", "length": 1, "held_out_bytes": 1, "device": "",
            "stack": {"kind": job.stack.kind},
        }  # fmt: skip

    monkeypatch.setattr(bench, "execute", execute)
    peer = replace(bench.PEER, lrs=(1e-3, 2e-3, 4e-3))
    options = Options(device="cpu", stacks="peer", tune_seconds=30, minutes=2, out=str(tmp_path), peer=peer)
    monkeypatch.setattr(bench, "corpus", lambda options: made_up(0))
    bench.run(options)
    assert ran == [(1e-3, 30, True), (2e-3, 30, True), (4e-3, 30, True), (2e-3, 120, False)]


def test_minutes_to_a_loss() -> None:
    marks = [{"minutes": float(m), "bits_per_byte": b} for m, b in ((0, 4.0), (1, 2.0), (2, 1.0))]
    assert minutes_to(marks, 1.5) == pytest.approx(1.5)
    assert minutes_to(marks, 2.0) == pytest.approx(1.0)
    assert minutes_to(marks, 0.5) is None


def test_unknown_stacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dense'"):
        Options(stacks="dence").chosen


def test_a_run_in_another_process(tmp_path: Path) -> None:
    options = replace(small(), out=str(tmp_path), minutes=0.002)
    gpus: Queue[int] = Queue()
    gpus.put(0)
    job = Job("dense", options.dense, 2e-3, options.minutes)
    found = bench._elsewhere(job, options, gpus)
    assert not found["problem"]
    assert (found["name"], found["lr"], len(found["marks"])) == ("dense", 2e-3, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["run-dense-0.002.json"]
    broken = bench._elsewhere(job, replace(options, device="nowhere"), gpus)
    assert "nowhere" in broken["problem"]
    assert gpus.get() == 0  # given back
    report = bench.Report("time-to-loss", CPU, quiet=True)
    assert bench.summary(broken)["bits/byte"] is None
    assert len(bench.publish(tmp_path, report)[0]) == 1
