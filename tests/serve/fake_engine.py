"""An engine without a model: deterministic tokens, steps as long as told, and prompts that make it crash or hang.

``path`` configures it: ``"fake:name=a,step=0.002,load=0.5,fail=weights"``.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from deepseek.errors import EngineError, MissingExtraError, RequestError, WeightsError
from deepseek.serve.request import EngineStats, FinishReason, ModelInfo, Output, Request

FACTORY = "fake_engine:load"
#: Tokens that, as the first of a prompt, make something happen in its first step.
DIE, HANG, REFUSE, RAISE, SICK, ODD = 9001, 9002, 9003, 9004, 9005, 9006
PAGE = 16


def answer(request: Request, index: int) -> int:
    return (sum(request.prompt) * 31 + index * 7) % 997


class FakeEngine:
    def __init__(
        self, name: str = "fake", step: float = 0.0, load: float = 0.0, fail: str = "", die_at: int = 0,
        slots: int = 1 << 30, die_on: int = DIE,
    ) -> None:  # fmt: skip
        time.sleep(load)
        if fail == "weights":
            raise WeightsError("model.safetensors ends after 12 of 96 bytes: download it again")
        if fail == "extra":
            raise MissingExtraError("llguidance", "serve", "a grammar")
        if fail == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        self.info = ModelInfo(name, f"fake:{name}", 4096, 1000, 64, 12345, experts=4, expert_layers=(1,))
        self.seconds, self.die_at, self.slots, self.die_on = step, die_at, slots, die_on
        self.live: dict[str, tuple[Request, int]] = {}
        self.steps = self.tokens = self.rows = 0

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def prepared(self, request: Request) -> bool:
        return True

    def prepare(self, request: Request) -> None: ...

    def add(self, request: Request) -> None:
        if request.prompt[0] == REFUSE:
            raise RequestError("the prompt is too long by 7 tokens", "prompt")
        if request.prompt[0] == ODD:
            raise KeyError("nobody thought of this")
        assert request.id not in self.live
        self.live[request.id] = request, 0

    def abort(self, id: str, reason: FinishReason = "abort") -> bool:
        return self.live.pop(id, None) is not None

    def step(self) -> list[Output]:
        time.sleep(self.seconds)
        self.steps += 1
        outputs = []
        if self.die_at and self.steps >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        for id, (request, done) in list(self.live.items())[: self.slots]:
            first = request.prompt[0]
            if first in (DIE, self.die_on):
                os.kill(os.getpid(), signal.SIGKILL)
            if first == HANG:
                time.sleep(3600)
            if first == RAISE:
                raise EngineError("the logits are not finite")
            if first == SICK:
                del self.live[id]
                outputs.append(Output(id, finish="error", error="sick"))
                continue
            token = answer(request, done)
            last = done + 1 >= request.sampling.max_tokens
            outputs.append(
                Output(id, f"{token} ", (token,), finish="length" if last else None,
                       prompt_tokens=len(request.prompt))
            )  # fmt: skip
            self.tokens += 1
            self.rows += 1 if done else len(request.prompt)
            if last:
                del self.live[id]
            else:
                self.live[id] = request, done + 1
        return outputs

    def stats(self) -> EngineStats:
        used = sum(-(-(len(r.prompt) + n) // PAGE) for r, n in self.live.values())
        return EngineStats(
            prompt_rows=sum(len(r.prompt) for r, done in self.live.values() if not done), rows=self.rows,
            running=len(self.live), pages_total=1000, pages_used=used, steps=self.steps,
            generated_tokens=self.tokens, step_seconds=self.steps * 0.5,
        )  # fmt: skip


def load(path: str, options: dict[str, Any]) -> FakeEngine:
    kind, _, rest = path.partition(":")
    assert kind == "fake", path
    told = dict(pair.split("=") for pair in rest.split(",") if pair)
    kinds = {"step": float, "load": float, "die_at": int, "die_on": int, "slots": int}
    return FakeEngine(**{k: kinds.get(k, str)(v) for k, v in told.items()})
