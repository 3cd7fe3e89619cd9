"""Training: the loop, the step, optimizers, schedules, losses."""

from deepseek.train.evaluate import Evaluation, evaluate
from deepseek.train.loop import Stop, TrainingConfig, fit, seed_everything
from deepseek.train.losses import next_token_loss
from deepseek.train.optim import OptimConfig, build_optimizer
from deepseek.train.schedule import Schedule, ScheduleConfig
from deepseek.train.step import StepResult, TrainStep

__all__ = [
    "Evaluation", "OptimConfig", "Schedule", "ScheduleConfig", "StepResult", "Stop", "TrainStep", "TrainingConfig",
    "build_optimizer", "evaluate", "fit", "next_token_loss", "seed_everything",
]  # fmt: skip
