"""Evaluation: answers to question files, and their scores."""

from llava_tune.evaluate.run import Evaluated, evaluate

__all__ = ["Evaluated", "evaluate"]
