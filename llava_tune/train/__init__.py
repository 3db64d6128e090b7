"""Training: launchers, the data of a run, the Trainer, checkpoints, telemetry."""

from llava_tune.train.run import accumulation_steps, get_ready, train

__all__ = ["accumulation_steps", "get_ready", "train"]
