"""How an engine serves, without torch: a front end knows its options before the engine has started."""

from __future__ import annotations

import os
from dataclasses import field
from typing import Literal

from deepseek.config import configclass
from deepseek.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16", "int8"]


@configclass
class EngineConfig:
    """How a model is served.

    Attributes:
        precision: format of the weights; 'auto' measures on a CPU and takes bf16 on an accelerator that has it.
        memory_gib: for the cache; 0: most of an accelerator's free memory, a part of a CPU's.
        max_running: sequences computed at once; max_step_tokens: rows of one step, which bounds how long a long prompt
            delays everybody else's next token. 0: derived from the device.
        step_goal: seconds that a step may take in the mean while answers wait for their next token: prompts get as many
            rows as that allows (``FeedbackBudget``), up to max_step_tokens. 0: prompts always get all rows.
        page: positions per page of the cache; 0: derived.
        speculate: tokens proposed at most by looking back in the text (n-gram speculation); 0: off. Changes no answer.
        max_length: positions a request may take, prompt and answer; 0: the model's own.
        ahead: launch the next decoding step before the host has read the last one's tokens (``serve.ahead``). ``None``:
            where steps are captured as CUDA graphs. Changes no answer.
        deterministic: every request's numbers are bit-identical whatever runs beside it, however its prompt is cut,
            cached or preempted (fp32 on a CPU); costs speed.
        adapters: LoRA adapters by name, directories as PEFT writes them.
    """

    device: str = "auto"
    precision: Precision = "auto"
    memory_gib: float = 0.0
    max_running: int = 0
    max_step_tokens: int = 0
    step_goal: float = 0.0
    page: int = 0
    prefix_cache: bool = True
    speculate: int = 0
    max_length: int = 0
    deterministic: bool = False
    graphs: bool = True
    ahead: bool | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    name: str = ""  # what clients call the model; its directory's name unless told

    def check(self) -> None:
        for name in (
            "memory_gib",
            "max_running",
            "max_step_tokens",
            "step_goal",
            "page",
            "speculate",
            "max_length",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must not be negative; 0 means derived or off"
                )
        if self.speculate > 64:
            raise ConfigError(f"speculate={self.speculate} drafts more than 64 tokens; 4 to 16 pay")


def default_running(cpu: bool) -> int:
    """Sequences computed at once unless told."""
    return 64 if cpu else 256


#: glibc: large pages for weights, and no mapping of its own for a weight below 32 MiB, which would not fill one.
HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.top_pad=16777216"


def step_environment() -> dict[str, str]:
    """The environment of a process that steps an engine.

    On a CPU a step reads every weight once, and with pages of 4 KiB the processor spends much of that time looking up
    where they are (LOG.md). glibc asks for large pages only if it is told before the process starts.
    """
    return {"GLIBC_TUNABLES": HUGE_PAGES, **os.environ}
