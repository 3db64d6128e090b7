"""The counted operations of a step are those that PyTorch's own counter sees the tensors make."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_tune.config import Lora, load_run
from llava_tune.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_tune.model.factory import build_llava
from llava_tune.model.flops import device_peak, step_flops
from tests.conftest import Small

LORA = Lora(rank=4, dropout=0.0)


@pytest.mark.parametrize(
    ("llm", "vision", "projector"),
    [
        ({}, {}, {}),
        ({"freeze": True}, {"freeze": True}, {}),
        ({}, {"freeze": True}, {}),
        ({"freeze": True, "lora": LORA}, {"freeze": True}, {}),
        ({"freeze": True, "lora": LORA}, {"freeze": True, "lora": LORA}, {"freeze": True}),
    ],
    ids=["full", "projector", "llm and projector", "lora", "lora in the tower"],
)
def test_counted_operations_are_pytorchs(
    small: Small, tmp_path: Path, llm: dict[str, Any], vision: dict[str, Any], projector: dict[str, Any]
) -> None:
    run = load_run(small.config)
    assert run.model.vision is not None
    tower = tmp_path / "tower.json"
    tower.write_text(
        '{"embed_dim": 32, "quick_gelu": true, "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, '
        '"head_width": 32}, "text_cfg": {}}'
    )
    model = dataclasses.replace(
        run.model,
        llm=dataclasses.replace(run.model.llm, attention="eager", **llm),
        vision=dataclasses.replace(run.model.vision, **{"name": str(tower), **vision}),
        projector=dataclasses.replace(run.model.projector, **projector),
    )
    llava = build_llava(model)
    assert llava.vision is not None
    patches, tokens, supervised = llava.vision.tokens, 60, 20
    ids = torch.randint(0, llava.config.vocab_size, (1, tokens))
    ids[0, 3 : 3 + patches] = IMAGE_TOKEN_INDEX
    labels = ids.clone()
    labels[:, : tokens - supervised] = IGNORE_INDEX
    positions = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        llava(ids, positions, labels, torch.randn(1, 3, 64, 64))["loss"].backward()
    # Eager attention multiplies the masked half, too: all n² pairs, not the n (n + 1) / 2 of the model.
    counted = step_flops(llava).of(tokens, tokens**2, supervised, 1)
    # What lies in front of the tower's first adapter needs no gradient: that is half of a block, and here there are two.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05 if "lora" in vision else 0.02)


def test_peaks_are_found_by_the_names_that_drivers_give() -> None:
    assert device_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak("NVIDIA H100 PCIe") == 756e12
    assert device_peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert device_peak("NVIDIA GeForce RTX 4090") == 165e12
    assert device_peak("A card of tomorrow") is None
