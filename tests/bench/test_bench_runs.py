"""Every benchmark runs here, tiny: the tables are complete, and the options are refused by name and number."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from deepseek import bench, cli
from deepseek.bench import attention, memory, moe, optim, train
from deepseek.errors import ConfigError

CPU = {"quick": True, "device": "cpu"}


@pytest.mark.parametrize("model", ["dense_856m", "moe_64x2"])
def test_train(model: str) -> None:
    report = train.run(train.Options(model=model, **CPU))
    rows = {row["stack"]: row for row in report.tables["training"]}
    wanted = {"deepseek", "plain-torch, eager", "transformers, eager"}
    assert set(rows) == wanted | ({"deepseek, forced balance"} if model == "moe_64x2" else set())
    for row in rows.values():
        assert row["tok/s"] * row["step ms"] / 1e3 == pytest.approx(256)
        assert row["MFU %"] is None  # no data sheet for a CPU
        assert 0 < row["loss last"] < 7
    if model == "moe_64x2":
        assert rows["deepseek, forced balance"]["MaxVio"] == pytest.approx(0, abs=1e-6)
        assert rows["deepseek"]["MaxVio"] > 0.01


def test_a_snapshot_and_the_kernels_of_a_hybrid_model() -> None:
    more = {"peer": "none", "real_only": True, "checkpoint": True, "profile": True}
    report = train.run(train.Options(model="small", **more, **CPU))
    assert report.tables["deepseek: kernels"]
    rows = report.tables["checkpoints"]
    assert len(rows) == 2
    assert all(row["on disk after s"] >= row["stall s"] > 0 for row in rows)


def test_micro_batches_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class Hungry:
        def __init__(self, options: object, config: object, micro_rows: int, **more: object) -> None:
            tried.append(micro_rows)
            if micro_rows > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")

        def __call__(self, batch: object) -> torch.Tensor:
            return torch.ones(())

    monkeypatch.setattr(train, "Ours", Hungry)
    report = train.run(train.Options(peer="none", **CPU))
    assert tried == [2, 1]
    assert [row["rows"] for row in report.tables["training"]] == [1]
    assert any("do not fit" in note for note in report.notes)


def test_attention() -> None:
    report = attention.run(attention.Options(**CPU))
    times = report.tables["time at 1 x 256"]
    assert times[0]["attention"] == "Full, SDPA"
    assert {row["attention"][0] for row in times} == {"F", "L", "H"}
    errors = report.tables["relative error against float64, 128 positions"]
    assert len(errors) == len(times)
    assert all(row["output"] < 1e-5 and row["worst gradient"] < 1e-4 for row in errors)
    reads = report.tables["bytes of keys and values that a new token reads, per row"]
    assert all(row["counted, KiB a layer"] == row["measured, KiB a layer"] for row in reads)


def test_an_error_would_be_seen() -> None:
    x = torch.randn(8, requires_grad=True)
    found = attention._error((lambda: 1.1 * x, (x,)), (lambda: x.double(), (x,)))
    assert found["output"] == pytest.approx(0.1, rel=1e-4)
    assert found["worst gradient"] == pytest.approx(0.1, rel=1e-4)


def test_moe() -> None:
    report = moe.run(moe.Options(**CPU))
    balance = {
        title.split(" routing")[0]: rows[0] for title, rows in report.tables.items() if "MaxVio" in rows[0]
    }
    assert list(balance) == ["uniform", "zipf", "one takes all", "half empty"]
    assert balance["uniform"]["MaxVio"] < 0.3 < balance["zipf"]["MaxVio"] < balance["one takes all"]["MaxVio"]
    assert balance["half empty"]["coverage"] == pytest.approx(0.5)
    assert len(report.tables["uniform routing, 512 tokens"]) == 3


def test_steering_decides_the_choice() -> None:
    torch.manual_seed(0)
    config = moe.Options(quick=True).config
    x = moe.inputs("half empty", 200, config, torch.device("cpu"))
    layer = moe.OurLayer(config, torch.device("cpu")).eval()
    _, stats = layer.moe(x)
    torch.testing.assert_close(stats.chosen_E / stats.chosen_E.sum(), moe._load(x, config))
    assert stats.chosen_E[config.moe.experts // 2 :].sum() == 0


def test_optim() -> None:
    report = optim.run(optim.Options(models=("moe_64x2",), steps_to_target=True, **CPU))
    rows = {row["optimizer"]: row for row in report.tables["optimizer step, moe_64x2"]}
    assert rows["torch AdamW, fused, fp32"]["bytes a weight"] == pytest.approx(8, abs=0.01)
    assert rows["muon"]["bytes a weight"] < 6
    traffic = {name: row["least traffic GB"] for name, row in rows.items()}
    assert traffic["torch AdamW, fused, fp32"] == pytest.approx(traffic["adamw"], rel=0.01)
    ends = {
        row["optimizer"]: row for row in next(t for n, t in report.tables.items() if n.startswith("steps to"))
    }
    assert ends["adamw"]["speed-up"] == pytest.approx(1)
    assert set(ends) >= {"adamw", "muon", "adafactor", "adamw, dynamic betas"}
    assert rows["adafactor"]["bytes a weight"] < rows["muon"]["bytes a weight"]


def test_memory() -> None:
    report = memory.run(memory.Options(modes=("none", "blocks"), **CPU))
    rows = {row["mode"]: row for row in report.tables["forward and backward of 4 x 64"]}
    assert rows["none"]["FLOPs, of none"] == 1
    assert rows["blocks"]["saved %"] > 60
    assert 1.1 < rows["blocks"]["FLOPs, of none"] <= 1.34
    proof = report.tables["4 rows of 128 in the memory of 4 x 32"]
    assert [(row["mode"], row["length"], row.get("fits")) for row in proof] == [
        ("none", 32, None), ("none", 128, "no"), ("blocks", 128, "yes"),
    ]  # fmt: skip


def test_steps_to_a_target_are_interpolated() -> None:
    curve = [(10, 5.0), (20, 4.0), (30, 3.0)]
    assert optim.steps_to(curve, 3.5) == pytest.approx(25)
    assert optim.steps_to(curve, 5.5) == 10
    assert optim.steps_to(curve, 2.9) is None
    assert optim.best({1e-3: curve, 1e-2: [(10, float("nan"))]})[0] == 1e-3


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: train.run(train.Options(model="dense_856", **CPU)), "did you mean 'dense_856m'"),
        (lambda: train.run(train.Options(length=100, batch_tokens=250, device="cpu")), "of --length=100"),
        (lambda: moe.run(moe.Options(model="dense_856m", **CPU)), "has no experts"),
        (lambda: moe.logits("lopsided", 4, 4), "'lopsided' is not known"),
        (lambda: attention.Options(shapes=("4096",)).sizes, "ROWSxLENGTH"),
        (lambda: optim.run(optim.Options(only=("adam",), **CPU)), "did you mean 'adamw'"),
        (lambda: bench.run("trains"), "did you mean 'train'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        make()  # type: ignore[operator]


def test_a_benchmark_may_be_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("toy_bench")

    def run(layers: int = 2, *, quick: bool = False) -> tuple[int, bool]:
        return layers, quick

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_bench", module)
    monkeypatch.setitem(bench.BENCHES, "toy", "toy_bench")
    assert bench.run("toy", ["--layers", "3", "--quick"]) == (3, True)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "attention.json"
    arguments = ["bench", "attention", "--quick", "--device", "cpu", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["/somewhere/deepseek/__main__.py", *arguments])
    assert cli.main() == 0
    told = json.loads(out.read_text())
    assert told["bench"] == "attention"
    assert told["options"]["quick"] is True
    assert told["environment"]["command"].startswith("deepseek bench attention --quick")
    assert cli.main(["bench", "attentoin"]) == 2
