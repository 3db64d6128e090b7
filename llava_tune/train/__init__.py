"""Training: launchers, the data of a run, the Trainer, checkpoints, telemetry."""

from llava_tune.train.run import Trained, train

__all__ = ["Trained", "train"]
