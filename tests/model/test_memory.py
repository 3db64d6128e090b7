"""What `plan` counts is what PyTorch holds: weights, gradients and optimizer to the byte, activations as autograd keeps them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llava_tune.config import Lora, load_run
from llava_tune.model.attention import sample_bounds
from llava_tune.model.factory import build_llava
from llava_tune.model.memory import SavedBytes, training_memory
from llava_tune.train.optimizer import build_optimizer
from tests.conftest import Small

trained = pytest.mark.parametrize(
    "changes",
    [{}, {"freeze": True}, {"freeze": True, "lora": Lora(rank=8, dropout=0.0)}],
    ids=["full", "frozen", "lora"],
)


@trained
def test_weights_gradients_and_optimizer_to_the_byte(small: Small, changes: dict[str, Any]) -> None:
    run = load_run(small.config)
    model = dataclasses.replace(run.model, llm=dataclasses.replace(run.model.llm, **changes))
    llava = build_llava(model)
    optimizer = build_optimizer(llava, run.optimizer)
    for parameter in llava.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    plan = training_memory(
        model,
        ranks=1,
        zero_stage=0,
        offload_optimizer=False,
        bf16=False,
        rows=1,
        length=64,
        images=1,
        checkpointing=False,
    )
    assert plan.weights == sum(p.numel() * p.element_size() for p in llava.parameters())
    assert plan.gradients == sum(p.grad.nbytes for p in llava.parameters() if p.grad is not None)
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim() > 0]
    assert plan.optimizer == sum(v.nbytes for v in moments)


@trained
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(small: Small, changes: dict[str, Any], bf16: bool) -> None:
    run = load_run(small.config)
    assert run.model.vision is not None
    vision = dataclasses.replace(run.model.vision, freeze=True)
    model = dataclasses.replace(run.model, llm=dataclasses.replace(run.model.llm, **changes), vision=vision)
    dtype = torch.bfloat16 if bf16 else torch.float32
    llava = build_llava(model, dtype=dtype)
    rows, length = 2, 96
    hidden = torch.randn(rows, length, llava.config.hidden_size, dtype=dtype, requires_grad=True)
    positions = torch.arange(length)[None].expand(rows, -1).contiguous()
    # As the Trainer runs it: what is trained is fp32, and autocast computes in bf16.
    with torch.autocast("cpu", dtype, enabled=bf16), SavedBytes(llava.llm) as saved:
        llava.llm.get_decoder()(
            inputs_embeds=hidden, position_ids=positions, attention_mask=sample_bounds(positions), use_cache=False
        )
    plan = training_memory(
        model, ranks=1, zero_stage=0, offload_optimizer=False, bf16=bf16, rows=rows, length=length, images=1,
        checkpointing=False,
    )  # fmt: skip
    assert plan.activations == pytest.approx(saved.bytes, rel=0.05)


def test_zero_divides_what_it_partitions(small: Small) -> None:
    model = load_run(small.config).model
    common: dict[str, Any] = {
        "offload_optimizer": False,
        "bf16": True,
        "rows": 1,
        "length": 64,
        "images": 1,
        "checkpointing": True,
    }
    stages = [training_memory(model, ranks=4, zero_stage=stage, **common) for stage in (1, 2, 3)]
    one = training_memory(model, ranks=1, zero_stage=1, **common)
    assert [round(one.optimizer / s.optimizer, 2) for s in stages] == [4, 4, 4]
    assert [round(one.gradients / s.gradients, 2) for s in stages] == [1, 4, 4]
    assert [round(one.weights / s.weights, 2) for s in stages] == [1, 1, 4]
    assert one.optimizer == 6 * one.weights
