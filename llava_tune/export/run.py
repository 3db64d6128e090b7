"""Export a checkpoint: write it beside, let another program prove it, then give it its name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch

from llava_tune.errors import InputError, RunFailed
from llava_tune.evaluate.answer import Answerer
from llava_tune.export.gate import Report, ask_folder, ask_ours, compare, conversations, write_pictures, write_report
from llava_tune.export.hf import write_hf
from llava_tune.export.weights import merge_adapters, round_weights
from llava_tune.paths import whole_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_hf(checkpoint: Path, folder: Path, *, dtype: Literal["bf16", "fp32"], images: list[Path]) -> Report:
    """Write `folder`, which transformers opens; it is there only if the gate is passed.

    Args:
        images: pictures for the gate; empty: drawn ones.

    Raises:
        InputError: wrong checkpoint, or `folder` is there already.
        RunFailed: what transformers computes from the export is not what we compute.
    """
    if folder.exists():
        raise InputError(f"{folder} is there already. Remove it, or choose another folder")
    for image in images:
        if not image.is_file():
            raise InputError(f"--image {image}: no such file")
    answerer = Answerer(checkpoint, dtype=torch.float32)
    kind = DTYPES[dtype]
    with whole_folder(folder) as beside, tempfile.TemporaryDirectory() as temporary:
        pictures = [] if answerer.llava.vision is None else images or write_pictures(Path(temporary))
        asked = conversations(pictures)
        # In fp32 the proof is against the model as it was trained, adapters and all; what bf16 rounds away is taken from both.
        ours = [ask_ours(answerer, one) for one in asked] if kind == torch.float32 else []
        merge_adapters(answerer.llava)
        if not ours:
            round_weights(answerer.llava, kind)
            ours = [ask_ours(answerer, one) for one in asked]
        write_hf(answerer, beside, kind)
        report = compare(ours, ask_folder(beside, asked, Path(temporary)), beside, answerer.layout.stop_ids)
        if failures := report.failures():
            raise RunFailed(
                f"the export of {checkpoint} failed its gate, so {folder} was not written: {'; '.join(failures)}. Please report this"
            )
        write_report(beside, report, kind)
        for path in beside.iterdir():
            path.chmod(0o644)
    return report
