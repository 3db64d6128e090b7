"""Constants that several folders share; each lives only here."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a token that is not supervised (torch.nn.CrossEntropyLoss's default)."""

IMAGE_TOKEN_INDEX = -200
"""The id that stands for one image in input_ids (LLaVA's)."""

IMAGE_PLACEHOLDER = "<image>"
"""What a record's text holds where an image goes."""

BEST = "best.json"
"""In a work dir: the checkpoint that scored best while training."""
FINISHED = "finished.json"
"""In a work dir, once the last step is made: which checkpoint is the last, and the config."""
CRASH = "crash"
"""In a work dir: a folder with what each rank of a failed run left."""
DATA_FINGERPRINT = "llava_tune_data.json"
"""In a checkpoint: what identifies the data that it was trained on."""
