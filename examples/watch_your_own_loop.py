"""Watch a loop that is not ours: the source document's monitor, and the store, detectors and page behind it.

python examples/watch_your_own_loop.py            # trains a small network for a few seconds, with one bad batch
deepseek monitor runs                             # the run, its one-step spike, and what else moved
"""

from __future__ import annotations

import time

import torch

import deepseek.monitor as wandb  # init, log and finish have wandb's shape
from deepseek.monitor import MovingAverage, RateCounter, TrainingMonitor

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
truth = torch.randn(16, 1)

run = wandb.init(project="examples", name="own-loop", config={"lr": 3e-3, "hidden": 64})
monitor = TrainingMonitor(
    metrics={"loss": MovingAverage(window=100), "throughput": RateCounter()},
    on_alert=lambda alert: print(f"step {alert.step}: {alert.text}"),
)

for step in range(600):
    began = time.perf_counter()
    x = torch.randn(256, 16)
    y = x @ truth + 0.1 * torch.randn(256, 1)
    if step == 400:
        y = y + 20  # a bad batch
    loss = (model(x) - y).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    monitor.update({"loss": loss.item(), "throughput": 256})
    wandb.log(
        {"loss": loss.item(), "grad_norm": norm.item(), "seconds": time.perf_counter() - began}, step=step
    )

wandb.finish()
