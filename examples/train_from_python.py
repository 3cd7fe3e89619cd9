"""Train, resume and use a model from Python, in seconds.

python examples/train_from_python.py [--run runs/from-python]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import deepseek as ds

HERE = Path(__file__).parent


def config(steps: int) -> ds.PretrainConfig:
    """Two layers, one of them hybrid, four experts; the text beside this file."""
    return ds.PretrainConfig(
        model=ds.ModelConfig(
            hidden=64,
            layers=2,
            pattern="LH",
            max_length=256,
            attention=ds.AttentionConfig(heads=2, kv_heads=1, head_dim=32, window=32),
            moe=ds.MoEConfig(experts=4, top_k=2, expert_ffn=64),
        ),
        data=ds.DataConfig(
            sources=(ds.SourceConfig(kind="text", path=str(HERE / "text"), split="paragraph"),),
            vocab_size=512,
            held_out=0.1,
        ),
        train=ds.TrainingConfig(steps=steps, batch_tokens=1024, length=128, precision_mode="fp32"),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, default=Path("runs/from-python"))
    run = parser.parse_args().run
    shutil.rmtree(run, ignore_errors=True)

    events = ds.events.MemorySink()  # or write your own: a class with one method
    result = ds.pretrain(config(steps=20), run=run, sinks=[events])
    losses = events.series("train", "loss")
    print(f"{result.run}: loss {losses[0]:.2f} → {losses[-1]:.2f} in {result.step} steps")

    result = ds.resume(run, config(steps=30))
    if result.evaluation is not None:
        print(f"resumed to step {result.step}: {result.evaluation.bits_per_byte:.2f} bits per byte, held out")

    model = ds.load(run)
    print(repr(model.generate("The ", temperature=0.8, seed=1, max_tokens=40)))


if __name__ == "__main__":
    main()
