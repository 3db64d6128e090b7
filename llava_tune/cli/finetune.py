"""llava-tune finetune CFG: as pretrain"""

from __future__ import annotations

from llava_tune.cli import pretrain

DESCRIPTION = "Fine-tune a LLaVA model (stage 2): in full, with LoRA or QLoRA, as the config says."


def main(arguments: list[str]) -> None:
    """Train."""
    pretrain.main(arguments, verb="finetune", description=DESCRIPTION)
