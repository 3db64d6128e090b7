"""The loss, packing-free batches, mixed batches, freezing and adapters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llava_tune.config import Lora, Model, load_run
from llava_tune.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_tune.data import Collator, TokenizedSample
from llava_tune.errors import InputError
from llava_tune.model import build_llava, loss
from llava_tune.model.llava import Llava
from tests.conftest import Small


@pytest.fixture(scope="module")
def model(small: Small) -> Model:
    return load_run(small.config).model


def sample(ids: list[int], supervised: int, images: int = 0, seed: int = 0) -> TokenizedSample:
    torch.manual_seed(seed)
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[-supervised:] = ids[-supervised:]
    return TokenizedSample("x", np.array(ids, np.int32), labels, [torch.randn(3, 64, 64) for _ in range(images)])


def reference_loss(llava: Llava, s: TokenizedSample) -> tuple[torch.Tensor, int]:
    """One sample alone, by transformers' own forward with a mask and full logits."""
    embeddings = []
    table = llava.llm.get_input_embeddings()
    labels: list[int] = []
    pixels = iter(s.pixel_values)
    for token, label in zip(s.input_ids.tolist(), s.labels.tolist(), strict=True):
        if token == IMAGE_TOKEN_INDEX:
            patches = llava.projector(llava.vision(next(pixels)[None]))[0]
            embeddings.append(patches)
            labels += [IGNORE_INDEX] * len(patches)
        else:
            embeddings.append(table(torch.tensor([token])))
            labels.append(label)
    x = torch.cat(embeddings)[None]
    logits = llava.llm(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2])).logits[0]
    target = torch.tensor(labels)
    return F.cross_entropy(logits[:-1], target[1:], ignore_index=IGNORE_INDEX, reduction="sum"), int(
        (target[1:] >= 0).sum()
    )


SAMPLES = [
    sample([1, 5, IMAGE_TOKEN_INDEX, 7, 8, 9], 2, images=1, seed=1),
    sample([1, 5, 6, 7, 8, 9, 10, 11, 12], 4),
    sample([IMAGE_TOKEN_INDEX, 3, 4, IMAGE_TOKEN_INDEX, 9, 9, 30], 3, images=2, seed=2),
]


@pytest.mark.parametrize("chosen", [[0, 1, 2], [1], [0]])
def test_a_batch_gives_the_loss_and_gradients_of_its_samples_alone(model: Model, chosen: list[int]) -> None:
    llava = build_llava(model)
    samples = [SAMPLES[i] for i in chosen]
    batch = Collator(llava.vision.tokens, 64)(samples)
    found = llava(**batch)["loss"]
    found.backward()
    gradients = {n: p.grad.clone() for n, p in llava.named_parameters() if p.grad is not None}
    assert set(gradients) == {n for n, _ in llava.named_parameters()}  # the vision tower too, without any image
    llava.zero_grad()
    sums = [reference_loss(llava, s) for s in samples]
    expected = sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert torch.allclose(found, expected, rtol=1e-5)
    expected.backward()
    for name, parameter in llava.named_parameters():
        reference = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        scale = reference.abs().max().clamp(min=1e-3)
        assert ((gradients[name] - reference).abs().max() / scale) < 1e-4, name
    if chosen == [1]:
        assert all(g.abs().max() == 0 for n, g in gradients.items() if not n.startswith("llm"))


def test_chunks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 50, 16, requires_grad=True)
    weight = torch.randn(111, 16, requires_grad=True)
    labels = torch.where(torch.rand(3, 50) < 0.4, torch.randint(0, 111, (3, 50)), IGNORE_INDEX)
    plain = F.cross_entropy(
        (hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    expected = torch.autograd.grad(plain * 0.3, [hidden, weight])
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 111 * 16)
    found = loss.supervised_loss(hidden, weight, labels)
    assert torch.allclose(found, plain, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(found * 0.3, [hidden, weight]), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_nothing_supervised_is_a_loss_of_zero(model: Model) -> None:
    llava = build_llava(model)
    batch = Collator(llava.vision.tokens, 64)([SAMPLES[0]])
    batch["labels"][:] = IGNORE_INDEX
    out = llava(**batch)["loss"]
    out.backward()
    assert out.item() == 0


def test_wrong_number_of_patches_is_an_error(model: Model) -> None:
    llava = build_llava(model)
    batch = Collator(llava.vision.tokens - 1, 64)([SAMPLES[0]])
    with pytest.raises(ValueError, match="15 image tokens in the batch, but the images give"):
        llava(**batch)


def test_freezing_and_lora(model: Model) -> None:
    frozen = dataclasses.replace(
        model,
        llm=dataclasses.replace(model.llm, freeze=True, lora=Lora(rank=4, alpha=8)),
        vision=dataclasses.replace(model.vision, freeze=True, lora=Lora(rank=2, alpha=2, targets=("fc1",))),
    )
    llava = build_llava(frozen, dtype=torch.bfloat16)
    trained = {n for n, p in llava.named_parameters() if p.requires_grad}
    assert {n for n in trained if not n.startswith("projector")} == {
        n for n, _ in llava.named_parameters() if "lora_" in n
    }
    assert any(n.startswith("vision") for n in trained)
    assert all("lm_head" not in n for n in trained)
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for _, p in llava.named_parameters())
    with pytest.raises(InputError, match="no linear layer is called q_projj"):
        build_llava(
            dataclasses.replace(frozen, llm=dataclasses.replace(frozen.llm, lora=Lora(rank=4, targets=("q_projj",))))
        )


def test_the_same_seed_gives_the_same_weights(model: Model) -> None:
    first, second, other = build_llava(model), build_llava(model), build_llava(model, seed=1)
    states = [m.state_dict() for m in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True))
