"""Typed configs: the dataclasses, loading a config file, command-line overrides, the shipped recipes and presets."""

from llava_tune.config.load import load_run, override
from llava_tune.config.modified import with_fields, write_modified
from llava_tune.config.schema import (
    Dataset,
    DataSource,
    Evaluation,
    LanguageModel,
    Lora,
    Model,
    Optimizer,
    Preview,
    Projector,
    Run,
    Training,
    VisionTower,
    from_json,
    to_json,
)
from llava_tune.config.shipped import copy_config, deepspeed_config, find_config, list_configs

__all__ = [
    "DataSource",
    "Dataset",
    "Evaluation",
    "LanguageModel",
    "Lora",
    "Model",
    "Optimizer",
    "Preview",
    "Projector",
    "Run",
    "Training",
    "VisionTower",
    "copy_config",
    "deepspeed_config",
    "find_config",
    "from_json",
    "list_configs",
    "load_run",
    "override",
    "to_json",
    "with_fields",
    "write_modified",
]
