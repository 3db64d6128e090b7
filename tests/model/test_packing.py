"""Packed rows give the losses and gradients of the samples one by one, and packs are full and exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_tune.config import Lora, load_run, with_fields
from llava_tune.data import Collator, TokenizedSample
from llava_tune.data.order import BatchOrder, Share
from llava_tune.data.packing import pack
from llava_tune.model.factory import build_llava
from tests.conftest import Small


def samples(vocabulary: int, size: int) -> list[TokenizedSample]:
    """Text only, one image at the front, in the middle and at the end, several images, and several turns."""
    rng = np.random.default_rng(1)
    made = []
    for k, shape in enumerate(["tttt", "ittt", "tti", "titit", "ttttttttt", "iittt", "tt"]):
        ids: list[int] = []
        labels: list[int] = []
        pixels = []
        for part in shape:
            if part == "i":
                ids.append(-200)
                labels.append(-100)
                pixels.append(torch.randn(3, size, size, generator=torch.Generator().manual_seed(len(ids) + 100 * k)))
            else:
                text = rng.integers(5, vocabulary, 4).tolist()
                ids += text
                labels += text if len(ids) % 8 else [-100] * 4
        made.append(TokenizedSample(str(k), np.array(ids, np.int32), np.array(labels, np.int32), pixels))
    return made


def loss_and_gradients(llava: Any, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of all batches as one global batch."""
    llava.zero_grad()
    items = sum(int((b["labels"][:, 1:] >= 0).sum()) for b in batches)
    total = 0.0
    for batch in batches:
        loss = llava(**batch, num_items_in_batch=items)["loss"]
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in llava.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("more", ["plain", "checkpointing", "lora"])
def test_packed_equals_unpacked(small: Small, attention: str, more: str) -> None:
    fields: dict[str, Any] = {"model.llm.attention": attention, "model.vision.freeze": False}
    if more == "lora":
        fields |= {"model.llm.freeze": True, "model.llm.lora": Lora(rank=4, dropout=0.0)}
    llava = build_llava(with_fields(load_run(small.config), fields).model)
    if more == "lora":  # B starts at zero: give it a value, so that A has a gradient
        with torch.no_grad():
            for name, parameter in llava.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    llava.train()
    if more == "checkpointing":
        llava.gradient_checkpointing_enable()
    assert llava.vision is not None
    collate = Collator(llava.vision.tokens, 64)
    each = samples(llava.llm.config.vocab_size, 64)
    lengths = np.array([len(s.input_ids) + (llava.vision.tokens - 1) * len(s.pixel_values) for s in each])
    packs = pack(lengths, 64)
    assert len(packs) < len(each)
    rows = [[each[i] for i in packs[k]] for k in range(len(packs))]
    one_by_one = loss_and_gradients(llava, [collate([s]) for s in each])
    for batches in ([collate(rows)], [collate([row]) for row in rows]):
        loss, gradients = loss_and_gradients(llava, batches)
        assert loss == pytest.approx(one_by_one[0], rel=1e-5)
        assert gradients.keys() == one_by_one[1].keys()
        for name, expected in one_by_one[1].items():
            scale = expected.abs().max().item()
            assert (gradients[name] - expected).abs().max().item() <= 1e-5 * scale + 1e-9, name


def test_a_neighbour_in_the_row_changes_nothing(small: Small) -> None:
    """What would show a leak: another first sample, the same second one."""
    llava = build_llava(load_run(small.config).model).eval()
    assert llava.vision is not None
    collate = Collator(llava.vision.tokens, 64)
    each = samples(llava.llm.config.vocab_size, 64)

    def second_alone(first: TokenizedSample) -> float:
        silent = TokenizedSample(first.id, first.input_ids, np.full_like(first.labels, -100), first.pixel_values)
        with torch.no_grad():
            return float(llava(**collate([[silent, each[3]]]))["loss"])

    found = [second_alone(each[k]) for k in (0, 1, 4, 5)]
    with torch.no_grad():
        alone = float(llava(**collate([each[3]]))["loss"])
    assert found == pytest.approx([alone] * 4, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=200), capacity=st.integers(50, 120))
def test_packs_hold_each_sample_once_and_never_too_much(lengths: list[int], capacity: int) -> None:
    array = np.array(lengths, np.int32)
    packs = pack(array, capacity)
    assert sorted(packs.samples.tolist()) == list(range(len(lengths)))
    sizes = [int(array[packs[k]].sum()) for k in range(len(packs))]
    assert all(0 < size <= capacity for size in sizes)
    # Better than any packing that leaves two rows half empty.
    assert sum(2 * size <= capacity for size in sizes) <= 1


def test_packs_are_full_and_the_order_does_not_depend_on_ranks() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 20_000), 8, 2048).astype(np.int32)
    shares = [Share(0, 12_000, 12_000), Share(12_000, 20_000, 4_000)]

    def order(rank: int, ranks: int, micro: int, start: int = 0) -> list[list[Any]]:
        return list(
            BatchOrder(
                lengths, shares=shares, seed=4, global_batch_size=8, micro_batch_size=micro, group_by_length=True,
                pack_length=2048, rank=rank, world_size=ranks, start_step=start, epochs=2,
            )
        )  # fmt: skip

    whole = order(0, 1, 8)
    tokens = sum(int(lengths[list(row)].sum()) for step in whole for row in step)
    assert tokens / (2048 * 8 * len(whole)) > 0.97
    per_rank = [order(rank, 4, 1) for rank in range(4)]
    for step, batch in enumerate(whole):
        dealt = {row for rank in per_rank for rows in rank[2 * step : 2 * step + 2] for row in rows}
        assert dealt == set(batch)
    for start in (1, len(whole) // 2, len(whole) // 2 + 1, len(whole) - 1):
        assert order(0, 1, 8, start) == whole[start:]
    rows = [row for step in whole for one in step for row in one]
    assert set(rows) == set(range(20_000))  # the second data set's other half in the second epoch
    assert sum(row >= 12_000 for row in rows) / len(rows) == pytest.approx(0.25, abs=0.01)


def test_rows_of_one_sample_each_are_one_call(small: Small) -> None:
    """Padded on the right, with little padding: together what they are alone, and one call for all rows."""
    from llava_tune.model.attention import sample_bounds

    llava = build_llava(load_run(small.config).model)
    assert llava.vision is not None
    collate = Collator(llava.vision.tokens, 64)
    each = [samples(llava.llm.config.vocab_size, 64)[k] for k in (1, 2, 1)]
    batch = collate(each)
    assert sample_bounds(batch["position_ids"]).tolist() == [[[[0, batch["position_ids"].shape[1]]]]]
    loss, gradients = loss_and_gradients(llava, [batch])
    expected, one_by_one = loss_and_gradients(llava, [collate([s]) for s in each])
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in one_by_one.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-9, name
    mixed = collate([each[0], [each[1], each[2]]])  # one row is packed: bounds for each row
    assert sample_bounds(mixed["position_ids"]).shape[0] == 2
