"""A rollback, and a replay before it, restore everything there is: masters, every optimizer's and clipper's state."""

from __future__ import annotations

from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
from action_runs import with_actions
from recipe_runs import checkpointed, identical, losses, smallest, tensors, write_corpus

from deepseek.config import replace
from deepseek.precision import Policy, choose
from deepseek.recipes import control, plan, replay
from deepseek.recipes.pretrain import PretrainConfig, pretrain, resume_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("kinds") / "corpus")


def with_masters(mode: str, device: torch.device, *rest: Any, **options: Any) -> Policy:
    found = choose(mode, device, *rest, **options)
    return changed(found, masters=found.name == "bf16")


OPTIONS: dict[str, dict[str, Any]] = {
    "masters and Muon": {"train": {"precision_mode": "bf16"}},
    "masters, Adafactor in int8, zclip": {
        "train": {"precision_mode": "bf16", "clip": "zclip"},
        "optim": {"name": "adafactor", "first_moment": "int8"},
    },
    "AdamW with betas by step, agc, z-loss": {
        "train": {"clip": "agc", "grad_clip_threshold": 0.05, "z_loss": 1e-3},
        "optim": {"name": "adamw", "betas_schedule": "dynamic"},
    },
    "autocast, recomputation, dual bias, drift response": {
        "train": {"precision_mode": "bf16", "activation_checkpoint": "blocks"},
        "moe": {"bias_step": "dual", "drift_response": True},
    },
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_rollback_is_a_resume_by_hand(
    kind: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "EVERY", 0.0)
    if "masters" in kind:
        monkeypatch.setattr(plan, "choose", with_masters)
        monkeypatch.setattr(replay, "choose", with_masters)
    options = {"train": {}, "optim": {}, "moe": {}} | OPTIONS[kind]
    config: PretrainConfig = smallest(
        corpus,
        data={"cache": str(corpus.parent / "cache")},
        train={"steps": 9, **options["train"]},
        optim=options["optim"],
    )
    config = replace(config, model=replace(config.model, moe=replace(config.model.moe, **options["moe"])))
    config = checkpointed(config, 3)
    live, by_hand = tmp_path / "live", tmp_path / "by-hand"
    asked = {
        7: [
            ("replay", {"step": 4}),
            ("replay", {"step": 5, "at": "current"}),
            ("rollback_skip", {"skip": [6, 7]}),
        ]
    }
    answers = with_actions(config, live, asked).answers()
    assert [a.status for a in answers] == ["done"] * 3, [a.result for a in answers]
    pretrain(config, by_hand)
    told = losses(by_hand)[4]
    assert answers[0].result["loss"] == pytest.approx(told, rel=1e-5)  # of step 4 with the weights of step 3
    assert resume_run(by_hand, skip=(6, 7)).finished
    assert identical(tensors(live), tensors(by_hand))
    assert losses(live) == losses(by_hand)
    assert losses(live)[6] != told
